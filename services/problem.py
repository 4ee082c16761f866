"""Error answers: RFC 9457 `application/problem+json`, with the field at fault and the request's id."""

from typing import TYPE_CHECKING, Any

import orjson
from pydantic import ValidationError
from starlette.responses import Response

from services.request import request_id

if TYPE_CHECKING:  # half a second in every command that only looks at a recipe's rewards
    from fastapi.exceptions import RequestValidationError


class Problem(Exception):
    """An error answer. `field` names the part of the request at fault; `retry_after` is in seconds."""

    def __init__(
        self, status: int, title: str, detail: str = "", field: str | None = None, retry_after: float | None = None
    ):
        super().__init__(f"{status} {title}: {detail}")
        self.status, self.title, self.detail = status, title, detail
        self.field, self.retry_after = field, retry_after


def problem_response(problem: Problem, errors: list[dict[str, str]] | None = None) -> Response:
    """The answer; `errors` are [{"field", "message"}], made from the problem's own field when left out."""
    if errors is None and problem.field:
        errors = [{"field": problem.field, "message": problem.detail or problem.title}]
    body = {"type": "about:blank", "title": problem.title, "status": problem.status, "request_id": request_id.get()}
    if problem.detail:
        body["detail"] = problem.detail
    if errors:
        body["errors"] = errors
    headers = {}
    if problem.retry_after is not None:
        headers["Retry-After"] = str(max(1, round(problem.retry_after)))
    if problem.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return Response(orjson.dumps(body), problem.status, headers, "application/problem+json")


def field_name(parts: tuple[Any, ...]) -> str:
    """("items", 0, "prompt") -> items[0].prompt"""
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in parts)
    return text.lstrip(".") or "body"


def field_errors(error: "RequestValidationError | ValidationError") -> list[dict[str, str]]:
    """What pydantic found wrong, at most 20 faults: [{"field", "message"}]."""
    errors = []
    for fault in error.errors()[:20]:
        location = tuple(fault["loc"])
        parts = location[1:] if location and location[0] == "body" else location
        field, message = field_name(parts), fault["msg"].removeprefix("Value error, ")
        if fault["type"] == "json_invalid":
            field, message = "body", f"not valid JSON: {fault.get('ctx', {}).get('error', message)}"
        elif not isinstance(fault.get("input"), dict | list | bytes):
            message = f"{message} (got {fault.get('input')!r:.100})"
        errors.append({"field": field, "message": message})
    return errors


def validation_problem(error: "RequestValidationError") -> Response:
    """What pydantic found wrong with a request, each fault under the name of its field."""
    errors = field_errors(error)
    detail = "; ".join(f"{item['field']}: {item['message']}" for item in errors[:3])
    return problem_response(Problem(422, "The request is not valid", detail), errors)
