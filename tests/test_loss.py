"""The objective against its definition, in float64 and token by token."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trainer.loss import clipped_surrogate, importance_weight, k3, ratio, token_losses, token_weights

logprob = st.floats(-15, 0)
token = st.tuples(logprob, logprob, logprob, st.floats(-3, 3))  # policy, rollout, reference, advantage
settings = st.fixed_dictionaries(
    {
        "old_logprobs": st.sampled_from(["recomputed", "rollout"]),
        "clip_low": st.floats(0.05, 0.9),
        "clip_high": st.floats(0.05, 2.0),
        "importance_cap": st.none() | st.floats(0.1, 10),
        "kl_beta": st.floats(0, 1),
    }
)


def slow_loss(policy, rollout, reference, advantage, old_logprobs, clip_low, clip_high, importance_cap, kl_beta):
    """One token's loss and its derivative with respect to the policy's logprob, from the formulas."""
    importance, old = 1.0, rollout
    if old_logprobs == "recomputed":
        old = policy
        if importance_cap is not None:
            importance = min(math.exp(policy - rollout), importance_cap)
    r = math.exp(policy - old)
    free, held = r * advantage, min(max(r, 1 - clip_low), 1 + clip_high) * advantage
    slope = r * advantage if free <= held else 0.0
    d = reference - policy
    loss = -importance * min(free, held) + kl_beta * (math.exp(d) - d - 1)
    return loss, -importance * slope + kl_beta * (1 - math.exp(d))


@given(st.lists(token, min_size=1, max_size=8), settings)
def test_losses_and_gradients_equal_the_formulas(tokens, options):
    policy, rollout, reference, advantages = torch.tensor(tokens, dtype=torch.float64).T.clone()
    policy.requires_grad_()
    terms = token_losses(policy, rollout, advantages, reference, **options)
    terms.loss.sum().backward()
    expected = [slow_loss(*one, **options) for one in tokens]
    assert terms.loss.tolist() == pytest.approx([loss for loss, _ in expected], rel=1e-9, abs=1e-12)
    assert policy.grad is not None
    # At the very edge of the clip both one-sided slopes are right.
    edges = [
        options["old_logprobs"] == "rollout"
        and min(abs(math.exp(p - q) - 1 + options["clip_low"]), abs(math.exp(p - q) - 1 - options["clip_high"])) < 1e-9
        for p, q, _, _ in tokens
    ]
    for got, (_, slope), edge in zip(policy.grad.tolist(), expected, edges, strict=True):
        assert edge or got == pytest.approx(slope, rel=1e-9, abs=1e-12)


def test_without_a_reference_there_is_no_kl_term():
    policy, rollout, advantages = torch.tensor([-1.0]), torch.tensor([-1.0]), torch.tensor([2.0])
    options = {"old_logprobs": "recomputed", "clip_low": 0.2, "clip_high": 0.2, "importance_cap": 2.0}
    terms = token_losses(policy, rollout, advantages, None, kl_beta=0.5, **options)
    assert terms.loss.tolist() == [-2.0] and terms.kl.tolist() == [0.0]


@given(st.lists(st.tuples(logprob, logprob), min_size=1))
def test_k3_is_never_negative_and_zero_for_equal_policies(pairs):
    policy, reference = torch.tensor(pairs, dtype=torch.float64).T
    assert (k3(policy, reference) >= 0).all()
    assert (k3(policy, policy) == 0).all()


def test_k3_is_an_unbiased_estimate_of_kl():
    generator = torch.Generator().manual_seed(0)
    p, q = torch.randn(2, 6, generator=generator, dtype=torch.float64).log_softmax(-1)
    exact = (p.exp() * (p - q)).sum()
    assert (p.exp() * k3(p, q)).sum().item() == pytest.approx(exact.item(), rel=1e-12)


def test_the_clip_holds_on_the_far_side_only():
    old = torch.zeros(4)
    policy = torch.tensor([1.5, 0.5, 1.5, 0.5]).log()
    advantages = torch.tensor([1.0, 1.0, -1.0, -1.0])
    surrogate, clipped = clipped_surrogate(policy, old, advantages, 0.2, 0.3)
    assert surrogate.tolist() == pytest.approx([1.3, 0.5, -1.5, -0.8])
    assert clipped.tolist() == [True, False, False, True]


def test_importance_weight_is_truncated_and_carries_no_gradient():
    old = torch.tensor([0.0, math.log(5.0)], requires_grad=True)
    weight, truncated = importance_weight(old, torch.zeros(2), cap=2.0)
    assert weight.tolist() == pytest.approx([1.0, 2.0]) and truncated.tolist() == [False, True]
    assert not weight.requires_grad


def test_far_apart_logprobs_stay_finite():
    far = torch.tensor([-1e4, 0.0], requires_grad=True)
    terms = token_losses(
        far,
        torch.tensor([0.0, -1e4]),
        torch.tensor([-1.0, -1.0]),
        torch.tensor([0.0, -1e4]),
        old_logprobs="rollout",
        clip_low=0.2,
        clip_high=0.2,
        importance_cap=None,
        kl_beta=0.1,
    )
    terms.loss.sum().backward()
    assert torch.isfinite(terms.loss).all() and far.grad is not None and torch.isfinite(far.grad).all()
    assert ratio(torch.tensor(0.0), torch.tensor(-1e4)).item() == pytest.approx(math.exp(20))


@given(st.lists(st.integers(1, 50), min_size=1, max_size=20))
def test_weights_make_the_named_means(lengths):
    values = [np.arange(1, length + 1) * 1.5 + place for place, length in enumerate(lengths)]
    sizes = np.asarray(lengths)

    def weighted(aggregation):
        weights = token_weights(sizes, aggregation)
        return sum(weight * each.sum() for weight, each in zip(weights, values, strict=True))

    assert weighted("per_sequence") == pytest.approx(np.mean([each.mean() for each in values]))
    assert weighted("token_mean") == pytest.approx(np.concatenate(values).mean())


@pytest.mark.parametrize("aggregation", ["per_sequence", "token_mean"])
def test_no_completions_have_no_weights(aggregation):
    assert len(token_weights(np.zeros(0, int), aggregation)) == 0
