"""Weights as deltas: every bit comes back, along any chain, and nothing that is damaged is ever served."""

import asyncio
import fcntl
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from test_weights import Server, flip, metric, remove, same, some_tensors, truncate, until

from services.contract import Version
from services.weights import delta, disk, pointer
from services.weights.disk import DamagedWeights
from services.weights.follow import Follower
from services.weights.mirror import Mirror
from services.weights.publish import BYTES, Publisher

V = Version


# ---- blocks --------------------------------------------------------------------------------------------------------


@st.composite
def pairs(draw):
    """Two bit patterns of the same length and width, any share of them different, by little or by anything."""
    width, size = draw(st.sampled_from([1, 2, 4, 8])), draw(st.integers(1, 400))
    made = np.random.default_rng(draw(st.integers(0, 2**32)))
    old = made.integers(0, 256, size * width, np.uint8).view(f"<u{width}")
    changed = made.random(size) < draw(st.sampled_from([0.0, 0.01, 0.12, 0.13, 0.5, 1.0]))
    if draw(st.booleans()):
        other = old + made.integers(-2, 3, size).astype(old.dtype)
    else:
        other = made.integers(0, 256, size * width, np.uint8).view(f"<u{width}")
    return old, np.where(changed, other, old)


@settings(max_examples=200, deadline=None)
@given(pairs())
def test_a_block_comes_back_bit_by_bit(pair):
    old, new = pair
    form, places, content = delta.encode(old, new)
    assert places.tolist() == [place for place in range(len(old)) if old[place] != new[place]]
    sizes = {"gaps": 4 * len(places), "bits": (len(old) + 7) // 8}
    assert len(content) == sizes[form] + len(places) * old.itemsize
    bits = old.copy()
    block = delta.Block(tensor="a", start=0, size=len(old), count=len(places), places=form, bytes=1)
    delta.decode(block, content, bits)
    assert bits.tolist() == new.tolist()


def test_a_small_step_takes_a_bit_or_two_an_element():
    """Places and differences of what Adam does to bfloat16 weights are almost all of the smallest kind."""
    made = np.random.default_rng(0)
    old = made.integers(0, 2**16, 2**20, np.uint16)
    new = old + np.where(made.random(2**20) < 0.02, made.choice([-1, 1], 2**20), 0).astype("<u2")
    _, places, content = delta.encode(old, new)
    frame = delta.zstandard.ZstdCompressor(level=delta.LEVEL).compress(content)
    assert len(frame) * 8 < 10.5 * len(places)  # the entropy: 7.07 bits for a place, 1 for a sign
    assert len(frame) < 0.02 * old.nbytes


# ---- tensors -------------------------------------------------------------------------------------------------------


def stepped(tensors: dict[str, torch.Tensor], seed: int, share: float = 0.1) -> dict[str, torch.Tensor]:
    """Some elements of the first half of the tensors moved."""
    made = torch.Generator().manual_seed(seed)
    moved = {}
    for number, (name, tensor) in enumerate(tensors.items()):
        moved[name] = tensor.clone()
        if number % 2 == 0 and tensor.is_floating_point():
            mask = torch.rand(tensor.shape, generator=made) < share
            moved[name][mask] += torch.randn(tensor.shape, generator=made).to(tensor.dtype)[mask] * 0.01
    return moved


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("block", [delta.BLOCK, 7])
def test_tensors_come_back_bit_by_bit(tmp_path, monkeypatch, dtype, block):
    monkeypatch.setattr(delta, "BLOCK", block)
    old, new = some_tensors(0, dtype), some_tensors(1, dtype)
    base, changes = tmp_path / "base", tmp_path / "changes"
    base.mkdir(), changes.mkdir()
    entries = disk.write_tensors(base, old.items(), shard_bytes=4096)
    writer, reader = Mirror(tmp_path, "writer"), Mirror(tmp_path, "reader")
    writer.fill(base, V(version=0)), reader.fill(base, V(version=0))
    manifest = delta.write(changes, iter(new.items()), writer.tensors(), entries)
    delta.apply(changes, reader.tensors())
    assert [entry.name for entry in manifest] == [entry.name for entry in entries]
    for mirror in (writer, reader):
        assert same(disk.read_tensors(mirror.path, manifest), new)
    assert same(disk.read_tensors(base, entries), old)


def test_tensors_that_are_not_the_bases_are_refused(tmp_path):
    old = {"a": torch.zeros(3), "b": torch.zeros(2)}
    entries = disk.write_tensors(tmp_path, old.items())
    mirror = Mirror(tmp_path / "mirrors", "m")

    def write(*tensors):
        mirror.fill(tmp_path, V())
        (tmp_path / "out").mkdir(exist_ok=True)
        delta.write(tmp_path / "out", tensors, mirror.tensors(), entries)

    a, b = old.items()
    for wrong in [("c", torch.zeros(3)), ("a", torch.zeros(4)), ("a", torch.zeros(3).bfloat16()), a]:
        with pytest.raises(ValueError, match=f"tensor {wrong[0]} .* is not the base's, or was given twice"):
            write(a, wrong, b)
    with pytest.raises(ValueError, match="tensor b of the base was not given"):
        write(a)


@pytest.mark.parametrize(
    "change",
    [
        {"tensor": "stranger"},
        {"start": 10**12},
        {"size": 10**15},
        {"count": 0},
        {"count": 3},
        {"bytes": 2**60},
        {"bytes": 3},
        {"places": "bits"},
    ],
    ids=str,
)
def test_an_index_that_is_not_of_these_changes_is_refused(tmp_path, change):
    entries = disk.write_tensors(tmp_path, [("a", torch.zeros(100)), ("b", torch.zeros(2))])
    mirror = Mirror(tmp_path / "mirrors", "m")
    mirror.fill(tmp_path, V())
    out = tmp_path / "out"
    out.mkdir()
    after = torch.zeros(100)
    after[::20] = 1
    delta.write(out, [("a", after), ("b", torch.zeros(2))], mirror.tensors(), entries)
    [block] = delta.BLOCKS.validate_json((out / delta.INDEX).read_bytes())
    (out / delta.INDEX).write_bytes(delta.BLOCKS.dump_json([block.model_copy(update=change)]))
    mirror.fill(tmp_path, V())
    with pytest.raises(DamagedWeights, match=r"changes\.zst"):
        delta.apply(out, mirror.tensors())
    (out / delta.INDEX).write_text('[{"tensor": 1}]')
    with pytest.raises(DamagedWeights, match=r"changes\.json"):
        delta.apply(out, mirror.tensors())


# ---- publishing and following --------------------------------------------------------------------------------------


@pytest.fixture
def publisher(redis, run_id, tmp_path) -> Publisher:
    return Publisher(redis, run_id, tmp_path / "weights", keep=2, snapshot_every=4, mirror_dir=tmp_path / "mirrors")


def steps(count: int) -> list[dict[str, torch.Tensor]]:
    made = [some_tensors(0, torch.bfloat16)]
    for step in range(1, count):
        made.append(stepped(made[-1], step))
    return made


def versions(publisher: Publisher) -> list[str]:
    return sorted((path.name for path in publisher.directory.iterdir()), key=lambda name: int(name.split("-")[1]))


def test_one_version_in_so_many_is_whole_and_no_chain_is_broken(publisher, tmp_path):
    fresh, steady = Mirror(tmp_path / "a", "fresh"), Mirror(tmp_path / "b", "steady")
    kinds, kept = [], []
    for number, tensors in enumerate(steps(10)):
        weights = publisher.publish(V(version=number), iter(tensors.items()))
        kinds.append(weights.transport)
        kept.append(versions(publisher))
        if weights.transport == "delta":
            assert weights.base == V(version=number - 1)
            fresh.version = None
            for mirror in (fresh, steady):
                assert same(disk.read_tensors(mirror.reach(weights), weights.manifest), tensors)
    assert kinds == ["disk", "delta", "delta", "delta"] * 2 + ["disk", "delta"]
    assert kept[3] == ["0-0", "0-1", "0-2", "0-3"]  # keep is 2; these stand on the first
    assert kept[4] == ["0-0", "0-1", "0-2", "0-3", "0-4"] and kept[5] == ["0-4", "0-5"]
    assert kept[9] == ["0-8", "0-9"]
    sizes = {kind: BYTES.labels(kind)._value.get() for kind in ("disk", "delta")}
    assert 0 < sizes["delta"] < sizes["disk"]


def test_a_follower_that_missed_versions_takes_the_chain(publisher, tmp_path):
    mirror, made = Mirror(tmp_path, "m"), steps(4)
    published = [publisher.publish(V(version=number), tensors.items()) for number, tensors in enumerate(made)]
    mirror.reach(published[1])
    folder = publisher.directory / "0-0" / "model.safetensors"
    whole = folder.read_bytes()
    folder.write_bytes(b"")  # it is not needed
    assert same(disk.read_tensors(mirror.reach(published[3]), published[3].manifest), made[3])
    folder.write_bytes(whole)
    # What lies in the mirror is not what it should be: from the snapshot on, then.
    mirror.tensors()["matrix"][0] += 1
    mirror.version = V(version=1)
    assert same(disk.read_tensors(mirror.reach(published[3]), published[3].manifest), made[3])


def test_after_a_failure_and_for_a_new_trainer_comes_a_whole_version(publisher):
    made = steps(4)

    def breaks():
        yield next(iter(made[1].items()))
        raise MemoryError

    publisher.publish(V(version=0), made[0].items())
    with pytest.raises(MemoryError):
        publisher.publish(V(version=1), breaks())
    weights = publisher.publish(V(version=1), made[1].items())
    assert weights.transport == "disk" and same(disk.read_tensors(Path(weights.location), weights.manifest), made[1])
    assert publisher.publish(V(version=2), made[2].items()).transport == "delta"
    successor = Publisher(publisher.redis, publisher.run_id, publisher.directory, 2, snapshot_every=4)
    assert successor.publish(V(lineage=1, version=1), made[3].items()).transport == "disk"
    assert sorted(path.name for path in publisher.directory.iterdir()) == ["0-1", "0-2", "1-1"]


@pytest.fixture
def server() -> Server:
    return Server()


@pytest.fixture
async def follower(redis_url, run_id, server, tmp_path):
    follower = Follower(
        redis_url, run_id, "r1", f"test-{run_id}", "http://here:1", server.load, 0.05, tmp_path / "mirrors"
    )
    await follower.start()
    yield follower
    await follower.stop()


async def publish(publisher: Publisher, version: int, tensors: dict[str, torch.Tensor]):
    return await asyncio.to_thread(publisher.publish, V(version=version), tensors.items())


async def test_a_follower_serves_what_was_published(publisher, follower, server, tmp_path):
    for number, tensors in enumerate(steps(6)):
        await publish(publisher, number, tensors)
        await follower.at_least(V(version=number), 20)
        assert same(server.tensors, tensors)
    assert not metric(follower, "rlif_weight_versions_refused_total")
    assert metric(follower, "rlif_weight_sync_seconds_count", phase="patch") == 4
    mirrors = tmp_path / "mirrors"
    assert len(list(mirrors.iterdir())) == 2  # the publisher's, and
    await follower.stop()
    assert [path.name.startswith(f"rlif-{publisher.run_id}-trainer-") for path in mirrors.iterdir()] == [True]


def scribble(path: Path) -> None:
    path.write_bytes(os.urandom(path.stat().st_size))


@pytest.mark.parametrize("file", [delta.CHANGES, delta.INDEX])
@pytest.mark.parametrize("damage", [flip, truncate, remove, scribble], ids=lambda damage: damage.__name__)
async def test_a_damaged_delta_is_refused_until_a_whole_version_comes(
    publisher, follower, server, file, damage, monkeypatch
):
    made = steps(5)
    for number in (0, 1):
        await publish(publisher, number, made[number])
        await follower.at_least(V(version=number), 20)
    with monkeypatch.context() as patch:  # redis learns of it when it is damaged
        patch.setattr(pointer, "advance", lambda *_: True)
        weights = await publish(publisher, 2, made[2])
    damage(Path(weights.location) / file)
    pointer.advance(publisher.redis, weights)
    await until(lambda: follower.refusal)
    assert "weights 0.2 refused" in follower.refusal and file in follower.refusal
    assert follower.version == V(version=1) and same(server.tensors, made[1])
    await publish(publisher, 3, made[3])  # stands on the damaged one
    await until(lambda: "weights 0.3 refused" in follower.refusal)
    assert same(server.tensors, made[1])
    assert (await publish(publisher, 4, made[4])).transport == "disk"
    await follower.at_least(V(version=4), 20)
    assert same(server.tensors, made[4]) and follower.refusal == ""


async def test_a_delta_to_other_weights_is_refused(publisher, follower, server):
    """Sound files, but not of this chain: only the checksums of the result can tell."""
    made = steps(3)
    for number in (0, 1):
        await publish(publisher, number, made[number])
    await follower.at_least(V(version=1), 20)
    publisher._mirror.tensors()["matrix"][:] = 0
    await publish(publisher, 2, made[2])
    await until(lambda: follower.refusal)
    assert "matrix has the wrong checksum" in follower.refusal and same(server.tensors, made[1])


async def test_a_mirror_that_cannot_be_made_is_a_refusal(publisher, follower, server, tmp_path):
    made = steps(2)
    await publish(publisher, 0, made[0])
    await follower.at_least(V(version=0), 20)
    follower.mirror_dir = tmp_path / "file"
    follower.mirror_dir.write_text("in the way")
    await publish(publisher, 1, made[1])
    await until(lambda: follower.refusal)
    assert "file" in follower.refusal and same(server.tensors, made[0])
    follower.mirror_dir.unlink()
    await follower.at_least(V(version=1), 20)


def test_what_a_killed_process_left_is_removed_and_what_is_used_is_not(tmp_path):
    mirror = Mirror(tmp_path, "run-r1")
    other, left = tmp_path / "rlif-run-r1-other-x_345678", tmp_path / "rlif-run-r1-x_345678"
    other.mkdir(), left.mkdir()
    (left / "model.safetensors").write_text("much")
    again = Mirror(tmp_path, "run-r1")
    assert {path.name for path in tmp_path.iterdir()} == {other.name, mirror.path.name, again.path.name}
    handle = os.open(mirror.path, os.O_RDONLY)
    with pytest.raises(BlockingIOError):
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.close(handle)
    mirror.close(), again.close()
    assert [path.name for path in tmp_path.iterdir()] == [other.name]


def test_a_delta_is_exported_as_a_whole_model(publisher, tmp_path):
    from trainer.export import export

    run = tmp_path / "run"
    publisher.directory.rename(tmp_path / "before")
    publisher.directory = publisher.store.directory = run / "weights"
    (tmp_path / "config").mkdir()
    (tmp_path / "config" / "config.json").write_text("{}")
    publisher.directory.mkdir(parents=True)
    made = steps(3)
    for number, tensors in enumerate(made):
        publisher.publish(V(version=number), tensors.items(), tmp_path / "config")
    run.rename(tmp_path / "moved")
    assert export(tmp_path / "moved", tmp_path / "out") == V(version=2)
    assert same(load_file(tmp_path / "out" / "model.safetensors"), made[2])
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "README.md",
        "config.json",
        "model.safetensors",
        "rlif.json",
    ]
    flip(tmp_path / "moved" / "weights" / "0-2" / delta.CHANGES)
    assert export(tmp_path / "moved", tmp_path / "older") == V(version=1)
    assert same(load_file(tmp_path / "older" / "model.safetensors"), made[1])


async def test_the_embedded_engine_serves_a_delta(publisher, run_id, redis_url, tmp_path):
    from tiny import make_tiny_model
    from transformers import AutoModelForCausalLM

    from rollout_server.engines.base import EngineSettings
    from rollout_server.engines.transformers import TransformersEngine

    folder = make_tiny_model(tmp_path / "base", seed=1)
    engine = TransformersEngine(EngineSettings(folder, "tiny", dtype="float32", device="cpu", threads=1))
    await engine.start()
    follower = Follower(redis_url, run_id, "e", "engine", "http://e", engine.load, 0.05, tmp_path / "mirrors")
    await follower.start()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for number in range(3):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += torch.randn_like(parameter) * (torch.rand_like(parameter) < 0.05) * 0.01
        await asyncio.to_thread(publisher.publish, V(version=number), model.named_parameters(), folder)
        await follower.at_least(V(version=number), 20)
        assert same(engine.model.named_parameters(), model.named_parameters()) and engine.version == V(version=number)
    assert load_file(publisher.directory / "0-0" / "model.safetensors")
    await follower.stop()
    await engine.stop()
