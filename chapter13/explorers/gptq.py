"""The explorers of notebook 06: GPTQ column by column on a few weights, and on a real layer."""

import warnings
from dataclasses import dataclass
from functools import lru_cache, partial

import ipywidgets as widgets
import numpy as np
import torch

from chapter13 import gptq
from chapter13.explorers.base import Explorer, lines
from chapter13.explorers.layers import GroupSizeSlider
from chapter13.grids import Grid, fit_grid
from chapter13.integer import quantize_affine
from chapter13.measures import relative_rmse
from chapter13.plots.gptq import ColumnsFigure, LayerFigure
from chapter13.plots.picture import METHOD_LOOK

METHOD_LABELS = {"affine": METHOD_LOOK["nearest"].label, "gptq": METHOD_LOOK["gptq"].label}
GROUP_SIZES = ["channel", 192, 128, 96, 64, 48, 32, 16]
CORRELATIONS = [0.0, 0.2, 0.4, 0.6, 0.8, 0.9, 0.95]
DAMPS = [0.0, 0.001, 0.01, 0.1, 1.0]
BINS = 48  # of the picture of errors by channel, at most


# --- a few weights, column by column --------------------------------------------------------------


@dataclass(frozen=True)
class Steps:
    """A small weight before the first column, and after each; made by `steps`."""

    weights: np.ndarray
    """float64 (columns + 1, rows, columns): some rounded, the others moved to compensate."""
    losses: np.ndarray
    """float64 (columns + 1,): ||(W - weights) X||^2, up to a factor."""
    nearest_losses: np.ndarray
    """The same where each column is rounded to the nearest, and nothing moves."""


def steps(weight: torch.Tensor, hessian: torch.Tensor, bits: int) -> Steps:
    """GPTQ as in a textbook, in float64: for each column, the rest of the Hessian is inverted.

    `weight`: (rows, columns), one affine grid per row; `hessian`: (columns, columns), positive
    definite. No damping, columns in their order. `gptq.quantize` computes the same, faster.
    """
    start, H = weight.double(), hessian.double()
    grid = _grid(weight, bits)
    nearest = grid.values(grid.codes(start.T)).T
    W, half_way = start.clone(), start.clone()
    after, losses, nearest_losses = [W.clone()], [0.0], [0.0]
    for j in range(W.shape[1]):
        inverse = torch.linalg.inv(H[j:, j:])
        rounded = grid.values(grid.codes(W[:, j]))
        error = (W[:, j] - rounded) / inverse[0, 0]
        W[:, j:] -= error[:, None] * inverse[0]
        W[:, j] = rounded  # which it is, but for float64's last bits
        half_way[:, j] = nearest[:, j]
        after.append(W.clone())
        losses.append(_loss(start - W, H))
        nearest_losses.append(_loss(start - half_way, H))
    return Steps(torch.stack(after).numpy(), np.array(losses), np.array(nearest_losses))


def _grid(weight, bits):
    grid = fit_grid(weight.float().T, bits, False, torch.float32)
    return Grid(grid.scale.double(), grid.zero.double(), grid.levels)


def _loss(difference, H):
    return ((difference @ H) * difference).sum().item()


@dataclass(frozen=True)
class ColumnsView:
    """What `explore_columns` shows at one position of its controls."""

    column: int
    """How many columns are rounded."""
    weights: np.ndarray
    """(rows, columns) now."""
    moved: np.ndarray
    """What has been added to each weight since the beginning."""
    losses: np.ndarray
    """(columns + 1,), up to now; NaN beyond. In units of round-to-nearest's last."""
    nearest_losses: np.ndarray
    readout: str
    alt: str


def correlated(columns: int, correlation: float) -> torch.Tensor:
    """The Hessian of inputs that are the less correlated, the farther apart they are.

    float64 (columns, columns), `correlation` to the power of the root of the distance.
    """
    place = torch.arange(columns, dtype=torch.float64)
    return correlation ** (place[:, None] - place).abs().sqrt()


def columns_view(weight: torch.Tensor, column: int, correlation: float, bits: int) -> ColumnsView:
    """The weight (rows, columns) after `column` columns, with inputs as `correlated` has them."""
    done = steps(weight, correlated(weight.shape[1], correlation), bits)
    unit = done.nearest_losses[-1] or 1.0
    now, nearest = done.losses[column] / unit, done.nearest_losses[column] / unit
    moved = done.weights[column] - done.weights[0]
    ahead = np.abs(moved[:, column:])
    future = np.arange(len(done.losses)) > column
    return ColumnsView(
        column=column,
        weights=done.weights[column],
        moved=moved,
        losses=np.where(future, np.nan, done.losses / unit),
        nearest_losses=np.where(future, np.nan, done.nearest_losses / unit),
        readout=lines(
            ("columns rounded", f"{column} of {weight.shape[1]}"),
            ("loss so far, GPTQ", f"{now:.2f}"),
            ("loss so far, round to nearest", f"{nearest:.2f} (1.00 at the end)"),
            ("largest compensation", f"{ahead.max(initial=0):.2f}"),
        ),
        alt=(
            f"Left: a matrix of {weight.shape[0]} by {weight.shape[1]} weights with the first "
            f"{column} columns rounded, and what has been added to each weight. Right: the loss so "
            f"far, GPTQ {now:.2f}, round to nearest {nearest:.2f}, in units of "
            "round-to-nearest's final loss."
        ),
    )


def explore_columns(weight: torch.Tensor) -> Explorer:
    """A panel: a small weight (rows, columns) is rounded column by column; at most 5 by 10."""
    controls = {
        "column": widgets.IntSlider(0, 0, weight.shape[1], description="columns rounded"),
        "correlation": widgets.SelectionSlider(
            options=CORRELATIONS, value=0.8, description="correlation of neighboring inputs"
        ),
        "bits": widgets.IntSlider(3, 2, 4, description="bits"),
    }
    return Explorer(controls, partial(columns_view, weight), ColumnsFigure(*weight.shape))


# --- a real layer ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Layer:
    """A linear layer with what reaches it."""

    weight: torch.Tensor
    """float32 (out_features, in_features)."""
    calibration: dict[str, torch.Tensor]
    """Kind of text -> float32 (sequences, length, in_features), of which calibration takes some."""
    held_out: torch.Tensor
    """The same for other text, from which nothing is learned; at least two tokens a sequence."""


@dataclass(frozen=True)
class LayerView:
    """What `explore_layer` shows at one position of its controls."""

    method: str
    losses: np.ndarray
    """(2, 3): of round-to-nearest and of the method, on calibration text, on held-out text, and on
    held-out text without the first token of each sequence."""
    ratios: np.ndarray
    """(3,): the method's losses over round-to-nearest's."""
    errors: np.ndarray
    """(2, bins): of both, relative RMSE of the weights by channel, the largest inputs first."""
    readout: str
    alt: str


def collect(model, tokens: torch.Tensor, block: int) -> dict[str, torch.Tensor]:
    """What reaches the linear layers of one block: name -> float32 (sequences, length, in), on the
    CPU, as explorers want it.

    `tokens`: int64 (sequences, length). The model is not changed.
    """
    from chapter13.whole_model.walk import Walk

    walk = Walk(model, tokens)
    for index in range(block):
        walk.advance(index)
    return {name: x.cpu().view(*tokens.shape, -1) for name, x in walk.inputs(block).items()}


def hessians(model, tokens: torch.Tensor, names: list[str]) -> dict[str, torch.Tensor]:
    """The Hessian of each of these linear layers' inputs, on the CPU, from one pass.

    `tokens`: int64 (sequences, length); `names`: of modules, as `model.get_submodule` takes them.
    The model is not changed: all layers get the full-precision model's inputs.
    """
    found, hooks = {}, []
    for name in names:

        def keep(module, inputs, name=name):
            found[name] = gptq.hessian(inputs[0].flatten(0, 1)).cpu()

        hooks.append(model.get_submodule(name).register_forward_pre_hook(keep))
    try:
        with torch.no_grad():
            model.base_model(tokens.to(model.device), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return found


@dataclass(frozen=True)
class Calibration:
    """The Hessian of some calibration text; made by `calibrate`."""

    hessian: torch.Tensor
    tokens: int
    warning: str
    """What `gptq.hessian` warns of, or ""."""


def calibrate(inputs: torch.Tensor) -> Calibration:
    """The Hessian of inputs (sequences, length, in_features)."""
    x = inputs.flatten(0, 1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        H = gptq.hessian(x)
    return Calibration(H, len(x), str(caught[0].message) if caught else "")


def layer_view(
    weight: torch.Tensor,
    calibration: Calibration,
    held_out: Calibration,
    ordinary: Calibration,
    method: str,
    bits: int,
    group_size: int | str,
    act_order: bool,
    clip_search: bool,
    damp: float,
) -> LayerView:
    """A weight quantized with these settings, against round-to-nearest.

    `ordinary`: of the held-out text without the first token of each sequence. Raises ValueError as
    `gptq.quantize`.
    """
    nearest = quantize_affine(weight, bits, group_size)
    quantized = nearest
    if method == "gptq":
        options = {"act_order": act_order, "clip_search": clip_search, "damp": damp}
        quantized = gptq.quantize(weight, calibration.hessian, bits, group_size, **options)
    restored = [each.dequantize() for each in (nearest, quantized)]
    hessians = [each.hessian for each in (calibration, held_out, ordinary)]
    losses = np.array([[gptq.layer_loss(weight, Q, H) for H in hessians] for Q in restored])
    order = calibration.hessian.diagonal().argsort(descending=True, stable=True)
    errors = np.array([_by_channel(weight, Q, order) for Q in restored])
    ratio = losses[1] / np.where(losses[0], losses[0], 1)
    told = [
        f"{loss:.2g}, {r:.2g} times rounding's" for loss, r in zip(losses[1], ratio, strict=True)
    ]
    rows = [
        ("bits per weight", f"{quantized.bits_per_weight:.4g}"),
        ("loss on calibration text", f"{told[0]}, {calibration.tokens} tokens"),
        ("loss on held-out text", told[1]),
        ("without first tokens", told[2]),
        ("relative RMSE of the weights", f"{relative_rmse(weight, restored[1]):.1%}"),
    ]
    if calibration.warning:
        rows.append(("warning", calibration.warning.partition(":")[0]))
    return LayerView(
        method=method,
        losses=losses,
        ratios=ratio,
        errors=errors,
        readout=lines(*rows),
        alt=(
            f"Left: the layer loss of {METHOD_LABELS[method]} over that of round-to-nearest at the "
            f"same bits: {ratio[0]:.2g} on calibration text, {ratio[1]:.2g} on held-out text, "
            f"{ratio[2]:.2g} there without first tokens. Right: the error of the weights by input "
            f"channel, the largest inputs first: from {errors[1, 0]:.0%} to {errors[1, -1]:.0%} of "
            "the weights' RMS."
        ),
    )


def _by_channel(W, Q, order):
    """The RMS error of the columns in this order, over the RMS of all weights, in BINS bins."""
    squared = (W - Q).double().square().mean(0)[order]
    bins = min(BINS, len(squared))
    binned = torch.nn.functional.adaptive_avg_pool1d(squared[None], bins)[0]
    return (binned / (W.double().square().mean() or 1.0)).sqrt().numpy()


def explore_layer(layers: dict[str, Layer]) -> Explorer:
    """A panel: one of these layers, calibrated on some text of a chosen kind."""
    first = next(iter(layers.values()))
    most = min(len(x) for layer in layers.values() for x in layer.calibration.values())
    amounts = [2**power for power in range(most.bit_length())]
    controls = {
        "layer": widgets.Dropdown(options=list(layers), description="layer"),
        "method": widgets.Dropdown(
            options=[(label, name) for name, label in METHOD_LABELS.items()],
            value="gptq",
            description="method",
        ),
        "bits": widgets.IntSlider(4, 2, 8, description="bits"),
        "group_size": GroupSizeSlider(GROUP_SIZES, 64),
        "act_order": widgets.Checkbox(True, description="act-order"),
        "clip_search": widgets.Checkbox(False, description="clip search"),
        "damp": widgets.SelectionSlider(options=DAMPS, value=0.01, description="damping"),
        "text": widgets.Dropdown(options=list(first.calibration), description="calibrate on"),
        "amount": widgets.SelectionSlider(
            options=amounts, value=amounts[-1], description="sequences"
        ),
    }
    # Hessians take longer than all the rest, and most moves need the same ones again
    calibrated = lru_cache(maxsize=16)(
        lambda layer, text, amount: calibrate(layers[layer].calibration[text][:amount])
    )
    held_out = lru_cache(maxsize=8)(
        lambda layer: [
            calibrate(x) for x in (layers[layer].held_out, layers[layer].held_out[:, 1:])
        ]
    )

    def compute(layer, text, amount, **settings):
        calibration = calibrated(layer, text, amount)
        return layer_view(layers[layer].weight, calibration, *held_out(layer), **settings)

    return Explorer(controls, compute, LayerFigure())
