"""Dynamic INT8: activations are quantized on the fly, for a true int8 matrix product.

Weights are quantized to int8 once, activations at each call, with the range that they have in that
call. With x = sx (qx - zx) and w = sw qw, the matrix product is one of integers:

    y = sx sw (qx qw^T - zx * sum of each row of qw) + b

There are two schemes, each as in its library:

- "per_tensor": torch.ao's `quantize_dynamic` on x86. One affine scale for all activations, 7 bits
  (0..127: older kernels add two products in 16 bits), one symmetric scale for the weight
- "per_token": torchao's `Int8DynamicActivationInt8WeightConfig`. A symmetric scale for each row of
  activations (a token) and for each row of the weight (an output channel)
"""

import math

import torch
from torch import nn

from chapter13.tensors import check_finite, check_weight, grouped
from chapter13.whole_model.int8 import int8_matmul
from chapter13.whole_model.layers import replace_layers, weight_of

GRANULARITIES = ("per_tensor", "per_token")
_STEPS = 127.5  # both libraries divide the range from -absmax to absmax into 255 steps
_SMALLEST_SCALE = 6.0999998822808266e-05  # of torch.ao's activations: 6.1e-5 in float32
_LARGEST = torch.finfo(torch.float32).max
_EPS = torch.finfo(torch.float32).eps  # the smallest scale of torchao


def quantize_weight_per_tensor(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(int8 codes in the weight's shape, float32 scalar scale = absmax / 127.5), as torch.ao."""
    weight = check_weight(weight).float()
    absmax = weight.abs().amax()
    check_finite(weight, absmax)
    scale = (absmax / _STEPS).clamp(min=_EPS)
    return _round(weight * (1 / scale.double()).float()), scale


def quantize_per_token(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A symmetric scale for each row: (int8 codes (rows, features), float32 scales (rows, 1)).

    This is how torchao quantizes activations, row by row, and weights. Scales are at least
    float32's eps. The scales of float16 and bfloat16 rows are rounded to that data type; the codes
    are computed in float32.
    """
    if x.dtype == torch.float64:
        x = x.float()
    scale = (x.abs().amax(-1, keepdim=True) / _STEPS).clamp(min=_EPS).float()
    return _round(x.float() * (1.0 / scale)), scale


def quantize_per_tensor(x: torch.Tensor) -> tuple[torch.Tensor, float, int]:
    """One affine scale for the tensor, as in torch.ao: (int8 codes 0..127, scale, zero point).

    Raises ValueError if x holds NaN or Inf, because all codes would be wrong.
    """
    low, high = (x.min().item(), x.max().item()) if x.numel() else (0.0, 0.0)
    scale, zero_point = affine_parameters(min(low, 0), max(high, 0))
    return quantize_affine_7bit(x, scale, zero_point), scale, zero_point


def affine_parameters(low: float, high: float, steps: int = 127) -> tuple[float, int]:
    """Scale and zero point of the grid 0..steps over [low, high], low <= 0 <= high, as in torch.ao.

    The zero point is computed from one end of the range, chosen as torch.ao does. The scale is at
    least 6.1e-5. Raises ValueError for a range that is not finite.
    """
    if not (math.isfinite(low) and math.isfinite(high)):
        raise ValueError(f"activations from {low} to {high}: NaN and Inf have no code")
    scale = (high - low) / steps
    if scale == 0 or 1 / scale > _LARGEST:
        scale = 0.1
    if scale < _SMALLEST_SCALE:
        factor, scale = _SMALLEST_SCALE / scale, _SMALLEST_SCALE
        low, high = low * factor, high * factor
    from_low, from_high = -low / scale, steps - high / scale
    nearer_low = -abs(low / scale) < steps - abs(high / scale)
    zero_point = from_low if nearer_low else from_high
    return scale, round(min(max(zero_point, 0), steps))


def quantize_affine_7bit(x: torch.Tensor, scale: float, zero_point: int) -> torch.Tensor:
    """int8 codes 0..127: round(x / scale) + zero point, clipped at both ends."""
    # torch.ao multiplies by the reciprocal in float32, because the x86 kernels do
    codes = (x.float() * torch.tensor(1 / torch.tensor(scale).item())).round_()
    return codes.add_(zero_point).clamp_(0, 127).to(torch.int8)


class Int8Linear(nn.Module):
    """y = x W^T + b in integers; each input gets its own activation scale.

    `weight`: floating point (out_features, in_features); `granularity`: "per_tensor" or
    "per_token", see above. Input (..., in_features) in any floating data type gives output in the
    same type. Codes, scale and bias are buffers. Raises as `quantize_absmax`, and ValueError for
    another granularity and for inputs of the wrong width.
    """

    def __init__(self, weight, bias=None, granularity="per_tensor"):
        super().__init__()
        if granularity not in GRANULARITIES:
            names = ", ".join(GRANULARITIES)
            raise ValueError(f"granularity must be one of {names}, not {granularity!r}")
        self.granularity = granularity
        weight = grouped(check_weight(weight), "channel")
        self.out_features, self.in_features = weight.shape
        if granularity == "per_tensor":
            codes, scale = quantize_weight_per_tensor(weight)
            sums = codes.sum(1, dtype=torch.int32)
            self.register_buffer("row_sums", sums, persistent=False)
        else:
            check_finite(weight, weight.abs().amax())
            codes, scale = quantize_per_token(weight)
            scale = scale.view(1, -1)
        self.register_buffer("codes", codes)
        self.register_buffer("scale", scale)
        self.register_buffer("bias", None if bias is None else bias.detach())

    def product(self, x: torch.Tensor) -> torch.Tensor:
        """x (rows, in_features) times the weight without its scales: float32 (rows, out)."""
        if self.granularity == "per_token":
            codes, scale = quantize_per_token(x)
            return int8_matmul(codes, self.codes).float() * scale
        codes, scale, zero_point = quantize_per_tensor(x)
        shifted = int8_matmul(codes, self.codes) - zero_point * self.row_sums
        return shifted.float() * scale

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.shape[-1] != self.in_features:
            raise ValueError(f"expected (..., {self.in_features}) inputs, not {tuple(x.shape)}")
        y = self.product(x.reshape(-1, self.in_features)) * self.scale
        if self.bias is not None:
            y = y + self.bias.float()
        return y.to(x.dtype).view(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, {self.granularity}"


def quantize_dynamic(
    model: nn.Module, granularity: str = "per_tensor", progress: bool = True
) -> nn.Module:
    """Replaces every linear layer except the head with an Int8Linear; returns the model.

    Needs no calibration. After an error the model is unchanged.
    """
    return replace_layers(
        model,
        lambda _, layer: Int8Linear(weight_of(layer), layer.bias, granularity),
        progress,
        f"INT8, dynamic {granularity}",
    )


def _round(scaled: torch.Tensor) -> torch.Tensor:
    return scaled.round_().clamp_(-128, 127).to(torch.int8)
