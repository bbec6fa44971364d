"""INT8 activations on the fly, against torch.ao and torchao: codes and scales equal."""

import logging

import pytest
import torch
from tiny import generator, says
from torch import nn

from chapter13.dynamic import (
    Int8Linear,
    affine_parameters,
    quantize_affine_7bit,
    quantize_dynamic,
    quantize_per_tensor,
    quantize_per_token,
    quantize_weight_per_tensor,
)
from chapter13.whole_model import int8
from chapter13.whole_model.int8 import int8_matmul

# the way of section 4 is deprecated, and is the one to be compared with
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*torch.ao.quantization is deprecated.*"),
    pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor, torch.quantize_per_channel"),
]
x86 = pytest.mark.skipif(
    torch.backends.quantized.engine not in ("x86", "fbgemm", "onednn"),
    reason="torch.ao reduces the range of activations on x86 alone",
)
EPS = torch.finfo(torch.float32).eps


def spread(*shape):
    return torch.randn(shape, generator=generator())


ACTIVATIONS = {
    "normal": spread(9, 64),
    "positive": spread(9, 64).abs() + 1,
    "negative": -spread(9, 64).abs(),
    "one outlier": torch.cat([spread(8, 64), 500 * torch.ones(1, 64)]),
    "constant": torch.full((3, 64), -0.7),
    "zeros": torch.zeros(4, 64),
    "small": spread(5, 64) * 1e-4,
    "smaller": spread(5, 64) * 1e-6,
    "subnormal": spread(5, 64) * 1e-41,
    "large": spread(5, 64) * 1e30,
    "one token": spread(1, 64),
}


@pytest.fixture(scope="module")
def chapter_model():
    torch.manual_seed(13)
    widths = (512, 2048, 2048, 512)
    layers = []
    for inputs, outputs in zip(widths[:-1], widths[1:], strict=True):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers[:-1]).eval()


def torch_ao(model):
    return torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)


def torchao(linear):
    logging.getLogger("torch.utils._pytree").setLevel(logging.ERROR)
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    model = nn.Sequential(nn.Linear(linear.in_features, linear.out_features))
    model.load_state_dict({"0.weight": linear.weight.detach(), "0.bias": linear.bias.detach()})
    quantize_(model, Int8DynamicActivationInt8WeightConfig())
    return model[0]


def output_bound(layer, x, y):
    """What float32 may add to an integer product: three roundings of it and one of the bias.

    y = float(product) * scale * scale + bias, and the library may take another order or a fused
    step: 8 roundings of 2**-24 each, relative to the largest terms, cover both sides.
    """
    size = y.abs().max() + (0 if layer.bias is None else layer.bias.abs().max())
    return 8 * 2**-24 * (size + zero_point_share(layer, x))


def zero_point_share(layer, x):
    """Half of the sum may come from the zero point and go again: largest |x| times sum |w|."""
    weight = layer.codes.float() * layer.scale.view(-1, 1)
    return x.abs().max() * weight.abs().sum(1).max()


@pytest.mark.parametrize("x", ACTIVATIONS.values(), ids=ACTIVATIONS)
def test_activation_parameters_are_those_of_torch_ao(x):
    scale, zero_point = torch._choose_qparams_per_tensor(x, True)
    assert affine_parameters(min(x.min().item(), 0), max(x.max().item(), 0)) == (scale, zero_point)
    codes, ours, ours_zero = quantize_per_tensor(x)
    assert (ours, ours_zero) == (scale, zero_point)
    theirs = torch.quantize_per_tensor(x, scale, zero_point, torch.quint8).int_repr()
    assert torch.equal(codes, theirs.clamp(max=127).to(torch.int8))


def test_activation_parameters_over_all_magnitudes():
    draw = generator()
    for k in range(3000):
        magnitude = 10.0 ** torch.empty(1).uniform_(-44, 34, generator=draw).item()
        x = torch.randn(17, generator=draw) * magnitude
        x = (x, x.abs(), -x.abs())[k % 3]
        expected = torch._choose_qparams_per_tensor(x, True)
        assert affine_parameters(min(x.min().item(), 0), max(x.max().item(), 0)) == expected


@x86
@pytest.mark.parametrize("scale", [1.0, 1e-3, 1e3, 1e-30])
def test_weights_are_those_of_torch_ao(scale):
    for weight in (spread(48, 64), spread(7, 33), -spread(5, 8).abs()):
        linear = nn.Linear(*weight.T.shape)
        linear.weight.data = weight * scale
        theirs = torch_ao(nn.Sequential(linear))[0].weight()
        codes, ours = quantize_weight_per_tensor(linear.weight)
        assert ours.item() == theirs.q_scale()
        assert theirs.q_zero_point() == 0
        assert torch.equal(codes, theirs.int_repr())


@x86
def test_chapter_model_as_torch_ao(chapter_model):
    theirs = torch_ao(chapter_model)
    x = spread(8, 512)
    for layer, reference in zip(chapter_model, theirs, strict=True):
        if isinstance(layer, nn.Linear):
            ours = Int8Linear(layer.weight, layer.bias)
            assert torch.equal(ours.codes, reference.weight().int_repr())
            assert ours.scale.item() == reference.weight().q_scale()
            for inputs in (x, x[:1]):
                expected = reference(inputs)
                bound = output_bound(ours, inputs, expected)
                assert (ours(inputs) - expected).abs().max() <= bound
        x = reference(x)


@pytest.mark.parametrize("x", ACTIVATIONS.values(), ids=ACTIVATIONS)
def test_tokens_as_torchao(x):
    from torchao.quantization import Int8Tensor, PerRow

    codes, scale = quantize_per_token(x)
    theirs = Int8Tensor.from_hp(x, PerRow())
    assert torch.equal(scale, theirs.scale)
    assert torch.equal(codes, theirs.qdata)


def test_chapter_model_as_torchao(chapter_model):
    x = spread(8, 512)
    for layer in chapter_model:
        if isinstance(layer, nn.Linear):
            ours, theirs = Int8Linear(layer.weight, layer.bias, "per_token"), torchao(layer)
            assert torch.equal(ours.codes, theirs.weight.qdata)
            assert torch.equal(ours.scale.view(-1), theirs.weight.scale.view(-1))
            expected = theirs(x)
            assert (ours(x) - expected).abs().max() <= output_bound(ours, x, expected)
        x = layer(x)


def test_real_layers(weights):
    for name in list(weights)[:7]:
        weight = weights[name]
        linear = nn.Linear(*weight.T.shape)
        linear.weight.data = weight.clone()
        theirs = torchao(linear)
        assert torch.equal(Int8Linear(weight, None, "per_token").codes, theirs.weight.qdata)
        reference = torch_ao(nn.Sequential(linear))[0]
        assert torch.equal(Int8Linear(weight).codes, reference.weight().int_repr())


@pytest.mark.parametrize("fast", [True, False])
def test_integer_product_is_exact(fast, monkeypatch):
    if not fast:  # the way of processors without AVX-512
        monkeypatch.setattr(int8, "has_fast_int8", lambda: False)
    extreme = torch.full((2, 3000), -128, dtype=torch.int8)
    assert int8_matmul(extreme, extreme).tolist() == [[3000 * 128 * 128] * 2] * 2
    a = torch.randint(-128, 128, (5, 300), generator=generator()).to(torch.int8)
    b = torch.randint(-128, 128, (11, 300), generator=generator()).to(torch.int8)
    assert torch.equal(int8_matmul(a, b), (a.long() @ b.long().T).int())
    assert torch.equal(
        int8_matmul(a[:1, :7], b[:, :7]), (a[:1, :7].long() @ b[:, :7].long().T).int()
    )


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("rows", [1, 16, 37])
def test_the_integer_product_is_exact_on_a_gpu(rows):
    """CUDA's kernel wants more than 16 rows and multiples of 8, and gets them by padding."""
    a, b = (
        torch.randint(-128, 128, (count, 1003), generator=generator()).to(torch.int8)
        for count in (rows, 51)
    )
    assert torch.equal(int8_matmul(a.cuda(), b.cuda()).cpu(), (a.long() @ b.long().T).int())


@pytest.mark.parametrize("granularity", ["per_tensor", "per_token"])
@pytest.mark.parametrize("shape", [(64,), (3, 64), (2, 5, 64)])
def test_output_is_what_codes_stand_for(granularity, shape):
    layer = Int8Linear(spread(48, 64), spread(48), granularity)
    x = spread(*shape)
    flat = x.view(-1, 64)
    if granularity == "per_tensor":
        codes, scale, zero_point = quantize_per_tensor(flat)
    else:
        codes, scale = quantize_per_token(flat)
        zero_point = 0
    restored = (codes.double() - zero_point) * scale
    weight = layer.codes.double() * layer.scale.double().view(-1, 1)
    expected = (restored @ weight.T + layer.bias).view(*shape[:-1], 48)
    y = layer(x)
    assert y.shape == expected.shape
    assert (y - expected).abs().max() <= output_bound(layer, x, y)
    assert layer(x.bfloat16()).dtype == torch.bfloat16


def test_values_beyond_the_range_are_clipped():
    codes = quantize_affine_7bit(torch.tensor([-100.0, 0.0, 100.0]), 0.1, 60)
    assert codes.tolist() == [0, 60, 127]


def test_activations_that_are_not_finite_or_too_wide():
    for bad in (torch.nan, torch.inf):
        with pytest.raises(ValueError, match=says("NaN", "Inf")):
            quantize_per_tensor(torch.tensor([[1.0, bad]]))
    with pytest.raises(ValueError, match=says("(..., 64)", "(2, 3)")):
        Int8Linear(spread(4, 64))(torch.ones(2, 3))
    with pytest.raises(ValueError, match=says("(out_features, in_features)", "(64,)")):
        Int8Linear(spread(64))


def test_whole_model_and_its_errors(chapter_model):
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
    quantize_dynamic(model, "per_token", progress=False)
    assert [type(layer) for layer in model] == [Int8Linear, nn.ReLU, Int8Linear]
    with pytest.raises(ValueError, match=says("quantized")):
        quantize_dynamic(model, progress=False)
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4))
    model[1].weight.data[0, 0] = torch.nan
    before = list(model)
    with pytest.raises(ValueError, match=says("1 NaN", "Inf")):
        quantize_dynamic(model, progress=False)
    assert list(model) == before
    with pytest.raises(ValueError, match=says("per_tensor", "per_token", "'rows'")):
        quantize_dynamic(model, "rows", progress=False)
