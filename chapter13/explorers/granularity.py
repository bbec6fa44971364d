"""The explorer of notebook 02: where the error of a layer lies, and what less of it costs in bits.

At each move the whole layer is quantized with the settings, and all numbers are of that. The curves
behind the marked point, for BITS and GROUP_SIZES, take a hundred times as long: they are computed
when a layer is chosen, and kept.
"""

import math
from dataclasses import dataclass

import ipywidgets as widgets
import numpy as np
import torch

from chapter13.explorers.base import lines
from chapter13.explorers.layers import (
    GroupSizeSlider,
    checked_matrix,
    explore,
    group_words,
    relative_and_db,
    rms,
    sample_rows,
)
from chapter13.integer import quantize_absmax, quantize_affine
from chapter13.measures import relative_rmse
from chapter13.models import linear_weights
from chapter13.plots.granularity import GranularityFigure
from chapter13.tensors import pieces

BITS = range(2, 9)
# from one scale for all to many; 128 and 192 divide some layers' rows only
GROUP_SIZES = [None, "channel", 192, 128, 96, 64, 48, 32, 16]
LAYERS = [  # of the embedded model: with outlier rows, with outlier columns, and one without
    "model.layers.29.self_attn.q_proj.weight",
    "model.layers.0.self_attn.o_proj.weight",
    "model.layers.1.mlp.down_proj.weight",
    "model.layers.14.self_attn.v_proj.weight",
    "model.layers.28.self_attn.k_proj.weight",
    "model.layers.28.mlp.up_proj.weight",
]
CELLS = 192  # rows and columns of the error map, at most
PATCH = 16  # columns that one cell of the map takes, at least: the finest group


@dataclass(frozen=True)
class Layer:
    """A weight and what no control but the layer's changes; made by `prepare`."""

    weight: torch.Tensor
    """float32 (out_features, in_features)."""
    rms: float
    """Root mean square of the weights."""
    curves: dict[bool, np.ndarray]
    """affine -> float64 (bits, group sizes, 2): bits per weight and relative RMSE.

    NaN where a group size does not fit the layer.
    """


@dataclass(frozen=True)
class View:
    """What the explorer shows at one position of its controls."""

    bits: int
    affine: bool
    error_map: np.ndarray
    """float32 (rows, columns), each up to CELLS: mean |error| of a patch of weights / their RMS."""
    curves: np.ndarray
    limits: tuple[float, float]
    """The smallest and the largest relative RMSE of all curves of the layer."""
    bits_per_weight: float
    relative_rmse: float
    mse: float
    max_error: float
    nbytes: int
    readout: str
    alt: str


def prepare(weight: torch.Tensor) -> Layer:
    """The layer with its curves, for a large one of some rows. Raises as `checked_matrix`."""
    weight = checked_matrix(weight)
    rows = sample_rows(weight)
    return Layer(weight, rms(weight), {affine: curves(rows, affine) for affine in (False, True)})


def curves(weight: torch.Tensor, affine: bool) -> np.ndarray:
    """Bits per weight and relative RMSE at all BITS and GROUP_SIZES: (bits, group sizes, 2)."""
    quantize = quantize_affine if affine else quantize_absmax
    points = np.full((len(BITS), len(GROUP_SIZES), 2), np.nan)
    for i, bits in enumerate(BITS):
        for j, group_size in enumerate(GROUP_SIZES):
            try:
                quantized = quantize(weight, bits, group_size)
            except ValueError:  # the explanation comes when the reader moves there
                continue
            error = relative_rmse(weight, quantized.dequantize())
            points[i, j] = quantized.bits_per_weight, error
    return points


def view(layer: Layer, bits: int, group_size: int | str | None, affine: bool) -> View:
    """The layer quantized so. Raises as `quantize_absmax`: a group size may not divide the rows."""
    weight = layer.weight
    quantized = (quantize_affine if affine else quantize_absmax)(weight, bits, group_size)
    error = quantized.dequantize()
    energy, max_error = 0.0, 0.0
    for piece in pieces(weight):  # a large layer is read from memory once, not four times
        part = error[piece].sub_(weight[piece])
        energy += torch.linalg.vector_norm(part, dtype=torch.float64).item() ** 2
        max_error = max(max_error, part.abs_().max().item())
    mse = energy / error.numel()
    cells = [min(CELLS, size) for size in (weight.shape[0], -(-weight.shape[1] // PATCH))]
    error_map = torch.nn.functional.adaptive_avg_pool2d(error[None], cells)[0]

    relative, sqnr = relative_and_db(mse, layer.rms)
    all_errors = [curve[..., 1] for curve in layer.curves.values()]
    limits = float(np.nanmin(all_errors)), float(np.nanmax(all_errors))
    parts = [f"codes {quantized.packed.nbytes:,}", f"scales {quantized.scale.nbytes:,}"]
    if affine:
        parts.append(f"zero points {quantized.packed_zero_point.nbytes:,}")
    readout = lines(
        ("bits per weight", f"{quantized.bits_per_weight:.4f}"),
        ("mean squared error", f"{mse:.2e}"),
        ("relative RMSE", f"{relative:.2%}"),
        ("SQNR", f"{sqnr:.1f} dB"),
        ("largest error", f"{max_error:.2e}"),
        ("bytes", f"{quantized.nbytes:,}: {', '.join(parts)}"),
    )
    return View(
        bits=bits,
        affine=affine,
        error_map=(error_map / (layer.rms or 1.0)).numpy(),
        curves=layer.curves[affine],
        limits=limits,
        bits_per_weight=quantized.bits_per_weight,
        relative_rmse=relative,
        mse=mse,
        max_error=max_error,
        nbytes=quantized.nbytes,
        readout=readout,
        alt=(
            f"Left: the layer's errors with {'affine' if affine else 'absmax'} grids of {bits} "
            f"bits, {group_words(group_size)}. Right: relative RMSE against bits per weight for 2 "
            f"to 8 bits and the group sizes that fit; marked: {relative:.2%} at "
            f"{quantized.bits_per_weight:.3f} bits."
        ),
    )


def explore_granularity(weight=None):
    """A panel: layer, bits, group size and kind of grid; the errors, and what they cost in bits.

    weight: a matrix (out_features, in_features); or a dict of name -> matrix to choose from; or
    None for six linear layers of the embedded model. Raises as `checked_matrix` for a single
    matrix; what is wrong with one of several is said when it is chosen.
    """
    controls = {
        "bits": widgets.IntSlider(4, BITS[0], BITS[-1], description="bits"),
        "group_size": GroupSizeSlider(GROUP_SIZES, None),
        "affine": widgets.Checkbox(False, description="affine (with a zero point)", indent=False),
    }
    if weight is None:
        model = linear_weights()
        weight = {name: model[name] for name in LAYERS}
    loading = (
        f"measuring the layer at {len(BITS)} numbers of bits, {len(GROUP_SIZES)} group sizes …"
    )
    return explore(
        weight, controls, prepare, view, GranularityFigure(), kept=math.inf, loading=loading
    )
