"""Notebook 01's still pictures say in words what their data say."""

import numpy as np
import pytest

from chapter13.plots import rounding


def test_number_line_counts_what_it_shows():
    alt = rounding.number_line([1.27, -0.5, 0.0042, 0.0535], 0.01).alt
    assert "4 weights" in alt
    assert "255 levels" in alt
    assert "0.01 apart" in alt
    assert "2 weights to their nearest" in alt  # the other two lie outside the strip


@pytest.mark.parametrize("crowd", [0, 40])
def test_error_histogram_says_how_even_it_is(crowd):
    centers = np.tile((np.arange(40) + 0.5) / 40 - 0.5, 40)
    errors = np.append(centers, np.full(crowd, centers[0]))  # 80 in one bar, 41 on average
    alt = rounding.error_histogram(0.03 * errors, 0.03).alt
    expected = 0 if not crowd else 80 / 41 - 1
    assert f"within {expected:.0%} of" in alt


def test_sqnr_over_bits_names_the_distance_from_the_line():
    alt = rounding.sqnr_over_bits([2, 3, 4], [1.0, 7.5, 14.25], [-2.0, 7.0, 14.0]).alt
    assert "from 1.0 dB at 2 bits to 14.2 dB at 4" in alt
    assert "last bit adds 6.8 dB" in alt
    assert "From 3 bits on the points lie within 0.50 dB" in alt


def test_layers_names_the_ends_and_the_distance_from_the_line():
    line = 10 * np.log10(12 * 127**2)
    reach = {"a": 1.0, "b": 10.0, "c": 100.0}
    sqnr = {"a": line, "b": line - 20.3, "c": line - 40}
    alt = rounding.layers_sqnr(reach, sqnr, {"b": "middle"}).alt
    assert "3 layers" in alt
    assert f"from {line:.1f} to {line - 40:.1f} dB" in alt
    assert "from 1.0 to 100.0 times" in alt
    assert "within 0.30 dB" in alt
