"""What a spec makes of scores that were measured before: a pure recombination, for those who think of changing it."""

from reward_server.combine import combine_scores, unanimous
from reward_server.specs import SpecError, check_spec, is_routed
from services.api import PreviewGroup, PreviewResponse
from services.contract import GroupScores, Outcome, Score
from services.problem import Problem
from services.spec import RewardSpec


def preview(spec: RewardSpec, groups: list[PreviewGroup], have: frozenset[str]) -> PreviewResponse:
    """A term without scores in a group it is routed to counts as missing there, and is named.

    Raises Problem (422): the spec cannot be computed here, or its schedule goes by a version that a group lacks.
    """
    try:
        check_spec(spec, have)
    except SpecError as error:
        field = f"spec.{error.field}" if error.field else "spec"
        raise Problem(422, "The reward spec is not valid", error.reason, field) from error
    missing = set[str]()
    answers = []
    for place, group in enumerate(groups):
        if spec.is_scheduled and group.weight_version is None:
            detail = "the spec's schedule goes by the version of the policy that made the completions"
            raise Problem(422, "A weight version is missing", detail, f"groups[{place}].weight_version")
        components = {}
        for term in spec.rewards:
            routed = is_routed(term, group.source)
            if routed and term.key in group.components:
                components[term.key] = list(group.components[term.key])
            else:
                why = "not measured" if routed else f"not routed to source {group.source!r}"
                missing |= {term.key} if routed else set()
                components[term.key] = [Score.failed(Outcome.skipped, why)] * group.size
        version = group.weight_version.version if group.weight_version else 0
        answers.append(
            GroupScores(
                group_id=group.group_id,
                scores=combine_scores(spec, components, group.size, version),
                spec_id=spec.spec_id,
                skipped=unanimous(spec, {key: [score.value for score in column] for key, column in components.items()}),
            )
        )
    return PreviewResponse(groups=answers, spec_id=spec.spec_id, missing=sorted(missing))
