"""`rlif eval` over real HTTP: a rollout server and a reward server with a tiny model, and a server of known answers."""

import asyncio
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import orjson
import pytest
from fastapi import FastAPI, Request, Response
from served import served

from services import separation
from services.api import ScoreItem
from services.clients import BlockingRewardClient, RolloutClient
from services.contract import Outcome, Score, Version
from services.evaluation import answers, ledger, report, run
from services.evaluation.grading import judges, open_groups
from services.evaluation.ledger import Answer, Verdict
from services.evaluation.protocol import PRESETS, asked
from services.evaluation.results import Results
from services.evaluation.sources import load
from services.evaluation.statistics import pass_at_k
from services.evaluation.tasks import BENCHMARKS
from services.startup import StartupError

pytestmark = pytest.mark.alone

ROOT = Path(__file__).parent.parent
SANDBOX = "bubblewrap" if shutil.which("bwrap") or os.environ.get("RLIF_REQUIRE_SANDBOX") else "none"
DRAWN = PRESETS["open_r1"].model_copy(update={"max_tokens": 12})


@pytest.fixture(scope="module")
def rollout_url(tiny_model):
    from rollout_server.app import Settings, create

    with served(create(Settings(str(tiny_model), device="cpu", threads=1, served_model_name="tiny"))) as url:
        yield url


@pytest.fixture(scope="module")
def reward_url(tiny_model):
    from reward_server.app import Settings, create

    settings = Settings(model=str(tiny_model), threads=1, verifier_workers=1, sandbox=SANDBOX)
    with served(create(settings)) as url:
        yield url


class Known:
    """Speaks OpenAI. `texts` by seed; a seed that is not there is refused. Every third call is too busy at first."""

    def __init__(self) -> None:
        self.texts: dict[int, str] = {}
        self.calls: list[dict] = []
        self.tokens: set[str | None] = set()
        self.busy = 0

    def app(self) -> FastAPI:
        app = FastAPI()

        @app.get("/v1/models")
        async def models(request: Request):
            self.tokens.add(request.headers.get("authorization"))
            return {"data": [{"id": "known"}]}

        @app.post("/v1/chat/completions")
        @app.post("/v1/completions")
        async def complete(request: Request):
            body = await request.json()
            self.tokens.add(request.headers.get("authorization"))
            self.busy += 1
            if self.busy % 3 == 0:
                return Response("slow down", 429, headers={"Retry-After": "0"})
            self.calls.append(body)
            if body["seed"] not in self.texts:
                return Response('{"error": "the prompt is too long"}', 400)
            text = self.texts[body["seed"]]
            return {"choices": [{"message": {"content": text}, "text": text, "finish_reason": "stop"}]}

        return app


@pytest.fixture
def known():
    server = Known()
    with served(server.app()) as url:
        yield server, url


def write(folder: Path, name: str, records: list[dict]) -> None:
    folder.mkdir(exist_ok=True)
    (folder / BENCHMARKS[name].file).write_text("".join(json.dumps(record) + "\n" for record in records))


def problems(folder: Path, count: int) -> None:
    write(folder, "gsm8k", [{"question": f"What is {n} + 1?", "answer": f"#### {n + 1}"} for n in range(count)])


def not_needed(*_, **__):
    raise AssertionError("both servers are there")


def evaluate(tasks: str, protocol, out: Path, serve=not_needed, **settings) -> Results:
    chosen = run.Settings(
        model="m", benchmarks=[BENCHMARKS[name] for name in tasks.split(",")], protocol=protocol, out=out, **settings
    )
    return asyncio.run(run.evaluate(chosen, serve, lambda *_: lambda _: None))


def rows(folder: Path) -> list[dict]:
    return [orjson.loads(line) for line in (folder / "samples.jsonl").read_bytes().splitlines()]


# ---- figures ---------------------------------------------------------------------------------------------------


def test_figures_of_known_answers(tmp_path, known, reward_url):
    server, url = known
    problems(tmp_path / "data", 5)
    protocol = DRAWN.model_copy(update={"samples": 4, "seeds": [0, 1]})
    items = load(BENCHMARKS["gsm8k"], tmp_path / "data", None).items
    # Right answers of four: by item, for seed 0 and for seed 1. Item 3's second seed is refused
    # altogether, and nothing is answered to item 4.
    right = {0: (4, 3), 1: (0, 1), 2: (2, 2), 3: (3, None), 4: (0, 0)}
    for number, item in enumerate(items):
        for one in asked(BENCHMARKS["gsm8k"], [item], protocol, ""):
            count = right[number][one.seed]
            if count is not None:
                # Wrong ones differ from each other, so that two right of four are the plurality.
                said = str(number + 1) if one.sample < count else f"9{one.sample}"
                server.texts[one.sampling.seed] = "no idea" if number == 4 else f"so \\boxed{{{said}}}"
    results = evaluate("gsm8k", protocol, tmp_path / "out", url=url, reward_url=reward_url, data=tmp_path / "data")
    (task,) = results.tasks
    values = [7 / 8, 1 / 8, 4 / 8, 3 / 4, 0.0]
    assert task.value.value == pytest.approx(sum(values) / 5) and task.value.items == task.items == 5
    assert task.value.low < task.value.value < task.value.high
    assert task.failed == {"unanswered": 4} and task.at_least == pytest.approx((7 + 1 + 4 + 3) / 40)
    assert task.by_seed == {"0": pytest.approx(9 / 20), "1": pytest.approx(6 / 16)}
    by_item = [[pass_at_k(4, c, 2) for c in counts if c is not None] for counts in right.values()]
    assert task.pass_at["2"].value == pytest.approx(sum(sum(one) / len(one) for one in by_item) / 5)
    assert task.pass_at["1"].value == task.value.value and set(task.pass_at) == {"1", "2", "4"}
    # Item 1: nobody wins alone, all four answers tie: one in four is right with seed 1, none with seed 0.
    # Item 4: nobody wins, which is wrong.
    assert task.majority.value == pytest.approx((1 + (0 + 1 / 4) / 2 + 1 + 1 + 0) / 5)
    assert task.stopped == 1.0 and task.length is None and task.certainty is None
    _, values_kept = report.read(tmp_path / "out")
    assert [(one.value, one.answers) for one in values_kept] == list(zip(values, [8, 8, 8, 4, 8], strict=True))
    assert {call["model"] for call in server.calls} == {"known"} and server.calls[0]["temperature"] == 0.6
    assert server.calls[0]["messages"][0]["role"] == "system"


MMLU = {"question": "Which?", "options": ["north", "south"], "category": "law", "cot_content": "The answer is (A)."}
LCB = {"question_content": "Double.", "public_test_cases": [{"input": "2", "output": "4"}], "private_test_cases": []}
FOLLOW = {"prompt": "p", "instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]}
RIGHT_AND_WRONG = {
    "math500": ([{"problem": f"p{n}", "answer": "\\frac{1}{2}"} for n in "ab"], "\\boxed{0.5}", "\\boxed{2}"),
    "cruxeval_o": (
        [{"code": "def f(x):\n    return [x]", "input": "'a'", "output": "['a']", "id": n} for n in "ab"],
        '{"reasoning": "[ANSWER]1[/ANSWER]", "answer": "[\\"a\\"]"}',
        '{"reasoning": "", "answer": "[\'b\']"} or [\'a\']',
    ),
    "mmlu_pro": ([{**MMLU, "question_id": n, "answer": "B"} for n in "ab"], " so the answer is (B).", " It is (A)."),
    "ifeval": ([{**FOLLOW, "key": n} for n in "ab"], "no commas", "a, comma"),
    "livecodebench": (
        [{**LCB, "question_id": n} for n in "ab"],
        "```python\nprint(2 * int(input()))\n```",
        "```python\nprint(7)\n```",
    ),
}
"""By benchmark: two records, an answer that is right, one that is wrong."""


@pytest.mark.parametrize("name", RIGHT_AND_WRONG)
def test_right_and_wrong_answers_are_told_apart(tmp_path, known, reward_url, name):
    if BENCHMARKS[name].terms[0].name == "code_tests" and SANDBOX == "none":
        pytest.skip("programs need bubblewrap")
    server, url = known
    records, *texts = RIGHT_AND_WRONG[name]
    write(tmp_path / "data", name, records)
    (tmp_path / "data" / "mmlu_pro_validation.jsonl").write_text(json.dumps({**MMLU, "answer": "A"}) + "\n")
    wanted = asked(BENCHMARKS[name], load(BENCHMARKS[name], tmp_path / "data", None).items, PRESETS["paper"], "")
    server.texts = {one.sampling.seed: text for one, text in zip(wanted, texts, strict=True)}
    settings = {"url": url, "reward_url": reward_url, "data": tmp_path / "data"}
    (task,) = evaluate(name, PRESETS["paper"], tmp_path / "out", **settings).tasks
    assert task.value.value == 0.5 and not task.failed
    _, items = report.read(tmp_path / "out")
    assert [item.value for item in items] == [1.0, 0.0]


def test_only_what_is_missing_is_asked_again(tmp_path, known, reward_url):
    server, url = known
    problems(tmp_path / "data", 3)
    items = load(BENCHMARKS["gsm8k"], tmp_path / "data", None).items
    drawn = list(asked(BENCHMARKS["gsm8k"], items, DRAWN.model_copy(update={"samples": 2}), ""))
    server.texts = {one.sampling.seed: "\\boxed{1}" for one in drawn[:5]}
    settings = {"url": url, "reward_url": reward_url, "data": tmp_path / "data"}
    (first,) = evaluate("gsm8k", DRAWN, tmp_path / "out", **settings).tasks
    assert first.samples == 1 and len(server.calls) == 3
    (second,) = evaluate("gsm8k", DRAWN.model_copy(update={"samples": 2}), tmp_path / "out", **settings).tasks
    assert second.failed == {"unanswered": 1} and len(server.calls) == 6
    assert first.value.value == second.pass_at["1"].value == pytest.approx(1 / 3)


def test_a_corrected_reference_is_judged_anew(tmp_path, known, reward_url):
    server, url = known
    settings = {"url": url, "reward_url": reward_url, "data": tmp_path / "data"}
    write(tmp_path / "data", "gsm8k", [{"question": "What?", "answer": "#### 7"}])
    (one,) = asked(BENCHMARKS["gsm8k"], load(BENCHMARKS["gsm8k"], tmp_path / "data", None).items, DRAWN, "")
    server.texts[one.sampling.seed] = "\\boxed{1}"
    assert evaluate("gsm8k", DRAWN, tmp_path / "out", **settings).tasks[0].value.value == 0
    write(tmp_path / "data", "gsm8k", [{"question": "What?", "answer": "#### 1"}])
    assert evaluate("gsm8k", DRAWN, tmp_path / "out", **settings).tasks[0].value.value == 1
    assert len(server.calls) == 1


def test_a_judge_prefers(tmp_path, known, reward_url):
    """The judge says 8 of 10 for A whichever answer that is: its liking for the first place cancels out."""
    server, url = known
    write(tmp_path / "data", "alpaca_eval", [{"instruction": "Say hi", "output": "hi", "generator": "x"}])
    judge_calls = []
    judge = FastAPI()

    @judge.post("/v1/chat/completions")
    async def complete(request: Request):
        text = (await request.json())["messages"][-1]["content"]
        judge_calls.append(text)
        said = "A: 8" if text.rstrip().endswith("answer A).") else "B: 2"
        return {"choices": [{"message": {"content": f"Well. Preference for {said}"}, "finish_reason": "stop"}]}

    items = load(BENCHMARKS["alpaca_eval"], tmp_path / "data", None).items
    (one,) = asked(BENCHMARKS["alpaca_eval"], items, PRESETS["paper"], "")
    server.texts[one.sampling.seed] = "hello there"
    settings = {"url": url, "reward_url": reward_url, "data": tmp_path / "data"}
    with pytest.raises(StartupError, match="name one with --judge-url and --judge-model"):
        evaluate("alpaca_eval", PRESETS["paper"], tmp_path / "out", **settings)
    with served(judge) as judge_url:
        chosen = run.JudgeModel(f"{judge_url}/v1", "judge")
        (task,) = evaluate("alpaca_eval", PRESETS["paper"], tmp_path / "out", judge=chosen, **settings).tasks
    assert task.measure == "win rate" and task.value.value == pytest.approx(0.5) and task.value.low is None
    assert task.further["answer_first"] == pytest.approx(0.8) and task.further["at_equal_length"] == pytest.approx(0.5)
    first, second = sorted(judge_calls, key=lambda text: text.index("hello there"))
    assert first.index("hello there") < first.index("\nhi\n") and second.index("\nhi\n") < second.index("hello there")


# ---- the real servers ------------------------------------------------------------------------------------------


def test_the_same_figures_twice_and_nothing_is_done_again(tmp_path, rollout_url, reward_url):
    problems(tmp_path / "data", 5)
    write(tmp_path / "data", "cruxeval_o", [{"code": "def f():\n    return 1", "input": "", "output": "1", "id": "a"}])
    settings = {"url": rollout_url, "reward_url": reward_url, "data": tmp_path / "data"}
    greedy = PRESETS["paper"].model_copy(update={"max_tokens": 8})
    first = evaluate("gsm8k,cruxeval_o", greedy, tmp_path / "a", **settings)
    kept = (tmp_path / "a" / "samples.jsonl").read_bytes()
    assert [task.items for task in first.tasks] == [5, 1] and first.identity == "tiny 0.0, transformers, float32"
    assert all(task.length == 8.0 and task.stopped == 0.0 for task in first.tasks)
    figures = (tmp_path / "a" / "results.json").read_bytes()
    assert evaluate("gsm8k,cruxeval_o", greedy, tmp_path / "a", **settings) == first
    assert (tmp_path / "a" / "samples.jsonl").read_bytes() == kept
    # From nothing, by other servers' batches: the same tokens, the same figures.
    evaluate("gsm8k,cruxeval_o", greedy, tmp_path / "b", in_flight=1, **settings)
    assert (tmp_path / "b" / "results.json").read_bytes() == figures
    said = [{row["key"]: row["token_ids"] for row in rows(tmp_path / name) if "key" in row} for name in "ab"]
    assert said[0] == said[1]
    # The end of a write that was cut off is no answer, and what was before it is kept.
    (tmp_path / "a" / "samples.jsonl").write_bytes(kept[:-20])
    assert evaluate("gsm8k,cruxeval_o", greedy, tmp_path / "a", **settings) == first
    assert len(rows(tmp_path / "a")) == kept.count(b"\n")


def test_certainty_is_the_scorers(tmp_path, rollout_url, reward_url):
    problems(tmp_path / "data", 6)
    protocol = DRAWN.model_copy(update={"samples": 3, "temperature": 1.0, "top_p": 1.0})
    settings = {"url": rollout_url, "reward_url": reward_url, "data": tmp_path / "data"}
    evaluate("gsm8k", protocol, tmp_path / "out", **settings)
    # Every second verdict is turned, so that there are right answers.
    found = rows(tmp_path / "out")
    turned = [Score.of(1.0, Outcome.correct).model_dump(), Score.of(0.0, Outcome.wrong).model_dump()]
    for number, row in enumerate([row for row in found if "math_verify" in row.get("components", {})]):
        row["components"]["math_verify"] = turned[number % 2]
    (tmp_path / "out" / "samples.jsonl").write_bytes(b"".join(orjson.dumps(row) + b"\n" for row in found))
    (task,) = evaluate("gsm8k", protocol, tmp_path / "out", certainty=True, **settings).tasks
    said = task.certainty
    told = {row["key"]: row for row in found if "key" in row}
    items = [
        ScoreItem(prompt_token_ids=row["prompt_token_ids"], completion_token_ids=row["token_ids"])
        for row in told.values()
    ]
    with BlockingRewardClient(reward_url) as client:
        scores = [result.scores["self_certainty"] for result in client.score(items).results]
    certainty = dict(zip(told, scores, strict=True))
    judged = {
        row["answer"]: row["components"]["math_verify"]["value"]
        for row in found
        if "math_verify" in row.get("components", {})
    }
    right = [certainty[key] for key, value in judged.items() if value]
    wrong = [certainty[key] for key, value in judged.items() if not value]
    assert said.right == pytest.approx(sum(right) / len(right), abs=1e-5)
    assert said.auc == pytest.approx(separation.auc(right, wrong))
    apart = separation.mann_whitney_r(right, wrong)
    assert said.r == pytest.approx(apart.r) and said.p is None, "answers to one item are not independent"
    groups: dict[str, list[str]] = {}
    for key, row in told.items():
        groups.setdefault(row["item"], []).append(key)
    picked = [judged[max(keys, key=certainty.__getitem__)] for keys in groups.values()]
    assert said.surest.value == pytest.approx(sum(picked) / len(picked))
    assert said.group_auc is not None and said.borda is not None and "tiny" in said.scorer
    single = protocol.model_copy(update={"samples": 1})
    (alone,) = evaluate("gsm8k", single, tmp_path / "out", certainty=True, **settings).tasks
    assert 0 < alone.certainty.p <= 1
    # The verdicts were not made again.
    assert sum("math_verify" in row.get("components", {}) for row in rows(tmp_path / "out")) == len(judged)


async def test_newer_weights_are_another_evaluation(rollout_url, tmp_path):
    problems(tmp_path, 1)
    benchmark = BENCHMARKS["gsm8k"]
    wanted = list(asked(benchmark, load(benchmark, tmp_path, None).items, PRESETS["paper"], "m"))
    async with RolloutClient(rollout_url) as client:
        server = answers.Rollouts(client, "m", Version(version=1), 60)
        with ledger.opened(tmp_path / "out") as kept, pytest.raises(answers.WeightsChanged, match="now serves 0.0"):
            await answers.ask(server, wanted, kept, 4, lambda _: None)
        assert not kept.answers


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "services.cli.main", *map(str, arguments)]


ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200"}


def test_killed_it_goes_on_where_it_was(tmp_path, rollout_url, reward_url):
    problems(tmp_path / "data", 40)
    options = ("--tasks", "gsm8k", "--data", tmp_path / "data", "--max-tokens", 16, "--in-flight", 1)
    argv = command("eval", "--url", rollout_url, "--reward-url", reward_url, *options, "--out", tmp_path / "out")
    path = tmp_path / "out" / "samples.jsonl"
    process = subprocess.Popen(argv, cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    ends = time.monotonic() + 60
    while not path.exists() or path.read_bytes().count(b"\n") < 5:
        assert process.poll() is None and time.monotonic() < ends
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = path.read_bytes()
    assert before.count(b'{"key"') < 40, "it was killed too late to show anything"
    done = subprocess.run(argv, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    whole = before[: before.rfind(b"\n") + 1]
    assert path.read_bytes().startswith(whole)
    keys = [row["key"] for row in rows(tmp_path / "out") if "key" in row]
    judged = [(row["answer"], row["spec"]) for row in rows(tmp_path / "out") if "answer" in row]
    assert len(keys) == len(set(keys)) == len(judged) == len(set(judged)) == 40
    assert "Beside arXiv 2505.19590" in done.stdout and (tmp_path / "out" / "results.png").stat().st_size > 10_000


def test_a_model_is_served_for_as_long_as_it_is_needed(tmp_path, tiny_model, reward_url, monkeypatch):
    from services.cli.child import serving

    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    problems(tmp_path / "data", 2)
    started = []

    def serve(kind, *options, **more):
        started.append((kind, str(tiny_model) in options))
        # One that is up already has the same model: it saves the test ten seconds.
        return serving(kind, *options, **more) if kind == "rollout" else nullcontext(reward_url)

    protocol = PRESETS["paper"].model_copy(update={"max_tokens": 6})
    settings = {"folder": tiny_model, "data": tmp_path / "data", "serve": serve}
    assert evaluate("gsm8k", protocol, tmp_path / "out", **settings).tasks[0].items == 2
    assert started == [("rollout", True), ("reward", False)]
    certain = evaluate("gsm8k", protocol, tmp_path / "out", certainty=True, **settings)
    assert certain.tasks[0].certainty.wrong > 0 and started[2:] == [("reward", True)]
    assert evaluate("gsm8k", protocol, tmp_path / "out", certainty=True, **settings) == certain
    assert len(started) == 3, "servers were started for nothing"


# ---- the ledger, and what is refused ---------------------------------------------------------------------------


def test_verdicts_that_the_machine_spoilt_are_had_again(tmp_path):
    problems(tmp_path, 3)
    benchmark = BENCHMARKS["gsm8k"]
    wanted = list(asked(benchmark, load(benchmark, tmp_path, None).items, PRESETS["paper"], "m"))
    judge = judges(benchmark, benchmark.terms, 1, None, True)["right"]
    with ledger.opened(tmp_path / "out") as kept:
        said = {"task": "gsm8k", "seed": 0, "sample": 0, "text": "", "finish_reason": "stop"}
        kept.add([Answer(key=one.key, item=one.item.id, **said) for one in wanted])
        for one, outcome in zip(wanted, (Outcome.timeout, Outcome.unparsable), strict=False):
            failed = Score.failed(outcome, "why")
            kept.add([Verdict(answer=one.key, spec=judge.key_of(one), components={"math_verify": failed})])
        assert [[one.item.id for one in group] for group in open_groups(judge, wanted, kept)] == [
            [wanted[0].item.id],
            [wanted[2].item.id],
        ]
        with pytest.raises(StartupError, match="another `rlif eval` is writing there"), ledger.opened(tmp_path / "out"):
            pass
    (tmp_path / "out" / "samples.jsonl").write_text('{"key": 1}\n{}\n')
    with pytest.raises(StartupError, match="line 1: no answer and no verdict"), ledger.opened(tmp_path / "out"):
        pass


def test_a_token_in_a_url_is_written_nowhere(tmp_path, known, reward_url, capfd, monkeypatch):
    from services.cli import main

    server, url = known
    problems(tmp_path / "data", 1)
    servers = ["--url", url.replace("//", "//:secret@"), "--reward-url", reward_url.replace("//", "//:secret@")]
    options = ["--tasks", "gsm8k", "--data", str(tmp_path / "data")]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("services.logs.configure", lambda *_, **__: None)
    monkeypatch.setattr(sys, "argv", ["rlif", "eval", *servers, *options])
    with pytest.raises(SystemExit) as ended:
        main.main()
    assert ended.value.code == 1 and server.tokens == {"Bearer secret"}
    told = "".join(capfd.readouterr())
    assert "rlif: no answer could be judged: GSM8K" in told and "secret" not in told
    written = [(path.name, path.read_bytes() if path.is_file() else b"") for path in (tmp_path / "runs").rglob("*")]
    assert "results.json" in dict(written)
    assert not any("secret" in name or b"secret" in content for name, content in written)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("", "give exactly one of --model and --url"),
        ("--model m --tasks aime", "--tasks aime: choose from gsm8k"),
        ("--model m --preset mine", "--preset mine: choose from paper, open_r1"),
        ("--model m --samples 4", "--samples 4: greedy answers are the same each time; give --temperature as well"),
        ("--model m --prompt intuitor-3b@9", "--prompt: there is no prompt 'intuitor-3b@9'"),
        ("--model m --temperature 0.00001", "--temperature: Value error, 0 (greedy), or at least 0.0001"),
        ("--url http://127.0.0.1:9 --certainty", "--certainty with --url: name a reward server"),
        ("--url nowhere --data {data} --tasks gsm8k", "--url 'nowhere' is not a server's URL"),
        ("--url http://127.0.0.1:9 --judge-url http://j/v1", "--judge-url and --judge-model belong together"),
        ("--url http://127.0.0.1:9 --beside 4b", "--beside 4b: choose from 1.5b"),
        ("--url http://127.0.0.1:9 --data {data} --tasks math500", "no math500.jsonl (nor .parquet); without --data"),
        ("--model /nowhere/at/all", "--model /nowhere/at/all: no such folder"),
    ],
)
def test_one_line_says_what_cannot_work(tmp_path, capsys, monkeypatch, arguments, said):
    from services.cli import main

    problems(tmp_path / "data", 1)
    words = [word.format(data=tmp_path / "data") for word in arguments.split()]
    monkeypatch.setattr(sys, "argv", ["rlif", "eval", *words, "--out", str(tmp_path / "out")])
    with pytest.raises(SystemExit) as ended:
        main.main()
    assert ended.value.code == 2 and said in capsys.readouterr().err
