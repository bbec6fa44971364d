"""Every picture of the course once, small: what tests that walk all pictures walk.

A new picture needs an entry here; `test_looks.py` says so when it has none.
"""

from contextlib import contextmanager

import numpy as np
import torch
from tiny import normal, toy_model, weight

from chapter13 import summary
from chapter13.explorers import (
    absmax,
    activations,
    awq,
    codebooks,
    distributions,
    formats,
    gguf,
    gptq,
    granularity,
    text,
)
from chapter13.explorers.summary import explore_choice
from chapter13.integer import quantize_absmax
from chapter13.plots import activations as activation_plots
from chapter13.plots import awq as awq_plots
from chapter13.plots import codebooks as code_book_plots
from chapter13.plots import distributions as distribution_plots
from chapter13.plots import formats as format_plots
from chapter13.plots import gguf as gguf_plots
from chapter13.plots import gptq as gptq_plots
from chapter13.plots import granularity as granularity_plots
from chapter13.plots import picture, rounding, shapes
from chapter13.plots import summary as summary_plots
from chapter13.plots.absmax import AbsmaxFigure
from chapter13.plots.text import TextFigure
from chapter13.tables import fp4_code_book, nf4_code_book

W = weight()
INT8 = quantize_absmax(W, 8).dequantize()
INT4 = quantize_absmax(W, 4).dequantize()
CASTS = {"fp16": W.half(), "bf16": W.bfloat16()}
BOOKS = {"absmax": np.arange(-7, 8) / 7, "nf4": nf4_code_book(), "fp4": fp4_code_book().sort()[0]}
BOOKS["e2m1"] = np.array([-6, -4, -3, -2, -1.5, -1, -0.5, 0, 0.5, 1, 1.5, 2, 3, 4, 6]) / 6
BREAKDOWN = {"linears": 5e6, "scales": 2e5, "embeddings": 1e6, "rest": 1e5}
COUNTS = (np.arange(-8, 8), np.arange(16))
SIZES = {"fp32": 4.0, "fp16": 2.0, "int8": 1.0, "int4": 0.6}
CURVES = {
    "absmax": ("absmax", [(32, 4.5, 0.10), (64, 4.25, 0.11)]),
    "affine": ("affine", [(32, 4.6, 0.09), (64, 4.3, 0.10)]),
    "NF4": ("nf4", [(32, 5.0, 0.08), (64, 4.5, 0.09)]),
    "NF4, double quantization": ("nf4", [(32, 4.2, 0.085), (64, 4.1, 0.095)]),
}
KL = {
    "round to nearest": (0.37, 0.3, 0.45),
    "NF4": (0.32, 0.25, 0.4),
    "GPTQ": (0.21, 0.15, 0.3),
    "GPTQ, clip search": (0.17, 0.12, 0.25),
    "AWQ": (0.16, 0.12, 0.2),
}
INT8_KL = {
    "absmax, weights only": 0.0037,
    "per tensor": 1.4,
    "per token": 0.04,
    "static, min-max": 0.9,
    "LLM.int8()": 0.025,
    "SmoothQuant + per token": 0.02,
}
ERRORS = {"absmax": 0.11, "affine": 0.09, "nf4": 0.092, "fp4": 0.12, "e2m1": 0.106}
PAIRS = [(2.0, 0.5), (3.0, 0.2)]
UNIT = normal(40, 64) / 4


def _spacing():
    magnitudes = np.logspace(-8, 4, 60)
    return {"fp16": (magnitudes[:40], magnitudes[:40] / 1024), "bf16": (magnitudes, magnitudes / 9)}


def _frontier(draw, **words):
    rows = summary.comparable(summary.rows())
    return draw(rows, summary.front(rows), **words)


# the picture's function -> calls of it
PICTURES = {
    rounding.whole_grid: lambda draw: draw([1.27, -0.5, 0.0042, 0.0535], 0.01),
    rounding.error_histogram: lambda draw: draw(normal(4000).numpy() % 1 - 0.5, 1),
    rounding.sqnr_over_bits: lambda draw: draw([2, 3, 4], [1.0, 7.5, 14.2], [-2.0, 7.0, 14.0]),
    rounding.layers_sqnr: lambda draw: draw(
        {"a": 5.0, "b": 10.0, "c": 40.0}, {"a": 39.0, "b": 33.0, "c": 21.0}, {"b": "middle"}
    ),
    format_plots.parameter_shares: lambda draw: draw(
        {"one": {"embeddings": 3, "attention": 4, "MLP": 8, "norms": 1, "head": 3}}
    ),
    format_plots.spacing: lambda draw: draw(_spacing()),
    format_plots.cast_errors: lambda draw: draw(W, CASTS),
    format_plots.held_values: lambda draw: draw(
        {"int8 / 127": np.arange(-9, 9), "fp8 / 448": np.arange(5)}
    ),
    format_plots.relative_steps: lambda draw: draw(W, CASTS | {"int8": INT8}),
    format_plots.bytes_left: lambda draw: draw(
        {"one": {"codes": 40.0, "kept": 10.0}, "other": {"codes": 12.0, "scales": 1, "kept": 10.0}}
    ),
    format_plots.kv_cache: lambda draw: draw(
        [1024, 8192], {"a": [1, 8], "b": [0.5, 4], "c": [0.1, 1], "d": [2, 9]}
    ),
    format_plots.sizes_and_cards: lambda draw: draw({"one": SIZES, "two": SIZES}, {"card": 24}),
    granularity_plots.shared_scales: lambda draw: draw(
        np.arange(8.0).reshape(2, 4), {"error per row": (np.ones((2, 4)), (1, 4))}
    ),
    granularity_plots.largest_of: lambda draw: draw([1, 10], [0.8, 1.8], {"a row": (5, 1.234)}),
    granularity_plots.row_absmax: lambda draw: draw({"a": [3.0, 1.0], "b": [2.0, 9.0]}),
    granularity_plots.grids: lambda draw: draw(
        [0.0, 0.75], (np.arange(-1, 2), [0.0, 1.0]), (np.arange(4) / 4, [0.0, 0.75])
    ),
    granularity_plots.error_maps: lambda draw: draw({"a": INT4.abs(), "b": INT8.abs()}),
    granularity_plots.frontier: lambda draw: draw(
        {"absmax": {2: PAIRS}, "affine": {2: [(2.5, 0.4), (3.5, 0.15)]}}, PAIRS
    ),
    code_book_plots.code_counts: lambda draw: draw(np.arange(16)),
    code_book_plots.bit_stream: lambda draw: draw(range(8), bits=3),
    code_book_plots.weights_and_levels: lambda draw: draw(UNIT, BOOKS),
    code_book_plots.equal_slices: lambda draw: draw([-np.inf, -1, 1, np.inf], [-1.5, 0, 1.5]),
    code_book_plots.code_books: lambda draw: draw(BOOKS),
    code_book_plots.storage_bars: lambda draw: draw(
        {"NF4": {"codes": 4.0, "scales": 0.5}, "NF4, double": {"codes": 4.0, "second level": 0.002}}
    ),
    code_book_plots.equal_bits: lambda draw: draw(CURVES),
    code_book_plots.error_chart: lambda draw: draw({"Gaussian": ERRORS, "uniform": ERRORS}),
    code_book_plots.error_sources: lambda draw: draw(
        {name: BOOKS[name] for name in ("absmax", "nf4")}, UNIT, np.ones(UNIT.shape)
    ),
    activation_plots.outlier_map: lambda draw: draw(["a", "b"], np.abs(INT4[:2].numpy())),
    distribution_plots.three_histograms: lambda draw: draw(W, INT8, INT4),
    distribution_plots.same_data: lambda draw: draw(INT8, [80, 255]),
    distribution_plots.code_bars: lambda draw: draw({"INT4": COUNTS, "INT4 again": COUNTS}),
    distribution_plots.error_shapes: lambda draw: draw({"4 bits": W % 1, "3 bits": W % 1}),
    distribution_plots.histogram_pair: lambda draw: draw(W, INT4),
    distribution_plots.qq: lambda draw: draw({"INT4": ([-1, 0, 1], [-1, 0, 0.9])}, "a", "b"),
    distribution_plots.tails: lambda draw: draw({"normal": UNIT, "heavy": UNIT**3}),
    awq_plots.loss_curves: lambda draw: draw(
        (0.0, 0.5, 0.9),
        {"mlp": [4.0, 2.0, 1.0], "attention": [1.0, 2.0, 3.0]},
        {"mlp": [1.0, 2.0, 3.0]},
    ),
    awq_plots.scale_curve: lambda draw: draw([1, 2, 4], [0.3, 0.1, 0.2]),
    gptq_plots.valley: lambda draw: draw(
        torch.tensor([2.4, 1.4]),
        torch.tensor([[1.0, 0.9], [0.9, 1.0]]),
        {"nearest": (2, 1), "gptq": (2, 2)},
        [(2, 1.76), (2, 2)],
    ),
    gptq_plots.hessians: lambda draw: draw({"one": torch.eye(100)}),
    gptq_plots.damping: lambda draw: draw(
        [0.001, 0.01, 1], {"seen": [1e-4, 1e-3, 1e-2], "unseen": [2e-2, 1e-2, 2e-2]}, 0.03
    ),
    gptq_plots.loss_ratios: lambda draw: draw(
        {"text": {"a": {"plain": 0.5, "ordered": 0.6}, "b": {"plain": 0.9, "ordered": 0.01}}}
    ),
    gptq_plots.paired: lambda draw: draw(
        {"GPTQ": (-0.1, -0.15, -0.05), "AWQ": (-0.2, -0.25, -0.1), "another": (0.1, 0, 0.2)},
        "round to nearest",
    ),
    gptq_plots.amounts: lambda draw: draw(
        {"news": {1: 0.4, 16: 0.25}, "encyclopedia": {1: 0.35, 16: 0.2}},
        {"round to nearest": 0.5, "NF4": 0.3},
    ),
    gguf_plots.file_bytes: lambda draw: draw(b"GGUF\3\0\0\0", [("magic", 4), ("version", 4)]),
    gguf_plots.block_bytes: lambda draw: draw([0, 0x3C, 0, 0xBC, *range(16)], ["d", "m"]),
    gguf_plots.block_grids: lambda draw: draw(
        [0.5, -1.0, 1.0], {"near": [-1.0, 0.0, 1.0], "far": [-9.0, 9.0]}
    ),
    gguf_plots.formats_over_bits: lambda draw: draw(
        {"NF4": ("nf4", PAIRS)}, {"Q4_0": (4.5, 0.3, "Q4_0"), "Q4_K": (4.5, 0.2, "Q4_K, ours")}
    ),
    gguf_plots.block_sizes: lambda draw: draw([(16, 5, 0.08), (32, 4.5, 0.1), (64, 4.25, 0.11)]),
    gguf_plots.top_levels: lambda draw: draw([4.5, 5, 5, 7.0], 6),
    summary_plots.pareto: lambda draw: _frontier(draw),
    summary_plots.pareto_named: lambda draw: _frontier(draw, others=("NF4", "GGUF MXFP4")),
    summary_plots.loss_over_size: lambda draw: draw(
        {"GPTQ, OPT": ("gptq", {0.1: 30.0, 1.0: 250.0, 100.0: 0.5})},
        {"round to nearest, ours": ("nearest", (0.135, 25.0))},
    ),
    shapes.memory_bars: lambda draw: draw({"float32": BREAKDOWN, "NF4": BREAKDOWN}),
    shapes.stacked_bars: lambda draw: draw({"a": {"codes": 1.0}}, "GB", "one bar", end="{:.1f}"),
    shapes.dots: lambda draw: [draw(KL, "KL"), draw(INT8_KL, "KL", log=True)][-1],
}


def _layer():
    x = torch.randn(6, 16, W.shape[1], generator=torch.Generator().manual_seed(1))
    return gptq.Layer(W, {"a": x[:4], "b": x[2:] ** 3}, x[:2])


# name -> its live figure, and a function that makes the panel on small weights; close it
PANELS = {
    "formats": (format_plots.MemoryFigure, formats.explore_memory),
    "formats, number": (format_plots.BitsFigure, formats.explore_number),
    "absmax": (AbsmaxFigure, lambda: absmax.explore_absmax(W)),
    "granularity": (
        granularity_plots.GranularityFigure,
        lambda: granularity.explore_granularity(W),
    ),
    "codebooks": (code_book_plots.CodeBookFigure, lambda: codebooks.explore_codebooks(W)),
    "distributions": (
        distribution_plots.DistributionsFigure,
        lambda: distributions.explore_distributions(W),
    ),
    "activations": (
        activation_plots.ActivationsFigure,
        lambda: activations.explore_activations({"a": (50 * W, W)}),
    ),
    "awq": (awq_plots.AwqFigure, lambda: awq.explore_awq({"a": (50 * W, W)}, {"a": 50 * W[None]})),
    "gguf": (gguf_plots.GGUFFigure, lambda: gguf.explore_gguf(W)),
    "text": (TextFigure, lambda: text.explore_text(*toy_model())),
    "gptq, columns": (gptq_plots.ColumnsFigure, lambda: gptq.explore_columns(W[:4, :8])),
    "gptq": (gptq_plots.LayerFigure, lambda: gptq.explore_layer({"one": _layer()})),
    "summary": (summary_plots.ChoiceFigure, lambda: explore_choice(summary.rows())),
}


@contextmanager
def kept_figures():
    """A list of the figures of all pictures made inside the `with` block."""
    made, pixels = [], picture.pixels

    def keep(figure):
        made.append(figure)
        return pixels(figure)

    picture.pixels = keep
    try:
        yield made
    finally:
        picture.pixels = pixels


def drawn(draw, *data, **words):
    """(the figure that `draw(*data)` drew, the picture it returned)."""
    with kept_figures() as made:
        shown = draw(*data, **words)
    return made[-1], shown
