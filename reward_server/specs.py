"""Reward specs that come with the server, and what makes a spec computable here."""

import reprlib
from graphlib import CycleError, TopologicalSorter

from pydantic import ValidationError

from reward_server.presets import PRESETS
from reward_server.reward import UNAVAILABLE, Params, Reward
from reward_server.rewards import REWARDS
from services.spec import RewardSpec, RewardTerm

EVERY_PART = frozenset(UNAVAILABLE)
"""A server that lacks nothing."""


def _stands_alone(reward: Reward) -> bool:
    """Whether a spec of this reward alone, with its default parameters, makes sense."""
    if any(field.is_required() for field in reward.params.model_fields.values()):
        return False
    return reward.depends is None or not reward.depends(reward.params())


def built_in() -> dict[str, RewardSpec]:
    """Each reward that stands alone, with its default parameters, and the presets."""
    alone = {name: RewardSpec(rewards=[RewardTerm(name=name)]) for name in REWARDS if _stands_alone(REWARDS[name])}
    return {**alone, **PRESETS}


class SpecError(ValueError):
    """A spec that cannot be computed; `field` is the place in the spec."""

    def __init__(self, field: str, reason: str):
        super().__init__(f"{field}: {reason}" if field else reason)
        self.field, self.reason = field, reason


def named_spec(name: str) -> RewardSpec:
    """A built-in spec. Raises SpecError listing the names."""
    found = built_in()
    if name not in found:
        raise SpecError("", f"there is no spec {name!r}; built in: {', '.join(found)}")
    return found[name]


def check_spec(spec: RewardSpec, have: frozenset[str] = EVERY_PART) -> dict[str, Params]:
    """The parameters of each term by key. Raises SpecError naming what is unknown, wrong, or not computable here.

    `have`: which of `EVERY_PART` the server has.
    """
    found = {}
    for place, term in enumerate(spec.rewards):
        reward = REWARDS.get(term.name)
        if reward is None:
            raise SpecError(f"rewards[{place}].name", f"there is no reward {term.name!r}; known: {', '.join(REWARDS)}")
        reason = reward.missing(have)
        if reason is not None:
            raise SpecError(f"rewards[{place}].name", f"{term.name} cannot be computed here: {reason}")
        try:
            found[term.key] = reward.params.model_validate(term.params)
        except ValidationError as error:
            raise _refused_params(place, term, reward, error) from error
    _check_dependencies(spec, found)
    return found


def _refused_params(place: int, term: RewardTerm, reward: Reward, error: ValidationError) -> SpecError:
    fault = error.errors(include_url=False)[0]
    where = ".".join([f"rewards[{place}].params", *(str(part) for part in fault["loc"])])
    message = fault["msg"].removeprefix("Value error, ")
    if fault["type"] != "secret":  # somebody may have put a key where its name belongs
        given = fault["input"]  # which may be nested more deeply than repr can follow
        message += f" (got {reprlib.repr(given) if isinstance(given, dict | list) else repr(given):.100})"
    if fault["type"] == "extra_forbidden":
        message = f"no such parameter; {term.name} takes: {', '.join(reward.params.model_fields) or 'none'}"
    return SpecError(where, message)


def dependencies(term: RewardTerm, params: Params) -> tuple[str, ...]:
    """Keys of the terms that the term's reward builds on."""
    depends = REWARDS[term.name].depends
    return () if depends is None else depends(params)


def _check_dependencies(spec: RewardSpec, params: dict[str, Params]) -> None:
    graph = {term.key: dependencies(term, params[term.key]) for term in spec.rewards}
    for place, term in enumerate(spec.rewards):
        for key in graph[term.key]:
            if key not in graph:
                needed = f"{term.name} builds on the reward {key!r}, which is not a term of the spec"
                raise SpecError(f"rewards[{place}].params", f"{needed}: add it (weight 0 only measures it)")
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        raise SpecError("rewards", f"the terms {' <- '.join(error.args[1])} build on each other") from error


def is_routed(term: RewardTerm, source: str) -> bool:
    """Whether the term counts for tasks of that source."""
    return term.sources is None or source in term.sources
