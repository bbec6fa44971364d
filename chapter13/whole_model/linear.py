"""QuantizedLinear: a linear layer with a quantized weight.

It replaces `torch.nn.Linear` and GPT-2's `Conv1D`. The weight is dequantized for each
multiplication, layer by layer, so the dequantized model is never in memory as a whole. Activations
stay floating point ("weight-only").
"""

import torch
from torch import nn
from torch.nn.functional import linear

from chapter13.tensors import QuantizedTensor
from chapter13.whole_model.int8 import has_int8_product, int8_product

FEW = 4  # up to so many rows of input, reading the weight takes longer than multiplying by it


class KeepsDtypes(nn.Module):
    """A module whose buffers follow `.to(device)` but keep their data types in a cast."""

    def _apply(self, fn, recurse=True):
        def move(tensor):
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(move, recurse)


class QuantizedLinear(KeepsDtypes):
    """y = x W^T + b with a quantized W.

    `quantized`: shape (out_features, in_features), also if it replaces a `Conv1D`, whose own weight
    is transposed. `bias`: (out_features,) or None. Input (..., in_features) of float32, bfloat16 or
    float16 gives output (..., out_features) of the same data type.

    The parts of the QuantizedTensor are buffers: `state_dict`, `.to(device)` and `model_size_mb`
    include them. Casting a model (`.bfloat16()`) does not change them, nor the bias.

    `weight` is computed on demand, for models whose code reads it (Mamba's does): it cannot be
    trained.

    Raises TypeError if `quantized` is not a QuantizedTensor, ValueError for shapes that do not fit.
    """

    def __init__(self, quantized: QuantizedTensor, bias: torch.Tensor | None = None):
        super().__init__()
        if not isinstance(quantized, QuantizedTensor):
            raise TypeError(f"quantized must be a QuantizedTensor, not {type(quantized).__name__}")
        if len(quantized.shape) != 2:
            raise ValueError(f"quantized must be a matrix, not of shape {tuple(quantized.shape)}")
        self.out_features, self.in_features = quantized.shape
        if bias is not None and bias.shape != (self.out_features,):
            raise ValueError(
                f"{self.out_features} outputs need as many biases, not shape {tuple(bias.shape)}"
            )
        self.plan = quantized.plan
        for name, tensor in quantized.parts.items():
            self.register_buffer(name, tensor)
        self.register_buffer("bias", None if bias is None else bias.detach())

    @property
    def quantized(self) -> QuantizedTensor:
        """The weight, in the memory of the module's buffers."""
        return QuantizedTensor.from_parts(self.plan, self._buffers)

    @property
    def weight(self) -> torch.Tensor:
        """The approximate weight, float32 (out_features, in_features), dequantized each time."""
        return self.quantized.dequantize()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.shape[-1] != self.in_features:
            raise ValueError(f"expected (..., {self.in_features}) inputs, not {tuple(x.shape)}")
        weight, flat = self.quantized, x.reshape(-1, self.in_features)
        if len(flat) > FEW:
            y = linear(flat, weight.dequantize(x.dtype))
        elif has_int8_product(weight, x):
            y = int8_product(flat, weight)
        else:  # piece by piece: dequantized rows are multiplied while they are in the cache
            pieces = (linear(flat, rows.to(x.dtype)) for rows in weight.row_pieces())
            y = torch.cat(list(pieces), dim=1)
        if self.bias is not None:
            y += self.bias.to(y.dtype)
        return y.view(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        return f"bias={self.bias is not None}, {self.quantized!r}"


def quantized_layers(model: nn.Module) -> dict[str, QuantizedLinear]:
    """Name -> module of every QuantizedLinear of a model, in the model's order."""
    return {name: m for name, m in model.named_modules() if isinstance(m, QuantizedLinear)}
