"""Weights by broadcast: buckets, lines, and how trainer and servers meet, over a real redis.

gloo stands in for NCCL and a mapped file for a GPU's memory, `broadcast_server.Receiving` for vLLM's engine (the real
one: test_vllm_engine.py, test_vllm_scorer.py). The rest is what runs on GPUs.
"""

import asyncio
import json
import os
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from broadcast_server import Receiving, follower
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import REGISTRY

from services import recipe
from services.contract import TensorEntry, Version
from services.keys import Keys
from services.redis import connect, connect_sync
from services.weights import broadcast, buckets, disk, meeting, pointer
from services.weights.broadcast import Broadcaster
from services.weights.lines import Rendezvous, open_line
from services.weights.publish import Superseded
from services.weights.sender import BROADCASTS, Sender
from services.weights.vllm_server import Broadcasts

CPU = torch.device("cpu")
DTYPES = {"float32": 4, "bfloat16": 2, "float64": 8, "int8": 1}


def v(version: int, lineage: int = 0) -> Version:
    return Version(lineage=lineage, version=version)


def weights_of(step: int, size: int = 4096) -> dict[str, torch.Tensor]:
    """Of two dtypes and shapes that need padding; what step they are of shows in every element."""
    made = torch.Generator().manual_seed(step)
    return {
        "embed": torch.randn(size, generator=made).bfloat16(),
        "odd": torch.randn(3, 7, generator=made),
        "one": torch.tensor(float(step)),
        "empty": torch.zeros(0, 4),
        "transposed": torch.randn(16, 24, generator=made).t(),
    }


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# ---- buckets -------------------------------------------------------------------------------------------------------


@given(
    st.lists(st.tuples(st.sampled_from(sorted(DTYPES)), st.lists(st.integers(0, 5), max_size=3)), max_size=12),
    st.integers(1, 300),
)
def test_buckets_hold_every_tensor_once_in_order(given_tensors, most):
    manifest = [
        TensorEntry(name=f"t{number}", dtype=dtype, shape=shape, file="", checksum="")
        for number, (dtype, shape) in enumerate(given_tensors)
    ]
    plan = buckets.plan(manifest, most)
    assert [place.entry for bucket in plan for place in bucket.places] == manifest
    buffers = [torch.full((bucket.size,), 7, dtype=torch.uint8) for bucket in plan]
    for bucket, buffer in zip(plan, buffers, strict=True):
        assert bucket.size % buckets.ALIGNMENT == 0
        assert len(bucket.places) == 1 or bucket.places[-1].start + bucket.places[-1].size <= most
        # Every byte of a tensor is its own: filled one after the other, each keeps what it was filled with.
        for number, (_, view) in enumerate(buckets.views(bucket, buffer)):
            view.fill_(number + 1)
        for number, (name, view) in enumerate(buckets.views(bucket, buffer)):
            entry = next(entry for entry in manifest if entry.name == name)
            assert (disk.dtype_name(view), list(view.shape)) == (entry.dtype, entry.shape)
            assert (view == number + 1).all()


def test_a_stale_bucket_is_noticed(tmp_path):
    tensors = weights_of(1)
    manifest = disk.write_tensors(tmp_path, iter(tensors.items()))
    staging = broadcast.Staging(manifest, 1000, pinned=False)
    staging.fill(tensors.items())
    assert len(staging.buffers) > 2
    sums = [buckets.words_sum(buffer) for buffer in staging.buffers]

    def deliver(stale: int | None) -> dict[str, torch.Tensor]:
        left = [buffer if number != stale else buffer * 0 for number, buffer in enumerate(staging.buffers)]
        got = buckets.received(lambda into: into.copy_(left.pop(0)), manifest, 1000, sums, CPU)
        return {name: tensor for some in got for name, tensor in some}

    assert same(deliver(None), tensors)
    with pytest.raises(RuntimeError, match="bucket 1 of"):
        deliver(1)


def test_staging_takes_only_the_tensors_that_were_published_before(tmp_path):
    manifest = disk.write_tensors(tmp_path, iter(weights_of(0).items()))
    staging = broadcast.Staging(manifest, 2000, pinned=False)
    for change, complaint in [
        ({"odd": torch.zeros(3, 8)}, r"odd \('float32', \[3, 8\]\)"),
        ({"odd": torch.zeros(3, 7).double()}, "odd"),
        ({"more": torch.zeros(1)}, "more"),
    ]:
        with pytest.raises(ValueError, match=complaint):
            staging.fill((weights_of(0) | change).items())
    with pytest.raises(ValueError, match="tensor odd was not given"):
        staging.fill((name, tensor) for name, tensor in weights_of(0).items() if name != "odd")
    changing = weights_of(2)
    staging.fill(changing.items())
    changing["embed"].zero_()  # training goes on
    assert same(staging.tensors(), weights_of(2))


# ---- lines ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["gloo", "ipc"])
def test_a_line_carries_the_same_bytes_to_all(kind):
    rendezvous = Rendezvous(kind, 20)
    sent = [torch.randint(0, 256, (size,), dtype=torch.uint8) for size in (64, 1024, 16)]
    got: dict[int, list[torch.Tensor]] = {1: [], 2: []}

    def receive(rank: int) -> None:
        line = open_line(kind, rendezvous.text, rank, 3, CPU, 20, 1024)
        for buffer in sent:
            got[rank].append(torch.zeros_like(buffer))
            line.broadcast(got[rank][-1])

    threads = [threading.Thread(target=receive, args=(rank,), daemon=True) for rank in got]
    for thread in threads:
        thread.start()
    line = rendezvous.open(3, CPU, 1024)
    for buffer in sent:
        line.broadcast(buffer)
    for thread in threads:
        thread.join(20)
    assert all(torch.equal(one, other) for rank in got for one, other in zip(got[rank], sent, strict=True))


def test_who_waits_on_a_closed_line_comes_back():
    rendezvous, ended = Rendezvous("ipc", 20), threading.Event()
    peer = threading.Thread(target=open_line, args=("ipc", rendezvous.text, 1, 2, CPU, 20, 64))
    peer.start()
    line = rendezvous.open(2, CPU, 64)
    peer.join(20)

    def send() -> None:
        with pytest.raises(RuntimeError, match="closed"):
            line.broadcast(torch.zeros(64, dtype=torch.uint8))
        ended.set()

    threading.Thread(target=send, daemon=True).start()
    assert not ended.wait(0.2)  # nobody reads at the other end
    line.close()
    assert ended.wait(5)


# ---- trainer and servers -------------------------------------------------------------------------------------------


@pytest.fixture
def run() -> str:
    return f"broadcast-{uuid.uuid4().hex[:8]}"


@pytest.fixture
def trainer(redis_url, run, tmp_path):
    with trainer_of(redis_url, run, tmp_path) as made:
        yield made


@contextmanager
def trainer_of(redis_url: str, run: str, folder: Path, kind: str = "gloo", **options) -> Iterator[Broadcaster]:
    """One broadcast may take two seconds; those who are expected are waited for longer than a busy machine needs."""
    chosen = {"seconds": 2.0, "gather_seconds": 5.0} | options
    with connect_sync(redis_url) as redis:
        made = Broadcaster(
            Sender(redis, run, kind, CPU, **chosen), "nccl", folder, snapshot_every=50, bucket_bytes=2000
        )
        try:
            yield made
        finally:
            made.sender.close()


@asynccontextmanager
async def server(redis_url: str, run: str, replica: str, service: str = "rollout"):
    engine = Receiving()
    following = follower(redis_url, run, replica, engine, service)
    await following.start()
    try:
        yield SimpleNamespace(engine=engine, follower=following)
    finally:
        await following.stop()


async def publish(trainer: Broadcaster, step: int, lineage: int = 0):
    return await asyncio.to_thread(trainer.publish, v(step, lineage), weights_of(step).items())


async def until(condition: Callable[[], bool], seconds: float = 60) -> None:
    ends = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < ends
        await asyncio.sleep(0.01)


def broadcasts(end: str = "sent") -> float:
    return BROADCASTS.labels(end)._value.get()


@pytest.mark.parametrize("kind", ["gloo", "ipc"])
async def test_one_broadcast_feeds_rollout_and_scorer(redis_url, run, tmp_path, kind):
    with trainer_of(redis_url, run, tmp_path, kind) as trainer:
        async with server(redis_url, run, "rollout") as one, server(redis_url, run, "reward", "reward") as other:
            first = await publish(trainer, 0)
            assert first.transport == "disk"
            for each in (one, other):
                await each.follower.at_least(v(0), 60)
            before = broadcasts()
            for step in (1, 2, 3):
                made = await publish(trainer, step)
                assert made.transport == "nccl" and made.base == v(0) and not Path(made.location).exists()
                for each in (one, other):
                    assert await each.follower.at_least(v(step), 10) == v(step)
                    assert same(each.engine.tensors, weights_of(step))
            await until(lambda: broadcasts() - before == 3)
            lines = {ticket.call.line_id for each in (one, other) for ticket in each.engine.tickets}
            assert len(lines) == 1  # opened once
            ranks = [{each.engine.tickets[n].first_rank for each in (one, other)} for n in range(3)]
            assert ranks == [{1, 2}] * 3
            for phase in ("stage", "announce", "send"):
                labels = {"service": "trainer", "phase": phase}
                assert REGISTRY.get_sample_value("rlif_weight_sync_seconds_count", labels) >= 3
            assert one.engine.events[0] == "file 0.0"
            assert one.engine.events[1:4] == ["pause", "resume", "broadcast 0.1"]


async def test_a_server_that_starts_late_has_a_broadcast_of_its_own(redis_url, run, trainer):
    async with server(redis_url, run, "a") as one:
        await publish(trainer, 0)
        await one.follower.at_least(v(0), 60)
        before = broadcasts()
        await publish(trainer, 1)
        await one.follower.at_least(v(1), 60)
        await until(lambda: broadcasts() - before == 1)  # counted when the servers have theirs
        async with server(redis_url, run, "b") as late:
            await late.follower.at_least(v(1), 60)
            assert same(late.engine.tensors, weights_of(1)) and not late.engine.events[0].startswith("file")
            await until(lambda: broadcasts() - before == 2)
            assert len(one.engine.tickets) == 1
            await publish(trainer, 2)
            for each in (one, late):
                await each.follower.at_least(v(2), 60)
            assert one.engine.tickets[-1].call == late.engine.tickets[-1].call
            assert one.engine.tickets[-1].call.size == 3


async def test_who_sits_is_called_to_what_is_newest_by_then(redis_url, run, trainer, monkeypatch):
    """A server slower to finish what is in flight than the trainer's steps gets new weights all the same."""
    async with server(redis_url, run, "slow") as one:
        await publish(trainer, 0)
        await one.follower.at_least(v(0), 60)
        monkeypatch.setattr(trainer.sender, "_look", lambda load: trainer.sender.renew())
        await publish(trainer, 1)
        await until(lambda: one.engine.events[-1] == "pause")
        monkeypatch.undo()
        advance = pointer.advance
        monkeypatch.setattr(pointer, "advance", lambda *given: time.sleep(0.3) or advance(*given))
        failed = broadcasts("failed")
        await publish(trainer, 2)
        assert await one.follower.at_least(v(1), 60) == v(2)
        assert same(one.engine.tensors, weights_of(2)) and one.engine.events.count("pause") == 1
        assert broadcasts("failed") == failed  # nobody is called before redis names what to


async def test_without_a_trainer_the_newest_files_are_served(redis_url, run, tmp_path):
    with trainer_of(redis_url, run, tmp_path) as trainer:
        for step in (0, 1, 2):
            await publish(trainer, step)
        async with connect(redis_url) as redis:
            assert (await meeting.offered(redis, run)).seconds == 2
    async with server(redis_url, run, "late") as one:
        await one.follower.at_least(v(0), 60)
        assert same(one.engine.tensors, weights_of(0)) and "pause" not in one.engine.events
        assert "weights 0.2 refused: no trainer offers" in one.follower.refusal or one.follower.refusal == ""
        with trainer_of(redis_url, run, tmp_path) as trainer:
            await publish(trainer, 2, lineage=1)
            await one.follower.at_least(v(2, 1), 10)
            await publish(trainer, 3, lineage=1)
            await one.follower.at_least(v(3, 1), 10)
            assert same(one.engine.tensors, weights_of(3))


async def test_a_trainer_that_dies_lets_those_who_sit_go_on(redis_url, run, trainer, monkeypatch):
    async with server(redis_url, run, "a") as one:
        await publish(trainer, 0)
        await one.follower.at_least(v(0), 60)
        monkeypatch.setattr(trainer.sender, "_look", lambda load: None)  # it offers once, and never again
        await publish(trainer, 1)
        await until(lambda: "pause" in one.engine.events)
        trainer.redis.pexpire(Keys(run).weights_offer, 200)  # not to wait the ten seconds
        await until(lambda: one.engine.events[-1] == "resume", 5)
        await until(lambda: "no trainer offers" in one.follower.refusal)
        assert one.follower.version == v(0) and same(one.engine.tensors, weights_of(0))
        assert meeting.seats(trainer.redis, run) == []


async def test_a_server_that_always_fails_keeps_nobody_else_from_weights(redis_url, run, tmp_path, monkeypatch):
    with trainer_of(redis_url, run, tmp_path, seconds=1.0) as trainer:
        async with server(redis_url, run, "sound") as sound, server(redis_url, run, "bad") as bad:
            monkeypatch.setattr(bad.engine, "take", lambda ticket: 1 / 0)  # at once; the others wait for it on the line
            await publish(trainer, 0)
            for each in (sound, bad):
                await each.follower.at_least(v(0), 60)
            failed = broadcasts("failed")
            await publish(trainer, 1)
            await sound.follower.at_least(v(1), 60)
            await bad.follower.at_least(v(1), 30)
            assert broadcasts("failed") - failed == 2  # together, then alone
            assert same(bad.engine.tensors, weights_of(1)) and bad.engine.events[-1] == "file 0.1"
            await publish(trainer, 2)
            await sound.follower.at_least(v(2), 30)
            await bad.follower.at_least(v(2), 30)
            assert same(sound.engine.tensors, weights_of(2)) and broadcasts("failed") - failed == 3
            monkeypatch.undo()
            await publish(trainer, 3)
            for each in (sound, bad):
                await each.follower.at_least(v(3), 60)
                assert same(each.engine.tensors, weights_of(3))
            assert bad.engine.events[-1] != "file 0.3" and broadcasts("failed") - failed == 3


async def test_the_only_server_gets_files_when_it_cannot_be_sent_weights(redis_url, run, tmp_path, monkeypatch):
    with trainer_of(redis_url, run, tmp_path, seconds=1.0) as trainer:
        async with server(redis_url, run, "only") as only:
            monkeypatch.setattr(only.engine, "take", lambda ticket: 1 / 0)
            await publish(trainer, 0)
            await publish(trainer, 1)
            await only.follower.at_least(v(1), 30)
            assert same(only.engine.tensors, weights_of(1)) and only.engine.events[-1] == "file 0.1"
            assert (newest := pointer.newest_version_sync(trainer.redis, run)) == v(1)
            assert (tmp_path / str(newest).replace(".", "-")).is_dir()
            written = (tmp_path / "0-1").stat().st_mtime_ns
            await asyncio.to_thread(trainer.close)
            assert (tmp_path / "0-1").stat().st_mtime_ns == written  # they are files already


async def test_a_server_that_takes_no_broadcasts_says_so_and_serves_files(redis_url, run, trainer):
    engine = Receiving()
    following = follower(redis_url, run, "plain", engine)
    following.receive = None
    await publish(trainer, 0)
    await publish(trainer, 1)
    await following.start()
    await following.at_least(v(0), 60)
    await until(lambda: "takes part in no broadcasts" in following.refusal)
    assert following.version == v(0)
    await following.stop()


async def test_the_last_version_is_left_as_files(redis_url, run, tmp_path):
    with trainer_of(redis_url, run, tmp_path) as trainer:
        await publish(trainer, 0)
        last = await publish(trainer, 1)
        await asyncio.to_thread(trainer.close)
        with connect_sync(redis_url) as redis:
            assert pointer.newest_version_sync(redis, run) == v(1) and redis.get(Keys(run).weights_offer) is None
    async with server(redis_url, run, "late") as one:
        await one.follower.at_least(v(1), 60)
        assert same(one.engine.tensors, weights_of(1)) and one.engine.events == ["file 0.1"]
        assert Path(last.location).exists()


async def test_one_version_in_so_many_is_whole(trainer, tmp_path):
    trainer._every = 3
    kinds = [(await publish(trainer, step)).transport for step in range(7)]
    assert kinds == ["disk", "nccl", "nccl", "disk", "nccl", "nccl", "disk"]
    with pytest.raises(Superseded):
        await publish(trainer, 6)
    assert {path.name for path in tmp_path.iterdir()} == {"0-0", "0-3", "0-6"}


@pytest.fixture
def processes(redis_url, run) -> Iterator[Callable[..., subprocess.Popen]]:
    started: list[subprocess.Popen] = []

    def start(replica: str, stop_at: str = "") -> subprocess.Popen:
        file = Path(__file__).with_name("broadcast_server.py")
        env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(file.parents[1]), os.environ.get("PYTHONPATH", "")])}
        command = [sys.executable, str(file), redis_url, run, replica, stop_at]
        started.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.wait()


def served_by(process: subprocess.Popen, version: Version) -> dict[str, str]:
    """The checksums of the tensors it serves as `version`, by name."""
    assert process.stdout is not None
    for line in process.stdout:
        said = json.loads(line)
        if said["version"] == str(version):
            return said["sums"]
    raise AssertionError(f"it ended before it served {version}")


def test_a_server_that_hangs_is_left_out_and_comes_back(trainer, processes):
    """Two real processes; one stops when it is called. The trainer gives that broadcast up at its deadline and makes
    another without it; publishing never waits longer, and the one that hung gets its own when it goes on."""
    sound, hanging = processes("sound"), processes("hanging", "0.2")
    expected = {
        step: {name: disk.checksum(tensor.contiguous()) for name, tensor in weights_of(step).items()}
        for step in range(4)
    }
    trainer.publish(v(0), weights_of(0).items())
    for process in (sound, hanging):
        assert served_by(process, v(0)) == expected[0]
    trainer.publish(v(1), weights_of(1).items())
    for process in (sound, hanging):
        assert served_by(process, v(1)) == expected[1]
    failed = broadcasts("failed")
    trainer.publish(v(2), weights_of(2).items())
    trainer.sender.gather_seconds = 0.5
    while broadcasts("failed") == failed:
        time.sleep(0.02)
    began = time.monotonic()
    trainer.publish(v(3), weights_of(3).items())
    assert time.monotonic() - began < 10, "it hangs for as long as the other does"
    assert served_by(sound, v(3)) == expected[3]
    hanging.send_signal(signal.SIGCONT)
    assert served_by(hanging, v(3)) == expected[3]


# ---- the engine behind a server ------------------------------------------------------------------------------------


def ticket(seconds: float = 5.0, line_id: str = "one") -> meeting.Ticket:
    entry = TensorEntry(name="w", dtype="float32", shape=[4], file="", checksum="")
    call = meeting.Call(
        version=v(1),
        line="gloo",
        line_id=line_id,
        rendezvous="127.0.0.1:1",
        size=2,
        first_ranks={"seat": 1},
        bucket_bytes=100,
        sums=[0],
        seconds=seconds,
    )
    return meeting.Ticket(SimpleNamespace(manifest=[entry], id=v(1)), call, 1)


class Asked:
    """Stands where AsyncLLM does, which asks its workers: says what it was asked, and fails or hangs where told."""

    def __init__(self, fails: str = "", hangs: str = "") -> None:
        self.fails, self.hangs, self.calls = fails, hangs, []

    async def collective_rpc(self, method: str, **_given) -> None:
        self.calls.append(method)
        if method == self.hangs:
            await asyncio.sleep(3600)
        if method == self.fails:
            raise ValueError("so be it")

    async def reset_prefix_cache(self) -> None:
        self.calls.append("forget")

    async def update_weight_version(self, label: str) -> None:
        self.calls.append(label)


LINE, UPDATE = "init_weight_transfer_engine", ["start_weight_update", "update_weights", "finish_weight_update"]


async def test_the_order_in_which_an_engine_is_asked():
    llm, taking = Asked(), Broadcasts(1)
    for _ in range(2):
        await taking.open(llm, ticket())
        await taking.take(llm, ticket())
    update = [*UPDATE, "forget", "0.1"]
    assert llm.calls == [LINE, *update, *update]  # the line is opened once
    await taking.open(llm, ticket(line_id="another"))
    assert llm.calls[-1] == LINE and not taking.lost


@pytest.mark.parametrize("step", [LINE, *UPDATE])
@pytest.mark.parametrize("how", ["fails", "hangs"])
async def test_an_engine_is_lost_once_its_model_may_be_a_mixture(monkeypatch, step, how):
    monkeypatch.setattr("services.weights.vllm_server.MARGIN_SECONDS", 0.0)
    llm, taking = Asked(**{how: step}), Broadcasts(1)
    with pytest.raises(RuntimeError, match=r"weights 0\.1"):
        await taking.open(llm, ticket(0.05))
        await taking.take(llm, ticket(0.05))
    # A worker that hangs is lost in any case; one whose line did not open still has the old weights.
    assert bool(taking.lost) == (how == "hangs" or step != LINE)


# ---- recipes -------------------------------------------------------------------------------------------------------

SOUND = {
    "run": {"name": "r", "dir": "runs/r"},
    "model": {"path": "m"},
    "data": {"path": "d.jsonl", "fields": {"prompt": "question"}},
    "rewards": "intuitor",
    "rollout": {"engine": "vllm"},
    "scorer": {"engine": "vllm"},
    "trainer": {"steps": 1, "groups_per_step": 1},
}


@pytest.mark.parametrize(
    ("transport", "overrides", "complaint"),
    [
        ("nccl", [], ""),
        ("ipc", [], ""),
        ("nccl", ["trainer.device=cpu"], "weights.transport: nccl needs GPUs, and trainer.device is cpu"),
        ("ipc", ["rollout.device=cpu"], "weights.transport: ipc needs GPUs, and rollout.device is cpu"),
        ("nccl", ["scorer.device=cpu"], "scorer.device is cpu"),
        ("nccl", ["scorer.device=cpu", "scorer.follow=frozen"], ""),
        ("nccl", ["rollout.engine=transformers"], "rollout.engine is transformers; use rollout.engine: vllm"),
        ("nccl", ["scorer.engine=transformers"], "scorer.engine is transformers"),
        ("nccl", ["scorer.engine=transformers", "scorer.follow=frozen"], ""),
        ("nccl", ["rollout.engine=transformers", "rollout.urls=[http://a:1]"], ""),
        ("ipc", ["rollout.replicas=2"], "ipc stays within one GPU, and rollout has several"),
        ("ipc", ["rollout.tensor_parallel_size=2"], "ipc stays within one GPU, and rollout has several"),
        ("ipc", ["trainer.gpus=[0]", "rollout.gpus=[1]"], "rollout.gpus: .1. is not the trainer's first .0."),
        ("ipc", ["trainer.gpus=[0]", "rollout.gpus=[0]"], ""),
        ("nccl", ["trainer.gpus=[0]", "rollout.gpus=[0]"], "NCCL takes no GPU twice"),
        ("nccl", ["trainer.gpus=[0]", "rollout.gpus=[1]", "scorer.gpus=[1]"], "scorer.gpus: .1. are rollout.gpus"),
        ("nccl", ["trainer.gpus=[0]", "rollout.gpus=[1]", "scorer.gpus=[2]"], ""),
        ("nccl", ["weights.broadcast_seconds=0"], "weights.broadcast_seconds"),
    ],
)
def test_recipes_that_cannot_broadcast_are_refused(transport, overrides, complaint):
    given = [f"weights.transport={transport}", *overrides]
    if complaint:
        with pytest.raises(recipe.RecipeError, match=complaint):
            recipe.parse(SOUND, given)
    else:
        assert recipe.parse(SOUND, given).weights.transport == transport


def test_a_trainer_on_the_cpu_refuses_to_broadcast(redis_url, tmp_path):
    chosen = recipe.parse(SOUND, ["weights.transport=nccl", f"weights.dir={tmp_path}"])
    with connect_sync(redis_url) as redis, pytest.raises(recipe.RecipeError, match="the trainer is on the CPU"):
        broadcast.publisher(chosen, redis, CPU)


def test_servers_on_transformers_refuse_broadcasts(tmp_path):
    from reward_server.app import Settings as RewardSettings
    from reward_server.scorer.engines import scorer_service
    from rollout_server.app import Settings, make_engine
    from services.startup import StartupError

    with pytest.raises(StartupError, match="takes part in no broadcasts"):
        make_engine(Settings(str(tmp_path), broadcasts=True))
    with pytest.raises(StartupError, match="takes part in no broadcasts"):
        scorer_service(RewardSettings(model=str(tmp_path), broadcasts=True))
