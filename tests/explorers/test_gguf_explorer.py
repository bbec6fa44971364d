"""Notebook 10's explorer: each number it shows against the package's own, over all its settings."""

import itertools

import numpy as np
import pytest
import torch

from chapter13 import models, quantize_absmax, quantize_affine, quantize_codebook
from chapter13.explorers.codebooks import student_t
from chapter13.explorers.gguf import GROUP_SIZES, all_levels, explore_gguf, prepare, view
from chapter13.gguf_blocks import ENCODERS, quantize, read
from chapter13.measures import relative_rmse
from chapter13.plots import gguf as pictures

ROWS, COLUMNS = 24, 576


@pytest.fixture(scope="module")
def weights():
    holes = torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(1))
    holes[3] = 0
    return {"heavy tails": student_t((ROWS, COLUMNS), 3), "with zeros": holes}


@pytest.fixture(scope="module")
def layers(weights):
    return {name: prepare(weight) for name, weight in weights.items()}


def test_the_layer_s_numbers_are_the_packages_own(weights, layers):
    quantizers = {
        "absmax": lambda w, size: quantize_absmax(w, 4, size),
        "affine": lambda w, size: quantize_affine(w, 4, size),
        "NF4": lambda w, size: quantize_codebook(w, "nf4", size),
        "NF4, double quantization": lambda w, size: quantize_codebook(w, "nf4", size, True),
    }
    for name, weight in weights.items():
        layer = layers[name]
        assert set(layer.curves) == set(quantizers) == set(pictures.CURVES)
        for label, quantizer in quantizers.items():
            for size, (bits, error) in zip(GROUP_SIZES, layer.curves[label], strict=True):
                q = quantizer(weight, size)
                assert bits == q.bits_per_weight
                assert error == relative_rmse(weight, q.dequantize())
        for kind in ENCODERS:
            q = quantize(weight, kind)
            assert layer.kinds[kind] == (q.bits_per_weight, relative_rmse(weight, q.dequantize()))


GRID = list(itertools.product(ENCODERS, [0, 5, 55], [1, 8, 1024]))


@pytest.mark.parametrize("settings", GRID, ids=str)
def test_the_block_s_numbers_are_the_packages_own(settings, weights, layers):
    kind, block, outlier = settings
    for name, weight in weights.items():
        shown = view(layers[name], *settings)
        values = weight.view(-1, 32)[block].clone()
        values[values.abs().argmax()] *= outlier
        stored = quantize(values, kind)
        restored = stored.dequantize()
        assert shown.block_error == relative_rmse(values, restored)
        absmax = values.abs().max() or 1.0
        assert np.array_equal(shown.values, (values / absmax).numpy())
        assert np.array_equal(shown.restored, (restored / absmax).numpy())
        assert f"{stored.bits_per_weight:g} bits per weight" in shown.readout
        different = f"{len(set(restored.tolist()))} of {len(set(all_levels(stored).tolist()))}"
        assert different in shown.readout
        assert f"{shown.block_error:.3g}" in shown.alt
        no_larger = [
            (rmse, bits, label)
            for label, curve in layers[name].curves.items()
            for bits, rmse in curve
            if bits <= stored.bits_per_weight
        ]
        rmse, bits, label = min(no_larger)
        assert f"{label}: {rmse:.3g} at {bits:.4g} bits" in shown.readout
        levels = all_levels(stored)
        assert torch.isin(restored, levels).all()
        assert levels.diff().min() >= 0


def test_the_levels_of_each_kind():
    block = torch.linspace(-1, 0.9, 32)
    counts = {kind: len(all_levels(quantize(block, kind)).unique()) for kind in ENCODERS}
    assert counts == {"Q8_0": 255, "Q4_0": 16, "Q4_1": 16, "MXFP4": 15}


def test_a_block_that_is_not_there(layers):
    with pytest.raises(ValueError, match="432 blocks: choose one from 0 to 431"):
        view(layers["heavy tails"], "Q4_0", 432, 1)


def test_the_panel_on_the_embedded_model(weights):
    panel = explore_gguf()
    name = panel.settings["layer"]
    shuffled = models.linear_weights()[name]
    assert panel.view.kinds["Q4_1"][1] == relative_rmse(
        shuffled, quantize(shuffled, "Q4_1").dequantize()
    )
    panel.set(order="stored", kind="Q4_1")
    assert panel.view.kinds["Q4_1"][1] == 0
    assert panel.figure.axes[0].get_ylim()[0] < 0  # the axis begins where all points are seen
    stored = read(models.gguf_path()).tensors["blk.0.attn_q.weight"].dequantize()
    assert panel.view.curves["absmax"][2][1] == relative_rmse(
        stored, quantize_absmax(stored, 4, 64).dequantize()
    )
    panel.close()


def test_the_panel_on_given_weights(weights):
    panel = explore_gguf(weights)
    assert "order" not in panel.controls
    before = panel.readout
    assert panel.set(layer="with zeros") != before
    assert "do not apply" in panel.set(block=999)
    panel.close()
    single = explore_gguf(weights["heavy tails"])
    assert list(single.controls) == ["kind", "block", "outlier"]
    assert "do not apply" in single.set(outlier=1024, block=999)
    single.close()


def test_a_weight_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="blocks of 32"):
        explore_gguf(torch.randn(4, 33))
    with pytest.raises(ValueError, match="a matrix"):
        explore_gguf(torch.randn(64))
    with pytest.raises(ValueError, match="NaN or Inf"):
        explore_gguf(torch.full((4, 64), torch.nan))


def test_all_zeros():
    layer = prepare(torch.zeros(4, 64))
    for kind in ENCODERS:
        shown = view(layer, kind, 0, 8)
        assert shown.block_error == 0
        assert "1 of 1" in shown.readout
