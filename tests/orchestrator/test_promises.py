"""Whatever dies, is asked for again or starts anew: a retry that was accepted is made, and no step lacks groups."""

import asyncio
import uuid
from types import SimpleNamespace

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from orchestrator.by_hand import Trainer
from scored_groups import make_groups

from services.orchestrator.admission import Admission
from services.orchestrator.pacing import Pace
from services.orchestrator.progress import Tally, Watch

pytestmark = pytest.mark.alone

STEPS, PER_STEP = 2, 2
STORY = st.lists(
    st.tuples(
        st.sampled_from(["admit", "admit", "end", "die", "retry", "look", "train", "restart"]), st.integers(0, 3)
    ),
    min_size=10,
    max_size=40,
)


def told(text: str) -> list[tuple[str, int]]:
    return [(word.rstrip("0123"), int(word[-1]) if word[-1].isdecimal() else 0) for word in text.split()]


UNSEEN = told("admit die look admit retry admit")
"""Asked for when the last index is about to be passed."""
BEHIND = told("admit end admit die look retry restart admit")
"""The order begins anew, and the dead group's own place is in the last chunk."""
AHEAD = told("admit admit admit admit die1 end1 end1 look admit end1 restart admit retry")
"""The order begins anew at a group that is missing, and all behind it are made."""


class Story:
    """Real redis, queue and watch; what is at the servers are chunks in `running`."""

    def __init__(self, url: str, staleness: int, size: int):
        self.trainer = Trainer(url, f"promises-{uuid.uuid4().hex[:8]}")
        self.queue, self.pace, self.size = self.trainer.queue, Pace(STEPS, PER_STEP, staleness), size
        (self.group,) = make_groups(1, size=2)
        self.trained, self.accepted = list[int](), set[int]()

    async def start(self) -> None:
        self.running, self.wake = [], asyncio.Event()
        self.watch = Watch(self.queue.redis, self.queue, 0.05, Tally(), self.wake)
        await self.watch.refresh()
        self.admission = Admission(
            SimpleNamespace(
                watch=self.watch,
                queue=self.queue,
                pace=self.pace,
                source=SimpleNamespace(group_id=lambda index: f"g{index}"),
                recipe=SimpleNamespace(
                    rollout=SimpleNamespace(groups_per_request=self.size), run=SimpleNamespace(deterministic=False)
                ),
            )
        )
        await self.admission.begin()

    async def admit(self, _: int) -> None:
        chunk = await self.admission.next(self.running)
        self.running += [chunk] if chunk else []

    async def end(self, which: int, die: bool = False) -> None:
        if self.running:
            for index in self.running.pop(which % len(self.running)).indices:
                if die:
                    await self.queue.bury(f"g{index}", index, "no")
                else:
                    await self.queue.push(self.group.model_copy(update={"group_id": f"g{index}", "index": index}))

    async def die(self, which: int) -> None:
        await self.end(which, die=True)

    async def retry(self, which: int) -> None:
        letters = await self.queue.dead()
        if letters:
            letter = letters[which % len(letters)]
            try:
                self.accepted.add(await self.queue.retry(letter.entry_id))
            except ValueError:
                assert letter in await self.queue.dead()

    async def look(self, _: int) -> None:
        await self.watch.refresh()
        await self.admission.offer_room(self.admission.cursor)

    async def train(self, _: int) -> None:
        if self.trainer.version < STEPS and (await self.queue.depth()).queued >= PER_STEP:
            entries = await self.queue.pull(PER_STEP, 10)
            self.trained += [entry.group.index for entry in entries]
            await self.queue.ack([entry.entry_id for entry in entries], self.trainer.lineage)
            self.trainer.publish(self.trainer.version + 1)

    async def restart(self, _: int) -> None:
        await self.start()


@given(STORY, st.integers(0, 1), st.integers(1, 3))
@example(UNSEEN, 1, 3)
@example(BEHIND, 1, 3)
@example(AHEAD, 1, 1)
@settings(max_examples=20)
def test_what_was_promised_is_made_and_every_step_has_its_groups(redis_server, story, staleness, size):
    async def tell() -> None:
        one = Story(redis_server.url, staleness, size)
        await one.trainer.start()
        await one.start()
        for what, which in story:
            await getattr(one, what)(which)
        for _ in range(30 * STEPS * PER_STEP):
            if one.trainer.version == STEPS and not one.running:
                break
            for what in ("look", "admit", "end", "train"):
                await getattr(one, what)(0)
        assert one.trainer.version == STEPS, "it waits for ever"
        seen = await one.queue.seen()
        assert {f"g{index}" for index in one.accepted} <= seen
        assert len(set(one.trained)) == len(one.trained) == STEPS * PER_STEP
        assert (await one.queue.depth()).queued == 0, "more than the steps take"
        await one.queue.redis.aclose()
        one.trainer.redis.close()

    asyncio.run(tell())
