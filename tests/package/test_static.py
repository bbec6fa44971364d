"""Calibration and static INT8, against direct computation and torchao."""

import logging

import pytest
import torch
from tiny import TOKENS, generator, says, tiny_llama
from torch import nn

from chapter13.dynamic import quantize_per_token
from chapter13.static import (
    BINS,
    StaticInt8Linear,
    Statistics,
    calibrate,
    quantize_static,
)


def seen(*batches):
    statistics = Statistics.empty(batches[0].shape[-1])
    for batch in batches:
        statistics.add(batch)
    return statistics


def test_batches_add_up_whatever_their_order_and_range():
    batches = [torch.randn(50, 8, generator=generator()) * scale for scale in (0.01, 30, 1, 0)]
    one, other = seen(*batches), seen(*batches[::-1])
    assert one.absmax == other.absmax == torch.cat(batches).abs().max()
    assert torch.equal(one.channel_absmax, torch.cat(batches).abs().amax(0))
    assert one.top == other.top == 128.0
    assert one.counts.sum() == 4 * 50 * 8
    # bins that were merged hold what the wide bins would have: only edges may fall to either side
    exact = torch.histc(torch.cat(batches).abs(), BINS, 0, 128.0).long()
    assert (one.counts.cumsum(0) - exact.cumsum(0)).abs().max() <= 1
    assert torch.equal(other.counts, exact)


def test_minmax_is_the_largest_magnitude():
    x = torch.randn(40, 8, generator=generator())
    assert seen(x[:9], x[9:]).clip() == x.abs().max()


@pytest.mark.parametrize("percentile", [0.1, 50, 99, 99.9, 100])
def test_percentile_is_right_to_a_bin(percentile):
    x = torch.randn(5000, 8, generator=generator()) ** 3
    statistics = seen(x)
    clip = statistics.clip("percentile", percentile)
    width = statistics.top / BINS
    below = (x.abs() <= clip).double().mean()
    assert below >= percentile / 100 - 1e-12
    assert (x.abs() <= clip - width).double().mean() < percentile / 100


def test_mse_is_the_best_candidate_on_the_numbers_themselves():
    x = torch.randn(20000, 4, generator=generator()).double().abs() ** 3
    statistics = seen(x)

    def error(clip):
        """Root of the squared error, of the numbers and not of the histogram."""
        scale = clip / 127.5
        return ((x / scale).round().clamp(max=127) * scale - x).norm().item()

    best = min(error(statistics.top * k / 128) for k in range(1, 129))
    # The histogram knows a number to half a bin. The distance to the nearest level changes by no
    # more than the number itself, so the root of the summed squares is off by blur at most: once
    # for the candidate that was chosen, once for the one that is best.
    blur = statistics.top / BINS / 2 * x.numel() ** 0.5
    chosen = error(statistics.clip("mse"))
    assert chosen <= best + 2 * blur
    assert chosen < error(statistics.absmax)


NORMAL = torch.randn(64, 256, generator=generator())
INPUTS = {
    "normal": NORMAL,
    "long tails": NORMAL**3,
    "longer tails": NORMAL**5,
    "an outlier channel": torch.where(torch.arange(256) == 7, 40 * NORMAL, NORMAL),
    "a massive token": torch.cat([1000 * NORMAL[:1], NORMAL[1:]]),
    "one-sided": NORMAL.relu(),
    "shifted": NORMAL + 3,
    "tiny": NORMAL * 1e-9,
    "zeros": torch.zeros(64, 256),
}


def observed(make, *batches, **options):
    """The scale of an observer of torch.ao, symmetric and of 8 bits, after these batches."""
    observer = make(dtype=torch.qint8, **options)
    for batch in batches:
        observer(batch)
    scale, zero_point = observer.calculate_qparams()
    assert not zero_point.any()
    return scale


@pytest.mark.parametrize("name", INPUTS)
def test_minmax_as_torch_ao(name):
    from torch.ao.quantization.observer import MinMaxObserver

    batches = INPUTS[name].split(16)
    theirs = observed(MinMaxObserver, *batches, qscheme=torch.per_tensor_symmetric)
    clip = seen(*batches).clip() or 1e-30  # zeros: both take the smallest scale
    assert StaticInt8Linear(torch.ones(1, 256), None, clip).activation_scale == theirs


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor, torch.quantize_per_channel")
def test_weights_as_torch_ao():
    from torch.ao.quantization.observer import PerChannelMinMaxObserver

    weight = torch.stack([rows[0] for rows in INPUTS.values()])
    theirs = observed(PerChannelMinMaxObserver, weight, qscheme=torch.per_channel_symmetric)
    codes, scale = quantize_per_token(weight)
    assert torch.equal(scale.view(-1), theirs)
    zero_points = torch.zeros(len(weight))
    quantized = torch.quantize_per_channel(weight, theirs, zero_points, 0, torch.qint8)
    assert torch.equal(quantized.int_repr(), codes)


@pytest.mark.parametrize("name", [n for n in INPUTS if n not in ("tiny", "zeros")])
def test_mse_loses_no_more_than_torch_ao_histogram_observer(name):
    """Not the same end of the grid, but on these inputs never a worse one."""
    from torch.ao.quantization.observer import HistogramObserver

    inputs = INPUTS[name]
    theirs = observed(HistogramObserver, *inputs.split(16), qscheme=torch.per_tensor_symmetric)

    def error(scale):
        restored = (inputs.double() / scale).round().clamp(-128, 127) * scale
        return (restored - inputs).norm()

    statistics = seen(*inputs.split(16))
    assert error(statistics.clip("mse") / 127.5) <= error(theirs.item())
    assert statistics.clip("mse") < statistics.absmax


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("median",), says("observer", "minmax", "percentile", "mse", "'median'")),
        (("percentile", 0), says("percentile", 0, 100)),
        (("percentile", 101), says("percentile", 0, 100, 101)),
    ],
)
def test_wrong_observers(arguments, message):
    with pytest.raises(ValueError, match=message):
        seen(torch.ones(3, 3)).clip(*arguments)


def test_nothing_seen_or_not_finite():
    with pytest.raises(ValueError, match=says("no inputs", "calibrate")):
        Statistics.empty(4).clip()
    with pytest.raises(ValueError, match=says("1 NaN", "Inf")):
        seen(torch.tensor([[1.0, torch.inf]]))
    assert seen(torch.zeros(3, 3)).clip("mse") == 0


def test_calibration_sees_what_the_layers_see_and_changes_nothing():
    model = tiny_llama().train()
    inputs = []
    layer = model.model.layers[1].mlp.down_proj
    statistics = calibrate(model, TOKENS, batch_size=4, progress=False)
    assert model.training
    assert not layer._forward_pre_hooks
    layer.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    with torch.no_grad():
        model.eval()(TOKENS[:4])
        model(TOKENS[4:])
    everything = torch.cat([x.reshape(-1, 96) for x in inputs])
    own = statistics["model.layers.1.mlp.down_proj"]
    assert torch.equal(own.channel_absmax, everything.abs().amax(0))
    assert own.counts.sum() == everything.numel()
    assert "lm_head" not in statistics
    assert len(statistics) == 14


def test_hooks_go_when_calibration_fails():
    model = tiny_llama()
    with pytest.raises(IndexError):
        calibrate(model, torch.full((1, 3), 1000), progress=False)
    assert not any(module._forward_pre_hooks for module in model.modules())
    with pytest.raises(ValueError, match=says("nn.Linear")):
        calibrate(nn.ReLU(), TOKENS, progress=False)


def test_codes_and_output_as_torchao():
    logging.getLogger("torch.utils._pytree").setLevel(logging.ERROR)
    from torchao.quantization import Int8StaticActivationInt8WeightConfig, PerRow, quantize_
    from torchao.quantization.granularity import PerTensor

    linear = nn.Linear(64, 48)
    x = torch.randn(20, 64, generator=generator())
    clip = x.abs().max().item() * 0.8  # so that some are clipped
    ours = StaticInt8Linear(linear.weight, linear.bias, clip)
    model = nn.Sequential(linear)
    config = Int8StaticActivationInt8WeightConfig(
        act_quant_scale=ours.activation_scale.view(1, 1), granularity=[PerTensor(), PerRow()]
    )
    quantize_(model, config)
    assert torch.equal(ours.codes, model[0].weight.qdata)
    assert torch.equal(ours.scale.view(-1), model[0].weight.scale.view(-1))
    expected = model(x)
    # both are float(integer) * scale * scale + bias with 4 roundings each, 2**-24 relative
    bound = 8 * 2**-24 * (expected.abs() + 2 * linear.bias.abs())
    assert ((ours(x) - expected).abs() <= bound).all()


def test_whole_model():
    model, reference = tiny_llama(), tiny_llama()
    calibration = calibrate(model, TOKENS, progress=False)
    quantize_static(model, calibration, "percentile", 99.0, progress=False)
    layer = model.model.layers[0].self_attn.q_proj
    expected = calibration["model.layers.0.self_attn.q_proj"].clip("percentile", 99.0)
    assert layer.activation_scale == torch.tensor(expected / 127.5)
    with torch.no_grad():
        error = (model(TOKENS).logits - reference(TOKENS).logits).norm()
        assert 0 < error < 0.2 * reference(TOKENS).logits.norm()
    with pytest.raises(ValueError, match=says("quantized")):
        quantize_static(model, calibration, progress=False)


def test_a_layer_that_was_not_calibrated():
    model = tiny_llama()
    calibration = calibrate(model, TOKENS, progress=False)
    del calibration["model.layers.1.mlp.up_proj"]
    before = list(model.modules())
    with pytest.raises(ValueError, match=says(1, "calibrated", "model.layers.1.mlp.up_proj")):
        quantize_static(model, calibration, progress=False)
    assert list(model.modules()) == before
    for clip in (0.0, float("inf"), float("nan")):
        with pytest.raises(ValueError, match=says("clip", "positive", "finite")):
            StaticInt8Linear(torch.ones(2, 2), None, clip)
