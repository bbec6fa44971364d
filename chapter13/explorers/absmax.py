"""The explorer of notebook 01: one grid for a whole tensor, and what one outlier does to it.

A slider must not wait for millions of weights. Quantization with one scale keeps the order of the
weights, and the scale is set by the largest one alone. So the weights are sorted once, and at each
move the package's own quantizer is asked, for a few weights at a time, where in that order one
level ends and the next begins; counts and errors follow from there.
"""

import math
from dataclasses import dataclass

import ipywidgets as widgets
import numpy as np
import torch

from chapter13.explorers.base import lines
from chapter13.explorers.layers import checked, explore, outlier_slider, relative_and_db
from chapter13.integer import quantize_absmax
from chapter13.measures import max_abs_error
from chapter13.models import linear_weights
from chapter13.packing import packed_size
from chapter13.plots.absmax import AbsmaxFigure

BINS = 121  # odd: zero lies in the middle of a bin
# The error histogram is made of so many weights, evenly spaced in their order; every number in the
# readout is of all. Below torch's threshold for threads, whose start takes longer than the work.
IN_HISTOGRAM = 30_000


@dataclass(frozen=True)
class Layer:
    """What is needed of a weight at every move; made by `prepare`."""

    largest: float
    """The largest element, which the explorer makes larger."""
    others: torch.Tensor
    """float32: all other elements, sorted."""
    sums: torch.Tensor
    """float64: sums[i] is the sum of the first i of them."""
    energy: float
    """The sum of their squares."""
    limit: float
    """How far the picture reaches: 4.5 standard deviations."""
    edges: np.ndarray
    """BINS + 1 edges from -limit to limit."""
    counts: np.ndarray
    """The weights' histogram."""


@dataclass(frozen=True)
class View:
    """What the explorer shows at one position of its controls."""

    bits: int
    scale: float
    largest: float
    levels: np.ndarray
    """The values of the levels in use, in order."""
    level_counts: np.ndarray
    """How many weights lie on each."""
    zeros: float
    """Share of the weights that lie on level 0, rounded down to 0.1%."""
    mse: float
    max_error: float
    sqnr: float
    """In dB, of all weights but the outlier: its own energy would hide what happens to the rest."""
    nbytes: int
    limit: float
    edges: np.ndarray
    weight_counts: np.ndarray
    error_counts: np.ndarray
    readout: str
    alt: str


def prepare(weight: torch.Tensor) -> Layer:
    """Everything about a weight of any shape that no control changes. Raises as `checked`."""
    flat = checked(weight).flatten()
    position = int(flat.abs().argmax())
    largest = flat[position].item()
    limit = 4.5 * flat.std(correction=0).item() or 2 * abs(largest) or 1.0
    others = torch.cat([flat[:position], flat[position + 1 :]])
    others.numpy().sort()  # in place; several times faster than torch's
    return Layer(
        largest=largest,
        others=others,
        sums=torch.cat(
            [torch.zeros(1, dtype=torch.float64), others.cumsum(0, dtype=torch.float64)]
        ),
        energy=torch.linalg.vector_norm(others, dtype=torch.float64).item() ** 2,
        limit=limit,
        edges=np.linspace(-limit, limit, BINS + 1),
        counts=torch.histc(flat, BINS, -limit, limit).numpy(),
    )


def level_starts(others: torch.Tensor, largest: torch.Tensor, bits: int) -> torch.Tensor:
    """Where each code begins among the sorted weights, when the scale comes from `largest`.

    Binary search for all codes at once: the codes of the sorted weights rise from the lowest to
    the highest. Returns int64 (2**bits,) for the codes from -2**(bits-1) + 1, and the end.
    """
    steps = 2 ** (bits - 1) - 1
    wanted = torch.arange(-steps, steps + 1)
    low = torch.zeros_like(wanted)
    high = torch.full_like(wanted, len(others))
    while (low < high).any():
        middle = (low + high) // 2
        asked = others[middle.clamp(max=len(others) - 1)]
        below = quantize_absmax(torch.cat([asked, largest]), bits).codes()[:-1] < wanted
        below &= middle < high  # those already found stay
        low = torch.where(below, middle + 1, low)
        high = torch.where(below, high, middle)
    return torch.cat([low, torch.tensor([len(others)])])


def view(layer: Layer, bits: int, outlier: float) -> View:
    """The weight with its largest element made `outlier` times larger, on a grid of `bits` bits."""
    others, largest = layer.others, torch.tensor([layer.largest * outlier])
    grid = quantize_absmax(largest, bits)  # has the scale of the whole weight
    scale = grid.scale.float()
    levels = torch.arange(1 - 2 ** (bits - 1), 2 ** (bits - 1)) * scale
    starts = level_starts(others, largest, bits)
    counts = starts.diff()

    # sum (w - level)^2 = sum w^2 - 2 level sum w + count level^2, level by level
    sums, values = layer.sums[starts].diff(), levels.double()
    noise = layer.energy + (values * (counts * values - 2 * sums)).sum().item()
    noise = max(noise, 0.0)  # of exact weights rounding may leave less than nothing
    weights = len(others) + 1
    mse = (noise + max_abs_error(largest, grid.dequantize()) ** 2) / weights
    _, sqnr = relative_and_db(noise / weights, math.sqrt(layer.energy / weights))

    # the largest error on a level is at one of its ends
    held = counts > 0
    ends = torch.cat([others[starts[:-1][held]], others[starts[1:][held] - 1], largest])
    max_error = max_abs_error(ends, torch.cat([levels[held].repeat(2), grid.dequantize()]))

    zero = len(levels) // 2
    counts[zero + grid.codes().long()] += 1
    used = counts > 0
    zeros = math.floor(1000 * counts[zero].item() / weights) / 1000
    nbytes = packed_size(weights, bits) + grid.scale.nbytes

    drawn = torch.cat([others[:: len(others) // IN_HISTOGRAM + 1], largest])
    errors = (drawn - quantize_absmax(drawn, bits).dequantize()).numpy()
    readout = lines(
        ("largest weight", f"{float(f'{largest.item():.3g}'):,g}"),
        ("scale, the step of the grid", f"{scale.item():.3g}"),
        ("levels in use", f"{used.sum()} of {2**bits - 1}"),
        ("weights that become 0", f"{zeros:.1%}"),
        ("mean squared error", f"{mse:.2e}"),
        ("largest error", f"{max_error:.2e}"),
        ("SQNR of all other weights", f"{sqnr:.1f} dB"),
        ("memory", f"{nbytes:,} bytes, {8 * nbytes / weights:.2f} bits per weight"),
    )
    return View(
        bits=bits,
        scale=scale.item(),
        largest=largest.item(),
        levels=levels[used].numpy(),
        level_counts=counts[used].numpy(),
        zeros=zeros,
        mse=mse,
        max_error=max_error,
        sqnr=sqnr,
        nbytes=nbytes,
        limit=layer.limit,
        edges=layer.edges,
        weight_counts=layer.counts,
        error_counts=np.histogram(errors, BINS, (-layer.limit, layer.limit))[0],
        readout=readout,
        alt=(
            f"Left: the weights (gray) and the {used.sum()} levels in use of an absmax grid of "
            f"{bits} bits (blue), {scale.item():.2g} apart. Right: the errors (orange) on the same "
            f"scale. {zeros:.1%} of the weights become 0."
        ),
    )


def explore_absmax(weight=None):
    """A panel: bits and the strength of one outlier, on a weight quantized with one absmax scale.

    weight: a tensor of any shape; or a dict of name -> tensor to choose from; or None for the
    linear layers of the embedded model. Raises as `checked` for a single tensor; what is wrong
    with one of several is said when it is chosen.
    """
    controls = {
        "bits": widgets.IntSlider(8, 2, 8, description="bits"),
        "outlier": outlier_slider(),
    }
    weights = linear_weights() if weight is None else weight
    return explore(weights, controls, prepare, view, AbsmaxFigure())
