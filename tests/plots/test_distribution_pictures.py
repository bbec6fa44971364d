"""Notebook 07's pictures: the tails of a distribution, and the names of the codes."""

import numpy as np
import pytest
from gallery import PANELS, drawn
from tiny import normal

from chapter13.plots import distributions
from chapter13.plots.distributions import code_ticks


def test_tails_count_the_weights_beyond_a_distance():
    values = normal(1000) ** 3
    figure, shown = drawn(distributions.tails, {"cubes": values})
    curve = next(line for line in figure.axes[0].lines if line.get_label() == "cubes")
    distance = np.abs(values.numpy() / values.numpy().std())
    for place, share in zip(*curve.get_data(), strict=True):
        assert share == pytest.approx((distance >= place).mean())
    assert f"cubes {distance.max():.1f} σ" in shown.alt
    line = figure.axes[0].lines[0]
    assert np.interp(2, *line.get_data()) == pytest.approx(0.0455, abs=1e-4)  # beyond 2 sigma


@pytest.mark.parametrize(
    ("method", "bits", "words"),
    [
        ("absmax", 8, "−128 −64 0 64 127"),
        ("absmax", 4, "−8 −4 0 4 7"),
        ("absmax", 2, "−2 0 1"),
        ("affine", 4, "0 4 8 12 15"),
        ("gptq", 3, "0 2 4 6 7"),
    ],
)
def test_codes_are_named_below_their_bars(method, bits, words):
    places, names = code_ticks(method, bits)
    assert names == words.split()
    first = -(2 ** (bits - 1)) if method == "absmax" else 0
    for place, name in zip(places, names, strict=True):
        index = int(name.replace("−", "-")) - first
        assert place == (index + 0.5) / 2**bits


def test_a_code_book_is_named_by_its_levels():
    _, make = PANELS["distributions"]
    panel = make()
    panel.set(method="nf4")
    counts = panel.view.code_counts
    assert len(counts) == 16
    names = {text.get_text(): text.get_position()[0] for text in panel.figure._names}
    assert list(names) == ["level −1", "0", "1", ""]
    zeros = panel.view.zeros * panel.view.layer.weight.numel()
    assert counts[int(names["0"] * 16)] == pytest.approx(zeros)
    panel.close()
