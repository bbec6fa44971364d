"""The explorer of notebook 07: what quantization does to the distribution of a layer's weights."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from statistics import NormalDist

import ipywidgets as widgets
import numpy as np
import torch

from chapter13 import awq, gptq
from chapter13.corpus import calibration_tokens, evaluation_tokens
from chapter13.explorers import layers
from chapter13.explorers.base import Explorer, lines
from chapter13.explorers.gptq import calibrate
from chapter13.explorers.layers import (
    GroupSizeSlider,
    choose,
    drawn,
    explore,
    group_words,
    outlier_slider,
    quantize,
    relative_and_db,
    take,
    with_outlier,
)
from chapter13.integer import quantize_affine
from chapter13.measures import max_abs_error, mse
from chapter13.models import LINEARS, linear_weights, load
from chapter13.plots.distributions import DistributionsFigure, percent
from chapter13.plots.picture import METHOD_LOOK
from chapter13.tables import CODE_BOOKS
from chapter13.tensors import QuantizedTensor
from chapter13.whole_model.walk import Walk

AWQ_TOKENS = 128  # that judge a scale: it is searched anew at each move
SEQUENCES, LENGTH = 4, 256  # of calibration text
HELD_OUT = 2  # sequences of the evaluation text
# Histograms have 121 bins out to 4.5 standard deviations; zero lies in the middle of a bin.
EDGES = np.linspace(-4.5, 4.5, 122)
# 201 probabilities: those with which a normal variable stays below -3.5, -3.465, .. 3.5 sigma
PROBABILITIES = np.array([NormalDist().cdf(z) for z in np.linspace(-3.5, 3.5, 201)])
GROUP_SIZES = [None, "channel", 128, 64, 32, 16]


@dataclass(frozen=True)
class LayerInputs:
    """What reaches a layer from two texts."""

    x: torch.Tensor
    """float32 (tokens, in_features), of the calibration text."""
    hessian: torch.Tensor
    """(in_features, in_features), of the calibration text."""
    held_out: torch.Tensor
    """The Hessian of a text that no method learns from."""


def _gptq(weight, inputs, bits, group_size):
    quantized = gptq.quantize(weight, inputs.hessian, bits, group_size)
    return quantized, quantized.dequantize()


def _awq(weight, inputs, bits, group_size):
    x = inputs.x[:: -(-len(inputs.x) // AWQ_TOKENS)]
    activation = x.abs().mean(0)
    outputs = lambda weights: (x @ W.T for W in weights)  # noqa: E731
    s = awq.search_scale(activation, [weight], outputs, bits, group_size).s
    quantized = quantize_affine(weight * s, bits, group_size)
    return quantized, quantized.dequantize() / s


# name -> function of (weight, LayerInputs, bits, group size): (quantized, the approximate weight)
WEIGHT_LEARNERS = {"gptq": _gptq, "awq": _awq}
METHOD_LABELS = layers.METHOD_LABELS | {name: METHOD_LOOK[name].label for name in WEIGHT_LEARNERS}


@dataclass(frozen=True)
class Layer(layers.Layer):
    """A weight, and what is needed of it at every move; made by `prepare`."""

    sigma: float
    """Standard deviation; 1 where all weights are equal."""
    density: np.ndarray
    """The weights' histogram: (121,) densities on EDGES, in standard deviations."""
    quantiles: np.ndarray
    """The weights' quantiles at PROBABILITIES, in standard deviations."""
    drawn: torch.Tensor
    """int64: which of the flattened weights are drawn."""
    inputs: Callable[[], LayerInputs] | None
    """What reaches the layer, asked for when a method first learns from it; None: not known."""


@dataclass(frozen=True)
class View:
    """What the explorer shows at one position of its controls."""

    layer: Layer
    method: str
    bits: int
    code_counts: np.ndarray
    """How many weights have each of the 2**bits codes, from the lowest level to the highest."""
    used: int
    entropy: float
    """Of the codes, in bits."""
    levels: np.ndarray
    """With a single scale: the values that were drawn, ascending, in σ. Else empty."""
    edges: np.ndarray
    """Of the bins of the reconstruction's histogram, in σ: EDGES, or halfway between levels."""
    density: np.ndarray
    """The reconstruction's histogram: densities on `edges`, in standard deviations."""
    zeros: float
    """Share of the weights that become exactly 0."""
    relative_error: float
    """The root mean square of the error, over that of the weights."""
    error_density: np.ndarray
    """The error's histogram: densities on EDGES, in units of the error's root mean square."""
    quantiles: np.ndarray
    """The reconstruction's quantiles at PROBABILITIES, in the weights' standard deviations."""
    output_losses: tuple[float, float] | None
    """Of a learned method: the layer loss on held-out text, and that of affine rounding."""
    readout: str
    alt: str


def entropy(counts: np.ndarray) -> float:
    """-sum(p log2 p) in bits, of how often each code occurs (Shannon 1948).

    The least number of bits per code that a lossless compressor needs, taking codes one by one.

    >>> entropy(np.array([5, 5, 5, 5])), entropy(np.array([20, 0, 0, 0]))
    (2.0, 0.0)
    """
    shares = counts[counts > 0] / counts.sum()
    return float(abs(np.sum(shares * np.log2(shares))))


def count_codes(quantized: QuantizedTensor) -> np.ndarray:
    """How many weights have each code, from the lowest level to the highest, int64 (2**bits,)."""
    codes, bits = quantized.codes().view(-1), quantized.bits
    counts = torch.bincount(codes.view(torch.uint8), minlength=256)
    if quantized.kind == "absmax":  # a code's byte is its two's complement: 0, 1, .. 127, -128, ..
        half = 1 << (bits - 1)
        counts = torch.cat([counts[256 - half :], counts[:half]])
    elif quantized.kind in CODE_BOOKS:
        counts = counts[quantized.code_book.argsort(stable=True)]
    return counts[: 1 << bits].numpy()


def prepare(weight: torch.Tensor, inputs: Callable[[], LayerInputs] | None = None) -> Layer:
    """Everything about a weight (out_features, in_features) that no control changes.

    inputs: as in a Layer. Raises as `take`.
    """
    layer = take(weight)
    sigma = layer.weight.std(correction=0).item() or 1.0
    places = drawn(layer.weight.numel())
    values = np.sort(layer.weight.view(-1)[places].numpy())
    return Layer(
        **vars(layer),
        sigma=sigma,
        density=_density(values, sigma),
        quantiles=_quantiles(values) / sigma,
        drawn=places,
        inputs=inputs,
    )


def view(
    layer: Layer, method: str, bits: int, group_size: int | str | None, outlier: float
) -> View:
    """The layer, its largest weight made `outlier` times larger, quantized as the rest says.

    What it is compared with (σ, gray histograms, the Q-Q plot's horizontal axis, the SQNR's signal)
    is the given weight, without the outlier: otherwise a single outlier would hide all other
    errors.
    Raises ValueError where method, bits and group size do not agree.
    """
    weight = with_outlier(layer.weight, layer.largest, outlier)
    learned = method in WEIGHT_LEARNERS
    if learned:
        inputs = learnable(layer, method, group_size)
        quantized, approximation = WEIGHT_LEARNERS[method](weight, inputs, bits, group_size)
    else:
        quantized = quantize(weight, method, bits, group_size)
        approximation = quantized.dequantize()
    code_counts = count_codes(quantized)
    used, information = np.count_nonzero(code_counts), entropy(code_counts)
    zeros = 1 - approximation.count_nonzero().item() / weight.numel()
    error = mse(weight, approximation)
    relative, sqnr = relative_and_db(error, layer.rms)

    shown = approximation.view(-1)[layer.drawn]
    errors = np.sort((shown - weight.view(-1)[layer.drawn]).numpy())
    values = np.sort(shown.numpy())
    one_scale = quantized.scale.numel() == 1
    levels = np.unique(values) if one_scale else values[:0]
    edges = level_edges(levels) / layer.sigma if one_scale else EDGES

    rows = [
        *layer.rows_measured(),
        ("standard deviation σ", f"{layer.sigma:.3g}"),
        ("codes in use", f"{used} of {2**bits}"),
        ("entropy of the codes", f"{information:.2f} of {bits} bits"),
        ("weights that become 0", percent(zeros)),
        ("mean squared error", f"{error:.2e}"),
        ("SQNR", f"{sqnr:.1f} dB"),
        ("largest error", f"{max_abs_error(weight, approximation):.2e}"),
        ("memory", f"{quantized.bits_per_weight:.3g} bits per weight"),
    ]
    losses = None
    if learned:
        losses = output_losses(weight, approximation, bits, group_size, inputs)
        words = f"{losses[0]:.2g}, affine rounding {losses[1]:.2g}"
        rows.append(("error of the outputs, held-out text", words))
    return View(
        layer=layer,
        method=method,
        bits=bits,
        code_counts=code_counts,
        used=used,
        entropy=information,
        levels=levels / layer.sigma,
        edges=edges,
        density=_density(values, layer.sigma, edges),
        zeros=zeros,
        relative_error=relative,
        error_density=_density(errors, error**0.5 or 1.0),
        quantiles=_quantiles(values) / layer.sigma,
        output_losses=losses,
        readout=lines(*rows),
        alt=(
            f"Four panels for {METHOD_LABELS[method]}, {bits} bits, {group_words(group_size)}: "
            f"the weights and their reconstruction, in which {percent(zeros)} are 0; the codes, "
            f"{used} of {2**bits} in use, with {information:.2f} bits of entropy; the shape of the "
            f"error, at {sqnr:.1f} dB SQNR; and the quantiles of the reconstruction against those "
            "of the weights."
        ),
    )


def learnable(layer: Layer, method: str, group_size: int | str | None) -> LayerInputs:
    """What a learned method learns from; ValueError where it cannot."""
    if group_size is None:
        raise ValueError(
            f"{METHOD_LABELS[method]} takes a scale per row at least: choose per channel or groups"
        )
    if layer.inputs is None:
        raise ValueError(
            f"{METHOD_LABELS[method]} learns from a layer's inputs, which are known of the "
            "embedded model's layers alone: choose another method"
        )
    return layer.inputs()


def output_losses(weight, approximation, bits, group_size, inputs) -> tuple[float, float]:
    """`gptq.layer_loss` on held-out text: of the approximation, and of affine rounding."""
    rounded = quantize_affine(weight, bits, group_size).dequantize()
    return tuple(
        gptq.layer_loss(weight, each, inputs.held_out) for each in (approximation, rounded)
    )


class TextOnItsWay:
    """A text on its way through a model: what reaches each of its layers."""

    def __init__(self, model, tokens):
        self._walk, self._hidden = Walk(model, tokens), []
        for index in range(len(self._walk.blocks)):
            self._hidden.append(self._walk.hidden)
            self._walk.advance(index)

    def inputs(self, block: int, layer: str) -> torch.Tensor:
        """What reaches one of the linear layers of a block, such as "q_proj": (tokens, in)."""
        self._walk.hidden = self._hidden[block]
        inputs = self._walk.inputs(block)
        return next(x for name, x in inputs.items() if name.rpartition(".")[2] == layer)


class Texts:
    """News to calibrate with and Wikipedia to measure on, on their way through the model."""

    def __init__(self):
        model, tokenizer = load(device="cpu")
        self._news = TextOnItsWay(model, calibration_tokens(tokenizer, SEQUENCES, LENGTH))
        self._held_out = TextOnItsWay(model, evaluation_tokens(tokenizer, HELD_OUT))

    def inputs(self, block: int, layer: str) -> LayerInputs:
        """What reaches one of the linear layers of a block, such as "q_proj"."""
        x, held_out = (text.inputs(block, layer) for text in (self._news, self._held_out))
        return LayerInputs(x, *(calibrate(each[None]).hessian for each in (x, held_out)))


def explore_distributions(weight=None) -> Explorer:
    """A panel: a layer of the embedded model (or `weight`), quantized by any method.

    weight: a matrix (out_features, in_features); or a dict of name -> matrix to choose from; or
    None for the embedded model's linear layers, with controls for the block and the kind of layer.
    Raises as `prepare` for a single matrix.
    """
    controls = {
        "method": widgets.Dropdown(
            options=[(label, name) for name, label in METHOD_LABELS.items()],
            description="method",
        ),
        "bits": widgets.IntSlider(4, 2, 8, description="bits"),
        "group_size": GroupSizeSlider(GROUP_SIZES, None),
        "outlier": outlier_slider(),
    }
    if weight is not None:
        return explore(weight, controls, prepare, view, DistributionsFigure())

    weights = linear_weights()
    names = {tuple(name.split(".")[2:5:2]): name for name in weights}  # ("12", "q_proj") -> name
    choices = {
        "block": widgets.IntSlider(12, 0, len(names) // len(LINEARS) - 1, description="block"),
        "layer": widgets.Dropdown(options=LINEARS, value="gate_proj", description="layer"),
    }
    # made when a method first asks for them: the walks through the model take some seconds
    texts = lru_cache(maxsize=1)(Texts)
    inputs = lru_cache(maxsize=4)(lambda block, layer: texts().inputs(block, layer))

    def load(block, layer):
        return prepare(weights[names[str(block), layer]], partial(inputs, block, layer))

    return choose(choices, load, controls, view, DistributionsFigure(), kept=4)


def level_edges(levels: np.ndarray) -> np.ndarray:
    """Where bins meet that hold one of the ascending levels (n,) each: (n + 1,).

    Halfway between neighbours; the outermost levels lie in the middle of their bins.

    >>> level_edges(np.array([-1.0, 0.0, 2.0]))
    array([-1.5, -0.5,  1. ,  3. ])
    """
    levels = levels.astype(float)
    if len(levels) == 1:
        return levels + abs(levels[0] or 1.0) * np.array([-1, 1])
    inner = (levels[1:] + levels[:-1]) / 2
    return np.array([2 * levels[0] - inner[0], *inner, 2 * levels[-1] - inner[-1]])


def _density(values, unit, edges=EDGES):
    """The density of the sorted `values` / unit on `edges`."""
    below = np.searchsorted(values, (edges * unit).astype(np.float32))
    return np.diff(below) / (len(values) * np.diff(edges))


def _quantiles(values):
    """The quantiles of sorted values at PROBABILITIES: always one of the values, never between."""
    return values[np.round(PROBABILITIES * (len(values) - 1)).astype(int)]
