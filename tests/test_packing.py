"""Packed rows with shared prompts against padded rows: hidden states and gradients, by every attention."""

import numpy as np
import pytest
import torch
from scored_groups import make_groups
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoConfig, AutoModelForCausalLM

from services.recipe import Model
from trainer import packing
from trainer import policy as policies
from trainer.batch import deal, micro_batch, sequences


def micro(seed: int = 2, count: int = 3):
    batch = sequences(make_groups(count, seed=seed), 288)
    return micro_batch(batch, np.concatenate(deal(batch, 1, 10_000)[0]), "per_sequence")


def make(model_type: str, folder, attention: str = "sdpa", **settings):
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        model_type,
        vocab_size=288,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        tie_word_embeddings=True,
        **settings,
    )
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4 if parameter.dim() == 2 else 1)
    model.save_pretrained(folder)
    return Model(path=str(folder), dtype="float32", attn_implementation=attention)


def outcome(policy, given):
    """Logprobs, entropies, and the gradient of a sum that weighs every token differently."""
    logprobs, entropies = policy(given.packed, given.positions, given.targets, given.temperatures)
    (logprobs * torch.linspace(-1, 1, len(logprobs))).sum().backward()
    return logprobs, entropies, {name: p.grad for name, p in policy.named_parameters()}


def same(left, right):
    for one, other in zip(left[:2], right[:2], strict=True):
        assert torch.allclose(one, other, rtol=1e-4, atol=1e-5)
    for name, gradient in right[2].items():
        assert torch.allclose(left[2][name], gradient, rtol=1e-3, atol=1e-4 * float(gradient.abs().max())), name


@pytest.mark.parametrize("model_type", sorted(packing.MODELS))
def test_packed_rows_are_computed_as_padded_ones(model_type, tmp_path):
    extra = {"sliding_window": None} if model_type == "mistral" else {}
    settings = make(model_type, tmp_path, **extra)
    packed = policies.load(settings)
    padded = policies.load(settings.model_copy(update={"attn_implementation": "eager"}))
    assert packed.packs and not padded.packs
    same(outcome(packed, micro()), outcome(padded, micro()))


def test_gradient_checkpointing_changes_nothing(tmp_path):
    settings = make("qwen2", tmp_path)
    same(
        outcome(policies.load(settings, gradient_checkpointing=True), micro()),
        outcome(policies.load(settings), micro()),
    )


def varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale, causal):
    """flash-attn's segments, spelt out: [tokens, heads, width]; a shorter query ends where its keys end."""
    assert causal and k.shape[0] == cu_seqlens_k[-1] and cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
    out = []
    for a, b, c, d in zip(cu_seqlens_q, cu_seqlens_q[1:], cu_seqlens_k, cu_seqlens_k[1:], strict=False):
        assert b - a <= max_seqlen_q and d - c <= max_seqlen_k
        repeat = q.shape[1] // k.shape[1]
        keys, values = (x[c:d].repeat_interleave(repeat, 1) for x in (k, v))
        scores = torch.einsum("qhw,khw->hqk", q[a:b], keys) * softmax_scale
        seen = torch.ones(b - a, d - c, dtype=torch.bool).tril(int(d - c) - int(b - a))
        out.append(torch.einsum("hqk,khw->qhw", scores.masked_fill(~seen, -torch.inf).softmax(-1), values))
    return torch.cat(out)


def test_flash_attention_gets_segments_that_mean_the_same(tmp_path, monkeypatch):
    import sys
    from importlib.machinery import ModuleSpec
    from types import ModuleType

    module = ModuleType("flash_attn")
    module.__spec__, module.flash_attn_varlen_func = ModuleSpec("flash_attn", None), varlen
    settings = make("qwen2", tmp_path)
    expected = outcome(policies.load(settings), micro())
    monkeypatch.setitem(sys.modules, "flash_attn", module)
    flash = policies.load(settings.model_copy(update={"attn_implementation": "flash_attention_2"}))
    assert flash.packs
    same(outcome(flash, micro()), expected)


@pytest.mark.parametrize(
    ("model_type", "settings"),
    [("qwen2", {"use_sliding_window": True, "max_window_layers": 1}), ("gemma3_text", {}), ("starcoder2", {})],
)
def test_other_models_get_padded_rows(model_type, settings, tmp_path):
    assert not policies.load(make(model_type, tmp_path, **settings)).packs


def test_a_completion_sees_its_prompt_and_itself_alone():
    """Changing a sibling's or another family's tokens changes nothing."""
    families = (packing.Family(3, (2, 4)), packing.Family(2, (5,)))
    ids = torch.arange(16)[None]
    row = packing.Packed(ids, ids, families)
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, 16, 8) for _ in range(3))
    first = packing.attention_sdpa(torch.nn.Identity(), q, k, v, None, packed=row)[0]
    k[:, :, 3:5], v[:, :, 3:5] = 9, 9
    second = packing.attention_sdpa(torch.nn.Identity(), q, k, v, None, packed=row)[0]
    changed = (first != second).flatten(2).any(-1)[0]
    assert changed.tolist() == [False] * 3 + [True] * 2 + [False] * 11


def test_padded_rows_hold_every_completion_after_its_prompt():
    families = (packing.Family(2, (1, 0)), packing.Family(1, ()), packing.Family(1, (3,)))
    ids = torch.arange(1, 9)[None]
    rows, places = packing.Packed(ids, ids, families).rows()
    expected = [torch.tensor(row) for row in ([1, 2, 3], [1, 2], [4], [5, 6, 7, 8])]
    assert torch.equal(rows, pad_sequence(expected, batch_first=True))
    assert rows.flatten()[places].tolist() == ids[0].tolist()
