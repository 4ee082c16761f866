"""One step's batch as minibatches, an optimizer update each, and each as this rank's micro-batches.

Minibatches are of whole groups: a group's advantages are made to balance each other, and its completions share a
prompt. They stay the same in every epoch, so that what is computed once a step (the reference's and the proximal
logprobs) lies beside its micro-batch; their order is drawn anew for each epoch.
"""

from dataclasses import dataclass, replace

import numpy as np
from torch import Tensor

from services.recipe import Trainer
from trainer.algorithms.advantages import clip_cov, whiten
from trainer.batch import MicroBatch, Sequences, budget, deal, micro_batch
from trainer.ranks import Ranks


@dataclass
class Part:
    """A micro-batch and what was computed for its tokens before the step's first update, [T], on the device."""

    micro: MicroBatch
    cut: int
    """Tokens that clip-cov keeps the policy gradient off."""
    reference: Tensor | None = None
    old: Tensor | None = None


def parts(batch: Sequences, settings: Trainer, ranks: Ranks, rng: np.random.Generator) -> list[list[Part]]:
    """[minibatch][micro-batch]: this rank's share of `batch`, which must be the same on every rank, as `rng` must.

    Every rank has equally many micro-batches of a minibatch. A minibatch may be empty: it still makes an update, so
    that the number of updates does not depend on which rewards failed.
    """
    if settings.whiten:
        batch = replace(batch, advantages=whiten(batch.advantages, batch.completions))
    return [_of_rank(minibatch, settings, ranks, rng) for minibatch in split(batch, settings.minibatches, rng)]


def split(batch: Sequences, count: int, rng: np.random.Generator) -> list[Sequences]:
    """The batch as `count` minibatches of about equally many groups, drawn by `rng`, each in the batch's order."""
    if count == 1:
        return [batch]
    shares = np.array_split(rng.permutation(np.unique(batch.groups)), count)
    return [batch.take(np.flatnonzero(np.isin(batch.groups, share))) for share in shares]


def order(minibatches: int, epochs: int, rng: np.random.Generator) -> list[int]:
    """Which minibatch each of the step's updates is made from."""
    return [int(number) for _ in range(epochs) for number in rng.permutation(minibatches)]


def _of_rank(minibatch: Sequences, settings: Trainer, ranks: Ranks, rng: np.random.Generator) -> list[Part]:
    kept = np.ones(len(minibatch.logprobs), np.float32)
    if settings.clip_cov is not None:
        of_tokens = np.repeat(minibatch.advantages, minibatch.completions)
        kept[clip_cov(minibatch.logprobs, of_tokens, settings.clip_cov, rng)] = 0
    plan = deal(minibatch, ranks.size, budget(settings.micro_batch_tokens, ranks.device))[ranks.rank]
    return [_part(minibatch, indices, kept, settings) for indices in plan]


def _part(minibatch: Sequences, indices: np.ndarray, kept: np.ndarray, settings: Trainer) -> Part:
    micro = micro_batch(minibatch, indices, settings.aggregation, settings.aggregation_length)
    places = minibatch.completion_tokens(indices)
    if len(places) == 0 or kept[places].all():
        return Part(micro, 0)
    # Without an advantage a token has no policy gradient; its KL and entropy terms stay.
    advantages = micro.advantages * micro.advantages.new_tensor(kept[places])
    return Part(replace(micro, advantages=advantages), int((kept[places] == 0).sum()))
