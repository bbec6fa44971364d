"""Notebook 03's explorer: each number it shows against the package's own, over all its settings."""

import itertools
import math

import pytest
import torch

from chapter13.codebook import quantize_codebook
from chapter13.explorers.codebooks import (
    BINS,
    GROUP_SIZES,
    distributions,
    explore_codebooks,
    student_t,
    view,
)
from chapter13.explorers.layers import METHOD_LABELS, MOST, sample_rows, take
from chapter13.integer import quantize_absmax, quantize_affine
from chapter13.measures import relative_rmse

ROWS, COLUMNS = 24, 576
OUTLIERS = [1, 10, 1000]


@pytest.fixture(scope="module")
def weights():
    """Three kinds of weights, the last with rows and blocks of zeros."""
    weight = student_t((ROWS, COLUMNS), 3)
    holes = torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(1))
    holes[3] = 0
    holes[5, 64:192] = 0
    return {"heavy tails": weight, "with zeros": holes, "small": 1e-2 * weight}


@pytest.fixture(scope="module")
def layers(weights):
    return {name: take(weight) for name, weight in weights.items()}


def expected(weight, method, bits, group_size, double_quant):
    """The quantized weight, by the package's functions alone."""
    rows = group_size == "channel"
    if method in ("nf4", "fp4"):
        return quantize_codebook(weight, method, COLUMNS if rows else group_size, double_quant)
    quantizer = {"absmax": quantize_absmax, "affine": quantize_affine}[method]
    return quantizer(weight, bits, group_size)


def fits(method, bits, group_size, double_quant):
    if method in ("nf4", "fp4"):
        return bits == 4
    return not double_quant and (group_size == "channel" or COLUMNS % group_size == 0)


GRID = list(itertools.product(METHOD_LABELS, range(2, 9), GROUP_SIZES, [False, True]))


@pytest.mark.parametrize("settings", [s for s in GRID if fits(*s)], ids=str)
def test_the_numbers_are_the_packages_own(settings, weights, layers):
    method, bits, _, _ = settings
    for (name, weight), outlier in itertools.product(weights.items(), OUTLIERS):
        shown = view(layers[name], *settings, outlier)
        changed = weight.clone()
        changed.view(-1)[weight.abs().argmax()] *= outlier
        quantized = expected(changed, *settings)
        approximation = quantized.dequantize()

        # relative to the weight as it was given: the outlier must not hide the errors
        noise = (changed.double() - approximation.double()).square().sum().item()
        relative = math.sqrt(noise / weight.double().square().sum().item())
        # the package subtracts in float32, whose rounding is 2**-24 of each weight
        assert shown.relative_rmse == pytest.approx(relative, rel=1e-4)
        if outlier == 1:
            assert shown.relative_rmse == pytest.approx(relative_rmse(weight, approximation))
        assert shown.sqnr == pytest.approx(-20 * math.log10(shown.relative_rmse))
        assert shown.bits_per_weight == quantized.bits_per_weight
        assert shown.zeros == (approximation == 0).double().mean().item()

        codes = quantized.codes().flatten().int()
        if method == "fp4":
            codes = torch.where(codes == 8, 0, codes)  # the two zeros are one level
        used, counts = codes.unique(return_counts=True)
        assert len(shown.levels) == len(used)
        assert sorted(shown.level_counts.tolist()) == sorted(counts.tolist())
        assert shown.level_counts.sum() == weight.numel()
        assert f"{len(used)} of {2**bits}" in shown.readout
        assert f"{shown.relative_rmse:.3g}" in shown.readout


@pytest.mark.parametrize("settings", [s for s in GRID if not fits(*s)], ids=str)
def test_settings_that_do_not_fit_are_explained(settings, layers):
    with pytest.raises(ValueError, match="takes 4 bits|does not divide|double quantization"):
        view(layers["heavy tails"], *settings, 1)


@pytest.mark.parametrize("method", METHOD_LABELS)
def test_levels_and_weights_share_a_scale(method, layers):
    """Each weight's nearest level on the picture's scale is the level of its code."""
    shown = view(layers["heavy tails"], method, 4, 64, False, 1)
    weight = layers["heavy tails"].weight
    quantized = expected(weight, method, 4, 64, False)
    blocks = weight.view(-1, 64)
    if method == "affine":
        low = blocks.amin(1, keepdim=True).clamp(max=0)
        high = blocks.amax(1, keepdim=True).clamp(min=0)
        zero = quantized.zero_point.view(-1, 1)
        x = (blocks / ((high - low) / 15) + zero) / 7.5 - 1
    else:
        x = blocks / blocks.abs().amax(1, keepdim=True)
    levels = torch.from_numpy(shown.levels)
    nearest = torch.bucketize(x.flatten(), (levels[:-1] + levels[1:]) / 2)
    counts = torch.bincount(nearest, minlength=len(levels))
    # scales in float16 move a weight by at most 2**-11 of its place: only near-ties may differ
    moved = (counts - torch.from_numpy(shown.level_counts)).abs().sum().item()
    assert moved <= 0.01 * weight.numel()


def test_the_histograms_hold_all_weights_drawn(layers):
    shown = view(layers["with zeros"], "nf4", 4, 64, False, 1)
    assert shown.weight_counts.sum() == ROWS * COLUMNS
    assert shown.weight_counts.shape == shown.error_shares.shape == (BINS,)
    assert shown.error_shares.sum() == pytest.approx(1)


def test_a_large_weight_is_measured_on_some_rows_and_says_so():
    weight = torch.randn(4 * MOST // 1024, 1024, generator=torch.Generator().manual_seed(0))
    layer = take(weight)
    shown = view(layer, "nf4", 4, 64, False, 1)
    taken = sample_rows(weight)
    assert MOST <= taken.numel() <= 1.01 * MOST
    approximation = quantize_codebook(taken).dequantize()
    assert shown.relative_rmse == pytest.approx(relative_rmse(taken, approximation))
    assert f"{len(taken)} of {len(weight)}" in shown.readout


def test_all_zeros():
    layer = take(torch.zeros(4, COLUMNS))
    for method in METHOD_LABELS:
        shown = view(layer, method, 4, 64, False, 10)
        assert shown.relative_rmse == 0
        assert shown.zeros == 1


def test_distributions_are_what_they_are_called():
    drawn = distributions(rows=512)
    for name, weight in drawn.items():
        assert weight.shape == (512, 576)
        assert weight.dtype == torch.float32
        again = distributions(rows=512)[name]
        assert torch.equal(weight, again)
    # P(|t| > 3) for 3, 5 and 10 degrees of freedom and the normal distribution, from their tables
    far = {
        "Student t, 3 degrees of freedom": 0.05767,
        "Student t, 5 degrees of freedom": 0.03010,
        "Student t, 10 degrees of freedom": 0.01334,
        "Gaussian": 0.00270,
        "uniform": 0.0,
    }
    for name, share in far.items():
        count = drawn[name].numel()
        spread = 5 * math.sqrt(share * (1 - share) / count)
        assert (drawn[name].abs() > 3).double().mean().item() == pytest.approx(share, abs=spread)


def test_the_panel_moves(weights):
    panel = explore_codebooks(weights)
    before = panel.readout
    assert "4.5" in before
    assert panel.set(double_quant=True, group_size=16) != before
    assert "do not apply" in panel.set(method="absmax")
    assert "4.25" in panel.set(double_quant=False, group_size=64)
    assert panel.view.relative_rmse == pytest.approx(
        relative_rmse(
            weights["heavy tails"], quantize_absmax(weights["heavy tails"], 4, 64).dequantize()
        )
    )
    panel.close()


def test_scales_that_float16_cannot_hold_are_explained_by_what_the_panel_has():
    panel = explore_codebooks(torch.full((4, 64), 1e7))
    assert "do not apply" not in panel.readout  # NF4
    said = panel.set(method="affine")
    assert "cannot be held in float16" in said
    assert "choose NF4 or FP4" in said
    assert "scale_dtype" not in said  # there is no such control
    panel.close()


def test_a_weight_that_is_no_matrix_is_refused():
    with pytest.raises(ValueError, match="out_features, in_features"):
        explore_codebooks(torch.randn(64))
