"""The rewards by name, one file each. Importing this package loads no model code and no verifier."""

from reward_server.reward import Reward
from reward_server.rewards import exact_match, format, length, math_verify, random, repetition, self_certainty

REWARDS: dict[str, Reward] = {
    module.REWARD.name: module.REWARD
    for module in (self_certainty, math_verify, exact_match, format, repetition, length, random)
}
