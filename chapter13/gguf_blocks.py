"""llama.cpp's block formats, byte for byte as its gguf library quantizes and dequantizes them.

A row of a weight is cut into blocks. Each block is complete: it contains its scale (and for some
kinds a minimum) and its codes, so that one read fetches everything that a multiplication needs.

    kind    weights  bytes           weight =
    Q8_0       32    2 + 32          d * code                code -127 ... 127
    Q4_0       32    2 + 16          d * code                code -8 ... 7, stored plus 8
    Q4_1       32    2 + 2 + 16      d * code + m            code 0 ... 15
    MXFP4      32    1 + 16          2**(e - 128) * code     code 0, +-1, 2, 3, 4, 6, 8, 12
    Q4_K      256    2 + 2 + 12 + 128    Q4_1 in groups of 32; scales and minima have 6 bits
    Q6_K      256    128 + 64 + 16 + 2   Q8_0 in groups of 16, code -32 ... 31; scales have 8 bits

d and m are float16, e is a byte. With 4 bits, byte j of a block's codes holds code j in its low
half and code j + 16 in its high half. The K kinds are only dequantized here, as in the gguf
library; llama.cpp quantizes to them with a search for their scales.

`read` opens a GGUF file and gives its tensors in the same form; their bytes are read when used.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from chapter13 import gguf_file
from chapter13.packing import piece_size
from chapter13.tensors import check_finite, check_weight

PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
# E2M1 doubled, to get whole numbers: a sign, two bits of exponent, one of mantissa
E2M1 = torch.tensor([0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12], dtype=torch.int8)
# exponent byte -> half the scale; 255 is NaN in the OCP standard, but not in llama.cpp
E8M0_HALF = torch.tensor([2.0 ** (e - 128) for e in range(256)])


@dataclass(frozen=True, eq=False, repr=False)
class BlockTensor:
    """A weight in a format of llama.cpp, made by `quantize` or read from a file.

    It has `codes()`, `scale`, `dequantize()`, `nbytes` and `bits_per_weight` like a
    `QuantizedTensor`. It is not one, because it keeps the file's own bytes, in which scales and
    codes alternate. `QuantizedLinear` therefore does not accept it; to try these formats on a whole
    model, give the model the dequantized weights.
    """

    kind: str
    """"Q4_0" and so on; a file may also hold "F32", "F16", "BF16" and kinds unknown here."""
    shape: torch.Size
    """The weight's shape; a block lies within a row."""
    blocks: torch.Tensor
    """uint8 (number of blocks, bytes of a block)."""

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The approximate weight, in its shape; computed in float32, then cast to `dtype`.

        Raises ValueError for a kind that cannot be dequantized here.
        """
        self._check(PLAIN | DECODERS)
        if self.kind in PLAIN:  # a copy, because bytes of a file may not be aligned
            return self.blocks.clone().view(PLAIN[self.kind]).to(dtype).view(self.shape)
        weight = torch.empty(self.shape, dtype=dtype, device=self.blocks.device)
        rows = weight.view(len(self.blocks), -1)
        for piece in _pieces(self.blocks, rows.shape[1]):
            codes, scale, minimum = DECODERS[self.kind](self.blocks[piece])
            values = codes.float() * scale
            if minimum is not None:
                values += minimum
            rows[piece] = values.flatten(1)
        return weight

    def codes(self) -> torch.Tensor:
        """The codes in the weight's shape, int8, as in the table above, without the scale."""
        return self._parts()[0].reshape(self.shape)

    @property
    def scale(self) -> torch.Tensor:
        """float32 (out, groups, 1): the factors of the codes; a K block has 8 or 16 groups."""
        return self._parts()[1].reshape(*self.shape[:-1], -1, 1)

    @property
    def minimum(self) -> torch.Tensor | None:
        """The number added after scaling, in the scale's shape; None for kinds without one."""
        minimum = self._parts()[2]
        return None if minimum is None else minimum.reshape(*self.shape[:-1], -1, 1)

    @property
    def nbytes(self) -> int:
        return self.blocks.nbytes

    @property
    def bits_per_weight(self) -> float:
        """8 * nbytes / number of weights: the effective bits, scales included."""
        return 8 * self.nbytes / self.shape.numel()

    def _parts(self):
        self._check(DECODERS)
        return DECODERS[self.kind](self.blocks)

    def _check(self, known: dict) -> None:
        if self.kind not in known:
            raise ValueError(f"{self.kind} is not decoded here; these are: {', '.join(known)}")

    def __repr__(self) -> str:
        return (
            f"BlockTensor({self.kind}, shape={tuple(self.shape)}, "
            f"{self.bits_per_weight:.4g} bits per weight)"
        )


def quantize(weight: torch.Tensor, kind: str) -> BlockTensor:
    """The weight in blocks of 32: `kind` is "Q8_0", "Q4_0", "Q4_1" or "MXFP4".

    Any shape whose last dimension is a multiple of 32. The bytes equal those of
    `gguf.quants.quantize` (0.19). Codes are computed with the scale before it is rounded to
    float16. A block so small that its float16 scale is zero dequantizes to zeros, as in that
    library.

    Raises TypeError if the weight is not a floating-point tensor; ValueError for another kind, if
    the weight is empty, holds NaN or Inf or has rows that blocks do not divide, and for a scale or
    minimum beyond float16, which gguf would store as Inf.
    """
    if kind not in ENCODERS:
        raise ValueError(f"kind must be one of {', '.join(ENCODERS)}, not {kind!r}")
    weight = check_weight(weight)
    block = gguf_file.KIND_OF[kind]
    if weight.dim() == 0 or weight.shape[-1] % block.weights:
        raise ValueError(
            f"{kind} has blocks of {block.weights} in a row: the last dimension must be a multiple "
            f"of it, not shape {tuple(weight.shape)}"
        )
    rows = weight.reshape(-1, block.weights)
    blocks = torch.empty(len(rows), block.size, dtype=torch.uint8, device=weight.device)
    for piece in _pieces(rows, block.weights):
        values = rows[piece].float()
        check_finite(weight, values.abs().amax())
        blocks[piece] = torch.cat(ENCODERS[kind](values), dim=1)
    return BlockTensor(kind, weight.shape, blocks)


def plain(tensor: torch.Tensor) -> BlockTensor:
    """A tensor in unquantized float32, as files store norms.

    Raises TypeError if it is not a floating-point tensor, ValueError if it is empty or holds NaN
    or Inf.
    """
    values = check_weight(tensor).float().contiguous()
    check_finite(values, values.abs().amax())
    return BlockTensor("F32", values.shape, values.view(-1, 1).view(torch.uint8))


@dataclass(frozen=True, repr=False)
class GGUF:
    """An open GGUF file."""

    metadata: dict
    """name -> bool, str, NumPy number or array, list of str; in the file's order."""
    tensors: Mapping[str, BlockTensor]
    """name -> tensor, in the file's order. Its bytes are read from disk when they are used."""

    def __repr__(self) -> str:
        return f"GGUF({len(self.metadata)} keys, {len(self.tensors)} tensors)"


def read(path: Path | str) -> GGUF:
    """Opens a GGUF file: reads its header, maps the rest.

    Shapes are as in torch, (out_features, in_features). The mapping is private: writing to a tensor
    does not change the file. If the file is truncated while it is mapped, the process crashes.

    Raises OSError if the file cannot be opened, and ValueError, naming the byte, if it is invalid:
    truncated, or with impossible counts, lengths, types or offsets. Also raises ValueError for one
    part of a split file, which holds only some of a model's tensors.
    """
    path = Path(path)
    with path.open("rb") as file:
        size = file.seek(0, 2)
    mapping = torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8)
    try:
        metadata, entries = gguf_file.parse(mapping.numpy().data)
        part, parts = gguf_file.part_of(metadata)
    except ValueError as error:
        raise ValueError(f"{path} is not a valid GGUF file: {error}") from None
    if parts > 1:
        raise ValueError(
            f"{path} is part {part} of {parts} of a split file and lacks the others' tensors: join "
            "them with llama.cpp's `llama-gguf-split --merge FIRST_PART WHOLE` and read WHOLE"
        )
    return GGUF(metadata, _Tensors(mapping, entries))


class _Tensors(Mapping):
    """The tensors of a mapped file, each created when it is accessed."""

    def __init__(self, mapping: torch.Tensor, entries: dict[str, gguf_file.Entry]):
        self._mapping = mapping
        self._entries = entries

    def __getitem__(self, name: str) -> BlockTensor:
        entry = self._entries[name]
        stored = self._mapping[entry.offset : entry.offset + entry.nbytes]
        return BlockTensor(
            entry.kind.name, torch.Size(entry.shape), stored.view(-1, entry.kind.size)
        )

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)


def _pieces(blocks: torch.Tensor, weights: int) -> Iterator[slice]:
    """Slices of whole blocks: on a CPU as many as fit into the cache."""
    step = piece_size(blocks) // weights
    for start in range(0, len(blocks), step):
        yield slice(start, start + step)


# --- to blocks: float32 (blocks, 32) -> the uint8 columns of the blocks ----------------------


def _encode_q8_0(values):
    scale = values.abs().amax(1, keepdim=True) / 127
    scaled = _divided(values, scale)
    magnitude = scaled.abs()
    whole = magnitude.floor()
    whole += (2 * (magnitude - whole)).floor()  # half is rounded away from zero
    return _half(scale, values), (whole * scaled.sign()).to(torch.int8).view(torch.uint8)


def _encode_q4_0(values):
    """The weight with the largest magnitude gets code -8, whatever its sign, to use all codes."""
    largest = values.gather(1, values.abs().argmax(1, keepdim=True))
    scale = largest / -8
    return _half(scale, values), _nibbles(_divided(values, scale, 8.5))


def _encode_q4_1(values):
    low = values.gather(1, values.argmin(1, keepdim=True))  # of +0 and -0 the first one
    scale = (values.amax(1, keepdim=True) - low).abs() / 15  # abs: 0 - 0 may be -0
    codes = _nibbles(_divided(values - low, scale, 0.5))
    return _half(scale, values), _half(low, values), codes


def _encode_mxfp4(values):
    """The scale is a power of two that puts the largest magnitude between 4 and 8 in E2M1."""
    absmax = values.abs().amax(1, keepdim=True)
    # log2 rounded to float32, as the gguf library does: just below a power of two it may give
    # the power itself.
    # Below 2**-125 the exponent wraps around, as in that library: the block decodes to zeros.
    exponent = absmax.double().log2().float().floor().clamp(min=-200).int() + 125
    exponent = torch.where(absmax > 0, exponent & 255, 0)
    scale = E8M0_HALF.to(values.device)[exponent]
    magnitude = values.abs()
    codes = torch.zeros_like(values, dtype=torch.uint8)
    best = magnitude.clone()  # the distance to code 0
    for level in E2M1[1:8].tolist():
        distance = (scale * level - magnitude).abs_()
        codes += distance < best  # a tie goes to the smaller magnitude
        best = torch.minimum(best, distance)
    codes += ((values < 0) & (codes > 0)) * 8
    return exponent.to(torch.uint8), codes[:, :16] | codes[:, 16:] << 4


def _divided(values, scale, shift=0.0):
    """values * (1 / scale) + shift, as in gguf; only shift for a scale of 0.

    A scale below 3e-39 has no finite reciprocal; its block gets zeros. (gguf casts infinities to
    integers, which is undefined in the C standard and gives zeros on x86.)
    """
    reciprocal = torch.where(scale == 0, 0.0, 1 / scale)
    return torch.where(reciprocal.isinf(), 0.0, values * reciprocal + shift)


def _nibbles(shifted):
    codes = shifted.to(torch.uint8).clamp_(max=15)  # the cast truncates the fraction
    return codes[:, :16] | codes[:, 16:] << 4


def _half(numbers, values):
    """float16 as its two bytes; ValueError if it would be Inf."""
    half = numbers.half()
    if half.isinf().any():
        block = int(half.isinf().flatten().nonzero()[0])
        raise ValueError(
            f"a block with weights from {values[block].min().item():.3g} to "
            f"{values[block].max().item():.3g} needs a scale or minimum beyond float16, whose "
            "largest number is 65504: divide the weight by a power of two"
        )
    return half.view(torch.uint8)


ENCODERS = {
    "Q8_0": _encode_q8_0,
    "Q4_0": _encode_q4_0,
    "Q4_1": _encode_q4_1,
    "MXFP4": _encode_mxfp4,
}


# --- and back: uint8 (blocks, bytes) -> codes int8 (blocks, groups, in a group), scale, minimum ---


def _decode_q8_0(blocks):
    return blocks[:, None, 2:].view(torch.int8), _floats(blocks[:, :2]), None


def _decode_q4_0(blocks):
    return _split(blocks[:, None, 2:]) - 8, _floats(blocks[:, :2]), None


def _decode_q4_1(blocks):
    return _split(blocks[:, None, 4:]), _floats(blocks[:, :2]), _floats(blocks[:, 2:4])


def _decode_mxfp4(blocks):
    table, scales = E2M1.to(blocks.device), E8M0_HALF.to(blocks.device)
    return table[_split(blocks[:, None, 1:]).int()], scales[blocks[:, :1].int()][:, :, None], None


def _decode_q4_k(blocks):
    """Eight groups of 32. The 6-bit scales and minima of the first four are the low bits of bytes
    0-3 and 4-7; those of the last four have their low 4 bits in bytes 8-11 and their high 2 bits in
    the high bits of bytes 0-7.
    """
    first, second, third = blocks[:, 4:16].view(-1, 3, 4).unbind(1)
    scales = torch.cat([first & 63, third & 15 | first >> 6 << 4], 1)[:, :, None].float()
    minima = torch.cat([second & 63, third >> 4 | second >> 6 << 4], 1)[:, :, None].float()
    scale, minimum = _floats(blocks[:, :2]) * scales, _floats(blocks[:, 2:4]) * minima
    return _split(blocks[:, 16:].view(-1, 4, 32)).view(-1, 8, 32), scale, -minimum


def _decode_q6_k(blocks):
    """Sixteen groups of 16; first the low 4 bits of all codes, then their high 2 bits."""
    low = _split(blocks[:, :128].view(-1, 2, 64)).view(-1, 8, 32)
    high = blocks[:, 128:192].view(-1, 2, 1, 32)
    high = torch.cat([high >> shift & 3 for shift in (0, 2, 4, 6)], 2).view(-1, 8, 32)
    codes = (low | high.view(torch.int8) << 4) - 32
    scale = blocks[:, 192:208, None].view(torch.int8).float() * _floats(blocks[:, 208:])
    return codes.view(-1, 16, 16), scale, None


def _split(nibbles):
    """uint8 (..., n) -> int8 (..., 2n): all low halves, then all high ones."""
    return torch.cat([nibbles & 15, nibbles >> 4], dim=-1).view(torch.int8)


def _floats(pairs):
    """The bytes (blocks, 2) of a float16 -> float32 (blocks, 1, 1)."""
    return pairs.clone().view(torch.float16).float()[:, :, None]


DECODERS = {
    "Q8_0": _decode_q8_0,
    "Q4_0": _decode_q4_0,
    "Q4_1": _decode_q4_1,
    "MXFP4": _decode_mxfp4,
    "Q4_K": _decode_q4_k,
    "Q6_K": _decode_q6_k,
}
