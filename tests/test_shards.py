"""A vocabulary in shards gives what the whole one gives: the merge of tensor-parallel ranks, without the processes."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scoring_oracle import distribution_oracle

from reward_server.scorer.head import Head
from reward_server.scorer.metrics import Wanted
from reward_server.scorer.shards import Shards
from reward_server.scorer.statistics import tiled_statistics

ALL = Wanted(entropy=True, varentropy=True, top_k=20)
NAMES = {"entropy": "token_entropy", "varentropy": "varentropy", "chosen_logprob": "mean_logprob"}


def random(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def by_shards(hidden, weight, cuts, chosen, temperature, wanted=ALL, softcap=None, **how):
    """What every rank ends up with, of ranks that hold the rows between the cuts."""
    vocab_size = len(weight)
    edges = [0, *sorted(cuts), vocab_size]
    heads = [
        (first, Head.of(weight[first:last], softcap=softcap)) for first, last in zip(edges, edges[1:], strict=False)
    ]
    tables: list[torch.Tensor] = []

    def send(table: torch.Tensor) -> torch.Tensor:
        tables.append(table)
        return table[None]

    def run(gather):
        return [
            tiled_statistics(hidden, head, chosen, temperature, wanted, shards=Shards(first, vocab_size, gather), **how)
            for first, head in heads
        ]

    run(send)
    sent = torch.stack(tables)
    return run(lambda _: sent)


@settings(deadline=None, max_examples=60)
@given(
    vocab_size=st.integers(5, 90),
    cuts=st.sets(st.integers(1, 89), max_size=4),
    rows=st.integers(0, 7),
    scale=st.sampled_from([0.0, 0.1, 3.0, 40.0]),
    softcap=st.sampled_from([None, 5.0]),
    use_fused=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_shards_give_the_distribution_of_the_whole(vocab_size, cuts, rows, scale, softcap, use_fused, seed):
    cuts = {cut for cut in cuts if cut < vocab_size}
    hidden, weight = random(seed, rows, 32), random(seed + 1, vocab_size, 32) * scale / 5
    chosen = torch.randint(0, vocab_size, (rows,), generator=torch.Generator().manual_seed(seed))
    temperature = random(seed + 2, rows).abs().double() + 0.3
    found = by_shards(
        hidden, weight, cuts, chosen, temperature, softcap=softcap, use_fused=None if use_fused else False
    )
    logits = hidden.double() @ weight.double().T
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    logits = logits / temperature[:, None]
    expected = distribution_oracle(logits, chosen)
    for one in found:
        assert one.vocab_size == vocab_size
        close = {"rtol": 2e-5, "atol": 2e-4 if scale > 10 else 2e-5}
        torch.testing.assert_close(one.lse, logits.logsumexp(1), **close)
        torch.testing.assert_close(one.mean_logit, logits.mean(1), **close)
        torch.testing.assert_close(one.top_logprobs, expected["top_logprobs"][:, :20], **close)
        for field, name in NAMES.items():
            slack = 50 if field == "varentropy" else 1
            torch.testing.assert_close(getattr(one, field), expected[name], rtol=2e-4, atol=close["atol"] * slack)


def test_ranks_agree_to_the_last_bit():
    found = by_shards(random(1, 6, 32), random(2, 100, 32), {40, 80}, torch.arange(6), 0.7)
    for one in found[1:]:
        for field in dataclasses.fields(one):
            ours, theirs = getattr(found[0], field.name), getattr(one, field.name)
            assert torch.equal(ours, theirs) if isinstance(ours, torch.Tensor) else ours == theirs


def test_a_shard_of_fewer_rows_than_asked_candidates():
    hidden, weight = random(3, 4, 32), random(4, 30, 32)
    for one in by_shards(hidden, weight, {1, 2}, None, 1.0, Wanted(top_k=8)):
        expected = (hidden.double() @ weight.double().T).log_softmax(1).topk(8).values
        torch.testing.assert_close(one.top_logprobs, expected, rtol=1e-5, atol=1e-5)
        assert one.chosen_logprob is None and one.entropy is None


@pytest.mark.parametrize("use_fused", [None, False])
def test_a_row_that_is_not_finite_stays_so(use_fused):
    hidden = random(5, 3, 32)
    hidden[1, 0] = float("nan")
    for one in by_shards(hidden, random(6, 64, 32), {32}, torch.arange(3), 1.0, use_fused=use_fused):
        assert one.lse.isnan().tolist() == [False, True, False]
