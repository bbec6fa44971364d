"""The explorer of notebook 10: llama.cpp's block formats beside the course's other methods.

The left side, error against bits per weight, is of the whole layer and measured once for each layer
and order of its channels; the right side is one block, with an outlier if one likes.
"""

from dataclasses import dataclass
from functools import lru_cache, partial

import ipywidgets as widgets
import numpy as np
import torch

from chapter13.codebook import quantize_codebook
from chapter13.explorers.base import Explorer, lines, outlier_slider
from chapter13.explorers.codebooks import MOST, integer_grid
from chapter13.gguf_blocks import ENCODERS, BlockTensor, quantize, read
from chapter13.gguf_model import gguf_name
from chapter13.measures import relative_rmse
from chapter13.models import gguf_path, linear_weights
from chapter13.plots.gguf import GGUFFigure

SIZES = [16, 32, 64, 96, 192]  # weights that share a scale; those that divide the rows are taken
ORDERS = {"shuffled": "channels shuffled, as in the course", "stored": "as the GGUF file has them"}
BLOCKS = 1000  # blocks to choose from


@dataclass(frozen=True)
class Layer:
    """What is measured of a weight once; made by `prepare`."""

    weight: torch.Tensor
    """float32 (rows taken, in_features)."""
    rows: int
    """The rows of the whole weight."""
    curves: dict[str, list[tuple[float, float]]]
    """Label -> (bits per weight, relative RMSE), a point for each of SIZES."""
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


def measure(weight: torch.Tensor) -> tuple[dict, dict]:
    """(curves, kinds) as a `Layer` holds them. Raises as the package's quantizers."""
    sizes = [size for size in SIZES if weight.shape[1] % size == 0]

    def curve(quantizer):
        quantized = [quantizer(size) for size in sizes]
        return [(q.bits_per_weight, relative_rmse(weight, q.dequantize())) for q in quantized]

    curves = {
        "absmax": curve(lambda size: integer_grid(weight, "absmax", 4, size)),
        "affine": curve(lambda size: integer_grid(weight, "affine", 4, size)),
        "NF4": curve(lambda size: quantize_codebook(weight, "nf4", size)),
        "NF4, double quantization": curve(
            lambda size: quantize_codebook(weight, "nf4", size, double_quant=True)
        ),
    }
    stored = {kind: quantize(weight, kind) for kind in ENCODERS}
    kinds = {
        kind: (q.bits_per_weight, relative_rmse(weight, q.dequantize()))
        for kind, q in stored.items()
    }
    return curves, kinds


def prepare(weight: torch.Tensor) -> Layer:
    """Everything about a weight (out_features, in_features) that only its choice changes.

    Of a large one some rows are taken, evenly spaced. Raises as the package's quantizers.
    """
    quantize(weight, "Q4_0")  # says what is wrong with it
    if weight.dim() != 2:
        raise ValueError(f"a matrix (out_features, in_features), not shape {tuple(weight.shape)}")
    step = -(-weight.numel() // MOST)
    taken = weight.detach()[::step].float().cpu().contiguous()
    return Layer(taken, len(weight), *measure(taken))


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
    values = blocks[block : block + 1].clone()
    values.view(-1)[values.abs().argmax()] *= outlier
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
    for label, points in layer.curves.items():
        near = min(points, key=lambda point: abs(point[0] - bits))
        rows.append((f"  {label}", f"{near[1]:.3g} at {near[0]:.4g} bits"))
    rows.append(("relative RMSE of the block", f"{error:.3g}"))
    rows.append(("its scale", scale))
    if stored.minimum is not None:
        rows.append(("its minimum", f"{stored.minimum.item():.3g}"))
    used = f"{len(restored.unique())} of {len(levels.unique())}"
    rows.append(("levels its weights use", used))
    if len(layer.weight) < layer.rows:
        taken = f"{len(layer.weight)} of the {layer.rows} rows, evenly spaced"
        rows.append(("layer measured on", taken))
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
    controls = {
        "kind": widgets.Dropdown(options=["Q4_0", "Q4_1", "MXFP4", "Q8_0"], description="format"),
        "block": widgets.IntSlider(0, 0, BLOCKS - 1, description="block"),
        "outlier": outlier_slider(),
    }
    if isinstance(weight, torch.Tensor):
        return Explorer(controls, partial(view, prepare(weight)), GGUFFigure())

    given = linear_weights() if weight is None else dict(weight)
    layers = {"layer": widgets.Dropdown(options=list(given), description="layer")}
    stored = None
    if weight is None:
        stored = read(gguf_path()).tensors
        orders = [(label, name) for name, label in ORDERS.items()]
        layers["order"] = widgets.Dropdown(options=orders, description="order of channels")

    @lru_cache(maxsize=8)
    def prepared(layer, order):
        if order == "stored":
            return prepare(stored[gguf_name(layer)].dequantize())
        return prepare(given[layer])

    def compute(layer, order="shuffled", **settings):
        return view(prepared(layer, order), **settings)

    return Explorer({**layers, **controls}, compute, GGUFFigure())
