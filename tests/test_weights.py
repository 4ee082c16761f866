"""Weight versions over a real disk and a real redis: bit-exact, atomic, ordered, and never torn."""

import asyncio
import json
import os
import shutil
import uuid
from pathlib import Path

import pytest
import torch
from prometheus_client import REGISTRY
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from services.contract import Version
from services.keys import Keys
from services.redis import DeadlineExceeded, EmbeddedRedis, connect, connect_sync
from services.weights import disk, pointer
from services.weights.follow import Follower
from services.weights.publish import Publisher, Superseded

V = Version


def some_tensors(seed: int = 0, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """All shapes that occur, and the values that a rounding or a copy through another dtype would change."""
    made = torch.Generator().manual_seed(seed)
    tensors = {
        "matrix": torch.randn(64, 32, generator=made),
        "vector": torch.randn(7, generator=made),
        "scalar": torch.tensor(3.25 + seed),
        "empty": torch.zeros(0, 4),
        "odd": torch.tensor([float("nan"), float("inf"), -0.0, 1e-45, 3.4e38]),
        "transposed": torch.randn(8, 16, generator=made).t(),
        "strided": torch.randn(8, 16, generator=made)[:, ::2],
    }
    return {name: tensor.to(dtype) for name, tensor in tensors.items()} | {"ids": torch.arange(5)}


def bits(tensor: torch.Tensor) -> tuple[torch.dtype, list[int], bytes]:
    return tensor.dtype, list(tensor.shape), tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def same(one, other) -> bool:
    one, other = dict(one), dict(other)
    return one.keys() == other.keys() and all(bits(one[name]) == bits(other[name]) for name in one)


# ---- files ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shard_bytes", [2**30, 4096, 1])
def test_tensors_round_trip_bit_exactly(tmp_path, dtype, shard_bytes):
    tensors = some_tensors(dtype=dtype)
    manifest = disk.write_tensors(tmp_path, iter(tensors.items()), shard_bytes)
    assert same(disk.read_tensors(tmp_path, manifest), tensors)
    files = sorted(path.name for path in tmp_path.iterdir())
    if shard_bytes == 2**30:
        assert files == ["model.safetensors"]
    else:
        count = len(files) - 1
        assert files[:-1] == [f"model-{n:05d}-of-{count:05d}.safetensors" for n in range(1, count + 1)]
        index = json.loads((tmp_path / files[-1]).read_text())
        assert index["weight_map"] == {entry.name: entry.file for entry in manifest}
        assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
    for file in files:
        if not file.endswith(".json"):
            with safe_open(tmp_path / file, framework="pt") as opened:
                assert opened.metadata() == {"format": "pt"}


def test_the_checksum_is_xxh3_128_of_the_raw_bytes():
    import xxhash

    tensor = torch.tensor([[1.0, -2.0], [3.0, 4.0]])
    assert disk.checksum(tensor) == xxhash.xxh3_128(b"\0\0\x80?\0\0\0\xc0\0\0@@\0\0\x80@").hexdigest()
    assert disk.checksum(tensor.bfloat16()) == xxhash.xxh3_128(b"\x80?\0\xc0@@\x80@").hexdigest()


def test_tensors_in_the_same_memory_are_all_written(tmp_path):
    flat = torch.randn(64)
    tensors = {"whole": flat, "tied": flat, "view": flat.view(8, 8), "half": flat[32:]}
    manifest = disk.write_tensors(tmp_path, tensors.items())
    assert same(disk.read_tensors(tmp_path, manifest), tensors)


def test_writing_keeps_no_more_than_a_shard(tmp_path):
    alive, most = set(), 0

    class Tracked(torch.Tensor):
        def __del__(self):
            alive.discard(id(self))

    def stream():
        nonlocal most
        for number in range(40):
            tensor = torch.randn(256).as_subclass(Tracked)
            alive.add(id(tensor))
            most = max(most, len(alive))
            yield f"t{number}", tensor
            del tensor

    disk.write_tensors(tmp_path, stream(), shard_bytes=4 * 1024)
    assert most <= 6  # a shard's four, the one that did not fit, the one being made


def test_impossible_sets_of_tensors_are_refused(tmp_path):
    with pytest.raises(ValueError, match="a was given twice"):
        disk.write_tensors(tmp_path, [("a", torch.zeros(1)), ("a", torch.zeros(1))])
    with pytest.raises(ValueError, match="no tensor"):
        disk.write_tensors(tmp_path, [])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-8])


def cut_header(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:5])


def remove(path: Path) -> None:
    path.unlink()


def garbage(path: Path) -> None:
    path.write_bytes(b"\xff" * 4096)


def _rewrite(path: Path, change) -> None:
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    change(tensors)
    save_file(tensors, path)


def reshape(path: Path) -> None:
    _rewrite(path, lambda tensors: tensors.update(matrix=tensors["matrix"].reshape(32, 64)))


def recast(path: Path) -> None:
    _rewrite(path, lambda tensors: tensors.update(matrix=tensors["matrix"].view(torch.int32)))


def extra(path: Path) -> None:
    _rewrite(path, lambda tensors: tensors.update(stranger=torch.zeros(1)))


def lacking(path: Path) -> None:
    _rewrite(path, lambda tensors: tensors.pop("matrix"))


def swapped(path: Path) -> None:
    def change(tensors):
        tensors["matrix"][[0, 1]] = tensors["matrix"][[1, 0]]

    _rewrite(path, change)


DAMAGES = {
    flip: "wrong checksum",
    truncate: "model.safetensors",
    cut_header: "model.safetensors",
    remove: "model.safetensors",
    garbage: "model.safetensors",
    reshape: "tensor matrix is",
    recast: "tensor matrix is",
    extra: "stranger is not in the manifest",
    lacking: "matrix is missing",
    swapped: "matrix has the wrong checksum",
}


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_damaged_files_are_refused_by_name(tmp_path, damage):
    manifest = disk.write_tensors(tmp_path, some_tensors().items())
    disk.verify(tmp_path, manifest)
    damage(tmp_path / "model.safetensors")
    with pytest.raises(disk.DamagedWeights, match=DAMAGES[damage]):
        disk.verify(tmp_path, manifest)


def test_every_byte_of_every_tensor_counts(tmp_path):
    manifest = disk.write_tensors(tmp_path, {"a": torch.randn(3), "b": torch.randn(2)}.items())
    path = tmp_path / "model.safetensors"
    good = path.read_bytes()
    for place in range(len(good) - 20, len(good)):
        for bit in range(8):
            bad = bytearray(good)
            bad[place] ^= 1 << bit
            path.write_bytes(bad)
            with pytest.raises(disk.DamagedWeights):
                disk.verify(tmp_path, manifest)


def test_a_file_that_the_manifest_does_not_name_is_refused(tmp_path):
    manifest = disk.write_tensors(tmp_path, {"a": torch.zeros(1)}.items())
    (tmp_path / "z.safetensors").write_bytes((tmp_path / "model.safetensors").read_bytes())
    with pytest.raises(disk.DamagedWeights, match="z.safetensors: is not in the manifest"):
        disk.verify(tmp_path, manifest)


def test_a_pipe_in_place_of_a_file_is_refused(tmp_path):
    manifest = disk.write_tensors(tmp_path, {"a": torch.zeros(1)}.items())
    (tmp_path / "model.safetensors").unlink()
    os.mkfifo(tmp_path / "model.safetensors")
    with pytest.raises(disk.DamagedWeights, match="is not a regular file"):
        disk.verify(tmp_path, manifest)


def test_a_file_outside_the_folder_is_refused(tmp_path):
    folder = tmp_path / "inner"
    folder.mkdir()
    (entry, *_) = disk.write_tensors(folder, {"a": torch.zeros(1)}.items())
    (folder / "model.safetensors").rename(tmp_path / "model.safetensors")
    with pytest.raises(disk.DamagedWeights, match="not a plain file name"):
        disk.verify(folder, [entry.model_copy(update={"file": "../model.safetensors"})])


# ---- publish -------------------------------------------------------------------------------------------------------


@pytest.fixture
def publisher(redis, run_id, tmp_path) -> Publisher:
    return Publisher(redis, run_id, tmp_path / "weights", keep=3)


def versions(publisher: Publisher) -> list[str]:
    return sorted(path.name for path in publisher.directory.iterdir())


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shard_bytes", [disk.SHARD_BYTES, 40_000])
def test_a_published_folder_is_a_hugging_face_model(publisher, tmp_path, tied, dtype, shard_bytes, monkeypatch):
    from tiny import make_tiny_model

    base = make_tiny_model(tmp_path / "base", tied=tied)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.01)
    state = model.state_dict()
    assert ("lm_head.weight" in state) and (state["lm_head.weight"] is not None)
    monkeypatch.setattr(disk.write_tensors, "__defaults__", (shard_bytes,))
    weights = publisher.publish(V(version=1), iter(state.items()), config_dir=base)
    folder = Path(weights.location)
    assert same(disk.read_tensors(folder, weights.manifest), state)
    assert (len(list(folder.glob("model-*.safetensors"))) > 1) == (shard_bytes < disk.SHARD_BYTES)

    loaded = AutoModelForCausalLM.from_pretrained(folder)
    assert loaded.dtype == dtype  # without being told
    assert same(loaded.state_dict(), state)
    assert AutoTokenizer.from_pretrained(folder)("hi").input_ids == AutoTokenizer.from_pretrained(base)("hi").input_ids
    assert type(weights).model_validate_json((folder / "manifest.json").read_text()) == weights


def test_only_the_newest_versions_are_kept(publisher):
    for version in range(6):
        publisher.publish(V(version=version), some_tensors(version).items())
    assert versions(publisher) == ["0-3", "0-4", "0-5"]
    publisher.publish(V(lineage=1, version=2), some_tensors().items())
    assert versions(publisher) == ["0-4", "0-5", "1-2"]


def test_versions_are_compared_as_numbers(publisher, redis, run_id):
    for lineage, version in [(0, 9), (0, 10), (2, 5), (10, 1)]:
        publisher.publish(V(lineage=lineage, version=version), some_tensors().items())
        assert pointer.newest_version_sync(redis, run_id) == V(lineage=lineage, version=version)
    assert versions(publisher) == ["0-10", "10-1", "2-5"]
    for lineage, version in [(0, 11), (10, 0), (9, 99), (10, 1)]:
        with pytest.raises(Superseded, match=r"not newer than 10\.1"):
            publisher.publish(V(lineage=lineage, version=version), some_tensors().items())
    assert versions(publisher) == ["0-10", "10-1", "2-5"]


def test_a_trainer_outlived_while_it_writes_does_not_become_the_newest(publisher, redis, run_id, tmp_path):
    successor = Publisher(redis, run_id, tmp_path / "elsewhere")

    def slowly():
        yield "a", torch.zeros(1)
        successor.publish(V(lineage=1, version=10), some_tensors().items())
        yield "b", torch.zeros(1)

    with pytest.raises(Superseded, match="published meanwhile"):
        publisher.publish(V(version=12), slowly())
    assert pointer.newest_version_sync(redis, run_id) == V(lineage=1, version=10)
    assert versions(publisher) == []


class Crash(Exception):
    pass


def test_a_crash_before_the_pointer_is_harmless(publisher, redis, run_id, monkeypatch):
    publisher.publish(V(version=1), some_tensors(1).items())

    def crash_midway():
        yield "a", torch.zeros(3)
        raise Crash

    with pytest.raises(Crash):
        publisher.publish(V(version=2), crash_midway())
    with monkeypatch.context() as patch, pytest.raises(Crash):
        patch.setattr(pointer, "advance", lambda *_: (_ for _ in ()).throw(Crash()))
        publisher.publish(V(version=3), some_tensors(3).items())
    assert versions(publisher) == ["0-1", "0-2.tmp", "0-3"]
    assert pointer.newest_version_sync(redis, run_id) == V(version=1)

    again = Publisher(redis, run_id, publisher.directory, keep=3)
    assert versions(again) == ["0-1", "0-3"]
    weights = again.publish(V(version=3), some_tensors(33).items())
    assert same(disk.read_tensors(Path(weights.location), weights.manifest), some_tensors(33))
    assert pointer.newest_version_sync(redis, run_id) == V(version=3)


def test_publishing_outlasts_a_redis_that_is_away(tmp_path, run_id):
    server = EmbeddedRedis(tmp_path / "redis").start()
    with connect_sync(server.url) as client:
        publisher = Publisher(client, run_id, tmp_path / "weights", patience_seconds=0.5)
        server.stop()
        with pytest.raises(DeadlineExceeded, match="newest version"):
            publisher.publish(V(version=1), some_tensors().items())
        with server:
            publisher.publish(V(version=1), some_tensors().items())
            assert pointer.newest_version_sync(client, run_id) == V(version=1)


def test_foreign_files_beside_the_versions_are_left_alone(publisher):
    (publisher.directory / "notes.txt").write_text("mine")
    (publisher.directory / "best").mkdir()
    for version in range(5):
        publisher.publish(V(version=version), some_tensors().items())
    assert versions(publisher) == ["0-2", "0-3", "0-4", "best", "notes.txt"]
    with pytest.raises(ValueError, match="keep 0"):
        Publisher(publisher.redis, "run", publisher.directory, keep=0)


# ---- follow --------------------------------------------------------------------------------------------------------


class Server:
    """Serves whatever it loaded last."""

    def __init__(self) -> None:
        self.tensors: dict[str, torch.Tensor] = {}
        self.loads: list[Version] = []
        self.failing = False

    async def load(self, version: Version, directory: Path) -> None:
        self.loads.append(version)
        if self.failing:
            raise MemoryError("no room")
        self.tensors = {name: tensor.clone() for name, tensor in load_file(directory / "model.safetensors").items()}


@pytest.fixture
def server() -> Server:
    return Server()


@pytest.fixture
async def follower(redis_url, run_id, server):
    follower = Follower(redis_url, run_id, "r1", f"test-{run_id}", "http://here:1", server.load, poll_seconds=0.05)
    await follower.start()
    yield follower
    await follower.stop()


async def publish(publisher: Publisher, version: Version, seed: int = 0):
    return await asyncio.to_thread(publisher.publish, version, some_tensors(seed).items())


async def until(condition, seconds: float = 20) -> None:
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.01)


def metric(follower: Follower, name: str, **labels: str) -> float | None:
    return REGISTRY.get_sample_value(name, {"service": follower.service, **labels})


async def test_a_follower_takes_every_version_it_sees(publisher, follower, server):
    assert follower.version is None
    for step in range(1, 4):
        await publish(publisher, V(version=step), seed=step)
        assert await follower.at_least(V(version=step), 20) == V(version=step) == follower.version
        assert same(server.tensors, some_tensors(step))
    assert server.loads == [V(version=1), V(version=2), V(version=3)]
    assert metric(follower, "rlif_weight_version") == 3 and metric(follower, "rlif_weight_lineage") == 0
    assert metric(follower, "rlif_weight_sync_seconds_count", phase="load") >= 1
    assert not metric(follower, "rlif_weight_versions_refused_total")
    assert follower.redis_state == "ok"


async def test_a_late_follower_goes_straight_to_the_newest(publisher, server, redis_url, run_id):
    for step in range(5):
        await publish(publisher, V(version=step), seed=step)
    follower = Follower(redis_url, run_id, "late", "late", "http://late", server.load, poll_seconds=30)
    await follower.start()
    await follower.at_least(V(version=4), 20)
    assert server.loads == [V(version=4)] and same(server.tensors, some_tensors(4))
    await publish(publisher, V(version=5), seed=5)  # found by the announcement: the next poll is far away
    await follower.at_least(V(version=5), 20)
    await follower.stop()


async def test_a_newer_lineage_is_taken_although_its_step_is_lower(publisher, follower, server):
    await publish(publisher, V(version=12), seed=1)
    await follower.at_least(V(version=12), 20)
    await publish(publisher, V(lineage=1, version=10), seed=2)
    assert await follower.at_least(V(version=13), 20) == V(lineage=1, version=10)
    assert same(server.tensors, some_tensors(2))
    assert metric(follower, "rlif_weight_lineage") == 1 and metric(follower, "rlif_weight_version") == 10


async def announce_damaged(publisher: Publisher, redis, version: Version, damage) -> None:
    """What a broken disk would do: the files change after their checksums were taken."""
    drafts = publisher.directory.parent / "drafts"
    hidden = Publisher(redis, uuid.uuid4().hex, drafts)
    weights = await publish(hidden, version)
    damage(Path(weights.location) / "model.safetensors")
    target = publisher.directory / Path(weights.location).name
    shutil.move(weights.location, target)
    moved = weights.model_copy(update={"location": str(target), "run_id": publisher.run_id})
    assert pointer.advance(redis, moved)


@pytest.mark.parametrize("damage", [flip, truncate, remove, reshape], ids=lambda damage: damage.__name__)
async def test_damaged_versions_are_refused_and_good_ones_taken(publisher, follower, server, redis, damage):
    await publish(publisher, V(version=1), seed=1)
    await follower.at_least(V(version=1), 20)
    await announce_damaged(publisher, redis, V(version=2), damage)
    await until(lambda: metric(follower, "rlif_weight_versions_refused_total") == 1)
    assert "0.2 refused" in follower.refusal and "model.safetensors" in follower.refusal
    with pytest.raises(DeadlineExceeded, match=r"weights 0\.2 .* serves 0\.1 \(weights 0\.2 refused"):
        await follower.at_least(V(version=2), 0.3)
    assert metric(follower, "rlif_weight_versions_refused_total") == 1  # polled many times meanwhile
    assert follower.version == V(version=1) and server.loads == [V(version=1)]
    assert same(server.tensors, some_tensors(1))
    await publish(publisher, V(version=3), seed=3)
    await follower.at_least(V(version=3), 20)
    assert same(server.tensors, some_tensors(3)) and follower.refusal == ""


async def test_a_version_that_becomes_whole_is_taken(publisher, follower, server, redis):
    """A shared disk may show redis' news before the files."""
    await announce_damaged(publisher, redis, V(version=1), remove)
    await until(lambda: follower.refusal)
    disk.write_tensors(publisher.directory / "0-1", some_tensors().items())
    await follower.at_least(V(version=1), 20)
    assert same(server.tensors, some_tensors())


async def test_a_load_that_fails_is_a_refusal(publisher, follower, server):
    server.failing = True
    await publish(publisher, V(version=1))
    await until(lambda: follower.refusal)
    assert "MemoryError" in follower.refusal and follower.version is None and server.loads == [V(version=1)]
    server.failing = False
    await follower.at_least(V(version=1), 20)


@pytest.mark.parametrize("body", [b"{}", b"not json", b"transport"])
async def test_a_pointer_that_makes_no_sense_is_refused(publisher, follower, redis, run_id, body):
    if body == b"transport":
        weights = await publish(publisher, V(version=1))
        await follower.at_least(V(version=1), 20)
        body = weights.model_copy(update={"transport": "carrier-pigeon", "version": 2}).model_dump_json().encode()
    redis.mset({Keys(run_id).weights: body, Keys(run_id).weights_id: "0.2"})
    await until(lambda: follower.refusal)
    assert "weights 0.2 refused" in follower.refusal
    await publish(publisher, V(version=3))
    await follower.at_least(V(version=3), 20)


async def test_at_least_has_a_deadline_and_names_whom_it_waits_for(follower, run_id):
    with pytest.raises(DeadlineExceeded, match=rf"0\.1 s for weights 0\.7 of run {run_id}'s trainer.*the base model"):
        await follower.at_least(V(version=7), 0.1)


async def test_followers_report_what_they_serve_and_take_leave(publisher, redis_url, run_id, server):
    follower = Follower(redis_url, run_id, "r2", "rollout", "http://here:2", server.load, poll_seconds=0.05)
    await follower.start()
    await publish(publisher, V(lineage=2, version=4))
    await follower.at_least(V(lineage=2, version=4), 20)
    async with connect(redis_url) as client:
        (beat,) = await pointer.heartbeats(client, run_id)
        assert (beat.replica, beat.service, beat.url) == ("r2", "rollout", "http://here:2")
        assert beat.version == V(lineage=2, version=4)
        assert await pointer.heartbeats(client, run_id, within_seconds=-1) == []
        await follower.stop()
        assert await pointer.heartbeats(client, run_id) == []
        newest = await pointer.newest(client, run_id)
        assert newest.id == await pointer.newest_version(client, run_id) == V(lineage=2, version=4)


@pytest.mark.parametrize("poison", [b"garbage", b"9.9.9", None])
async def test_a_follower_outlasts_words_that_are_no_version(publisher, follower, redis, run_id, poison):
    key = Keys(run_id).weights_id
    redis.set(key, poison) if poison else redis.hset(key, "another", "type")
    await until(lambda: "where the newest" in follower.redis_state or "WRONGTYPE" in follower.redis_state)
    redis.delete(key)
    await publish(publisher, V(version=1))
    await follower.at_least(V(version=1), 20)
    await until(lambda: follower.redis_state == "ok")


async def test_a_follower_outlasts_redis(tmp_path, run_id, server):
    redis_server = EmbeddedRedis(tmp_path / "redis")
    follower = Follower(redis_server.url, run_id, "r", "outlast", "http://r", server.load, poll_seconds=0.05)
    await follower.start()
    await until(lambda: "connecting" in follower.redis_state)
    redis_server.start()
    with connect_sync(redis_server.url) as client:
        publisher = Publisher(client, run_id, tmp_path / "weights")
        await publish(publisher, V(version=1))
        await follower.at_least(V(version=1), 20)
        redis_server.process.kill()
        redis_server.process.wait(10)
        await until(lambda: follower.redis_state != "ok")
        redis_server.start()
        await publish(publisher, V(version=2))
        await follower.at_least(V(version=2), 20)
    assert follower.redis_state == "ok" and server.loads == [V(version=1), V(version=2)]
    await follower.stop()
    redis_server.stop()


async def test_stopping_waits_for_a_load_in_progress(publisher, redis_url, run_id):
    began, done = asyncio.Event(), []

    async def slow_load(version, _directory):
        began.set()
        await asyncio.sleep(0.3)
        done.append(version)

    follower = Follower(redis_url, run_id, "slow", "slow", "http://s", slow_load, poll_seconds=0.05)
    await follower.start()
    await publish(publisher, V(version=1))
    await began.wait()
    await follower.stop()
    assert done == [V(version=1)]
