"""The trainer's end of broadcasts: a thread that sends the newest weights to those who come for them.

What it sends are copies that nobody trains, so training goes on meanwhile. What blocks where nothing can interrupt it
(NCCL) runs in a thread that is left behind at its deadline, with its line: the next broadcast opens a new one.
"""

import logging
import threading
import time
import uuid
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import cached_property

import torch
from prometheus_client import Counter
from redis import Redis

from services.contract import Version
from services.redis import PASSING, DeadlineExceeded
from services.weights import buckets, meeting, pointer
from services.weights.lines import Line, Rendezvous
from services.weights.meeting import Call, LineKind, Offer, Seat
from services.weights.seconds import SECONDS

log = logging.getLogger(__name__)

LOOK_SECONDS = 0.05
REDIS_PAUSE_SECONDS = 1.0
FILES_SECONDS = 600.0
"""How long it may take to write files for those left out."""

BROADCASTS = Counter(
    "rlif_weight_broadcasts_total", "Broadcasts of weights by how they ended: sent, failed", ["outcome"]
)


@dataclass(frozen=True)
class Load:
    """A version's `buffers` (uint8, one a bucket of at most `bucket_bytes`), which stay as they are until withdrawn."""

    version: Version
    buffers: list[torch.Tensor]
    bucket_bytes: int

    @cached_property
    def sums(self) -> list[int]:
        return [buckets.words_sum(buffer) for buffer in self.buffers]


@dataclass(eq=False)
class Crew:
    """Engines that share a line with the trainer, by (session, workers), and the line once it is open."""

    members: list[tuple[str, int]]
    rendezvous: Rendezvous
    line_id: str = field(default_factory=lambda: uuid.uuid4().hex)
    line: Line | None = None
    given_up: bool = False

    @property
    def size(self) -> int:
        """Ranks of the line: the trainer's, and one a worker."""
        return 1 + sum(workers for _, workers in self.members)

    def send(self, load: Load, device: torch.device, stream: "torch.cuda.Stream | None") -> None:
        """Blocks until all is sent, for ever where NCCL does."""
        with torch.cuda.stream(stream):
            if self.line is None:
                self.line = self.rendezvous.open(self.size, device, max(map(len, load.buffers)))
            for buffer in load.buffers:
                if self.given_up:
                    return self.line.close()
                self.line.broadcast(buffer.to(device, non_blocking=True))
            if stream is not None:
                stream.synchronize()

    def give_up(self) -> None:
        self.given_up = True
        if self.line is not None:
            self.line.close()


class Sender:
    """Sends along lines of `kind` from `device`, each broadcast within `seconds`. The first server that is ready waits
    up to `gather_seconds` for the others; those that come later get a broadcast of their own. For those left out
    `as_files` publishes what is offered as files, from the sender's thread, and nothing is offered any more."""

    def __init__(
        self,
        redis: Redis,
        run_id: str,
        kind: LineKind,
        device: torch.device,
        seconds: float,
        gather_seconds: float = meeting.GATHER_SECONDS,
    ):
        self.as_files: Callable[[], None] | None = None
        self.redis, self.run_id, self.kind, self.device = redis, run_id, kind, device
        self.seconds, self.gather_seconds = seconds, gather_seconds
        # One for all broadcasts: memory that was allocated on a stream is kept for that stream.
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._load: Load | None = None
        self._closed = self._busy = False
        self._changed = threading.Condition()
        self._renewed = self._first_sat = 0.0
        self._called: set[str] = set()
        # Sessions of engines: those of a crew whose broadcast failed are called one by one, until one fails alone.
        self._doubtful: set[str] = set()
        self._left_out: dict[str, str] = {}
        """Session -> replica."""
        self._crew: Crew | None = None
        self._thread = threading.Thread(target=self._run, name="weights sender", daemon=True)
        self._thread.start()

    def renew(self, for_seconds: float = meeting.OFFER_SECONDS) -> None:
        """Tell the servers that there is a trainer that broadcasts. Raises redis' errors."""
        made = Offer(seconds=self.seconds, left_out=sorted(self._left_out))
        meeting.offer(self.redis, self.run_id, made, for_seconds)
        self._renewed = time.monotonic()

    def send(self, load: Load) -> None:
        """To all who come, from now on, until it is withdrawn; redis must name it the newest."""
        with self._changed:
            self._load = load
            self._changed.notify_all()

    def withdraw(self, another_comes: bool = False) -> None:
        """Send nothing any more; a broadcast under way, and files, are waited for. Where another load comes, servers
        that sit wait for that. Raises DeadlineExceeded, redis' errors."""
        ends = time.monotonic() + 2 * self.seconds + FILES_SECONDS
        with self._changed:
            self._load = None
            self._changed.notify_all()
            while self._busy:
                if not self._changed.wait(max(0.0, ends - time.monotonic())):
                    raise DeadlineExceeded(f"run {self.run_id}: the broadcast of weights does not end")
        if another_comes:
            self.renew(self.seconds)
        else:
            self._left_out.clear()
            meeting.withdraw(self.redis, self.run_id)

    def close(self) -> None:
        self.withdraw()
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join()
        self._part()

    # ---- how -----------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or self._load is not None)
                if self._closed:
                    return
                load, self._busy = self._load, True
            assert load is not None
            pause = LOOK_SECONDS
            try:
                self._look(load)
            except PASSING as error:
                log.warning("run %s: weights %s: redis: %s", self.run_id, load.version, error)
                pause = REDIS_PAUSE_SECONDS
            except Exception:  # whatever it is, the next look may fare better
                log.exception("run %s: weights %s", self.run_id, load.version)
                pause = REDIS_PAUSE_SECONDS
            with self._changed:
                self._busy = False
                self._changed.notify_all()
                self._changed.wait_for(lambda: self._closed, pause)

    def _look(self, load: Load) -> None:
        """Renew the offer, and call those who came when they are all that is to be expected, or one waited enough."""
        sums = load.sums  # for seconds, the first time: before the offer is only good for `OFFER_SECONDS`
        now = time.monotonic()
        if now - self._renewed >= meeting.RENEW_SECONDS:
            self.renew()
        seats = meeting.seats(self.redis, self.run_id)
        self._called &= {seat.id for seat in seats}
        seats = [seat for seat in seats if seat.id not in self._called and seat.session not in self._left_out]
        if not seats:
            self._first_sat = now
            if self._left_out and self.as_files is not None:
                self.as_files()
                self._load = None
                self._left_out.clear()
                meeting.withdraw(self.redis, self.run_id)
            return
        beats = pointer.heartbeats_sync(self.redis, self.run_id, meeting.SEAT_SECONDS)
        behind = {beat.replica for beat in beats if beat.version is None or beat.version < load.version}
        expected = behind - set(self._left_out.values())
        if expected <= {seat.replica for seat in seats} or now - self._first_sat >= self.gather_seconds:
            self._broadcast(load, sums, [seat for seat in seats if seat.session not in self._doubtful] or seats[:1])

    def _broadcast(self, load: Load, sums: list[int], seats: list[Seat]) -> None:
        started = time.monotonic()
        crew = self._crew_of(seats)
        first_ranks, rank = {}, 1
        for seat in seats:
            first_ranks[seat.id] = rank
            rank += seat.workers
        made = Call(
            version=load.version,
            line=self.kind,
            line_id=crew.line_id,
            rendezvous=crew.rendezvous.text,
            size=crew.size,
            first_ranks=first_ranks,
            bucket_bytes=load.bucket_bytes,
            sums=sums,
            seconds=self.seconds,
        )
        self.renew(self.seconds + meeting.OFFER_SECONDS)
        self._called |= first_ranks.keys()
        meeting.call(self.redis, self.run_id, made)
        who, sessions = ", ".join(seat.replica for seat in seats), {seat.session for seat in seats}
        try:
            _within(self.seconds, lambda: crew.send(load, self.device, self._stream))
        except Exception as error:
            self._part()
            self._doubtful |= sessions
            if len(seats) == 1:
                self._left_out[seats[0].session] = seats[0].replica
                self.renew()
            BROADCASTS.labels("failed").inc()
            reason = f"not done in {self.seconds:g} s" if isinstance(error, TimeoutError) else repr(error)
            log.error("run %s: the broadcast of weights %s to %s: %s", self.run_id, load.version, who, reason)
            return
        ended = time.monotonic()
        self._doubtful -= sessions
        BROADCASTS.labels("sent").inc()
        SECONDS.labels("trainer", "send").observe(ended - started)
        log.info("run %s: sent weights %s to %s in %.2f s", self.run_id, load.version, who, ended - started)

    def _crew_of(self, seats: list[Seat]) -> Crew:
        """The crew of the last broadcast where the same engines sit again, else a new one."""
        members = [(seat.session, seat.workers) for seat in seats]
        if self._crew is None or self._crew.members != members:
            self._part()
            self._crew = Crew(members, Rendezvous(self.kind, self.seconds))
        return self._crew

    def _part(self) -> None:
        if self._crew is not None:
            self._crew.give_up()
        self._crew = None


def _within(seconds: float, work: Callable[[], None]) -> None:
    """Run `work` in a thread of its own. Raises TimeoutError, and leaves it behind; or what it raised."""
    done: Future[None] = Future()

    def run() -> None:
        try:
            work()
            done.set_result(None)
        except BaseException as error:
            done.set_exception(error)

    threading.Thread(target=run, name="weights broadcast", daemon=True).start()
    done.result(seconds)
