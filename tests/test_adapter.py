"""Versions of low-rank adapters: every follower's weights are, bit by bit, those that the trainer would have merged."""

import asyncio
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from test_lora import SETTINGS
from test_trainer import make_recipe
from test_weights import flip, metric, remove, same, truncate, until
from tiny import make_tiny_model

from services import recipe
from services.contract import Version
from services.recipe import RecipeError
from services.recipe_sections import Lora
from services.weights import adapter as adapters
from services.weights import disk, pointer
from services.weights.follow import Follower
from services.weights.mirror import Mirror
from services.weights.publish import BYTES, Publisher
from trainer import lora
from trainer import policy as policies
from trainer import start as starts
from trainer.export import export
from trainer.ranks import Ranks

V = Version


# ---- the sum -------------------------------------------------------------------------------------------------------


def once(operation, one, other):
    """The float32 result of an operation on float32 arrays, rounded once: float64 has more than twice the bits and two,
    so that rounding its result again changes nothing (Figueroa 1995)."""
    return operation(one.astype(np.float64), other.astype(np.float64)).astype(np.float32)


@settings(max_examples=20)
@given(st.integers(0, 2**32), st.integers(1, 70), st.integers(1, 90), st.integers(1, 20), st.sampled_from([0.5, 1.3]))
def test_each_operation_is_rounded_once_and_in_order(seed, rows, columns, rank, scale):
    made = np.random.default_rng(seed)
    weight, down, up = (
        made.standard_normal(shape, np.float32) for shape in ((rows, columns), (rank, columns), (rows, rank))
    )
    total = once(np.multiply, up[:, :1], down[:1])
    for number in range(1, rank):
        total = once(np.add, total, once(np.multiply, up[:, number : number + 1], down[number : number + 1]))
    expected = once(np.add, weight, once(np.multiply, total, np.float32(scale)[None]))
    given_ = (torch.from_numpy(array.copy()) for array in (weight, down, up))
    assert np.array_equal(adapters.merged(*given_, scale).numpy(), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_neither_threads_nor_blocks_change_a_bit(monkeypatch, dtype):
    made = torch.Generator().manual_seed(0)
    shapes = ((67, 300), (16, 300), (67, 16))
    weight, down, up = (torch.randn(*shape, generator=made).to(dtype) for shape in shapes)
    expected = adapters.merged(weight, down, up, 2.0)
    oracle = weight.double() + 2 * up.double() @ down.double()
    assert (expected.double() - oracle).abs().max() < (1e-4 if dtype == torch.float32 else 0.3)
    threads = torch.get_num_threads()
    for count, block in ((1, 1), (2, 1000), (4, 2**20)):
        monkeypatch.setattr(adapters, "BLOCK", block)
        torch.set_num_threads(count)
        assert torch.equal(adapters.merged(weight, down, up, 2.0), expected)
    torch.set_num_threads(threads)


# ---- publishing and following --------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def trained(request, tiny_model):
    """A policy whose adapters have moved, of a base model whose files are float32, and its recipe's model."""
    model = recipe.parse(make_recipe(tiny_model, Path("x"), dtype=request.param)).model
    model = model.model_copy(update={"lora": Lora(**SETTINGS)})
    policy = policies.load(model)
    move(policy, 1)
    return policy, model


def move(policy, seed: int) -> None:
    made = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=made) * (0.05 if lora.UP in name else 1))


@pytest.fixture
def publisher(redis, run_id, tmp_path) -> Publisher:
    return Publisher(redis, run_id, tmp_path / "weights", keep=2, snapshot_every=5, mirror_dir=tmp_path / "mirrors")


def publish(publisher, policy, model, version: Version):
    tensors = policies.adapters(policy, partitioned=False)
    return publisher.publish(version, tensors, Path(model.path), lora.published(policy.model, model))


def merged(policy, model) -> dict[str, torch.Tensor]:
    """What a version of the whole weights would have held."""
    return {name: tensor.clone() for name, tensor in policies.tensors(policy, False, model.lora)}


def test_a_version_holds_the_adapters_alone_and_becomes_the_merged_weights(publisher, trained, tiny_model, tmp_path):
    policy, model = trained
    weights = publish(publisher, policy, model, V(version=1))
    assert weights.transport == "adapter" and weights.base is None and weights.adapter.scale == 2.0
    assert sorted(path.name for path in Path(weights.location).iterdir()) == ["adapter.safetensors", "manifest.json"]
    assert len(weights.manifest) == 2 * 2 * len(SETTINGS["targets"])
    assert type(weights).model_validate_json(weights.model_dump_json()) == weights
    assert 0 < BYTES.labels("adapter")._value.get()

    asked = []
    mirror = Mirror(tmp_path / "own", "m", lambda: asked.append(1) or tiny_model)
    for seed in (2, 3):
        weights = publish(publisher, policy, model, V(version=seed))
        expected = merged(policy, model)
        assert mirror.reach(weights) == mirror.path and mirror.version == weights.id
        found = load_file(mirror.path / "model.safetensors")
        assert same(found, expected)
        base = load_file(tiny_model / "model.safetensors")
        changed = {name for name in base if not torch.equal(found[name], base[name].to(found[name].dtype))}
        assert changed == {name for name in base if name.endswith(tuple(f"{t}.weight" for t in SETTINGS["targets"]))}
        move(policy, seed)

    assert len(asked) == 1  # a name of the hub is not looked up for every version

    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(mirror.path)
    assert same(loaded.named_parameters(), expected)


def test_a_mirror_goes_between_adapters_and_whole_versions(publisher, trained, tiny_model, tmp_path):
    policy, model = trained
    mirror = Mirror(tmp_path / "own", "m", lambda: tiny_model)
    move(policy, 4)
    expected = merged(policy, model)
    mirror.reach(publish(publisher, policy, model, V(version=0)))
    other = {name: tensor + 1 for name, tensor in expected.items()}
    publisher.publish(V(version=1), expected.items(), tiny_model)
    mirror.reach(publisher.publish(V(version=2), other.items(), tiny_model))
    assert same(load_file(mirror.path / "model.safetensors"), other)
    mirror.reach(publish(publisher, policy, model, V(version=3)))
    assert same(load_file(mirror.path / "model.safetensors"), expected)


def test_another_base_is_refused_by_name(publisher, trained, tmp_path):
    policy, model = trained
    other = make_tiny_model(tmp_path / "other", seed=5)
    weights = publish(publisher, policy, model, V(version=1))
    mirror = Mirror(tmp_path / "own", "m", lambda: other)
    for _ in range(2):
        with pytest.raises(
            disk.DamagedWeights, match="the adapters are for another model than .*/other, whose weights"
        ):
            mirror.reach(weights)
    (other / "model.safetensors").unlink()
    with pytest.raises(OSError, match="has no safetensors files"):
        Mirror(tmp_path / "own", "n", lambda: other).reach(weights)
    with pytest.raises(disk.DamagedWeights, match="no model here"):
        Mirror(tmp_path / "own", "o").reach(weights)


def test_the_bases_checksum_is_of_its_numbers_not_of_its_files(tiny_model, tmp_path):
    again = tmp_path / "again"
    shutil.copytree(tiny_model, again)
    tensors = load_file(tiny_model / "model.safetensors")
    (again / "model.safetensors").unlink()
    for number, name in enumerate(reversed(tensors)):
        save_file({name: tensors[name]}, again / f"model-{number}.safetensors")
    own = adapters.of(tiny_model, "float32", 1.0)
    assert adapters.of(again, "float32", 1.0) == own != adapters.of(again, "bfloat16", 1.0)
    tensors["model.norm.weight"][3] += 1e-6
    save_file(tensors, again / "model.safetensors")
    assert adapters.of(again, "float32", 1.0).base != own.base


@pytest.mark.parametrize("lacks", ["one half", "the rank", "the layer"])
def test_adapters_that_are_not_of_this_model_are_refused(publisher, trained, tiny_model, tmp_path, lacks):
    policy, model = trained
    halves = dict(policies.adapters(policy, partitioned=False))
    first = next(iter(halves))
    if lacks == "one half":
        del halves[first]
    elif lacks == "the rank":
        halves[first] = halves[first][1:]
    else:
        halves["stranger.lora_A.weight"] = halves["stranger.lora_B.weight"] = halves[first]
    weights = publisher.publish(V(version=1), halves.items(), None, lora.published(policy.model, model))
    reason = {"one half": "come in pairs", "the rank": "do not go with a weight", "the layer": "has no stranger.weight"}
    with pytest.raises(disk.DamagedWeights, match=reason[lacks]):
        Mirror(tmp_path / "own", "m", lambda: tiny_model).reach(weights)


def test_a_base_with_other_names_has_whole_versions(trained, tmp_path):
    policy, model = trained
    folder = make_tiny_model(tmp_path / "renamed")
    tensors = load_file(folder / "model.safetensors")
    save_file({f"language_{name}": tensor for name, tensor in tensors.items()}, folder / "model.safetensors")
    assert lora.published(policy.model, model.model_copy(update={"path": str(folder)})) is None


async def test_the_embedded_engine_and_the_scorer_serve_the_merged_weights(
    publisher, trained, run_id, redis_url, tiny_model, tmp_path
):
    from reward_server.scorer.transformers import TransformersScorer
    from rollout_server.engines.base import EngineSettings
    from rollout_server.engines.transformers import TransformersEngine

    policy, model = trained
    engine = TransformersEngine(EngineSettings(tiny_model, "tiny", dtype=model.dtype, device="cpu", threads=1))
    await engine.start()
    scorer = TransformersScorer(str(tiny_model), dtype=model.dtype, device="cpu")

    async def score_with(version: Version, directory: Path) -> None:
        await asyncio.to_thread(scorer.load, version, directory)

    base = partial(Path, tiny_model)
    followers = [
        Follower(redis_url, run_id, name, f"{name}-{run_id}", "", load, 0.05, tmp_path / "mirrors", base)
        for name, load in (("rollout", engine.load), ("reward", score_with))
    ]
    for follower in followers:
        await follower.start()
    for seed in (1, 2):
        move(policy, seed)
        await asyncio.to_thread(publish, publisher, policy, model, V(version=seed))
        for follower in followers:
            await follower.at_least(V(version=seed), 20)
        for served in (engine.model, scorer.model):
            assert same(served.named_parameters(), merged(policy, model))
    assert metric(followers[0], "rlif_weight_sync_seconds_count", phase="merge") == 2
    for follower in followers:
        assert not metric(follower, "rlif_weight_versions_refused_total")
        await follower.stop()
    await engine.stop()
    assert [path.name.startswith(f"rlif-{run_id}-trainer-") for path in (tmp_path / "mirrors").iterdir()] == [True]


@pytest.mark.parametrize("damage", [flip, truncate, remove], ids=lambda damage: damage.__name__)
async def test_damaged_adapters_are_refused_and_the_next_are_taken(
    publisher, trained, run_id, redis_url, tiny_model, tmp_path, damage, monkeypatch
):
    policy, model = trained
    taken = []

    async def load(version: Version, directory: Path) -> None:
        taken.append((version, load_file(directory / "model.safetensors")))

    follower = Follower(redis_url, run_id, "r", f"r-{run_id}", "", load, 0.05, tmp_path / "own", lambda: tiny_model)
    await follower.start()
    await asyncio.to_thread(publish, publisher, policy, model, V(version=1))
    await follower.at_least(V(version=1), 20)
    with monkeypatch.context() as patch:  # redis learns of it when it is damaged
        patch.setattr(pointer, "advance", lambda *_: True)
        weights = await asyncio.to_thread(publish, publisher, policy, model, V(version=2))
    damage(Path(weights.location) / "adapter.safetensors")
    pointer.advance(publisher.redis, weights)
    await until(lambda: follower.refusal)
    assert "weights 0.2 refused" in follower.refusal and "adapter.safetensors" in follower.refusal
    assert follower.version == V(version=1)
    move(policy, 9)
    await asyncio.to_thread(publish, publisher, policy, model, V(version=3))
    await follower.at_least(V(version=3), 20)
    version, tensors = taken[-1]
    assert version == V(version=3) and same(tensors, merged(policy, model))
    await follower.stop()


def test_adapters_are_exported_as_a_whole_model(publisher, trained, tiny_model, tmp_path):
    policy, model = trained
    run = tmp_path / "run"
    run.mkdir()
    tree = make_recipe(tiny_model, run, publisher.run_id, model.dtype)
    tree["model"]["lora"] = SETTINGS
    (run / "recipe.yaml").write_text(recipe.dump(recipe.parse(tree)))
    publish(publisher, policy, model, V(version=7))
    publisher.directory.rename(run / "weights")
    assert export(run, tmp_path / "out") == V(version=7)
    assert same(load_file(tmp_path / "out" / "model.safetensors"), merged(policy, model))
    assert (tmp_path / "out" / "config.json").exists() and (tmp_path / "out" / "tokenizer.json").exists()


def test_a_merged_model_is_not_what_adapters_go_on_from(tiny_model, tmp_path):
    tree = make_recipe(tiny_model, tmp_path / "run")
    tree["model"]["lora"] = SETTINGS
    with pytest.raises(RecipeError, match=r"--resume-from: adapters \(model.lora\) are added to model.path by every"):
        starts.find(recipe.parse(tree), False, tiny_model, Ranks(0, 1, torch.device("cpu")))
