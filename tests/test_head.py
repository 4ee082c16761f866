"""The LM head in slices of the vocabulary against all logits in float64: values, gradients, memory."""

import pytest
import torch
from torch import nn

from trainer.head import Head

VOCAB, WIDTH, TOKENS = 50, 16, 23


def inputs(bias: bool, dtype: torch.dtype):
    torch.manual_seed(0)
    linear = nn.Linear(WIDTH, VOCAB + 6, bias=bias)  # rows beyond the vocabulary, as padded embeddings have
    with torch.no_grad():
        linear.weight *= 10
    hidden = torch.randn(TOKENS, WIDTH).to(dtype)
    targets, temperatures = torch.randint(VOCAB, (TOKENS,)), torch.rand(TOKENS) + 0.5
    return linear.to(dtype), hidden, targets, temperatures


def plain(linear, hidden, targets, temperatures):
    """All logits, in float64: logprobs, entropies."""
    logits = linear(hidden)[:, :VOCAB] / temperatures[:, None]
    logprobs = logits.log_softmax(-1)
    return logprobs.gather(1, targets[:, None])[:, 0], -(logprobs.exp() * logprobs).sum(-1)


@pytest.mark.parametrize("used", ["logprobs", "entropies", "both"])
@pytest.mark.parametrize("tile_elements", [1, 7 * TOKENS, 10**6])
@pytest.mark.parametrize("bias", [False, True])
def test_values_and_gradients_are_those_of_the_full_logits(bias, tile_elements, used):
    linear, hidden, targets, temperatures = inputs(bias, torch.float32)
    weights = torch.randn(2, TOKENS)
    weights[0] *= used != "entropies"
    weights[1] *= used != "logprobs"
    results = []
    for which, kind in ((Head(linear, VOCAB, tile_elements), torch.float32), (None, torch.float64)):
        layer = nn.Linear(WIDTH, VOCAB + 6, bias=bias, dtype=kind)
        layer.load_state_dict(linear.state_dict())
        if which is not None:
            which.linear = [layer]
        leaf = hidden.to(kind, copy=True).requires_grad_()
        call = which or (lambda *given, layer=layer: plain(layer, *given))
        logprobs, entropies = call(leaf, targets, temperatures.to(kind))
        used_ones = {"logprobs": [0], "entropies": [1], "both": [0, 1]}[used]
        sum(((logprobs, entropies)[i] * weights[i].to(kind)).sum() for i in used_ones).backward()
        gradients = [leaf.grad, layer.weight.grad, *([layer.bias.grad] if bias else [])]
        results.append([logprobs.detach(), entropies.detach(), *gradients])
    for got, expected in zip(*results, strict=True):
        assert torch.allclose(got.double(), expected, rtol=1e-4, atol=2e-5)
    assert results[0][3][VOCAB:].abs().max() == 0


def test_bfloat16_weights_are_multiplied_without_rounding_the_logits():
    linear, hidden, targets, temperatures = inputs(False, torch.bfloat16)
    logprobs, entropies = Head(linear, VOCAB, 100)(hidden, targets, temperatures)
    expected = plain(linear.double(), hidden.double(), targets, temperatures.double())
    assert torch.allclose(logprobs.double(), expected[0], rtol=1e-5, atol=1e-5)
    assert torch.allclose(entropies.double(), expected[1], rtol=1e-5, atol=1e-5)


def test_a_frozen_head_gets_no_gradient():
    linear, hidden, targets, temperatures = inputs(True, torch.float32)
    linear.requires_grad_(False)
    Head(linear, VOCAB)(hidden.requires_grad_(), targets, temperatures)[0].sum().backward()
    assert linear.weight.grad is None and hidden.grad is not None


def test_extreme_logits_stay_finite():
    linear, hidden, targets, temperatures = inputs(False, torch.float32)
    leaf = (hidden * 1e4).requires_grad_()
    logprobs, entropies = Head(linear, VOCAB, 7 * TOKENS)(leaf, targets, temperatures)
    (logprobs + entropies).sum().backward()
    assert all(torch.isfinite(x).all() for x in (logprobs, entropies, leaf.grad))


@pytest.mark.parametrize("passes", ["forward", "backward"])
def test_no_tensor_is_as_large_as_all_logits(passes):
    vocab, tokens = 4000, 512
    linear, hidden = nn.Linear(WIDTH, vocab, bias=False), torch.randn(tokens, WIDTH, requires_grad=True)
    head = Head(linear, vocab, 2**16)
    given = (hidden, torch.zeros(tokens, dtype=torch.long), torch.ones(tokens))
    loss = head(*given)[0].sum() if passes == "backward" else None
    with torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        if loss is None:
            head(*given)
        else:
            loss.backward()
    largest = max(event.cpu_memory_usage for event in profile.events())
    assert 0 < largest < 4 * tokens * vocab / 4
