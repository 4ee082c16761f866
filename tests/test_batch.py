"""Groups to sequences to micro-batches: nothing lost, nothing twice, nothing that must not be trained."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scored_groups import make_groups, trained_pairs

from services.contract import Sampling
from trainer.batch import Sequences, budget, deal, micro_batch, sequences
from trainer.loss import token_weights


@given(st.integers(0, 10_000), st.integers(0, 4))
def test_sequences_hold_exactly_the_trained_completions(seed, count):
    groups = make_groups(count, seed=seed)
    batch = sequences(groups, vocab_size=288)
    pairs = list(trained_pairs(groups))
    assert len(batch) == len(pairs)
    assert batch.tokens.tolist() == [t for g, c, _ in pairs for t in g.prompt_token_ids + c.token_ids]
    assert batch.prompts.tolist() == [len(g.prompt_token_ids) for g, _, _ in pairs]
    assert batch.completions.tolist() == [len(c.token_ids) for _, c, _ in pairs]
    assert batch.logprobs.tolist() == pytest.approx([x for _, c, _ in pairs for x in c.logprobs], rel=1e-6)
    assert batch.advantages.tolist() == pytest.approx([s.advantage for _, _, s in pairs], rel=1e-6)


def test_a_group_without_a_valid_reward_trains_nothing():
    (group,) = make_groups(1, size=8)
    scores = [score.model_copy(update={"valid": False}) for score in group.scores]
    assert len(sequences([group.model_copy(update={"scores": scores})], 288)) == 0


@given(st.integers(0, 10_000), st.integers(0, 3))
def test_bytes_bring_the_same_sequences(seed, count):
    batch = sequences(make_groups(count, seed=seed), 288)
    again = Sequences.unpack(batch.pack())
    for name in Sequences.__dataclass_fields__:
        left, right = getattr(batch, name), getattr(again, name)
        assert left.dtype == right.dtype and np.array_equal(left, right)


def test_tokens_outside_the_vocabulary_are_refused_by_group():
    group = make_groups(1, size=8)[0]
    with pytest.raises(ValueError, match=f"group {group.group_id}.*vocabulary"):
        sequences([group], vocab_size=10)


def test_greedy_samples_are_refused():
    group = make_groups(1, size=8)[0].model_copy(update={"sampling": Sampling(temperature=0)})
    with pytest.raises(ValueError, match="temperature"):
        sequences([group], 288)


def owner(batch: Sequences, indices) -> np.ndarray:
    """For each completion token of a micro-batch: which of `indices` it is of."""
    return np.repeat(np.arange(len(indices)), batch.completions[indices])


def prompt_size(batch: Sequences, indices) -> int:
    """Tokens of the packed row of these sequences, by counting distinct prompts."""
    starts = np.cumsum(batch.lengths) - batch.lengths
    prompts = {tuple(batch.tokens[starts[i] : starts[i] + batch.prompts[i]].tolist()) for i in indices}
    return sum(map(len, prompts)) + int((batch.completions[indices] - 1).sum())


@given(st.integers(0, 10_000), st.integers(0, 8), st.integers(1, 5), st.integers(1, 200))
def test_every_sequence_is_dealt_once_within_the_budget(seed, count, ranks, tokens):
    batch = sequences(make_groups(count, seed=seed), 288)
    plan = deal(batch, ranks, tokens)
    assert len(plan) == ranks
    assert len({len(share) for share in plan}) == 1 and len(plan[0]) >= 1
    dealt = [index for share in plan for micro in share for index in micro.tolist()]
    assert sorted(dealt) == list(range(len(batch)))
    for share in plan:
        for micro in share:
            assert len(micro) <= 1 or prompt_size(batch, micro) <= tokens


def test_a_prompt_is_computed_once_where_its_group_fits():
    batch = sequences(make_groups(6, seed=3, size=16), 288)
    (share,) = deal(batch, 1, 400)
    rows = [micro_batch(batch, indices, "per_sequence").packed for indices in share]
    assert sum(len(row.families) for row in rows) == 6
    assert sum(map(len, rows)) == prompt_size(batch, np.arange(len(batch)))


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_ranks_get_about_equally_many_tokens(ranks):
    batch = sequences(make_groups(32, seed=1, size=16, longest=200), 288)
    loads = [sum(prompt_size(batch, micro) for micro in share) for share in deal(batch, ranks, 2000)]
    assert max(loads) < 1.1 * sum(loads) / ranks


def test_a_cpu_has_smaller_micro_batches():
    assert budget(16384, torch.device("cpu")) == 4096 and budget(100, torch.device("cpu")) == 100
    assert budget(16384, torch.device("cuda")) == 16384


@given(st.integers(0, 10_000), st.integers(1, 5), st.integers(1, 3), st.sampled_from(["per_sequence", "token_mean"]))
def test_micro_batches_carry_every_token_with_its_numbers(seed, count, ranks, aggregation):
    groups = make_groups(count, seed=seed, temperature=0.7)
    batch = sequences(groups, 288)
    expected = []
    pairs = list(trained_pairs(groups))
    weights = token_weights(batch.completions, aggregation)
    for (group, completion, score), weight in zip(pairs, weights, strict=True):
        context = list(group.prompt_token_ids)
        for number, logprob in zip(completion.token_ids, completion.logprobs, strict=True):
            expected.append((tuple(context), number, logprob, score.advantage, 0.7, weight))
            context.append(number)
    found = []
    for share in deal(batch, ranks, 64):
        for indices in share:
            micro = micro_batch(batch, indices, aggregation)
            if len(indices) == 0:
                assert micro.weights.tolist() == [0.0]
                continue
            rows, places = micro.packed.rows()
            for at, place in enumerate(places[micro.positions].tolist()):
                row, column = divmod(place, rows.shape[1])
                if column + 1 == batch.prompts[indices[int(owner(batch, indices)[at])]]:
                    row = int(owner(batch, indices)[at])  # the prompt's last token is shared
                context = tuple(rows[row, : column + 1].tolist())
                numbers = (micro.rollout[at], micro.advantages[at], micro.temperatures[at], micro.weights[at])
                found.append((context, int(micro.targets[at]), *(float(x) for x in numbers)))
    assert len(found) == len(expected)
    for left, right in zip(sorted(found), sorted(expected), strict=True):
        assert left[:2] == right[:2]
        assert left[2:] == pytest.approx(right[2:], rel=1e-6)


def test_an_empty_micro_batch_is_a_row_of_weight_zero():
    micro = micro_batch(sequences([], 288), np.zeros(0, int), "per_sequence")
    assert len(micro.packed) == 2 and micro.weights.tolist() == [0.0]
    assert micro.packed.input_ids.dtype == micro.positions.dtype == micro.targets.dtype == torch.long
