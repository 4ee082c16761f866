"""One mix-in scores every family of decoders that vLLM knows: against a float64 forward of the same random model."""

import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from scoring_oracle import model_oracle
from tiny import make_tiny_tokenizer

from reward_server.scorer.items import TokenItem

pytest.importorskip("vllm")
pytestmark = [pytest.mark.vllm, pytest.mark.slow]

PROGRAM = Path(__file__).with_name("vllm_families.py")
METRICS = ("self_certainty", "token_entropy", "mean_logprob", "varentropy", "topk_confidence", "margin")
SHAPE = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
WINDOWED = {"sliding_window": 64, "query_pre_attn_scalar": 32}
FAMILIES = {
    "Qwen2": {},
    "Qwen3": {},
    "Llama": {"tie_word_embeddings": True},
    "Mistral": {"sliding_window": None},
    "Olmo2": {},
    "Olmo3": {"sliding_window": 64},
    "Gemma": {},
    "Gemma2": {**WINDOWED, "final_logit_softcapping": 2.0},
    "Gemma3": WINDOWED,
}


def make_model(family: str, folder: Path):
    """Random weights with logits that have a shape; returns it in float64."""
    import transformers

    config = getattr(transformers, f"{family}TextConfig" if family == "Gemma3" else f"{family}Config")
    torch.manual_seed(1)
    model = getattr(transformers, f"{family}ForCausalLM")(config(**SHAPE, **FAMILIES[family])).float()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(4)
    model.save_pretrained(folder)
    make_tiny_tokenizer().save_pretrained(folder)
    model.set_attn_implementation("eager")  # of Gemma 2, sdpa leaves out the cap on attention scores
    return model.double().eval()


def tokens(count: int, seed: int) -> list[int]:
    return torch.randint(10, 280, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


@pytest.fixture(scope="module")
def items() -> list[TokenItem]:
    """Lengths around the blocks (32) and the steps (64 tokens), two prompts shared, temperatures and presets mixed."""
    shared, block = tokens(70, 1), tokens(64, 2)
    return [
        TokenItem(tokens(1, 3), tokens(9, 4), METRICS),
        TokenItem(shared, tokens(40, 5), METRICS, 0.7),
        TokenItem(shared, tokens(25, 6), METRICS),
        TokenItem(block, tokens(1, 7), METRICS),
        TokenItem(block, tokens(130, 8), METRICS, 1.3, "open_r1"),
        TokenItem(block, tokens(32, 9), METRICS, 1.0, "verl"),
    ]


@pytest.fixture(scope="module")
def families(items, tmp_path_factory):
    """family -> (model in float64, what vLLM made of the items)."""
    place = tmp_path_factory.mktemp("families")
    models = {family: make_model(family, place / family) for family in FAMILIES}
    (place / "items.json").write_text(json.dumps([asdict(item) for item in items]))
    environment = {**os.environ, "PYTHONPATH": str(PROGRAM.parent.parent)}
    done = subprocess.run(
        [sys.executable, PROGRAM, place / "items.json", *(place / family for family in FAMILIES)],
        capture_output=True,
        text=True,
        timeout=280,
        env=environment,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    found = {Path(line["folder"]).name: line for line in lines}
    return {family: (model, found[family]) for family, model in models.items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_equals_a_float64_forward(families, items, family):
    model, found = families[family]
    assert found["cached"] > 0, "no prompt was shared"
    for item, result in zip(items, found["results"], strict=True):
        expected = model_oracle(model, item.prompt_ids, item.completion_ids, item.temperature, item.preset)
        for name in METRICS:
            values = torch.tensor(result[name], dtype=torch.float64)
            torch.testing.assert_close(values, expected[name], rtol=1e-4, atol=1e-4, msg=f"{name}, {item.preset}")
