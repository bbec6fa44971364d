"""Integer grids: absmax (symmetric) and affine (asymmetric), per tensor, per channel, per group.

Absmax puts the grid's outermost level on the largest magnitude:

    scale = max|w| / (2**(bits-1) - 1)        code = round(w / scale)        w' = code * scale

Affine uses all 2**bits levels for the range of the weights, shifted so that zero is exact:

    scale = (max - min) / (2**bits - 1)       zero_point = round(-min / scale)
    code = round(w / scale) + zero_point      w' = (code - zero_point) * scale

`round` rounds ties to even, as torch does. The first five functions are the book chapter's own; the
general ones below them pack their codes and round their scales to float16 before the codes are
computed, as the file formats do. Weights are (out_features, in_features), like
`torch.nn.Linear.weight`.
"""

import torch

from chapter13.grids import affine_grid, nonzero
from chapter13.packing import check_bits, pack
from chapter13.tensors import (
    QuantizedTensor,
    check_finite,
    check_group_size,
    check_weight,
    grouped,
    pieces,
    round_scale,
    scale_shape,
)


def quantize_absmax_int8(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """One scale for the whole tensor: (int8 codes in the weight's shape, float32 scalar scale).

    Any shape. An all-zero tensor has scale 0 and codes 0. Raises TypeError if it is
    not a floating-point tensor, ValueError if it is empty or holds NaN or Inf.

    >>> codes, scale = quantize_absmax_int8(torch.tensor([1.27, -0.5, 0.004]))
    >>> codes
    tensor([127, -50,   0], dtype=torch.int8)
    """
    return _chapter_absmax(weight, None, 127)


def dequantize_absmax_int8(codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """The float32 weight that int8 codes and their scale represent; the scale may be per row."""
    return codes.to(torch.float32) * scale


def quantize_per_channel(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """One scale for each output channel (row): (int8 codes (out, in), float32 scales (out, 1)).

    Raises as `quantize_absmax_int8`, and ValueError for a weight that is not a matrix.
    """
    return _chapter_absmax(weight, "channel", 127)


def quantize_groupwise(
    weight: torch.Tensor, group_size: int = 64
) -> tuple[torch.Tensor, torch.Tensor]:
    """One scale for each `group_size` neighboring weights in a row.

    Returns int8 codes (out, groups, group_size) and float32 scales (out, groups, 1). Raises as
    `quantize_per_channel`, and ValueError if the group size does not divide in_features.
    """
    codes, scale = _chapter_absmax(weight, group_size, 127)
    return codes.view(*scale.shape[:2], group_size), scale


def quantize_int4_absmax(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """4 bits with one scale for the tensor: (codes in [-7, 7] in int8, float32 scalar scale).

    The codes take a byte each; `quantize_absmax(weight, bits=4)` packs two into one. -8, the
    sixteenth level, is never used, because the scale is max|w| / 7. Raises as
    `quantize_absmax_int8`.
    """
    return _chapter_absmax(weight, None, 7)


def quantize_absmax(
    weight: torch.Tensor,
    bits: int = 8,
    group_size: int | str | None = None,
    scale_dtype: torch.dtype = torch.float16,
) -> QuantizedTensor:
    """Symmetric quantization: packed codes of 2 to 8 bits and one scale for each group.

    `group_size`: None for one scale per tensor, "channel" (or -1) for one per row, or the number of
    neighboring weights in a row that share one. The error of a weight is at most scale / 2; a group
    with an absmax below (2**(bits-1) - 1) * 2**-25, whose scale float16 rounds to 0, becomes zeros.
    Raises as `quantize_per_channel`, and ValueError for bits out of range, a group size that does
    not divide in_features, or a scale that `scale_dtype` cannot hold.
    """
    check_bits(bits)
    weight = check_weight(weight)
    group_size = check_group_size(group_size)
    scale, codes = _absmax(weight, group_size, 2 ** (bits - 1) - 1, scale_dtype)
    return QuantizedTensor(
        kind="absmax",
        packed=pack(codes.view(torch.uint8).bitwise_and_(2**bits - 1), bits),
        bits=bits,
        shape=weight.shape,
        group_size=group_size,
        stored_scale=scale,
    )


def quantize_affine(
    weight: torch.Tensor,
    bits: int = 8,
    group_size: int | str | None = None,
    scale_dtype: torch.dtype = torch.float16,
) -> QuantizedTensor:
    """Asymmetric quantization: as `quantize_absmax`, with a zero point of `bits` bits per group.

    The range of a group always includes zero, so zero stays exact (Jacob et al. 2018, section
    2.1). The error of a weight is at most scale / 2 with float32 scales; a scale rounded to float16
    adds up to (2**bits - 1) / 2048 of a step. Raises as `quantize_absmax`, and ValueError for
    weights so large that the grid would end beyond float32.
    """
    check_bits(bits)
    weight = check_weight(weight)
    group_size = check_group_size(group_size)
    groups = grouped(weight, group_size)
    low, high = groups.amin(1, keepdim=True), groups.amax(1, keepdim=True)
    check_finite(weight, torch.maximum(high, -low))
    grid = affine_grid(low, high, bits, scale_dtype)
    codes = torch.empty(groups.shape, dtype=torch.uint8, device=groups.device)
    for rows, columns in pieces(groups):
        piece = grid.rows(rows).codes(groups[rows, columns])
        codes[rows, columns] = piece.to(torch.int16)  # float to uint8 directly is slow
    return QuantizedTensor(
        kind="affine",
        packed=pack(codes, bits),
        bits=bits,
        shape=weight.shape,
        group_size=group_size,
        stored_scale=grid.scale.to(scale_dtype).view(scale_shape(weight.shape, group_size)),
        packed_zero_point=pack(grid.zero.to(torch.uint8), bits),
    )


def _chapter_absmax(weight, group_size, steps):
    """The result of the chapter's functions: codes of one byte each, float32 scales."""
    weight = check_weight(weight)
    scale, codes = _absmax(weight, group_size, steps, torch.float32)
    return codes.view(weight.shape), scale


def _absmax(weight, group_size, steps, scale_dtype):
    """The scales in their final shape, and int8 codes in [-steps, steps], a row per group."""
    groups = grouped(weight, group_size)
    absmax = torch.maximum(groups.amax(1, keepdim=True), -groups.amin(1, keepdim=True))
    absmax = absmax.abs().float()  # -amin of zeros is -0
    check_finite(weight, absmax)
    scale = round_scale(absmax / steps, absmax, steps, scale_dtype)
    divisor = nonzero(scale)
    codes = torch.empty(groups.shape, dtype=torch.int8, device=groups.device)
    for rows, columns in pieces(groups):
        piece = torch.div(groups[rows, columns], divisor[rows])
        codes[rows, columns] = piece.round_().clamp_(-steps, steps)
    return scale.view(scale_shape(weight.shape, group_size)), codes
