"""Products of int8 matrices, and of activations with an int8 weight that is not dequantized."""

import torch
from torch import nn

from chapter13.tensors import QuantizedTensor


def int8_matmul(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a b^T of int8 matrices (rows, features) and (out, features): int32 (rows, out), exact."""
    if a.device.type == "cpu":
        if has_fast_int8():
            return torch._int_mm(a, b.T)
        # 1024 products of at most 128 * 128 add up to at most 2**24: float32 holds every such sum
        parts = zip(a.split(1024, dim=1), b.split(1024, dim=1), strict=True)
        return sum((x.float() @ y.float().T).int() for x, y in parts)
    # CUDA's kernel needs more than 16 rows and multiples of 8
    rows, features = -len(a) % 8 + 24, -a.shape[1] % 8
    padded_a = nn.functional.pad(a, (0, features, 0, rows))
    padded_b = nn.functional.pad(b, (0, features, 0, -len(b) % 8))
    return torch._int_mm(padded_a, padded_b.T.contiguous())[: len(a), : len(b)]


def has_fast_int8() -> bool:
    """Whether torch multiplies int8 faster than float32 on this processor: only with AVX-512.

    (Without its instructions, `torch._int_mm` processes the numbers one by one.)
    """
    return torch.backends.cpu.get_cpu_capability() == "AVX512"


def has_int8_product(weight: QuantizedTensor, x: torch.Tensor) -> bool:
    """Whether `int8_product` applies: 8-bit absmax, per channel, on a CPU with fast int8."""
    if (weight.kind, weight.bits, weight.group_size) != ("absmax", 8, "channel"):
        return False
    return x.device.type == "cpu" and (x.dtype == torch.bfloat16 or has_fast_int8())


def int8_product(x: torch.Tensor, weight: QuantizedTensor) -> torch.Tensor:
    """x @ weight^T for 8-bit absmax codes with a scale per row, without dequantizing: (rows, out).

    bfloat16 uses torch's own kernel for int8 weights. For other data types each row of x is written
    as three int8 digits, x = step * (a + b / 254 + c / 254**2). This needs three products of
    integers, which are exact; the remainder is below 2**-23 of the row's largest magnitude.
    """
    codes = weight.packed.view(torch.int8).view(weight.shape)
    scale = weight.scale.float().view(1, -1)
    if x.dtype == torch.bfloat16:
        return torch._weight_int8pack_mm(x.contiguous(), codes, scale.view(-1).to(x.dtype))
    rest = x.float()
    # magnitudes below 1e-28 count as zero: the third step would be a subnormal number
    step = (rest.abs().amax(1, keepdim=True) / 127).clamp(min=1e-30)
    product = torch.zeros(len(x), len(codes))
    for _ in range(3):
        digit = (rest / step).round_()
        rest = rest - digit * step
        digit = digit.to(torch.int8)
        # row by row, because torch's product is fastest for a single row
        rows = [torch._int_mm(row, codes.T) for row in digit.split(1)]
        product += torch.cat(rows) * step
        step = step / 254
    return (product * scale).to(x.dtype)
