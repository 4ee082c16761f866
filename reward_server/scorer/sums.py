"""Running sums over the vocabulary with torch operators: what tiles of logits leave behind. `fused.cpp` makes the same.

Per row t, of its logits z_tj (divided by the temperature):
  top = max_j z_tj          total = sum_j exp(z_tj - top)
  slope, square = sum_j exp(z_tj - top) (z_tj - top)^1 and ^2
  cross = sum_j exp(z_tj - top) (z_tj - y_tj), y_tj being the reference model's logits
  largest = the k largest z_tj
Tiles are reduced in float32, and added up in float64.
"""

import math
from dataclasses import dataclass

import torch

from reward_server.scorer.metrics import Wanted


@dataclass
class Sums:
    """float64 [T] each, and `largest` [T, k] in descending order. What is not wanted is none."""

    top: torch.Tensor
    total: torch.Tensor
    slope: torch.Tensor | None = None
    square: torch.Tensor | None = None
    cross: torch.Tensor | None = None
    largest: torch.Tensor | None = None

    @classmethod
    def start(cls, rows: int, device: torch.device, wanted: Wanted, cross: bool = False, k: int = 0) -> "Sums":
        """Sums over nothing yet."""

        def zeros(is_wanted: bool) -> torch.Tensor | None:
            return torch.zeros(rows, dtype=torch.float64, device=device) if is_wanted else None

        lowest = torch.full((rows, 1 + k), -math.inf, dtype=torch.float64, device=device)
        return cls(
            top=lowest[:, 0].clone(),
            total=torch.zeros(rows, dtype=torch.float64, device=device),
            slope=zeros(wanted.entropy or wanted.varentropy),
            square=zeros(wanted.varentropy),
            cross=zeros(cross),
            largest=lowest[:, 1:] if k else None,
        )

    @property
    def lse(self) -> torch.Tensor:
        return self.top + self.total.log()

    def add(self, part: slice, logits: torch.Tensor, reference: torch.Tensor | None = None) -> None:
        """Add a tile, float32 [rows of `part`, entries]; it is overwritten. `reference`: the tile of y."""
        difference = None if self.cross is None or reference is None else logits - reference
        if self.largest is not None:
            here_largest = logits.topk(min(self.largest.shape[1], logits.shape[1])).values.double()
            both = torch.cat([self.largest[part], here_largest], 1)
            self.largest[part] = both.topk(self.largest.shape[1]).values
        high = logits.amax(1)
        logits -= high[:, None]
        powers = logits.exp()
        here, here_total = high.double(), powers.sum(1).double()
        to = torch.maximum(self.top[part], here)
        my_shift = torch.where(self.total[part] > 0, self.top[part] - to, 0.0)
        their_shift = here - to
        mine, theirs = my_shift.exp(), their_shift.exp()
        if self.slope is not None:
            here_slope = torch.linalg.vecdot(powers, logits).double()
            if self.square is not None:
                here_square = torch.linalg.vecdot(powers * logits, logits).double()
                ours = moved_square(self.total[part], self.slope[part], self.square[part], my_shift)
                self.square[part] = mine * ours + theirs * moved_square(
                    here_total, here_slope, here_square, their_shift
                )
            ours = self.slope[part] + self.total[part] * my_shift
            self.slope[part] = mine * ours + theirs * (here_slope + here_total * their_shift)
        if self.cross is not None and difference is not None:
            here_cross = torch.linalg.vecdot(powers, difference).double()
            self.cross[part] = mine * self.cross[part] + theirs * here_cross
        self.total[part] = mine * self.total[part] + theirs * here_total
        self.top[part] = to


def moved_square(total: torch.Tensor, slope: torch.Tensor, square: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
    """sum e^x (x + shift)^2 out of the sums of e^x, e^x x and e^x x^2."""
    return square + 2 * shift * slope + shift * shift * total
