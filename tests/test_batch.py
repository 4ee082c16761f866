"""Groups to sequences to micro-batches: nothing lost, nothing twice, nothing that must not be trained."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scored_groups import make_groups, trained_pairs

from services.contract import Sampling
from trainer.batch import Sequences, deal, micro_batch, sequences
from trainer.loss import token_weights

lengths_lists = st.lists(st.integers(2, 60), max_size=40)


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


@given(lengths_lists, st.integers(1, 5), st.integers(1, 200))
def test_every_sequence_is_dealt_once_within_the_budget(lengths, ranks, budget):
    sizes = np.asarray(lengths, int)
    plan = deal(sizes, ranks, budget)
    assert len(plan) == ranks
    assert len({len(share) for share in plan}) == 1 and len(plan[0]) >= 1
    dealt = [index for share in plan for micro in share for index in micro.tolist()]
    assert sorted(dealt) == list(range(len(lengths)))
    for share in plan:
        for micro in share:
            assert len(micro) <= 1 or len(micro) * sizes[micro].max() <= budget


@given(st.lists(st.integers(2, 60), min_size=1, max_size=40), st.integers(1, 5))
def test_ranks_get_about_the_same_tokens(lengths, ranks):
    sizes = np.asarray(lengths)
    loads = [sum(int(sizes[micro].sum()) for micro in share) for share in deal(sizes, ranks, 100)]
    assert max(loads) - min(loads) <= max(lengths)


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
    for share in deal(batch.lengths, ranks, 64):
        for indices in share:
            micro = micro_batch(batch, indices, aggregation)
            width = micro.input_ids.shape[1]
            for at in range(len(micro.positions)):
                if micro.weights[at] == 0:
                    continue
                row, column = divmod(int(micro.positions[at]), width)
                context = tuple(micro.input_ids[row, : column + 1].tolist())
                numbers = (micro.rollout[at], micro.advantages[at], micro.temperatures[at], micro.weights[at])
                found.append((context, int(micro.targets[at]), *(float(x) for x in numbers)))
                assert micro.input_ids[row, column + 1] == micro.targets[at]
    assert len(found) == len(expected)
    for left, right in zip(sorted(found), sorted(expected), strict=True):
        assert left[:2] == right[:2]
        assert left[2:] == pytest.approx(right[2:], rel=1e-6)


def test_an_empty_micro_batch_is_a_row_of_weight_zero():
    micro = micro_batch(sequences([], 288), np.zeros(0, int), "per_sequence")
    assert micro.input_ids.shape == (1, 2) and micro.weights.tolist() == [0.0]
    assert micro.input_ids.dtype == micro.positions.dtype == micro.targets.dtype == torch.long
