"""The explorer of notebook 10: llama.cpp's block formats beside the course's other methods.

The left side, error against bits per weight, belongs to the whole layer and is measured once for
each layer and order of its channels; the right side is one block, with an outlier on request.
"""

from dataclasses import dataclass

import ipywidgets as widgets
import numpy as np
import torch

from chapter13.explorers import layers
from chapter13.explorers.base import lines
from chapter13.explorers.layers import choose, explore, outlier_slider, take, with_outlier
from chapter13.gguf_blocks import ENCODERS, BlockTensor, quantize, read
from chapter13.gguf_model import gguf_name
from chapter13.measures import relative_rmse
from chapter13.models import gguf_path, linear_weights
from chapter13.plots.gguf import GGUFFigure

GROUP_SIZES = [16, 32, 64, 96, 192]  # of the curves; those that divide the rows are taken
ORDERS = {"shuffled": "channels shuffled, as in the course", "stored": "as the GGUF file has them"}
BLOCKS = 1000  # blocks to choose from


@dataclass(frozen=True)
class Layer(layers.Layer):
    """What is measured of a weight once; made by `prepare`."""

    curves: dict[str, list[tuple[float, float]]]
    """Label -> (bits per weight, relative RMSE), a point for each of GROUP_SIZES."""
    kinds: dict[str, tuple[float, float]]
    """Block format -> (bits per weight, relative RMSE)."""


@dataclass(frozen=True)
class View:
    """What the explorer shows at one position of its controls."""

    kind: str
    curves: dict[str, list[tuple[float, float]]]
    kinds: dict[str, tuple[float, float]]
    values: np.ndarray
    """The block's 32 weights over its absmax."""
    restored: np.ndarray
    """The same after quantizing."""
    levels: np.ndarray
    """All values that a code of this block can mean, over the same absmax."""
    block_error: float
    """Relative RMSE of the block."""
    readout: str
    alt: str


def measure(weight: torch.Tensor) -> dict[str, dict]:
    """The curves and kinds that a `Layer` holds. Raises as the package's quantizers."""
    sizes = [size for size in GROUP_SIZES if weight.shape[1] % size == 0]

    def point(quantized):
        return quantized.bits_per_weight, relative_rmse(weight, quantized.dequantize())

    def curve(method, double_quant=False):
        return [point(layers.quantize(weight, method, 4, size, double_quant)) for size in sizes]

    curves = {
        "absmax": curve("absmax"),
        "affine": curve("affine"),
        "NF4": curve("nf4"),
        "NF4, double quantization": curve("nf4", double_quant=True),
    }
    kinds = {kind: point(quantize(weight, kind)) for kind in ENCODERS}
    return {"curves": curves, "kinds": kinds}


def prepare(weight: torch.Tensor) -> Layer:
    """Everything about a weight (out_features, in_features) that only its choice changes.

    Of a large one some rows are taken. Raises as `take` and as the package's quantizers.
    """
    layer = take(weight)
    return Layer(**vars(layer), **measure(layer.weight))


def all_levels(block: BlockTensor) -> torch.Tensor:
    """The values that the codes of a single block can mean, ascending."""
    low, high = {"Q8_0": (-127, 127), "Q4_0": (-8, 7), "Q4_1": (0, 15)}.get(block.kind, (-12, 12))
    codes = torch.arange(low, high + 1)
    if block.kind == "MXFP4":
        codes = torch.tensor([0, 1, 2, 3, 4, 6, 8, 12])
        codes = torch.cat([-codes[1:], codes])
    levels = codes.float() * block.scale.flatten()
    if block.minimum is not None:
        levels = levels + block.minimum.flatten()
    return levels.sort().values


def view(layer: Layer, kind: str, block: int, outlier: float) -> View:
    """One block of the layer in one format, its largest weight made `outlier` times larger."""
    blocks = layer.weight.view(-1, 32)
    if block >= len(blocks):
        raise ValueError(
            f"the layer has {len(blocks)} blocks: choose one from 0 to {len(blocks) - 1}"
        )
    values = blocks[block : block + 1]
    values = with_outlier(values, int(values.abs().argmax()), outlier)
    stored = quantize(values, kind)
    restored = stored.dequantize()
    absmax = values.abs().max().item() or 1.0
    error = relative_rmse(values, restored)
    bits, whole = layer.kinds[kind]
    levels = all_levels(stored)

    scale = f"{stored.scale.item():.3g}"
    if kind == "MXFP4" and stored.scale.item():
        scale += f" = 2 to the {int(np.log2(stored.scale.item()))}"
    rows = [
        ("format", f"{kind}, {bits:g} bits per weight"),
        ("relative RMSE of the layer", f"{whole:.3g}"),
    ]
    no_larger = [
        (rmse, at, label)
        for label, points in layer.curves.items()
        for at, rmse in points
        if at <= bits
    ]
    if no_larger:
        rmse, at, label = min(no_larger)
        rows.append(("best curve, no more bits", f"{label}: {rmse:.3g} at {at:.4g} bits"))
    rows.append(("relative RMSE of the block", f"{error:.3g}"))
    rows.append(("its scale", scale))
    if stored.minimum is not None:
        rows.append(("its minimum", f"{stored.minimum.item():.3g}"))
    used = f"{len(restored.unique())} of {len(levels.unique())}"
    rows += [("levels its weights use", used), *layer.rows_measured()]
    return View(
        kind=kind,
        curves=layer.curves,
        kinds=layer.kinds,
        values=(values / absmax).flatten().numpy(),
        restored=(restored / absmax).flatten().numpy(),
        levels=(levels / absmax).numpy(),
        block_error=error,
        readout=lines(*rows),
        alt=(
            f"Left: error against bits per weight of absmax, affine and NF4 with 16 to 192 weights "
            f"to a scale, and of llama.cpp's formats; {kind}: {whole:.3g} at {bits:g} bits. Right: "
            f"the 32 weights of block {block} between the levels of {kind}; relative RMSE "
            f"{error:.3g}."
        ),
    )


def explore_gguf(weight=None):
    """A panel: format, block and an outlier in it, on a layer with or without shuffled channels.

    weight: a matrix (out_features, in_features) or a dict of name -> matrix to choose from; or
    None for the linear layers of the embedded model, each in both orders of its channels. Raises
    as `prepare` for a single matrix; what is wrong with one of several is said when it is chosen.
    """
    outlier = outlier_slider()
    outlier.description = "outlier: the block's largest weight ×"
    controls = {
        "kind": widgets.Dropdown(options=["Q4_0", "Q4_1", "MXFP4", "Q8_0"], description="format"),
        "block": widgets.IntSlider(0, 0, BLOCKS - 1, description="block"),
        "outlier": outlier,
    }
    if weight is not None:
        return explore(weight, controls, prepare, view, GGUFFigure())

    shuffled, stored = linear_weights(), read(gguf_path()).tensors
    choices = {
        "layer": widgets.Dropdown(options=list(shuffled), description="layer"),
        "order": widgets.Dropdown(
            options=[(label, order) for order, label in ORDERS.items()],
            description="order of channels",
        ),
    }

    def load(layer, order):
        if order == "stored":
            return prepare(stored[gguf_name(layer)].dequantize())
        return prepare(shuffled[layer])

    return choose(choices, load, controls, view, GGUFFigure(), kept=8)
