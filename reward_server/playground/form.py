"""The page's form: from its fields to the API's requests, and from the API's errors back to its fields."""

import json
import re
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qs

from pydantic import ValidationError

from services.api import RewardGroup, ScoreRequest
from services.problem import Problem, field_errors

MOST_COMPLETIONS = 16
MOST_BYTES = 2 * 2**20
"""Of a form, urlencoded."""
SHADINGS = ("self_certainty", "token_entropy", "mean_logprob")
"""Metrics with a value per token that the page can shade by."""
METRICS = (*SHADINGS, "sequence_logprob", "perplexity")

Faults = dict[str, str]
"""Messages by field: an attribute of Form, `completion-N`, or `form` for what belongs to none of them."""


class FormFault(Exception):
    """The form cannot become a request."""

    def __init__(self, faults: Faults):
        super().__init__(str(faults))
        self.faults = faults


@dataclass
class Form:
    """The fields as they were typed. `task`: what else the API's task holds, as JSON (`source`, `reference`, ...)."""

    kind: str = "chat"
    system: str = ""
    prompt: str = ""
    answer: str = ""
    completions: list[str] = field(default_factory=lambda: [""])
    spec: str = ""
    temperature: str = "1"
    version: str = ""
    task: str = ""
    shading: str = SHADINGS[0]

    def group(self) -> RewardGroup:
        """What `POST /v1/rewards` would be sent. Raises FormFault."""
        more = self._more()
        reference = more.get("reference") or {}
        if self.answer and isinstance(reference, dict):
            reference = {**reference, "answer": self.answer}
        task = {**more, "task_id": "playground", **self._prompt()}
        group = {
            "group_id": "playground",
            "task": {**task, "reference": reference} if reference else task,
            "completions": [{"text": text} for text in self._completions()],
        }
        if self.version.strip():
            group["weight_version"] = {"version": self.version.strip()}
        try:
            return RewardGroup.model_validate(group)
        except ValidationError as error:
            raise FormFault(faults_of("groups[0]", error)) from error

    def score_request(self) -> ScoreRequest:
        """What `POST /v1/score` would be sent, for values per token. Raises FormFault."""
        body = {
            "items": [{**self._prompt(), "completion": text} for text in self._completions()],
            "metrics": list(METRICS),
            "per_token": True,
            "temperature": self.temperature,
        }
        try:
            return ScoreRequest.model_validate(body)
        except ValidationError as error:
            raise FormFault(faults_of("", error)) from error

    def _prompt(self) -> dict[str, Any]:
        if self.kind == "text":
            return {"prompt": self.prompt}
        if not self.prompt:
            raise FormFault({"prompt": "a chat needs a user message (got '')"})
        system = [{"role": "system", "content": self.system}] if self.system else []
        return {"messages": [*system, {"role": "user", "content": self.prompt}]}

    def _completions(self) -> list[str]:
        if self.completions == [""]:
            raise FormFault({"completion-0": "at least one completion is needed (got '')"})
        return self.completions

    def _more(self) -> dict[str, Any]:
        if not self.task.strip():
            return {}
        try:
            more = json.loads(self.task)
        except (ValueError, RecursionError) as error:
            raise FormFault({"task": f"not valid JSON: {error}"}) from error
        if not isinstance(more, dict):
            raise FormFault({"task": f"a JSON object is needed (got {self.task!r:.100})"})
        return more


def read(body: bytes) -> tuple[Form, str]:
    """The form of an urlencoded body, and which button sent it. Raises Problem: 400 for what no page of ours sends."""
    try:
        given = parse_qs(body.decode(), keep_blank_values=True, max_num_fields=MOST_COMPLETIONS + 20)
    except ValueError as error:
        raise Problem(400, "The form cannot be read", str(error)) from error

    def one(name: str) -> str:
        # A browser sends line breaks as CRLF, whatever was typed or pasted.
        return given.get(name, [""])[0].replace("\r\n", "\n")

    # Blank ones are places where nothing was typed.
    completions = [text.replace("\r\n", "\n") for text in given.get("completion", []) if text]
    if len(completions) > MOST_COMPLETIONS:
        raise Problem(400, "Too many completions", f"at most {MOST_COMPLETIONS} (got {len(completions)})")
    shading = one("shading")
    form = Form(
        kind="text" if one("kind") == "text" else "chat",
        system=one("system"),
        prompt=one("prompt"),
        answer=one("answer"),
        completions=completions or [""],
        spec=one("spec"),
        temperature=one("temperature") or "1",
        version=one("version"),
        task=one("task"),
        shading=shading if shading in SHADINGS else SHADINGS[0],
    )
    return form, one("action")


# ---- the API's errors, in the form's words -----------------------------------------------------------------------

PLACES = [
    (r"(?:groups\[0\]\.)?completions\[(\d+)\]", "completion-{}"),
    (r"items\[(\d+)\]\.completion", "completion-{}"),
    (r"items\[\d+\]\.(?:prompt|messages)", "prompt"),
    (r"groups\[0\]\.task(?:\.(?:prompt|messages).*)?$", "prompt"),
    (r"groups\[0\]\.task\.reference\.answer$", "answer"),
    (r"groups\[0\]\.task\.", "task"),
    (r"groups\[0\]\.weight_version", "version"),
    (r"(spec|temperature)$", "{}"),
]
"""Patterns of the API's field names, first match wins, and the form's field for each."""


def place_of(field_name: str) -> str:
    """The form's field for a field of the API's requests."""
    for pattern, place in PLACES:
        if found := re.match(pattern, field_name):
            return place.format(*found.groups())
    return "form"


def faults_of(prefix: str, error: ValidationError | Problem) -> Faults:
    """Messages by field of the form; `prefix` leads to the object that was validated."""
    if isinstance(error, Problem):
        message = f"{error.title}: {error.detail}" if error.detail else error.title
        return {place_of(error.field or ""): message}
    faults: Faults = {}
    for fault in field_errors(error):
        place = place_of(".".join(part for part in (prefix, fault["field"]) if part))
        faults.setdefault(place, fault["message"] if place != "task" else f"{fault['field']}: {fault['message']}")
    return faults
