"""QuantizedTensor: a weight as packed codes, with what turns them back into numbers.

All quantizers of this package return one. It holds real bytes only: codes packed without a gap,
scales in the data type they were asked for, zero points as narrow as the codes. What can be derived
is derived when it is asked for.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from chapter13.packing import piece_size, unpack


@dataclass(frozen=True, eq=False, repr=False)
class QuantizedTensor:
    """A quantized weight; made by `quantize_absmax`, `quantize_affine` and `quantize_codebook`.

    Three kinds, told apart by what they hold besides the codes:

    - absmax (symmetric): `scale` alone. `codes()` are signed; weight = code * scale
    - affine (asymmetric): also `zero_point`. weight = (code - zero_point) * scale
    - code book (NF4, FP4): also `code_book`. weight = code_book[code] * scale
    """

    packed: torch.Tensor
    """uint8, one dimension: the codes of the flattened weight, `bits` bits each."""
    bits: int
    """Bits per code, 2 to 8."""
    shape: torch.Size
    """The weight's shape."""
    group_size: int | str | None
    """How many weights share a scale; "channel": one row; None: the whole tensor."""
    stored_scale: torch.Tensor | QuantizedTensor
    """The scales as they are held; a QuantizedTensor after double quantization."""
    packed_zero_point: torch.Tensor | None = None
    """uint8, one dimension: the zero points, packed like the codes."""
    code_book: torch.Tensor | None = None
    """float32 (2**bits,): a shared constant, the same for all tensors of a kind."""
    scale_offset: torch.Tensor | None = None
    """float32 scalar: the mean that double quantization took off the scales."""

    def codes(self) -> torch.Tensor:
        """The codes in the weight's shape: int8 for absmax, uint8 for affine and code book."""
        codes = unpack(self.packed, self.bits, self.shape.numel())
        if self.packed_zero_point is None and self.code_book is None:
            codes = sign_extend(codes, self.bits)
        return codes.view(self.shape)

    @property
    def scale(self) -> torch.Tensor:
        """The scales: shape () per tensor, (out, 1) per channel, (out, groups, 1) per group.

        A code book has one scale (its absmax) for each block of the flattened weight: (blocks,).
        """
        if not isinstance(self.stored_scale, QuantizedTensor):
            return self.stored_scale
        return self.stored_scale.dequantize() + self.scale_offset

    @property
    def zero_point(self) -> torch.Tensor | None:
        """The zero points, uint8 in the scale's shape; None for absmax and code books."""
        if self.packed_zero_point is None:
            return None
        scale = self.stored_scale
        return unpack(self.packed_zero_point, self.bits, scale.numel()).view(scale.shape)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The approximate weight, in its shape; computed in float32, then cast to `dtype`."""
        weight = torch.empty(self.shape.numel(), dtype=dtype, device=self.packed.device)
        start = 0
        for values in self._pieces(1):
            weight[start : start + len(values)] = values
            start += len(values)
        return weight.view(self.shape)

    def row_pieces(self) -> Iterator[torch.Tensor]:
        """The approximate weight a few rows at a time: float32 (rows, in_features), top to bottom.

        For a multiplication that needs each row but once, in the cache, and never the whole matrix.
        """
        for values in self._pieces(self.shape[-1]):
            yield values.view(-1, self.shape[-1])

    def _pieces(self, unit: int) -> Iterator[torch.Tensor]:
        """The flat approximate weight in pieces of `piece_size` or so, multiples of `unit` long.

        A piece also begins with a byte of its own and with a scale of its own; the last piece
        may be shorter.
        """
        count = self.shape.numel()
        scale, zero_point = self.scale.float().view(-1), self.zero_point
        size = self.group_size if isinstance(self.group_size, int) else count // len(scale)
        step = math.lcm(8, unit, size if len(scale) > 1 else 1)
        step *= max(1, piece_size(self.packed) // step)
        table = self._table()
        for start in range(0, count, step):
            values = self._values(table, start, min(start + step, count))
            # a row for each scale; what is over is one row more: a code book's short last block,
            # or a piece of a tensor that has but one scale
            whole = len(values) // size * size
            for rows in (values[:whole].view(-1, size), values[None, whole:]):
                if rows.numel():
                    first = (start + (rows.data_ptr() - values.data_ptr()) // 4) // size
                    which = slice(first, first + len(rows))
                    if zero_point is not None:
                        rows -= zero_point.view(-1, 1)[which]
                    rows *= scale[which, None]
            yield values

    def _table(self) -> torch.Tensor:
        """What each code stands for before scale and zero point: float32 (2**bits,).

        With 4 bits it is read a byte at a time, which halves the look-ups: (256,) of both values
        of a byte, side by side in one number of twice the width.
        """
        table = self.code_book
        if table is None:
            table = torch.arange(2**self.bits, dtype=torch.uint8)
            if self.packed_zero_point is None:
                table = sign_extend(table, self.bits)
            table = table.float()
        if self.bits == 4:
            pairs = torch.stack([table.repeat_interleave(16), table.repeat(16)], dim=1)
            table = pairs.view(torch.float64).view(-1)
        return table.to(self.packed.device)

    def _values(self, table: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        """The table's values of codes `start` to `stop` of the flat weight; start: a whole byte."""
        packed = self.packed[start * self.bits // 8 : (stop * self.bits + 7) // 8]
        if self.bits == 4:
            return table.index_select(0, packed.int()).view(torch.float32)[: stop - start]
        return table.index_select(0, unpack(packed, self.bits, stop - start).int())

    @property
    def nbytes(self) -> int:
        """Bytes really held: codes, scales and zero points. A shared code book is not counted."""
        parts = (self.packed, self.stored_scale, self.packed_zero_point, self.scale_offset)
        return sum(part.nbytes for part in parts if part is not None)

    @property
    def bits_per_weight(self) -> float:
        """8 * nbytes / number of weights: the effective bits, scales and zero points included."""
        return 8 * self.nbytes / self.shape.numel()

    def __repr__(self) -> str:
        kind = "affine" if self.packed_zero_point is not None else "absmax"
        if self.code_book is not None:
            kind = "code book"
        return (
            f"QuantizedTensor({kind}, shape={tuple(self.shape)}, bits={self.bits}, "
            f"group_size={self.group_size!r}, {self.bits_per_weight:.4g} bits per weight)"
        )


def check_weight(weight: torch.Tensor) -> torch.Tensor:
    """The weight as a detached float32, float16 or bfloat16 tensor, or an error that says why not.

    Raises TypeError for what is no floating-point tensor, ValueError for an empty one. NaN and
    Inf are found later, for free, in the absmax: see `check_finite`.
    """
    if not isinstance(weight, torch.Tensor):
        raise TypeError(f"a weight must be a torch.Tensor, not {type(weight).__name__}")
    if not weight.is_floating_point():
        raise TypeError(f"a weight must be floating point, not {weight.dtype}: cast it first")
    if weight.numel() == 0:
        raise ValueError(f"the weight is empty: its shape is {tuple(weight.shape)}")
    weight = weight.detach()
    if weight.dtype in (torch.float32, torch.float16, torch.bfloat16):
        return weight
    check_finite(weight, weight.abs().amax())
    return weight.float()  # a float64 value beyond float32 becomes Inf and is reported as such


def check_finite(weight: torch.Tensor, absmax: torch.Tensor) -> None:
    """Raises ValueError if `absmax` shows that the weight holds NaN or Inf: how many, and where."""
    if absmax.isfinite().all():
        return
    bad = (~weight.isfinite()).nonzero()
    first = tuple(bad[0].tolist())
    raise ValueError(
        f"the weight holds {len(bad)} NaN or Inf among {weight.numel()} values; "
        f"the first is {weight[first].item()} at {list(first)}"
    )


def grouped(weight: torch.Tensor, group_size: int | str | None) -> torch.Tensor:
    """The weight as a matrix with one row for each scale: (groups, weights in a group).

    Raises ValueError if there are no rows or channels to speak of, or if the groups do not divide
    the rows: the message says which group sizes do.
    """
    if group_size is None:
        return weight.reshape(1, -1)
    if weight.dim() != 2:
        raise ValueError(
            "per channel and per group need a weight of shape (out_features, in_features), "
            f"not {tuple(weight.shape)}"
        )
    if group_size == "channel":
        return weight
    in_features = weight.shape[1]
    if isinstance(group_size, bool) or not isinstance(group_size, int) or group_size < 1:
        raise ValueError(
            f'group_size must be None, "channel" or a positive int, not {group_size!r}'
        )
    if in_features % group_size:
        sizes = [size for size in range(2, in_features + 1) if in_features % size == 0]
        raise ValueError(
            f"group size {group_size} does not divide in_features = {in_features}; "
            f"these do: {', '.join(map(str, sizes))}"
        )
    return weight.reshape(-1, group_size)


def pieces(matrix: torch.Tensor) -> Iterator[tuple[slice, slice]]:
    """Cuts a matrix into pieces of at most `piece_size` elements, as (rows, columns) slices."""
    (rows, columns), size = matrix.shape, piece_size(matrix)
    width = max(1, min(columns, size))
    height = size // width
    for row in range(0, rows, height):
        for column in range(0, columns, width):
            yield slice(row, row + height), slice(column, column + width)


def sign_extend(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """uint8 codes whose lowest `bits` bits are a two's complement number, as int8."""
    half = 1 << (bits - 1)
    return (codes ^ half).view(torch.int8) - half if bits < 8 else codes.view(torch.int8)


def round_scale(
    scale: torch.Tensor, reach: torch.Tensor, steps: int, dtype: torch.dtype
) -> torch.Tensor:
    """The scales in `dtype`, such that `steps` of them reach `reach` to within half a step.

    Rounding can break this for subnormal scales only. A float32 scale is then taken one number
    up, so nothing is clipped; and one number down where the last step would be Inf. Raises
    ValueError, naming float32, for a scale that float16 cannot hold: too large, or so small that
    the rounded grid falls short.
    """
    if dtype not in (torch.float32, torch.float16):
        raise ValueError(f"scale_dtype must be torch.float32 or torch.float16, not {dtype}")
    rounded = scale.to(dtype)
    # in float64, or the comparison would itself be lost among subnormals
    short = reach.double() > (steps + 0.5) * rounded.double()
    if dtype == torch.float32:
        up, down = (torch.nextafter(rounded, rounded.new_tensor(end)) for end in (torch.inf, 0.0))
        rounded = torch.where(short, up, rounded)
        return torch.where((steps * rounded).isinf(), down, rounded)
    bad = short | rounded.isinf()
    if bad.any():
        raise ValueError(
            f"{int(bad.sum())} of {scale.numel()} scales, the first {scale[bad][0].item():.3g}, "
            "cannot be held in float16, whose range is 6.1e-05 to 65504: "
            "use scale_dtype=torch.float32"
        )
    return rounded


def scale_shape(shape: torch.Size, group_size: int | str | None) -> tuple[int, ...]:
    """The shape of the scales of a weight: (), (out, 1) or (out, groups, 1)."""
    if group_size is None:
        return ()
    if group_size == "channel":
        return shape[0], 1
    return shape[0], math.prod(shape[1:]) // group_size, 1
