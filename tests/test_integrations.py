"""The programs of docs/integrations.md, run: TRL for real, the other trainers by the calls that their code makes."""

import asyncio
import importlib
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import uuid
from pathlib import Path

import aiohttp
import httpx
import pytest
import torch
import yaml
from scoring_oracle import model_oracle
from served import served
from transformers import AutoModelForCausalLM, AutoTokenizer

from reward_server.app import Settings, create
from services.access import HttpSettings
from services.spec import RewardSpec

DOCUMENT = Path(__file__).parent.parent / "docs" / "integrations.md"
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", DOCUMENT.read_text(), re.DOTALL | re.MULTILINE)
PROGRAMS = {code.split("\n")[0].removeprefix("# "): code for kind, code in BLOCKS if kind in ("python", "yaml")}
SPEC = RewardSpec.model_validate(yaml.safe_load(PROGRAMS["rewards.yaml"]))
TOKEN = "a-token"


@pytest.fixture(scope="module")
def mixed(tiny_model):
    """The document's server: its spec, a scorer, a token."""
    settings = Settings(http=HttpSettings(api_token=TOKEN), model=str(tiny_model), default_spec=SPEC)
    with served(create(settings)) as url:
        yield url


@pytest.fixture(scope="module")
def rules():
    with served(create(Settings(default_spec="grpo"))) as url:
        yield url


@pytest.fixture
def program(tmp_path, monkeypatch):
    """Imports a program of the document, which is to ask the server at `url`; a fresh one for each test."""
    for name, code in PROGRAMS.items():
        (tmp_path / name).write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("RLIF_API_TOKEN", TOKEN)

    def load(name: str, url: str):
        monkeypatch.setenv("RLIF_REWARD_URL", url)
        return importlib.import_module(name)

    yield load
    for name in PROGRAMS:
        sys.modules.pop(name.removesuffix(".py"), None)


def ask(url, path, body):
    answer = httpx.post(url + path, json=body, headers={"Authorization": f"Bearer {TOKEN}"}, timeout=60)
    assert answer.status_code == 200, answer.text
    return answer.json()


def certainty(folder, prompt_ids, completion_ids):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    return model_oracle(model, prompt_ids, completion_ids)["self_certainty"].mean().item()


# ---- Python and curl -----------------------------------------------------------------------------------------------


def test_plain_python(mixed):
    env = {**os.environ, "RLIF_REWARD_URL": mixed, "RLIF_API_TOKEN": TOKEN}
    run = [sys.executable, "-c", PROGRAMS["ask_rewards.py"]]
    ran = subprocess.run(run, env=env, capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0, ran.stderr
    lines = ran.stdout.splitlines()
    assert [re.search(r"'math_verify': (\S+)}", line)[1] for line in lines] == ["1.0", "0.0", "0.0"]
    parts = [re.search(r"reward (\S+) advantage (\S+) {'self_certainty': (\S+),", line) for line in lines]
    for part, verdict in zip(parts, (1, 0, 0), strict=True):
        assert float(part[1]) == pytest.approx(float(part[3]) + verdict, abs=1e-3)
    assert sum(float(part[2]) for part in parts) == pytest.approx(0, abs=2e-3)


def test_curl(mixed):
    (command,) = [code for kind, code in BLOCKS if kind == "bash" and code.startswith("curl")]
    env = {**os.environ, "RLIF_REWARD_URL": mixed, "RLIF_API_TOKEN": TOKEN}
    assert shutil.which("curl"), "the document's curl call cannot be run without curl"
    ran = subprocess.run(["bash", "-c", command], env=env, capture_output=True, text=True, timeout=60)
    (group,) = json.loads(ran.stdout)["groups"]
    assert [score["components"]["math_verify"]["outcome"] for score in group["scores"]] == ["correct", "wrong"]


# ---- TRL -----------------------------------------------------------------------------------------------------------


def recording(module, monkeypatch):
    """What `scored` was called with and what it returned, call by call."""
    calls, scored = [], module.scored

    async def recorded(**batch):
        scores = await scored(**batch)
        calls.append(({**batch, "step": batch["trainer_state"].global_step}, scores))
        return scores

    monkeypatch.setattr(module, "scored", recorded)
    return calls


def log_of(trainer, key):
    return [row[key] for row in trainer.state.log_history if key in row]


@pytest.mark.slow
def test_trl_trains_on_our_rewards_and_the_scorer_follows(tiny_model, redis_url, program, tmp_path, monkeypatch):
    run_id = f"trl-{uuid.uuid4().hex}"
    settings = Settings(
        http=HttpSettings(api_token=TOKEN),
        model=str(tiny_model),
        default_spec=SPEC,
        follow="match",
        redis_url=redis_url,
        run_id=run_id,
    )
    monkeypatch.setenv("MODEL", str(tiny_model))
    monkeypatch.setenv("OUTPUT", str(tmp_path / "output"))
    with served(create(settings)) as url:
        calls = recording(program("rlif_trl", url), monkeypatch)
        trainer = program("train_trl", url).trainer
        weights = tmp_path / "weights"
        program("rlif_publish", url).PublishPolicy(trainer, redis_url, run_id, weights)
        trainer.train()
        headers = {"Authorization": f"Bearer {TOKEN}"}
        served_version = httpx.get(url + "/v1/model", headers=headers).json()["weight_version"]
    assert served_version["version"] <= 3  # the last one is published after the last group
    assert [batch["step"] for batch, _ in calls] == [0, 1, 2]

    rewards = [[score.reward for score in scores] for _, scores in calls]
    assert all(len(of_step) == 8 and len(set(of_step)) > 1 for of_step in rewards)
    means = [sum(of_step) / 8 for of_step in rewards]
    assert log_of(trainer, "rewards/rlif_reward/mean") == pytest.approx(means, rel=1e-5)
    assert log_of(trainer, "reward") == pytest.approx(means, rel=1e-5)
    verdicts = [sum(score.components["math_verify"].value for score in scores) / 8 for _, scores in calls]
    assert log_of(trainer, "rlif/math_verify") == pytest.approx(verdicts)

    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    for step, (batch, scores) in enumerate(calls):
        if not (folder := weights / f"0-{step}").exists():  # only the newest are kept
            folder = tiny_model
        for place in (0, 5):
            prompt, tokens = tokenizer(batch["prompts"][place]).input_ids, batch["completion_ids"][place]
            ours = scores[place].components["self_certainty"].value
            assert ours == pytest.approx(certainty(folder, prompt, tokens), rel=1e-4)
            if step:
                assert ours != pytest.approx(certainty(tiny_model, prompt, tokens), rel=1e-4)


@pytest.mark.slow
def test_trl_takes_advantages_as_they_are(mixed, tiny_model, program, tmp_path, monkeypatch):
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    ours = program("rlif_trl", mixed)
    calls = recording(ours, monkeypatch)
    rows = [{"prompt": [{"role": "user", "content": text}], "answer": "1"} for text in ("1?", "2?")]
    options = {"use_cpu": True, "bf16": False, "report_to": [], "max_steps": 1, "logging_steps": 1}
    trainer = GRPOTrainer(
        model=str(tiny_model),
        reward_funcs=[ours.rlif_advantage],
        train_dataset=Dataset.from_list(rows),
        args=GRPOConfig(
            output_dir=str(tmp_path / "output"),
            per_device_train_batch_size=8,
            num_generations=4,
            max_completion_length=8,
            scale_rewards="none",
            **options,
        ),
    )
    trainer.train()
    ((_, scores),) = calls
    advantages = [score.advantage for score in scores]
    assert max(advantages) > 0.1
    assert list(trainer._logs["advantages"]) == pytest.approx(advantages, abs=1e-5)


async def test_trl_failures_are_none(rules, program):
    ours = program("rlif_trl", rules)
    logged = []

    class State:
        global_step = 3

    found = await ours.rlif_reward(
        prompts=["2+2?", "2+2?", "3+3?", "3+3?"],
        completions=["\\boxed{4}", "\\boxed{5}", "\\boxed{6}", "\\boxed{7}"],
        completion_ids=[[1], [2], [3], [4]],
        trainer_state=State(),
        answer=["4", "4", "}{", "}{"],
        log_metric=lambda name, value: logged.append((name, value)),
        log_extra=None,
    )
    assert found == [1.0, 0.0, None, None] and logged == [("rlif/math_verify", 0.5)]
    await ours.client.close()


# ---- verl ----------------------------------------------------------------------------------------------------------


def verl_call(place, prompt, **kwargs):
    """The arguments of verl 0.9.1's reward managers for one sample."""
    extra = {"prompt": prompt, "index": place, "num_turns": None, "rollout_reward_scores": {}}
    return {
        "data_source": "math",
        "solution_str": f"\\boxed{{{place}}}",
        "ground_truth": "3",
        "extra_info": extra,
    } | kwargs


async def test_verl(mixed, program):
    ours = program("rlif_verl", mixed)
    calls = [verl_call(place, "1+2?") for place in range(6)]
    found = await asyncio.gather(*(ours.compute_score(**call) for call in calls))
    loop = asyncio.get_running_loop()
    blocking = [loop.run_in_executor(None, lambda call=call: ours.compute_score_blocking(**call)) for call in calls]
    rewards = pytest.approx([score["score"] for score in found])  # batches differ, and the last bits with them
    assert [score["score"] for score in await asyncio.gather(*blocking)] == rewards
    batch = {f"{key}s": [call[key] for call in calls] for key in ("data_source", "solution_str", "ground_truth")}
    of_batch = ours.compute_score_batch(**batch, extra_infos=[call["extra_info"] for call in calls])
    assert [score["score"] for score in of_batch] == rewards

    task = {"task_id": "t", "prompt": "1+2?", "reference": {"answer": "3"}}
    group = {"group_id": "g", "task": task, "completions": [{"text": call["solution_str"]} for call in calls]}
    (expected,) = ask(mixed, "/v1/rewards", {"groups": [group]})["groups"]
    assert [score["reward"] for score in expected["scores"]] == rewards
    assert found[3]["score"] > 1 and {score["scorer_version"] for score in found} == {0.0}
    messages = [{"role": "user", "content": "1+2?"}]
    assert (await ours.compute_score(**verl_call(3, messages)))["score"] != found[3]["score"]
    await ours.client.close()
    ours.blocking.close()


async def test_verl_failures_are_errors_or_the_number_that_was_named(rules, program):
    ours = program("rlif_verl", rules)
    broken = verl_call(3, "1+2?", ground_truth="}{")
    with pytest.raises(ValueError, match="no reward could be computed.*unparsable"):
        await ours.compute_score(**broken)
    assert await ours.compute_score(**broken, missing=-0.5) == {"score": -0.5, "valid": 0.0, "scorer_version": -1.0}
    await ours.client.close()


# ---- OpenRLHF and slime --------------------------------------------------------------------------------------------


async def aiohttp_post(url, body):
    """As both trainers' clients do it."""
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=180)) as session:
        async with session.post(url, json=body) as response:
            return response.status, await response.json(content_type=None)


def with_token(url):
    return url.replace("http://", f"http://:{TOKEN}@")


async def test_openrlhf(mixed, tiny_model):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    prompt, url = "<user>1+2?<assistant>", with_token(mixed) + "/get_reward"
    columns = set()
    for answer, label in itertools.product(("\\boxed{3}<eos>", "\\boxed{4}"), ("3", 3, {"answer": "3"})):
        body = {"query": [prompt + answer], "prompts": [prompt], "labels": [label]}
        status, found = await aiohttp_post(url, body)
        assert status == 200, found
        logs = {name: torch.tensor([values]) for name, values in found["extra_logs"].items()}
        assert {values.shape for values in logs.values()} == {(1, 1)}
        columns.add(tuple(sorted(logs)))
        assert found["rewards"] == found["scores"] and torch.tensor([found["rewards"]]).dtype == torch.float32
        assert logs["math_verify"].item() == ("3" in answer) and logs["scorer_version"].item() == 0
        # Scored as it was sampled: the EOS counts, and nothing is added.
        tokens = [tokenizer(text, add_special_tokens=False).input_ids for text in (prompt, answer)]
        assert (tokens[1][-1] == tokenizer.eos_token_id) == answer.endswith("<eos>")
        oracle = certainty(tiny_model, *tokens)
        assert found["extra_logs"]["self_certainty"] == [pytest.approx(oracle, rel=1e-4)]
        assert found["rewards"] == [pytest.approx(oracle + ("3" in answer), rel=1e-4)]
    # A verdict that failed leaves no sum of the rest; where the caller has a number for it, the same columns.
    failed = {"query": [prompt + "x"], "prompts": [prompt], "labels": ["}{"]}
    status, found = await aiohttp_post(url, failed)
    assert (status, found["title"]) == (422, "No reward could be computed")
    status, found = await aiohttp_post(f"{url}?missing=-1", failed)
    assert found["rewards"] == [-1.0]
    assert found["extra_logs"]["math_verify/present"] == [0.0] and found["extra_logs"]["valid"] == [0.0]
    assert columns == {tuple(sorted(found["extra_logs"]))}
    status, found = await aiohttp_post(mixed + "/get_reward", {"query": ["p"], "prompts": ["p"]})
    assert (status, found["title"]) == (401, "Token needed")


async def test_openrlhf_many_at_once(mixed):
    """One sample a call, as its rollouts end: each gets its own."""
    queries = [f"1+{place}?\\boxed{{{place + 1}}}" for place in range(300)]
    bodies = [
        {"query": [query], "prompts": [query.split("\\")[0]], "labels": [str(place + 1)]}
        for place, query in enumerate(queries)
    ]
    found = await asyncio.gather(*(aiohttp_post(with_token(mixed) + "/get_reward", body) for body in bodies))
    assert {status for status, _ in found} == {200}
    certainties = {answer["extra_logs"]["self_certainty"][0] for _, answer in found}
    assert [answer["extra_logs"]["math_verify"] for _, answer in found] == [[1.0]] * 300 and len(certainties) > 290


async def test_the_end_of_a_response_is_no_part_of_the_answer(rules, mixed):
    async def exact(server, tail, **options):
        url = server + "/get_reward?" + str(httpx.QueryParams({"spec": "exact_match", "missing": "-1", **options}))
        return (await aiohttp_post(url, {"query": ["p42" + tail], "prompts": ["p"], "labels": ["42"]}))[1]["rewards"]

    assert await exact(rules, "") == [1.0]
    assert await exact(rules, "<|im_end|>") == [0.0]  # a server without a model cannot know
    assert await exact(rules, "<|im_end|>", end="<|im_end|>") == [1.0]
    assert await exact(with_token(mixed), "<eos>") == [1.0]
    assert await exact(with_token(mixed), "<eos>!") == [0.0]


async def test_slime(mixed, rules, tiny_model):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    turns = [{"role": "user", "content": "1+2?"}]
    applied = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    tokens = [tokenizer(text, add_special_tokens=False).input_ids for text in (applied, "\\boxed{3}<eos>")]
    oracle = certainty(tiny_model, *tokens)
    for prompt in (applied, turns):
        body = {"prompt": prompt, "response": "\\boxed{3}<eos>", "label": "3"}
        assert await aiohttp_post(with_token(mixed) + "/reward", body) == (200, pytest.approx(oracle + 1, rel=1e-4))
    failing = {"prompt": "1+2?", "response": "\\boxed{3}", "label": "}{"}
    status, found = await aiohttp_post(rules + "/reward", failing)
    assert status == 422 and "unparsable" in found["detail"] and "missing=<number>" in found["detail"]
    assert await aiohttp_post(rules + "/reward?spec=grpo&missing=0", failing) == (200, 0.0)
    status, found = await aiohttp_post(rules + "/reward", {**failing, "prompt": []})
    assert status == 422 and {error["field"].split(".")[0] for error in found["errors"]} == {"prompt"}
