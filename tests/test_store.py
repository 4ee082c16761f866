"""Versions in a bucket, over real HTTP to a server that speaks S3: whole or not there, refused when damaged, outlasted
when it is away, and deleted in their turn."""

import asyncio
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from object_store import BUCKET, KEY, SECRET, ObjectStore
from pydantic import ValidationError
from safetensors.torch import load_file
from test_delta import steps
from test_trainer import Run
from test_weights import Server, flip, metric, remove, same, some_tensors, truncate, until

from services.contract import Version
from services.recipe import RecipeError
from services.recipe_sections import Weights
from services.redis import DeadlineExceeded
from services.startup import StartupError
from services.weights import delta, pointer, store
from services.weights.disk import DamagedWeights
from services.weights.follow import Follower
from services.weights.mirror import Mirror, check, whole
from services.weights.publish import Publisher
from services.weights.store import StoreError, store_at
from trainer import feed
from trainer.checkpoint import Progress
from trainer.export import export
from trainer.feed import Feed
from trainer.waits import Waits

V = Version


@pytest.fixture(scope="module", autouse=True)
def objects(tmp_path_factory):
    server = ObjectStore(tmp_path_factory.mktemp("objects")).start()
    with pytest.MonkeyPatch.context() as patch:
        server.environment(patch)
        yield server
    server.kill()


@pytest.fixture
def running(objects):
    """The server, to be killed: the next test finds it running again."""
    yield objects
    if objects.process.poll() is not None:
        objects.start()


@pytest.fixture
def place(run_id) -> str:
    return f"s3://{BUCKET}/runs/{run_id}"


@pytest.fixture
def publisher(redis, run_id, place, tmp_path) -> Publisher:
    return Publisher(
        redis, run_id, place, keep=2, patience_seconds=20, snapshot_every=3, mirror_dir=tmp_path / "mirrors"
    )


@pytest.fixture
def server() -> Server:
    return Server()


@pytest.fixture
async def follower(redis_url, run_id, server, tmp_path):
    follower = Follower(redis_url, run_id, "r1", f"s3-{run_id}", "http://here", server.load, 0.05, tmp_path / "mirrors")
    await follower.start()
    yield follower
    await follower.stop()


def names(place: str) -> list[str]:
    return [f"{version.lineage}-{version.version}" for version, _ in store_at(place).versions()]


async def publish(publisher: Publisher, number: int, tensors) -> None:
    await asyncio.to_thread(publisher.publish, V(version=number), tensors.items())


async def test_whole_versions_and_deltas_are_followed_and_old_ones_deleted(
    publisher, follower, server, place, objects, run_id, tmp_path
):
    kept = []
    for number, tensors in enumerate(steps(6)):
        await publish(publisher, number, tensors)
        await follower.at_least(V(version=number), 20)
        assert same(server.tensors, tensors)
        kept.append(names(place))
    assert kept[2] == ["0-0", "0-1", "0-2"] and kept[3] == ["0-0", "0-1", "0-2", "0-3"] and kept[4] == ["0-3", "0-4"]
    assert not metric(follower, "rlif_weight_versions_refused_total")
    found = {path.name for path in (objects.files / "runs" / run_id / "0-3").iterdir()}
    assert found == {"model.safetensors", "manifest.json"}
    assert list(publisher.directory.iterdir()) == []
    late = Mirror(tmp_path / "late", "late")
    weights = pointer.WeightVersion.model_validate_json(store_at(place).read("0-5", "manifest.json"))
    assert weights.transport == "delta" and weights.location == f"{place}/0-5"
    assert same(load_file(late.reach(weights) / "model.safetensors"), steps(6)[5])
    assert sorted(path.name for path in late.path.iterdir()) == ["model.safetensors"]


async def test_adapters_lie_in_a_bucket_too(redis, redis_url, run_id, place, server, tiny_model, tmp_path):
    from rollout_weights import publish_adapters

    publisher = Publisher(redis, run_id, place)
    follower = Follower(redis_url, run_id, "r", "s3", "", server.load, 0.05, tmp_path / "m", lambda: tiny_model)
    await follower.start()
    merged = await asyncio.to_thread(publish_adapters, publisher, V(version=1), tiny_model)
    await follower.at_least(V(version=1), 20)
    assert same(server.tensors, {name: tensor.float() for name, tensor in merged.named_parameters()})
    await follower.stop()


def test_a_large_file_goes_in_parts(publisher, monkeypatch):
    monkeypatch.setattr(store, "PART", 5 * 2**20)  # the least that S3 takes
    tensors = {"big": torch.randn(3_000_001), "small": torch.ones(1)}
    weights = publisher.publish(V(), iter(tensors.items()))
    with whole(weights) as folder:
        assert same(load_file(folder / "model.safetensors"), tensors)
    check(weights)


@pytest.mark.parametrize("damage", [flip, truncate, remove], ids=lambda damage: damage.__name__)
async def test_a_damaged_or_missing_object_is_a_refusal_until_a_sound_version_comes(
    publisher, follower, server, objects, run_id, damage, monkeypatch
):
    monkeypatch.setattr(store.store_at, "__defaults__", (0.3,))
    made = steps(4)
    await publish(publisher, 0, made[0])
    await follower.at_least(V(), 20)
    with monkeypatch.context() as patch:  # redis learns of it when it is damaged
        patch.setattr(pointer, "advance", lambda *_: True)
        weights = await asyncio.to_thread(publisher.publish, V(version=1), made[1].items())
    damage(objects.files / "runs" / run_id / "0-1" / delta.CHANGES)
    pointer.advance(publisher.redis, weights)
    await until(lambda: follower.refusal)
    assert "weights 0.1 refused" in follower.refusal and "changes.zst" in follower.refusal
    assert same(server.tensors, made[0])
    for number in (2, 3):
        await publish(publisher, number, made[number])
    await follower.at_least(V(version=3), 20)
    assert same(server.tensors, made[3]) and follower.refusal == ""


@pytest.mark.parametrize("file", ["0-0/model.safetensors", "0-0/manifest.json", "0-1/changes.zst", "0-1/changes.json"])
def test_a_look_at_a_bucket_fetches_nothing_and_sees_what_is_gone(publisher, place, file, monkeypatch):
    import obstore

    made = steps(2)
    publisher.publish(V(), made[0].items())
    weights = publisher.publish(V(version=1), made[1].items())
    with monkeypatch.context() as patch:
        patch.setattr(store.Bucket, "fetch", lambda *_: 1 / 0)
        check(weights)
        if file.endswith("safetensors"):
            obstore.put(store_at(place)._store, file, b"a short one")
        else:
            obstore.delete(store_at(place)._store, file)
        with pytest.raises(DamagedWeights, match=f"{file}: "):
            check(weights)


def test_a_waiting_trainer_looks_once_and_outlasts_a_store_that_is_away(
    publisher, running, redis_url, run_id, tiny_model, tmp_path, monkeypatch, caplog
):
    monkeypatch.setattr(store.store_at, "__defaults__", (0.3,))
    monkeypatch.setattr(feed, "FIRST_LOOK_SECONDS", 0.05)
    looks = []

    def look(weights, mirror_dir):
        looks.append(weights.id)
        check(weights, mirror_dir)

    monkeypatch.setattr(feed, "check", look)
    waiting = Feed(redis_url, Run(tmp_path, tiny_model, redis_url, run_id, batch_deadline_seconds=2.5).recipe, Waits())
    try:
        waiting.claim(0, [], [])
        made = steps(2)
        publisher.publish(V(), made[0].items())
        waiting.published = publisher.publish(V(version=1), made[1].items())
        running.kill()
        with pytest.raises(DeadlineExceeded, match="scored groups"):
            waiting.pull(Progress())
        assert len(looks) > 1 and caplog.text.count("cannot be looked at, later again: s3://") == 1
        with waiting._checking:  # a look of the first wait may still go on, and would find the store back
            looks.clear()
        running.start()
        with pytest.raises(DeadlineExceeded, match="scored groups"):
            waiting.pull(Progress())
        assert len(looks) == 1
        with waiting._checking:  # as a look does that an earlier wait left behind
            waiting._sound = None
            waiting._check(waiting.published)
        assert len(looks) == 1
    finally:
        waiting.close()


def test_drafts_lie_where_nobody_else_can_have_been(redis, run_id, place, tmp_path):
    taken, left = tmp_path / f"rlif-{run_id}-drafts", tmp_path / f"rlif-{run_id}-drafts-x_345678"
    taken.mkdir(), left.mkdir()
    (left / "0-1.tmp").mkdir()
    publishers = [Publisher(redis, run_id, place, mirror_dir=tmp_path) for _ in range(2)]
    drafts = {publisher.directory for publisher in publishers}
    assert set(tmp_path.iterdir()) == {taken, *drafts} and len(drafts) == 2
    assert all(folder.stat().st_mode & 0o777 == 0o700 for folder in drafts)
    del publishers
    assert list(tmp_path.iterdir()) == [taken]


def test_an_upload_that_breaks_off_is_no_version_and_is_removed_by_the_next_trainer(
    redis, run_id, place, running, monkeypatch
):
    import obstore

    publisher = Publisher(redis, run_id, place, patience_seconds=0.5)
    publisher.publish(V(version=1), some_tensors(1).items())
    put, calls = obstore.put, []

    def put_and_die(*given, **options):
        if calls:
            running.kill()
        calls.append(given)
        return put(*given, **options)

    with monkeypatch.context() as patch, pytest.raises(StoreError, match=f"{place}/0-2: .*127.0.0.1") as raised:
        patch.setattr(obstore, "put", put_and_die)
        publisher.publish(V(version=2), some_tensors(2).items())
    assert SECRET not in str(raised.value) and KEY not in str(raised.value)
    assert len(calls) == 2 and pointer.newest_version_sync(redis, run_id) == V(version=1)
    running.start()
    assert dict(store_at(place).versions())[V(version=2)] == {"model.safetensors"}
    again = Publisher(redis, run_id, place)
    assert names(place) == ["0-1"]
    weights = again.publish(V(version=2), some_tensors(22).items())
    with whole(weights) as folder:
        assert same(load_file(folder / "model.safetensors"), some_tensors(22))


def test_publishing_outlasts_a_store_that_is_away(publisher, place, running, redis, run_id):
    running.kill()
    with ThreadPoolExecutor(1) as thread:
        published = thread.submit(publisher.publish, V(version=1), some_tensors().items())
        time.sleep(1)
        assert not published.done()
        running.start()
        published.result(30)
    assert names(place) == ["0-1"] and pointer.newest_version_sync(redis, run_id) == V(version=1)


async def test_a_follower_takes_a_version_when_its_store_is_back(publisher, follower, server, running, monkeypatch):
    monkeypatch.setattr(store.store_at, "__defaults__", (0.3,))
    await publish(publisher, 0, some_tensors(0))
    await follower.at_least(V(), 20)
    with monkeypatch.context() as patch:
        patch.setattr(pointer, "advance", lambda *_: True)
        weights = await asyncio.to_thread(publisher.publish, V(version=1), some_tensors(1).items())
    running.kill()
    pointer.advance(publisher.redis, weights)
    await until(lambda: follower.refusal)
    assert "weights 0.1 refused: s3://" in follower.refusal and follower.version == V()
    running.start()
    await follower.at_least(V(version=1), 20)
    assert same(server.tensors, some_tensors(1))


def test_who_may_not_write_is_told_so_at_once(redis, run_id, place, monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong-but-still-a-secret")
    began = time.monotonic()
    with pytest.raises(StoreError, match=f"{place}/: .*SignatureDoesNotMatch") as raised:
        Publisher(redis, run_id, place)
    assert time.monotonic() - began < 10 and "wrong-but" not in str(raised.value)


def test_a_run_is_exported_from_its_bucket(publisher, place, tmp_path, run_id, monkeypatch, caplog):
    (tmp_path / "config").mkdir()
    (tmp_path / "config" / "config.json").write_text("{}")
    made = steps(2)
    for number, tensors in enumerate(made):
        publisher.publish(V(version=number), tensors.items(), tmp_path / "config")
    run = tmp_path / "run"
    run.mkdir()
    (run / "recipe.yaml").write_text(
        f"run: {{name: {run_id}, dir: {run}}}\nmodel: {{path: m}}\ndata: {{path: d, fields: {{prompt: p}}}}\n"
        f"rewards: intuitor\ntrainer: {{steps: 1, groups_per_step: 1}}\nweights: {{dir: {place}/}}\n"
    )
    assert export(run, tmp_path / "out") == V(version=1)
    assert same(load_file(tmp_path / "out" / "model.safetensors"), made[1])
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "another")
    with pytest.raises(RecipeError, match="neither published weights nor a checkpoint"):
        export(run, tmp_path / "none")
    assert "cannot be looked at: s3://" in caplog.text


# ---- what a recipe may say -----------------------------------------------------------------------------------------


def test_where_weights_may_lie():
    assert Weights(dir="weights/here").dir == Path("weights/here")
    assert Weights(dir="s3://some-bucket/a/b/").dir == "s3://some-bucket/a/b"
    for bad in ("s3://", "s3:///a", "gs://bucket", "s3://b/a//c", "s3://b/a c", "s3://b/a?x=1", "https://b/a"):
        with pytest.raises(ValidationError, match="write it as s3://bucket/prefix|write it as s3://bucket or"):
            Weights(dir=bad)
    with pytest.raises(ValidationError, match="from the environment"):
        Weights(dir="s3://key:hunter2@bucket/a")


def test_without_its_client_a_bucket_is_refused_by_name(monkeypatch):
    monkeypatch.setattr(store.importlib.util, "find_spec", lambda _: None)
    store.require("folder")
    with pytest.raises(StartupError, match=r"weights.dir: s3://bucket needs the package obstore; install rlif\[s3\]"):
        store_at("s3://bucket")
