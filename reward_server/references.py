"""Fields of a task's reference beyond `answer` and `tests` that single rewards read (`choices`, `json_schema`, ...)."""

import reprlib
from typing import TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from services.api import RewardGroup
from services.problem import Problem


class Fields(BaseModel):
    """What a reward reads of the reference; everything else there is let be."""

    model_config = ConfigDict(extra="ignore", allow_inf_nan=False)


Wanted = TypeVar("Wanted", bound=Fields)


def read(wanted: type[Wanted], group: RewardGroup, field: str, reward: str) -> Wanted:
    """The reference's fields, checked. `field` is where the request holds the group.

    Raises Problem (422) naming the field that is missing or wrong: a fault of the data set, not of a completion.
    """
    reference = group.task.reference
    given = {} if reference is None else {**(reference.model_extra or {}), "answer": reference.answer}
    try:
        return wanted.model_validate(given)
    except ValidationError as error:
        fault = error.errors(include_url=False)[0]
        where = ".".join([f"{field}.task.reference", *(str(part) for part in fault["loc"])])
        task = f"task {group.task.task_id!r}, source {group.task.source!r}"
        message = fault["msg"].removeprefix("Value error, ")
        got = "" if fault["type"] == "missing" else f" (got {reprlib.repr(fault['input'])})"
        raise Problem(422, "A reference is not usable", f"{reward}: {message}{got} ({task})", where) from error
