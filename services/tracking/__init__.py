"""Where a run's numbers and samples go, beside its own files: one small interface, a module for each place."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from services.recipe import Recipe, dump


class Tracker(Protocol):
    """`name` labels failures. Steps may come again (a restored run repeats some), and late (evaluations)."""

    name: str

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        """Numbers of a step, by names with dots (`accuracy.math_verify`)."""

    def samples(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """A step's completions: flat rows of text and numbers, all with the same keys."""

    def close(self) -> None:
        """Nothing is lost after this."""


def start(recipe: Recipe, step: int) -> list[Tracker]:
    """The recipe's trackers, for a run that goes on after `step`: the same W&B and MLflow run as before.

    Raises StartupError: a tracker cannot be started.
    """
    tracking, trackers = recipe.tracking, list[Tracker]()
    if tracking.samples_every:
        from services.tracking.jsonl import JsonLines

        trackers.append(JsonLines(recipe.run.dir))
    if tracking.tensorboard:
        from services.tracking.tensorboard import TensorBoard

        trackers.append(TensorBoard(recipe.run.dir, step))
    if tracking.wandb is not None:
        from services.tracking.wandb import WeightsAndBiases

        trackers.append(WeightsAndBiases(recipe.run.dir, recipe.run.name, tracking.wandb, settings(recipe)))
    if tracking.mlflow is not None:
        from services.tracking.mlflow import MlflowRun

        trackers.append(MlflowRun(recipe.run.dir, recipe.run.name, tracking.mlflow, dump(public(recipe))))
    return trackers


def public(recipe: Recipe) -> Recipe:
    """The recipe without addresses, which may carry passwords."""
    guard = recipe.guard and recipe.guard.model_copy(update={"webhook": None})
    mlflow = recipe.tracking.mlflow and recipe.tracking.mlflow.model_copy(update={"uri": "-"})
    changes = {
        "queue": recipe.queue.model_copy(update={"url": None}),
        "guard": guard,
        "tracking": recipe.tracking.model_copy(update={"mlflow": mlflow}),
        "rollout": recipe.rollout.model_copy(update={"urls": []}),
        "scorer": recipe.scorer.model_copy(update={"urls": []}),
    }
    return recipe.model_copy(update=changes)


def settings(recipe: Recipe) -> dict[str, Any]:
    return public(recipe).model_dump(mode="json")
