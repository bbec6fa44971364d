"""Code books: NF4 and FP4 in blocks, and double quantization, bit for bit as in bitsandbytes.

A code is an index into a table of 16 values between -1 and 1; each block of the flattened weight is
first divided by its absmax. The values of NF4 (Dettmers et al. 2023, QLoRA) are quantiles of the
normal distribution; FP4 is bitsandbytes' own 4-bit floating-point table, not E2M1. Double
quantization quantizes the absmax values themselves to 8 bits.
"""

import torch

from chapter13.packing import pack
from chapter13.tables import CODE_BOOKS, dynamic_code_book
from chapter13.tensors import (
    QuantizedTensor,
    check_finite,
    check_weight,
    is_group_size,
    pieces,
)

_TINY = 1e-38  # a smaller absmax is raised to this, so that its reciprocal stays finite
_SCALES_PER_BLOCK = 256  # double quantization: this many absmax values share one scale


def quantize_codebook(
    weight: torch.Tensor, kind: str = "nf4", block_size: int = 64, double_quant: bool = False
) -> QuantizedTensor:
    """NF4 or FP4 in blocks of the flattened weight; the last block may be short.

    Any shape. Packed bytes, absmax and dequantized values equal those of bitsandbytes'
    `quantize_4bit(weight, blocksize=block_size, quant_type=kind, compress_statistics=double_quant)`
    on a CPU, which takes block sizes 32, 64, ... 4096; here any size works. `.scale` is the float32
    absmax of each block, (blocks,). Raises TypeError if the weight is not a floating-point tensor,
    ValueError if it is empty or holds NaN or Inf, for another kind, for a block size that is not a
    positive int, and if double quantization would overflow.
    """
    if kind not in CODE_BOOKS:
        raise ValueError(f"kind must be one of {', '.join(CODE_BOOKS)}, not {kind!r}")
    if not is_group_size(block_size):
        raise ValueError(f"block_size must be a positive int, not {block_size!r}")
    weight = check_weight(weight)
    code_book = CODE_BOOKS[kind]()
    blocks = weight.reshape(-1)
    absmax = _block_absmax(blocks, block_size)
    check_finite(weight, absmax)
    codes = _nearest_in_blocks(blocks, absmax, block_size, code_book)
    scale, offset = (absmax, None) if not double_quant else _quantize_scales(absmax)
    return QuantizedTensor(
        kind=kind,
        packed=pack(codes, 4),
        bits=4,
        shape=weight.shape,
        group_size=block_size,
        stored_scale=scale,
        scale_offset=offset,
    )


def _block_absmax(flat: torch.Tensor, block_size: int) -> torch.Tensor:
    """max|w| of each block in float32; that of a short last block is at least 1e-38."""
    whole = flat.numel() // block_size
    blocks = flat[: whole * block_size].view(whole, block_size)
    absmax = torch.maximum(blocks.amax(1), -blocks.amin(1)).abs().float()  # -amin of zeros is -0
    rest = flat[whole * block_size :]
    if rest.numel():
        absmax = torch.cat([absmax, rest.abs().amax().float().clamp(min=_TINY)[None]])
    return absmax


def _nearest_in_blocks(flat, absmax, block_size, code_book):
    """The codes nearest to w / absmax, uint8, flat; if their number is odd, one more for zero.

    Whole blocks are multiplied by the reciprocal, a short last block is divided, as in
    bitsandbytes: the last bit can decide the code of a weight next to a midpoint.
    """
    order = code_book.argsort(stable=True)  # FP4's codes do not ascend
    ascending = code_book[order]
    midpoints = ((ascending[:-1] + ascending[1:]) / 2).tolist()
    codes = torch.empty(flat.numel() + flat.numel() % 2, dtype=torch.int8, device=flat.device)

    whole = flat.numel() // block_size
    blocks = flat[: whole * block_size].view(whole, block_size)
    block_codes = codes[: whole * block_size].view(whole, block_size)
    reciprocal = 1.0 / absmax[:whole, None].clamp(min=_TINY)
    for rows, columns in pieces(blocks):
        scaled = torch.mul(blocks[rows, columns], reciprocal[rows])
        block_codes[rows, columns] = _nearest(scaled, midpoints, order.tolist())
    rest = flat[whole * block_size :].float() / absmax[whole:]
    rest = torch.nn.functional.pad(rest, (0, flat.numel() % 2))
    codes[whole * block_size :] = _nearest(rest, midpoints, order.tolist())
    return codes.view(torch.uint8)


def _nearest(scaled: torch.Tensor, midpoints: list[float], order: list[int]) -> torch.Tensor:
    """The code of the value nearest to each number, as float; a tie goes to the lower value.

    `order` holds the codes by ascending value. Each midpoint that is passed changes the code to the
    next in that order. Fifteen comparisons in the cache are much faster than a binary search, and
    torch compares fastest if the result is a float.
    """
    codes = torch.full_like(scaled, order[0])
    above = torch.empty_like(scaled)
    for midpoint, below, beyond in zip(midpoints, order[:-1], order[1:], strict=True):
        codes.add_(torch.gt(scaled, midpoint, out=above), alpha=beyond - below)
    return codes


def _quantize_scales(absmax: torch.Tensor) -> tuple[QuantizedTensor, torch.Tensor]:
    """Double quantization: the absmax values minus their mean in 8 bits, and that mean.

    bitsandbytes' CPU code first rounds absmax / scale to one of 65536 equal steps from -1 to 1,
    then takes the nearest code. Without that rounding some codes next to a midpoint would differ.
    """
    code_book = dynamic_code_book().to(absmax.device)
    offset = absmax.mean()
    if not offset.isfinite():
        raise ValueError(
            f"the sum of {len(absmax)} absmax values up to {absmax.max().item():.3g} is beyond "
            "float32: double quantization cannot take their mean; use double_quant=False"
        )
    centred = absmax - offset
    missing = -len(centred) % _SCALES_PER_BLOCK
    blocks = torch.nn.functional.pad(centred, (0, missing)).view(-1, _SCALES_PER_BLOCK)
    scale = blocks.abs().amax(1)
    reciprocal = (1 / scale).repeat_interleave(_SCALES_PER_BLOCK)[: len(centred)]
    scaled = (centred * reciprocal).nan_to_num_(-1)  # 0 / 0 takes the first code
    step = ((scaled + 1) * 32767.5 + 0.5).floor_()
    midpoints = (code_book[:-1] + code_book[1:]) / 2
    codes = torch.bucketize(step / 32767.5 - 1, midpoints)
    return QuantizedTensor(
        kind="dynamic",
        packed=codes.to(torch.uint8),
        bits=8,
        shape=absmax.shape,
        group_size=_SCALES_PER_BLOCK,
        stored_scale=scale,
    ), offset
