"""Trackers for real, without a network: what was told is found where each of them keeps it."""

import json
from pathlib import Path

import pytest
from scored_groups import make_groups

from services import recipe, tracking
from services.contract import Completion
from services.startup import StartupError
from trainer import diversity
from trainer.metrics import StepLog, sample_rows


def tracked(run_dir: Path, **options) -> recipe.Recipe:
    return recipe.parse(
        {
            "run": {"name": "r", "dir": str(run_dir)},
            "model": {"path": "m"},
            "data": {"path": "d.jsonl", "fields": {"prompt": "p"}},
            "rewards": "intuitor",
            "trainer": {"steps": 9, "groups_per_step": 1},
            "queue": {"url": "redis://:secret@redis:6379"},
            "guard": {"webhook": "https://chat.example/secret"},
            "tracking": {"tensorboard": False, **options},
        }
    )


def row(step: int) -> dict:
    return {"prompt": "1+1 | x", "completion": "a\nb", "reward": 0.5, "advantage": -1.0, "value.r": None, "step": step}


def test_files_hold_samples_and_numbers(tmp_path):
    chosen = tracked(tmp_path, samples_every=2)
    for attempt in (1, 2):  # a restored run trains a step again
        (tracker,) = tracking.start(chosen, 0)
        tracker.log(2, {"loss": float(attempt)})
        tracker.samples(2, [row(attempt)] * attempt)
        tracker.close()
    kept = [json.loads(line) for line in (tmp_path / "samples" / "step-2.jsonl").read_text().splitlines()]
    assert kept == [row(2), row(2)]
    numbers = [json.loads(line) for line in (tmp_path / "numbers.jsonl").read_text().splitlines()]
    assert numbers == [{"step": 2, "loss": 1.0}, {"step": 2, "loss": 2.0}]


def test_tensorboard_has_numbers_and_a_table(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (tracker,) = tracking.start(tracked(tmp_path, tensorboard=True), 0)
    tracker.log(3, {"accuracy.math": 0.5})
    tracker.samples(3, [row(3)])
    tracker.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("accuracy/math")] == [(3, 0.5)]
    text = events.Tensors("samples/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "| 1+1 \\| x | a<br>b | 0.5 | -1 | None | 3 |" in text


def test_wandb_offline_goes_on_as_the_same_run(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    chosen = tracked(tmp_path, wandb={"project": "p", "mode": "offline"})
    for step in (2, 1):
        (tracker,) = tracking.start(chosen, 0)
        tracker.log(step, {"loss": 1.5})
        tracker.samples(step, [row(step)])
        tracker.close()
    known = json.loads((tmp_path / "tracking.json").read_text())["wandb"]
    folders = sorted((tmp_path / "wandb").glob("offline-run-*"))
    assert folders and all(folder.name.endswith(known) for folder in folders)
    written = b"".join(path.read_bytes() for path in (tmp_path / "wandb").rglob("*.wandb"))
    assert b"secret" not in written and b"samples" in written and b"loss" in written


def test_mlflow_goes_on_as_the_same_run(tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    uri = (tmp_path / "mlruns").as_uri()
    chosen = tracked(tmp_path, mlflow={"uri": uri, "experiment": "e"})
    for step in (1, 2):
        (tracker,) = tracking.start(chosen, 0)
        tracker.log(step, {"accuracy.math": step / 2})
        tracker.samples(step, [row(step)])
        tracker.close()
    client = mlflow.MlflowClient(tracking_uri=uri)
    experiment = client.get_experiment_by_name("e").experiment_id
    (run,) = client.search_runs([experiment])
    history = client.get_metric_history(run.info.run_id, "accuracy/math")
    assert [(metric.step, metric.value) for metric in history] == [(1, 0.5), (2, 1.0)]
    files = {path.name: path for path in Path(tmp_path / "mlruns").rglob("artifacts/**/*") if path.is_file()}
    assert json.loads(files["step-2.json"].read_text())["samples"][0]["step"] == 2
    assert "secret" not in files["recipe.yaml"].read_text() and run.info.status == "FINISHED"


def test_a_tracker_that_cannot_start_is_named(tmp_path, monkeypatch):
    pytest.importorskip("mlflow")
    monkeypatch.delenv("MLFLOW_ALLOW_FILE_STORE", raising=False)
    with pytest.raises(StartupError, match="^tracking.mlflow: "):
        tracking.start(tracked(tmp_path, mlflow={"uri": (tmp_path / "mlruns").as_uri()}), 0)


def test_a_tracker_that_fails_costs_its_numbers_not_the_run(tmp_path, caplog):
    records = StepLog(tracked(tmp_path, samples_every=1), start=0)

    def fail(*_):
        raise ConnectionError("the network is down")

    records.trackers[0].log = records.trackers[0].samples = fail
    line = {"lineage": 0, "step": 1, "group_ids": ["a"], "tokens": 5, "completions": 2, "seconds": {}, "loss": 0.5}
    records.write(line)
    records.samples(1, make_groups(1))
    records.close()
    assert json.loads((tmp_path / "steps.jsonl").read_text()) == line
    assert caplog.text.count("tracking: jsonl did not take it: the network is down") == 2


def test_rows_have_every_component():
    first, second = make_groups(2, size=2)
    scores = [score.model_copy(update={"components": {}}) for score in second.scores]
    rows = sample_rows([first, second.model_copy(update={"scores": scores})])
    names = [name for name in rows[0] if name.startswith("outcome.")]
    assert len(rows) == 4 and names and all(row.keys() == rows[0].keys() for row in rows)
    assert [rows[3][name] for name in names] == [""] * len(names)


# ---- diversity -------------------------------------------------------------------------------------------------


def completion(text: str, *ids: int) -> Completion:
    return Completion(text=text, token_ids=ids, logprobs=[-1.0] * len(ids), finish_reason="stop")


def test_distinct_bigrams_are_of_the_group():
    assert diversity.distinct([completion("", 1, 2, 3), completion("", 1, 2, 4)]) == 3 / 4
    assert diversity.distinct([completion("", 5, 5, 5, 5, 5)]) == 1 / 4
    assert diversity.distinct([completion("", 5), completion("")]) is None


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("so it is \\boxed{42}. Done", "42"),
        ("\\boxed{1} no, \\boxed{2}", "2"),
        ("The answer is **42**.", "42"),
        ("answer 105", "105"),
        ("Yes!", "yes"),
        ("", ""),
    ],
)
def test_the_final_answer(text, answer):
    assert diversity.final_answer(text) == answer


def test_answers_that_are_all_the_same():
    assert diversity.answers([completion("it is 4"), completion("4."), completion("2 + 2 = 5"), completion("4")]) == 0.5
