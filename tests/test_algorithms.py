"""Losses and gradients against float64 loops; what must not depend on how a batch is cut; what stays finite."""

import math
from dataclasses import replace

import numpy as np
import objective_oracle as oracle
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from objective_oracle import Sequence
from scored_groups import make_groups

from services import recipe
from services.algorithms import ALGORITHMS, ClipCov, Objective, cut_sampling
from services.contract import Sampling
from services.recipe import Trainer
from trainer.algorithms.advantages import clip_cov, whiten
from trainer.algorithms.divergences import k1, k2, k3
from trainer.batch import Sequences, sequences
from trainer.loss import token_losses, token_weights
from trainer.minibatches import order, parts, split
from trainer.ranks import Ranks

BETA = 0.1
CPU = torch.device("cpu")


def make_batch(seed: int, count: int = 5, spread: float = 0.3) -> list[Sequence]:
    """Random logprobs of completions of 1 to 7 tokens; the first has one token."""
    generator = torch.Generator().manual_seed(seed)

    def normal(size: int) -> torch.Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64)

    batch = []
    for number in range(count):
        length = 1 if number == 0 else int(torch.randint(1, 8, (1,), generator=generator))
        old = -1.5 + 0.5 * normal(length)
        batch.append(
            Sequence(
                logprobs=(old + spread * normal(length)).requires_grad_(),
                old=old,
                rollout=old + 0.5 * normal(length),
                reference=old + spread * normal(length),
                entropies=(1 + normal(length).abs()).requires_grad_(),
                advantage=float(normal(1)),
            )
        )
    return batch


def flat_loss(batch: list[Sequence], objective: Objective) -> torch.Tensor:
    """What the trainer computes for the batch as one micro-batch, in float64."""
    lengths = np.asarray([len(sequence.logprobs) for sequence in batch])
    advantages = np.asarray([sequence.advantage for sequence in batch])
    if objective.whiten:
        advantages = whiten(advantages, lengths).astype(float)
    weights = token_weights(lengths, objective.aggregation, objective.aggregation_length)
    counts = torch.from_numpy(lengths)

    def joined(name: str) -> torch.Tensor | None:
        values = [getattr(sequence, name) for sequence in batch]
        return None if values[0] is None else torch.cat(values)

    logprobs, rollout = joined("logprobs"), joined("rollout")
    assert logprobs is not None and rollout is not None
    terms = token_losses(
        logprobs,
        rollout,
        torch.from_numpy(advantages).repeat_interleave(counts),
        torch.arange(len(batch)).repeat_interleave(counts),
        objective,
        old=joined("old"),
        reference=joined("reference"),
        entropies=joined("entropies"),
    )
    return (torch.from_numpy(weights).repeat_interleave(counts) * terms.loss).sum()


def gradients(value: torch.Tensor, batch: list[Sequence]) -> list[float]:
    leaves = [leaf for sequence in batch for leaf in (sequence.logprobs, sequence.entropies) if leaf is not None]
    found = torch.autograd.grad(value, leaves, allow_unused=True)
    return [
        float(x)
        for grad, leaf in zip(found, leaves, strict=True)
        for x in (torch.zeros_like(leaf) if grad is None else grad)
    ]


def objective_of(algorithm: str, **keys) -> Objective:
    tree = {"steps": 1, "groups_per_step": 1, "algorithm": algorithm, "importance": None, **keys}
    made = {"run": {"name": "r", "dir": "r"}, "model": {"path": "m"}, "data": {"path": "d", "fields": {"prompt": "p"}}}
    return recipe.parse(
        {**made, "rewards": "intuitor", "rollout": {"sampling": {"max_tokens": 9}}, "trainer": tree}
    ).trainer


# ---- each algorithm is its paper's --------------------------------------------------------------------------------

PAPERS = {
    "grpo": lambda batch: oracle.grpo(batch, BETA),
    "dr_grpo": lambda batch: oracle.dr_grpo(batch, 9),
    "dapo": oracle.dapo,
    "gspo": oracle.gspo,
    "rloo": lambda batch: oracle.rloo(batch, BETA),
    "reinforce_pp": lambda batch: oracle.reinforce_pp(batch, BETA),
    "cispo": oracle.cispo,
}
WITH_KL = {"grpo", "rloo", "reinforce_pp"}


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("seed", range(6))
def test_loss_and_gradient_are_the_papers(algorithm, seed):
    objective = objective_of(algorithm, **({"kl_beta": BETA} if algorithm in WITH_KL else {}))
    # Sequence ratios move by far less than those of tokens, and so does their clip.
    batch = make_batch(seed, spread=2e-3 if algorithm == "gspo" else 0.3)
    expected = -PAPERS[algorithm](batch)
    if algorithm not in WITH_KL:
        assert objective.kl_beta == 0
        batch = [replace(sequence, reference=None) for sequence in batch]
    if algorithm == "rloo":
        # The paper's REINFORCE is on-policy: the old policy is the policy.
        batch = [replace(sequence, old=None) for sequence in batch]
    found = flat_loss(batch, objective)
    # Advantages are whitened to float32.
    close = {"rel": 1e-6, "abs": 1e-7} if objective.whiten else {"rel": 1e-9, "abs": 1e-12}
    assert gradients(found, batch) == pytest.approx(gradients(expected, batch), **close)
    if algorithm != "rloo":
        assert found.item() == pytest.approx(expected.item(), **close)


def test_clips_hold_somewhere_in_the_batches_above():
    """Or the comparison would say nothing about them."""
    for algorithm in ("grpo", "dapo", "gspo"):
        objective = objective_of(algorithm)
        batches = [make_batch(seed, spread=2e-3 if algorithm == "gspo" else 0.3) for seed in range(6)]
        free = objective.model_copy(update={"surrogate": "none"})
        assert any(abs((flat_loss(b, objective) - flat_loss(b, free)).item()) > 1e-6 for b in batches), algorithm


# ---- the keys, in any mixture -------------------------------------------------------------------------------------

importances = st.none() | st.one_of(
    st.fixed_dictionaries({"level": st.sampled_from(["token", "sequence"]), "high": st.floats(0.5, 4)}),
    st.fixed_dictionaries(
        {
            "level": st.sampled_from(["token", "sequence"]),
            "mode": st.just("mask"),
            "low": st.none() | st.floats(0.1, 0.4),
            "high": st.floats(0.5, 4),
        }
    ),
)
mixtures = st.fixed_dictionaries(
    {
        "policy_ratio": st.sampled_from(["token", "sequence"]),
        "surrogate": st.sampled_from(["clip", "cispo", "none"]),
        "clip_low": st.floats(0.05, 1.0),
        "clip_high": st.floats(0.05, 2.0),
        "aggregation": st.sampled_from(["per_sequence", "token_mean", "constant"]),
        "kl_beta": st.floats(0, 1),
        "kl_estimator": st.sampled_from(["k1", "k2", "k3"]),
        "old_logprobs": st.sampled_from(["recomputed", "rollout"]),
        "importance": importances,
        "entropy_bonus": st.sampled_from([0.0, 0.01]),
    },
)


@settings(max_examples=60)
@given(st.integers(0, 10**6), mixtures, st.booleans(), st.none() | st.floats(1.1, 3.0))
def test_losses_and_gradients_of_any_mixture_are_the_loops(seed, keys, is_first_update, dual_clip):
    dual_clip = dual_clip if keys["surrogate"] == "clip" else None
    objective = objective_of("grpo", **keys, dual_clip=dual_clip)
    batch = make_batch(seed, spread=0.6)
    if is_first_update:
        batch = [replace(sequence, old=None) for sequence in batch]
    found, expected = flat_loss(batch, objective), oracle.loss(batch, objective)
    assert found.item() == pytest.approx(expected.item(), rel=1e-9, abs=1e-12)
    assert gradients(found, batch) == pytest.approx(gradients(expected, batch), rel=1e-9, abs=1e-12)


@settings(max_examples=30)
@given(st.integers(0, 10**6), mixtures, st.permutations(range(5)))
def test_the_order_of_sequences_changes_nothing(seed, keys, places):
    objective, batch = objective_of("grpo", **keys), make_batch(seed)
    moved = flat_loss([batch[place] for place in places], objective)
    assert gradients(moved, batch) == pytest.approx(gradients(flat_loss(batch, objective), batch), rel=1e-9, abs=1e-12)


def test_terms_say_what_was_held():
    objective = objective_of("grpo", importance={"high": 2.0}, old_logprobs="recomputed")
    old = torch.zeros(4)
    policy = torch.tensor([1.5, 0.5, 1.5, 0.5]).log().requires_grad_()
    rollout = torch.tensor([0.0, -math.log(5.0), 0.0, 0.0])
    advantages = torch.tensor([1.0, 1.0, -1.0, -1.0])
    terms = token_losses(policy, rollout, advantages, torch.zeros(4, dtype=torch.long), objective, old=old)
    assert terms.clipped.tolist() == [True, False, False, True]
    assert terms.truncated.tolist() == [False, True, False, False]
    assert terms.importance.tolist() == pytest.approx([1.0, 2.0, 1.0, 1.0]) and not terms.importance.requires_grad
    assert terms.loss.tolist() == pytest.approx([-1.2, -1.0, 1.5, 0.8]) and terms.kl.tolist() == [0.0] * 4


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_a_mask_drops_tokens_or_whole_sequences(level):
    objective = objective_of("grpo", importance={"level": level, "mode": "mask", "low": 0.5, "high": 2.0})
    rollout = torch.tensor([-1.0, -1.0, -1.0, -3.0])
    policy = torch.tensor([-1.0, -1.0, -1.0, -1.0], requires_grad=True)
    terms = token_losses(policy, rollout, torch.ones(4), torch.tensor([0, 0, 1, 1]), objective)
    terms.loss.sum().backward()
    dropped = [False, False, level == "sequence", True]
    assert terms.truncated.tolist() == dropped
    assert policy.grad is not None and [grad == 0 for grad in policy.grad.tolist()] == dropped


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("how", [{"high": 1.0}, {"mode": "mask", "high": 1.0}, {"mode": "mask", "low": 1.0}])
def test_a_weight_at_the_bound_is_kept_as_it_is(level, how):
    """The rollout's numbers equal to the trainer's: exactly 1 each."""
    objective = objective_of("grpo", importance={"level": level, **how})
    policy = torch.tensor([-0.3, -2.7, -1.1], requires_grad=True)
    terms = token_losses(policy, policy.detach(), torch.ones(3), torch.tensor([0, 0, 1]), objective)
    assert terms.importance.tolist() == [1.0] * 3 and not terms.truncated.any()


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("importance", [None, {"level": "sequence"}, {"level": "token", "mode": "mask"}])
def test_far_apart_logprobs_stay_finite(algorithm, importance):
    objective = objective_of(algorithm, importance=importance, kl_beta=0.1, entropy_bonus=0.01)
    far = torch.tensor([-1e4, 0.0, -1e4, 0.0], requires_grad=True)
    other, segments = torch.tensor([0.0, -1e4, 0.0, -1e4]), torch.tensor([0, 0, 1, 1])
    for old in (None, other):
        for advantage in (-1.0, 1.0):
            terms = token_losses(
                far,
                other,
                torch.full((4,), advantage),
                segments,
                objective,
                old=old,
                reference=other,
                entropies=torch.ones(4, requires_grad=True),
            )
            (grad,) = torch.autograd.grad(terms.loss.sum(), far)
            assert torch.isfinite(terms.loss).all() and torch.isfinite(grad).all()


# ---- KL -----------------------------------------------------------------------------------------------------------


def exact_gradient(divergence, logits: torch.Tensor) -> list[float]:
    (grad,) = torch.autograd.grad(divergence(logits.log_softmax(-1)), logits)
    return grad.tolist()


def test_estimators_and_their_gradients_in_the_mean():
    """On-policy: k1 and k3 are unbiased in value, k2 in its gradient; k3's gradient is the other divergence's."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(6, generator=generator, dtype=torch.float64).requires_grad_()
    reference = torch.randn(6, generator=generator, dtype=torch.float64).log_softmax(-1)
    p = logits.log_softmax(-1)

    def forward(p):
        return (p.exp() * (p - reference)).sum()

    def backward(p):
        return (reference.exp() * (reference - p)).sum()

    for estimator in (k1, k3):
        assert (p.exp() * estimator(p, reference)).sum().item() == pytest.approx(forward(p).item(), rel=1e-12)

    def mean_gradient(estimator):
        """Of a loss that sees sampled tokens: the sampling itself is not differentiated."""
        return exact_gradient(lambda p: (p.exp().detach() * estimator(p, reference)).sum(), logits)

    assert mean_gradient(k1) == pytest.approx([0.0] * 6, abs=1e-12)
    assert mean_gradient(k2) == pytest.approx(exact_gradient(forward, logits), rel=1e-9)
    assert mean_gradient(k3) == pytest.approx(exact_gradient(backward, logits), rel=1e-9)


def test_a_policy_far_from_its_reference_is_still_pulled_back():
    """A token that the reference gives e^-60: k3 grows with the distance, and its gradient stays that of logp."""
    for estimator, value, slope in ((k1, 60.0, 1.0), (k2, 1800.0, 60.0), (k3, 59.0, 1.0)):
        logprob = torch.zeros(1, requires_grad=True)
        found = estimator(logprob, torch.tensor([-60.0]))
        (grad,) = torch.autograd.grad(found.sum(), logprob)
        assert (found.item(), grad.item()) == (pytest.approx(value), pytest.approx(slope))


# ---- weights, whitening, clip-cov ---------------------------------------------------------------------------------

sizes_lists = st.lists(st.integers(1, 50), min_size=1, max_size=20)


@given(sizes_lists)
def test_weights_make_the_named_means(lengths):
    values = [np.arange(1, length + 1) * 1.5 + place for place, length in enumerate(lengths)]
    sizes = np.asarray(lengths)

    def weighted(aggregation, constant=None):
        weights = token_weights(sizes, aggregation, constant)
        return sum(weight * each.sum() for weight, each in zip(weights, values, strict=True))

    assert weighted("per_sequence") == pytest.approx(np.mean([each.mean() for each in values]))
    assert weighted("token_mean") == pytest.approx(np.concatenate(values).mean())
    assert weighted("constant", 7) == pytest.approx(np.mean([each.sum() for each in values]) / 7)


@pytest.mark.parametrize("aggregation", ["per_sequence", "token_mean", "constant"])
def test_no_completions_have_no_weights(aggregation):
    assert len(token_weights(np.zeros(0, int), aggregation, 3)) == 0


@given(st.lists(st.tuples(st.floats(-5, 5), st.integers(1, 9)), min_size=2, max_size=12))
def test_white_advantages_have_mean_0_and_deviation_1_over_tokens(pairs):
    advantages, lengths = np.asarray([a for a, _ in pairs], "<f4"), np.asarray([n for _, n in pairs])
    tokens = np.repeat(whiten(advantages, lengths).astype(float), lengths)
    assert tokens.mean() == pytest.approx(0, abs=1e-5)
    assert tokens.std() == pytest.approx(1, rel=1e-3) or np.repeat(advantages, lengths).std() < 1e-4


def test_equal_advantages_and_none_at_all_whiten_to_nothing():
    assert whiten(np.full(3, 0.1, "<f4"), np.asarray([1, 2, 3])).tolist() == pytest.approx([0, 0, 0], abs=1e-6)
    assert len(whiten(np.zeros(0, "<f4"), np.zeros(0, int))) == 0


@given(st.integers(0, 10**6), st.floats(0.01, 1.0))
def test_clip_cov_draws_its_share_from_within_the_bounds(seed, share):
    rng = np.random.default_rng(seed)
    logprobs, advantages = rng.normal(-1, 2, 60), rng.normal(0, 1, 60)
    chosen = ClipCov(share=share, low=0.2, high=3.0)
    cut = clip_cov(logprobs, advantages, chosen, np.random.default_rng(1))
    covariance = [(logprobs[i] - sum(logprobs) / 60) * (advantages[i] - sum(advantages) / 60) for i in range(60)]
    candidates = {i for i in range(60) if 0.2 < covariance[i] < 3.0}
    assert set(np.flatnonzero(cut)) <= candidates
    assert cut.sum() == min(len(candidates), max(1, int(share * 60)))
    assert np.array_equal(cut, clip_cov(logprobs, advantages, chosen, np.random.default_rng(1)))


# ---- minibatches, micro-batches, ranks ----------------------------------------------------------------------------


def make_trainer(**keys) -> Trainer:
    return Trainer(steps=1, groups_per_step=4, micro_batch_tokens=40, **keys)


def tokens_of(shares: list[list[list]], field: str = "advantages") -> list[list[float]]:
    """[minibatch] -> the numbers of all its real tokens on all ranks, sorted."""
    return [
        sorted(
            float(x)
            for rank in shares
            for part in rank[number]
            for x, weight in zip(getattr(part.micro, field), part.micro.weights, strict=True)
            if weight > 0
        )
        for number in range(len(shares[0]))
    ]


@settings(max_examples=40)
@given(st.integers(0, 10**4), st.integers(1, 4), st.sampled_from([1, 2, 4]))
def test_ranks_and_micro_batches_share_one_update(seed, size, minibatches):
    """Weights, white advantages and clip-cov's choice are those of the whole, however it is dealt out."""
    batch = sequences(make_groups(4, seed=seed), 288)
    trainer = make_trainer(whiten=True, minibatches=minibatches, clip_cov={"share": 0.3, "low": 0.0, "high": 9.0})

    def dealt(ranks: int, budget: int):
        keys = trainer.model_copy(update={"micro_batch_tokens": budget})
        return [parts(batch, keys, Ranks(rank, ranks, CPU), np.random.default_rng(3)) for rank in range(ranks)]

    one, many = dealt(1, 10**6), dealt(size, 30)
    for field in ("advantages", "weights", "rollout"):
        assert tokens_of(one, field) == tokens_of(many, field)
    for number in range(minibatches):
        assert len({len(rank[number]) for rank in many}) == 1
        total = sum(sum(float(part.micro.weights.sum()) for part in rank[number]) for rank in many)
        assert total == pytest.approx(1.0) or not tokens_of(many)[number]
        cut = sum(part.cut for rank in many for part in rank[number])
        assert cut == sum(part.cut for part in one[0][number])
        zeros = sum(value == 0 for value in tokens_of(many)[number])
        assert zeros >= cut


@given(st.integers(0, 10**4), st.integers(1, 5))
def test_minibatches_are_whole_groups_and_together_the_batch(seed, count):
    batch = sequences(make_groups(6, seed=seed), 288)
    pieces = split(batch, count, np.random.default_rng(seed))
    assert len(pieces) == count and sum(len(piece) for piece in pieces) == len(batch)
    groups = [set(piece.groups.tolist()) for piece in pieces]
    assert sum(len(each) for each in groups) == len(set(batch.groups.tolist()))
    sizes = [len(each) for each in groups]
    assert max(sizes) - min(sizes) <= 1
    rows = sorted((piece.advantages[i], piece.completions[i]) for piece in pieces for i in range(len(piece)))
    assert rows == sorted(zip(batch.advantages, batch.completions, strict=True))


def test_taken_sequences_keep_their_tokens():
    batch = sequences(make_groups(3, seed=1), 288)
    indices = np.asarray([4, 0, 2])
    taken = batch.take(indices)

    def rows(batch: Sequences) -> list[tuple]:
        found, token, logprob = [], 0, 0
        for prompt, completion in zip(batch.prompts, batch.completions, strict=True):
            whole = batch.tokens[token : token + prompt + completion].tolist()
            found.append((whole, batch.logprobs[logprob : logprob + completion].tolist()))
            token, logprob = token + prompt + completion, logprob + completion
        return found

    assert rows(taken) == [rows(batch)[index] for index in indices]


def test_every_epoch_sees_every_minibatch_once():
    chosen = order(3, 4, np.random.default_rng(0))
    assert [sorted(chosen[at : at + 3]) for at in range(0, 12, 3)] == [[0, 1, 2]] * 4
    assert len({tuple(chosen[at : at + 3]) for at in range(0, 12, 3)}) > 1
    assert chosen == order(3, 4, np.random.default_rng(0))


# ---- the recipe ---------------------------------------------------------------------------------------------------

TREE = {
    "run": {"name": "r", "dir": "r"},
    "model": {"path": "m"},
    "data": {"path": "d", "fields": {"prompt": "p"}},
    "rewards": [{"name": "self_certainty"}],
    "trainer": {"steps": 4, "groups_per_step": 8},
}


def test_without_an_algorithm_a_recipe_means_grpo():
    trainer = recipe.parse(TREE).trainer
    assert (trainer.clip_low, trainer.clip_high, trainer.kl_beta, trainer.kl_estimator) == (0.2, 0.2, 0.005, "k3")
    assert (trainer.aggregation, trainer.surrogate, trainer.policy_ratio) == ("per_sequence", "clip", "token")
    assert trainer.importance is not None and trainer.importance.high == 2.0 and trainer.updates == 1
    assert recipe.parse(TREE, ["trainer.algorithm=grpo"]) == recipe.parse(TREE)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_an_explicit_key_wins_and_a_dump_says_the_same(algorithm):
    made = recipe.parse(TREE, [f"trainer.algorithm={algorithm}", "trainer.clip_high=0.7", "trainer.kl_beta=0.25"])
    assert (made.trainer.clip_high, made.trainer.kl_beta) == (0.7, 0.25)
    assert recipe.parse(recipe.yaml.safe_load(recipe.dump(made))) == made
    assert made.spec is not None and made.spec.combine.normalize == ALGORITHMS[algorithm].normalize


@pytest.mark.parametrize(("sampling", "word"), [({}, ""), ({"top_p": 0.9}, "top_p 0.9"), ({"top_k": 5}, "top_k 5")])
def test_sampling_from_a_part_of_the_distribution_is_doubted(sampling, word):
    doubt = cut_sampling(Sampling(**sampling))
    assert word in doubt and bool(doubt) == bool(word)


def test_an_explicit_combine_wins_over_the_algorithm():
    made = recipe.parse(TREE, ["trainer.algorithm=rloo", "combine={normalize: rank}"])
    assert made.spec is not None and made.spec.combine.normalize == "rank"


def test_the_constant_length_is_the_rollouts_longest():
    overrides = ["trainer.algorithm=dr_grpo", "rollout.sampling.max_tokens=77"]
    assert recipe.parse(TREE, overrides).trainer.aggregation_length == 77
    assert recipe.parse(TREE, [*overrides, "trainer.aggregation_length=10"]).trainer.aggregation_length == 10


@pytest.mark.parametrize(("cap", "importance"), [("null", None), ("3.5", {"high": 3.5})])
def test_the_cap_of_earlier_recipes_is_read(cap, importance):
    made = recipe.parse(TREE, [f"trainer.importance_cap={cap}"]).trainer
    assert made.importance == (None if importance is None else made.importance.model_copy(update=importance))


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("trainer.algorithm=ppo", ["trainer.algorithm", "'grpo'", "'cispo'", "'ppo'"]),
        ("trainer.minibatches=3", ["trainer: minibatches: 3", "groups_per_step (8)"]),
        ("trainer.importance={low: 0.5}", ["trainer.importance: low: 0.5", "mode: mask"]),
        ("trainer.importance={mode: mask, low: 3}", ["trainer.importance: low: 3", "less than high (2.0)"]),
        ("trainer.clip_cov={low: 5, high: 1}", ["trainer.clip_cov: low: 5", "high (1.0)"]),
        ("trainer={steps: 1, groups_per_step: 1, policy_ratio: sequence, clip_cov: {}}", ["clip_cov", "policy_ratio"]),
        ("trainer.aggregation_length=5", ["aggregation_length: 5", "aggregation: constant"]),
        ("trainer={steps: 1, groups_per_step: 1, dual_clip: 3, surrogate: none}", ["dual_clip: 3", "surrogate: clip"]),
    ],
)
def test_refusals_name_key_value_and_what_is_valid(override, words):
    with pytest.raises(recipe.RecipeError) as caught:
        recipe.parse(TREE, [override])
    for word in words:
        assert word in str(caught.value)
