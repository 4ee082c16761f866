"""A user's own rewards: through the real command and server, and everything that can be wrong with them."""

import re
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest
import pytest_asyncio
import yaml

from reward_server import plugins, user_function
from reward_server.plugins import install
from reward_server.reward import Context
from reward_server.rewards import REWARDS
from reward_server.specs import SpecError, check_spec
from reward_server.workers import Limits, Turn, WorkerPool
from services.api import CompletionText, RewardGroup
from services.cli.child import serving
from services.contract import Message, Reference, Score, Task
from services.spec import RewardSpec, RewardTerm
from services.startup import StartupError

TESTS = Path(__file__).parent
ROOT = TESTS.parent
PAGE = ROOT / "docs" / "custom-rewards.md"
QUICK = Limits(quantum_seconds=0.3, full_seconds=0.5, full_wall_seconds=2, grace_seconds=0.5, slow_wait_seconds=60)
shared_loop = pytest.mark.asyncio(loop_scope="module")


@pytest.fixture(autouse=True)
def as_it_was():
    """Plug-ins are for a whole process; here each test has its own."""
    rewards, installed = dict(REWARDS), dict(plugins.installed)
    yield
    for found, before in ((REWARDS, rewards), (plugins.installed, installed)):
        found.clear()
        found.update(before)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def workers():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(TESTS))
        made = WorkerPool(1, QUICK, [(user_function.IMPORT, {"path": "own_rewards:short"})])
        made.start()
        yield made
        await made.stop()


def group_of(*texts: str, chat: bool = False, reference: Reference | None = None, **metadata) -> RewardGroup:
    prompt = {"messages": [Message(role="user", content="2+2?")]} if chat else {"prompt": "2+2?"}
    task = Task(task_id="t", reference=reference, metadata=metadata, **prompt)
    return RewardGroup(group_id="g", task=task, completions=[CompletionText(text=text) for text in texts])


async def score(name: str, group: RewardGroup, workers, seconds: float = 60, **params) -> list[Score]:
    install([f"own_rewards:{name}"])
    reward = REWARDS[name]
    return await reward.score(group, reward.params(**params), Context(workers, time.monotonic() + seconds, Turn()))


def told(scores: list[Score]) -> list[tuple[float | None, str]]:
    return [(item.value, str(item.outcome)) for item in scores]


# ---- the ways to call ----------------------------------------------------------------------------------------------


@shared_loop
async def test_once_a_completion(workers):
    group = group_of("a b c d e f g h", "a", "")
    assert told(await score("short", group, workers)) == [(0.5, "ok"), (1.0, "ok"), (None, "skipped")]
    assert told(await score("short", group, workers, words=2))[0] == (0.25, "ok")
    gold = Reference(answer="4", level=3)
    found = await score("all_of_it", group_of("4", "5", chat=True, reference=gold), workers)
    assert told(found) == [(1.0, "ok"), (0.0, "ok")]


@shared_loop
async def test_once_a_group(workers):
    found = await score("longest", group_of("a", "bb", reference=Reference(answer="x")), workers)
    assert told(found) == [(0.0, "ok"), (1.0, "ok")]
    assert told(await score("longest", group_of("a"), workers)) == [(None, "skipped")]
    scores = await score("too_few", group_of("a", "b"), workers)
    assert told(scores) == [(None, "error")] * 2 and "1 rewards for 2 completions" in scores[0].detail


@shared_loop
async def test_as_trl_calls(workers):
    group = group_of("4", "5", reference=Reference(answer="4"), hint="even", prompts="not these")
    assert told(await score("trl_style", group, workers)) == [(1.0, "ok"), (0.0, "ok")]
    assert told(await score("trl_chat", group_of("4", "55", chat=True), workers)) == [(1.0, "ok"), (2.0, "ok")]
    (missing, _) = await score("trl_style", group_of("4", "5"), workers)
    assert missing.outcome == "error" and "TypeError" in missing.detail


@shared_loop
async def test_async_functions_have_a_deadline_each(workers, monkeypatch):
    monkeypatch.setattr(user_function, "ASYNC_SECONDS", 0.5)
    found = await score("later", group_of("0", "30", "x"), workers)
    assert told(found) == [(0.0, "ok"), (None, "timeout"), (None, "error")]
    assert "ValueError" in found[2].detail
    assert told(await score("later", group_of("30"), workers, seconds=0.1)) == [(None, "timeout")]
    scores = await score("later_group", group_of("a", "b"), workers)
    assert told(scores) == [(None, "error")] * 2 and scores[0].detail == "LookupError: 2 are too many"


@shared_loop
async def test_a_reward_object_is_one(workers):
    install(["own_rewards:HALF"])
    context = Context(workers, time.monotonic() + 60, Turn())
    assert told(await REWARDS["half"].score(group_of("a"), None, context)) == [(0.5, "ok")]


@shared_loop
async def test_what_goes_wrong_is_that_completions_failure(workers):
    texts = ["good", "hang", "die", "raise", "nan", "good", "sleep", "leave", "text", "list", "none", "true", "big"]
    found = await score("moody", group_of(*texts), workers)
    outcomes = dict(zip(texts, told(found), strict=True))
    assert outcomes == {
        "good": (1.0, "ok"),
        "hang": (None, "timeout"),
        "sleep": (None, "timeout"),
        "die": (None, "error"),
        "leave": (None, "error"),
        "raise": (None, "error"),
        "nan": (None, "error"),
        "text": (None, "error"),
        "list": (None, "error"),
        "none": (None, "skipped"),
        "true": (1.0, "ok"),
        "big": (None, "error"),
    }
    assert found[3].detail == "LookupError: no such thing" and "exit code 3" in found[2].detail


@shared_loop
async def test_a_reference_nobody_can_pass_on_is_an_error(workers):
    deep: list = []
    for _ in range(300):
        deep = [deep]
    reference = Reference(answer="4", deep=deep)
    assert told(await score("longest", group_of("a", "b", reference=reference), workers)) == [(None, "error")] * 2
    assert told(await score("short", group_of("a"), workers)) == [(1.0, "ok")]


# ---- what is refused -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "says"),
    [
        ("own_rewards", "write it as module:function"),
        ("own_rewards:", "write it as module:function"),
        ("own_rewards:a.b", "write it as module:function"),
        ("no_such_module:f", "no_such_module cannot be imported: ModuleNotFoundError"),
        ("own_rewards:absent", "has no attribute 'absent'"),
        ("own_rewards:NUMBER", "is int, not a function"),
        ("own_rewards:ShortParams", "not a function"),
        ("own_rewards:nothing_known", "takes neither `completion` nor `completions`"),
        ("own_rewards:one_too_many", "`colour` is not one of completion, params, prompt, reference"),
        ("own_rewards:bare_params", "annotate `params`"),
        ("own_rewards:positional", "positional-only"),
        ("own_rewards:lost", "name 'Lost' is not defined"),
        ("own_rewards:length", "the name 'length' is taken by rlif itself"),
        ("own_rewards:grpo", "the name 'grpo' is taken by rlif itself"),
    ],
)
def test_what_is_no_reward_is_refused_by_name(path, says):
    with pytest.raises(StartupError) as refused:
        install([path])
    assert says in str(refused.value) and path in str(refused.value) and "\n" not in str(refused.value)


def test_a_module_that_breaks_is_refused(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    for number, (body, says) in enumerate(
        [
            ("raise OSError('no disk\\nat all')", "OSError: no disk"),
            ("import sys; sys.exit(3)", "SystemExit: 3"),
            ("def", "SyntaxError"),
        ]
    ):
        (tmp_path / f"broken_{number}.py").write_text(body)
        with pytest.raises(StartupError, match=says):
            install([f"broken_{number}:f"])


def test_two_of_one_name_are_refused_and_one_twice_is_one(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "other_rewards.py").write_text("def short(completion): return 1.0")
    install(["own_rewards:short", "own_rewards:short"])
    install(["own_rewards:short"])
    with pytest.raises(StartupError, match="'short' is taken by the plug-in own_rewards:short"):
        install(["other_rewards:short"])


def test_installed_packages_bring_their_own(tmp_path, monkeypatch):
    """A real distribution on the path, as an installer leaves it."""
    folder = tmp_path / "brought-1.0.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: brought\nVersion: 1.0\n")
    (folder / "entry_points.txt").write_text("[rlif.rewards]\nbrought.brevity = brought:brevity\n")
    (tmp_path / "brought.py").write_text("def brevity(completion): return 1.0 / (1 + len(completion))")
    monkeypatch.syspath_prepend(tmp_path)
    install([])
    assert "brought.brevity" in REWARDS
    assert plugins.warm_ups() == [(user_function.IMPORT, {"path": "brought:brevity"})]
    (folder / "entry_points.txt").write_text("[rlif.rewards]\nbad = brought:absent\n")
    with pytest.raises(StartupError, match="brought:absent"):
        install([])


def test_parameters_are_checked_like_those_of_any_reward():
    install(["own_rewards:short", "own_rewards:needy"])
    for params, says in [({"words": 0}, "greater than or equal to 1"), ({"word": 5}, "takes: words")]:
        with pytest.raises(SpecError, match=says):
            check_spec(RewardSpec(rewards=[RewardTerm(name="short", params=params)]))
    with pytest.raises(SpecError, match="wanted: Field required"):
        check_spec(RewardSpec(rewards=[RewardTerm(name="needy")]))


# ---- the documented example, by the real command -------------------------------------------------------------------


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE.read_text(), re.DOTALL)


@pytest.fixture
def example(tmp_path, monkeypatch) -> Path:
    """The page's example as a module in the current folder."""
    (source,) = blocks("python")
    (tmp_path / "my_rewards.py").write_text(source)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    return tmp_path


def test_the_documented_example_is_short():
    (source,) = blocks("python")
    assert len([line for line in source.splitlines() if line.strip()]) <= 15


@pytest.mark.usefixtures("example")
def test_the_documented_example_works():
    command = blocks("sh")[0]
    assert "rlif serve reward --reward my_rewards:brevity\n" in command
    body = re.search(r"-d '(.*)'", command, re.DOTALL)[1]
    with serving("reward", "--reward", "my_rewards:brevity", "--verifier-workers", "1") as url:
        with httpx.Client(base_url=url, timeout=60) as client:
            sent = {"content": body, "headers": {"Content-Type": "application/json"}}
            (scored,) = client.post("/v1/rewards", **sent).json()["groups"]
            listed = {item["name"]: item for item in client.get("/v1/rewards").json()["rewards"]}
            spec = {"rewards": [{"name": "brevity", "params": {"words": 1}}]}
            assert client.put("/v1/specs/short", json=spec).status_code == 200
            for name in ("os:system", "my_rewards:brevity", "os.system"):
                answer = client.put("/v1/specs/bad", json={"rewards": [{"name": name}]})
                assert answer.status_code == 422 and "there is no reward" in answer.text
    found = [item["components"]["brevity"] for item in scored["scores"]]
    assert [(item["value"], item["outcome"]) for item in found] == [(1.0, "ok"), (None, "skipped")]
    entry = listed["brevity"]
    assert entry["available"] and entry["params"]["properties"]["words"]["description"] == "as many cost nothing"
    assert entry["description"].startswith("1 for a completion of at most")


def command(*arguments: object) -> subprocess.CompletedProcess:
    argv = [sys.executable, "-m", "services.cli.main", *map(str, arguments)]
    return subprocess.run(argv, capture_output=True, text=True, timeout=120)


def test_a_recipe_with_a_plug_in_is_checked(example):
    tree = yaml.safe_load((ROOT / "recipes" / "demo.yaml").read_text())
    tree |= yaml.safe_load(next(block for block in blocks("yaml") if "plugins" in block))
    tree["data"]["path"] = "tasks"
    (example / "run.yaml").write_text(yaml.safe_dump(tree))
    done = command("recipe", "check", "run.yaml")
    assert done.returncode == 0 and "brevity" in done.stdout, done.stderr
    for override, says in [
        ("scorer.plugins=[my_rewards:absent]", "reward plug-in my_rewards:absent"),
        ("scorer.plugins=[]", "there is no reward 'brevity'"),
        ("scorer.plugins=[my_rewards]", "scorer.plugins.0"),
    ]:
        done = command("recipe", "check", "run.yaml", override)
        assert done.returncode == 2 and says in done.stderr.splitlines()[-1], done.stderr


@pytest.mark.usefixtures("example")
def test_the_command_refuses_in_one_line():
    done = command("serve", "reward", "--reward", "my_rewards:nothing", "--port", 0)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "reward plug-in my_rewards:nothing" in done.stderr.splitlines()[-1]
