"""AWQ: before rounding, scale up the weights that meet large activations.

Lin et al. 2023, https://arxiv.org/abs/2306.00978, with the paper's symbols. A linear layer computes
W x. Column j of W is multiplied by s_j and channel j of x divided by it, which changes nothing
until W is rounded:

    W x  ~  Q(W diag(s)) diag(s)^-1 x

The error of a rounded weight is about the same before and after, since it depends on its group's
range; so the error that channel j leaves in the output shrinks by s_j. But the range grows
when a column is scaled up too far. Hence a search with one parameter:

    s = mean|x|^r         r = 0, .05, .. .95: the one with the least squared error of the output

The division of x is folded into the norm or linear layer before (`whole_model/awq_block.py`), so
that it costs nothing. Then each group's range is clipped where that lowers the error. Only s and
the clipping are learned: each weight is still rounded to the nearest point of its grid.

This follows the authors' code, and AutoAWQ's without its "duo scaling", except in two points. Their
later blocks learn from inputs of the unquantized model; ours from those of the quantized blocks
before, as our GPTQ does. Their grid spans each group's smallest to largest weight, also where both
have one sign; the zero point of such a grid lies outside of 0 to 2**bits - 1, they clamp it, and
the codes saturate. Ours spans zero as well, as `quantize_affine`; the two are the same wherever a
group has both signs. Their grid also widens any range below 1e-5.
"""

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch

from chapter13.grids import affine_grid
from chapter13.tensors import grouped

RATIOS = tuple(step / 20 for step in range(20))  # r
CLIP_FRACTIONS = tuple(1 - step / 20 for step in range(10))  # of a group's largest magnitude
CLIP_TOKENS = 512  # at most, when the clip fraction is searched


class ScaleSearch(NamedTuple):
    """What `search_scale` found."""

    s: torch.Tensor
    """float32 (in_features,): the best scales."""
    r: float
    """Their exponent."""
    losses: tuple[float, ...]
    """The mean squared error of the output for each r in RATIOS; inf where no grid can be held."""


def scales(activation: torch.Tensor, r: float) -> torch.Tensor:
    """s = activation^r, at least 1e-4, over sqrt(max s * min s): float32 (in_features,).

    `activation`: mean |x| of each input channel. The division leaves what counts, the ratios, and
    keeps s around 1. r = 0 gives ones.
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
    """The r in RATIOS whose scales lose least of an output; of equal ones the first.

    `activation`: as `scales` takes it. `weights`: of all linear layers that read these channels,
    each (out_features, in_features). `output(weights)`: what should stay, with these weights in
    place; any number of tensors.

    Raises as `quantize_affine`, and ValueError where the output is not finite.
    """
    exact = list(output(weights))
    losses = []
    for r in RATIOS:
        s = scales(activation, r)
        try:
            tried = [round_affine(W * s, bits, group_size, scale_dtype) / s for W in weights]
        except ValueError:
            if r == 0:  # the weights as they are
                raise
            losses.append(torch.inf)  # scaled beyond what float16 scales can hold
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

    Of CLIP_FRACTIONS of the group's largest magnitude, the one with the least squared error of
    what the group adds to the output; of equal ones the largest. `weight`: (out_features,
    in_features), `inputs`: (tokens, in_features), of which CLIP_TOKENS are used at most, evenly
    spread. `weight.view(out, groups, -1).clamp(-limit, limit)` clips. Raises as `quantize_affine`.
    """
    groups = grouped(weight.float(), group_size)
    W = groups.reshape(len(weight), -1, groups.shape[1])
    x = spread(inputs).float()
    x = x.view(len(x), *W.shape[1:]).transpose(0, 1)
    # |x d|^2 summed over tokens is d^T (x^T x) d: a matrix as wide as a group in place of all x
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
    """At most CLIP_TOKENS of all tokens (tokens, in_features), at equal distances."""
    return inputs[:: -(-len(inputs) // CLIP_TOKENS)]


def _mse(exact, outputs):
    pairs = list(zip(exact, outputs, strict=True))
    total = sum((a - b).square_().sum(dtype=torch.float64) for a, b in pairs)
    return total.item() / sum(a.numel() for a, _ in pairs)
