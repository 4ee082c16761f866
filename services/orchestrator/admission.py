"""Which groups are made next: in the order of their index, as many as the capacity rule takes, the retried ones first.

A dead group that is asked for again takes the room of one that was not begun. So that none is asked for in vain, redis
is told how many more there is room for before an index is passed, and passing waits where one was asked for meanwhile.
"""

import bisect
import logging
from collections.abc import Collection

from services.orchestrator.chunk import Chunk, Desk

log = logging.getLogger(__name__)


class Admission:
    """`cursor` is the first index that was not admitted yet, `seen` the ids of all groups that need not be made in
    their place, `made` the indices of those that were pushed before the order began. `again` counts dead groups that
    were admitted besides. `offered` is the room for them that redis was told of last, and how many were asked for."""

    def __init__(self, desk: Desk):
        self.desk = desk
        self.cursor = self.again = 0
        self.seen: set[str] = set()
        self.made: list[int] = []
        self.offered: tuple[int, int] | None = None

    async def begin(self) -> None:
        """From the first index on; it is called before anything is admitted, and after a roll-back."""
        watch, pace, group_id = self.desk.watch, self.desk.pace, self.desk.source.group_id
        retried = watch.retried
        seen = await self.desk.queue.seen()
        unmade = [index for index in dict.fromkeys(retried) if group_id(index) not in seen]
        await watch.begin_again(len(retried), unmade)
        gone = set(watch.gone)
        most = pace.capacity(pace.steps, None, len(watch.gone)) if seen else 0
        self.made = [index for index in range(most) if index not in gone and group_id(index) in seen]
        self.seen = seen.union(map(group_id, watch.again))
        self.cursor, self.again, self.offered = 0, 0, None

    async def next(self, running: Collection[Chunk]) -> Chunk | None:
        """The next groups to make; none where those that are `running` have to be trained first."""
        while True:
            chunk = self._retried_chunk(running)
            if chunk is not None:
                return chunk
            chunk, cursor = self._next_chunk(running)
            if await self.offer_room(cursor):
                self.cursor = cursor
                return chunk

    async def offer_room(self, cursor: int) -> bool:
        """Tell redis how many dead groups there is room for when `cursor` is the next index. False when some were asked
        for that were not known here."""
        watch = self.desk.watch
        offer = (self._left(cursor), len(watch.retried))
        if offer != self.offered:
            if not await self.desk.queue.offer_room(*offer):
                await watch.refresh()
                return False
            self.offered = offer
        return True

    def _left(self, cursor: int) -> int:
        """How many more groups the run takes until its end, besides those that are to be made again."""
        watch, pace = self.desk.watch, self.desk.pace
        ahead = len(self.made) - bisect.bisect_left(self.made, cursor)
        return pace.capacity(pace.steps, None, watch.dead_below(cursor)) - cursor - ahead - len(watch.again)

    def _has_room(self, running: Collection[Chunk], cursor: int) -> bool:
        """Whether the trainer can take one more group."""
        watch = self.desk.watch
        assert watch.version is not None
        oldest = min((chunk.floor for chunk in running), default=None)
        return cursor + self.again < self.desk.pace.capacity(watch.version.version, oldest, watch.dead_below(cursor))

    def _is_promised(self, cursor: int) -> bool:
        """Whether the group of index `cursor` would take the room of one that is to be made again."""
        left = self._left(cursor + 1)
        return left < 0 and left < self._left(cursor)

    def _retried_chunk(self, running: Collection[Chunk]) -> Chunk | None:
        """A group that was given up and is to be made again, once the trainer can take one more."""
        watch = self.desk.watch
        waiting = watch.again[self.again :]
        # Not before its place: what an order that begins anew finds made was admitted below its cursor.
        if not waiting or waiting[0] >= self.cursor or not self._has_room(running, self.cursor):
            return None
        assert watch.version is not None
        self.again += 1
        log.info("the group of index %d, which was given up, is made again", waiting[0])
        return Chunk([waiting[0]], floor=watch.version.version)

    def _next_chunk(self, running: Collection[Chunk]) -> tuple[Chunk | None, int]:
        """The next groups in their order, cut where `groups_per_request` or the capacity ends; and the index after."""
        recipe, source, watch = self.desk.recipe, self.desk.source, self.desk.watch
        assert watch.version is not None
        size, version = recipe.rollout.groups_per_request, watch.version.version
        cursor = self.cursor
        while True:
            first = cursor
            end = (first // size + 1) * size
            while cursor < end and self._has_room(running, cursor) and not self._is_promised(cursor):
                cursor += 1
            if cursor == first:
                return None, cursor
            ids = {index: source.group_id(index) for index in range(first, cursor)}
            here = {index for chunk in running for index in chunk.indices}
            missing = [index for index, group_id in ids.items() if group_id not in self.seen and index not in here]
            if not missing:
                continue
            if recipe.run.deterministic:
                # The same batch as the first time; the queue drops what it has. Only the dead stay out of it, and those
                # of them that come later.
                missing = [index for index in ids if index not in {*watch.dead, *watch.again}]
            return Chunk(missing, floor=version), cursor
