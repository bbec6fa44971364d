"""LLM.int8() against bitsandbytes; SmoothQuant leaves a model's function as it was."""

import logging

import pytest
import torch
from tiny import TOKENS, generator, says, tiny_gpt2, tiny_llama
from torch import nn

from chapter13.outliers import (
    MixedLinear,
    quantize_llm_int8,
    quantize_rows,
    smooth,
    smoothing,
    split_outliers,
)
from chapter13.static import calibrate


def with_outliers(rows, features):
    x = torch.randn(rows, features, generator=generator())
    x[:, 3] *= 20
    x[rows // 2, features // 2] = -6.0
    return x


ACTIVATIONS = {
    "outliers": with_outliers(9, 64),
    "one token": with_outliers(1, 64),
    "none": torch.randn(9, 64, generator=generator()).clamp(-5, 5),
    "all": torch.full((3, 64), 7.0),
    "zeros": torch.zeros(3, 64),
    "small": torch.randn(5, 64, generator=generator()) * 1e-6,
}


@pytest.fixture(scope="module")
def bitsandbytes():
    for name in ("bitsandbytes.backends.cpu.ops", "bitsandbytes.autograd._functions"):
        logging.getLogger(name).setLevel(logging.ERROR)
    return pytest.importorskip("bitsandbytes")


@pytest.mark.parametrize("x", ACTIVATIONS.values(), ids=ACTIVATIONS)
def test_activation_codes_are_those_of_bitsandbytes(bitsandbytes, x):
    half = x.half()
    theirs, stats, columns = bitsandbytes.functional.int8_vectorwise_quant(half.clone(), 6.0)
    ours, absmax, ours_columns = split_outliers(half, 6.0)
    assert ours_columns.tolist() == columns.tolist()
    assert torch.equal(absmax, stats)
    live = stats > 0  # 0 * (127 / 0) is NaN, whose int8 code depends on the machine
    assert torch.equal(ours[live], theirs[live])
    assert not ours[~live].any()


@pytest.mark.parametrize("x", ACTIVATIONS.values(), ids=ACTIVATIONS)
@pytest.mark.parametrize("bias", [True, False])
def test_layer_as_bitsandbytes(bitsandbytes, x, bias):
    torch.manual_seed(13)
    linear = nn.Linear(64, 48, bias=bias)
    theirs = bitsandbytes.nn.Linear8bitLt(64, 48, bias=bias, has_fp16_weights=False, threshold=6.0)
    theirs.load_state_dict(linear.state_dict())
    theirs = theirs.to("cpu").eval()
    ours = MixedLinear(linear.weight, linear.bias)
    live = x.abs().amax(1) > 0
    if not live.any():
        assert torch.equal(ours(x), (linear.bias if bias else torch.zeros(48)).expand(3, 48))
        return
    expected = theirs(x)
    assert torch.equal(
        ours.codes, theirs.weight.data if theirs.state.CB is None else theirs.state.CB
    )
    scb = theirs.weight.SCB if theirs.state.SCB is None else theirs.state.SCB
    assert torch.equal(ours.absmax, scb)
    # Both add the same integer product, scaled, and the outlier columns in float32. Roundings:
    # 6 of the product, one of each outlier's term and of each of their sums (64 at most). And
    # bitsandbytes writes 1 / 127**2 as 6.200124e-05, which is 1.8e-5 too much.
    weight = ours.codes.float().abs() * (ours.absmax / 127)[:, None]
    largest = x.abs() @ weight.T + (0 if linear.bias is None else linear.bias.abs())
    bound = (abs(6.200124e-05 * 127**2 - 1) + 2 * (64 + 8) * 2**-24) * largest
    assert ((ours(x) - expected).abs() <= bound).all()


def test_rows_of_zeros():
    codes, absmax = quantize_rows(torch.tensor([[0.0, 0.0], [1.0, -0.5]]).half())
    assert codes.tolist() == [[0, 0], [127, -64]]
    assert absmax.tolist() == [0.0, 1.0]


def test_outliers_are_multiplied_in_floating_point():
    """The layer's error does not grow with them, as that of one scale a token does."""
    weight = torch.randn(48, 64, generator=generator())
    layer = MixedLinear(weight)

    def error(strength):
        x = torch.randn(9, 64, generator=generator()).clamp(-3, 3)
        x[:, 5] = strength
        # 2048 is exact in float16; the column's own weight is rounded to int8 all the same
        exact = x @ weight.T
        column = strength * (weight[:, 5] - layer.codes[:, 5] * layer.absmax / 127)
        return (layer(x) - exact + column).norm()

    assert error(2048.0) < 1.05 * error(8.0)


def test_whole_model_and_errors():
    model, reference = tiny_llama(), tiny_llama()
    quantize_llm_int8(model, progress=False)
    assert isinstance(model.model.layers[0].mlp.up_proj, MixedLinear)
    with torch.no_grad():
        error = (model(TOKENS).logits - reference(TOKENS).logits).norm()
        assert 0 < error < 0.1 * reference(TOKENS).logits.norm()
    with pytest.raises(ValueError, match=says("threshold", "positive", 0)):
        MixedLinear(torch.ones(2, 2), None, 0)
    with pytest.raises(ValueError, match=says("1e+06", "float16", 65504)):
        MixedLinear(torch.tensor([[1e6, 1.0]]))
    with pytest.raises(ValueError, match=says("1 NaN", "Inf")):
        MixedLinear(torch.tensor([[torch.nan, 1.0]]))
    with pytest.raises(ValueError, match=says("(..., 2)", "(3, 4)")):
        MixedLinear(torch.ones(2, 2))(torch.ones(3, 4))


def test_smoothing_is_the_paper_s_formula():
    absmax = torch.tensor([100.0, 1.0, 0.25, 0.0])
    weights = [torch.tensor([[1.0, -4.0, 0.0, 1.0]]), torch.tensor([[0.5, 1.0, 0.25, 1.0]])]
    # sqrt(100 / 1), sqrt(1 / 4), sqrt(.25 / .25), sqrt(1e-5 / 1)
    expected = torch.tensor([10.0, 0.5, 1.0, 1e-5**0.5])
    # a power, a power and a quotient: a few float32 roundings
    assert torch.allclose(smoothing(absmax, weights), expected, rtol=8 * 2**-24, atol=0)
    assert torch.allclose(smoothing(absmax, weights, 1.0)[:3], absmax[:3], rtol=8 * 2**-24, atol=0)
    for alpha in (-0.1, 1.1):
        with pytest.raises(ValueError, match=says("alpha", 0, 1)):
            smoothing(absmax, weights, alpha)


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_smooth_leaves_the_function(make, alpha):
    model, reference = make().double(), make().double()
    calibration = calibrate(model, TOKENS, progress=False)
    before = [parameter.clone() for parameter in model.parameters()]
    assert smooth(model, calibration, alpha) is model
    changed = sum(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert changed == {tiny_llama: 2 * (2 + 5), tiny_gpt2: 2 * (4 + 2)}[make]
    with torch.no_grad():
        error = (model(TOKENS).logits - reference(TOKENS).logits).abs().max()
    # the same function in exact numbers; in float64 two roundings a weight, 2**-53 each, pass
    # through some thirty operations of two blocks: a thousandfold margin is still 1e-10
    assert error < 1e-10


def test_smooth_moves_outliers():
    model = tiny_llama()
    with torch.no_grad():
        model.model.layers[0].input_layernorm.weight[7] = 60.0
        model.model.layers[0].self_attn.q_proj.weight[:, 7] *= 0.01
    before = calibrate(model, TOKENS, progress=False)["model.layers.0.self_attn.q_proj"]
    smooth(model, {**calibrate(model, TOKENS, progress=False)})
    after = calibrate(model, TOKENS, progress=False)["model.layers.0.self_attn.q_proj"]

    def spread(statistics):
        return (statistics.channel_absmax.max() / statistics.channel_absmax.median()).item()

    assert spread(before) > 20
    assert spread(after) < spread(before) / 2


def test_smooth_of_an_unknown_architecture():
    model = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8))
    with pytest.raises(ValueError, match=says("Sequential", "LlamaDecoderLayer")):
        smooth(model, {})
    model = tiny_llama()
    calibration = calibrate(model, TOKENS, progress=False)
    del calibration["model.layers.1.mlp.gate_proj"]
    before = [parameter.clone() for parameter in model.parameters()]
    with pytest.raises(ValueError, match=says("model.layers.1.mlp.gate_proj")):
        smooth(model, calibration)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
