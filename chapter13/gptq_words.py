"""How GPTQ's checkpoint format stores one weight: codes and zero points in 32-bit words.

Whatever method chose the codes, a linear layer with in_features inputs, out_features outputs and
`groups` groups per row is stored as

    qweight  int32    (in_features * bits / 32, out_features)   the codes, a column per output
    qzeros   int32    (groups, out_features * bits / 32)        the zero points
    scales   float16  (groups, out_features)
    g_idx    int32    (in_features,)                            the group of each input
    bias              (out_features,)                           if the layer has one

These represent weight = (code - zero_point) * scale, with unsigned codes. A `Conv1D` of GPT-2 is
stored in the same form, although its own weight is transposed. Codes and zero points form bit
streams, each code with its lowest bit first, cut into 32-bit words; a 3-bit code may span two
words.

There are two formats. "gptq" stores the zero point minus one, a mistake of the first programs that
was kept for compatibility, so it cannot hold a zero point of 0. "gptq_v2" stores it unchanged.
"""

import torch

from chapter13.packing import pack, unpack
from chapter13.tensors import QuantizedTensor, check_part, scale_shape

FORMATS = ("gptq", "gptq_v2")
BITS = (2, 3, 4, 8)
INTEGERS = (torch.int32,)
FLOATS = (torch.float16, torch.bfloat16, torch.float32)


def to_gptq(quantized: QuantizedTensor, checkpoint_format: str) -> dict[str, torch.Tensor]:
    """The four tensors of one weight, as the module's docstring describes them.

    `quantized`: (out_features, in_features), absmax or affine, both sides multiples of 32. Raises
    ValueError for scales that are not float16 numbers, and for zero points of 0 that format "gptq"
    cannot hold.
    """
    rows, columns = quantized.shape
    bits, half = quantized.bits, 1 << (quantized.bits - 1)
    codes, scale = quantized.codes().cpu(), quantized.scale.cpu().view(rows, -1)
    groups = scale.shape[1]
    if quantized.kind == "absmax":
        codes = codes.view(torch.uint8) + half  # -7 to 7 becomes 1 to 15
        zero = torch.full((rows, groups), half, dtype=torch.uint8)
    else:
        zero = quantized.zero_point.cpu().view(rows, groups)
    if checkpoint_format == "gptq":
        codes, zero = _without_zero(codes.view(rows, groups, -1), zero, bits)
        zero = zero - 1
    if (wrong := scale.half().float() != scale.float()).any():
        raise ValueError(
            f"{int(wrong.sum())} of {scale.numel()} scales are not float16 numbers, which the "
            "format stores: quantize with scale_dtype=torch.float16"
        )
    return {
        "qweight": to_words(codes.view(rows, columns), bits).T.contiguous(),
        "qzeros": to_words(zero.T, bits),
        "scales": scale.half().T.contiguous(),
        "g_idx": torch.arange(columns, dtype=torch.int32) // (columns // groups),
    }


def to_words(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Packs each row of uint8 codes into 32-bit words, lowest bits first.

    (rows, count) -> int32 (rows, count * bits / 32). Our own stream has each code's highest bit
    first: with the codes packed in reverse order, its bytes in reverse order are this stream.

    >>> to_words(torch.tensor([[1, 2, 3, 0, 0, 0, 0, 0]], dtype=torch.uint8), bits=4)
    tensor([[801]], dtype=torch.int32)
    """
    stream = pack(codes.reshape(-1).flip(0), bits).flip(0)
    return stream.view(torch.int32).view(len(codes), -1)


def from_words(words: torch.Tensor, bits: int) -> torch.Tensor:
    """The inverse of `to_words`: int32 (rows, words) -> uint8 (rows, words * 32 / bits)."""
    count = words.numel() * 32 // bits
    stream = words.contiguous().view(torch.uint8).view(-1).flip(0)
    return unpack(stream, bits, count).flip(0).view(len(words), -1)


def _without_zero(codes, zero, bits):
    """Codes (rows, groups, size), zero points (rows, groups): the same weights, no zero point 0."""
    low = zero == 0
    stuck = low & (codes.amax(2) == 2**bits - 1)
    if stuck.any():
        raise ValueError(
            f"{int(stuck.sum())} of {zero.numel()} groups have zero point 0, which format "
            '"gptq" cannot hold: save with checkpoint_format="gptq_v2"'
        )
    return codes + low[..., None], zero + low


def check_shape(name: str, shape: torch.Size) -> None:
    """Raises ValueError for a weight whose sides are not multiples of 32."""
    if any(side % 32 for side in shape):
        raise ValueError(
            f"{name} has shape {tuple(shape)}; both sides must be multiples of 32 (codes are "
            "packed into 32-bit words)"
        )


def from_gptq(tensors: dict, shape: torch.Size, settings: dict) -> QuantizedTensor:
    """The affine QuantizedTensor of a layer's four tensors; the inverse of `to_gptq`.

    `shape`: (out_features, in_features). `settings`: a quantization_config. Raises ValueError,
    beginning with the tensor's name, for tensors that are missing, damaged or not supported.
    """
    rows, columns = shape
    bits, size = settings["bits"], settings["group_size"]
    size = columns if size == -1 else size
    if columns % size or columns * bits % 32 or rows * bits % 32:
        raise ValueError(f"qweight cannot hold {tuple(shape)} at {bits} bits in groups of {size}")
    groups = columns // size
    check_part("qweight", tensors.get("qweight"), (columns * bits // 32, rows), INTEGERS)
    check_part("qzeros", tensors.get("qzeros"), (groups, rows * bits // 32), INTEGERS)
    check_part("scales", tensors.get("scales"), (groups, rows), FLOATS)
    if not tensors["scales"].isfinite().all():
        raise ValueError("scales hold NaN or Inf")
    _check_order(tensors, columns, size, settings)
    scale = tensors["scales"].T.contiguous()
    group_size = "channel" if settings["group_size"] == -1 else size
    return QuantizedTensor(
        kind="affine",
        packed=pack(from_words(tensors["qweight"].T, bits), bits),
        bits=bits,
        shape=torch.Size(shape),
        group_size=group_size,
        stored_scale=(scale.float() if scale.dtype == torch.bfloat16 else scale).view(
            scale_shape(shape, group_size)
        ),
        packed_zero_point=pack(_read_zero(tensors["qzeros"], settings).T, bits),
    )


def _check_order(tensors: dict, columns: int, size: int, settings: dict) -> None:
    """Raises ValueError unless each group consists of `size` neighboring inputs.

    `g_idx` is optional: without it the inputs are in order. If it is all zeros, with several groups
    and without act-order, the program that wrote it never filled it.
    """
    if tensors.get("g_idx") is None:
        if settings.get("desc_act") and size < columns:
            raise ValueError("g_idx is missing, and desc_act says that the inputs are reordered")
        return
    check_part("g_idx", tensors.get("g_idx"), (columns,), (torch.int32, torch.int64))
    group = tensors["g_idx"].long().cpu()
    unfilled = not group.any() and not settings.get("desc_act")
    if not unfilled and not torch.equal(group, torch.arange(columns) // size):
        raise ValueError(
            "g_idx puts the inputs into groups out of their order (desc_act): quantize again with "
            "static groups, or with desc_act=False"
        )


def _read_zero(qzeros: torch.Tensor, settings: dict) -> torch.Tensor:
    """The zero points, uint8 (groups, out_features)."""
    bits = settings["bits"]
    stored, last = from_words(qzeros, bits), 2**bits - 1
    if settings["checkpoint_format"] == "gptq_v2":
        return stored
    if not (stored == last).any():
        return stored + 1
    if not _by_gptqmodel(settings):
        raise ValueError(
            f"qzeros hold {int((stored == last).sum())} zero points of 0 or {2**bits}, which "
            'format "gptq" cannot tell apart: write the checkpoint as "gptq_v2"'
        )
    if bits == 3:
        return stored + 1 & last
    # GPTQModel subtracts 1 from every code in whole words: a 0 borrows from its neighbor
    ones = sum(1 << shift for shift in range(0, 32, bits))
    return from_words(qzeros + ones, bits)


def _by_gptqmodel(settings: dict) -> bool:
    meta = settings.get("meta")
    makers = meta.get("quantizer") if isinstance(meta, dict) else None
    makers = [makers] if isinstance(makers, str) else makers or []
    return any(str(maker).startswith("gptqmodel:") for maker in makers)
