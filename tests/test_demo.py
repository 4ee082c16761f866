"""The demo's task, base model, evaluation and report."""

import hashlib
import json
import math
import random
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services import recipe
from services.api import RolloutGroup
from services.clients import RolloutClient
from services.contract import Completion, Version
from services.demo import comparison, curves, report, task
from services.demo.arms import ARMS, rewards
from services.demo.evaluation import Evaluation, WayFigures, _answers, evaluate, measure
from services.demo.task import Problem
from services.spec import RewardSpec
from services.steps import StepsError, read_steps

any_problem = st.builds(Problem, st.integers(10, 99), st.integers(10, 99))


# ---- task ------------------------------------------------------------------------------------------------------


def test_the_parts_are_disjoint_cover_everything_and_never_change():
    parts = {name: task.problems(name) for name in ("pretraining", "train", "held_out")}
    assert sum(map(len, parts.values())) == 90 * 90
    assert len(set().union(*parts.values())) == 90 * 90
    assert {name: len(part) for name, part in parts.items()} == {"pretraining": 6501, "train": 792, "held_out": 807}
    digest = hashlib.sha256(" ".join(one.prompt for one in parts["held_out"]).encode()).hexdigest()
    assert digest.startswith("fa8d0d09cf6c0099")


@given(any_problem)
def test_a_problem_and_its_mirror_are_in_one_part(problem):
    assert Problem(problem.second, problem.first).part == problem.part


def test_held_out_problems_come_in_one_order_whatever_the_limit():
    assert task.held_out(50) == task.held_out()[:50]
    assert sorted(task.held_out()) == task.problems("held_out")
    assert task.held_out() != task.problems("held_out")


def test_authors_are_as_noisy_as_they_say():
    rng = random.Random(3)
    pairs = [Problem(rng.randint(10, 99), rng.randint(10, 99)) for _ in range(20_000)]
    careful = sum(task.is_right(one, task.careful(one, rng)) for one in pairs) / len(pairs)
    assert careful == pytest.approx((1 - task.COLUMN_ERROR) ** 2, abs=0.006)
    guesses = [(one.answer, task.guess(one, rng).removeprefix("maybe ")) for one in pairs]
    assert all(len(answer) == len(guess) for answer, guess in guesses)
    changed = [a != b for answer, guess in guesses for a, b in zip(answer, guess, strict=True)]
    assert sum(changed) / len(changed) == pytest.approx(task.DIGIT_ERROR, abs=0.01)
    ways = [task.way(task.author(one, rng)) for one in pairs]
    assert ways.count("step_by_step") / len(ways) == pytest.approx(task.CAREFUL_SHARE, abs=0.015)
    assert set(ways) == {"step_by_step", "guess"}


@given(any_problem)
def test_a_careful_answer_without_slips_is_right_and_every_step_adds_up(problem):
    text = task.careful(problem, SimpleNamespace(random=lambda: 1.0))
    assert task.is_right(problem, text)
    for left, total in re.findall(r"([\d+]+)=(\d+)", text):
        assert sum(map(int, left.split("+"))) == int(total)


def test_the_documented_answer():
    never = SimpleNamespace(random=lambda: 1.0)
    assert task.careful(Problem(47, 58), never) == "units 7+8=15 tens 4+5+1=10 answer 105"
    assert task.guess(Problem(47, 58), never) == "maybe 105"


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("maybe 105", True),
        ("units 7+8=15 tens 4+5+1=10 answer 105", True),
        ("maybe 106", False),
        ("maybe 105,000", False),
        ("maybe 1050", False),
        ("answer 105 tens", False),
        ("105", False),
        ("", False),
    ],
)
def test_what_counts_as_right(text, right):
    assert task.is_right(Problem(47, 58), text) is right


def test_ways_of_answering():
    texts = {"units 7": "step_by_step", "maybe 1": "guess", "tens 4": "other", "": "other"}
    assert {text: task.way(text) for text in texts} == texts


def test_training_tasks_are_rows_with_prompt_and_answer(tmp_path):
    path = tmp_path / "data" / "train.jsonl"
    count = task.write_tasks(path)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(rows) == count == len(task.problems("train"))
    assert all(eval(row["prompt"]) == int(row["answer"]) for row in rows)
    assert len({row["id"] for row in rows}) == count
    assert not {row["prompt"] for row in rows} & {one.prompt for one in task.held_out()}


# ---- base model ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """A base model of the demo's shape after three steps of pretraining."""
    from services.demo.base_model import make_demo_model

    return make_demo_model(tmp_path_factory.mktemp("base"), seed=5, steps=3)


@pytest.fixture(scope="module")
def tokenizer(base):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(base)


def test_reloaded_tokenizer_gives_every_authors_text_back(tokenizer):
    rng = random.Random(0)
    for problem in task.held_out(100):
        for text in (problem.prompt, task.careful(problem, rng), task.guess(problem, rng)):
            ids = tokenizer.encode(text)
            assert tokenizer.unk_token_id not in ids
            assert tokenizer.decode(ids) == text
    assert tokenizer.tokenize("units 7+8=15 tens") == ["units", " ", "7", "+", "8", "=", "1", "5", " tens"]


def test_reloaded_tokenizer_renders_and_encodes_a_chat(tokenizer):
    chat = [{"role": "user", "content": "47+58"}]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert text == "<bos><user>47+58<assistant>"
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert tokenizer.convert_ids_to_tokens(ids) == ["<bos>", "<user>", "4", "7", "+", "5", "8", "<assistant>"]
    answered = [*chat, {"role": "assistant", "content": "maybe 105"}]
    text = tokenizer.apply_chat_template(answered, tokenize=False)
    assert text == "<bos><user>47+58<assistant>maybe 105<eos>"
    assert tokenizer.decode(tokenizer.encode(text), skip_special_tokens=True) == "47+58maybe 105"
    assert tokenizer("?!").input_ids[1] == tokenizer.unk_token_id
    assert (tokenizer.padding_side, tokenizer.pad_token, tokenizer.eos_token) == ("left", "<pad>", "<eos>")


def test_saved_model_loads_as_it_was_trained(base):
    import torch
    from transformers import AutoModelForCausalLM

    from services.demo.base_model import make_tokenizer, pretrain

    loaded = AutoModelForCausalLM.from_pretrained(base)
    again = pretrain(make_tokenizer(), seed=5, steps=3)
    assert loaded.dtype == torch.float32
    assert loaded.num_parameters() == 243_168
    assert loaded.config.hidden_size // loaded.config.num_attention_heads == 32
    names = dict(again.named_parameters())
    assert all(torch.equal(parameter, names[name]) for name, parameter in loaded.named_parameters())


def test_pretraining_depends_on_the_seed_learns_and_leaves_torch_as_it_was():
    import torch

    from services.demo.base_model import make_tokenizer, pretrain

    threads, state = torch.get_num_threads(), torch.get_rng_state()
    told: list[tuple[int, int, float]] = []
    first = pretrain(make_tokenizer(), seed=0, steps=12, progress=lambda *now: told.append(now))
    other = pretrain(make_tokenizer(), seed=1, steps=1)
    assert torch.get_num_threads() == threads
    assert torch.equal(torch.get_rng_state(), state)
    assert [now[:2] for now in told] == [(step, 12) for step in range(1, 13)]
    assert told[-1][2] < told[0][2]
    assert not torch.equal(first.model.embed_tokens.weight, other.model.embed_tokens.weight)


# ---- evaluation ------------------------------------------------------------------------------------------------


def group(problem: Problem, *texts: str) -> RolloutGroup:
    completions = [
        Completion(text=text, token_ids=[9] * len(text), logprobs=[-1.0] * len(text), finish_reason="stop")
        for text in texts
    ]
    return RolloutGroup(group_id=problem.prompt, prompt_token_ids=[1], completions=completions)


def test_figures_of_known_answers():
    first, second = Problem(47, 58), Problem(10, 20)
    by_steps = "units 0+0=0 tens 1+2+0=3 answer 30"
    sampled = [group(first, "maybe 105", "maybe 199"), group(second, by_steps, "maybe 30")]
    greedy = [group(first, "maybe 111"), group(second, "maybe 30")]
    certainty = [1.0, 2.0, 5.0, 4.0]
    scores = [{"self_certainty": value, "token_entropy": value / 10} for value in certainty]
    found = measure([first, second], sampled, greedy, scores)
    assert (found.problems, found.samples) == (2, 2)
    assert found.sampled_accuracy == 0.75
    # Means by problem are 0.5 and 1: variance 0.125, over two problems.
    assert found.sampled_error == pytest.approx((0.125 / 2) ** 0.5)
    assert found.greedy_accuracy == 0.5
    assert found.surest_accuracy == 0.5  # 199 is surer than 105; by steps is surer than the guess, both right
    assert found.self_certainty == 3.0
    assert found.length == (9 + 9 + len(by_steps) + 8) / 4
    assert found.entropy == pytest.approx((0.9 + 1.8 + 0.5 * len(by_steps) + 3.2) / (26 + len(by_steps)))
    assert found.ways["step_by_step"] == WayFigures(share=0.25, accuracy=1.0, self_certainty=5.0)
    assert found.ways["guess"] == WayFigures(share=0.75, accuracy=2 / 3, self_certainty=7 / 3)
    assert found.ways["other"] == WayFigures(share=0.0)


@pytest.fixture(scope="module")
def servers(base):
    from served import served

    import reward_server.app
    import rollout_server.app

    rollout = rollout_server.app.create(rollout_server.app.Settings(model=str(base), device="cpu", threads=1))
    reward = reward_server.app.create(reward_server.app.Settings(model=str(base), device="cpu", threads=1))
    with served(rollout) as rollout_url, served(reward) as reward_url:
        yield rollout_url, reward_url


async def test_evaluation_over_http_is_repeatable_by_seed(servers):
    first, again, other = [await evaluate(*servers, problems=6, samples=4, seed=seed) for seed in (1, 1, 2)]
    assert first == again
    assert (first.problems, first.samples, first.weight_version) == (6, 4, Version())
    assert other.self_certainty != first.self_certainty
    assert other.greedy_accuracy == first.greedy_accuracy
    with pytest.raises(TimeoutError):
        await evaluate(*servers, problems=6, samples=4, deadline_seconds=0.001)


async def test_self_certainty_and_entropy_are_those_of_the_model(servers, base):
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base).double()
    found = await evaluate(*servers, problems=3, samples=2, seed=7)
    async with RolloutClient(servers[0]) as client:
        groups = await _answers(client, task.held_out(3), 2, 1.0, 7, None, 60.0)
    certainties, entropies = [], []
    for one in groups:
        for completion in one.completions:
            ids = torch.tensor([one.prompt_token_ids + completion.token_ids])
            with torch.no_grad():
                rows = model(ids).logits[0, len(one.prompt_token_ids) - 1 : -1].log_softmax(-1)
            certainties.append(float((-rows.mean(-1) - math.log(rows.shape[-1])).mean()))
            entropies += (-(rows.exp() * rows).sum(-1)).tolist()
    assert found.self_certainty == pytest.approx(sum(certainties) / len(certainties), rel=1e-4)
    assert found.entropy == pytest.approx(sum(entropies) / len(entropies), rel=1e-4)


# ---- report ----------------------------------------------------------------------------------------------------


def evaluation(
    sampled=0.31, greedy=0.1, share=0.30, inside=0.93, surest=0.85, sure=(9.4, 8.2), error=0.01
) -> Evaluation:
    return Evaluation(
        problems=400,
        samples=8,
        sampled_accuracy=sampled,
        sampled_error=error,
        greedy_accuracy=greedy,
        greedy_error=error,
        surest_accuracy=surest,
        surest_error=error,
        self_certainty=8.5,
        entropy=0.7,
        length=10.9,
        stopped=1.0,
        ways={
            "step_by_step": WayFigures(share=share, accuracy=inside, self_certainty=sure[0]),
            "guess": WayFigures(share=1 - share, accuracy=0.04, self_certainty=sure[1]),
            "other": WayFigures(share=0.0),
        },
        weight_version=Version(),
    )


BASE = evaluation()
BETTER = evaluation(0.60, 0.94, 0.80, 0.75)
FLAT = evaluation(0.32, 0.11, 0.305)
WORSE = evaluation(0.06, 0.05, 0.05, 0.90)


def test_better_is_told_as_a_choice():
    line = report.conclusion("self_certainty", BASE, BETTER)
    assert line == (
        "With self-certainty as the only reward and no answers given, held-out accuracy rose from 31.0 % to 60.0 % "
        "(+29.0 points; greedy 10.0 % to 94.0 %); the model answers step by step more often (30.0 % to 80.0 % of "
        "answers), the way of answering it was surer of (self-certainty of the base model 9.40 against 8.20 for "
        "guesses); accuracy inside step-by-step answers fell (93.0 % to 75.0 %)."
    )


def test_flat_is_not_told_as_a_change():
    line = report.conclusion("random", BASE, FLAT)
    assert line.startswith("With a random reward (the control), held-out accuracy did not measurably change: 31.0 %")
    assert "about as often as before" in line
    assert "rose" not in line and "fell" not in line and "surer" not in line


def test_worse_is_told_plainly():
    line = report.conclusion("both", BASE, WORSE)
    assert "held-out accuracy fell from 31.0 % to 6.0 % (-25.0 points" in line
    assert "step by step less often (30.0 % to 5.0 %" in line
    assert "accuracy inside step-by-step answers did not measurably change" in line


@pytest.mark.parametrize("error", [0.001, 0.02, 0.2])
def test_a_change_counts_beyond_two_standard_errors(error):
    line = report.conclusion("verifiable", evaluation(error=error), evaluation(0.36, error=error))
    assert ("rose from" in line) == (0.05 > 2 * 2**0.5 * error)


def test_the_less_sure_way_is_named_as_such():
    line = report.conclusion("self_certainty", evaluation(sure=(7.5, 8.0)), evaluation(share=0.9, sure=(7.5, 8.0)))
    assert "the way of answering it was less sure of" in line


def test_no_step_by_step_answer_left():
    gone = evaluation(0.05, share=0.0)
    gone.ways["step_by_step"] = WayFigures(share=0.0)
    assert "no accuracy of step-by-step answers to compare" in report.conclusion("self_certainty", BASE, gone)


@given(st.sampled_from(ARMS), *[st.floats(0, 1)] * 4)
def test_no_line_ever_claims_arithmetic(arm, sampled, greedy, share, inside):
    line = report.conclusion(arm, BASE, evaluation(sampled, greedy, share, inside))
    assert "\n" not in line
    assert not re.search(r"arithmetic|learn|better at|to add", line)


@pytest.mark.parametrize(("surest", "said"), [(0.85, "at right answers"), (0.31, "nothing"), (0.05, "WRONG answers")])
def test_preflight(surest, said):
    line = report.preflight(evaluation(surest=surest))
    assert f"right in {100 * surest:.1f} %, an average one in 31.0 %" in line
    assert said in line


def step(number: int, lineage: int = 0, start: int = 0, **fields) -> dict:
    done = number / 100
    return {
        "lineage": lineage,
        "start": start,
        "step": number,
        "kl": 0.06 * done**2,
        "entropy": 0.7 - 0.45 * done,
        "completion_length": 11 + 9 * done,
        "components.exact_match": 0.31 + 0.28 * done,
        "components.self_certainty": 8.5 + 0.4 * done,
    } | fields


def write_steps(path: Path, rows: list[dict], tail: str = "") -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + tail)
    return path


def test_steps_of_the_surviving_lineage_count(tmp_path):
    first = [step(number) for number in range(1, 7)]
    rows = [*first, step(5, 1, 4), step(6, 1, 4), step(3, 2, 2), step(4, 2, 2)]
    found = read_steps(write_steps(tmp_path / "steps.jsonl", rows, tail='{"lineage": 2, "st'))
    assert [(row["step"], row["lineage"]) for row in found] == [(1, 0), (2, 0), (3, 2), (4, 2)]


@pytest.mark.parametrize("content", ["", "{}\n", '{"step": 1}\n' + json.dumps(step(2)) + "\n", "nonsense\n"])
def test_steps_that_are_none_are_refused(tmp_path, content):
    path = tmp_path / "steps.jsonl"
    path.write_text(content)
    with pytest.raises(StepsError, match=r"steps\.jsonl"):
        read_steps(path)
    with pytest.raises(StepsError, match="cannot read"):
        read_steps(tmp_path / "none.jsonl")


def test_report_leaves_a_plot_and_reads_back(tmp_path):
    write_steps(tmp_path / "steps.jsonl", [step(number) for number in range(1, 101)])
    written = report.write(tmp_path, "self_certainty", 3, BASE, BETTER, seconds=61.5)
    assert report.read(tmp_path / "report.json") == written
    assert (written.steps, written.seed) == (100, 3)
    image = (tmp_path / "report.png").read_bytes()
    assert image.startswith(b"\x89PNG") and len(image) > 20_000
    with pytest.raises(report.ReportError, match="not a report"):
        report.read(tmp_path / "steps.jsonl")


def test_a_curve_may_have_gaps_but_must_be_there(tmp_path):
    rows = [step(1), step(2), step(3)]
    del rows[1]["components.exact_match"]
    write_steps(tmp_path / "steps.jsonl", rows)
    report.write(tmp_path, "self_certainty", 0, BASE, BETTER)
    assert (tmp_path / "report.png").exists()
    del rows[0]["components.exact_match"], rows[2]["components.exact_match"]
    write_steps(tmp_path / "steps.jsonl", rows)
    with pytest.raises(report.ReportError, match="components.exact_match"):
        report.write(tmp_path, "self_certainty", 0, BASE, BETTER)


def printed(table, width=200) -> str:
    from rich.console import Console

    console = Console(width=width, record=True, file=open("/dev/null", "w"))
    console.print(table)
    return console.export_text()


def made(arm, seed, after=BETTER) -> report.Report:
    return report.Report(arm=arm, seed=seed, steps=100, line="-", preflight="-", before=BASE, after=after)


def test_table_shows_before_after_and_change():
    text = printed(report.table(made("self_certainty", 0)))
    assert re.search(r"accuracy, sampled\W+31\.0 %\W+60\.0 %\W+\+29\.0", text)
    assert re.search(r"answers step by step\W+30\.0 %\W+80\.0 %\W+\+50\.0", text)


def test_curves_have_a_column_for_each_arm(tmp_path):
    from matplotlib.image import imread

    def steps(count):
        fields = [field for field, *_ in curves.ROWS]
        return [{"step": step, **dict.fromkeys(fields, None if step == 2 else 0.1 * step)} for step in range(1, count)]

    one = imread(curves.plot({"random": [steps(5)]}, tmp_path / "one.png"))
    two = imread(curves.plot({"random": [], "both": [steps(5), steps(9)], "format": [steps(4)]}, tmp_path / "two.png"))
    assert two.shape[0] == one.shape[0] and 1.5 < two.shape[1] / one.shape[1] < 2
    assert two.std() > 0.05


def test_comparison_has_every_run_and_the_means():
    reports = [made("random", 0, FLAT), made("self_certainty", 1, FLAT), made("self_certainty", 0)]
    base, certainty, random = comparison.blocks(reports)
    assert [row[:4] for row in base] == [
        ["base model", "0", "31.0", ""],
        ["base model", "1", "31.0", ""],
        ["base model", "mean", "31.0", ""],
    ]
    assert [row[:4] for row in certainty] == [
        ["self_certainty", "0", "60.0", "+29.0"],
        ["self_certainty", "1", "32.0", "+1.0"],
        ["self_certainty", "mean", "46.0", "+15.0"],
    ]
    assert [row[:4] for row in random] == [["random", "0", "32.0", "+1.0"]]
    assert all(cell in printed(comparison.table(reports), width=80) for row in certainty for cell in row)
    lines = comparison.markdown(reports).splitlines()
    assert len(lines) == 9 and len({line.count("|") for line in lines}) == 1


# ---- arms ------------------------------------------------------------------------------------------------------


def test_arms_train_on_their_own_rewards_and_measure_the_same():
    weights = {arm: {term.name: term.weight for term in rewards(arm)} for arm in ARMS}
    assert weights == {
        "self_certainty": {"self_certainty": 1, "exact_match": 0},
        "verifiable": {"self_certainty": 0, "exact_match": 1},
        "both": {"self_certainty": 1, "exact_match": 1},
        "random": {"self_certainty": 0, "exact_match": 0, "random": 1},
        "format": {"self_certainty": 0, "exact_match": 0, "format": 1},
        "plurality": {"self_certainty": 0, "exact_match": 0, "majority_vote": 1},
        "intuitor_then_grpo": {"self_certainty": 1, "exact_match": 1},
    }


def test_intuitor_then_grpo_goes_over_in_the_middle():
    for steps, half in ((100, 50), (7, 3), (1, 1)):
        certainty, match = rewards("intuitor_then_grpo", steps=steps)
        weights = [(certainty.weight_at(version), match.weight_at(version)) for version in range(steps + 1)]
        assert weights == [(1, 0)] * half + [(0, 1)] * (steps + 1 - half)


def test_what_the_reward_server_takes_for_the_arms_terms():
    from reward_server.specs import EVERY_PART, check_spec

    for arm in ARMS:
        check_spec(RewardSpec(rewards=rewards(arm)), EVERY_PART)


def test_the_format_arm_pays_either_way_of_answering_right_or_wrong():
    from reward_server.rewards.format import FormatParams

    params = FormatParams(**next(term.params for term in rewards("format") if term.name == "format"))
    problem, rng = task.held_out(1)[0], random.Random(0)
    answers = [author(problem, rng) for author in (task.careful, task.guess) for _ in range(20)]
    assert {task.is_right(problem, answer) for answer in answers} == {True, False}
    assert all(getattr(re, params.match)(params.regex, answer) for answer in answers)
    assert not any(getattr(re, params.match)(params.regex, answer[:-3]) for answer in answers if len(answer) > 20)


def test_recipe_is_the_self_certainty_arm():
    loaded = recipe.load(Path(__file__).parent.parent / "recipes" / "demo.yaml")
    assert loaded.rewards == rewards("self_certainty")
    assert loaded.trainer.groups_per_step * loaded.rollout.group_size == 256
    assert loaded.run.deterministic and loaded.pacing.max_staleness == 0


def test_the_reward_servers_exact_match_takes_the_demos_pattern():
    from reward_server.rewards.exact_match import ExactMatchParams

    for term in rewards("verifiable"):
        if term.name == "exact_match":
            assert ExactMatchParams(**term.params).regex == task.ANSWER_PATTERN


@pytest.mark.parametrize(("command", "option"), [("demo", "--reward"), ("demo-all", "--arms")])
def test_an_arm_that_there_is_not_is_refused_by_its_option(monkeypatch, command, option):
    from typer.testing import CliRunner

    from services.cli.main import app

    monkeypatch.setattr("services.cli.demo.run_demo", lambda *_: pytest.fail("nothing may start"))
    done = CliRunner().invoke(app, [command, option, "foo"])
    assert str(done.exception) == f"{option} foo: choose {', '.join(ARMS)}"
