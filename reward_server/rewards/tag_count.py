"""`tag_count`: the share of the demanded tags that occur exactly once.

With the four default tags each is worth 0.25, as in open-r1's tag count reward (there with the line breaks around the
tags, here without): a slope towards the think/answer format, where `format` knows only yes and no.

Outcomes: `ok`. Caveat: order is not looked at.
"""

from typing import Annotated

from pydantic import Field

from reward_server.reward import Context, Params, Reward
from services.api import RewardGroup
from services.contract import Items, Score

Tag = Annotated[str, Field(min_length=1, max_length=256)]


class TagCountParams(Params):
    tags: Items[Tag] = Field(["<think>", "</think>", "<answer>", "</answer>"], min_length=1, max_length=64)


async def score(group: RewardGroup, params: TagCountParams, _context: Context) -> list[Score]:
    def share(text: str) -> float:
        return sum(text.count(tag) == 1 for tag in params.tags) / len(params.tags)

    return [Score.of(share(completion.text)) for completion in group.completions]


REWARD = Reward(
    name="tag_count",
    description="The share of `tags` that the completion has exactly once.",
    needs=(),
    range=(0.0, 1.0),
    params=TagCountParams,
    score=score,
)
