"""What orders (services.commands) do to training: which adjustments a run carries, and what is obeyed on every rank.

A roll-back is the one order that needs the engine; trainer.train does it.
"""

import logging

from services.commands import AnyOrder, Evaluated, RaiseBeta
from services.recipe import Recipe, Trainer
from trainer import checkpoint
from trainer.checkpoint import Progress
from trainer.metrics import StepLog

log = logging.getLogger(__name__)


def adjusted(settings: Trainer, progress: Progress) -> Trainer:
    """The recipe's settings as orders have changed them."""
    changes = {"learning_rate": settings.learning_rate * progress.rate}
    if progress.kl_beta is not None:
        changes["kl_beta"] = progress.kl_beta
    return settings.model_copy(update=changes)


def obey(order: AnyOrder, recipe: Recipe, progress: Progress, records: StepLog | None) -> str:
    """What came of an order that leaves the weights as they are, in plain words. `records` is rank 0's."""
    if isinstance(order, RaiseBeta):
        before = adjusted(recipe.trainer, progress).kl_beta
        progress.kl_beta = max(before, min(before * order.factor, order.cap))
        return f"kl_beta {before:g} -> {progress.kl_beta:g}"
    if isinstance(order, Evaluated) and records is not None:
        records.evaluated(order.result)
        return _mark_best(order.result.version.version, recipe) if order.result.best else "noted"
    return order.kind


def _mark_best(step: int, recipe: Recipe) -> str:
    directory = recipe.run.dir / "checkpoints"
    name = checkpoint.name_of(directory, step)
    if name is None:
        log.warning("the checkpoint of step %d is gone: it is not marked as the best", step)
        return f"no checkpoint of step {step} is left"
    checkpoint.mark_best(directory, name)
    return f"checkpoint {name} is the best"
