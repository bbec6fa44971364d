"""Notebook 04's explorer shows the package's own numbers."""

import math
import re
from statistics import median_low

import pytest
import torch

from chapter13.dynamic import quantize_per_tensor, quantize_per_token
from chapter13.explorers.activations import explore_activations, token_sqnr, view
from chapter13.measures import sqnr_db
from chapter13.outliers import quantize_rows
from chapter13.plots.activations import METHODS, SHOWN


@pytest.fixture
def layer():
    generator = torch.Generator().manual_seed(13)
    x = torch.randn(200, 96, generator=generator)
    x[:, 7] *= 40
    return x, torch.randn(64, 96, generator=generator) * 0.1


def test_numbers_by_the_definitions(layer):
    x, weight = layer
    shown = view(x, weight, 100.0, 0.5, 6.0)
    exact = x @ weight.T
    codes, scale = quantize_per_token(weight)
    restored = codes * scale

    def each(approximation):
        return [sqnr_db(*pair) for pair in zip(exact, approximation, strict=True)]

    def sqnr(activations):
        return median_low(each(activations @ restored.T))

    tokens, token_scale = quantize_per_token(x)
    # float32 sums in another order, some 2**-24 a term: far below the noise of INT8
    assert shown.sqnr["per token"] == pytest.approx(sqnr(tokens * token_scale), abs=1e-3)
    first = each((tokens * token_scale) @ restored.T)[0]
    assert shown.first["per token"] == pytest.approx(first, abs=1e-3)
    clip = x.abs().max() / 127.5
    assert shown.sqnr["static"] == pytest.approx(sqnr((x / clip).round() * clip), abs=0.05)
    columns = (x.half().abs() >= 6).any(0)
    assert shown.columns == columns.sum()
    kept = x.masked_fill(x.half().abs() >= 6, 0).half()
    codes, absmax = quantize_rows(kept)
    mixed = torch.where(columns, x, codes * (absmax / 127)[:, None])
    codes, absmax = quantize_rows(weight.half())
    mixed = median_low(each(mixed @ (codes * (absmax / 127)[:, None]).T))
    assert shown.sqnr["LLM.int8()"] == pytest.approx(mixed, abs=1e-3)
    codes, scale, zero_point = quantize_per_tensor(x)
    one = weight.abs().max() / 127.5
    one = ((codes.float() - zero_point) * scale) @ ((weight / one).round() * one).T
    assert shown.sqnr["per tensor"] == pytest.approx(median_low(each(one)), abs=0.05)
    assert torch.equal(
        torch.from_numpy(shown.before), x.abs().amax(0).sort(descending=True)[0][:SHOWN]
    )


def test_remedies_repair(layer):
    shown = view(*layer, 100.0, 0.5, 6.0)
    worst = shown.sqnr["per tensor"]
    for name in ("per token", "SmoothQuant", "LLM.int8()"):
        assert shown.sqnr[name] > worst + 3
    assert shown.after.max() / shown.after.min() < shown.before.max() / shown.before.min()
    assert view(*layer, 99.0, 0.5, 6.0).clip < shown.clip


def test_one_token_does_not_speak_for_the_others(layer):
    """A first token of thousands: with one scale it alone survives, clipped it alone is lost."""
    x, weight = layer
    x[0, 3] = 3e4
    shown = view(x, weight, 100.0, 0.5, 6.0)
    assert shown.sqnr["per tensor"] == 0  # zeros: the error is as large as the output
    assert shown.sqnr["static"] < 1
    assert min(shown.first["per tensor"], shown.first["static"]) > 25
    assert shown.sqnr["per token"] > 25
    assert "per tensor 0.0 (" in shown.alt
    clipped = view(x, weight, 99.99, 0.5, 6.0)
    assert clipped.sqnr["static"] > 15
    assert clipped.first["static"] < 1


def test_sqnr_of_each_token():
    exact = torch.tensor([[3.0, 4.0], [1.0, 0.0], [0.0, 2.0]])
    found = token_sqnr(exact, torch.tensor([[3.0, 4.5], [1.0, 0.0], [0.0, 0.0]]))
    assert found.tolist() == [pytest.approx(20), math.inf, 0.0]


def test_panel(layer):
    panel = explore_activations({"one": layer})
    readout = panel.set(percentile=99.9, alpha=0.7, threshold=3)
    shown = view(*layer, 99.9, 0.7, 3.0)
    assert readout == shown.readout
    for name in METHODS:
        both = rf"{shown.sqnr[name]:.1f} dB; first token {shown.first[name]:.1f} dB"
        assert re.search(rf"{re.escape(name)}, SQNR +{both}", readout)
    panel.close()
