"""The memory estimate: parameters counted as torch counts them, parts that move as the settings say, and a refusal."""

import json
from pathlib import Path

import pytest
from tiny import make_tiny_model
from typer.testing import CliRunner

from services import memory, recipe
from services.cli.main import app
from services.recipe import RecipeError
from services.recipe_sections import Lora

QWEN_7B = {
    "vocab_size": 152064,
    "hidden_size": 3584,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "intermediate_size": 18944,
    "tie_word_embeddings": False,
}


def tree(folder: Path, **trainer) -> dict:
    model = {"path": str(folder), "dtype": trainer.pop("dtype", "bfloat16"), "lora": trainer.pop("lora", None)}
    defaults = {"steps": 1, "groups_per_step": 1, "ranks": 8, "zero_stage": 3, "kl_beta": 0.005}
    return {
        "run": {"name": "m", "dir": "unused"},
        "model": model,
        "data": {"path": "unused", "fields": {"prompt": "p"}},
        "rollout": {"sampling": {"max_tokens": 3072}},
        "rewards": "intuitor",
        "trainer": {**defaults, **trainer},
    }


@pytest.fixture
def qwen(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(QWEN_7B))
    return tmp_path


def need(folder: Path, **trainer) -> memory.Need:
    chosen = recipe.parse(tree(folder, **trainer))
    return memory.need(chosen, memory.shape(chosen.model))


@pytest.mark.parametrize("tied", [True, False])
def test_parameters_are_those_of_the_model(tmp_path, tied):
    from tiny import make_tiny_model
    from transformers import AutoModelForCausalLM

    folder = make_tiny_model(tmp_path / "model", hidden=96, layers=3, tied=tied)
    found = memory.shape(recipe.Model(path=str(folder)))
    weights = {name: p.numel() for name, p in AutoModelForCausalLM.from_pretrained(folder).named_parameters()}
    assert found.parameters == sum(size for name, size in weights.items() if not name.endswith("bias"))


def test_adapters_are_those_that_peft_makes(tiny_model):
    from trainer import policy as policies

    model = recipe.Model(path=str(tiny_model), dtype="float32", lora=Lora(rank=5))
    learned = sum(p.numel() for p in policies.load(model).parameters() if p.requires_grad)
    assert memory.shape(model).adapters(5, model.lora.targets) == learned


@pytest.mark.parametrize(("dtype", "at_most"), [("float32", 1.02), ("bfloat16", 1.25)])
def test_activations_are_what_the_backward_pass_keeps(tmp_path, dtype, at_most):
    """Counted by autograd's own hooks, each storage once; in bfloat16 the estimate leaves room."""
    import torch

    from trainer import policy as policies
    from trainer.packing import Family, Packed

    model = recipe.Model(path=str(make_tiny_model(tmp_path, hidden=128, layers=6)), dtype=dtype)
    policy, length = policies.load(model), 512
    weights = {p.untyped_storage().data_ptr() for p in policy.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor  # held, so that no other takes its place
        return tensor

    row = Packed(torch.randint(288, (1, length)), torch.arange(length)[None], (Family(length, ()),))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        policy.model.base_model(input_ids=row.input_ids, position_ids=row.position_ids, packed=row, use_cache=False)
    found = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    chosen = tree(tmp_path, dtype=dtype, micro_batch_tokens=length, zero_stage=2)
    chosen["data"]["max_prompt_tokens"], chosen["rollout"]["sampling"]["max_tokens"] = length // 2, length // 2
    estimate = memory.need(recipe.parse(chosen), memory.shape(model)).activations
    assert 0.98 * found <= estimate <= at_most * found


def test_a_7b_on_eight_ranks(qwen):
    """7.6e9 parameters: 2 + 12 + 4 bytes of each over 8 ranks, and a reference of 2."""
    found = need(qwen)
    assert memory.shape(recipe.Model(path=str(qwen))).parameters == pytest.approx(7.62e9, rel=0.01)
    assert found.weights == pytest.approx(7.62e9 * 2 / 8, rel=0.01)
    assert found.optimizer == pytest.approx(7.62e9 * 12 / 8, rel=0.01)
    assert found.gradients == pytest.approx(7.62e9 * 4 / 8, rel=0.01)
    assert found.reference == pytest.approx(7.62e9 * 2 / 8, rel=0.01)
    # The LM head's gradient in bfloat16, three float32 slices of logits, and hidden states with their gradients.
    hidden = 16384 * 3584
    assert found.head == pytest.approx(2 * 152064 * 3584 + 3 * 4 * memory.TILE + 2 * (2 + 4) * hidden, rel=0.01)


def test_parts_follow_the_settings(qwen):
    plain = need(qwen)
    assert need(qwen, zero_stage=2).weights == pytest.approx(8 * plain.weights, rel=1e-6)
    assert need(qwen, gradient_checkpointing=True).activations < plain.activations / 5
    assert need(qwen, micro_batch_tokens=8192).activations == pytest.approx(plain.activations / 2)
    assert need(qwen, kl_beta=0.0).reference == 0
    assert need(qwen, reference={"kind": "ema"}).reference == pytest.approx(3 * plain.reference)
    offloaded = need(qwen, offload={"optimizer": True, "parameters": True})
    assert (offloaded.optimizer, offloaded.weights, offloaded.gradients) == (0, 0, 0)
    adapted = need(qwen, lora={"rank": 16})
    assert adapted.optimizer < plain.optimizer / 50 and adapted.reference == 0


def test_the_command_shows_the_parts_or_what_to_change(qwen, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(json.dumps(tree(qwen)))
    run = CliRunner()
    fits = run.invoke(
        app, ["recipe", "check", str(path), "trainer.gradient_checkpointing=true", "--gpu-gib", "80", "--json"]
    )
    assert fits.exit_code == 0, fits.output
    sizes = json.loads(fits.stdout)["trainer_gib_per_rank"]
    assert 0 < sizes["total"] < 80 and sizes["total"] == pytest.approx(sum(sizes.values()) - sizes["total"], abs=0.1)
    refused = run.invoke(app, ["recipe", "check", str(path), "--gpu-gib", "80"])
    assert isinstance(refused.exception, RecipeError)
    assert "GiB of 80" in str(refused.exception) and "with trainer.gradient_checkpointing=true" in str(
        refused.exception
    )
    hopeless = run.invoke(app, ["recipe", "check", str(path), "--gpu-gib", "2"])
    assert "not enough" in str(hopeless.exception)


def test_what_cannot_be_estimated_says_so(tmp_path):
    with pytest.raises(RecipeError, match="model.path: no config.json of 'nobody/nothing'"):
        memory.shape(recipe.Model(path="nobody/nothing"))
    (tmp_path / "config.json").write_text(json.dumps({**QWEN_7B, "num_experts": 8}))
    with pytest.raises(RecipeError, match="mixture of experts"):
        memory.shape(recipe.Model(path=str(tmp_path)))


def test_remedies_make_it_fit_and_stay_valid(qwen):
    chosen = recipe.parse(tree(qwen, zero_stage=1, ranks=1))
    limit = 60 * memory.GIB
    tried = memory.remedies(chosen, limit, memory.shape(chosen.model))
    assert tried[-1][1].total <= limit
    again = recipe.parse(tree(qwen, zero_stage=1, ranks=1), [override for override, _ in tried])
    assert memory.need(again, memory.shape(again.model)).total <= limit
