"""The rewards by name, one file each. Importing this package loads no model code and no verifier."""

from reward_server.reward import Reward
from reward_server.rewards import (
    certainty_weighted_vote,
    constant,
    cosine_length,
    exact_match,
    format,
    gsm8k,
    instruction_following,
    inverted,
    json_schema,
    kimi_length,
    length,
    majority_vote,
    math_verify,
    multiple_choice,
    overlong,
    random,
    reasoning_steps,
    repetition,
    self_certainty,
    semantic_entropy,
    soft_vote,
    tag_count,
)

REWARDS: dict[str, Reward] = {
    module.REWARD.name: module.REWARD
    for module in (
        self_certainty,
        majority_vote,
        soft_vote,
        semantic_entropy,
        certainty_weighted_vote,
        math_verify,
        gsm8k,
        multiple_choice,
        exact_match,
        json_schema,
        instruction_following,
        format,
        tag_count,
        repetition,
        length,
        kimi_length,
        cosine_length,
        overlong,
        reasoning_steps,
        random,
        constant,
        inverted,
    )
}
