"""What the explorers of a layer share: choosing, sampling, an outlier, words, errors."""

import math
from types import SimpleNamespace

import ipywidgets as widgets
import pytest
import torch
from tiny import normal
from traitlets import TraitError

from chapter13.explorers import layers
from chapter13.explorers.layers import (
    GroupSizeSlider,
    checked,
    checked_matrix,
    choose,
    drawn,
    group_words,
    relative_and_db,
    rms,
    sample_rows,
    take,
    with_outlier,
)
from chapter13.measures import mse, relative_rmse, sqnr_db
from chapter13.plots import LiveFigure


def test_group_sizes_are_the_packages_and_their_words_the_readers():
    sizes = [16, None, "channel"]
    slider = GroupSizeSlider(sizes, "channel")
    assert (slider.value, slider.index, slider.label) == ("channel", 2, "per channel")
    for index, size in enumerate(sizes):
        slider.value = size
        assert (slider.value, slider.index, slider.label) == (size, index, group_words(size))
    for index, size in enumerate(sizes):  # as the browser moves it
        slider.index = index
        assert (slider.value, slider.label) == (size, group_words(size))
    for wrong in (32, "row"):
        with pytest.raises(TraitError):
            slider.value = wrong
    assert GroupSizeSlider([None, 16], None).value is None


def test_an_outlier_leaves_the_given_weight_alone():
    weight = normal(4, 8)
    before = weight.clone()
    assert with_outlier(weight, 5, 1) is weight
    changed = with_outlier(weight, 13, 100)
    assert torch.equal(weight, before)
    assert changed[1, 5] == 100 * weight[1, 5]
    assert (changed != weight).sum() == 1


@pytest.mark.parametrize("check", [checked, checked_matrix, take])
def test_a_weight_is_checked_by_name(check):
    for wrong, error, words in [
        ([[1.0]], TypeError, "torch.Tensor"),
        (torch.ones(2, 4, dtype=torch.int8), TypeError, "floating"),
        (torch.empty(0, 4), ValueError, "empty"),
        (torch.tensor([[1.0, math.nan]]), ValueError, "1 NaN or Inf"),
    ]:
        with pytest.raises(error, match=words):
            check(wrong)
    if check is not checked:
        with pytest.raises(ValueError, match="a matrix .out_features, in_features., not shape .9"):
            check(normal(9))


def test_rows_of_a_large_matrix_and_its_extremes(monkeypatch):
    monkeypatch.setattr(layers, "MOST", 1000)
    weight = normal(100, 64)
    weight[33, 5], weight[77, 9] = 40.0, -50.0
    rows = sample_rows(weight)
    wanted = sorted({*range(0, 100, 7), 33, 77})
    assert torch.equal(rows, weight[wanted])
    layer = take(weight)
    assert torch.equal(layer.weight, rows)
    assert layer.weight.view(-1)[layer.largest] == -50
    assert layer.rows_measured() == [("rows measured", f"{len(wanted)} of 100")]
    small = normal(10, 64)
    assert sample_rows(small) is small
    assert take(small).rows_measured() == []


def test_some_weights_make_a_picture():
    assert torch.equal(drawn(50), torch.arange(50))
    chosen = drawn(3 * layers.DRAWN)
    assert torch.equal(chosen, drawn(3 * layers.DRAWN))
    assert len(chosen) == layers.DRAWN
    assert 0 <= chosen.min() < chosen.max() < 3 * layers.DRAWN
    assert (chosen.diff() >= 0).all()


def test_errors_are_those_of_the_package():
    weight, approximation = normal(30, 40), normal(30, 40, seed=1)
    relative, decibels = relative_and_db(mse(weight, approximation), rms(weight))
    # square root and square of the same float64 sums
    assert relative == pytest.approx(relative_rmse(weight, approximation), rel=1e-14)
    assert decibels == pytest.approx(sqnr_db(weight, approximation), rel=1e-12)
    assert relative_and_db(0.0, 2.0) == relative_and_db(0.0, 0.0) == (0.0, math.inf)


class NoFigure(LiveFigure):
    def update(self, view):
        pass


def test_a_chosen_layer_is_loaded_once_while_it_is_kept():
    loaded = []
    numbers = {name: widgets.IntSlider(0, 0, 3, description=name) for name in ("x", "y", "bits")}

    def load(x, y):
        loaded.append((x, y))
        return 10 * x + y

    panel = choose(
        {name: numbers[name] for name in ("y", "x")},
        load,
        {"bits": numbers["bits"]},
        lambda layer, bits: SimpleNamespace(readout=f"{layer} {bits}", alt="nothing"),
        NoFigure(),
        loading="measuring …",
    )
    assert panel.set(x=1, y=2, bits=3) == "12 3"
    assert panel.set(bits=1) == "12 1"
    assert panel.busy(x=1, y=2, bits=3) == ""
    assert panel.busy(x=2, y=2, bits=3) == "measuring …"
    panel.set(x=0, y=0)
    panel.set(x=1, y=2)
    assert loaded == [(0, 0), (1, 2)]
    panel.set(x=2)
    panel.set(x=1)
    panel.set(x=0, y=0)  # the first of three has made room
    assert loaded == [(0, 0), (1, 2), (2, 2), (0, 0)]
    panel.close()
