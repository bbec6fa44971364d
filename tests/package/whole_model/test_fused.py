"""Fused kernels: the layer's own product within bounds, the codes in bitsandbytes' order."""

import logging
import re
import sys

import pytest
import torch
from tiny import says
from torch import nn

from chapter13 import quantize_absmax, quantize_affine, quantize_codebook, quantize_model
from chapter13.memory import memory_breakdown
from chapter13.whole_model import fused
from chapter13.whole_model.fused import FusedLinear, fuse, interleave, why_not
from chapter13.whole_model.linear import QuantizedLinear

U = 2**-24  # half a unit in the last place of float32, relative
V = 2**-8  # the same of bfloat16

QUANTIZERS = {
    "absmax": lambda w, size: quantize_absmax(w, 4, size),
    "absmax, float32 scales": lambda w, size: quantize_absmax(w, 4, size, torch.float32),
    "affine": lambda w, size: quantize_affine(w, 4, size),
    "nf4": lambda w, size: quantize_codebook(w, "nf4", size),
    "nf4 double": lambda w, size: quantize_codebook(w, "nf4", size, double_quant=True),
    "fp4": lambda w, size: quantize_codebook(w, "fp4", size),
}
all_kinds = pytest.mark.parametrize("kind", QUANTIZERS)


def matrix(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(13))


def layer_of(kind, shape=(96, 256), size=64, bias=None):
    if "fp4" in kind or "nf4" in kind:
        pytest.importorskip("bitsandbytes")
        if not fused._load_bitsandbytes():
            pytest.skip("bitsandbytes' kernel needs a processor with AVX512-BF16")
    return QuantizedLinear(QUANTIZERS[kind](matrix(*shape), size), bias)


def rounded_weight(layer):
    """The weight that a kernel multiplies with, and a bound of each of its terms, in float64.

    From the definition: scale, offset and code book rounded to bfloat16, code by code.
    """
    quantized = layer.quantized
    out, width = quantized.shape
    codes = quantized.codes().view(out, -1, quantized.group_size)
    scale = quantized.scale.float().view(out, -1, 1)
    if quantized.code_book is not None:
        values = quantized.code_book.bfloat16()[codes.int()].double()
        weight = values * scale.bfloat16().double()
        return weight.view(out, width), weight.abs().view(out, width)
    offset = torch.zeros_like(scale)
    codes = codes.double()
    if quantized.zero_point is not None:
        offset = (8 - quantized.zero_point.float().view(out, -1, 1)) * scale
        codes = codes - 8
    terms = codes * scale.bfloat16().double(), offset.bfloat16().double()
    size = terms[0].abs() + terms[1].abs()
    return (terms[0] + terms[1]).view(out, width), size.expand(codes.shape).reshape(out, width)


@all_kinds
@pytest.mark.parametrize("shape", [(32, 256), (96, 512), (192, 768)])
@pytest.mark.parametrize("size", [32, 64, 128, 256])
@pytest.mark.parametrize("rows", [1, 3, 40])
def test_product_of_rounded_parts(kind, shape, size, rows):
    layer = layer_of(kind, shape, size)
    x = matrix(rows, shape[1]).bfloat16()
    y = FusedLinear(layer)(x)
    weight, size = rounded_weight(layer)
    exact = x.double() @ weight.T
    # sums of n products in float32: n + 2 roundings a term; the result is rounded to bfloat16
    sums = (shape[1] + 2) * U * (x.double().abs() @ size.T)
    assert y.dtype == torch.bfloat16
    assert ((y.double() - exact).abs() <= V * (exact.abs() + sums) + sums).all()


@all_kinds
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_close_to_the_layer_it_replaces(kind, dtype):
    bias = matrix(96)
    layer = layer_of(kind, bias=bias)
    x = matrix(2, 3, 256).to(dtype)
    y = FusedLinear(layer)(x)
    assert y.shape == (2, 3, 96)
    assert y.dtype == dtype
    exact = x.double() @ layer.quantized.dequantize().double().T + bias.double()
    size = x.double().abs() @ rounded_weight(layer)[1].T
    # roundings to bfloat16: input, scale, code book or offset, a little over one each for
    # being multiplied; sums in float32; result, bias and the last cast
    eps = torch.finfo(dtype).eps / 2
    bound = (3 * V + 6 * V**2 + 260 * U) * size + (V + 2 * eps) * (size + bias.abs()) * (1 + 4 * V)
    assert ((y.double() - exact).abs() <= bound).all()


@all_kinds
def test_nasty_activations(kind):
    layer = FusedLinear(layer_of(kind))
    assert not layer(torch.zeros(2, 256)).any()
    for bad in (torch.nan, torch.inf):
        x = matrix(3, 256)
        x[1, 7] = bad
        y = layer(x)
        assert not y[1].isfinite().any()
        assert y[[0, 2]].isfinite().all()


@all_kinds
def test_zero_weights(kind):
    weight = matrix(32, 64)
    weight[3] = 0
    layer = layer_of(kind)  # skips where there is no kernel
    layer = FusedLinear(QuantizedLinear(QUANTIZERS[kind](weight, 64)))
    y = layer(matrix(4, 64))
    # double quantization leaves a row of zeros its code 7, which stands for 0
    assert not y[:, 3].any()
    assert y[:, :3].all()


def test_order_of_bitsandbytes():
    reference = pytest.importorskip("bitsandbytes.functional")
    weight = matrix(96, 128)
    packed, state = reference.quantize_4bit(weight, blocksize=64, quant_type="nf4")
    theirs, state = reference._convert_weight_packed_for_cpu(packed, state)
    quantized = quantize_codebook(weight)
    assert torch.equal(interleave(quantized.codes()), theirs)
    if fused._load_bitsandbytes():
        assert torch.equal(FusedLinear(QuantizedLinear(quantized)).scale, state.absmax)


def test_order_by_its_definition():
    codes = torch.arange(64 * 6).remainder(16).to(torch.uint8).view(64, 6)
    bytes_ = interleave(codes).view(2, 3, 16, 2)  # block of 32 rows, two columns, row, column
    for row, column in ((0, 0), (15, 5), (16, 1), (31, 4), (32, 0), (50, 3), (63, 5)):
        byte = bytes_[row // 32, column // 2, row % 16, column % 2].item()
        half = byte >> 4 if row % 32 >= 16 else byte & 15
        assert half == codes[row, column]


@pytest.mark.parametrize("kind", ["nf4", "nf4 double", "fp4"])
def test_same_numbers_as_bitsandbytes_layer(kind):
    """As transformers' layer on such a processor, bit for bit."""
    layer = layer_of(kind)
    import bitsandbytes.nn as reference

    theirs = reference.Linear4bit(
        256, 96, bias=False, compute_dtype=torch.bfloat16, quant_type=kind[:3]
    )
    theirs.weight = reference.Params4bit(
        matrix(96, 256), False, quant_type=kind[:3], compress_statistics="double" in kind
    )
    theirs = theirs.to("cpu").eval()
    x = matrix(3, 256).bfloat16()
    assert torch.equal(FusedLinear(layer)(x), theirs(x))


class Pair(nn.Sequential):
    def __init__(self, width=64):
        super().__init__(nn.Linear(width, 96), nn.Linear(96, 32, bias=False))


def test_fuse_a_model():
    torch.manual_seed(0)
    model = quantize_model(Pair(), "affine", 4, 32, progress=False)
    x = matrix(5, 64)
    first, second = (FusedLinear(layer) for layer in model)
    expected = second(first(x))
    held = sum(layer.packed.nbytes for layer in model)
    assert fuse(model) is model
    assert [type(layer) for layer in model] == [FusedLinear, FusedLinear]
    assert torch.equal(model(x), expected)
    breakdown = memory_breakdown(model)
    assert breakdown["linears"] == held == (64 * 96 + 96 * 32) // 2
    # scale and offset of 2 bytes each for 32 weights
    assert breakdown["scales"] == (64 * 96 + 96 * 32) // 32 * 4
    half = model.half()
    assert half[0].scale.dtype == torch.bfloat16
    assert torch.equal(half(x), expected)


def test_all_or_none():
    torch.manual_seed(0)
    model = quantize_model(Pair(), "absmax", 4, 32, progress=False)
    before = model[0]
    model[1] = QuantizedLinear(quantize_absmax(matrix(32, 96), 4, "channel"))
    with pytest.raises(ValueError, match=says("1", "absmax", 32, 64, 128, 256)):
        fuse(model)
    assert model[0] is before
    with pytest.raises(ValueError, match=says("Pair", "quantize_model")):
        fuse(Pair())


@pytest.mark.parametrize(
    ("quantized", "reason"),
    [
        (lambda: quantize_absmax(matrix(32, 64), 8, 64), says("4 bits", 8)),
        (lambda: quantize_absmax(matrix(32, 64), 3, 64), says("4 bits", 3)),
        (lambda: quantize_absmax(matrix(32, 64), 4), says("absmax", "32, 64, 128, 256", "None")),
        (lambda: quantize_affine(matrix(32, 64), 4, 16), says("affine", 256, 16)),
        (lambda: quantize_absmax(matrix(24, 64), 4, 64), says("16 rows", 24)),
        (lambda: quantize_codebook(matrix(48, 64)), says("32 rows", 48)),
        (lambda: quantize_codebook(matrix(32, 64), "fp4", 48), says("fp4", 4096, 48)),
        (lambda: quantize_codebook(matrix(64, 96)), says("64", "in_features", 96)),
    ],
)
def test_what_no_kernel_takes(quantized, reason):
    layer = QuantizedLinear(quantized())
    with pytest.raises(ValueError, match=reason):
        FusedLinear(layer)


def test_elsewhere_than_on_a_cpu():
    layer = QuantizedLinear(quantize_absmax(matrix(32, 64), 4, 64)).to("meta")
    assert re.search(says("CPU", "meta"), why_not(layer))


def test_without_bitsandbytes(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes.functional", None)
    FusedLinear(QuantizedLinear(quantize_absmax(matrix(32, 64), 4, 64)))  # torch's kernel
    layer = QuantizedLinear(quantize_codebook(matrix(32, 64)))
    with pytest.raises(ImportError, match=says("pip install bitsandbytes")):
        FusedLinear(layer)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["nf4", "nf4 double", "fp4"])
@pytest.mark.parametrize("piece", [1, 1 << 12, 1 << 18])
def test_without_the_instructions(kind, dtype, piece, monkeypatch):
    """bitsandbytes' dequantization in place of the fused kernel."""
    functional = pytest.importorskip("bitsandbytes.functional")
    monkeypatch.setattr(functional, "has_avx512bf16", lambda: False)
    monkeypatch.setattr(fused, "PIECE", piece)
    layer = QuantizedLinear(QUANTIZERS[kind](matrix(96, 256), 64), matrix(96))
    x = matrix(2, 256).to(dtype)
    new = FusedLinear(layer)
    y = new(x)
    assert torch.equal(new.codes.view(-1), layer.packed)
    exact = x.double() @ layer.quantized.dequantize().double().T + layer.bias.double()
    size = x.double().abs() @ layer.quantized.dequantize().double().abs().T + layer.bias.abs()
    # the weight's, the result's and the sum's roundings to the data type, and those of the
    # product's 256 additions, in the worst case each to the data type
    bound = (4 + 256) * torch.finfo(dtype).eps / 2 * size
    assert y.dtype == dtype
    assert ((y.double() - exact).abs() <= bound).all()


def test_logging_is_left_as_it_was():
    pytest.importorskip("bitsandbytes")
    logger = logging.getLogger("bitsandbytes.backends.cpu.ops")
    before = logger.level
    fused._load_bitsandbytes()
    assert logger.level == before


def test_wrong_width():
    layer = FusedLinear(QuantizedLinear(quantize_absmax(matrix(32, 64), 4, 64)))
    with pytest.raises(ValueError, match=says("(..., 64)", "(2, 65)")):
        layer(matrix(2, 65))
