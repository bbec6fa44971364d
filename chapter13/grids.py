"""The affine grid of a group of weights, made for rounding column after column.

Unlike everywhere else, weights lie with a column of the layer in each row here, (columns, rows):
what GPTQ works on at a time then lies together in memory.
"""

from typing import NamedTuple

import torch

from chapter13.integer import affine_grid, nonzero

# Parts of the range that a search tries: cutting off a few outermost weights may cost less than
# the finer step gains for all the others.
SHARES = [1 - step / 50 for step in range(21)]


class Grid(NamedTuple):
    """The levels that a group of weights is rounded to, in each row of the layer."""

    scale: torch.Tensor
    """float32 (rows,)."""
    zero: torch.Tensor
    """float32 (rows,), whole numbers."""
    levels: int
    """The highest code."""

    def codes(self, weights: torch.Tensor) -> torch.Tensor:
        """The nearest codes, in float32, of weights (..., rows)."""
        return (weights / nonzero(self.scale)).round_().add_(self.zero).clamp_(0, self.levels)

    def values(self, codes: torch.Tensor) -> torch.Tensor:
        """The weights that codes stand for."""
        return (codes - self.zero) * self.scale


def fit_grid(
    weights: torch.Tensor,
    bits: int,
    symmetric: bool,
    scale_dtype: torch.dtype,
    importance: torch.Tensor | None = None,
) -> Grid:
    """The grid for a group of weights, float32 (columns, rows).

    It spans their range, which always includes 0. `symmetric`: from -absmax to absmax, with the
    zero point in the middle; with 4 bits the scale is 2 absmax / 15, as in GPTQ's original code.
    `importance` (columns,): also try SHARES of that range, and take for each row what has the
    least squared error, weighted by column. Raises ValueError as `integer.affine_grid`.
    """
    low, high = weights.amin(0).clamp_(max=0), weights.amax(0).clamp_(min=0)
    if symmetric:
        high = torch.maximum(high, -low)
        low = -high

    def grid(share):
        scale, zero = affine_grid(low * share, high * share, bits, scale_dtype)
        middle = torch.full_like(zero, 2 ** (bits - 1))
        return Grid(scale.float(), middle if symmetric else zero, 2**bits - 1)

    best = grid(1)
    if importance is None:
        return best
    least = _errors(best, weights, importance)
    for share in SHARES[1:]:
        other = grid(share)
        errors = _errors(other, weights, importance)
        better = errors < least
        least = torch.where(better, errors, least)
        scale = torch.where(better, other.scale, best.scale)
        best = Grid(scale, torch.where(better, other.zero, best.zero), best.levels)
    return best


def _errors(grid: Grid, weights: torch.Tensor, importance: torch.Tensor) -> torch.Tensor:
    """Weighted squared rounding errors of each row: (rows,)."""
    errors = grid.values(grid.codes(weights)).sub_(weights).square_()
    return importance @ errors
