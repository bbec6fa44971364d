"""The numbers that notebook 01's explorer shows are the package's own, on its whole grid."""

import re

import numpy as np
import pytest
import torch
from tiny import normal

from chapter13.explorers.absmax import IN_HISTOGRAM, explore_absmax, prepare, view
from chapter13.integer import quantize_absmax
from chapter13.measures import max_abs_error, mse

OUTLIERS = [2 ** (step / 4) for step in range(41)]  # every position of the slider


WEIGHTS = {
    "normal": normal(48, 64) * 0.02,
    "heavy tails": 0.02 * normal(48, 64) ** 3,
    "largest is negative": torch.cat([normal(99), torch.tensor([-9.0])]),
    "the largest twice": torch.tensor([1.0, -0.3, 1.0, 0.2, -1.0]),
    "ties": torch.arange(-127, 128) / 2,
    "all alike": torch.full((30,), 0.7),
    "one weight": torch.tensor([0.3]),
    "zeros": torch.zeros(4, 4),
    "bfloat16": normal(40, 30).bfloat16(),
    "not contiguous": normal(40, 30).T,
}


@pytest.fixture(params=WEIGHTS)
def original(request):
    return WEIGHTS[request.param]


def with_outlier(weight, times):
    """The weight as the explorer's reader thinks of it, and where its outlier is."""
    changed = weight.float().flatten().clone()
    position = int(changed.abs().argmax())
    changed[position] = changed[position].item() * times
    return changed, position


def noise_bound(weight, noise):
    """How far two sums of squared errors may be apart.

    The package rounds each difference to float32: 2**-24 relative, twice that when squared. The
    explorer takes the sum of squares, level times sums of weights and level squared times counts
    apart: running float64 sums, each off by at most n * 2**-53 of what was added up.
    """
    weight = weight.double()
    added = weight.abs().sum() * weight.abs().max() * 4 + (weight**2).sum()
    return noise * 2.0**-22 + weight.numel() * 2.0**-53 * added.item() * 4


@pytest.mark.parametrize("bits", range(2, 9))
def test_numbers_are_the_packages_own(original, bits):
    layer = prepare(original)
    for times in OUTLIERS if original is WEIGHTS["normal"] else OUTLIERS[::5]:
        weight, position = with_outlier(original, times)
        quantized = quantize_absmax(weight, bits)
        shown = view(layer, bits, times)

        codes, counts = np.unique(quantized.codes().numpy(), return_counts=True)
        scale = quantized.scale.item()
        assert shown.scale == scale
        if scale:
            expected = (torch.from_numpy(codes.astype(np.float32)) * scale).numpy()
            assert np.array_equal(shown.levels, expected)
        assert np.array_equal(shown.level_counts, counts)
        assert shown.nbytes == quantized.nbytes
        zeros = (quantized.codes() == 0).sum().item() / weight.numel()
        assert 0 <= zeros - shown.zeros < 0.001
        assert (shown.zeros == 1) == (zeros == 1)

        approximation = quantized.dequantize()
        assert shown.max_error == max_abs_error(weight, approximation)
        noise = mse(weight, approximation) * weight.numel()
        bound = noise_bound(weight, noise)
        assert abs(shown.mse * weight.numel() - noise) <= bound

        weight[position] = approximation[position] = 0
        noise = mse(weight, approximation) * weight.numel()
        shown_noise = layer.energy * 10 ** (-shown.sqnr / 10)
        assert abs(shown_noise - noise) <= bound


@pytest.mark.parametrize("bits", range(2, 9))
def test_histograms_are_of_the_weights_and_of_their_errors(original, bits):
    layer = prepare(original)
    assert original.numel() <= IN_HISTOGRAM, "all weights are drawn"
    bins = len(layer.edges) - 1
    for times in (1, 10, 1000):
        weight, position = with_outlier(original, times)
        errors = weight - quantize_absmax(weight, bits).dequantize()
        shown = view(layer, bits, times)
        expected, _ = np.histogram(errors.numpy(), bins, (-layer.limit, layer.limit))
        assert np.array_equal(shown.error_counts, expected)
        inside = (original.float().abs() <= layer.limit).sum().item()
        assert shown.weight_counts.sum() == inside


def test_readout_says_the_numbers():
    layer = prepare(WEIGHTS["normal"])
    shown = view(layer, 4, 10)
    numbers = dict(re.split(r"  +", line) for line in shown.readout.splitlines())
    assert numbers == {
        "largest weight": f"{float(f'{shown.largest:.3g}'):,g}",
        "scale, the step of the grid": f"{shown.scale:.3g}",
        "levels in use": f"{len(shown.levels)} of 15",
        "weights that become 0": f"{shown.zeros:.1%}",
        "mean squared error": f"{shown.mse:.2e}",
        "largest error": f"{shown.max_error:.2e}",
        "SQNR of all other weights": f"{shown.sqnr:.1f} dB",
        "memory": f"{shown.nbytes:,} bytes, {8 * shown.nbytes / (48 * 64):.2f} bits per weight",
    }


def test_one_outlier_takes_the_levels_from_all_others():
    """What the explorer is there to show."""
    layer = prepare(WEIGHTS["normal"])
    alone, stretched = view(layer, 8, 1), view(layer, 8, 100)
    assert len(alone.levels) > 150
    assert len(stretched.levels) <= 4
    assert stretched.zeros > 0.8
    assert stretched.sqnr < 2 < 30 < alone.sqnr


def test_a_large_layer_is_drawn_by_a_part_but_counted_whole():
    weight = normal(300, 400)
    shown = view(prepare(weight), 6, 3)
    assert shown.level_counts.sum() == weight.numel()
    assert IN_HISTOGRAM / 2 < shown.error_counts.sum() <= IN_HISTOGRAM + 1


def test_real_layer(weights):
    name = "model.layers.0.mlp.down_proj.weight"
    panel = explore_absmax()
    assert list(panel.controls["layer"].options) == list(weights)
    panel.set(layer=name, bits=5)
    quantized = quantize_absmax(weights[name], 5)
    assert f"{mse(weights[name], quantized.dequantize()):.2e}" in panel.readout
    assert f"{quantized.nbytes:,} bytes" in panel.readout
    panel.close()


def test_weights_that_cannot_be_quantized():
    broken = torch.tensor([1.0, float("nan")])
    with pytest.raises(ValueError, match="1 NaN or Inf"):
        explore_absmax(broken)
    with pytest.raises(TypeError, match="floating"):
        explore_absmax(torch.ones(3, dtype=torch.int32))
    panel = explore_absmax({"whole": normal(10), "broken": broken})
    assert "1 NaN or Inf" in panel.set(layer="broken")
    panel.close()


def test_a_scale_that_float16_cannot_hold_is_explained():
    panel = explore_absmax(torch.tensor([70_000.0, 1.0]))
    assert "float32" in panel.set(bits=2)
    panel.close()
