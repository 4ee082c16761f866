"""The reward server's page over real HTTP: what it shows is what the API answers, and nothing typed becomes markup."""

import json
import re
import shlex
import time
from html.parser import HTMLParser
from pathlib import Path

import httpx
import numpy as np
import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from served import served
from tokenizers.pre_tokenizers import ByteLevel

from reward_server.app import Settings, create
from reward_server.playground.form import METRICS, place_of
from reward_server.scorer.transformers import TransformersScorer
from reward_server.spec_store import MemoryStore
from services.access import HttpSettings
from services.api import ScoreResult
from services.pages import session
from services.pages.shading import NOTHING, SHADINGS, STEPS, bytes_of, number, parts, scale, tokens
from services.spec import RewardSpec

CSS = Path("services/pages/static/page.css")
HOSTILE = "\"'></textarea></option></td><script>alert(1)</script><img src=x onerror=alert(2)>{{ 7 * 7 }}"
TWO_TERMS = {
    "rewards": [{"name": "self_certainty"}, {"name": "exact_match", "weight": 0.5}],
    "combine": {"normalize": "group_std"},
}


class Page(HTMLParser):
    """What a page holds: rows of cells per table, values of fields, every element, and its visible text."""

    def __init__(self, text: str):
        super().__init__()
        self.tables: list[list[list[str]]] = []
        self.fields: dict[str, list[str]] = {}
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self._into: list | None = None
        self._in_cell = False
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        self.elements.append((tag, attributes))
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")
            self._in_cell = True
        elif tag == "textarea":
            self._into = self.fields.setdefault(attributes["name"], [])
            self._into.append("")
        elif tag == "input" and attributes.get("type") != "radio":
            self.fields.setdefault(attributes["name"], []).append(attributes.get("value", ""))
        elif tag == "option" and "selected" in attributes:
            self.fields["spec"] = [attributes["value"]]

    def handle_endtag(self, tag):
        if tag == "textarea":
            self._into[-1] = self._into[-1].removeprefix("\n")
            self._into = None
        elif tag in ("td", "th"):
            self._in_cell = False

    def handle_data(self, data):
        if self._into is not None:
            self._into[-1] += data
        elif self._in_cell:
            self.tables[-1][-1][-1] += data
        self.text += data

    def named(self, **wanted):
        return [found for _, found in self.elements if wanted.items() <= found.items()]

    def tokens(self):
        return [
            found for tag, found in self.elements if tag == "span" and (found.get("class") or "").startswith("token")
        ]


def words(cell: str) -> list[str]:
    return cell.replace("\u2212", "-").split()


@pytest.fixture(scope="module")
def rules():
    """A server without a model."""
    with served(create(Settings())) as url, httpx.Client(base_url=url, timeout=60) as client:
        yield client


@pytest.fixture(scope="module")
def scorer(tiny_model):
    with served(create(Settings(model=str(tiny_model), default_spec=RewardSpec.model_validate(TWO_TERMS)))) as url:
        with httpx.Client(base_url=url, timeout=60) as client:
            yield client


@pytest.fixture(scope="module")
def guarded_url():
    settings = HttpSettings(api_token="user-token", admin_token="admin-token")
    with served(create(Settings(http=settings))) as url:
        yield url


@pytest.fixture
def guarded(guarded_url):
    """A client without cookies."""
    with httpx.Client(base_url=guarded_url, timeout=60) as client:
        yield client


def send(client, status=200, **fields) -> Page:
    form = {"kind": "chat", "prompt": "2+2?", "completion": ["4", "five"], "spec": "default", **fields}
    answer = client.post("/", data=form)
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"].startswith("text/html")
    return Page(answer.text)


# ---- what is shown -------------------------------------------------------------------------------------------------


def test_first_visit(scorer, tiny_model):
    answer = scorer.get("/")
    assert answer.status_code == 200
    page = Page(answer.text)
    assert str(tiny_model) in page.text and "288" in page.text and "0.0" in page.text
    assert page.fields["spec"] == ["default"] and len(page.fields["completion"]) == 3  # one of them in the template
    options = [found["value"] for tag, found in page.elements if tag == "option"]
    names = [item["name"] for item in scorer.get("/v1/specs").json()["specs"]]
    assert sorted(options) == sorted(names) and {"intuitor", "grpo", "default"} <= set(names)
    assert "1 × self_certainty + 0.5 × exact_match" in page.text


def test_every_control_has_a_name_and_ids_are_unique(scorer):
    page = send(scorer, answer="4")
    ids = [found["id"] for _, found in page.elements if "id" in found]
    template = "completion-0"  # the template's copy is not in the document
    assert (
        sorted(set(ids)) == sorted(one for one in ids if one != template) + [template] or len(set(ids)) == len(ids) - 1
    )
    labelled = {found["for"] for tag, found in page.elements if tag == "label" and "for" in found}
    for tag, found in page.elements:
        if tag in ("textarea", "select") or (
            tag == "input" and found["type" if "type" in found else "name"] != "radio"
        ):
            assert found["id"] in labelled
        if "aria-describedby" in found:
            assert set(found["aria-describedby"].split()) <= set(ids)
    assert [found["lang"] for tag, found in page.elements if tag == "html"] == ["en"]
    assert sum(tag == "caption" for tag, _ in page.elements) == len(page.tables)


def test_values_are_those_of_the_api(scorer):
    texts = ["4", "five, or not\n", "4"]
    page = send(scorer, completion=texts, answer="4", temperature="0.7")
    items = [{"messages": [{"role": "user", "content": "2+2?"}], "completion": text} for text in texts]
    body = {"items": items, "metrics": list(METRICS), "per_token": True, "temperature": 0.7}
    scored = scorer.post("/v1/score", json=body).json()["results"]
    tables = [table for table in page.tables if table[0][:2] == ["#", "Token"]]
    assert len(tables) == 3
    for table, result in zip(tables, scored, strict=True):
        assert len(table) == result["n_tokens"] + 1
        for column, metric in enumerate(SHADINGS):
            shown = [float(words(row[2 + column])[0]) for row in table[1:]]
            assert shown == pytest.approx(result["per_token"][metric], abs=5.1e-4)
        for value in result["scores"].values():
            assert number(value) in page.text
    group = {
        "group_id": "g",
        "task": {"task_id": "t", "messages": items[0]["messages"], "reference": {"answer": "4"}},
        "completions": [{"text": text} for text in texts],
    }
    (rewarded,) = scorer.post("/v1/rewards", json={"groups": [group]}).json()["groups"]
    (table,) = [table for table in page.tables if table[0][0] == "Completion"]
    assert table[0] == ["Completion", "Advantage", "Reward", "self_certainty", "exact_match"]
    for row, score in zip(table[1:], rewarded["scores"], strict=True):
        certainty, match = score["components"]["self_certainty"], score["components"]["exact_match"]
        assert words(row[3]) == [f"{certainty['value']:.3f}", "ok"]
        assert words(row[4]) == [f"{match['value']:.3f}", match["outcome"]]
        assert float(words(row[2])[0]) == pytest.approx(score["reward"], abs=5.1e-4)
        assert float(words(row[1])[0]) == pytest.approx(score["advantage"], abs=5.1e-4)
    assert rewarded["spec_id"] in page.text


def test_the_commands_ask_the_same(scorer):
    page_text = scorer.post(
        "/",
        data={
            "kind": "chat", "system": "It's \"so\"", "prompt": "2+2?\u202e", "completion": ["4", "'; rm -rf $HOME `x`"],
            "answer": "4", "spec": "default", "task": '{"source": "gsm8k", "metadata": {"n": 1}}', "version": "3",
        },
    ).text  # fmt: skip
    commands = [
        re.sub(r"&#(\d+);", lambda found: chr(int(found[1])), text).replace("&amp;", "&")
        for text in re.findall(r"<pre[^>]*>(.*?)</pre>", page_text, re.S)
    ]
    answers = {}
    for command in commands:
        curl, _, url, _, header, _, body = shlex.split(command)
        assert curl == "curl" and "\u202e" not in command
        answer = httpx.post(url, content=body, headers=dict([header.split(": ")]), timeout=60)
        assert answer.status_code == 200, answer.text
        answers[httpx.URL(url).path] = (json.loads(body), answer.json())
    asked, scored = answers["/v1/score"]
    assert (
        asked["items"][1]["completion"] == "'; rm -rf $HOME `x`"
        and asked["items"][0]["messages"][0]["role"] == "system"
    )
    page = Page(page_text)
    shown = [token["title"].split("\n")[1].split()[1] for token in page.tokens()]
    values = [value for result in scored["results"] for value in result["per_token"]["self_certainty"]]
    assert shown == [number(value) for value in values]
    asked, rewarded = answers["/v1/rewards"]
    (group,) = asked["groups"]
    assert group["task"]["source"] == "gsm8k" and group["task"]["metadata"] == {"n": 1}
    assert group["weight_version"]["version"] == 3
    for score in rewarded["groups"][0]["scores"]:
        assert number(score["advantage"]) in page.text


def test_hidden_and_broken_characters_are_shown(scorer):
    page = send(scorer, completion=["a\n\té\u202e  <eos>after"], spec="length")
    titles = [token["title"].split("\n")[0] for token in page.tokens()]
    assert titles[0] == "1: “a”" and titles[1] == "2: “↵”" and titles[2] == "3: “\\t”"
    assert titles[3:5] == ["4: bytes C3, a part of a character", "5: bytes A9, a part of a character"]
    assert titles[5:8] == [
        f"{place}: bytes {byte}, a part of a character"
        for place, byte in zip((6, 7, 8), ("E2", "80", "AE"), strict=True)
    ]
    assert titles[8] == "9: “·”" and titles[10] == "11: “<eos>”" and len(titles) == 11
    assert "special" in page.tokens()[10]["class"]
    assert "5 more tokens after the one that ends the completion are not scored" in page.text


def test_long_completions_are_cut_on_the_page_and_scored_whole(scorer, monkeypatch):
    monkeypatch.setattr("reward_server.playground.results.MOST_TOKENS_SHOWN", 100)
    page = send(scorer, completion=["x" * 70, "y" * 70], spec="length")
    assert len(page.tokens()) == 100
    assert "The first 30 of 70 tokens are shown" in page.text
    whole = scorer.post(
        "/v1/score", json={"items": [{"messages": [{"role": "user", "content": "2+2?"}], "completion": "y" * 70}]}
    )
    assert number(whole.json()["results"][0]["scores"]["self_certainty"]) in page.text


def test_without_a_model_the_other_rewards_work(rules):
    page = Page(rules.get("/").text)
    assert page.fields["spec"] == ["grpo"]
    assert "runs without a scorer model" in page.text
    disabled = [found["value"] for tag, found in page.elements if tag == "option" and "disabled" in found]
    assert "intuitor" in disabled and "exact_match" not in disabled
    page = send(rules, spec="exact_match", answer="4")
    assert "Tokens are not shaded: this server runs without a scorer model" in page.text and not page.tokens()
    (table,) = [table for table in page.tables if table[0][0] == "Completion"]
    assert [words(row[3])[1] for row in table[1:]] == ["correct", "wrong"]
    assert [words(row[1])[0] for row in table[1:]] == ["+0.707", "-0.707"]
    refused = send(rules, 422, spec="intuitor")
    assert "it needs a scorer model" in refused.text and refused.named(id="spec")[0]["aria-invalid"] == "true"


def test_while_the_model_fails_the_rest_is_shown(scorer, monkeypatch):
    def broken(*_):
        raise RuntimeError("the device is gone")

    monkeypatch.setattr(TransformersScorer, "score", broken)
    page = send(scorer, 500, answer="4")
    assert "The model could not score the items" in page.text and not page.tokens()
    (table,) = [table for table in page.tables if table[0][0] == "Completion"]
    assert words(table[1][3])[:2] == ["–", "error"] and "the device is gone" in table[1][3]
    assert words(table[1][4]) == ["1.000", "correct"]


def test_a_group_out_of_training_says_so(scorer):
    spec = {"rewards": [{"name": "exact_match"}], "combine": {"skip_unanimous": "exact_match"}}
    assert scorer.put("/v1/specs/skipping", json=spec).status_code == 200
    page = send(scorer, spec="skipping", answer="4", completion=["4", "4"])
    assert "The spec leaves this group out of training" in page.text and "not valid" in page.text


# ---- what is wrong with a form -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "place", "message"),
    [
        ({"completion": [""]}, "completion-0", "at least one completion"),
        ({"prompt": ""}, "prompt", "a chat needs a user message"),
        ({"temperature": "0"}, "temperature", "greater than or equal to 0.0001 (got '0')"),
        ({"temperature": "warm"}, "temperature", "valid number"),
        ({"version": "-1"}, "version", "greater than or equal to 0"),
        ({"task": "{"}, "task", "not valid JSON"),
        ({"task": "[]"}, "task", "a JSON object is needed"),
        ({"task": '{"sauce": "x"}'}, "task", "sauce"),
        ({"task": '{"reference": {"tests": 3}}'}, "task", "reference.tests"),
        ({"spec": "nowhere"}, "spec", "there is no spec 'nowhere'"),
        ({"spec": "grpo"}, "answer", "the reward 'math_verify' needs it"),
        ({"completion": ["a", "x" * 2000]}, "completion-1", "more than the model's 1024 positions"),
        ({"kind": "text", "prompt": ""}, "prompt", "is empty"),
    ],
)
def test_errors_stand_beside_their_field(scorer, fields, place, message):
    page = send(scorer, 422, **{"answer": "", "spec": "self_certainty", **fields})
    (field,) = [found for found in page.named(id=place) if "name" in found][:1]
    assert field["aria-invalid"] == "true" and f"{place}-fault" in field["aria-describedby"]
    assert message in page.text and page.named(role="alert") and page.named(href=f"#{place}")


@pytest.mark.parametrize(
    ("field", "place"),
    [
        ("groups[0].task", "prompt"),
        ("groups[0].task.messages[0].content", "prompt"),
        ("items[3].messages", "prompt"),
        ("items[3].completion", "completion-3"),
        ("groups[0].completions[12].text", "completion-12"),
        ("groups[0].task.reference.answer", "answer"),
        ("groups[0].task.reference.answers", "task"),
        ("groups[0].task.reference.json_schema", "task"),
        ("groups[0].weight_version.version", "version"),
        ("spec", "spec"),
        ("rewards[0].params", "form"),
        ("", "form"),
    ],
)
def test_fields_of_the_api_in_the_form(field, place):
    assert place_of(field) == place


def test_requests_that_no_page_of_ours_sends(rules):
    form = {"content-type": "application/x-www-form-urlencoded"}
    for content, headers, status in [
        (b"prompt=%41&x=" + b"y" * 2**21, form, 413),
        (b'{"prompt": "a"}', {"content-type": "application/json"}, 415),
        (b"prompt=\xff", form, 400),
        (b"&".join([b"completion=a"] * 17), form, 400),
        (b"&".join([b"z=a"] * 200), form, 400),
        (b"prompt=a", {**form, "origin": "https://elsewhere.example"}, 403),
        (b"prompt=a", {**form, "origin": "null"}, 403),
        (b"prompt=a", {**form, "origin": f"http://{rules.base_url.host}"}, 403),
    ]:
        answer = rules.post("/", content=content, headers=headers)
        assert answer.status_code == status, answer.text[:500]
        assert answer.headers["content-type"].startswith("text/html") and 'role="alert"' in answer.text
    rebound = {**form, "host": "evil.example", "origin": "http://evil.example"}
    assert rules.post("/", content=b"prompt=a", headers=rebound).status_code == 421


def test_a_deadline_holds(scorer, monkeypatch):
    def slow(*_):
        time.sleep(4.5)
        raise RuntimeError

    monkeypatch.setattr(TransformersScorer, "score", slow)
    data = {"kind": "text", "prompt": "a", "completion": ["b"], "spec": "self_certainty"}
    answer = scorer.post("/", data=data, headers={"X-Deadline-Seconds": "4"})  # a tenth of it is for the page
    assert answer.status_code == 504 and "The scorer did not answer in time" in answer.text


def test_completions_are_added_and_removed_without_script(rules):
    page = send(rules, action="add")
    assert page.fields["completion"] == ["4", "five", "", ""]
    page = send(rules, action="remove-0")
    assert page.fields["completion"] == ["five", ""]
    page = send(rules, action="remove-0", completion=["only"])
    assert page.fields["completion"] == ["", ""]
    page = send(rules, action="add", completion=["x"] * 16)
    assert page.fields["completion"] == ["x"] * 16 + [""] and not page.tables[1:]


# ---- nothing typed becomes markup ----------------------------------------------------------------------------------


def check_harmless(answer):
    page = Page(answer.text)
    own = [{"src": f"/playground/{name}.js", "defer": None} for name in ("tokens", "page")]
    assert [found for tag, found in page.elements if tag == "script"] == own
    assert not [tag for tag, found in page.elements if tag == "img" or "onerror" in found]
    assert "style" not in {name for _, found in page.elements for name in found}
    assert "{{ 7 * 7 }}" in page.text
    policy = answer.headers["content-security-policy"]
    assert policy == (
        "default-src 'none'; style-src 'self'; script-src 'self'; img-src 'self' data:; "
        "connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
    )
    return page


def test_hostile_text_in_every_field(scorer):
    data = {
        "kind": "chat", "system": HOSTILE, "prompt": HOSTILE, "answer": HOSTILE, "completion": [HOSTILE, "4"],
        "spec": "default", "shading": HOSTILE, "task": json.dumps({"source": HOSTILE[:100]}),
    }  # fmt: skip
    page = check_harmless(scorer.post("/", data=data))
    assert page.fields["prompt"] == [HOSTILE] and page.fields["answer"] == [HOSTILE]
    check_harmless(scorer.post("/", data={**data, "temperature": HOSTILE, "version": HOSTILE, "action": HOSTILE}))
    check_harmless(scorer.post("/", data={**data, "spec": HOSTILE}))
    check_harmless(scorer.post("/", data={**data, "task": HOSTILE}))


def test_hostile_names_of_specs_and_terms(monkeypatch):
    """A name like this cannot be put; somebody with Redis at hand could write it."""
    spec = {"rewards": [{"name": "constant", "label": HOSTILE[:64]}]}
    entry = orjson.dumps({"version": 1, "spec": spec, "updated_at": 0.0})
    monkeypatch.setattr(MemoryStore, "__init__", lambda self: setattr(self, "entries", {HOSTILE: entry}))
    with served(create(Settings())) as url, httpx.Client(base_url=url, timeout=60) as client:
        check_harmless(client.get("/"))
        answer = client.post("/", data={"kind": "chat", "prompt": "a", "completion": ["b"], "spec": HOSTILE})
        assert answer.status_code == 200
        check_harmless(answer)


@settings(max_examples=60, deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\r\0")))
def test_what_was_typed_comes_back_unchanged(rules, text):
    page = send(rules, prompt=text, completion=[f"\n{text}"], answer="x", action="add")
    assert page.fields["prompt"] == [text]
    assert page.fields["completion"][0] == f"\n{text}"


# ---- tokens --------------------------------------------------------------------------------------------------------


@given(st.text())
def test_the_letters_of_byte_level_vocabularies_are_read_back(text):
    letters = "".join(piece for piece, _ in ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(text))
    assert (bytes_of(letters) or b"") == text.encode(errors="replace" if not text.isprintable() else "strict")


def test_other_spellings_of_bytes():
    assert bytes_of("<0xE2>") == b"\xe2" and bytes_of("<0xZZ>") is None and bytes_of("▁word") is None


def test_a_token_without_text_can_be_seen():
    values = {name: [1.0] for name in SHADINGS}
    result = ScoreResult(n_tokens=1, scores={}, per_token=values, tokens=[""])
    (token,) = tokens(result, [""], frozenset(), [scale(one, [result]) for one in SHADINGS.values()])
    assert [part.text for part in token.parts] == [NOTHING] and token.title.startswith("1: no text\n")


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_no_character_hides_or_vanishes(text):
    found = parts(text)
    plain = "".join(part.text for part in found if not part.is_mark)
    marks = [part.text for part in found if part.is_mark]
    assert all(
        character == "\n" or character == " " or (character.isprintable() and not character.isspace())
        for character in plain
    )
    hidden = [one for one in text if not (one.isprintable() or one == "\n") or (one.isspace() and one not in "\n ")]
    if text.strip(" ") or not text:
        assert len(marks) == len(hidden) + text.count("\n")
        assert [one for one in plain if one not in "\n"] == [one for one in text if one not in hidden and one != "\n"]
    else:
        assert marks == ["·" * len(text)] and not plain


VALUES = st.lists(st.floats(-50, 50), min_size=1, max_size=60)


@given(values=VALUES, metric=st.sampled_from(list(SHADINGS)))
def test_shades_grow_with_doubt(values, metric):
    made = scale(SHADINGS[metric], [ScoreResult(n_tokens=len(values), scores={}, per_token={metric: values})])
    low, high = np.percentile(values, [2, 98])
    assert sorted([made.sure, made.unsure]) == pytest.approx([low, high])
    steps = made.steps(values)
    doubt = values if metric == "token_entropy" else [-value for value in values]
    ordered = [step for _, step in sorted(zip(doubt, steps, strict=True), key=lambda pair: pair[0])]
    assert ordered == sorted(ordered) and set(steps) <= set(range(STEPS))
    if high > low:
        assert ordered[0] == 0 and ordered[-1] == STEPS - 1
    else:
        assert set(steps) == {0}


def luminance(color):
    channels = [int(color[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("dark", [False, True])
def test_shades_are_ordered_by_lightness_and_text_on_them_can_be_read(dark):
    light_part, dark_part = CSS.read_text().split("@media (prefers-color-scheme: dark)")
    colors = dict(re.findall(r"--([\w-]+): (#\w{6});", light_part))
    if dark:
        colors |= dict(re.findall(r"--([\w-]+): (#\w{6});", dark_part))
    shades = [luminance(colors.get(f"step-{step}", colors["panel"])) for step in range(STEPS)]
    assert sorted(shades, reverse=not dark) == shades and len(set(shades)) == STEPS
    for step, shade in enumerate(shades):
        ink = luminance(colors["on-strong" if step >= 5 else "ink"])
        assert (max(ink, shade) + 0.05) / (min(ink, shade) + 0.05) >= 4.5, step


def test_numbers():
    assert [number(value) for value in (-0.0001, -1.5, 2, 1e-9)] == ["0.000", "−1.500", "2.000", "0.000"]


# ---- tokens of the other kind: who may come in ----------------------------------------------------------------------


def test_the_page_asks_for_the_token(guarded):
    client = guarded
    answer = client.get("/")
    assert answer.status_code == 401 and answer.headers["www-authenticate"] == "Bearer"
    assert 'name="token"' in answer.text and "exact_match" not in answer.text
    assert client.post("/", data={"prompt": "a", "completion": "b", "spec": "length"}).status_code == 401
    assert client.get("/playground/page.css").status_code == 200
    assert client.get("/playground/session").status_code == 404
    wrong = client.post("/playground/session", data={"token": "user-tokem"})
    assert wrong.status_code == 401 and "not the one this server knows" in wrong.text and not client.cookies
    foreign = client.post(
        "/playground/session", data={"token": "user-token"}, headers={"origin": "http://evil.example"}
    )
    assert foreign.status_code == 403 and not client.cookies

    right = client.post(
        "/playground/session", data={"token": "user-token"}, headers={"origin": str(client.base_url).rstrip("/")}
    )
    assert right.status_code == 303 and right.headers["location"] == "/"
    cookie = right.headers["set-cookie"]
    assert "HttpOnly" in cookie and "SameSite=strict" in cookie and "Path=/" in cookie and "user-token" not in cookie
    assert client.get("/").status_code == 200
    page = send(client, spec="exact_match", answer="4")
    assert "+0.707" in page.text and "Authorization: Bearer $RLIF_API_TOKEN" in page.text
    assert client.get("/v1/specs").status_code == 401
    assert client.put("/v1/specs/a", json={"rewards": [{"name": "length"}]}).status_code == 401
    assert client.post("/", data={"prompt": "a"}, headers={"origin": "http://evil.example"}).status_code == 403

    assert client.post("/playground/session", data={"end": "1"}).status_code == 303
    assert client.get("/").status_code == 401


def test_a_bearer_token_opens_the_page_too(guarded):
    for token, status in [("user-token", 200), ("admin-token", 200), ("other", 401)]:
        assert guarded.get("/", headers={"Authorization": f"Bearer {token}"}).status_code == status


def test_sessions_cannot_be_forged_and_end(guarded):
    def status(cookie):
        return guarded.get("/", headers={"cookie": f"{session.COOKIE}={cookie}"}).status_code

    soon = int(time.time()) + 60
    good = f"{soon}.{session._signature(str(soon), 'user-token')}"
    assert status(good) == 200
    later = good.replace(str(soon), str(soon + 9999))
    other = f"{soon}.{session._signature(str(soon), 'admin-token')}"
    past = f"{soon - 120}.{session._signature(str(soon - 120), 'user-token')}"
    for cookie in (later, other, past, "", ".", f"{soon}.", "x.y", "user-token", good[:-1]):
        assert status(cookie) == 401, cookie


def test_an_admin_token_alone_leaves_the_page_open():
    with served(create(Settings(http=HttpSettings(admin_token="admin-token")))) as url:
        assert httpx.get(url).status_code == 200
