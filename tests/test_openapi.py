"""The reward server under everything that its own OpenAPI document allows, and forbids: no 5xx, no way past a token."""

import os
import re

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis.errors import Unsatisfiable
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import response_schema_conformance
from served import served

from reward_server.app import Settings, create
from reward_server.playground import page
from reward_server.rewards import REWARDS
from services.access import HttpSettings
from services.gate import OPEN_FOLDER, OPEN_PATHS

pytestmark = pytest.mark.alone

API = {"Authorization": "Bearer api"}
ADMIN = {"Authorization": "Bearer admin"}
COMPUTING = {"/v1/rewards", "/v1/score", "/v1/specs/preview", "/get_reward", "/reward"}
"""What may be posted without the admin token: it changes nothing. Any other POST has to refuse."""
ERRORS = "application/problem+json"
EXAMPLES = int(os.environ.get("RLIF_FUZZ_EXAMPLES", 25))
"""Per operation and mode; more by hand, for longer."""


@pytest.fixture(scope="module")
def app(tiny_model):
    guarded = HttpSettings(api_token="api", admin_token="admin")
    return create(Settings(http=guarded, model=str(tiny_model), default_spec="intuitor"))


@pytest.fixture(scope="module")
def url(app):
    with served(app) as url:
        yield url


@pytest.fixture(scope="module")
def document(url):
    return httpx.get(url + "/openapi.json").json()


# ---- fuzzing -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def schema(url):
    return schemathesis.openapi.from_url(url + "/openapi.json")


def mend(case):
    """Rules that a schema cannot say: names that exist, one prompt, one completion."""
    body = case.body
    if case.method == "PUT":
        case.path_parameters["name"] = "mended"
        for place, term in enumerate(body["rewards"]):
            names = sorted(REWARDS)
            term.update(name=names[len(str(body)) % len(names)], label=f"term {place}", gate=None)
    elif case.path == "/v1/rewards":
        body["spec"] = "mended" if len(str(body)) % 2 else "intuitor"
        for group in body["groups"]:
            group.pop("prompt_token_ids", None)
            group["task"].update(messages=None, prompt=str(group["task"].get("prompt")), reference={"answer": "4"})
            for completion in group["completions"]:
                completion.pop("token_ids", None)
    elif case.path == "/v1/score":
        body["metrics"] = ["self_certainty", "token_entropy"]
        for item in body["items"]:
            item.update(messages=None, prompt_token_ids=None, prompt=str(item.get("prompt")))
            item.update(completion_token_ids=None, completion=str(item.get("completion")))


def answer_to(case):
    response = case.call(headers={**ADMIN, "X-Deadline-Seconds": "60"})
    case.validate_response(response, checks=[not_a_server_error, response_schema_conformance])
    if response.status_code >= 400:
        assert response.headers["content-type"][0] == ERRORS
        said = response.json()
        assert said["status"] == response.status_code and said["title"] and said["request_id"]
    return response


def check(case):
    answer_to(case)


def fuzz(schema, mode, check, only=None):
    """Every operation of the document, with requests that keep to it (positive) or break it somewhere (negative)."""
    bounds = settings(
        max_examples=EXAMPLES, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
    )
    for found in schema.get_all_operations():
        operation = found.ok()
        if only and operation.label not in only:
            continue
        try:
            bounds(given(case=operation.as_strategy(generation_mode=mode))(check))()
        except Unsatisfiable:  # nothing to break: no parameter, or one that may be any text
            assert mode == GenerationMode.NEGATIVE and not list(operation.body), operation.label


@pytest.mark.parametrize("mode", GenerationMode, ids=lambda mode: mode.value)
def test_no_request_is_answered_by_a_5xx(schema, mode):
    fuzz(schema, mode, check)


def test_no_sensible_request_is_answered_by_a_5xx(schema):
    answered: dict[str, set[int]] = {}

    def mended(case):
        mend(case)
        answered.setdefault(case.operation.label, set()).add(answer_to(case).status_code)

    fuzz(schema, GenerationMode.POSITIVE, mended, {"PUT /v1/specs/{name}", "POST /v1/rewards", "POST /v1/score"})
    assert len(answered) == 3 and all(200 in statuses for statuses in answered.values()), answered


# ---- tokens --------------------------------------------------------------------------------------------------------


def operations(document):
    """(method, path with its parameters filled in, path as documented) of every documented operation."""
    for path, methods in document["paths"].items():
        for method in methods:
            yield method.upper(), re.sub(r"{\w+}", "a-name", path), path


def ask(url, method, path, headers):
    return httpx.request(method, url + path, headers=headers, json={}, timeout=60)


def test_every_route_wants_a_token_but_the_open_ones(url, document):
    asked = 0
    for method, path, _ in operations(document):
        answer = ask(url, method, path, {})
        assert (answer.status_code == 401) == (path not in OPEN_PATHS), (method, path, answer.text)
        if path not in OPEN_PATHS:
            assert ask(url, method, path, {"Authorization": "Bearer wrong"}).status_code == 401
            asked += 1
    assert asked >= 10


def test_every_route_that_changes_state_wants_the_admin_token(url, document):
    changing = set()
    for method, path, documented in operations(document):
        if method in ("PUT", "DELETE", "PATCH") or method == "POST" and documented not in COMPUTING:
            refused = ask(url, method, path, API)
            assert (refused.status_code, refused.json()["title"]) == (403, "Admin token needed"), (method, path)
            assert ask(url, method, path, ADMIN).status_code in (404, 409, 422), (method, path)
            changing.add((method, documented))
        elif method == "POST":
            assert ask(url, method, path, API).status_code == 422, (method, path)
    assert {("PUT", "/v1/specs/{name}"), ("DELETE", "/v1/specs/{name}")} <= changing


def test_no_route_hides_from_the_document(app, document):
    """But the documents themselves and the playground's pages, which have their own tests."""
    hidden = {path for path in every_path(app) if path not in document["paths"] and path not in OPEN_PATHS}
    assert hidden <= page.PATHS | {"/playground/{name}", OPEN_FOLDER.rstrip("/"), "/docs/oauth2-redirect"}, hidden
    assert len(document["paths"]) >= 10


def every_path(app):
    return {route.path for route in app.routes}
