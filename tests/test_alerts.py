"""Each alert rule fires on a series that it is for, and is silent on one that looks like it: promtool's unit tests."""

import re
import shutil
import subprocess
from dataclasses import dataclass

import pytest
import yaml
from test_dashboards import ALERTS, RULES

pytestmark = pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed")


@dataclass(frozen=True)
class Case:
    """Series in promtool's notation, one sample a minute; looked at after `minutes`."""

    minutes: int
    fires: dict[str, str]
    silent: dict[str, str]


def trainer(step: str, at: str) -> dict[str, str]:
    return {
        'rlif_trainer_step{job="trainer"}': step,
        'rlif_trainer_planned_steps{job="trainer"}': "100x200",
        'rlif_trainer_last_step_timestamp_seconds{job="trainer"}': at,
    }


def down(job: str, step: str = "50x20", run: str = "a") -> dict[str, str]:
    of = f'{{job="rlif-trainer",namespace="ml",run="{run}"}}'
    return {
        f"up{of}": "1x90",
        f'up{{job="{job}",namespace="ml",run="{run}"}}': "1 0x90",
        f"rlif_trainer_step{of}": step,
        f"rlif_trainer_planned_steps{of}": "100x20",
    }


def vanished(step: str) -> dict[str, str]:
    """The trainer's pod is gone, and its target with it."""
    of = '{job="rlif-trainer",namespace="ml",run="a"}'
    return {
        f"up{of}": "1x20 _x60",
        f"rlif_trainer_step{of}": f"{step}x20 _x60",
        f"rlif_trainer_planned_steps{of}": "100x20 _x60",
        'up{job="rlif-orchestrator",namespace="ml",run="a"}': "1x80",
    }


def done_beside(job: str) -> dict[str, str]:
    """Run `a` is down, run `b` is done."""
    of = '{job="rlif-trainer",namespace="ml",run="b"}'
    return down(job) | {f"rlif_trainer_step{of}": "100x20", f"rlif_trainer_planned_steps{of}": "100x20"}


def scores(failed: str, good: str, skipped: str = "0x30") -> dict[str, str]:
    series = 'rlif_reward_scores_total{reward="math_verify",outcome="%s"}'
    return {series % "timeout": failed, series % "correct": good, series % "skipped": skipped}


def band(metric: str, then: str, now: str) -> dict[str, str]:
    return {metric: f"{then}x74 {now}x30"}


def reward_and_accuracy(reward: str, accuracy: str) -> dict[str, str]:
    of = '{job="trainer",instance="a"%s}'
    return {
        "rlif_trainer_reward" + of % "": f"1x60 {reward}x90",
        "rlif_trainer_accuracy_ratio" + of % ',component="math_verify"': f"0.6x60 {accuracy}x90",
    }


CASES = {
    "RlifServiceDown": Case(10, down("rlif-reward"), down("rlif-trainer")),
    # Silent: the last step that was seen is within the last tenth, the run was done.
    "RlifRunDown": Case(15, down("rlif-orchestrator"), down("rlif-orchestrator", "50 95x19")),
    "RlifRewardFailures": Case(30, scores("0+2x30", "0+98x30", "0+900x30"), scores("0+1x30", "0+199x30")),
    "RlifVerifierKills": Case(
        20,
        {'rlif_verifier_kills_total{instance="a",reason="died"}': "0+5x30"},
        {'rlif_verifier_kills_total{instance="a",reason="died"}': "0+1x30"},
    ),
    "RlifWeightLag": Case(
        10,
        {'rlif_weight_lag_versions{replica="reward-a",service="reward"}': "0 3x10"},
        {'rlif_weight_lag_versions{replica="reward-a",service="reward"}': "0 3 0 2x10"},
    ),
    "RlifWeightsRefused": Case(
        10,
        {'rlif_weight_versions_refused_total{service="reward"}': "0 0 1x20"},
        {'rlif_weight_versions_refused_total{service="reward"}': "3x20"},
    ),
    # Silent: it is done, and does nothing but its last checkpoint.
    "RlifTrainerStalled": Case(40, trainer("50x200", "0x200"), trainer("100x200", "0x200")),
    "RlifQueueStuck": Case(
        40,
        {'rlif_queue_groups{run="r",state="queued"}': "8x60"},
        {
            'rlif_queue_groups{run="r",state="queued"}': "8 4 " * 20,
            'rlif_queue_groups{run="r",state="pending"}': "8x60",
        },
    ),
    "RlifDeadLetters": Case(
        30,
        {'rlif_queue_groups{run="r",state="dead"}': "0x20 1x20"},
        {'rlif_queue_groups{run="r",state="dead"}': "3x40"},
    ),
    "RlifEntropyOutOfBand": Case(
        100, band("rlif_trainer_entropy_nats", "1.5", "0.2"), band("rlif_trainer_entropy_nats", "1.5", "0.9")
    ),
    "RlifLengthOutOfBand": Case(
        100,
        band("rlif_trainer_completion_length_tokens", "300", "900"),
        band("rlif_trainer_completion_length_tokens", "300", "500"),
    ),
    "RlifCollapseAlarm": Case(
        10, {'rlif_guard_alarm{signal="length"}': "0x5 1x5"}, {'rlif_guard_alarm{signal="length"}': "0 1 0x8"}
    ),
    "RlifRewardUpAccuracyDown": Case(110, reward_and_accuracy("2", "0.4"), reward_and_accuracy("2", "0.58")),
}


MORE = {
    "another run is done": ("RlifRunDown", Case(15, done_beside("rlif-trainer"), done_beside("somebody-elses"))),
    "the target is gone": ("RlifRunDown", Case(40, vanished("50"), vanished("96"))),
    "of somebody else": ("RlifServiceDown", Case(10, down("rlif-rollout"), down("argo-rollouts-metrics"))),
}


def unit_test(alert: str, case: Case, series: dict[str, str], count: int | None) -> dict:
    expected = [] if count is None else [{"labels": "{}", "value": count}]
    query = f'count(ALERTS{{alertname="{alert}",alertstate="firing"}})'
    return {
        "interval": "1m",
        "name": f"{alert} {'fires' if count else 'is silent'}",
        "input_series": [{"series": name, "values": values.strip()} for name, values in series.items()],
        "promql_expr_test": [{"expr": query, "eval_time": f"{case.minutes}m", "exp_samples": expected}],
    }


def run_promtool(folder, tests: list[dict]) -> subprocess.CompletedProcess:
    path = folder / "tests.yaml"
    tree = {"rule_files": [str(ALERTS)], "evaluation_interval": "1m", "tests": tests}
    path.write_text(yaml.safe_dump(tree))
    return subprocess.run(["promtool", "test", "rules", path], capture_output=True, text=True, timeout=120)


def test_every_alert_fires_and_is_silent_as_it_should(tmp_path):
    assert set(CASES) == {rule["alert"] for rule in RULES}
    tests = [
        unit_test(alert, case, series, count)
        for alert, case in [*CASES.items(), *MORE.values()]
        for series, count in ((case.fires, 1), (case.silent, None))
    ]
    done = run_promtool(tmp_path, tests)
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_wrong_expectation_is_noticed(tmp_path):
    case = CASES["RlifDeadLetters"]
    done = run_promtool(tmp_path, [unit_test("RlifDeadLetters", case, case.silent, 1)])
    assert done.returncode != 0 and "FAILED" in done.stdout + done.stderr


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule["alert"])
def test_every_alert_says_what_it_is_and_what_to_do(rule):
    assert rule["labels"]["severity"] in ("critical", "warning")
    assert set(rule["annotations"]) == {"summary", "description", "runbook_url"}
    words = "-".join(re.findall("[A-Z][a-z]+", rule["alert"].removeprefix("Rlif"))).lower()
    assert rule["annotations"]["runbook_url"] == f"docs/operations.md#alert-{words}"
    assert "\n" not in rule["annotations"]["summary"] and rule["annotations"]["description"].endswith(".")
