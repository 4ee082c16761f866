"""Reward specs that come with the server, and what makes a spec computable here."""

from pydantic import ValidationError

from reward_server.presets import PRESETS
from reward_server.reward import Params
from reward_server.rewards import REWARDS
from services.contract import Task
from services.spec import RewardSpec, RewardTerm

BUILT_IN: dict[str, RewardSpec] = {
    **{name: RewardSpec(rewards=[RewardTerm(name=name)]) for name in REWARDS},
    **PRESETS,
}
"""Each reward with its default parameters, and the presets."""


class SpecError(ValueError):
    """A spec that cannot be computed; `field` is the place in the spec."""

    def __init__(self, field: str, reason: str):
        super().__init__(f"{field}: {reason}" if field else reason)
        self.field, self.reason = field, reason


def named_spec(name: str) -> RewardSpec:
    """A built-in spec. Raises SpecError listing the names."""
    if name not in BUILT_IN:
        raise SpecError("", f"there is no spec {name!r}; built in: {', '.join(BUILT_IN)}")
    return BUILT_IN[name]


def check_spec(spec: RewardSpec, has_scorer: bool = True) -> dict[str, Params]:
    """The parameters of each term by key. Raises SpecError naming what is unknown, wrong, or not computable here."""
    found = {}
    for place, term in enumerate(spec.rewards):
        reward = REWARDS.get(term.name)
        if reward is None:
            raise SpecError(f"rewards[{place}].name", f"there is no reward {term.name!r}; known: {', '.join(REWARDS)}")
        reason = reward.missing(has_scorer)
        if reason is not None:
            raise SpecError(f"rewards[{place}].name", f"{term.name} cannot be computed here: {reason}")
        try:
            found[term.key] = reward.params.model_validate(term.params)
        except ValidationError as error:
            fault = error.errors(include_url=False)[0]
            where = ".".join([f"rewards[{place}].params", *(str(part) for part in fault["loc"])])
            message = f"{fault['msg'].removeprefix('Value error, ')} (got {fault['input']!r:.100})"
            if fault["type"] == "extra_forbidden":
                message = f"no such parameter; {term.name} takes: {', '.join(reward.params.model_fields) or 'none'}"
            raise SpecError(where, message) from error
    return found


def is_routed(term: RewardTerm, task: Task) -> bool:
    return term.sources is None or task.source in term.sources
