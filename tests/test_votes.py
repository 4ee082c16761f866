"""Votes of a group: pure functions against slow oracles, clustering in real verifier processes."""

import asyncio
import math
import time
from collections import Counter
from types import SimpleNamespace
from typing import get_args

import httpx
import pytest
import pytest_asyncio
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from served import served

from reward_server.reward import Context
from reward_server.rewards import answers as module
from reward_server.rewards import certainty_weighted_vote as weighted
from reward_server.rewards import majority_vote, math_verify, semantic_entropy, soft_vote
from reward_server.rewards.answers import Answer, AnswerParams, answers, clusters, order_of
from reward_server.rewards.certainty_weighted_vote import CertaintyWeightedVoteParams
from reward_server.rewards.majority_vote import MajorityVoteParams
from reward_server.rewards.semantic_entropy import SemanticEntropyParams
from reward_server.rewards.soft_vote import SoftVoteParams
from reward_server.workers import Limits, Turn, Verdict, WorkerPool
from services.api import CompletionText, RewardGroup
from services.contract import Outcome, Score, Task

pytestmark = pytest.mark.alone

LATE = Score.failed(Outcome.timeout, "late")
FAILED = "failed"


def said(*clusters_: int | None | str) -> list[Answer]:
    """Answers by cluster number; none: no answer; FAILED: not known."""
    return [Answer(None, failure=LATE) if item == FAILED else Answer(item, str(item)) for item in clusters_]


def values(scores: list[Score]) -> list[float | None]:
    return [score.value for score in scores]


groups = st.lists(st.none() | st.just(FAILED) | st.integers(0, 3), min_size=1, max_size=9)


@st.composite
def permuted(draw, of=groups):
    group = draw(of)
    return group, draw(st.permutations(range(len(group))))


# ---- majority_vote -------------------------------------------------------------------------------------------------


def test_majority():
    assert values(majority_vote.vote(said(0, 1, 0, None, FAILED), MajorityVoteParams())) == [1, 0, 1, 0, None]
    outcomes = [score.outcome for score in majority_vote.vote(said(0, None, FAILED), MajorityVoteParams())]
    assert outcomes == [Outcome.ok, Outcome.no_answer, Outcome.timeout]


def test_ties():
    tied = said(1, 0, 0, 1, 2, None)
    assert values(majority_vote.vote(tied, MajorityVoteParams())) == [1, 1, 1, 1, 0, 0]
    assert values(majority_vote.vote(tied, MajorityVoteParams(ties="first"))) == [1, 0, 0, 1, 0, 0]
    skipped = majority_vote.vote(tied, MajorityVoteParams(ties="skip"))
    assert {score.outcome for score in skipped} == {Outcome.skipped} and "2 answers have 2 votes" in skipped[0].detail


def test_no_answer_never_wins():
    assert values(majority_vote.vote(said(None, None, None, 2), MajorityVoteParams())) == [0, 0, 0, 1]


def test_minimum_share_counts_those_without_an_answer():
    group = said(0, 0, 1, None, FAILED)
    assert values(majority_vote.vote(group, MajorityVoteParams(min_share=0.5))) == [1, 1, 0, 0, None]
    found = majority_vote.vote(group, MajorityVoteParams(min_share=0.51))
    assert [score.outcome for score in found] == [Outcome.skipped] * 4 + [Outcome.timeout]


@pytest.mark.parametrize(
    ("group", "wanted"), [([0], [1]), ([None], [0]), ([None, None], [0, 0]), ([FAILED, FAILED], [None, None])]
)
def test_votes_of_edge_groups(group, wanted):
    assert values(majority_vote.vote(said(*group), MajorityVoteParams())) == wanted
    assert values(soft_vote.vote(said(*group), SoftVoteParams())) == wanted
    certainties = [1.0 for _ in group]
    assert values(weighted.vote(said(*group), certainties, CertaintyWeightedVoteParams())) == wanted


@given(groups)
def test_majority_oracle(group):
    answered = [item for item in group if isinstance(item, int)]
    wanted = []
    for item in group:
        if item == FAILED:
            wanted.append(None)
        else:
            wins = item is not None and all(answered.count(item) >= answered.count(other) for other in answered)
            wanted.append(float(wins))
    assert values(majority_vote.vote(said(*group), MajorityVoteParams())) == wanted


# ---- soft_vote, semantic_entropy -----------------------------------------------------------------------------------


@given(groups)
def test_soft_vote_and_entropy_oracle(group):
    known = [item for item in group if item != FAILED]
    wanted = [None if i == FAILED else 0.0 if i is None else known.count(i) / len(known) for i in group]
    assert values(soft_vote.vote(said(*group), SoftVoteParams())) == pytest.approx(wanted)
    named = [("none", place) if item is None else item for place, item in enumerate(known)]
    entropy = -sum(count / len(known) * math.log(count / len(known)) for count in Counter(named).values())
    found, count = semantic_entropy.entropy(said(*group))
    assert (found, count) == (pytest.approx(entropy, abs=1e-12), len(known))
    assert 0 <= found <= math.log(max(1, len(known))) + 1e-12


def test_entropy_bounds_of_soft_vote():
    half = said(0, 0, 1, 1)  # H = log 2
    assert values(soft_vote.vote(half, SoftVoteParams(min_entropy=0.6, max_entropy=0.7))) == [0.5] * 4
    for outside in ({"min_entropy": 0.7}, {"max_entropy": 0.6}):
        found = soft_vote.vote([*half, *said(FAILED)], SoftVoteParams(**outside))
        assert [score.outcome for score in found] == [Outcome.skipped] * 4 + [Outcome.timeout]
        assert "0.6931" in found[0].detail
    with pytest.raises(ValidationError, match="greater than max_entropy"):
        SoftVoteParams(min_entropy=1, max_entropy=0.5)


# ---- certainty_weighted_vote ---------------------------------------------------------------------------------------


def test_certainty_outvotes_heads():
    group, certainties = said(0, 0, 1, None, FAILED), [1.0, 1.0, 3.0, 9.0, 9.0]
    assert values(weighted.vote(group, certainties, CertaintyWeightedVoteParams())) == [0, 0, 1, 0, None]
    share = weighted.vote(group, certainties, CertaintyWeightedVoteParams(value="share"))
    assert values(share) == [0.4, 0.4, 0.6, 0, None]


def test_borda_weighs_ranks():
    params = CertaintyWeightedVoteParams(weights="borda", power=2, value="share")
    assert weighted.weights([0.1, 5.0, 0.2], params) == [1, 9, 4]
    assert weighted.weights([1.0, 1.0, 0.2, 7.0], params) == [2.5**2, 2.5**2, 1, 16]
    assert weighted.weights([3.0, 1.0], CertaintyWeightedVoteParams(weights="borda", power=0)) == [1, 1]
    group = said(0, 0, 1)
    assert values(weighted.vote(group, [-3.0, -2.0, -1.0], params)) == pytest.approx([5 / 14, 5 / 14, 9 / 14])


def test_only_the_most_certain_vote_but_all_are_judged():
    group, certainties = said(0, 0, 0, 1, 1), [1.0, 1.1, 1.2, 3.0, 2.0]
    assert values(weighted.vote(group, certainties, CertaintyWeightedVoteParams(top_share=0.4))) == [0, 0, 0, 1, 1]
    assert weighted.weights(certainties, CertaintyWeightedVoteParams(top_share=0.01)) == [0, 0, 0, 3, 0]
    assert weighted.weights([2.0, 2.0, 1.0], CertaintyWeightedVoteParams(top_share=0.3)) == [2, 2, 0]


def test_votes_without_weight_say_nothing():
    found = weighted.vote(said(0, 1, FAILED), [0.0, 0.0, 1.0], CertaintyWeightedVoteParams())
    assert [score.outcome for score in found] == [Outcome.skipped, Outcome.skipped, Outcome.timeout]


def test_a_completion_without_certainty_casts_no_vote():
    assert values(weighted.vote(said(0, 0, 1), [None, 1.0, 2.0], CertaintyWeightedVoteParams())) == [0, 0, 1]


def test_negative_certainties_cannot_weigh():
    with pytest.raises(ValidationError, match="mean_logprob is negative"):
        CertaintyWeightedVoteParams(certainty="mean_logprob")
    CertaintyWeightedVoteParams(certainty="mean_logprob", weights="borda")


@given(permuted(), st.data())
def test_votes_do_not_depend_on_the_order_of_the_completions(case, data):
    group, order = case
    size = len(group)
    certainties = data.draw(st.lists(st.floats(0, 100), min_size=size, max_size=size))
    weights = data.draw(st.sampled_from(["certainty", "borda"]))
    value = data.draw(st.sampled_from(["winner", "share"]))
    top = data.draw(st.sampled_from([0.3, 1.0]))
    params = CertaintyWeightedVoteParams(weights=weights, value=value, top_share=top, power=0.5)
    ties = data.draw(st.sampled_from(["all", "skip"]))
    share = data.draw(st.sampled_from([0.0, 0.5]))

    def votes(places) -> list[list[float | None]]:
        there = said(*(group[place] for place in places))
        return [
            values(majority_vote.vote(there, MajorityVoteParams(ties=ties, min_share=share))),
            values(soft_vote.vote(there, SoftVoteParams(min_entropy=0.5))),
            values(weighted.vote(there, [certainties[place] for place in places], params)),
        ]

    for straight, shuffled in zip(votes(range(size)), votes(order), strict=True):
        assert shuffled == [straight[place] for place in order]


# ---- clusters ------------------------------------------------------------------------------------------------------


def test_clusters_go_by_representatives():
    # 1 equals 0, 2 equals 1 but not 0: it begins a cluster of its own
    assert clusters(4, [set(), {0}, {1}, {2, 0}]) == [0, 0, 1, 0]


@given(st.lists(st.integers(0, 5), max_size=12))
def test_an_equality_that_is_one_gives_its_classes(classes):
    equal = [{place for place in range(i) if classes[place] == classes[i]} for i in range(len(classes))]
    labels = clusters(len(classes), equal)
    for i, one in enumerate(classes):
        for j, other in enumerate(classes):
            assert (labels[i] == labels[j]) == (one == other)


def near(payload: dict, poison: frozenset[str] = frozenset()) -> Verdict:
    """Equality with a tolerance, which is not transitive; some answers take for ever."""
    if poison & {payload["answer"], *payload["others"]}:
        return Verdict("timeout", 0.0, detail="slow")
    mine = float(payload["answer"])
    return Verdict(
        "ok", 0.0, {"equal": [p for p, other in enumerate(payload["others"]) if abs(float(other) - mine) < 1.5]}
    )


def in_process(poison: frozenset[str] = frozenset()) -> Context:
    async def check(_name, payload, _deadline, _turn, heavy=False):  # noqa: ARG001
        return near(payload, poison)

    return Context(SimpleNamespace(check=check), time.monotonic() + 60, Turn())


def compare(numbers: list[str], poison: frozenset[str] = frozenset()):
    keys = sorted({("math", number) for number in numbers}, key=order_of)
    labels, failed = asyncio.run(module._compare(keys, in_process(poison)))
    return {key[1]: label for key, label in labels.items()}, {key[1] for key in failed}


def test_one_poison_is_the_only_failure():
    labels, failed = compare(["1", "2", "40", "41", "7"], frozenset({"40"}))
    assert failed == {"40"} and set(labels) == {"1", "2", "41", "7"}
    assert labels["1"] == labels["2"] != labels["41"]


def test_failures_are_found_within_a_few_rounds():
    labels, failed = compare([str(number) for number in range(40)], frozenset({"5", "20", "30"}))
    assert {"5", "20", "30"} <= failed
    everything = compare([str(number) for number in range(40)], frozenset(str(number) for number in range(1, 40)))
    assert everything[0] == {"0": 0}


@settings(deadline=None)
@given(st.lists(st.integers(0, 30).map(str), min_size=1, max_size=40))
def test_many_answers_are_compared_in_parts(numbers):
    labels, failed = compare(numbers)
    keys = sorted(set(numbers), key=lambda number: order_of(("math", number)))
    wanted = clusters(
        len(keys), [{j for j in range(i) if abs(int(keys[i]) - int(keys[j])) < 1.5} for i in range(len(keys))]
    )
    assert not failed and [labels[key] for key in keys] == wanted


# ---- real processes ------------------------------------------------------------------------------------------------


QUICK = Limits(quantum_seconds=0.3, full_seconds=0.6, full_wall_seconds=4, grace_seconds=0.5, slow_wait_seconds=120)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def pool():
    made = WorkerPool(1, QUICK, [math_verify.WARM_UP])
    made.start()
    yield made
    await made.stop()


def context(pool: WorkerPool, seconds: float = 120) -> Context:
    return Context(pool, time.monotonic() + seconds, Turn())


def group_of(*texts: str) -> RewardGroup:
    completions = [CompletionText(text=text) for text in texts]
    return RewardGroup(group_id="g", task=Task(task_id="t", prompt="p"), completions=completions)


TEXTS = [
    "so \\boxed{\\frac{1}{2}}",
    "\\boxed{0.5}",
    "The answer is 2/4",
    "\\boxed{4}",
    "I get \\boxed{4.0}.",
    "I do not know",
    "\\boxed{x+1}",
    "\\boxed{1+x}",
    "\\boxed{\\frac{1}{0}}",
    "",
    "\\boxed{1{,}000}",
    "\\boxed{1000}",
]
CLUSTERS = [{0, 1, 2}, {3, 4}, {6, 7}, {8}, {10, 11}]


def as_sets(found: list[Answer]) -> set[frozenset[int]]:
    together: dict[int, set[int]] = {}
    for place, answer in enumerate(found):
        if answer.cluster is not None:
            together.setdefault(answer.cluster, set()).add(place)
    return {frozenset(places) for places in together.values()}


@pytest.mark.asyncio(loop_scope="module")
async def test_equal_mathematics_are_one_answer_whatever_the_order(pool):
    found = await answers(group_of(*TEXTS), AnswerParams(), context(pool))
    assert as_sets(found) == {frozenset(places) for places in CLUSTERS}
    assert all(answer.is_known for answer in found) and found[5].cluster is None and found[9].cluster is None
    backwards = await answers(group_of(*reversed(TEXTS)), AnswerParams(), context(pool))
    assert [answer.cluster for answer in reversed(backwards)] == [answer.cluster for answer in found]
    assert values(await majority_vote.score(group_of(*TEXTS), MajorityVoteParams(), context(pool))) == [
        float(place in CLUSTERS[0]) for place in range(len(TEXTS))
    ]


@pytest.mark.asyncio(loop_scope="module")
async def test_hostile_answers_fail_alone(pool):
    hostile = ["\\boxed{9^{9^{9^{9}}}}", "\\boxed{(10^9)!}", "\\boxed{\\prod_{k=1}^{10^9} k}"]
    texts = ["\\boxed{4}", hostile[0], "\\boxed{\\sqrt{16}}", hostile[1], "\\boxed{5}", hostile[2], "no idea"]
    scores = await majority_vote.score(group_of(*texts), MajorityVoteParams(), context(pool))
    assert values(scores) == [1, None, 1, None, 0, None, 0]
    assert {scores[place].outcome for place in (1, 3, 5)} <= {Outcome.timeout, Outcome.error}
    assert scores[6].outcome == Outcome.no_answer
    only = await soft_vote.score(group_of(*hostile), SoftVoteParams(), context(pool))
    assert values(only) == [None] * 3


@pytest.mark.asyncio(loop_scope="module")
async def test_answers_by_pattern_and_by_text(pool):
    letters = group_of("... so (B)", "it is (b)", "(A)? no: (B)", "neither", "(C)")
    params = {"answer": "regex", "regex": r"\(([A-Za-z])\)"}
    found = await majority_vote.score(letters, MajorityVoteParams(**params, case=False), context(pool))
    assert values(found) == [1, 1, 1, 0, 0] and found[3].outcome == Outcome.no_answer
    strict = await majority_vote.score(letters, MajorityVoteParams(**params), context(pool))
    assert values(strict) == [1, 0, 1, 0, 0]
    plain = await soft_vote.score(group_of("a  b", " a b\n", "c", "  "), SoftVoteParams(answer="text"), context(pool))
    assert values(plain) == [0.5, 0.5, 0.25, 0.0]


@pytest.mark.asyncio(loop_scope="module")
async def test_a_pattern_that_never_ends_is_that_completions_failure(pool):
    params = MajorityVoteParams(answer="regex", regex=r"(?:a+)+(b)")
    scores = await majority_vote.score(group_of("aab", "a" * 40, "ab"), params, context(pool))
    assert [score.outcome for score in scores] == [Outcome.ok, Outcome.timeout, Outcome.ok]


@pytest.mark.asyncio(loop_scope="module")
async def test_rewards_of_one_group_share_the_clusters(pool):
    ground, asked = context(pool), []
    check = pool.check

    async def counting(name, *args, **options):
        asked.append(name)
        return await check(name, *args, **options)

    ground.workers = SimpleNamespace(check=counting)
    group = group_of("\\boxed{4}", "\\boxed{\\sqrt{16}}")
    both = await asyncio.gather(
        majority_vote.score(group, MajorityVoteParams(min_share=0.1), ground),
        semantic_entropy.score(group, SemanticEntropyParams(), ground),
    )
    assert values(both[0]) == [1, 1] and values(both[1]) == [0, 0]
    assert sorted(asked) == [math_verify.READ, math_verify.READ, math_verify.SAME]
    await majority_vote.score(group, MajorityVoteParams(anchored=True), ground)
    assert len(asked) == 6


@pytest.mark.asyncio(loop_scope="module")
async def test_relative_entropy_is_of_the_known(pool):
    group = group_of("\\boxed{1}", "\\boxed{2}", "\\boxed{3}", "none here")
    (first, *_) = await semantic_entropy.score(group, SemanticEntropyParams(), context(pool))
    assert first.value == pytest.approx(math.log(4))
    relative = await semantic_entropy.score(group, SemanticEntropyParams(relative=True), context(pool))
    assert values(relative) == pytest.approx([1.0] * 4)


# ---- over HTTP, with a scorer ----------------------------------------------------------------------------------------


def test_certainties_come_from_the_one_pass_and_gates_from_the_entropy(tiny_model):
    from reward_server.app import Settings, create
    from reward_server.scorer.metrics import METRICS

    assert set(get_args(CertaintyWeightedVoteParams.model_fields["certainty"].annotation)) <= set(METRICS)
    texts = ["\\boxed{7}", "It is \\boxed{8}", "so \\boxed{\\sqrt{49}}", "perhaps \\boxed{9}", "who knows", ""]
    terms = [
        {"name": "self_certainty", "weight": 0},
        {"name": "semantic_entropy", "weight": 0},
        {"name": "certainty_weighted_vote", "params": {"value": "share"}},
        {"name": "majority_vote", "gate": {"reward": "semantic_entropy", "at_least": 1.7}},
    ]
    group = group_of(*texts).model_dump(exclude_none=True)
    with served(create(Settings(model=str(tiny_model), threads=1, verifier_workers=1))) as url:
        with httpx.Client(base_url=url, timeout=120) as client:
            put = client.put("/v1/specs/voted", json={"rewards": terms, "combine": {"normalize": "none"}})
            assert put.status_code == 200, put.text
            answer = client.post("/v1/rewards", json={"spec": "voted", "groups": [group]})
    assert answer.status_code == 200, answer.text
    scores = answer.json()["groups"][0]["scores"]
    found = {key: [score["components"][key]["value"] for score in scores] for key in scores[0]["components"]}
    certain = found["self_certainty"]
    total = sum(certain[:4])
    shares = [
        (certain[0] + certain[2]) / total,
        certain[1] / total,
        (certain[0] + certain[2]) / total,
        certain[3] / total,
    ]
    assert found["certainty_weighted_vote"][:5] == pytest.approx([*shares, 0.0])
    empty = scores[5]["components"]["certainty_weighted_vote"]
    assert (empty["value"], empty["outcome"]) == (None, "skipped")  # the scorer has no token to be certain of
    assert found["majority_vote"] == [1, 0, 1, 0, 0, 0]
    entropy = math.log(6) - 2 / 6 * math.log(2)
    assert found["semantic_entropy"] == pytest.approx([entropy] * 6) and entropy < 1.7
    assert [score["reward"] for score in scores[:5]] == pytest.approx(found["certainty_weighted_vote"][:5])


@pytest.mark.parametrize(
    ("params", "says"),
    [
        ({"answer": "regex"}, "belong together"),
        ({"regex": "(a)"}, "belong together"),
        ({"answer": "regex", "regex": "a"}, "exactly one group"),
        ({"answer": "regex", "regex": "(a"}, "not a regular expression"),
    ],
)
def test_bad_answer_params_are_named(params, says):
    with pytest.raises(ValidationError, match=says):
        AnswerParams(**params)
