"""The explorer of notebook 03: integer grids and code books on the same weights.

At each move the package's quantizer does the whole layer again, which takes a few milliseconds for
a million weights. Of a larger weight some rows are taken, evenly spaced, and the readout says so.
"""

import math
from dataclasses import dataclass
from functools import lru_cache, partial

import ipywidgets as widgets
import numpy as np
import torch

from chapter13.codebook import quantize_codebook
from chapter13.explorers.base import Explorer, lines, outlier_slider
from chapter13.integer import quantize_absmax, quantize_affine
from chapter13.measures import mse
from chapter13.models import linear_weights
from chapter13.plots.codebooks import CodeBookFigure
from chapter13.tables import CODE_BOOKS
from chapter13.tensors import QuantizedTensor

MOST = 1 << 21  # weights that are quantized at a move; the embedded model's layers are smaller
BINS = 121
DRAWN = 1 << 17  # weights that make the histograms; every number in the readout is of all
METHODS = {
    "absmax": "absmax (symmetric)",
    "affine": "affine (asymmetric)",
    "nf4": "NF4",
    "fp4": "FP4",
}
GROUP_SIZES = [16, 32, 64, 128, 192, 288, 576, "row"]


@dataclass(frozen=True)
class Layer:
    """What is needed of a weight at every move; made by `prepare`."""

    weight: torch.Tensor
    """float32 (rows taken, in_features)."""
    rows: int
    """The rows of the whole weight."""
    largest: int
    """Where the largest element is, in the flattened weight."""
    energy: float
    """The mean square of the weight."""


@dataclass(frozen=True)
class View:
    """What the explorer shows at one position of its controls."""

    method: str
    bits: int
    levels: np.ndarray
    """The places of the levels in use, from -1 to 1, ascending."""
    level_counts: np.ndarray
    """How many weights lie on each."""
    level_total: int
    """How many different codes there are."""
    relative_rmse: float
    """Error of all weights, over the root mean square of the weight as it was given."""
    sqnr: float
    zeros: float
    """Share of the weights that become 0."""
    bits_per_weight: float
    weight_counts: np.ndarray
    """Histogram of the weights in units of their block, BINS bins from -1 to 1."""
    error_shares: np.ndarray
    """Which share of all squared error the weights of each bin have."""
    readout: str
    alt: str


def distributions(rows=1536, in_features=576):
    """Made-up weights by name, each float32 (rows, in_features): the same numbers at each call."""
    shape = rows, in_features
    drawn = {"Gaussian": torch.randn(shape, generator=torch.Generator().manual_seed(0))}
    for degrees in (10, 5, 3):
        drawn[f"Student t, {degrees} degrees of freedom"] = student_t(shape, degrees)
    drawn["uniform"] = torch.rand(shape, generator=torch.Generator().manual_seed(4)) * 2 - 1
    return drawn


def student_t(shape, degrees, seed=1):
    """float32 draws from Student's t: the fewer degrees of freedom, the heavier the tails.

    A normal number over the root mean square of `degrees` others, as the distribution is defined.
    """
    generator = torch.Generator().manual_seed(seed)
    spread = torch.zeros(shape)
    for _ in range(degrees):
        spread += torch.randn(shape, generator=generator).square_()
    return torch.randn(shape, generator=generator) / (spread / degrees).sqrt()


def prepare(weight: torch.Tensor) -> Layer:
    """Everything about a weight (out_features, in_features) that no control changes.

    Raises as `quantize_absmax`, and ValueError for a weight that is not a matrix.
    """
    quantize_absmax(weight, 8, "channel", torch.float32)  # says what is wrong with it
    step = -(-weight.numel() // MOST)
    taken = weight.detach()[::step].float().cpu().contiguous()
    return Layer(
        weight=taken,
        rows=len(weight),
        largest=int(taken.abs().argmax()),
        energy=mse(taken, torch.zeros_like(taken)),
    )


def integer_grid(weight, method, bits, group_size) -> QuantizedTensor:
    """absmax or affine; of scales that float16 cannot hold it says what a panel's reader can do."""
    quantizer = {"absmax": quantize_absmax, "affine": quantize_affine}[method]
    try:
        return quantizer(weight, bits, group_size)
    except ValueError as error:
        said = str(error).replace(
            "use scale_dtype=torch.float32, or method nf4 or fp4, whose scales are float32",
            "choose NF4 or FP4, whose scales are float32, or give the panel the weights times a "
            "power of two, which changes no code",
        )
        raise ValueError(said) from None


def quantize(weight, method, bits, group_size, double_quant) -> QuantizedTensor:
    """The weight quantized as the controls say; ValueError where they do not fit each other."""
    if method in ("absmax", "affine"):
        if double_quant:
            raise ValueError(
                f"double quantization packs the float32 absmax values of NF4 and FP4; "
                f"{method} holds float16 scales. Switch it off, or choose NF4 or FP4"
            )
        return integer_grid(weight, method, bits, "channel" if group_size == "row" else group_size)
    if bits != 4:
        raise ValueError(
            f"{METHODS[method]} is a table of 16 values: it takes 4 bits, not {bits}. "
            "Set bits to 4, or choose absmax or affine"
        )
    block_size = weight.shape[1] if group_size == "row" else group_size
    return quantize_codebook(weight, method, block_size, double_quant)


def places(quantized: QuantizedTensor) -> torch.Tensor:
    """Where on [-1, 1] the level of each code of the stored form lies, float32 (2**bits,).

    For absmax the code -2**(bits-1) is left at 0: it never occurs.
    """
    codes = torch.arange(2**quantized.bits)
    if quantized.kind in CODE_BOOKS:
        return quantized.code_book
    if quantized.kind == "affine":
        return codes / (2**quantized.bits - 1) * 2 - 1
    half = 2 ** (quantized.bits - 1)
    signed = torch.where(codes < half, codes, codes - 2 * half)
    return torch.where(signed == -half, 0, signed) / (half - 1)


def normalized(weight, quantized: QuantizedTensor, positions) -> torch.Tensor:
    """The weights at flat `positions` on the scale of `places`."""
    size = quantized.group_size if quantized.group_size != "channel" else weight.shape[1]
    block = positions // size
    scale = quantized.scale.float().flatten()[block]
    scaled = weight.flatten()[positions] / torch.where(scale == 0, 1.0, scale)
    if quantized.kind in CODE_BOOKS:
        return scaled
    if quantized.kind == "affine":
        shifted = scaled + quantized.zero_point.flatten()[block]
        return shifted / (2**quantized.bits - 1) * 2 - 1
    return scaled / (2 ** (quantized.bits - 1) - 1)


def view(
    layer: Layer, method: str, bits: int, group_size, double_quant: bool, outlier: float
) -> View:
    """The weight, its largest element made `outlier` times larger, quantized as the rest says."""
    weight = layer.weight
    if outlier != 1:
        weight = weight.clone()
        weight.view(-1)[layer.largest] *= outlier
    quantized = quantize(weight, method, bits, group_size, double_quant)
    approximation = quantized.dequantize()

    relative = math.sqrt(mse(weight, approximation) / layer.energy) if layer.energy else 0.0
    sqnr = -20 * math.log10(relative) if relative else math.inf
    at, level_of = places(quantized).unique(return_inverse=True)  # FP4 has two zeros
    stored = quantized.codes().view(-1).view(torch.uint8).bitwise_and_(2**bits - 1)
    code_counts = torch.bincount(stored, minlength=2**bits)
    counts = torch.zeros(len(at), dtype=torch.int64).index_add_(0, level_of, code_counts)
    used = counts > 0
    zeros = (approximation.numel() - int(approximation.count_nonzero())) / approximation.numel()

    positions = torch.arange(0, weight.numel(), weight.numel() // DRAWN + 1)
    x = normalized(weight, quantized, positions)
    bins = ((x + 1) * (BINS / 2)).long().clamp_(0, BINS - 1)
    squared = (weight.view(-1)[positions] - approximation.view(-1)[positions]).double().square_()
    shares = torch.bincount(bins, squared, minlength=BINS) / (squared.sum() or 1.0)

    effective, label = quantized.bits_per_weight, METHODS[method]
    rows = [
        ("bits per weight", f"{effective:.4g}: codes {bits}, scales {effective - bits:.3g}"),
        ("smaller than float32", f"{32 / effective:.2f} times"),
        ("relative RMSE", f"{relative:.3g}"),
        ("SQNR", f"{sqnr:.1f} dB"),
        ("levels in use", f"{used.sum()} of {2**bits} codes"),
        ("weights that become 0", f"{zeros:.1%}"),
    ]
    if len(weight) < layer.rows:
        rows.append(("measured on", f"{len(weight)} of the {layer.rows} rows, evenly spaced"))
    return View(
        method=method,
        bits=bits,
        levels=at[used].numpy(),
        level_counts=counts[used].numpy(),
        level_total=2**bits,
        relative_rmse=relative,
        sqnr=sqnr,
        zeros=zeros,
        bits_per_weight=effective,
        weight_counts=torch.bincount(bins, minlength=BINS).numpy(),
        error_shares=shares.numpy(),
        readout=lines(*rows),
        alt=(
            f"Top: the weights in units of their block (gray) and the {used.sum()} levels in use "
            f"of {label} at {bits} bits. Bottom: where on that scale the squared error comes from; "
            f"relative RMSE {relative:.3g} at {effective:.4g} bits per weight."
        ),
    )


def explore_codebooks(weight=None):
    """A panel: method, bits, block size, double quantization and one outlier, on any weights.

    weight: a matrix (out_features, in_features); or a dict of name -> matrix to choose from; or
    None for drawn distributions and the linear layers of the embedded model. Raises as
    `quantize_absmax` for a single matrix; what is wrong with one of several is said when chosen.
    """
    controls = {
        "method": widgets.Dropdown(
            options=[(label, name) for name, label in METHODS.items()],
            value="nf4",
            description="method",
        ),
        "bits": widgets.IntSlider(4, 2, 8, description="bits"),
        "group_size": widgets.SelectionSlider(
            options=GROUP_SIZES, value=64, description="weights that share a scale"
        ),
        "double_quant": widgets.Checkbox(False, description="double quantization"),
        "outlier": outlier_slider(),
    }
    if isinstance(weight, torch.Tensor):
        return Explorer(controls, partial(view, prepare(weight)), CodeBookFigure())

    weights = distributions() | linear_weights() if weight is None else dict(weight)
    prepared = lru_cache(maxsize=2)(lambda name: prepare(weights[name]))
    layer = widgets.Dropdown(options=list(weights), description="weights")

    def compute(layer, **settings):
        return view(prepared(layer), **settings)

    return Explorer({"layer": layer, **controls}, compute, CodeBookFigure())
