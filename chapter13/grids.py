"""The affine grid: evenly spaced levels, one of which is exactly zero.

    scale = (high - low) / (2**bits - 1)      zero_point = round(-low / scale)
    code = round(w / scale) + zero_point      w' = (code - zero_point) * scale

Everything here broadcasts, so a scale may belong to a row, a group or a column of weights.
`integer.py` rounds a whole weight to such grids, GPTQ rounds one column at a time, and AWQ rounds
in its searches.
"""

from typing import NamedTuple

import torch

from chapter13.tensors import round_scale

# Fractions of the range that a clip search tries: clipping a few extreme weights may cost less than
# the finer step gains for all others.
CLIP_FRACTIONS = [1 - step / 50 for step in range(21)]


class Grid(NamedTuple):
    """The levels that weights are rounded to; `scale` and `zero` broadcast against the weights."""

    scale: torch.Tensor
    """float32."""
    zero: torch.Tensor
    """float32, in the scale's shape: whole numbers."""
    levels: int
    """The highest code."""

    def codes(self, weights: torch.Tensor) -> torch.Tensor:
        """The nearest codes of some weights, as whole float32 numbers."""
        return (weights / nonzero(self.scale)).round_().add_(self.zero).clamp_(0, self.levels)

    def values(self, codes: torch.Tensor) -> torch.Tensor:
        """The weights that codes represent, float32."""
        return (codes - self.zero) * self.scale

    def rows(self, part: slice) -> "Grid":
        """The grid of some rows of the weights."""
        return Grid(self.scale[part], self.zero[part], self.levels)


def affine_grid(low: torch.Tensor, high: torch.Tensor, bits: int, scale_dtype: torch.dtype) -> Grid:
    """The grids over ranges [low, high], which are widened to include 0.

    `low`, `high`: of the same shape and floating data type. The scales are float16 numbers if
    `scale_dtype` is float16. Raises ValueError for a scale that `scale_dtype` cannot hold, and for
    a grid that would end beyond float32.
    """
    low, high = low.float().clamp(max=0), high.float().clamp(min=0)
    levels = 2**bits - 1
    reach = high.double() - low
    scale = round_scale((high - low) / levels, reach, levels, scale_dtype).float()
    zero = (-low / nonzero(scale)).round_().clamp_(max=levels)
    ends = torch.maximum(zero, levels - zero) * scale
    if not ends.isfinite().all():  # the grid reaches up to half a step beyond the weights
        raise ValueError(
            f"weights from {low.min().item():.3g} to {high.max().item():.3g} need a grid that ends "
            "beyond float32: divide the weight by some power of two first"
        )
    return Grid(scale, zero, levels)


def fit_grid(
    weights: torch.Tensor,
    bits: int,
    symmetric: bool,
    scale_dtype: torch.dtype,
    importance: torch.Tensor | None = None,
) -> Grid:
    """The grid for a group of weights, float32 (columns, rows): a scale for each row, (rows,).

    The weights are transposed here, so that the column that GPTQ rounds is contiguous.
    `symmetric`: from -absmax to absmax, with the zero point in the middle; with 4 bits the scale is
    2 absmax / 15, as in GPTQ's original code. `importance` (columns,): also try CLIP_FRACTIONS of
    the range, and take for each row the one with the least squared error, weighted by column.
    Raises ValueError as `affine_grid`.
    """
    low, high = weights.amin(0).clamp_(max=0), weights.amax(0).clamp_(min=0)
    if symmetric:
        high = torch.maximum(high, -low)
        low = -high

    def grid(fraction):
        scale, zero, levels = affine_grid(low * fraction, high * fraction, bits, scale_dtype)
        return Grid(scale, torch.full_like(zero, 2 ** (bits - 1)) if symmetric else zero, levels)

    best = grid(1)
    if importance is None:
        return best
    least = _errors(best, weights, importance)
    for fraction in CLIP_FRACTIONS[1:]:
        other = grid(fraction)
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


def nonzero(scale: torch.Tensor) -> torch.Tensor:
    """The scales in float32, with 1 for those of all-zero groups: 0 / 1 is 0, 0 / 0 is not."""
    scale = scale.float()
    return torch.where(scale == 0, 1.0, scale)
