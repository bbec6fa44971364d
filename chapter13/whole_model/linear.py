"""QuantizedLinear: a linear layer that holds its weight quantized, and multiplies with it.

The drop-in for `torch.nn.Linear` and for GPT-2's `Conv1D`. The weight is dequantized for each
multiplication, layer by layer, so the model never lies in memory as a whole: what is saved is
memory and the traffic to it, while activations stay floating point ("weight-only").
"""

import torch
from torch import nn
from torch.nn.functional import linear

from chapter13.codebook import CODE_BOOKS, dynamic_code_book
from chapter13.dynamic import has_fast_int8
from chapter13.tensors import QuantizedTensor

FEW = 4  # rows of input up to which reading the weight takes longer than multiplying with it


class KeepsDtypes(nn.Module):
    """A module that `.to(device)` moves, and whose buffers keep their data types in a cast."""

    def _apply(self, fn, recurse=True):
        def move(tensor):
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(move, recurse)


class QuantizedLinear(KeepsDtypes):
    """y = x W^T + b with a quantized W.

    `quantized`: shape (out_features, in_features), also where it replaces a `Conv1D`, whose own
    weight is the transpose. `bias`: (out_features,) or None. Input (..., in_features) of float32,
    bfloat16 or float16 gives output (..., out_features) of the same data type.

    The parts of the QuantizedTensor are buffers: `state_dict`, `.to(device)` and `model_size_mb`
    see them. Casting a model (`.bfloat16()`) leaves them as they are, the bias too.

    Raises TypeError where `quantized` is no QuantizedTensor, ValueError for shapes that do not fit.
    """

    def __init__(self, quantized: QuantizedTensor, bias: torch.Tensor | None = None):
        super().__init__()
        if not isinstance(quantized, QuantizedTensor):
            raise TypeError(f"needs a QuantizedTensor, not a {type(quantized).__name__}")
        if len(quantized.shape) != 2:
            raise ValueError(f"needs a quantized matrix, not shape {tuple(quantized.shape)}")
        self.out_features, self.in_features = quantized.shape
        if bias is not None and bias.shape != (self.out_features,):
            raise ValueError(
                f"{self.out_features} outputs need as many biases, not shape {tuple(bias.shape)}"
            )
        self.plan = describe(quantized)
        for name, tensor in parts(quantized).items():
            self.register_buffer(name, tensor)
        self.register_buffer("bias", None if bias is None else bias.detach())

    @property
    def quantized(self) -> QuantizedTensor:
        """The weight, in the memory of the module's buffers."""
        return assemble(self.plan, dict(self.named_buffers()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.shape[-1] != self.in_features:
            raise ValueError(f"expected (..., {self.in_features}) inputs, not {tuple(x.shape)}")
        weight, flat = self.quantized, x.reshape(-1, self.in_features)
        if len(flat) > FEW:
            y = linear(flat, weight.dequantize(x.dtype))
        elif self._has_int8_kernel(x):
            y = int8_product(flat, weight)
        else:  # piece by piece: dequantized rows are multiplied while they are in the cache
            pieces = (linear(flat, rows.to(x.dtype)) for rows in weight.row_pieces())
            y = torch.cat(list(pieces), dim=1)
        if self.bias is not None:
            y += self.bias.to(y.dtype)
        return y.view(*x.shape[:-1], self.out_features)

    def _has_int8_kernel(self, x: torch.Tensor) -> bool:
        """Whether `int8_product` applies: signed bytes, a scale per row, a fit processor."""
        plan = self.plan
        rows = (plan["kind"], plan["bits"], plan["group_size"]) == ("absmax", 8, "channel")
        return rows and x.device.type == "cpu" and (x.dtype == torch.bfloat16 or has_fast_int8())

    def extra_repr(self) -> str:
        return f"bias={self.bias is not None}, {self.quantized!r}"


def int8_product(x: torch.Tensor, weight: QuantizedTensor) -> torch.Tensor:
    """x @ weight^T for 8-bit absmax codes with a scale per row, without dequantizing: (rows, out).

    bfloat16 goes to torch's own kernel for int8 weights. For other data types each row of x is
    written as three int8 digits, x = step * (a + b / 254 + c / 254**2): three products of integers,
    which are exact, and what is left over is below 2**-23 of the row's largest magnitude.
    """
    codes = weight.packed.view(torch.int8).view(weight.shape)
    scale = weight.scale.float().view(1, -1)
    if x.dtype == torch.bfloat16:
        return torch._weight_int8pack_mm(x.contiguous(), codes, scale.view(-1).to(x.dtype))
    rest = x.float()
    # magnitudes below 1e-28 count as zero, or the third step would be a subnormal number
    step = (rest.abs().amax(1, keepdim=True) / 127).clamp(min=1e-30)
    product = torch.zeros(len(x), len(codes))
    for _ in range(3):
        digit = (rest / step).round_()
        rest = rest - digit * step
        digit = digit.to(torch.int8)
        # row by row: torch's product is at its fastest for a single one
        rows = [torch._int_mm(row, codes.T) for row in digit.split(1)]
        product += torch.cat(rows) * step
        step = step / 254
    return (product * scale).to(x.dtype)


def describe(quantized: QuantizedTensor) -> dict:
    """What a QuantizedTensor is besides its tensors, as a dict that JSON can hold.

    "kind" is "absmax", "affine", "nf4", "fp4", or "dynamic" for the scales of double quantization,
    whose own description stands under "scale".
    """
    if quantized.code_book is None:
        kind = "absmax" if quantized.packed_zero_point is None else "affine"
    else:
        kind = next(
            kind
            for kind, make in _CODE_BOOKS.items()
            if torch.equal(make(), quantized.code_book.cpu())
        )
    plan = {
        "kind": kind,
        "bits": quantized.bits,
        "shape": list(quantized.shape),
        "group_size": quantized.group_size,
    }
    if isinstance(quantized.stored_scale, QuantizedTensor):
        plan["scale"] = describe(quantized.stored_scale)
    return plan


def parts(quantized: QuantizedTensor) -> dict[str, torch.Tensor]:
    """The tensors a QuantizedTensor holds, by name; of scales quantized twice: "scale_..."."""
    named = {"packed": quantized.packed}
    if isinstance(quantized.stored_scale, QuantizedTensor):
        nested = parts(quantized.stored_scale)
        named |= {f"scale_{name}": tensor for name, tensor in nested.items()}
        named["scale_offset"] = quantized.scale_offset
    else:
        named["scale"] = quantized.stored_scale
    if quantized.packed_zero_point is not None:
        named["zero_point"] = quantized.packed_zero_point
    return named


def assemble(plan: dict, tensors: dict[str, torch.Tensor], prefix: str = "") -> QuantizedTensor:
    """The inverse of `describe` and `parts`, without a copy. ValueError for an unknown kind."""
    if plan["kind"] not in ("absmax", "affine", *_CODE_BOOKS):
        raise ValueError(f"unknown kind {plan['kind']!r}")
    scale = tensors.get(f"{prefix}scale")
    if "scale" in plan:
        scale = assemble(plan["scale"], tensors, f"{prefix}scale_")
    return QuantizedTensor(
        packed=tensors[f"{prefix}packed"],
        bits=plan["bits"],
        shape=torch.Size(plan["shape"]),
        group_size=plan["group_size"],
        stored_scale=scale,
        packed_zero_point=tensors.get(f"{prefix}zero_point"),
        code_book=_CODE_BOOKS[plan["kind"]]() if plan["kind"] in _CODE_BOOKS else None,
        scale_offset=tensors.get(f"{prefix}scale_offset"),
    )


_CODE_BOOKS = CODE_BOOKS | {"dynamic": dynamic_code_book}
