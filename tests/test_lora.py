"""Adapters by every ZeRO stage against plain float64 training of A and B; what leaves the trainer has them merged."""

import json
import subprocess
from functools import partial
from pathlib import Path

import pytest
import torch
from objective_oracle import loss as plain_loss
from plain_trainer import oracle_sequence
from ranks_command import command
from safetensors.torch import load_file
from scored_groups import make_groups, trained_pairs
from test_trainer import ENVIRONMENT, make_recipe
from torch.func import functional_call

from services import codec, recipe
from services.recipe import Model, RecipeError
from services.recipe_sections import Lora
from services.weights.adapter import DOWN, UP, merged
from trainer import export, lora
from trainer import policy as policies
from trainer.engine import learning_rate

SETTINGS = {"rank": 4, "alpha": 8, "targets": ["q_proj", "v_proj", "down_proj"]}
STAGES = [0, 1, 2, 3]


def tree(model: Path, folder: Path, stage: int, ranks: int = 1) -> dict:
    made = make_recipe(model, folder, ranks=ranks, zero_stage=stage, learning_rate=0.1)
    made["model"]["lora"] = SETTINGS
    return made


def batches():
    return [make_groups(3, seed=seed) for seed in range(3)]


@pytest.fixture(scope="module")
def trained(tiny_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("lora")
    packed = [[codec.pack(group).hex() for group in groups] for groups in batches()]
    cases = [
        {
            "recipe": tree(tiny_model, folder / "run", stage, ranks=2),
            "batches": packed,
            "out": str(folder / str(stage)),
            "checkpoint": str(folder / f"checkpoints-{stage}"),
        }
        for stage in STAGES
    ]
    (folder / "cases.json").write_text(json.dumps(cases))
    worker = str(Path(__file__).with_name("trainer_worker.py"))
    argv = command(2, worker, str(folder / "cases.json"))
    done = subprocess.run(argv, env=ENVIRONMENT, timeout=240, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert done.returncode == 0, done.stdout.decode()[-4000:]
    return folder


@pytest.fixture(scope="module")
def oracle(tiny_model, tmp_path_factory):
    """Losses and merged weights of plain training in float64."""
    from transformers import AutoModelForCausalLM

    settings = recipe.parse(tree(tiny_model, tmp_path_factory.mktemp("x"), 0)).trainer
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float64).requires_grad_(False)
    attached = policies.load(Model(path=str(tiny_model), dtype="float32", lora=Lora(**SETTINGS))).model
    start = {name: p.detach().double() for name, p in attached.named_parameters()}
    adapters = {name: p.requires_grad_() for name, p in start.items() if lora.plain(name) is None}
    optimizer = torch.optim.AdamW(
        list(adapters.values()), betas=settings.betas, eps=settings.adam_eps, weight_decay=settings.weight_decay
    )

    def weights():
        layers = {name.removesuffix(lora.UP) for name in adapters if name.endswith(lora.UP)}
        own = dict(model.named_parameters())
        changed = {
            f"{layer}.weight": own[f"{layer}.weight"] + 2 * adapters[layer + lora.UP] @ adapters[layer + lora.DOWN]
            for layer in layers
        }
        return {**own, **changed}

    def call(now, **given):
        return functional_call(model, now, kwargs=given)

    losses = []
    for step, groups in enumerate(batches()):
        changed = partial(call, weights())
        loss = plain_loss(
            [
                oracle_sequence(changed, model, group, completion, score.advantage, None, settings)
                for group, completion, score in trained_pairs(groups)
            ],
            settings,
        )
        optimizer.param_groups[0]["lr"] = learning_rate(step, settings)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(list(adapters.values()), settings.grad_clip)
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses, {name: tensor.detach() for name, tensor in weights().items()}


@pytest.mark.parametrize("stage", STAGES)
def test_adapters_are_trained_as_plain_torch_trains_them(trained, oracle, tiny_model, stage):
    losses, expected = oracle
    results = json.loads((trained / str(stage) / "results.json").read_text())
    assert [result["loss"] for result in results] == pytest.approx(losses, abs=1e-6)
    weights, base = (
        load_file(path) for path in (trained / str(stage) / "weights.safetensors", tiny_model / "model.safetensors")
    )
    assert set(weights) == set(expected)
    targets = tuple(f"{target}.weight" for target in SETTINGS["targets"])
    changed = {name for name in weights if not torch.equal(weights[name], base[name])}
    assert changed == {name for name in base if name.endswith(targets)}
    assert max(float((base[name] - weights[name]).abs().max()) for name in changed) > 5e-3
    for name in expected:
        assert (weights[name].double() - expected[name]).abs().max() < 1e-6, name


@pytest.mark.parametrize("stage", STAGES)
def test_what_a_version_holds_makes_the_merged_weights(trained, tiny_model, stage):
    halves = load_file(trained / str(stage) / "adapter.safetensors")
    weights, base = (
        load_file(path) for path in (trained / str(stage) / "weights.safetensors", tiny_model / "model.safetensors")
    )
    layers = {name.removesuffix(DOWN) for name in halves if name.endswith(DOWN)}
    assert len(halves) == 2 * len(layers) == 2 * 2 * len(SETTINGS["targets"])
    for layer in layers:
        found = merged(base[f"{layer}.weight"], halves[layer + DOWN], halves[layer + UP], 2.0)
        assert torch.equal(found, weights[f"{layer}.weight"])


@pytest.mark.parametrize("stage", STAGES)
def test_a_checkpoint_exports_the_merged_model(trained, stage):
    (folder,) = (path for path in (trained / f"checkpoints-{stage}").iterdir() if path.is_dir())
    weights = load_file(trained / str(stage) / "weights.safetensors")
    exported = dict(export._tensors(folder))
    assert set(exported) == set(weights)
    for name in weights:
        assert torch.equal(exported[name], weights[name]), name


def test_without_adapters_it_is_the_base_model(tiny_model):
    policy = policies.load(Model(path=str(tiny_model), dtype="float32", lora=Lora(**SETTINGS)))
    plain = policies.load(Model(path=str(tiny_model), dtype="float32"))
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if name.endswith(lora.UP):
                parameter.normal_()
    from test_packing import micro

    given = micro()
    inputs = (given.packed, given.positions, given.targets, given.temperatures)
    expected = plain(*inputs)[0]
    assert torch.equal(policies.WithoutAdapters(policy)(*inputs)[0], expected)
    assert not torch.allclose(policy(*inputs)[0], expected, atol=0.1)
    assert sum(p.requires_grad for p in policy.parameters()) == 2 * 2 * len(SETTINGS["targets"])


def test_a_target_that_is_not_there_is_refused(tiny_model):
    with pytest.raises(
        RecipeError, match="model.lora.targets: 'qkv' is none of the model's layers: down_proj, .*q_proj"
    ):
        policies.load(Model(path=str(tiny_model), dtype="float32", lora=Lora(targets=["qkv"])))
