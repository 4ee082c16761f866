"""`json_schema`: is the completion JSON of the demanded shape?

1 when the JSON in the completion validates against the schema, `partial` when it is JSON of another shape, else 0. The
schema is the parameter `json_schema`, or each task's own `reference.json_schema`: any draft that the jsonschema package
knows, 2020-12 where `$schema` says nothing. `$ref` works inside the schema alone; nothing is ever fetched, and `format`
is not asserted.

Outcomes: `correct`, `wrong` (detail: where and why), `no_answer` (no JSON found; value 0), `unparsable` (the
reference's schema is no schema, or refers outside), `timeout`, `error` (nested too deeply, or a number too long to
read). NaN and Infinity are no JSON. Caveat: a schema that demands little is met by `{}`.
"""

import asyncio
import json
import re
from itertools import islice
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator

from reward_server.json_text import decode, decode_at
from reward_server.references import Fields, read
from reward_server.reward import Context, Params, Reward
from services.api import RewardGroup
from services.contract import Outcome, Score

CHECK = "reward_server.rewards.json_schema:check"
MAX_SCHEMA, MAX_LEVELS = 100_000, 64


def _is_schema(schema: dict[str, Any] | None) -> dict[str, Any] | None:
    if not _is_flat(schema, MAX_LEVELS):
        raise ValueError(f"a schema has at most {MAX_LEVELS} levels")
    if schema is not None and len(json.dumps(schema)) > MAX_SCHEMA:
        raise ValueError(f"a schema has at most {MAX_SCHEMA} characters")
    return schema


def _is_flat(value: Any, levels: int) -> bool:
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return levels > 0 and all(_is_flat(item, levels - 1) for item in items)


Schema = Annotated[dict[str, Any] | None, AfterValidator(_is_schema)]


class JsonSchemaParams(Params):
    json_schema: Schema = Field(
        None,
        description="a JSON schema; none takes each task's `reference.json_schema`",
        examples=[{"type": "object", "required": ["answer"]}],
    )
    where: Literal["block", "whole", "first"] = Field(
        "block",
        description="`block`: the last fenced code block, or else the whole completion; `whole`: the whole completion; "
        "`first`: the first JSON object or array in it",
    )
    partial: float = Field(0.0, ge=0, le=1, description="what JSON that does not match the schema gets")

    @model_validator(mode="after")
    def is_usable(self) -> "JsonSchemaParams":
        if self.json_schema is not None and (fault := schema_fault(self.json_schema)):
            raise ValueError(f"json_schema: {fault}")
        return self


class SchemaOfTask(Fields):
    json_schema: Annotated[dict[str, Any], AfterValidator(_is_schema)]


async def score(group: RewardGroup, params: JsonSchemaParams, context: Context) -> list[Score]:
    schema = params.json_schema
    if schema is None:
        schema = read(SchemaOfTask, group, context.field, "json_schema").json_schema

    async def one(text: str) -> Score:
        payload = {"schema": schema, "text": text, "where": params.where}
        verdict = await context.workers.check(CHECK, payload, context.deadline, context.turn)
        if verdict.status != "ok":
            return Score.failed(Outcome(verdict.status), verdict.detail, verdict.seconds)
        outcome, detail = Outcome(verdict.result["outcome"]), verdict.result["detail"]
        if outcome is Outcome.unparsable:
            return Score.failed(outcome, detail, verdict.seconds)
        value = 1.0 if outcome is Outcome.correct else params.partial if verdict.result["is_json"] else 0.0
        return Score.of(value, outcome, detail, verdict.seconds)

    return list(await asyncio.gather(*(one(completion.text) for completion in group.completions)))


REWARD = Reward(
    name="json_schema",
    description="1 when the JSON in the completion validates against a JSON schema, else 0 (or `partial`).",
    needs=("jsonschema",),
    range=(0.0, 1.0),
    params=JsonSchemaParams,
    score=score,
)


# ---- from here on: inside a worker process, but for the schema of a spec ----------------------------------------

FENCED = re.compile(r"^```[^\n`]*\n(.*?)^```", re.DOTALL | re.MULTILINE)
OPENING = re.compile(r"[{\[]")
MAX_OPENINGS = 1000
"""Brackets that are tried for `first`: each vain try costs a reading of the text."""


def schema_fault(schema: dict[str, Any]) -> str:
    """Why this is no JSON schema, or nothing (also where the jsonschema package is not installed)."""
    try:
        from jsonschema import SchemaError
        from jsonschema.validators import Draft202012Validator, validator_for
    except ImportError:
        return ""
    try:
        validator_for(schema, default=Draft202012Validator).check_schema(schema)
    except SchemaError as error:
        return f"not a JSON schema: {error.json_path}: {error.message}"[:300]
    return ""


def _found(text: str, where: str) -> tuple[bool, Any]:
    """(whether there is JSON, the JSON). Raises ValueError for what was to be JSON and is not."""
    if where == "first":
        for opening in islice(OPENING.finditer(text), MAX_OPENINGS):
            try:
                return True, decode_at(text, opening.start())
            except ValueError:
                continue
        return False, None
    blocks = FENCED.findall(text) if where == "block" else []
    said = (blocks[-1] if blocks else text).strip()
    return (True, decode(said)) if said else (False, None)


def check(payload: dict[str, Any]) -> dict[str, Any]:
    """{"outcome", "detail", "is_json"}. Raises what `decode` does where there is no verdict."""
    from jsonschema.exceptions import best_match
    from jsonschema.validators import Draft202012Validator, validator_for
    from referencing import Registry
    from referencing.exceptions import Unresolvable

    def verdict(outcome: str, detail: str = "", is_json: bool = False) -> dict[str, Any]:
        return {"outcome": outcome, "detail": detail[:300], "is_json": is_json}

    schema = payload["schema"]
    if reason := schema_fault(schema):
        return verdict("unparsable", f"the reference's schema is {reason}")
    try:
        is_there, value = _found(payload["text"], payload["where"])
    except ValueError as error:
        return verdict("wrong", f"not JSON: {error}")
    if not is_there:
        return verdict("no_answer")
    validator = validator_for(schema, default=Draft202012Validator)(schema, registry=Registry())
    try:
        fault = best_match(validator.iter_errors(value))
    except Unresolvable as unresolvable:
        return verdict("unparsable", f"the schema refers to what is not in it: {unresolvable}")
    if fault is None:
        return verdict("correct", is_json=True)
    return verdict("wrong", f"{fault.json_path}: {fault.message}", is_json=True)
