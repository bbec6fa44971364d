"""AWQ: before rounding, scale up the weights that multiply large activations.

Lin et al. 2023, https://arxiv.org/abs/2306.00978, with the paper's symbols. A linear layer computes
W x. Column j of W is multiplied by s_j and channel j of x divided by it, which changes nothing
until W is rounded:

    W x  ~  Q(W diag(s)) diag(s)^-1 x

The rounding error of a weight depends on the range of its group, so it is about the same before and
after; the error that channel j causes in the output therefore shrinks by s_j. But a column that is
scaled up too far widens the range. Hence a search over one parameter:

    s = mean|x|^r         r = 0, .05, .. .95: the one with the least squared error of the output

The division of x is folded into the preceding norm or linear layer (`whole_model/awq_block.py`), so
it costs nothing at run time. Then each group's range is clipped where that lowers the error. Only s
and the clipping are learned: each weight is still rounded to the nearest point of its grid.

This follows the authors' code, and AutoAWQ's without its "duo scaling", with these differences:

- their later blocks learn from the inputs of the unquantized model; ours learn from the outputs of
  the quantized blocks before them, like our GPTQ
- their grid runs from a group's smallest to its largest weight, even if both have the same sign.
  The zero point of such a grid is outside 0 to 2**bits - 1; they clamp it, and codes saturate. Our
  grid always includes zero, as in `quantize_affine`. A group with both signs gets the same grid
- their grid widens any range below 1e-5
"""

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch

from chapter13.grids import affine_grid
from chapter13.tensors import grouped

RATIOS = tuple(step / 20 for step in range(20))  # r
CLIP_FRACTIONS = tuple(1 - step / 20 for step in range(10))  # of a group's largest magnitude
CLIP_TOKENS = 512  # used at most in the search for clip fractions


class ScaleSearch(NamedTuple):
    """The result of `search_scale`."""

    s: torch.Tensor
    """float32 (in_features,): the best scales."""
    r: float
    """Their exponent."""
    losses: tuple[float, ...]
    """The mean squared error of the output for each r in RATIOS; inf if there is no valid grid."""


def scales(activation: torch.Tensor, r: float) -> torch.Tensor:
    """s = activation^r, at least 1e-4, over sqrt(max s * min s): float32 (in_features,).

    `activation`: mean |x| of each input channel. The division keeps s around 1 and does not change
    the ratios between channels. r = 0 gives ones.
    """
    s = activation.float().pow(r).clamp(min=1e-4)
    return s / (s.max() * s.min()).sqrt()


def search_scale(
    activation: torch.Tensor,
    weights: list[torch.Tensor],
    output: Callable[[list[torch.Tensor]], Iterable[torch.Tensor]],
    bits: int = 4,
    group_size: int | str = 64,
    scale_dtype: torch.dtype = torch.float16,
) -> ScaleSearch:
    """The r in RATIOS whose scales give the least output error; the first if several are equal.

    `activation`: as in `scales`. `weights`: of all linear layers that read these channels, each
    (out_features, in_features). `output(weights)`: the output to preserve, computed with these
    weights; any number of tensors.

    Raises as `quantize_affine`, and ValueError if the output is not finite.
    """
    exact = list(output(weights))
    losses = []
    for r in RATIOS:
        s = scales(activation, r)
        try:
            tried = [round_affine(W * s, bits, group_size, scale_dtype) / s for W in weights]
        except ValueError:
            if r == 0:  # the unscaled weights
                raise
            losses.append(torch.inf)  # the grid's scales would be beyond float16
            continue
        losses.append(_mse(exact, output(tried)))
    if not torch.tensor(losses[0]).isfinite():
        raise ValueError("the output holds NaN or Inf: the inputs do, or are too large")
    r = RATIOS[losses.index(min(losses))]
    return ScaleSearch(scales(activation, r), r, tuple(losses))


def search_clip(
    weight: torch.Tensor,
    inputs: torch.Tensor,
    bits: int = 4,
    group_size: int | str = 64,
    scale_dtype: torch.dtype = torch.float16,
) -> torch.Tensor:
    """The magnitude at which each group is best clipped: float32 (out_features, groups, 1).

    Tries CLIP_FRACTIONS of the group's largest magnitude and takes the one with the least squared
    error in the group's contribution to the output; the largest if several are equal. `weight`:
    (out_features, in_features), `inputs`: (tokens, in_features), of which at most CLIP_TOKENS are
    used, evenly spread. `weight.view(out, groups, -1).clamp(-limit, limit)` clips. Raises as
    `quantize_affine`.
    """
    groups = grouped(weight.float(), group_size)
    W = groups.reshape(len(weight), -1, groups.shape[1])
    x = spread(inputs).float()
    x = x.view(len(x), *W.shape[1:]).transpose(0, 1)
    # |x d|^2 summed over tokens is d^T (x^T x) d: a matrix of the group's width replaces all x
    gram = x.transpose(1, 2) @ x
    largest = W.abs().amax(2, keepdim=True)
    limit, least = largest, torch.full_like(largest, torch.inf)
    for fraction in CLIP_FRACTIONS:
        tried = W.clamp(-fraction * largest, fraction * largest).view_as(weight)
        try:
            d = round_affine(tried, bits, group_size, scale_dtype).view_as(W) - W
        except ValueError:
            if fraction == 1:
                raise
            break
        d = d.transpose(0, 1)
        error = ((d @ gram) * d).sum(2).T.unsqueeze(2)
        better = error < least
        limit = torch.where(better, fraction * largest, limit)
        least = torch.where(better, error, least)
    return limit


def round_affine(
    weight: torch.Tensor, bits: int, group_size: int | str, scale_dtype: torch.dtype
) -> torch.Tensor:
    """quantize_affine(...).dequantize() of a float32 weight, without packing the codes."""
    groups = grouped(weight, group_size)
    low, high = groups.amin(1, keepdim=True), groups.amax(1, keepdim=True)
    grid = affine_grid(low, high, bits, scale_dtype)
    return grid.values(grid.codes(groups)).view(weight.shape)


def spread(inputs: torch.Tensor) -> torch.Tensor:
    """At most CLIP_TOKENS of all tokens (tokens, in_features), evenly spaced."""
    return inputs[:: -(-len(inputs) // CLIP_TOKENS)]


def _mse(exact, outputs):
    pairs = list(zip(exact, outputs, strict=True))
    total = sum((a - b).square_().sum(dtype=torch.float64) for a, b in pairs)
    return total.item() / sum(a.numel() for a, _ in pairs)
