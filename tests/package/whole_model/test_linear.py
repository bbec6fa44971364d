"""QuantizedLinear: as nn.Linear and Conv1D on every path, within bounds; kept to the bit."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import generator, says
from torch import nn

from chapter13 import quantize_absmax, quantize_affine, quantize_codebook
from chapter13.tensors import QuantizedTensor
from chapter13.whole_model import int8
from chapter13.whole_model.int8 import int8_product
from chapter13.whole_model.linear import FEW, QuantizedLinear

U = 2**-24  # half a unit in the last place of float32, relative


def matrix(*shape):
    return torch.randn(shape, generator=generator())


QUANTIZERS = {
    "absmax 8 per channel": lambda w: quantize_absmax(w, 8, "channel"),
    "absmax 8 per tensor": lambda w: quantize_absmax(w, 8),
    "absmax 4": lambda w: quantize_absmax(w, 4, w.shape[1]),
    "absmax 3, groups": lambda w: quantize_absmax(w, 3, 11 if w.shape[1] % 11 == 0 else "channel"),
    "affine 4": lambda w: quantize_affine(w, 4, "channel"),
    "affine 8": lambda w: quantize_affine(w, 8),
    "affine 2": lambda w: quantize_affine(w, 2, "channel", torch.float32),
    "nf4": lambda w: quantize_codebook(w, "nf4", 64),
    "nf4 double": lambda w: quantize_codebook(w, "nf4", 64, double_quant=True),
    "fp4, blocks of 5": lambda w: quantize_codebook(w, "fp4", 5),
}
SHAPES = [(48, 64), (5, 7), (33, 577), (8, 330), (1, 1), (3000, 96)]


def plainly(quantized):
    """The weight from codes, scale and zero point by the definition, one expression each."""
    codes, scale = quantized.codes().view(-1).float(), quantized.scale.float().view(-1)
    count = codes.numel()
    size = quantized.group_size
    if size is None:
        size = count
    elif size == "channel":
        size = quantized.shape[1]
    group = torch.arange(count) // size
    if quantized.code_book is not None:
        codes = quantized.code_book[codes.int()]
    if quantized.zero_point is not None:
        codes = codes - quantized.zero_point.view(-1)[group]
    return (codes * scale[group]).view(quantized.shape)


@pytest.mark.parametrize("quantize", QUANTIZERS.values(), ids=QUANTIZERS)
@pytest.mark.parametrize("shape", SHAPES)
def test_pieces_are_the_weight(quantize, shape):
    quantized = quantize(matrix(*shape))
    expected = plainly(quantized)
    assert torch.equal(quantized.dequantize(), expected)
    assert torch.equal(torch.cat(list(quantized.row_pieces())), expected)
    assert torch.equal(quantized.dequantize(torch.bfloat16), expected.bfloat16())


@given(
    st.integers(2, 8), st.integers(1, 70), st.integers(1, 70), st.sampled_from(["absmax", "affine"])
)
def test_pieces_are_the_weight_at_any_size(bits, rows, columns, kind):
    quantizer = {"absmax": quantize_absmax, "affine": quantize_affine}[kind]
    for group_size in (None, "channel", columns):
        quantized = quantizer(matrix(rows, columns), bits, group_size)
        assert torch.equal(quantized.dequantize(), plainly(quantized))
        assert torch.equal(torch.cat(list(quantized.row_pieces())), plainly(quantized))


@pytest.mark.parametrize("piece", [64, 4096])
@pytest.mark.parametrize("quantize", QUANTIZERS.values(), ids=QUANTIZERS)
def test_many_pieces(quantize, piece, monkeypatch):
    monkeypatch.setattr("chapter13.packing.PIECE", piece)
    quantized = quantize(matrix(120, 77))
    assert torch.equal(quantized.dequantize(), plainly(quantized))
    assert torch.equal(torch.cat(list(quantized.row_pieces())), plainly(quantized))


@pytest.mark.parametrize("quantize", QUANTIZERS.values(), ids=QUANTIZERS)
@pytest.mark.parametrize("shape", [(48, 64), (5, 7), (33, 577), (1, 1)])
@pytest.mark.parametrize("rows", [1, FEW, FEW + 1, 20])
@pytest.mark.parametrize("bias", [True, False])
def test_product(quantize, shape, rows, bias):
    quantized = quantize(matrix(*shape))
    bias = matrix(shape[0]) if bias else None
    layer = QuantizedLinear(quantized, bias)
    x = matrix(rows, shape[1])
    y = layer(x)
    weight = quantized.dequantize()
    exact = x.double() @ weight.double().T + (0 if bias is None else bias.double())
    # n products summed in float32 in any order: n + 1 roundings a term, one more with the bias.
    # The integer path leaves 2**-23 of the largest |x| of the row, and rounds 8 times instead.
    size = x.abs().double() @ weight.abs().double().T
    largest = x.abs().amax(1, keepdim=True).double() * weight.abs().double().sum(1)
    bound = (shape[1] + 2) * U * size + (2 * U + 8 * U) * largest
    if bias is not None:
        bound += U * (exact.abs() + bias.abs())
    assert y.dtype == torch.float32
    assert ((y - exact).abs() <= bound).all()


@pytest.mark.parametrize("shape", [(64,), (3, 64), (2, 3, 64), (1, 1, 1, 64)])
def test_leading_dimensions(shape):
    layer = QuantizedLinear(quantize_absmax(matrix(48, 64), 8, "channel"), matrix(48))
    x = matrix(*shape)
    y = layer(x)
    assert y.shape == (*shape[:-1], 48)
    one_by_one = torch.stack([layer(row) for row in x.reshape(-1, 64)])
    # both within the bound of the product from the same number
    assert (y.view(-1, 48) - one_by_one).abs().max() <= 2 * 80 * U * 64 * x.abs().max() * 5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("quantize", QUANTIZERS.values(), ids=QUANTIZERS)
@pytest.mark.parametrize("rows", [2, 30])
def test_half_precision(dtype, quantize, rows):
    weight, x = matrix(48, 64), matrix(rows, 64).to(dtype)
    layer = QuantizedLinear(quantize(weight), matrix(48))
    y = layer(x)
    assert y.dtype == dtype
    restored = layer.quantized.dequantize().double()
    exact = x.double() @ restored.T + layer.bias.double()
    # weight (or scale), result, bias and sum are rounded to dtype, and in the worst case each of
    # the 64 additions too, where a processor has no wider sum
    eps = torch.finfo(dtype).eps
    bound = (4 + 64) * eps / 2 * (x.double().abs() @ restored.T.abs() + layer.bias.abs())
    assert ((y.double() - exact).abs() <= bound).all()


@pytest.mark.parametrize("quantize", QUANTIZERS.values(), ids=QUANTIZERS)
def test_nasty_activations(quantize):
    layer = QuantizedLinear(quantize(matrix(48, 64)))
    assert not layer(torch.zeros(2, 64)).any()
    tiny = layer(torch.full((1, 64), 1e-41))
    assert tiny.abs().max() < 1e-36
    outlier = torch.zeros(1, 64)
    outlier[0, 5] = 1e20
    expected = 1e20 * layer.quantized.dequantize()[:, 5]
    # one product: a rounding for it, and those of the integer path
    assert ((layer(outlier)[0] - expected).abs() <= 16 * U * expected.abs().max()).all()
    for rows in (1, 30):
        for bad in (torch.nan, torch.inf, -torch.inf):
            x = matrix(rows, 64)
            x[0, 3] = bad
            y = layer(x)
            assert not y[0].isfinite().any()
            assert y[1:].isfinite().all()


@pytest.mark.skipif(not int8.has_fast_int8(), reason="needs AVX-512")
def test_int8_product_keeps_a_float_s_precision():
    quantized = quantize_absmax(matrix(48, 640), 8, "channel")
    x = matrix(3, 640) * torch.logspace(-20, 4, 640)
    exact = x.double() @ quantized.dequantize().double().T
    largest = x.abs().amax(1, keepdim=True).double() * quantized.dequantize().abs().sum(1)
    # 2**-23 of the largest |x|, as promised, and 8 roundings
    assert ((int8_product(x, quantized) - exact).abs() <= (2 + 8) * U * largest).all()


def test_paths_without_an_int8_kernel(monkeypatch):
    layer = QuantizedLinear(quantize_absmax(matrix(48, 64), 8, "channel"))
    x = matrix(1, 64)
    fast = layer(x)
    monkeypatch.setattr(int8, "has_fast_int8", lambda: False)
    largest = x.abs().max() * layer.quantized.dequantize().abs().sum(1)
    assert ((layer(x) - fast).abs() <= (64 + 2 + 10) * U * largest).all()


def test_as_conv1d():
    from transformers.pytorch_utils import Conv1D

    from chapter13.whole_model.layers import weight_of

    conv = Conv1D(48, 64)
    conv.bias.data = matrix(48)
    layer = QuantizedLinear(quantize_absmax(weight_of(conv), 8, "channel"), conv.bias)
    x = matrix(2, 9, 64)
    assert layer(x).shape == conv(x).shape
    # each weight is off by half a step of its row's scale at most, and float16 scales add nothing:
    # codes are computed with the scale as stored
    step = layer.quantized.scale.float().view(-1) / 2
    bound = x.abs().sum(-1, keepdim=True) * step * (1 + 1e-5) + 1e-4
    assert ((layer(x) - conv(x)).abs() <= bound).all()


@pytest.mark.parametrize("quantize", QUANTIZERS.values(), ids=QUANTIZERS)
def test_described_and_assembled(quantize):
    quantized = quantize(matrix(9, 77))
    again = QuantizedTensor.from_parts(quantized.plan, quantized.parts)
    assert torch.equal(again.dequantize(), quantized.dequantize())
    held = sum(each.nbytes for each in quantized.parts.values())
    assert again.nbytes == quantized.nbytes == held
    assert again.kind == quantized.kind
    assert (again.bits, again.shape, again.group_size) == (
        quantized.bits,
        quantized.shape,
        quantized.group_size,
    )


@pytest.mark.parametrize("quantize", QUANTIZERS.values(), ids=QUANTIZERS)
def test_casts_and_copies_keep_every_bit(quantize):
    layer = QuantizedLinear(quantize(matrix(48, 64)), matrix(48))
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    for changed in (layer.bfloat16(), layer.half(), layer.double(), copy.deepcopy(layer)):
        after = changed.state_dict()
        assert list(after) == list(before)
        for name, tensor in before.items():
            assert after[name].dtype == tensor.dtype
            assert torch.equal(after[name], tensor)
    other = QuantizedLinear(quantize(-matrix(48, 64)), matrix(48))
    other.load_state_dict(before)
    x = matrix(3, 64)
    assert torch.equal(other(x), layer(x))


@pytest.mark.slow
def test_the_model_never_lies_in_memory_as_a_whole():
    """Whatever forward dequantizes is gone before the next layer does."""
    import gc

    stack = nn.Sequential(*(QuantizedLinear(quantize_codebook(matrix(300, 300))) for _ in range(4)))
    held = []

    def count(*_):
        gc.collect()
        floats = (
            t for t in gc.get_objects() if type(t) is torch.Tensor and t.dtype == torch.float32
        )
        held.append(sum(t.numel() >= 300 * 300 for t in floats))

    for layer in stack:
        layer.register_forward_hook(count)
    for rows in (1, 10):
        stack(matrix(rows, 300))
    assert held == [held[0]] * 8


def test_wrong_parts():
    with pytest.raises(TypeError, match=says("QuantizedTensor", "Tensor")):
        QuantizedLinear(matrix(3, 3))
    with pytest.raises(ValueError, match=says("matrix", "(9,)")):
        QuantizedLinear(quantize_absmax(matrix(9)))
    with pytest.raises(ValueError, match=says(3, "(4,)")):
        QuantizedLinear(quantize_absmax(matrix(3, 3)), matrix(4))
    with pytest.raises(ValueError, match=says("(..., 3)", "(2, 4)")):
        QuantizedLinear(quantize_absmax(matrix(3, 3)))(matrix(2, 4))
