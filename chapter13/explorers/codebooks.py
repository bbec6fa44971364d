"""The explorer of notebook 03: integer grids and code books on the same weights.

At each move the package's quantizer does the whole layer again, which takes a few milliseconds for
a million weights. Of a larger weight some rows are taken, evenly spaced, and the readout says so.
"""

from dataclasses import dataclass

import ipywidgets as widgets
import numpy as np
import torch

from chapter13.explorers.base import lines
from chapter13.explorers.layers import (
    METHOD_LABELS,
    GroupSizeSlider,
    Layer,
    drawn,
    explore,
    outlier_slider,
    quantize,
    relative_and_db,
    take,
    with_outlier,
)
from chapter13.measures import mse
from chapter13.models import linear_weights
from chapter13.plots.codebooks import CodeBookFigure
from chapter13.tables import CODE_BOOKS
from chapter13.tensors import QuantizedTensor

BINS = 121
GROUP_SIZES = [16, 32, 64, 128, 192, 288, 576, "channel"]


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
    weight = with_outlier(layer.weight, layer.largest, outlier)
    quantized = quantize(weight, method, bits, group_size, double_quant)
    approximation = quantized.dequantize()

    relative, sqnr = relative_and_db(mse(weight, approximation), layer.rms)
    at, level_of = places(quantized).unique(return_inverse=True)  # FP4 has two zeros
    stored = quantized.codes().view(-1).view(torch.uint8).bitwise_and_(2**bits - 1)
    code_counts = torch.bincount(stored, minlength=2**bits)
    counts = torch.zeros(len(at), dtype=torch.int64).index_add_(0, level_of, code_counts)
    used = counts > 0
    zeros = (approximation.numel() - int(approximation.count_nonzero())) / approximation.numel()

    positions = drawn(weight.numel())
    x = normalized(weight, quantized, positions)
    bins = ((x + 1) * (BINS / 2)).long().clamp_(0, BINS - 1)
    squared = (weight.view(-1)[positions] - approximation.view(-1)[positions]).double().square_()
    shares = torch.bincount(bins, squared, minlength=BINS) / (squared.sum() or 1.0)

    effective, label = quantized.bits_per_weight, METHOD_LABELS[method]
    rows = [
        ("bits per weight", f"{effective:.4g}: codes {bits}, scales {effective - bits:.3g}"),
        ("smaller than float32", f"{32 / effective:.2f} times"),
        ("relative RMSE", f"{relative:.3g}"),
        ("SQNR", f"{sqnr:.1f} dB"),
        ("levels in use", f"{used.sum()} of {2**bits} codes"),
        ("weights that become 0", f"{zeros:.1%}"),
        *layer.rows_measured(),
    ]
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
    None for drawn distributions and the linear layers of the embedded model. Raises as `take` for
    a single matrix; what is wrong with one of several is said when chosen.
    """
    controls = {
        "method": widgets.Dropdown(
            options=[(label, name) for name, label in METHOD_LABELS.items()],
            value="nf4",
            description="method",
        ),
        "bits": widgets.IntSlider(4, 2, 8, description="bits"),
        "group_size": GroupSizeSlider(GROUP_SIZES, 64),
        "double_quant": widgets.Checkbox(False, description="double quantization"),
        "outlier": outlier_slider(),
    }
    weights = distributions() | linear_weights() if weight is None else weight
    return explore(weights, controls, take, view, CodeBookFigure(), description="weights")
