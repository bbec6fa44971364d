"""The explorer of notebook 07: what quantization does to the distribution of a layer's weights."""

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from statistics import NormalDist

import ipywidgets as widgets
import numpy as np
import torch

from chapter13 import awq, gptq
from chapter13.codebook import quantize_codebook
from chapter13.corpus import calibration_tokens
from chapter13.explorers.base import Explorer, lines, outlier_slider
from chapter13.explorers.codebooks import METHODS as LABELS
from chapter13.explorers.codebooks import integer_grid
from chapter13.integer import quantize_absmax, quantize_affine
from chapter13.measures import max_abs_error, mse
from chapter13.models import LINEARS, linear_weights, load
from chapter13.plots.distributions import DistributionsFigure, percent
from chapter13.tables import CODE_BOOKS
from chapter13.tensors import QuantizedTensor
from chapter13.whole_model.walk import Walk

MOST = 1 << 20  # weights; of a larger matrix as many whole rows as make these are shown
DRAWN = 100_000  # weights that make histograms and Q-Q plot; the readout and the codes are of all
AWQ_TOKENS = 128  # that judge a scale: it is searched anew at each move
SEQUENCES, LENGTH = 4, 256  # of calibration text
# Histograms have 121 bins out to 4.5 standard deviations; zero lies in the middle of a bin.
EDGES = np.linspace(-4.5, 4.5, 122)
# 201 probabilities: those with which a normal variable stays below -3.5, -3.465, .. 3.5 sigma
PROBABILITIES = np.array([NormalDist().cdf(z) for z in np.linspace(-3.5, 3.5, 201)])
GROUP_SIZES = ["tensor", "channel", 128, 64, 32, 16]


def _integer(method):
    def quantize_weight(weight, bits, group_size):
        return integer_grid(weight, method, bits, None if group_size == "tensor" else group_size)

    return quantize_weight


def _code_book(kind):
    def quantize_weight(weight, bits, group_size):
        if bits != 4:
            raise ValueError(
                f"{LABELS[kind]} is a table of 16 values: it takes 4 bits, not {bits}. "
                "Set bits to 4, or choose absmax or affine"
            )
        block_size = {"tensor": weight.numel(), "channel": weight.shape[1]}.get(
            group_size, group_size
        )
        return quantize_codebook(weight, kind, block_size)

    return quantize_weight


# name -> function of (weight, bits, group size): with LEARNED_METHODS the only list of methods
METHODS: dict[str, Callable[[torch.Tensor, int, int | str], QuantizedTensor]] = {
    "absmax": _integer("absmax"),
    "affine": _integer("affine"),
    "nf4": _code_book("nf4"),
    "fp4": _code_book("fp4"),
}


@dataclass(frozen=True)
class LayerInputs:
    """What some text brings to a layer."""

    inputs: torch.Tensor
    """float32 (tokens, in_features)."""
    hessian: torch.Tensor
    """(in_features, in_features), of all tokens."""


def _gptq(weight, seen, bits, group_size):
    quantized = gptq.quantize(weight, seen.hessian, bits, group_size)
    return quantized, quantized.dequantize()


def _awq(weight, seen, bits, group_size):
    x = seen.inputs[:: -(-len(seen.inputs) // AWQ_TOKENS)]
    activation = x.abs().mean(0)
    outputs = lambda weights: (x @ W.T for W in weights)  # noqa: E731
    s = awq.search_scale(activation, [weight], outputs, bits, group_size).s
    quantized = quantize_affine(weight * s, bits, group_size)
    return quantized, quantized.dequantize() / s


# name -> function of (weight, LayerInputs, bits, group size): (quantized, the approximate weight)
LEARNED_METHODS = {"gptq": _gptq, "awq": _awq}
LABELS = LABELS | {"gptq": "GPTQ", "awq": "AWQ (scales alone)"}


@dataclass(frozen=True)
class Layer:
    """A weight, and what is needed of it at every move; made by `prepare`."""

    weight: torch.Tensor
    """float32 (rows, in_features): the whole matrix, or some of its rows if it is large."""
    out_features: int
    """Rows of the whole matrix."""
    largest: int
    """Where the largest element is, in the flattened weight."""
    energy: float
    """The mean square of the weight."""
    sigma: float
    """Standard deviation; 1 where all weights are equal."""
    density: np.ndarray
    """The weights' histogram: (121,) densities on EDGES, in standard deviations."""
    quantiles: np.ndarray
    """The weights' quantiles at PROBABILITIES, in standard deviations."""
    drawn: torch.Tensor
    """int64: which of the flattened weights are drawn, at most DRAWN."""


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
    level_heights: np.ndarray
    """How many of the drawn weights have each value, relative to the most frequent."""
    density: np.ndarray
    """The reconstruction's histogram, as that of the layer."""
    zeros: float
    """Share of the weights that become exactly 0."""
    error_density: np.ndarray
    """The error's histogram: densities on EDGES, in units of the error's root mean square."""
    quantiles: np.ndarray
    """The reconstruction's quantiles at PROBABILITIES, in the weights' standard deviations."""
    output_losses: tuple[float, float] | None
    """Of a learned method: the layer loss, and that of affine rounding."""
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


def prepare(weight: torch.Tensor) -> Layer:
    """Everything about a weight (out_features, in_features) that no control changes.

    Raises as `quantize_absmax`, and ValueError for a weight that is not a matrix.
    """
    quantize_absmax(weight, group_size="channel", scale_dtype=torch.float32)  # says what is wrong
    whole = weight.detach().float().cpu().contiguous()
    weight = whole[_rows(whole)] if whole.numel() > MOST else whole
    sigma = weight.std(correction=0).item() or 1.0
    drawn = torch.arange(weight.numel())
    if len(drawn) > DRAWN:
        drawn = torch.randint(len(drawn), (DRAWN,), generator=torch.Generator().manual_seed(0))
    drawn = drawn.sort().values  # in the order of memory: faster
    values = np.sort(weight.view(-1)[drawn].numpy())
    return Layer(
        weight=weight,
        out_features=len(whole),
        largest=int(weight.abs().argmax()),
        energy=mse(weight, torch.zeros_like(weight)),
        sigma=sigma,
        density=_density(values, sigma),
        quantiles=_quantiles(values) / sigma,
        drawn=drawn,
    )


def view(
    layer: Layer,
    method: str,
    bits: int,
    group_size: int | str,
    outlier: float,
    seen: LayerInputs | None = None,
) -> View:
    """The layer, its largest weight made `outlier` times larger, quantized as the rest says.

    Methods in LEARNED_METHODS need to know what the layer has `seen`.

    What it is compared with (σ, gray histograms, the Q-Q plot's horizontal axis, the SQNR's signal)
    is the given weight, without the outlier: otherwise a single outlier would hide all other
    errors.
    Raises ValueError where method, bits and group size do not agree.
    """
    weight = layer.weight
    if outlier != 1:
        weight = weight.clone()
        weight.view(-1)[layer.largest] *= outlier
    if method in LEARNED_METHODS:
        quantized, approximation = learn(weight, method, bits, group_size, seen)
    else:
        quantized = METHODS[method](weight, bits, group_size)
        approximation = quantized.dequantize()
    code_counts = count_codes(quantized)
    used, information = np.count_nonzero(code_counts), entropy(code_counts)
    zeros = 1 - approximation.count_nonzero().item() / weight.numel()
    error = mse(weight, approximation)
    relative = math.sqrt(error / layer.energy) if layer.energy else 0.0
    sqnr = -20 * math.log10(relative) if relative else math.inf

    drawn = approximation.view(-1)[layer.drawn]
    errors = np.sort((drawn - weight.view(-1)[layer.drawn]).numpy())
    values = np.sort(drawn.numpy())
    few = values if quantized.scale.numel() == 1 else values[:0]
    levels, heights = np.unique(few, return_counts=True)

    rows = [
        ("standard deviation σ", f"{layer.sigma:.3g}"),
        ("codes in use", f"{used} of {2**bits}"),
        ("entropy of the codes", f"{information:.2f} of {bits} bits"),
        ("weights that become 0", percent(zeros)),
        ("mean squared error", f"{error:.2e}"),
        ("SQNR", f"{sqnr:.1f} dB"),
        ("largest error", f"{max_abs_error(weight, approximation):.2e}"),
        ("memory", f"{quantized.bits_per_weight:.3g} bits per weight"),
    ]
    if len(weight) < layer.out_features:
        rows.insert(0, ("rows shown", f"{len(weight)} of {layer.out_features}"))
    losses = None
    if method in LEARNED_METHODS:
        losses = output_losses(weight, approximation, bits, group_size, seen)
        told = f"{losses[0]:.2g}, affine rounding {losses[1]:.2g}"
        rows.append(("error of the outputs", told))
    return View(
        layer=layer,
        method=method,
        bits=bits,
        code_counts=code_counts,
        used=used,
        entropy=information,
        levels=levels / layer.sigma,
        level_heights=heights / heights.max(initial=1),
        density=_density(values, layer.sigma),
        zeros=zeros,
        error_density=_density(errors, error**0.5 or 1.0),
        quantiles=_quantiles(values) / layer.sigma,
        output_losses=losses,
        readout=lines(*rows),
        alt=(
            f"Four panels for {method} with {bits} bits: the weights and their reconstruction; "
            f"the codes, {used} of {2**bits} in use, with {information:.2f} bits of entropy; "
            f"the shape of the error, at {sqnr:.1f} dB SQNR; and the quantiles of the "
            "reconstruction against those of the weights."
        ),
    )


def learn(weight, method, bits, group_size, seen) -> tuple[QuantizedTensor, torch.Tensor]:
    """(quantized, the approximate weight) by a learned method; ValueError where it cannot."""
    if group_size == "tensor":
        raise ValueError(
            f"{LABELS[method]} takes a scale per row at least: choose channel or a group size"
        )
    if seen is None:
        raise ValueError(
            f"{LABELS[method]} learns from a layer's inputs, which are known of the embedded "
            "model's layers alone: choose another method"
        )
    return LEARNED_METHODS[method](weight, seen, bits, group_size)


def output_losses(weight, approximation, bits, group_size, seen) -> tuple[float, float]:
    """`gptq.layer_loss` of the approximation, and of affine rounding at the same bits."""
    rounded = quantize_affine(weight, bits, group_size).dequantize()
    return tuple(gptq.layer_loss(weight, each, seen.hessian) for each in (approximation, rounded))


class CalibrationText:
    """Some news on its way through the embedded model: what reaches each of its layers."""

    def __init__(self):
        model, tokenizer = load(device="cpu")
        tokens = calibration_tokens(tokenizer, SEQUENCES, LENGTH)
        self._walk, self._hidden = Walk(model, tokens), []
        for index in range(len(self._walk.blocks)):
            self._hidden.append(self._walk.hidden)
            self._walk.advance(index)

    def seen(self, block: int, layer: str) -> LayerInputs:
        """What reaches one of the linear layers of a block, such as "q_proj"."""
        self._walk.hidden = self._hidden[block]
        inputs = self._walk.inputs(block)
        x = next(x for name, x in inputs.items() if name.rpartition(".")[2] == layer)
        with warnings.catch_warnings():  # fewer tokens than channels; damping copes
            warnings.simplefilter("ignore")
            return LayerInputs(x, gptq.hessian(x))


def explore_distributions(weight: torch.Tensor | None = None) -> Explorer:
    """A panel: a layer of the embedded model (or `weight`), quantized by any method.

    weight: a matrix (out_features, in_features); None for the embedded model's linear layers, with
    controls for the block and the kind of layer. Raises as `prepare`.
    """
    controls = {
        "method": widgets.Dropdown(
            options=[(LABELS[name], name) for name in (*METHODS, *LEARNED_METHODS)],
            description="method",
        ),
        "bits": widgets.IntSlider(4, 2, 8, description="bits"),
        "group_size": widgets.SelectionSlider(
            options=GROUP_SIZES, value="tensor", description="group size"
        ),
        "outlier": outlier_slider(),
    }
    if weight is not None:
        return Explorer(controls, partial(view, prepare(weight)), DistributionsFigure())

    weights = linear_weights()
    names = {tuple(name.split(".")[2:5:2]): name for name in weights}  # ("12", "q_proj") -> name
    prepared = lru_cache(maxsize=4)(lambda name: prepare(weights[name]))
    layers = {
        "block": widgets.IntSlider(12, 0, len(names) // len(LINEARS) - 1, description="block"),
        "layer": widgets.Dropdown(options=LINEARS, value="gate_proj", description="layer"),
    }

    # made when a method first asks for it: the walk through the model takes some seconds
    text = lru_cache(maxsize=1)(CalibrationText)
    seen = lru_cache(maxsize=4)(lambda block, layer: text().seen(block, layer))

    def compute(block, layer, **settings):
        learns = settings["method"] in LEARNED_METHODS and settings["group_size"] != "tensor"
        known = seen(block, layer) if learns else None
        return view(prepared(names[str(block), layer]), seen=known, **settings)

    return Explorer({**layers, **controls}, compute, DistributionsFigure())


def _rows(weight):
    """Evenly spaced rows of a large matrix, and those of its extremes, which set its grids."""
    count = max(1, MOST // weight.shape[1])
    rows = torch.linspace(0, len(weight) - 1, count).long()
    extremes = torch.stack([weight.argmin(), weight.argmax()]) // weight.shape[1]
    return torch.cat([rows, extremes]).unique()


def _density(values, unit):
    """The density of the sorted `values` / unit on EDGES."""
    below = np.searchsorted(values, (EDGES * unit).astype(np.float32))
    return np.diff(below) / (len(values) * np.diff(EDGES))


def _quantiles(values):
    """The quantiles of sorted values at PROBABILITIES: always one of the values, never between."""
    return values[np.round(PROBABILITIES * (len(values) - 1)).astype(int)]
