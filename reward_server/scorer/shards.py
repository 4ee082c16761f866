"""One vocabulary, cut into shards of LM head rows: what each rank summed over its own makes one distribution's sums.

Every rank sends a few numbers a row, never its logits. Rows that only pad the vocabulary belong to no shard, and no
shard is empty.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from reward_server.scorer.sums import Sums, moved_square


@dataclass(frozen=True)
class Shards:
    """`first`: the token id of this rank's first row; `vocab_size`: all ranks' rows together.

    `gather` makes of this rank's [T, C] all ranks' [ranks, T, C], the same on every rank.
    """

    first: int
    vocab_size: int
    gather: Callable[[torch.Tensor], torch.Tensor]

    def merge(
        self, sums: Sums, mean_logit: torch.Tensor, size: int, chosen_logit: torch.Tensor | None, top_k: int
    ) -> tuple[Sums, torch.Tensor, torch.Tensor | None]:
        """The whole vocabulary's sums, mean logit and chosen logit, of those over this rank's `size` rows.

        `chosen_logit` is 0 on the ranks that do not hold the token.
        """
        tables = self.gather(table_of(sums, mean_logit * size, chosen_logit, top_k))
        merged, total_logit, chosen = merge_tables(tables, sums, min(top_k, self.vocab_size))
        return merged, total_logit / self.vocab_size, None if chosen_logit is None else chosen


def table_of(sums: Sums, total_logit: torch.Tensor, chosen_logit: torch.Tensor | None, top_k: int) -> torch.Tensor:
    """float64 [T, 6 + top_k]: what one shard tells the others. What it has not is 0, or a logit of -inf."""
    nothing = torch.zeros_like(sums.top)
    columns = [sums.top, sums.total, sums.slope, sums.square, total_logit, chosen_logit]
    table = torch.stack([nothing if column is None else column for column in columns], 1)
    if not top_k:
        return table
    largest = sums.top.new_full((len(table), top_k), -torch.inf)
    if sums.largest is not None:
        largest[:, : sums.largest.shape[1]] = sums.largest
    return torch.cat([table, largest], 1)


def merge_tables(tables: torch.Tensor, like: Sums, top_k: int) -> tuple[Sums, torch.Tensor, torch.Tensor]:
    """(sums, sum of the logits, chosen logit) of `tables` [shards, T, C]; fields that `like` lacks are none."""
    tops, totals, slopes, squares, total_logits, chosen = tables[..., :6].unbind(-1)
    top = tops.amax(0)
    shifts = tops - top
    factors = shifts.exp()
    slope = (factors * (slopes + totals * shifts)).sum(0)
    square = (factors * moved_square(totals, slopes, squares, shifts)).sum(0)
    largest = tables[..., 6:].movedim(0, 1).flatten(1)
    return (
        Sums(
            top=top,
            total=(factors * totals).sum(0),
            slope=None if like.slope is None else slope,
            square=None if like.square is None else square,
            largest=largest.topk(top_k).values if top_k else None,
        ),
        total_logits.sum(0),
        chosen.sum(0),
    )
