"""Kernels that multiply with packed 4-bit codes: torch's, and bitsandbytes'.

QuantizedLinear dequantizes before it multiplies. A fused kernel does both in one step, in the
processor's registers, so that it reads only codes and scales from memory. In return the codes must
be in the kernel's own order, and it computes in bfloat16.

- "absmax" and "affine" with 4 bits: torch has a kernel for CPUs
- "nf4" and "fp4": torch has none. If bitsandbytes is installed, its kernel is used on processors
  with AVX512-BF16. On other processors its compiled dequantization is used, a few rows at a time;
  this one computes in the input's data type
"""

import torch
from torch import nn

from chapter13.packing import PIECE
from chapter13.quiet import silent_bitsandbytes
from chapter13.whole_model.linear import KeepsDtypes, QuantizedLinear, quantized_layers

GROUP_SIZES = {  # that the kernels support
    "integer": (32, 64, 128, 256),
    "code book": (32, 64, 128, 256, 512, 1024, 2048, 4096),
}
_ROWS = {"integer": 16, "code book": 32}  # of the weight that the kernels process at a time


class FusedLinear(KeepsDtypes):
    """y = x W^T + b by a fused kernel, on a CPU.

    `layer`: a QuantizedLinear, which stays unchanged. Its codes are copied into the kernel's order,
    and its scales (and zero points) rounded to bfloat16. Input (..., in_features) is rounded to
    bfloat16, the sums are float32, the result is rounded to bfloat16 and has the input's data type.
    NF4 and FP4 without AVX512-BF16 are only rounded to the input's data type.

    Raises ValueError if no kernel supports the layer (see `why_not`), and ImportError if the kernel
    is bitsandbytes' and it is not installed.
    """

    def __init__(self, layer: QuantizedLinear):
        super().__init__()
        if reason := why_not(layer):
            raise ValueError(reason)
        self.in_features, self.out_features = layer.in_features, layer.out_features
        quantized = layer.quantized
        self.group_size = quantized.group_size
        self.kind = quantized.kind
        codes = quantized.codes()
        # both kernels process many output features at a time: the group's dimension comes first
        scale = quantized.scale.float().view(self.out_features, -1).T
        table = quantized.code_book
        if table is not None and not _load_bitsandbytes():
            self.kernel = "dequantize"
            codes, scale = quantized.packed.view(self.out_features, -1), scale.T
        elif table is not None:
            self.kernel = "code book"
            codes, scale = interleave(codes), scale.bfloat16()
            self.register_buffer("code_book", table, persistent=False)
        else:
            self.kernel = "integer"
            zero_point = quantized.zero_point
            if zero_point is None:
                codes, offset = codes + 8, torch.zeros_like(scale)
            else:  # (code - zero) * scale = (code - 8) * scale + (8 - zero) * scale
                offset = (8 - zero_point.float().view(self.out_features, -1).T) * scale
            codes = torch._convert_weight_to_int4pack_for_cpu(codes.int(), 1)
            scale = torch.stack([scale, offset], dim=2).bfloat16()
        self.register_buffer("codes", codes)
        self.register_buffer("scale", scale.contiguous())
        self.register_buffer("bias", layer.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.shape[-1] != self.in_features:
            raise ValueError(f"expected (..., {self.in_features}) inputs, not {tuple(x.shape)}")
        flat, shape = x.reshape(-1, self.in_features), (self.out_features, self.in_features)
        if self.kernel == "integer":
            y = torch._weight_int4pack_mm_for_cpu(
                flat.bfloat16(), self.codes, self.group_size, self.scale
            )
        elif self.kernel == "code book":
            y = torch.ops.bitsandbytes.gemv_4bit(
                flat.bfloat16(), self.codes, shape, self.scale, self.code_book, self.group_size
            )
        else:
            y = self._dequantize_and_multiply(flat)
        if self.bias is not None:
            y = y + self.bias
        return y.to(x.dtype).view(*x.shape[:-1], self.out_features)

    def _dequantize_and_multiply(self, x: torch.Tensor) -> torch.Tensor:
        """Dequantizes some rows at a time and multiplies them while they are in the cache."""
        rows = max(1, PIECE // self.in_features)
        pieces = []
        for codes, scale in zip(self.codes.split(rows), self.scale.split(rows), strict=True):
            weight = torch.ops.bitsandbytes.dequantize_4bit(
                codes, scale, self.group_size, self.kind, (len(codes), self.in_features), x.dtype
            )
            pieces.append(nn.functional.linear(x, weight))
        return torch.cat(pieces, dim=1)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, group_size={self.group_size}"


def fuse(model: nn.Module) -> nn.Module:
    """Replaces every QuantizedLinear of a model with a FusedLinear; returns the model.

    For inference: there is no file format for fused layers, so save the model before. Raises as
    FusedLinear, naming the layer, before any layer is replaced, and ValueError if there is none.
    """
    layers = quantized_layers(model)
    if not layers:
        raise ValueError(f"{type(model).__name__} has no quantized layer: quantize_model first")
    for name, layer in layers.items():
        if reason := why_not(layer):
            raise ValueError(f"{name}: {reason}")
    fused = {name: FusedLinear(layer) for name, layer in layers.items()}
    for name, layer in fused.items():
        model.set_submodule(name, layer)
    return model


def why_not(layer: QuantizedLinear) -> str | None:
    """Why no fused kernel supports this layer; None if one does."""
    kind, bits, size = (layer.plan[name] for name in ("kind", "bits", "group_size"))
    family = "integer" if kind in ("absmax", "affine") else "code book"
    if layer.packed.device.type != "cpu":
        return f"the fused kernels are for the CPU, the layer is on {layer.packed.device}"
    if bits != 4:
        return f"the fused kernels take 4 bits, not {bits}"
    if size not in GROUP_SIZES[family]:
        sizes = ", ".join(map(str, GROUP_SIZES[family]))
        return f"the fused kernel for {kind} takes groups of {sizes}, not {size!r}"
    if layer.in_features % size:
        return f"blocks of {size} do not divide in_features = {layer.in_features}"
    if layer.out_features % _ROWS[family]:
        rows = _ROWS[family]
        return f"the fused kernel for {kind} takes {rows} rows, not {layer.out_features}, at a time"
    return None


def interleave(codes: torch.Tensor) -> torch.Tensor:
    """4-bit codes (out, in) in the order of bitsandbytes' kernel: uint8 (out, in / 2).

    The kernel reads two columns of 32 rows at a time, 64 codes: rows 0 to 15 are in the low halves
    of 32 bytes, rows 16 to 31 in the high halves.
    """
    out, width = codes.shape
    pairs = codes.view(out // 32, 2, 16, width // 2, 2).permute(0, 3, 1, 2, 4)
    low, high = pairs.reshape(-1, 2, 32).unbind(1)
    return (high << 4 | low).view(out, width // 2)


def _load_bitsandbytes() -> bool:
    """Imports bitsandbytes and its operators; returns whether it has a fused kernel here."""
    try:
        with silent_bitsandbytes():
            from bitsandbytes.functional import has_avx512bf16
    except ImportError as error:
        raise ImportError(
            "torch has no kernel for NF4 and FP4 on a CPU, and bitsandbytes, which has one, is not "
            "installed: pip install bitsandbytes"
        ) from error
    return has_avx512bf16()
