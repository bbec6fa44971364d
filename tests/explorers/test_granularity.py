"""Notebook 02's explorer shows the package's own numbers, on its whole grid; and its pictures."""

import math
import re

import numpy as np
import pytest
import torch
from tiny import normal

from chapter13.explorers import granularity, layers
from chapter13.explorers.granularity import (
    BITS,
    GROUP_SIZES,
    LAYERS,
    explore_granularity,
    prepare,
    view,
)
from chapter13.integer import quantize_absmax, quantize_affine
from chapter13.measures import max_abs_error, mse, relative_rmse, sqnr_db


def loud():
    weight = normal(20, 192) * 0.02
    weight[3] *= 30
    weight[:, 7] *= 20
    return weight


WEIGHTS = {
    "loud row and column": loud(),
    "skewed": normal(12, 384).exp(),
    "only channels fit": normal(6, 50),
    "more rows than the map": normal(250, 48),
    "zeros": torch.zeros(4, 64),
    "one zero row": torch.cat([torch.zeros(1, 96), normal(3, 96)]),
    "bfloat16": normal(8, 128).bfloat16(),
    "not contiguous": normal(96, 30).T,
}


@pytest.fixture(params=WEIGHTS, scope="module")
def layer(request):
    return prepare(WEIGHTS[request.param])


def package(weight, bits, group_size, affine):
    quantizer = quantize_affine if affine else quantize_absmax
    return quantizer(weight, bits, group_size)


def fits(weight, group_size):
    return not isinstance(group_size, int) or weight.shape[1] % group_size == 0


@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("bits", BITS)
def test_numbers_are_the_packages_own(layer, bits, affine):
    weight = layer.weight
    for place, group_size in enumerate(GROUP_SIZES):
        point = layer.curves[affine][bits - BITS[0], place]
        if not fits(weight, group_size):
            with pytest.raises(ValueError, match=f"{group_size} does not divide"):
                view(layer, bits, group_size, affine)
            assert np.isnan(point).all()
            continue
        shown = view(layer, bits, group_size, affine)
        quantized = package(weight, bits, group_size, affine)
        approximation = quantized.dequantize()
        assert shown.bits_per_weight == quantized.bits_per_weight
        assert shown.nbytes == quantized.nbytes
        assert shown.max_error == max_abs_error(weight, approximation)
        # sums of the same float32 differences in float64, at most n roundings each
        close = 2 * weight.numel() * 2.0**-53
        assert shown.mse == pytest.approx(mse(weight, approximation), rel=close)
        relative = relative_rmse(weight, approximation)
        assert shown.relative_rmse == pytest.approx(relative, rel=2 * close)
        assert point.tolist() == [quantized.bits_per_weight, relative]
        assert shown.limits[0] <= relative <= shown.limits[1]


def test_map_is_the_mean_error_of_patches():
    weight = normal(384, 64)
    shown = view(prepare(weight), 4, 32, False)
    error = (weight - quantize_absmax(weight, 4, 32).dequantize()).abs().double()
    rms = weight.double().square().mean().sqrt()
    expected = error.view(192, 2, 4, 16).mean((1, 3)) / rms
    # sums of 32 positive float32 numbers: at most 32 roundings, and one each for two divisions
    assert shown.error_map == pytest.approx(expected.numpy(), rel=34 * 2.0**-24)


@pytest.mark.parametrize(
    ("shape", "cells"),
    [((7, 8), (7, 1)), ((192, 576), (192, 36)), ((1000, 4096), (192, 192)), ((3, 50), (3, 4))],
)
def test_map_has_a_bounded_size(shape, cells):
    assert view(prepare(normal(*shape)), 4, "channel", False).error_map.shape == cells


def test_readout_says_the_numbers():
    weight = WEIGHTS["loud row and column"]
    readout = view(prepare(weight), 3, 64, True).readout
    quantized = quantize_affine(weight, 3, 64)
    approximation = quantized.dequantize()
    assert dict(re.split(r"  +", line) for line in readout.splitlines()) == {
        "bits per weight": f"{8 * 1583 / 3840:.4f}",
        "mean squared error": f"{mse(weight, approximation):.2e}",
        "relative RMSE": f"{relative_rmse(weight, approximation):.2%}",
        "SQNR": f"{sqnr_db(weight, approximation):.1f} dB",
        "largest error": f"{max_abs_error(weight, approximation):.2e}",
        # 3840 codes of 3 bits; 60 groups with 2 bytes of scale and 3 bits of zero point
        "bytes": "1,583: codes 1,440, scales 120, zero points 23",
    }


def test_what_the_explorer_is_there_to_show():
    """A loud row is tamed per channel, a loud column per group only."""
    row, column = normal(64, 192), normal(64, 192)
    row[3] *= 50
    column[:, 7] *= 50

    def quiet_error(weight, size, rows, columns):
        error = (weight - package(weight, 4, size, False).dequantize())[rows][:, columns]
        return error.square().mean().item()

    quiet_rows = torch.arange(64) != 3
    quiet_columns = torch.arange(192) >= 16  # beyond the loud column's group
    everything = slice(None)
    loud_row = [quiet_error(row, s, quiet_rows, everything) for s in (None, "channel")]
    loud_column = [quiet_error(column, s, everything, quiet_columns) for s in (None, "channel", 16)]
    assert loud_row[0] > 20 * loud_row[1]
    assert loud_column[0] < 2 * loud_column[1]
    assert loud_column[1] > 20 * loud_column[2]


def test_curves_of_a_large_layer_are_of_some_rows_and_keep_the_scale_per_tensor(monkeypatch):
    monkeypatch.setattr(layers, "MOST", 1000)
    weight = normal(100, 64)
    weight[33, 5], weight[77, 9] = 40.0, -30.0
    rows = layers.sample_rows(weight)
    assert {tuple(row.tolist()) for row in rows} == {
        tuple(weight[i].tolist()) for i in (*range(0, 100, 7), 33)
    }
    for affine in (False, True):
        few = package(rows, 4, None, affine)
        assert torch.equal(few.scale, package(weight, 4, None, affine).scale)
        quantized = few.dequantize()
        point = prepare(weight).curves[affine][2, 0]
        assert point.tolist() == [few.bits_per_weight, relative_rmse(rows, quantized)]
    assert view(prepare(weight), 4, None, False).mse == pytest.approx(
        mse(weight, quantize_absmax(weight, 4).dequantize()), rel=2 * weight.numel() * 2.0**-53
    )


def test_curves_are_computed_once_a_layer(monkeypatch):
    prepared = []
    original = prepare
    monkeypatch.setattr(granularity, "prepare", lambda w: prepared.append(w) or original(w))
    panel = explore_granularity({"a": normal(8, 64), "b": normal(8, 96)})
    for layer in "abab":
        for bits in BITS:
            panel.set(layer=layer, bits=bits, affine=bits % 2 == 0)
    assert len(prepared) == 2
    panel.close()


def test_real_layers(weights):
    panel = explore_granularity()
    assert list(panel.controls["layer"].options) == LAYERS
    weight = weights[LAYERS[0]]
    readout = panel.set(layer=LAYERS[0], bits=4, group_size=64, affine=True)
    assert readout.startswith("bits per weight     4.3125\n")
    assert f"{mse(weight, quantize_affine(weight, 4, 64).dequantize()):.2e}" in readout
    assert "128 does not divide in_features = 576; these do" in panel.set(group_size=128)
    panel.close()


def test_weights_that_cannot_be_quantized():
    broken = normal(4, 64)
    broken[1, 2] = math.nan
    with pytest.raises(ValueError, match="1 NaN or Inf"):
        explore_granularity(broken)
    with pytest.raises(ValueError, match="out_features, in_features"):
        explore_granularity(normal(9))
    panel = explore_granularity({"whole": normal(4, 64), "broken": broken})
    assert "1 NaN or Inf" in panel.set(layer="broken")
    panel.close()


def test_one_setting_beyond_float16_leaves_the_others():
    weight = normal(4, 64)
    weight[0, 0] = 1e6  # a scale of 1e6 / 7 is beyond float16, 1e6 / 127 is not
    panel = explore_granularity(weight)
    assert "float32" in panel.set(bits=4)
    assert "dB" in panel.set(bits=8)
    panel.close()
