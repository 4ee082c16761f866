"""Gates, schedules, clips and unanimous groups: a slow oracle of the whole composition, and its properties."""

import math
import statistics

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from reward_server.combine import advantages, combine_scores, counted, unanimous
from reward_server.normalize import LIMIT
from services.contract import Outcome, Score
from services.spec import Combine, Gate, RewardSpec, RewardTerm, Schedule

KEYS = ["a", "b", "c"]
HOWS = ["group_std", "group_mean", "leave_one_out", "rank", "none"]
small = st.integers(-8, 8).map(lambda number: number / 4)  # exact in binary: the oracle's ties are ours
column = st.lists(st.none() | small, min_size=1, max_size=7)
version = st.integers(0, 40)


def schedules() -> st.SearchStrategy:
    ramps = st.builds(
        lambda start, length, before, after: {
            "kind": "ramp",
            "start": start,
            "end": start + length,
            "before": before,
            "after": after,
        },
        st.integers(0, 20),
        st.integers(1, 20),
        small,
        small,
    )
    switches = st.fixed_dictionaries(
        {"kind": st.just("switch"), "at": st.integers(1, 30), "before": small, "after": small}
    )
    alternates = st.fixed_dictionaries(
        {"kind": st.just("alternate"), "every": st.integers(1, 5), "factors": st.lists(small, min_size=2, max_size=4)}
    )
    return ramps | switches | alternates


@st.composite
def specs(draw) -> RewardSpec:
    terms = []
    for key in KEYS:
        gate = None
        if draw(st.booleans()):
            low = draw(small)
            gate = Gate(
                reward=draw(st.sampled_from(KEYS)),
                at_least=low,
                at_most=draw(st.none() | small.filter(lambda high: high >= low)),  # noqa: B023
                otherwise=draw(st.none() | small),
            )
        clip = draw(st.none() | st.tuples(small, small).map(sorted).map(tuple))
        terms.append(
            RewardTerm(name=key, weight=draw(small), clip=clip, gate=gate, schedule=draw(st.none() | schedules()))
        )
    combine = Combine(
        order=draw(st.sampled_from(["normalize_then_sum", "sum_then_normalize"])),
        normalize=draw(st.sampled_from(HOWS)),
        clip=draw(st.none() | st.sampled_from([0.25, 1.0, 5.0])),
        skip_unanimous=draw(st.none() | st.sampled_from(KEYS)),
    )
    return RewardSpec(rewards=terms, combine=combine)


@st.composite
def columns(draw, size: int) -> dict[str, list[float | None]]:
    return {key: draw(st.lists(st.none() | small, min_size=size, max_size=size)) for key in KEYS}


def scored(value: float | None) -> Score:
    return Score.failed(Outcome.timeout, "late") if value is None else Score.of(value)


def components(raw: dict[str, list[float | None]]) -> dict[str, list[Score]]:
    return {key: [scored(value) for value in values] for key, values in raw.items()}


# ---- the oracle --------------------------------------------------------------------------------------------------


def oracle_factor(schedule, at: int) -> float:
    if schedule is None:
        return 1.0
    if schedule.kind == "switch":
        return schedule.after if at >= schedule.at else schedule.before
    if schedule.kind == "alternate":
        return (schedule.factors * 50)[at // schedule.every]
    if at <= schedule.start:
        return schedule.before
    if at >= schedule.end:
        return schedule.after
    return schedule.before + (schedule.after - schedule.before) * (at - schedule.start) / (
        schedule.end - schedule.start
    )


def oracle_normal(values: list[float | None], how: str, eps: float) -> list[float | None]:
    here = [value for value in values if value is not None]
    done = []
    for value in values:
        if value is None or how == "none":
            done.append(value)
        elif len(here) == 1 or max(here) - min(here) < 1e-12:
            done.append(0.0)
        elif how == "group_mean":
            done.append(value - statistics.mean(here))
        elif how == "group_std":
            done.append((value - statistics.mean(here)) / (statistics.stdev(here) + eps))
        elif how == "leave_one_out":
            done.append(value - (sum(here) - value) / (len(here) - 1))
        else:
            done.append((sum(o < value - 1e-12 for o in here) - sum(o > value + 1e-12 for o in here)) / (len(here) - 1))
    return done


def oracle(spec: RewardSpec, raw: dict[str, list[float | None]], size: int, at: int):
    """(advantage, reward, valid) of each completion, straight from the description."""
    return oracle_and_sums(spec, raw, size, at)[0]


def raw_sums(spec: RewardSpec, raw: dict[str, list[float | None]], size: int, at: int) -> list[float]:
    """What `sum_then_normalize` normalises, where there is something."""
    return [value for value in oracle_and_sums(spec, raw, size, at)[1] if value is not None]


def oracle_and_sums(spec: RewardSpec, raw: dict[str, list[float | None]], size: int, at: int):
    live: dict[str, list[float | None]] = {}
    weights = {}
    for term in spec.rewards:
        weights[term.name] = term.weight * oracle_factor(term.schedule, at)
        values = []
        for place in range(size):
            value = raw[term.name][place]
            if value is not None and term.clip is not None:
                value = sorted([term.clip[0], value, term.clip[1]])[1]
            if term.gate is not None:
                other = raw[term.gate.reward][place]
                is_open = other is not None and other >= term.gate.at_least
                is_open = is_open and (term.gate.at_most is None or other <= term.gate.at_most)
                value = value if is_open else term.gate.otherwise
            values.append(value)
        live[term.name] = values
    used = [key for key in KEYS if weights[key] != 0]
    total = [0.0] * size
    how, eps = spec.combine.normalize, spec.combine.eps
    sums: list[float | None] = []
    if spec.combine.order == "normalize_then_sum":
        for key in used:
            normal = oracle_normal(live[key], how, eps)
            total = [t + weights[key] * (n or 0.0) for t, n in zip(total, normal, strict=True)]
    else:
        for place in range(size):
            if all(live[key][place] is None for key in used):
                sums.append(None)
                continue
            one = 0.0
            for key in used:
                value = live[key][place]
                if value is None and how != "none":
                    present = [v for v in live[key] if v is not None]
                    value = statistics.mean(present) if present else 0.0
                one += weights[key] * (value or 0.0)
            sums.append(one)
        total = [value or 0.0 for value in oracle_normal(sums, how, eps)]
    if spec.combine.clip is not None:
        total = [max(-spec.combine.clip, min(spec.combine.clip, value)) for value in total]
    judge = spec.combine.skip_unanimous
    said = {value for value in raw[judge] if value is not None} if judge else set()
    answers = []
    for place in range(size):
        parts = [weights[key] * live[key][place] for key in used if live[key][place] is not None]
        valid = bool(parts) and len(said) != 1
        judges = [term.gate.reward for term in spec.rewards if term.name in used and term.gate is not None]
        whole = all(raw[key][place] is not None for key in [*used, *judges])
        answers.append((total[place], sum(parts) if whole else None, True) if valid else (0.0, None, False))
    return answers, sums


@settings(max_examples=300)
@given(data=st.data(), spec=specs(), size=st.integers(1, 7), at=version)
def test_the_whole_composition_is_the_oracle(data, spec, size, at):
    raw = data.draw(columns(size))
    found = combine_scores(spec, components(raw), size, at)
    wanted = oracle(spec, raw, size, at)
    assert [item.valid for item in found] == [valid for _, _, valid in wanted]
    assert [item.reward is None for item in found] == [reward is None for _, reward, _ in wanted]
    sums = [(item.reward, reward) for item, (_, reward, _) in zip(found, wanted, strict=True) if reward is not None]
    assert [found for found, _ in sums] == pytest.approx([reward for _, reward in sums], rel=1e-9, abs=1e-9)
    if spec.combine.order == "sum_then_normalize" and spec.combine.normalize in ("group_std", "rank"):
        sums = raw_sums(spec, raw, size, at)
        gaps = [abs(a - b) for a in sums for b in sums if a != b]
        if gaps and min(gaps) < 1e-6:  # equal but for rounding: the two ways of adding may disagree on a tie
            return
    assert [item.advantage for item in found] == pytest.approx([a for a, _, _ in wanted], rel=1e-6, abs=1e-6)
    assert [item.components for item in found] == [
        {key: scored(raw[key][place]) for key in KEYS} for place in range(size)
    ]


@settings(max_examples=100)
@given(data=st.data(), spec=specs(), size=st.integers(1, 7), at=version)
def test_the_order_of_completions_and_of_terms_changes_nothing(data, spec, size, at):
    raw = data.draw(columns(size))
    places = data.draw(st.permutations(range(size)))
    found = combine_scores(spec, components(raw), size, at)
    moved = {key: [raw[key][place] for place in places] for key in KEYS}
    assert combine_scores(spec, components(moved), size, at) == [found[place] for place in places]
    turned = RewardSpec(rewards=data.draw(st.permutations(spec.rewards)), combine=spec.combine)
    again = combine_scores(turned, components(raw), size, at)
    assert [(item.reward, item.valid) for item in again] == [(item.reward, item.valid) for item in found]
    assert [item.advantage for item in again] == pytest.approx([item.advantage for item in found], abs=1e-9)


# ---- gates -------------------------------------------------------------------------------------------------------


def spec_of(*terms: RewardTerm, **combine) -> RewardSpec:
    return RewardSpec(rewards=list(terms), combine=Combine(**combine))


def test_a_shut_gate_leaves_the_value_out_of_the_statistics():
    brevity = RewardTerm(name="brevity", gate=Gate(reward="right", at_least=1))
    spec = spec_of(RewardTerm(name="right", weight=0), brevity, normalize="group_mean")
    raw = {"right": [1.0, 1.0, 0.0, None], "brevity": [4.0, 2.0, 100.0, 100.0]}
    assert counted(spec, raw)["brevity"] == [4.0, 2.0, None, None]
    found = combine_scores(spec, components(raw), 4)
    assert [item.advantage for item in found] == [1.0, -1.0, 0.0, 0.0]
    assert [item.valid for item in found] == [True, True, False, False]
    assert found[2].components["brevity"].value == 100.0  # the unweighted breakdown stays whole


def test_a_shut_gate_may_count_as_a_number():
    right = RewardTerm(name="right", gate=Gate(reward="shape", at_least=1, otherwise=0.0))
    spec = spec_of(right, RewardTerm(name="shape", weight=0), normalize="none")
    raw = {"right": [1.0, 1.0, 0.0], "shape": [1.0, 0.0, None]}
    assert advantages(spec, counted(spec, raw), 3) == [1.0, 0.0, 0.0]


def test_gates_look_at_raw_values_so_they_never_chase_each_other():
    first = RewardTerm(name="first", gate=Gate(reward="second", at_least=1), clip=(0, 1))
    second = RewardTerm(name="second", gate=Gate(reward="first", at_least=5))
    raw = {"first": [7.0], "second": [1.0]}
    assert counted(spec_of(first, second), raw) == {"first": [1.0], "second": [1.0]}


@pytest.mark.parametrize(
    ("term", "says"),
    [
        ({"name": "a", "gate": {"reward": "b", "at_least": 1}}, "gate.reward: no term has the key 'b'"),
        ({"name": "a", "gate": {"reward": "a"}}, "at_least"),
        ({"name": "a", "gate": {"reward": "a", "at_least": 2, "at_most": 1}}, "never opens"),
        ({"name": "a", "clip": [1, 0]}, "lower end comes first"),
        ({"name": "a", "schedule": {"kind": "ramp", "start": 5, "end": 5}}, "greater than start"),
        ({"name": "a", "schedule": {"kind": "alternate", "factors": [1]}}, "at least 2"),
        ({"name": "a", "schedule": {"kind": "sometimes"}}, "ramp"),
        ({"name": "a", "schedule": {"kind": "switch", "at": 0}}, "greater than or equal to 1"),
        ({"name": "a", "gate": {"reward": "a", "at_least": float("nan")}}, "finite"),
    ],
)
def test_terms_that_cannot_be_meant_are_refused(term, says):
    with pytest.raises(ValidationError, match=says.replace("[", r"\[")):
        RewardSpec.model_validate({"rewards": [term]})


def test_unanimity_needs_a_term():
    with pytest.raises(ValidationError, match="skip_unanimous: no term has the key 'b'"):
        RewardSpec.model_validate({"rewards": [{"name": "a"}], "combine": {"skip_unanimous": "b"}})


# ---- schedules ---------------------------------------------------------------------------------------------------


def test_schedules_by_hand():
    read = TypeAdapter(Schedule).validate_python
    ramp = read({"kind": "ramp", "start": 10, "end": 20, "before": 0.5, "after": 1.5})
    assert [ramp.factor(at) for at in (0, 10, 15, 20, 99)] == [0.5, 0.5, 1.0, 1.5, 1.5]
    switch = read({"kind": "switch", "at": 58})
    assert [switch.factor(at) for at in (0, 57, 58, 400)] == [1.0, 1.0, 0.0, 0.0]
    alternate = read({"kind": "alternate", "every": 2, "factors": [1, 0, 0.5]})
    assert [alternate.factor(at) for at in range(7)] == [1, 1, 0, 0, 0.5, 0.5, 1]


def test_intuitor_first_grpo_after():
    spec = RewardSpec.model_validate(
        {
            "rewards": [
                {"name": "self_certainty", "schedule": {"kind": "switch", "at": 58}},
                {"name": "math_verify", "schedule": {"kind": "switch", "at": 58, "before": 0, "after": 1}},
            ],
            "combine": {"normalize": "group_mean"},
        }
    )
    raw = {"self_certainty": [10.0, 12.0], "math_verify": [1.0, None]}
    before = combine_scores(spec, components(raw), 2, version=57)
    after = combine_scores(spec, components(raw), 2, version=58)
    assert [item.advantage for item in before] == [-1.0, 1.0] and all(item.valid for item in before)
    assert [item.advantage for item in after] == [0.0, 0.0]
    assert [item.valid for item in after] == [True, False]  # no verdict, and certainty trains nothing any more


@given(schedule=schedules(), at=version)
def test_schedules_are_bounded_by_their_factors(schedule, at):
    found = TypeAdapter(Schedule).validate_python(schedule).factor(at)
    ends = schedule.get("factors") or [schedule["before"], schedule["after"]]
    assert min(ends) - 1e-12 <= found <= max(ends) + 1e-12


# ---- unanimous groups, clips, ids --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("verdicts", "skipped"),
    [
        ([1.0, 1.0, 1.0], True),
        ([0.0, 0.0, 0.0], True),
        ([0.0, None, 0.0], True),
        ([1.0, 0.0, 1.0], False),
        ([None, None, None], False),
        ([1.0], True),
    ],
)
def test_groups_that_teach_nothing_are_skipped(verdicts, skipped):
    spec = spec_of(RewardTerm(name="a"), RewardTerm(name="v", weight=0), skip_unanimous="v")
    raw = {"a": [float(place) for place in range(len(verdicts))], "v": verdicts}
    assert bool(unanimous(spec, raw)) == skipped
    found = combine_scores(spec, components(raw), len(verdicts))
    assert all(item.valid != skipped for item in found)
    if skipped:
        assert all((item.reward, item.advantage) == (None, 0.0) for item in found)
        assert "v" in unanimous(spec, raw)


def test_clips():
    spec = spec_of(RewardTerm(name="a", clip=(-1, 1)), normalize="none", clip=0.5)
    raw = {"a": [5.0, -0.25, -9.0]}
    assert advantages(spec, counted(spec, raw), 3) == [0.5, -0.25, -0.5]
    assert [item.reward for item in combine_scores(spec, components(raw), 3)] == [1.0, -0.25, -1.0]


def test_extreme_weights_and_factors_stay_finite():
    wild = RewardTerm(name="a", weight=1e300, schedule={"kind": "alternate", "factors": [1e300, -1e300]})
    spec = spec_of(wild, normalize="none")
    found = combine_scores(spec, components({"a": [1e308, -1e308, 0.0]}), 3)
    assert all(math.isfinite(item.advantage) and abs(item.advantage) <= LIMIT for item in found)


def test_spelling_out_a_default_keeps_the_id_and_any_change_of_meaning_changes_it():
    plain = RewardSpec.model_validate({"rewards": [{"name": "a"}]})
    spelt = RewardSpec.model_validate(
        {
            "rewards": [{"name": "a", "weight": 1.0, "gate": None, "params": {}}],
            "combine": {"order": "normalize_then_sum", "normalize": "group_std", "eps": 1e-4, "clip": None},
        }
    )
    assert plain.spec_id == spelt.spec_id
    others = [
        {"rewards": [{"name": "a", "weight": 2}]},
        {"rewards": [{"name": "a", "clip": [0, 1]}]},
        {"rewards": [{"name": "a", "gate": {"reward": "a", "at_least": 0}}]},
        {"rewards": [{"name": "a", "schedule": {"kind": "switch", "at": 1}}]},
        {"rewards": [{"name": "a"}], "combine": {"clip": 5}},
        {"rewards": [{"name": "a"}], "combine": {"skip_unanimous": "a"}},
    ]
    ids = [RewardSpec.model_validate(other).spec_id for other in others]
    assert len({plain.spec_id, *ids}) == len(others) + 1
