"""Still pictures draw the numbers they were given: places, heights, words, read from the artists.

Numbers in the alternative texts are compared with what was drawn, not with the input alone.
"""

import numpy as np
import pytest
import torch
from gallery import drawn
from matplotlib.collections import LineCollection
from matplotlib.patches import StepPatch

from chapter13 import memory, quantize_absmax, quantize_codebook, summary
from chapter13.measures import relative_rmse
from chapter13.plots import (
    activations,
    awq,
    codebooks,
    distributions,
    formats,
    gguf,
    granularity,
    rounding,
    shapes,
)
from chapter13.plots import gptq as gptq_plots
from chapter13.plots import summary as summary_plots
from chapter13.plots.picture import method_named
from chapter13.tables import nf4_code_book


def points(line):
    """[(x, y), ...] of a line."""
    return [(float(x), float(y)) for x, y in zip(*line.get_data(), strict=True)]


def line_of(ax, label):
    """The line with this label."""
    return next(line for line in ax.lines if line.get_label() == label)


def texts(ax):
    return [text.get_text().strip() for text in ax.texts]


def arrows_of(ax):
    return [text for text in ax.texts if getattr(text, "arrow_patch", None)]


def steps(ax):
    """(heights, edges) of the first histogram."""
    patch = next(patch for patch in ax.patches if isinstance(patch, StepPatch))
    return patch.get_data().values, patch.get_data().edges


def levels(ax):
    """Where the upright lines of the first collection stand."""
    lines = next(child for child in ax.collections if isinstance(child, LineCollection))
    return [segment[0, 0] for segment in lines.get_segments()]


def tick_words(axis):
    return [label.get_text() for label in axis.get_ticklabels()]


# --- shapes -----------------------------------------------------------------------------------


def test_stacked_bars_lie_end_to_end():
    rows = {"one": {"codes": 4.0, "scales": 1.0}, "two": {"codes": 2.0, "kept": 7.0}}
    figure, _ = drawn(shapes.stacked_bars, rows, "GB", "bars", {"kept": "rest"}, "{:.0f}", "{:.1f}")
    (ax,) = figure.axes
    spans = [(bar.get_y() + 0.33, bar.get_x(), bar.get_x() + bar.get_width()) for bar in ax.patches]
    assert spans == [(0, 0, 4), (0, 4, 5), (1, 0, 2), (1, 2, 9)]
    assert texts(ax) == ["4", "1", "5.0", "2", "7", "9.0"]
    assert tick_words(ax.yaxis) == ["one", "two"]
    assert ax.yaxis_inverted()
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [
        "codes",
        "scales",
        "rest",
    ]


def test_memory_bars_leave_out_what_nothing_has():
    breakdown = {"linears": 5e6, "scales": 0, "embeddings": 2e6, "rest": 1e6}
    figure, shown = drawn(shapes.memory_bars, {"a": breakdown, "b": breakdown | {"linears": 1e6}})
    assert [bar.get_width() for bar in figure.axes[0].patches] == [5, 2, 1, 1, 2, 1]
    assert texts(figure.axes[0]) == ["8 MB", "4 MB"]
    assert "b: linears 1.0, scales 0.0, embeddings 2.0, rest 1.0" in shown.alt


@pytest.mark.parametrize("log", [False, True])
def test_dots_lie_at_their_values_within_their_intervals(log):
    rows = {"NF4": (0.3, 0.2, 0.4), "GPTQ": (0.21, 0.15, 0.3), "another": 0.5}
    figure, shown = drawn(shapes.dots, rows, "KL", log=log)
    (ax,) = figure.axes
    assert [points(line) for line in ax.lines] == [[(0.3, 0)], [(0.21, 1)], [(0.5, 2)]]
    bars = [segment for each in ax.collections for segment in each.get_segments()]
    assert [bar.tolist() for bar in bars] == [[[0.2, 0], [0.4, 0]], [[0.15, 1], [0.3, 1]]]
    assert tick_words(ax.yaxis) == list(rows)
    assert texts(ax) == ["0.3", "0.21", "0.5"]
    assert ax.get_xscale() == ("log" if log else "linear")
    assert log or ax.get_xlim()[0] == 0
    assert "95% intervals, KL: NF4 0.3, GPTQ 0.21, another 0.5" in shown.alt


# --- notebook 00 ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def weight():
    return torch.randn(64, 128, generator=torch.Generator().manual_seed(3)) * 0.05


def test_parameter_shares_are_percent_of_all():
    shape = memory.SHAPES["Llama-2-7B"]
    figure, shown = drawn(formats.parameter_shares, {"Llama-2-7B": memory.parameters(shape)})
    widths = [bar.get_width() for bar in figure.axes[0].patches]
    norms = 100 * 65 * 4096 / 6_738_415_616
    assert sum(widths) == pytest.approx(100 - norms)
    embeddings = 100 * 32000 * 4096 / 6_738_415_616
    assert widths[0] == pytest.approx(embeddings)
    assert widths[-1] == pytest.approx(embeddings)
    assert f"{2 * embeddings:.0f}% of Llama-2-7B" in shown.alt
    assert f"at most {norms:.2f}%, are not drawn" in shown.alt


def test_spacing_marks_the_end_the_subnormals_and_the_factor():
    magnitudes = np.logspace(-8, 6, 1000)
    octaves = 2.0 ** np.floor(np.log2(magnitudes))
    gaps = np.maximum(octaves, 2.0**-14) / 1024
    curves = {"fp16": (magnitudes[:900], gaps[:900]), "bf16": (magnitudes, octaves / 128)}
    figure, shown = drawn(formats.spacing, curves)
    (ax,) = figure.axes
    assert points(line_of(ax, "bf16")) == list(zip(*curves["bf16"], strict=True))
    assert texts(ax) == ["the end of fp16", "subnormals of fp16", "× 8"]
    end = next(line for line in ax.lines if line.get_marker() == "|")
    assert points(end)[0] == (magnitudes[899], gaps[899])
    assert "of bf16 is 8 times that of fp16" in shown.alt


def test_cast_errors_are_those_of_the_casts(weight):
    casts = {"fp16": weight.half(), "bf16": weight.bfloat16()}
    figure, shown = drawn(formats.cast_errors, weight, casts)
    (ax,) = figure.axes
    bounds = [line.get_xdata()[0] for line in ax.lines]
    assert bounds == [2.0**-11, 2.0**-8]
    for patch, (name, cast) in zip(ax.patches, casts.items(), strict=True):
        data, errors = patch.get_data(), ((cast.double() - weight.double()) / weight.double()).abs()
        assert data.values.sum() <= 100
        within = ((errors >= data.edges[0]) & (errors <= data.edges[-1])).double().mean()
        assert data.values.sum() == pytest.approx(100 * within)
        assert f"{np.median(errors[errors > 0].numpy()):.1e} for {name}" in shown.alt


def test_relative_steps_shows_what_int8_loses(weight):
    quantized = quantize_absmax(weight, 8, scale_dtype=torch.float32)
    casts = {"fp16": weight.half(), "bf16": weight.bfloat16(), "int8": quantized.dequantize()}
    figure, shown = drawn(formats.relative_steps, weight, casts)
    curves, counts = figure.axes
    small, large = line_of(curves, "int8").get_ydata()[[0, -1]]
    assert small == 1  # the smallest weights are lost
    assert large < 0.01
    magnitudes = line_of(curves, "fp16").get_xdata()
    ratio = line_of(curves, "bf16").get_ydata() / line_of(curves, "fp16").get_ydata()
    assert ratio[-5:] == pytest.approx(8, rel=0.2)  # 3 bits of mantissa
    heights, edges = steps(counts)
    assert heights.sum() == pytest.approx(100)
    assert ((edges[:-1] < magnitudes) & (magnitudes < edges[1:])).all()
    lost = (quantized.codes() == 0).float().mean().item()
    assert f": {lost:.0%} of the weights end up on zero" in shown.alt


def test_sizes_and_cards_puts_each_model_in_its_row():
    sizes = {"small": {"fp32": 4.0, "int4": 0.6}, "large": {"fp32": 40.0, "int4": 6.0}}
    figure, _ = drawn(formats.sizes_and_cards, sizes, {"card": 24.0})
    (ax,) = figure.axes
    assert points(line_of(ax, "fp32")) == [(4.0, 0), (40.0, 1)]
    assert points(line_of(ax, "int4")) == [(0.6, 0), (6.0, 1)]
    assert tick_words(ax.yaxis) == ["small", "large"]
    assert texts(ax) == ["24: card"]


def test_cards_of_the_same_size_share_a_line():
    cards = {"one": 16, "laptop, shared memory": 16, "large": 80}
    figure, _ = drawn(formats.sizes_and_cards, {"model": {"fp32": 4.0, "int4": 0.6}}, cards)
    assert texts(figure.axes[0]) == ["16: one; laptop", "80: large"]


# --- notebook 01 ------------------------------------------------------------------------------


def test_the_whole_grid_and_its_strip():
    figure, shown = drawn(rounding.whole_grid, [1.27, -0.5, 0.0042, 0.0535], 0.01)
    whole, part = figure.axes
    assert np.allclose(levels(whole), np.arange(-127, 128) * 0.01)
    assert points(whole.lines[0]) == [(1.27, 1), (-0.5, 1), (0.0042, 1), (0.0535, 1)]
    assert np.allclose(levels(part), np.arange(-2, 7) * 0.01)
    assert points(part.lines[0]) == [(0.0042, 1), (0.0535, 1)]  # the others lie outside the strip
    arrows = [(text.xyann[0], round(text.xy[0], 9)) for text in arrows_of(part)]
    assert arrows == [(0.0042, 0), (0.0535, 0.05)]
    assert "2 weights to their nearest" in shown.alt


@pytest.mark.parametrize("crowd", [0, 40])
def test_error_histogram_counts_the_errors(crowd):
    centers = np.tile((np.arange(40) + 0.5) / 40 - 0.5, 40)
    errors = np.append(centers, np.full(crowd, centers[0]))  # 80 in one bar, 41 on average
    figure, shown = drawn(rounding.error_histogram, 0.03 * errors, 0.03)
    heights, _ = steps(figure.axes[0])
    assert heights.tolist() == [40 + crowd, *[40] * 39]
    assert figure.axes[0].lines[0].get_ydata()[0] == heights.mean()
    assert f"within {heights.max() / heights.mean() - 1:.0%} of" in shown.alt


def test_sqnr_over_bits_draws_measured_and_expected():
    data = [2, 3, 4], [1.0, 7.5, 14.25], [-2.0, 7.0, 14.0]
    figure, shown = drawn(rounding.sqnr_over_bits, *data)
    expected, measured = figure.axes[0].lines
    assert points(expected) == [(2, -2), (3, 7), (4, 14)]
    assert points(measured) == [(2, 1), (3, 7.5), (4, 14.25)]
    assert texts(figure.axes[0]) == ["1.0", "7.5", "14.2"]
    assert "last bit adds 6.8 dB" in shown.alt


def test_layers_lie_beside_the_expected_line():
    at = 10 * np.log10(12 * 127**2)
    crest = {"a": 1.0, "b": 10.0, "c": 100.0}
    sqnr = {"a": at, "b": at - 20.3, "c": at - 40}
    figure, shown = drawn(rounding.layers_sqnr, crest, sqnr, {"b": "middle"})
    line, layers, mark = figure.axes[0].lines
    assert points(layers) == [(crest[name], sqnr[name]) for name in "abc"]
    assert points(mark) == [(10.0, at - 20.3)]
    assert np.allclose(line.get_ydata(), at - 20 * np.log10(line.get_xdata()))
    assert texts(figure.axes[0]) == ["middle"]
    assert "within 0.30 dB" in shown.alt


# --- notebook 02 ------------------------------------------------------------------------------


def test_shared_scales_writes_the_errors_and_frames_what_shares_a_scale():
    weight = np.array([[1.0, 2.0], [3.0, 4.0]])
    approximation = weight - [[0.2, 0], [0.3, 0.5]]
    figure, shown = drawn(granularity.shared_scales, weight, {"per row": (approximation, (1, 2))})
    plain, errors = figure.axes[:2]
    assert texts(plain) == ["1", "2", "3", "4"]
    assert texts(errors) == ["0.2", "0.3", "0.5"]  # an exact cell is blank
    assert len(errors.lines) == 2  # a frame a row
    assert np.ptp(errors.lines[0].get_xdata()) > 1.8
    assert "per row 0.25" in shown.alt
    shades = [patch.get_alpha() for patch in errors.collections]
    assert shades[0] < shades[1] < shades[2]  # the larger the error, the darker


def test_largest_of_marks_the_groups():
    figure, shown = drawn(granularity.largest_of, [1, 10], [0.8, 1.8], {"a row": (5, 1.234)})
    curve, mark = figure.axes[0].lines
    assert points(curve) == [(1, 0.8), (10, 1.8)]
    assert points(mark) == [(5, 1.234)]
    assert texts(figure.axes[0]) == ["a row: 1.23"]
    assert "1.23 a row" in shown.alt


def test_row_absmax_sorts_the_rows():
    figure, shown = drawn(granularity.row_absmax, {"a": [3.0, 1.0, 2.0]})
    assert points(figure.axes[0].lines[0]) == [(0, 1), (50, 2), (100, 3)]
    assert "a: 1.0 to 3.0" in shown.alt


def test_grids_lead_from_each_number_to_its_level():
    absmax, affine = (np.arange(-1, 2), [0.0, 1.0]), (np.arange(4) / 4, [0.0, 0.75])
    figure, shown = drawn(granularity.grids, [0.0, 0.75], absmax, affine)
    for ax, (grid, landed) in zip(figure.axes, (absmax, affine), strict=True):
        assert levels(ax) == grid.tolist()
        assert [(text.xyann[0], text.xy[0]) for text in ax.texts] == list(
            zip([0, 0.75], landed, strict=True)
        )
    assert figure.axes[0].get_title().startswith("absmax: 1 of 3 levels")
    assert "absmax, 1 of 3 levels useful, mean error 0.125" in shown.alt
    assert "affine, 4 of 4 levels useful, mean error 0.000" in shown.alt


def test_error_maps_share_a_scale():
    maps = {"a": torch.full((2, 2), 0.5), "b": torch.full((2, 2), 0.25)}
    figure, shown = drawn(granularity.error_maps, maps)
    images = [ax.images[0] for ax in figure.axes[:2]]
    assert [image.get_array().tolist() for image in images] == [[[0.5] * 2] * 2, [[0.25] * 2] * 2]
    assert images[0].norm is images[1].norm
    assert (images[0].norm.vmin, images[0].norm.vmax) == granularity.ERROR_RANGE
    assert [ax.get_title() for ax in figure.axes[:2]] == ["a", "b"]
    assert "a 50.0%, b 25.0%" in shown.alt


def test_frontier_is_drawn_below_the_curves():
    pairs = [(3.0, 0.2), (2.0, 0.5), (2.5, 0.3)]
    figure, shown = drawn(granularity.frontier, {"absmax": {2: pairs}, "affine": {2: pairs}}, pairs)
    front, *curves = figure.axes[0].lines
    assert points(front) == [(2, 0.5), (2.5, 0.3), (3, 0.2)]
    for curve in curves:  # per tensor stands alone
        first, gap, *rest = points(curve)
        assert first == (2, 0.5)
        assert np.isnan(gap).all()
        assert rest == [(2.5, 0.3), (3, 0.2)]
    assert [line.get_label() for line in curves] == ["absmax", "affine"]
    assert texts(figure.axes[0]) == ["2 bits"]
    assert "3 of 6 settings" in shown.alt


# --- notebook 03 ------------------------------------------------------------------------------


def test_code_counts_marks_the_unused():
    figure, shown = drawn(codebooks.code_counts, [0, *range(1, 16)])
    (ax,) = figure.axes
    assert [bar.get_height() for bar in ax.patches] == list(range(16))
    said = [(text.get_text(), text.get_position()[0]) for text in ax.texts]
    assert said[0] == ("never\nused", -8)
    assert said[1:] == [(str(code + 8), code) for code in range(-7, 8)]
    assert "15 of 16 codes occur; never used: -8. Weights with code -7: 1, with 7: 15." in shown.alt


def test_bit_stream_writes_bits_codes_and_bytes():
    figure, shown = drawn(codebooks.bit_stream, [5, 0, 7, 2], bits=3)
    written = texts(figure.axes[0])
    assert "".join(written[:12]) == "101000111010"
    assert written[12:] == ["5", "0", "7", "2", f"byte 0: {0b10100011}", f"byte 1: {0b10100000}"]
    assert "fill 2 bytes" in shown.alt


def test_code_books_are_rows_of_levels():
    sets = {"absmax": np.arange(-7, 8) / 7, "nf4": nf4_code_book()}
    figure, shown = drawn(codebooks.code_books, sets)
    (ax,) = figure.axes
    for y, (lines, values) in enumerate(zip(ax.collections, sets.values(), strict=True)):
        segments = np.array(lines.get_segments())
        assert np.allclose(segments[:, :, 0], np.asarray(values)[:, None])
        assert (segments[:, :, 1].mean(1) == y).all()
    assert tick_words(ax.yaxis) == ["absmax", "NF4"]
    assert "absmax gaps from 0.143 to 0.143" in shown.alt


def test_code_books_say_where_levels_lie_too_near():
    near = np.array([-1, -0.005, 0, 0.005, 1])
    figure, _ = drawn(codebooks.code_books, {"nf4": nf4_code_book(), "fp4": near})
    assert texts(figure.axes[0]) == ["3 levels here"]


def test_storage_bars_show_the_scales_alone():
    rows = {"NF4": {"codes": 4.0, "scales": 0.5}, "both": {"codes": 4.0, "second level": 0.002}}
    figure, shown = drawn(codebooks.storage_bars, rows)
    (ax,) = figure.axes
    assert [bar.get_width() for bar in ax.patches] == pytest.approx([0.5, 0.002])
    assert texts(ax) == ["0.5", "0.002"]
    assert ax.get_xlim()[0] == 0
    assert tick_words(ax.yaxis) == ["NF4: 4.5 bits", "both: 4.002 bits"]
    words = [text.get_text() for text in figure.legends[0].get_texts()]
    assert words == ["scales", "second level (0.002: too thin to see)"]
    assert "NF4 4.5 (codes 4, scales 0.5)" in shown.alt


def test_equal_bits_joins_blocks_of_one_size():
    curves = {
        "affine": ("affine", [(32, 4.6, 0.08), (64, 4.3, 0.1)]),
        "NF4, double quantization": ("nf4", [(64, 4.1, 0.09), (32, 4.25, 0.085)]),
    }
    figure, shown = drawn(codebooks.equal_bits, curves)
    (ax,) = figure.axes
    first, second, affine, double = ax.lines
    assert points(first) == [(4.25, 0.085), (4.6, 0.08)]  # blocks of 32
    assert points(second) == [(4.1, 0.09), (4.3, 0.1)]
    assert texts(ax) == ["32", "64"]
    assert [text.xy for text in ax.texts] == [(4.25, 0.085), (4.1, 0.09)]
    assert points(affine) == [(4.6, 0.08), (4.3, 0.1)]
    assert double.get_linestyle() == "--"
    assert "affine 0.1 at 4.3 bits; NF4, double quantization 0.085 at 4.25 bits" in shown.alt


def test_error_chart_has_a_dot_for_each():
    table = {"Gaussian": {"absmax": 0.108, "nf4": 0.092}, "uniform": {"absmax": 0.05, "nf4": 0.06}}
    figure, shown = drawn(codebooks.error_chart, table)
    (ax,) = figure.axes
    assert points(line_of(ax, "absmax")) == [(0.108, 0), (0.05, 1)]
    assert points(line_of(ax, "NF4")) == [(0.092, 0), (0.06, 1)]
    assert tick_words(ax.yaxis) == list(table)
    assert "NF4 on Gaussian, absmax on uniform" in shown.alt


def test_error_sources_add_up_to_the_error():
    weight = torch.randn(64, 576, generator=torch.Generator().manual_seed(2))
    blocks = weight.view(-1, 64)
    absmax = blocks.abs().amax(1, keepdim=True)
    data = {"nf4": nf4_code_book()}, blocks / absmax, absmax.expand(-1, 64)
    figure, shown = drawn(codebooks.error_sources, *data)
    curve = line_of(figure.axes[0], "NF4").get_ydata()
    total = relative_rmse(weight, quantize_codebook(weight).dequantize()) ** 2
    assert curve[-1] == pytest.approx(total, rel=1e-4)  # the package works in float32
    assert (np.diff(curve) >= 0).all()
    assert f"{total:.2g} in all" in shown.alt


# --- notebook 04 ------------------------------------------------------------------------------


def test_outlier_map_sorts_the_channels():
    relative = 6 * torch.rand(5, 50, generator=torch.Generator().manual_seed(0)).numpy()
    figure, shown = drawn(activations.outlier_map, list("abcde"), relative)
    profile, ax = figure.axes[:2]
    typical = np.sort(np.median(relative, 0))[::-1][: activations.MAPPED]
    assert np.array_equal(profile.lines[0].get_ydata(), typical)
    image = ax.images[0].get_array()
    assert np.array_equal(np.median(np.asarray(image), 0), typical)
    often = sum((column > 4).sum() >= 3 for column in relative.T)
    assert f"; {often} channels exceed 4 times the median" in shown.alt
    assert "The 40 largest of 50 input channels in 5 layers" in shown.alt


# --- notebook 06 ------------------------------------------------------------------------------


def test_the_valley_shows_the_losses_of_its_points():
    figure, shown = drawn(
        gptq_plots.valley, torch.tensor([2.4, 1.4]), torch.tensor([[1.0, 0.9], [0.9, 1.0]]),
        {"nearest": (2, 1), "gptq": (2, 2)}, [(2, 1.76), (2, 2)],
    )  # fmt: skip
    (ax,) = figure.axes
    places = [points(line) for line in ax.lines]
    assert [[2, 1]] in np.array(places[-2:]).tolist()
    assert [[2, 2]] in np.array(places[-2:]).tolist()
    assert {"round to nearest: loss 0.61", "GPTQ: loss 0.09"} < set(texts(ax))
    arrows = [tuple(np.round([*text.xyann, *text.xy], 4)) for text in arrows_of(ax)]
    assert arrows == [(2.4, 1.4, 2, 1.76), (2, 1.76, 2, 2)]
    assert "round to nearest 0.61, GPTQ 0.09" in shown.alt


def test_a_hessian_is_drawn_over_its_median():
    loud = torch.eye(100)
    loud[3, 3] = 1000.0
    figure, shown = drawn(gptq_plots.hessians, {"one": loud})
    image = figure.axes[0].images[0].get_array()
    assert image.max() == image[1, 1] == 1000  # one of 32 patches
    assert (np.delete(image.diagonal(), 1) == 1).all()
    assert "one about 10^3" in shown.alt


def test_damping_has_a_curve_for_each_text():
    losses = {"seen": [1e-4, 1e-3, 1e-2], "unseen": [2e-2, 1e-2, 2e-2]}
    figure, shown = drawn(gptq_plots.damping, [0.001, 0.01, 1], losses, 0.03)
    (ax,) = figure.axes
    for label, values in losses.items():
        assert line_of(ax, f"GPTQ, {label}").get_ydata().tolist() == values
    assert set(line_of(ax, "round to nearest, held-out text").get_ydata()) == {0.03}
    assert points(ax.lines[-1]) == [(0.01, 1e-2)]  # the ring around the least
    assert "held-out loss is lowest at 0.01, with 0.01; round to nearest has 0.03" in shown.alt


def test_loss_ratios_have_a_panel_for_each_text_and_a_row_for_each_layer():
    ratios = {"a": {"plain": 0.5, "ordered": 0.6}, "b": {"plain": 0.9, "ordered": 0.01}}
    unseen = {"a": {"plain": 1.5, "ordered": 1.6}, "b": {"plain": 1.2, "ordered": 0.02}}
    figure, shown = drawn(gptq_plots.loss_ratios, {"seen": ratios, "unseen": unseen})
    left, right = figure.axes
    assert points(line_of(left, "GPTQ, plain")) == [(0.5, 0), (0.9, 1)]
    assert points(line_of(left, "GPTQ, ordered")) == [(0.6, 0), (0.01, 1)]
    assert points(line_of(right, "GPTQ, ordered")) == [(1.6, 0), (0.02, 1)]
    assert set(line_of(right, "round to nearest").get_xdata()) == {1}
    assert tick_words(left.yaxis) == ["a", "b"]
    assert (left.get_title(), right.get_title()) == ("seen", "unseen")
    assert "seen: above rounding's plain in 0, ordered in 0 of 2 rows" in shown.alt
    assert "unseen: above rounding's plain in 2, ordered in 1 of 2 rows" in shown.alt


def test_paired_differences_lie_beside_their_baseline():
    rows = {"GPTQ": (-0.1, -0.15, -0.05), "NF4": (0.02, -0.01, 0.05), "another": (-0.2, -0.3, -0.1)}
    figure, shown = drawn(gptq_plots.paired, rows, "round to nearest")
    (ax,) = figure.axes
    baseline, *dots = ax.lines
    assert set(baseline.get_xdata()) == {0}
    assert [points(line) for line in dots] == [[(-0.1, 0)], [(0.02, 1)], [(-0.2, 2)]]
    bars = [segment[:, 0].tolist() for each in ax.collections for segment in each.get_segments()]
    assert bars == [list(interval) for _, *interval in rows.values()]
    assert tick_words(ax.yaxis) == list(rows)
    assert texts(ax) == ["−0.100", "+0.020", "−0.200"]
    assert "KL minus that of round to nearest. GPTQ -0.100 (-0.150 to -0.050); NF4" in shown.alt


def test_amounts_have_a_curve_for_each_text_and_a_line_for_each_method():
    curves = {"news": {1: 0.4, 16: 0.25}, "encyclopedia": {1: 0.35, 16: 0.2}}
    lines = {"round to nearest": 0.5, "NF4": 0.3, "round to nearest, clip search": 0.4}
    figure, shown = drawn(gptq_plots.amounts, curves, lines)
    (ax,) = figure.axes
    for label, expected in curves.items():
        assert points(line_of(ax, f"GPTQ, clip search, {label}")) == list(expected.items())
    for label, value in lines.items():
        assert set(line_of(ax, label).get_ydata()) == {value}
        assert line_of(ax, label).get_linestyle() == ("--" if "," in label else "-")
    assert "news from 0.40 with 1 to 0.25 with 16" in shown.alt


# --- notebook 07 ------------------------------------------------------------------------------


def test_three_histograms_are_densities():
    weight = torch.randn(4000, generator=torch.Generator().manual_seed(0))
    figure, shown = drawn(distributions.three_histograms, weight, weight, weight.round(), bins=40)
    for ax in figure.axes:
        assert len(ax.patches) == 40
        area = sum(bar.get_width() * bar.get_height() for bar in ax.patches)
        assert area == pytest.approx(1)
    teeth = max(bar.get_height() for bar in figure.axes[2].patches)
    assert f"reach {teeth:.0f}" in shown.alt
    assert figure.axes[2].get_xlabel() == f"weight: {len(weight.round().unique())} distinct values"


def test_code_bars_count():
    figure, shown = drawn(distributions.code_bars, {"INT4": (np.arange(-8, 8), np.arange(16))})
    bars = [(bar.get_x() + bar.get_width() / 2, bar.get_height()) for bar in figure.axes[0].patches]
    assert bars == [(code, code + 8) for code in range(-8, 8)]
    assert "INT4, 15 of 16 codes in use" in shown.alt


# --- notebook 08 ------------------------------------------------------------------------------


def test_pareto_has_a_point_for_each_row():
    rows = summary.comparable(summary.rows())
    front = summary.front(rows)
    figure, shown = drawn(summary_plots.pareto, rows, front)
    edge, *lines = figure.axes[0].lines
    marked = [line for line in lines if line.get_marker() not in ("", "None", "_", "|")]
    marked += [line for line in lines if line.get_gid() == "method:libraries"]
    drawn_at = sorted({point for line in marked for point in points(line)})
    least = summary_plots.LEAST
    assert drawn_at == sorted(
        {(row.bits_per_weight, max(row.kl.value, least)) for row in rows.values()}
    )
    assert points(edge) == [(row.bits_per_weight, max(row.kl.value, least)) for row in front]
    assert f"{len(rows)} rows" in shown.alt
    assert f"the {len(front)} rows that no other row beats" in shown.alt
    assert {each.family for each in rows.values()} <= set(summary_plots.FAMILIES)
    for family, method in summary_plots.FAMILIES.items():
        assert method_named(family) in (None, method)


def test_the_named_part_has_names_and_intervals():
    rows = summary.comparable(summary.rows())
    front = summary.front(rows)
    figure, shown = drawn(summary_plots.pareto_named, rows, front, others=["NF4"])
    (ax,) = figure.axes
    inside = [row for row in rows.values() if 3 <= row.bits_per_weight <= 6.5 and row.kl.value <= 2]
    marked = {point for line in ax.lines[1:] for point in points(line)}
    assert marked == {(row.bits_per_weight, row.kl.value) for row in inside}
    bars = [s for lines in ax.collections for s in lines.get_segments()]
    expected = sorted(row.kl.interval for row in inside)
    np.testing.assert_allclose(sorted(tuple(bar[:, 1]) for bar in bars), expected)
    named = {text.xy: text.get_text() for text in ax.texts}
    assert set(named) == {
        (row.bits_per_weight, row.kl.value) for row in inside if row in front or row.name == "NF4"
    }
    awq = rows["AWQ INT4, groups of 64"]
    assert named[awq.bits_per_weight, awq.kl.value] == "AWQ INT4 g64"
    assert all(row.name in shown.alt for row in front if row in inside)


def test_loss_over_size_has_curves_and_our_points():
    figure, shown = drawn(
        summary_plots.loss_over_size,
        {"GPTQ, OPT": ("gptq", {0.1: 30.0, 1.0: 250.0, 100.0: 0.5})},
        {"round to nearest, ours": ("nearest", (0.135, 25.0))},
    )
    (ax,) = figure.axes
    left, gap, right = points(line_of(ax, "GPTQ, OPT"))
    assert (left, right) == ((0.1, 30), (100, 0.5))
    assert np.isnan(gap[1])  # no line leads to what lies beyond the axis
    (arrow,) = arrows_of(ax)
    assert arrow.get_position()[0] == 1
    assert "250%" in texts(ax)
    assert "GPTQ, OPT, arrow: 250% at 1 billion" in shown.alt
    assert points(line_of(ax, "round to nearest, ours")) == [(0.135, 25)]
    assert "GPTQ, OPT: 30% at 0.1 billion, 0.5% at 100 billion" in shown.alt
    assert "round to nearest, ours: 25% at 0.135 billion" in shown.alt


# --- notebook 09 ------------------------------------------------------------------------------


def test_loss_curves_mark_the_best():
    losses = {"mlp": [2.0, 1.0, 4.0], "attention": [1.0, 2.0, 3.0]}
    figure, shown = drawn(awq.loss_curves, (0.0, 0.5, 0.9), losses)
    mlp, best, attention, other, rounding_to_nearest = figure.axes[0].lines
    assert points(mlp) == [(0, 1), (0.5, 0.5), (0.9, 2)]
    assert points(best) == [(0.5, 0.5)]
    assert points(attention) == [(0, 1), (0.5, 2), (0.9, 3)]
    assert points(other) == [(0, 1)]
    assert set(rounding_to_nearest.get_ydata()) == {1}
    assert "mlp is best at r = 0.50 with 0.5; attention is best at r = 0.00 with 1." in shown.alt
    assert not texts(figure.axes[0])


def test_loss_curves_name_the_edge_and_dash_what_is_held_out():
    losses, ordinary = {"mlp": [4.0, 2.0, 1.0]}, {"mlp": [1.0, 2.0, 3.0]}
    figure, shown = drawn(awq.loss_curves, (0.0, 0.5, 0.9), losses, ordinary)
    mlp, best, dashed, *_ = figure.axes[0].lines
    assert points(best) == [(0.9, 0.25)]
    assert points(dashed) == [(0, 1), (0.5, 2), (0.9, 3)]
    assert (mlp.get_linestyle(), dashed.get_linestyle()) == ("-", "--")
    assert mlp.get_color() == dashed.get_color()
    assert texts(figure.axes[0]) == ["edge of the search"]
    assert "with 0.25, the edge of the search (3 held-out, no first tokens)." in shown.alt


def test_scale_curve_marks_the_best():
    figure, shown = drawn(awq.scale_curve, [1, 2, 4], [0.3, 0.1, 0.2])
    curve, best = figure.axes[0].lines
    assert points(curve) == [(1, 0.3), (2, 0.1), (4, 0.2)]
    assert points(best) == [(2, 0.1)]
    assert "at best 0.1 at s = 2" in shown.alt


# --- notebook 10 ------------------------------------------------------------------------------


def test_bytes_are_written_in_their_places():
    figure, shown = drawn(gguf.file_bytes, b"GGUF\3\0\0\0", [("magic", 4), ("version", 4)])
    written = {text.get_position(): text.get_text() for text in figure.axes[0].texts}
    assert [written[place + 0.5, 0.36] for place in range(8)] == "47 47 55 46 03 00 00 00".split()
    assert "".join(written[place + 0.5, 0.76] for place in range(4)) == "GGUF"
    assert "magic (4 bytes), version (4 bytes)" in shown.alt


def test_a_block_is_written_half_by_half():
    block = bytes([0, 0x3C, 0, 0xBC, *range(0x10, 0x20)])
    figure, shown = drawn(gguf.block_bytes, block, ["d", "m"])
    written = {text.get_position(): text.get_text() for text in figure.axes[0].texts}
    assert (written[1, 1.4], written[3, 1.4]) == ("1", "-1")
    assert [written[4.5 + place, 0.5] for place in range(16)] == [str(code) for code in range(16)]
    assert {written[4.5 + place, 1.5] for place in range(16)} == {"1"}
    assert (written[4.5, -0.35], written[4.5, 2.5]) == ("w0", "w16")
    assert "d and m in two bytes each" in shown.alt


def test_block_grids_show_the_errors_to_the_nearest_level():
    values, grids = [0.5, -1.0, 1.0], {"near": [-1.0, 0.0, 1.0], "far": [-9.0, 9.0]}
    figure, shown = drawn(gguf.block_grids, values, grids)
    above, below = figure.axes[:2], figure.axes[2:]
    for ax, levels in zip(above, grids.values(), strict=True):
        assert [segment[0, 1] for segment in ax.collections[0].get_segments()] == levels
        assert points(ax.lines[0]) == list(enumerate(values))
    heights = [[bar.get_height() for bar in ax.patches] for ax in below]
    assert heights == [[-0.5, 0, 0], [8.5, -8, 8]]
    assert "near, 3 of 3 levels within the weights' range, relative RMSE 33.3%" in shown.alt
    assert "far, 0 of 2 levels" in shown.alt


def test_fields_are_named_above_their_first_byte():
    fields = [("magic", 4), ("count", 16), ("rest", 2)]
    figure, _ = drawn(gguf.file_bytes, bytes(22), fields)
    named = {
        t.get_text(): t.get_position() for t in figure.axes[0].texts if t.get_weight() == "bold"
    }
    assert [round(x) for x, _ in named.values()] == [0, 4, 4]
    assert named["magic"][1] == named["count"][1] < named["rest"][1]


def test_formats_lie_beside_the_curves():
    curves = {"NF4": ("nf4", [(4.25, 0.1), (4.5, 0.09)])}
    kinds = {"Q4_0": (4.5, 0.08, "Q4_0"), "Q4_K": (4.5, 0.07, "Q4_K, ours")}
    figure, shown = drawn(gguf.formats_over_bits, curves, kinds)
    (ax,) = figure.axes
    assert [points(line) for line in ax.lines] == [
        [(4.25, 0.1), (4.5, 0.09)],
        [(4.5, 0.08)],
        [(4.5, 0.07)],
    ]
    assert texts(ax) == ["Q4_0", "Q4_K, ours"]
    assert "Q4_K, ours 0.07 at 4.5 bits" in shown.alt


def test_block_sizes_have_both_curves():
    figure, shown = drawn(gguf.block_sizes, [(16, 5, 0.08), (32, 4.5, 0.1)])
    assert [points(ax.lines[0]) for ax in figure.axes] == [
        [(16, 5), (32, 4.5)],
        [(16, 0.08), (32, 0.1)],
    ]
    assert "32: 4.5 bits, 10.0%" in shown.alt


def test_top_levels_colours_what_lies_beyond():
    figure, shown = drawn(gguf.top_levels, [4.5, 7.0], 6)
    (ax,) = figure.axes
    tall = {bar.get_x(): bar for bar in ax.patches if bar.get_height()}
    assert list(tall) == [4.5, 7.0]
    assert tall[4.5].get_facecolor() != tall[7.0].get_facecolor()
    assert ax.lines[0].get_xdata()[0] == 6
    assert "50% of the blocks reach beyond" in shown.alt
