"""QuantizedTensor: a weight as packed codes, with the scales that turn them back into numbers.

All quantizers of this package return one. It holds exactly the bytes that a format needs: codes
packed without a gap, scales in the requested data type, zero points as narrow as the codes.
Everything else is derived on demand.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from chapter13.packing import check_bits, cut, packed_size, piece_size, unpack
from chapter13.tables import TABLES

KINDS = ("absmax", "affine", *TABLES)


@dataclass(frozen=True, eq=False, repr=False)
class QuantizedTensor:
    """A quantized weight; made by `quantize_absmax`, `quantize_affine` and `quantize_codebook`.

    `kind` says how a code becomes a weight:

    - "absmax" (symmetric): `codes()` are signed; weight = code * scale
    - "affine" (asymmetric): weight = (code - zero_point) * scale
    - "nf4", "fp4": weight = code_book[code] * scale; "dynamic", a table of 256 values, is the kind
      of scales that are themselves quantized

    Raises ValueError if its parts do not fit together: which part, and its right size or data
    type.
    """

    kind: str
    packed: torch.Tensor
    """uint8, one dimension: the codes of the flattened weight, `bits` bits each."""
    bits: int
    """Bits per code, 2 to 8; a table of 16 values has 4, "dynamic" has 8."""
    shape: torch.Size
    """The weight's shape."""
    group_size: int | str | None
    """How many weights share a scale; "channel": one row; None: the whole tensor."""
    stored_scale: torch.Tensor | QuantizedTensor
    """The scales as stored; a QuantizedTensor ("dynamic") after double quantization."""
    packed_zero_point: torch.Tensor | None = None
    """uint8, one dimension: the zero points of "affine", packed like the codes."""
    scale_offset: torch.Tensor | None = None
    """float32 scalar: the mean that double quantization subtracted from the scales."""

    def __post_init__(self):
        _check(self)

    def codes(self) -> torch.Tensor:
        """The codes in the weight's shape: int8 for absmax, uint8 for affine and code books."""
        codes = unpack(self.packed, self.bits, self.shape.numel())
        if self.kind == "absmax":
            codes = sign_extend(codes, self.bits)
        return codes.view(self.shape)

    @property
    def code_book(self) -> torch.Tensor | None:
        """The table of codes' values, float32 (2**bits,), on the CPU; None for integer grids."""
        return TABLES[self.kind]() if self.kind in TABLES else None

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
        """The zero points, uint8 in the scale's shape; None unless the kind is affine."""
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

        For a multiplication that uses each row once, while it is in the cache; the full matrix is
        never built.
        """
        for values in self._pieces(self.shape[-1]):
            yield values.view(-1, self.shape[-1])

    def split(self, heights: list[int]) -> list[QuantizedTensor]:
        """Splits the rows from the top into weights with `heights` rows.

        For integer grids per channel or per group. Raises ValueError for other tensors, and if the
        heights do not add up to the rows.
        """
        if self.kind in TABLES or self.group_size is None:
            raise ValueError(f"{self!r} has no scales of its own for each row: it cannot be split")
        if sum(heights) != self.shape[0]:
            raise ValueError(f"heights {heights} do not add up to {self.shape[0]} rows")
        columns, groups = self.shape[1], self.stored_scale[0].numel()
        parts, top = [], 0
        for height in heights:
            rows = slice(top, top + height)
            zero_point = self.packed_zero_point
            if zero_point is not None:
                zero_point = cut(zero_point, self.bits, rows.start * groups, rows.stop * groups)
            parts.append(
                QuantizedTensor(
                    kind=self.kind,
                    packed=cut(self.packed, self.bits, rows.start * columns, rows.stop * columns),
                    bits=self.bits,
                    shape=torch.Size((height, columns)),
                    group_size=self.group_size,
                    stored_scale=self.stored_scale[rows].clone(),
                    packed_zero_point=zero_point,
                )
            )
            top += height
        return parts

    @property
    def plan(self) -> dict:
        """The description of the tensor, without its parts, as a dict that JSON can hold.

        "kind", "bits", "shape", "group_size"; after double quantization also "scale", the plan of
        the scales.
        """
        plan = {
            "kind": self.kind,
            "bits": self.bits,
            "shape": list(self.shape),
            "group_size": self.group_size,
        }
        if isinstance(self.stored_scale, QuantizedTensor):
            plan["scale"] = self.stored_scale.plan
        return plan

    @property
    def parts(self) -> dict[str, torch.Tensor]:
        """The stored tensors by name; those of quantized scales begin with "scale_"."""
        named = {"packed": self.packed}
        if isinstance(self.stored_scale, QuantizedTensor):
            nested = self.stored_scale.parts
            named |= {f"scale_{name}": tensor for name, tensor in nested.items()}
            named["scale_offset"] = self.scale_offset
        else:
            named["scale"] = self.stored_scale
        if self.packed_zero_point is not None:
            named["zero_point"] = self.packed_zero_point
        return named

    @classmethod
    def from_parts(
        cls, plan: dict, parts: dict[str, torch.Tensor], prefix: str = ""
    ) -> QuantizedTensor:
        """The tensor of a `plan` and its `parts`, without a copy; other names are ignored.

        Raises ValueError for an invalid plan, for a missing part, and as QuantizedTensor.
        """
        if not isinstance(plan, dict) or not {"kind", "bits", "shape", "group_size"} <= set(plan):
            raise ValueError(f"this describes no quantized tensor: {plan!r}")
        scale = parts.get(f"{prefix}scale")
        if "scale" in plan:
            scale = cls.from_parts(plan["scale"], parts, f"{prefix}scale_")
        shape = plan["shape"]
        if not isinstance(shape, list) or not all(isinstance(side, int) for side in shape):
            raise ValueError(f"shape must be a list of whole numbers, not {shape!r}")
        return cls(
            kind=plan["kind"],
            packed=parts.get(f"{prefix}packed"),
            bits=plan["bits"],
            shape=torch.Size(shape),
            group_size=plan["group_size"],
            stored_scale=scale,
            packed_zero_point=parts.get(f"{prefix}zero_point"),
            scale_offset=parts.get(f"{prefix}scale_offset"),
        )

    def _pieces(self, unit: int) -> Iterator[torch.Tensor]:
        """The flat approximate weight in pieces of about `piece_size`, multiples of `unit` long.

        Each piece also starts at a new byte and a new scale; the last piece may be shorter.
        """
        count = self.shape.numel()
        scale, zero_point = self.scale.float().view(-1), self.zero_point
        size = self.group_size if isinstance(self.group_size, int) else count // len(scale)
        step = math.lcm(8, unit, size if len(scale) > 1 else 1)
        step *= max(1, piece_size(self.packed) // step)
        table = self._table()
        for start in range(0, count, step):
            values = self._values(table, start, min(start + step, count))
            # a row for each scale; the remainder is one more row: a code book's short last block,
            # or a piece of a tensor that has a single scale
            whole = len(values) // size * size
            for begin, rows in ((0, values[:whole].view(-1, size)), (whole, values[None, whole:])):
                if rows.numel():
                    first = (start + begin) // size
                    which = slice(first, first + len(rows))
                    if zero_point is not None:
                        rows -= zero_point.view(-1, 1)[which]
                    rows *= scale[which, None]
            yield values

    def _table(self) -> torch.Tensor:
        """The value of each code before scale and zero point: float32 (2**bits,).

        With 4 bits it is read a byte at a time, which halves the look-ups: (256,) pairs of values,
        each stored in one float64.
        """
        table = self.code_book
        if table is None:
            table = torch.arange(2**self.bits, dtype=torch.uint8)
            if self.kind == "absmax":
                table = sign_extend(table, self.bits)
            table = table.float()
        if self.bits == 4:
            pairs = torch.stack([table.repeat_interleave(16), table.repeat(16)], dim=1)
            table = pairs.view(torch.float64).view(-1)
        return table.to(self.packed.device)

    def _values(self, table: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        """The table's values of codes `start` to `stop` of the flat weight; start begins a byte."""
        packed = self.packed[start * self.bits // 8 : (stop * self.bits + 7) // 8]
        if self.bits == 4:
            return table.index_select(0, packed.int()).view(torch.float32)[: stop - start]
        return table.index_select(0, unpack(packed, self.bits, stop - start).int())

    @property
    def nbytes(self) -> int:
        """The bytes of codes, scales and zero points. A shared code book is not counted."""
        return sum(part.nbytes for part in self.parts.values())

    @property
    def bits_per_weight(self) -> float:
        """8 * nbytes / number of weights: the effective bits, scales and zero points included."""
        return 8 * self.nbytes / self.shape.numel()

    def __repr__(self) -> str:
        return (
            f"QuantizedTensor({self.kind}, shape={tuple(self.shape)}, bits={self.bits}, "
            f"group_size={self.group_size!r}, {self.bits_per_weight:.4g} bits per weight)"
        )


def _check(tensor: QuantizedTensor) -> None:
    """Raises ValueError for parts that do not make a QuantizedTensor."""
    kind, bits, shape, size = tensor.kind, tensor.bits, tensor.shape, tensor.group_size
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, not {kind!r}")
    check_bits(bits)
    if kind in TABLES and len(TABLES[kind]()) != 2**bits:
        raise ValueError(f"{kind} is a table of {len(TABLES[kind]())} values, not of 2**{bits}")
    if not isinstance(shape, torch.Size) or shape.numel() < 1:
        raise ValueError(f"shape must be a torch.Size of positive sides, not {shape!r}")
    count = shape.numel()
    check_part("packed", tensor.packed, (packed_size(count, bits),), (torch.uint8,))

    if kind in TABLES:
        if not is_group_size(size):
            raise ValueError(f"{kind} has blocks of a positive number of weights, not {size!r}")
        scales = (-(-count // size),)
    else:
        if size is not None and len(shape) != 2:
            raise ValueError(f"per channel and per group need a matrix, not shape {tuple(shape)}")
        if size not in (None, "channel"):
            check_group_size(size, shape[-1])
        scales = scale_shape(shape, size)
    nested, offset = tensor.stored_scale, tensor.scale_offset
    if isinstance(nested, QuantizedTensor):
        if kind not in ("nf4", "fp4") or (nested.kind, nested.shape) != ("dynamic", scales):
            raise ValueError(f"{kind} of shape {tuple(shape)} cannot have the scales {nested!r}")
        check_part("scale_offset", offset, (), (torch.float32,))
    else:
        held = (torch.float32,) if kind in TABLES else (torch.float16, torch.float32)
        check_part("scale", nested, scales, held)
        if offset is not None:
            raise ValueError("scale_offset belongs to scales that are quantized in turn")
    if kind == "affine":
        zeros = (packed_size(math.prod(scales), bits),)
        check_part("zero_point", tensor.packed_zero_point, zeros, (torch.uint8,))
    elif tensor.packed_zero_point is not None:
        raise ValueError(f"{kind} has no zero points")


def check_part(name: str, part, shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...]) -> None:
    """Raises ValueError unless a part of a quantized weight is a tensor of this shape and dtype."""
    if not isinstance(part, torch.Tensor):
        raise ValueError(f"{name} is missing")
    if part.dtype not in dtypes or part.shape != shape:
        wanted = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        dtype = str(part.dtype).removeprefix("torch.")
        raise ValueError(f"{name} is {dtype} {list(part.shape)}, not {wanted} {list(shape)}")


def check_weight(weight: torch.Tensor) -> torch.Tensor:
    """The weight as a detached float32, float16 or bfloat16 tensor.

    Raises TypeError if it is not a floating-point tensor, ValueError if it is empty. NaN and
    Inf are found later, at no extra cost, in the absmax: see `check_finite`.
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


def is_group_size(size) -> bool:
    """Whether this is a number of weights that can share a scale."""
    return isinstance(size, int) and not isinstance(size, bool) and size > 0


def check_group_size(
    group_size: int | str | None, in_features: int | None = None
) -> int | str | None:
    """The group size as this package writes it: None, "channel" or a positive int; -1 is "channel".

    -1 means one scale per row in the checkpoints and options of other programs. Raises ValueError
    for anything else, and for a number that does not divide `in_features`, if that is given: the
    message lists the numbers that do.
    """
    if group_size in (None, "channel") or (group_size == -1 and not isinstance(group_size, bool)):
        return None if group_size is None else "channel"
    if not is_group_size(group_size):
        raise ValueError(
            f'group_size must be None, "channel" (or -1) or a positive int, not {group_size!r}'
        )
    if in_features is not None and in_features % group_size:
        sizes = [size for size in range(2, in_features + 1) if in_features % size == 0]
        raise ValueError(
            f"group size {group_size} does not divide in_features = {in_features}; "
            f"these do: {', '.join(map(str, sizes))}"
        )
    return group_size


def grouped(weight: torch.Tensor, group_size: int | str | None) -> torch.Tensor:
    """The weight as a matrix with one row for each scale: (groups, weights in a group).

    Raises ValueError if there is more than one group and the weight is not a matrix, and as
    `check_group_size`.
    """
    if group_size is None:
        return weight.reshape(1, -1)
    if weight.dim() != 2:
        raise ValueError(
            "per channel and per group need a weight of shape (out_features, in_features), "
            f"not {tuple(weight.shape)}"
        )
    group_size = check_group_size(group_size, weight.shape[1])
    return weight if group_size == "channel" else weight.reshape(-1, group_size)


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

    Rounding can only break this for subnormal scales. Such a scale is raised to the next number, so
    that nothing is clipped; a float32 scale is lowered to the next number if the last step would be
    Inf. A scale that float16 rounds to 0 stays 0: its weights are below `steps` * 2**-25 and become
    zeros.

    Raises ValueError for another data type, and for a scale that is too large for float16.
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
    large = rounded.isinf()
    if large.any():
        raise ValueError(
            f"{int(large.sum())} of {scale.numel()} scales, the first "
            f"{scale[large][0].item():.3g}, cannot be held in float16, which ends at 65504: "
            "use scale_dtype=torch.float32, or method nf4 or fp4, whose scales are float32"
        )
    up = rounded + 2**-24  # the distance between float16's subnormal numbers
    return torch.where(short & (rounded > 0), up, rounded)


def scale_shape(shape: torch.Size, group_size: int | str | None) -> tuple[int, ...]:
    """The shape of the scales of a weight: (), (out, 1) or (out, groups, 1)."""
    if group_size is None:
        return ()
    if group_size == "channel":
        return shape[0], 1
    return shape[0], math.prod(shape[1:]) // group_size, 1
