"""One pass over the vocabulary against the float64 oracle: fused pass and torch operators alike."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scoring_oracle import distribution_oracle

from reward_server.scorer import fused
from reward_server.scorer.head import Head
from reward_server.scorer.metrics import METRICS, PLAIN, Wanted
from reward_server.scorer.statistics import Reference, Statistics, Tile, tiled_statistics

PATHS = {"fused": True, "torch": False}
EVERYTHING = Wanted(entropy=True, varentropy=True, top_k=20)
NAMES = [name for name, metric in METRICS.items() if not metric.needs_reference]


def make(rows=37, vocab=1003, width=64, dtype=torch.float32, seed=0, spread=1.0):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, width, generator=generator).to(dtype)
    weight = (torch.randn(vocab, width, generator=generator) * spread).to(dtype)
    return hidden, weight, torch.randint(0, vocab, (rows,), generator=generator)


def statistics_of(hidden, head, chosen, *rest, wanted=EVERYTHING, **options) -> Statistics:
    return tiled_statistics(hidden, head, chosen, *rest, wanted=wanted, **options)


def check(statistics: Statistics, logits: torch.Tensor, chosen: torch.Tensor, rtol=1e-5):
    """Within 1e-5 of the oracle, or within the rounding of the float32 logits where the true value is about 0."""
    expected = distribution_oracle(logits, chosen)
    rounding = 5e-7 * logits.abs().max().item()
    close = {"rtol": rtol, "atol": rounding}
    raw = METRICS["self_certainty"].per_token(statistics, "verl", 20)
    torch.testing.assert_close(raw, expected["raw_certainty"], **close)
    for name in NAMES:
        if name in expected:
            atol = 2 * rounding if "margin" in name else rounding  # two logits, each rounded
            if name == "varentropy":  # a difference of squares
                log_p = torch.log_softmax(logits, -1)
                mean_square = (log_p.exp() * (log_p - log_p.amax(-1, keepdim=True)).square()).sum(-1).max().item()
                atol = 2 * rounding * (1 + expected[name].max().sqrt().item()) + 2e-6 * mean_square
            got = METRICS[name].per_token(statistics, "paper", 20)
            torch.testing.assert_close(
                got, expected[name], rtol=rtol, atol=atol, msg=lambda why, name=name: f"{name}: {why}"
            )
    kept = min(20, logits.shape[1])
    assert statistics.top_logprobs.shape == (len(logits), kept)
    torch.testing.assert_close(
        statistics.top_logprobs, expected["top_logprobs"][:, :kept], rtol=rtol, atol=2 * rounding
    )


@pytest.fixture(params=PATHS, ids=PATHS)
def use_fused(request) -> bool:
    if PATHS[request.param] and not fused.available(torch.zeros(1, 32), torch.zeros(1, 32)):
        pytest.skip("no AVX-512, AVX2 or compiler here")
    return PATHS[request.param]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("spread", [1.0, 0.02], ids=["peaked", "near uniform"])
def test_equals_the_oracle(use_fused, dtype, spread):
    hidden, weight, chosen = make(dtype=dtype, spread=spread)
    statistics = statistics_of(hidden, Head.of(weight), chosen, use_fused=use_fused)
    check(statistics, hidden.double() @ weight.double().T, chosen)


@pytest.mark.parametrize("vocab", [1, 2, 15, 17, 511, 512, 513, 1537])
@pytest.mark.parametrize("rows", [1, 63, 65])
def test_any_number_of_rows_and_entries(use_fused, rows, vocab):
    hidden, weight, chosen = make(rows, vocab, dtype=torch.bfloat16)
    statistics = statistics_of(hidden, Head.of(weight), chosen, use_fused=use_fused)
    check(statistics, hidden.double() @ weight.double().T, chosen)


@given(
    rows=st.integers(1, 40),
    vocab=st.integers(2, 300),
    tile=st.builds(Tile, st.integers(1, 50), st.integers(1, 400)),
    seed=st.integers(0, 1000),
    temperature=st.floats(0.2, 5.0),
)
@settings(max_examples=40, deadline=None)
def test_tile_sizes_and_temperatures(rows, vocab, tile, seed, temperature):
    hidden, weight, chosen = make(rows, vocab, seed=seed)
    statistics = statistics_of(hidden, Head.of(weight), chosen, temperature, tile=tile, use_fused=False)
    check(statistics, hidden.double() @ weight.double().T / temperature, chosen)


def test_a_temperature_for_each_row(use_fused):
    hidden, weight, chosen = make()
    temperatures = torch.linspace(0.3, 3.0, len(hidden), dtype=torch.float64)
    statistics = statistics_of(hidden, Head.of(weight), chosen, temperatures, use_fused=use_fused)
    check(statistics, hidden.double() @ weight.double().T / temperatures[:, None], chosen)


def test_uniform_logits_give_zero(use_fused):
    hidden, weight, chosen = make()
    same = weight[:1].expand(700, -1).contiguous()
    statistics = statistics_of(hidden, Head.of(same), chosen % 700, use_fused=use_fused)
    certainty = METRICS["self_certainty"].per_token(statistics, "paper", 20)
    largest = (hidden @ same.T).abs().max().item()
    assert 0 <= certainty.min() and certainty.max() < 3e-7 * largest  # what float32 logits of this size leave open
    torch.testing.assert_close(statistics.entropy, torch.full_like(certainty, math.log(700)), rtol=1e-6, atol=0)
    zeros = statistics_of(hidden, Head.of(torch.zeros_like(same)), chosen % 700, use_fused=use_fused)
    assert METRICS["self_certainty"].per_token(zeros, "paper", 20).max() < 1e-7


def test_a_constant_added_to_the_logits_changes_nothing(use_fused):
    hidden, weight, chosen = make()
    hidden[:, 0] = 1.0
    moved = weight.clone()
    moved[:, 0] += 50.0  # every logit of every row rises by 50
    plain = statistics_of(hidden, Head.of(weight), chosen, use_fused=use_fused)
    raised = statistics_of(hidden, Head.of(moved), chosen, use_fused=use_fused)
    assert torch.allclose(raised.lse, plain.lse + 50, rtol=1e-6)
    for name in NAMES:
        metric = METRICS[name]
        torch.testing.assert_close(
            metric.per_token(raised, "paper", 20), metric.per_token(plain, "paper", 20), rtol=2e-5, atol=5e-5, msg=name
        )


def test_permuting_the_vocabulary_changes_nothing(use_fused):
    hidden, weight, chosen = make()
    order = torch.randperm(len(weight), generator=torch.Generator().manual_seed(1))
    place = torch.argsort(order)
    plain = statistics_of(hidden, Head.of(weight), chosen, use_fused=use_fused)
    mixed = statistics_of(hidden, Head.of(weight[order].contiguous()), place[chosen], use_fused=use_fused)
    for name in NAMES:
        metric = METRICS[name]
        torch.testing.assert_close(
            metric.per_token(mixed, "paper", 20), metric.per_token(plain, "paper", 20), rtol=5e-6, atol=1e-5, msg=name
        )


def test_bias_scale_and_softcap():
    hidden, weight, chosen = make()
    bias = torch.randn(len(weight), generator=torch.Generator().manual_seed(2))
    logits = (hidden.double() @ weight.double().T + bias.double()) * 0.25
    head = Head.of(weight, bias, scale=0.25)
    check(statistics_of(hidden, head, chosen, 0.7), logits / 0.7, chosen)
    capped = Head.of(weight, bias, scale=0.25, softcap=3.0)
    check(statistics_of(hidden, capped, chosen, 0.7), 3.0 * torch.tanh(logits / 3.0) / 0.7, chosen)


def test_scale_in_the_fused_pass(use_fused):
    hidden, weight, chosen = make()
    statistics = statistics_of(hidden, Head.of(weight, scale=0.125), chosen, use_fused=use_fused)
    check(statistics, hidden.double() @ weight.double().T * 0.125, chosen)


def test_very_large_logits(use_fused):
    hidden, weight, chosen = make(spread=40.0)
    statistics = statistics_of(hidden, Head.of(weight), chosen, use_fused=use_fused)
    check(statistics, hidden.double() @ weight.double().T, chosen)


@pytest.mark.parametrize("rise", [0.01, 1.0, 300.0])
@pytest.mark.parametrize("falling", [False, True], ids=["rising", "falling"])
def test_logits_in_order(use_fused, rise, falling):
    """The largest logit so far is outgrown by every tile, by little or by far; or never again after the first."""
    hidden, _, chosen = make(rows=9, vocab=4000)
    weight = torch.linspace(-1, 1, 4000)[:, None] * torch.full((1, 64), rise)
    weight = weight.flip(0).contiguous() if falling else weight.contiguous()
    hidden = hidden.abs()
    statistics = statistics_of(hidden, Head.of(weight), chosen, use_fused=use_fused)
    check(statistics, hidden.double() @ weight.double().T, chosen)


def test_logits_that_are_not_finite_stay_visible(use_fused):
    hidden, weight, chosen = make()
    hidden[3, 5] = math.nan
    hidden[4, 5] = math.inf
    statistics = statistics_of(hidden, Head.of(weight), chosen, use_fused=use_fused)
    certainty = METRICS["self_certainty"].per_token(statistics, "paper", 20)
    assert not torch.isfinite(certainty[3]) and not torch.isfinite(certainty[4])
    assert torch.isfinite(certainty[:3]).all() and torch.isfinite(certainty[5:]).all()


def test_equal_inputs_give_equal_bits(use_fused):
    hidden, weight, chosen = make(dtype=torch.bfloat16)
    head = Head.of(weight)
    first, second = (statistics_of(hidden, head, chosen, use_fused=use_fused) for _ in range(2))
    assert torch.equal(first.lse, second.lse) and torch.equal(first.entropy, second.entropy)


def test_two_threads_agree_with_one(use_fused):
    hidden, weight, chosen = make(vocab=5000)
    head = Head.of(weight)
    before = torch.get_num_threads()
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        results.append(statistics_of(hidden, head, chosen, use_fused=use_fused))
    torch.set_num_threads(before)
    torch.testing.assert_close(results[0].lse, results[1].lse, rtol=1e-7, atol=0)


def test_what_is_not_asked_for_is_left_out(use_fused):
    hidden, weight, chosen = make()
    plain = tiled_statistics(hidden, Head.of(weight), use_fused=use_fused)
    assert [name for name, value in vars(plain).items() if value is None] == [
        "entropy",
        "varentropy",
        "chosen_logprob",
        "top_logprobs",
        "kl_to_reference",
    ]
    for field in ("entropy", "varentropy", "top_k"):
        wanted = replace(PLAIN, **{field: 3})
        one = tiled_statistics(hidden, Head.of(weight), wanted=wanted, use_fused=use_fused)
        found = {name for name, value in vars(one).items() if isinstance(value, torch.Tensor)}
        assert found == {"lse", "mean_logit", "top_logprobs" if field == "top_k" else field}


# ---- the largest log-probabilities -----------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 2, 7, 200])
def test_top_k_beyond_the_vocabulary_and_below(use_fused, k):
    """200 of 130 entries are 130."""
    hidden, weight, chosen = make(vocab=130)
    wanted = Wanted(top_k=k)
    found = tiled_statistics(hidden, Head.of(weight), chosen, 0.7, wanted=wanted, use_fused=use_fused).top_logprobs
    logits = hidden.double() @ weight.double().T / 0.7
    expected = torch.log_softmax(logits, -1).sort(-1, descending=True).values[:, :k]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=6e-7 * logits.abs().max().item())


def test_ties_among_the_largest_are_all_kept(use_fused):
    """Every logit occurs three times, far apart; and the largest of all in the last tile."""
    hidden, weight, _ = make(vocab=700)
    tripled = torch.cat([weight, weight, weight])
    wanted = Wanted(top_k=12)
    found = tiled_statistics(hidden, Head.of(tripled), wanted=wanted, use_fused=use_fused).top_logprobs
    once = torch.log_softmax(hidden.double() @ tripled.double().T, -1)[:, :700].sort(-1, descending=True).values
    torch.testing.assert_close(found, once[:, :4].repeat_interleave(3, 1), rtol=1e-5, atol=2e-5)
    alike = tiled_statistics(hidden, Head.of(torch.zeros(900, 64)), wanted=wanted, use_fused=use_fused)
    torch.testing.assert_close(alike.top_logprobs, torch.full((37, 12), -math.log(900), dtype=torch.float64))


@given(seed=st.integers(0, 1000), k=st.integers(1, 30), temperature=st.floats(0.2, 5.0), vocab=st.integers(2, 80))
@settings(max_examples=40, deadline=None)
def test_order_and_bounds(seed, k, temperature, vocab):
    """What holds for any distribution, whatever the numbers are."""
    hidden, weight, chosen = make(9, vocab, seed=seed)
    wanted = replace(EVERYTHING, top_k=max(2, k))
    statistics = tiled_statistics(hidden, Head.of(weight), chosen, temperature, wanted, tile=Tile(4, 16))
    values = {name: METRICS[name].per_token(statistics, "paper", k) for name in NAMES}
    top = statistics.top_logprobs
    assert (top[:, :-1] >= top[:, 1:]).all() and (top.exp().sum(1) <= 1 + 1e-6).all()
    assert (values["mean_logprob"] <= top[:, 0] + 1e-4).all()
    assert (values["topk_confidence"] >= math.log(min(k, vocab)) - 1e-5).all()
    assert (values["token_entropy"] <= math.log(vocab) + 1e-5).all() and (values["token_entropy"] >= 0).all()
    assert (values["varentropy"] >= 0).all() and (values["margin"] >= 0).all()
    assert (values["probability_margin"] >= 0).all() and (values["probability_margin"] <= 1).all()
    assert (-top[:, 0] <= values["token_entropy"] + 1e-5).all(), "min-entropy is the least of the entropies"


# ---- divergence from a reference -------------------------------------------------------------------------------


def compared(hidden, head, reference, temperature=1.0, **options) -> torch.Tensor:
    wanted = Wanted(kl_to_reference=True)
    return tiled_statistics(hidden, head, None, temperature, wanted, reference, **options).kl_to_reference


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_kl_is_the_oracles_over_two_heads(dtype, temperature):
    """The reference may be wider, and its head may do other things to its logits."""
    hidden, weight, chosen = make(dtype=dtype, spread=0.2)
    other_hidden, other_weight, _ = make(width=96, dtype=dtype, seed=5, spread=0.2)
    bias = torch.randn(1003, generator=torch.Generator().manual_seed(1))
    other = Head.of(other_weight, bias, scale=0.5, softcap=4.0)
    found = compared(hidden, Head.of(weight), Reference(other_hidden, other), temperature)
    logits = hidden.double() @ weight.double().T / temperature
    capped = 4.0 * torch.tanh((other_hidden.double() @ other_weight.double().T + bias.double()) * 0.5 / 4.0)
    expected = distribution_oracle(logits, chosen, capped / temperature)["kl_to_reference"]
    assert expected.min() > 0.1
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_kl_of_far_apart_distributions():
    hidden, weight, chosen = make(spread=30.0)
    _, other, _ = make(seed=9, spread=30.0)
    found = compared(hidden, Head.of(weight), Reference(hidden, Head.of(other)))
    logits, theirs = hidden.double() @ weight.double().T, hidden.double() @ other.double().T
    expected = distribution_oracle(logits, chosen, theirs)["kl_to_reference"]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6 * logits.abs().max().item())


@given(seed=st.integers(0, 500), tile=st.builds(Tile, st.integers(1, 50), st.integers(1, 400)), near=st.booleans())
@settings(max_examples=10, deadline=None)
def test_kl_is_0_to_itself_and_never_below(seed, tile, near):
    hidden, weight, chosen = make(vocab=300, seed=seed, spread=0.3)
    head = Head.of(weight)
    assert compared(hidden, head, Reference(hidden, head), tile=tile).max() == 0
    moved = hidden * (1.001 if near else 1.5)
    found = compared(hidden, head, Reference(moved, head), tile=tile)
    assert (found >= 0).all()
    expected = distribution_oracle(hidden.double() @ weight.double().T, chosen, moved.double() @ weight.double().T)[
        "kl_to_reference"
    ]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=2e-6)


def test_kl_comes_beside_everything_else_in_one_pass():
    hidden, weight, chosen = make(spread=0.2)
    other = Head.of(make(seed=5, spread=0.2)[1])
    everything = replace(EVERYTHING, kl_to_reference=True)
    statistics = tiled_statistics(hidden, Head.of(weight), chosen, 1.0, everything, Reference(hidden, other))
    check(statistics, hidden.double() @ weight.double().T, chosen)
    assert statistics.kl_to_reference.shape == (37,)


def test_a_reference_that_does_not_fit_is_named():
    hidden, weight, _ = make()
    head = Head.of(weight)
    with pytest.raises(ValueError, match="reference: kl_to_reference needs one"):
        compared(hidden, head, None)
    with pytest.raises(ValueError, match="reference: its vocabulary has 1000 entries, not 1003"):
        compared(hidden, head, Reference(hidden, Head.of(weight[:1000])))
    with pytest.raises(ValueError, match="reference: 37 rows of torch.float32 needed"):
        compared(hidden, head, Reference(hidden.bfloat16(), head))


def test_the_mean_row_is_that_of_float64():
    _, weight, _ = make(vocab=4001, dtype=torch.bfloat16)
    torch.testing.assert_close(Head.of(weight).mean_weight, weight.double().mean(0), rtol=1e-12, atol=1e-15)


def test_bad_input_is_named():
    hidden, weight, chosen = make()
    with pytest.raises(ValueError, match=r"temperature: must be positive \(got 0"):
        statistics_of(hidden, Head.of(weight), chosen, 0.0)
    with pytest.raises(ValueError, match=r"hidden: \[T, 64\] needed"):
        statistics_of(hidden[:, :10], Head.of(weight), chosen)
    with pytest.raises(ValueError, match="use_fused"):
        statistics_of(hidden, Head.of(weight, torch.zeros(len(weight))), chosen, use_fused=True)


def test_without_a_compiler_the_torch_operators_score(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    hidden, weight, chosen = make()
    fused._library.cache_clear()
    try:
        check(statistics_of(hidden, Head.of(weight), chosen), hidden.double() @ weight.double().T, chosen)
    finally:
        monkeypatch.undo()
        fused._library.cache_clear()


def test_the_compiled_pass_is_cached(monkeypatch, tmp_path):
    if not fused.available(torch.zeros(1, 32), torch.zeros(1, 32)):
        pytest.skip("no AVX-512, AVX2 or compiler here")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    fused._library.cache_clear()
    try:
        assert fused._library() is not None
        (built,) = (tmp_path / "rlif").iterdir()
        stamp = built.stat().st_mtime_ns
        fused._library.cache_clear()
        assert fused._library() is not None
        assert [file.stat().st_mtime_ns for file in (tmp_path / "rlif").iterdir()] == [stamp]
    finally:
        monkeypatch.undo()
        fused._library.cache_clear()
