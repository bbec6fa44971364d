"""The explorer of notebook 09: one layer's channels, scaled by what they carry."""

from dataclasses import dataclass
from functools import lru_cache

import ipywidgets as widgets
import numpy as np
import torch

from chapter13.awq import RATIOS, scales, search_scale
from chapter13.explorers.base import Explorer, lines
from chapter13.explorers.layers import GroupSizeSlider
from chapter13.plots.awq import AwqFigure


@dataclass(frozen=True)
class View:
    """What the explorer shows at one position of its controls."""

    ratios: tuple[float, ...]
    losses: np.ndarray
    """The mean squared error of the layer's output for each ratio."""
    r: float
    activation: np.ndarray
    """Mean |x| of each input channel, descending."""
    s: np.ndarray
    """The scale of each of these channels at `r`, over that of the median channel."""
    protected: int
    """How many of these are 2 or more."""
    readout: str
    alt: str


def view(layer: str, x, losses: tuple[float, ...], r: float) -> View:
    """One layer at one r. `x`: (tokens, in_features); `losses`: as `search_scale` gives them."""
    activation = x.abs().mean(0)
    activation = activation.sort(descending=True, stable=True)[0]
    s = scales(activation, r)
    s = s / s.median()  # a factor that all channels share changes nothing
    protected = int((s >= 2).sum())
    now = losses[RATIOS.index(r)] / losses[0]
    best = RATIOS[losses.index(min(losses))]
    least = min(losses) / losses[0]
    return View(
        ratios=RATIOS,
        losses=np.array(losses),
        r=r,
        activation=activation.numpy(),
        s=s.numpy(),
        protected=protected,
        readout=lines(
            ("loss / plain rounding's", f"{now:.2g}"),
            ("best r, and its loss", f"{best:.2f}, {least:.2g}"),
            ("protected: s of 2 or more", f"{protected} of {len(s)} channels"),
            ("s, median channel 1", f"{s.min():.2g} to {s.max():.2g}"),
        ),
        alt=(
            f"Left: mean |x| of the {len(s)} input channels of {layer}, from "
            f"{activation[0]:.2g} down to {activation[-1]:.2g}, as they are and divided by s. "
            f"With r = {r:.2f} the weights of {protected} are scaled up twofold or more. "
            f"Right: the loss over r, {now:.2g} times that of plain rounding here, at best "
            f"{least:.2g} at r = {best:.2f}."
        ),
    )


def explore_awq(layers: dict[str, tuple[torch.Tensor, torch.Tensor]]):
    """A panel: the exponent r, bits and group size, on the inputs and weight of one layer.

    `layers`: name -> (inputs (tokens, in_features), weight (out_features, in_features)), float32.
    From a GPU, they are copied to the CPU. The loss is that of the layer's own output.
    """
    layers = {name: (x.cpu(), weight.cpu()) for name, (x, weight) in layers.items()}
    controls = {
        "layer": widgets.Dropdown(options=list(layers), description="layer"),
        "r": widgets.SelectionSlider(options=list(RATIOS), value=0.5, description="r"),
        "bits": widgets.IntSlider(4, 2, 8, description="bits"),
        "group_size": GroupSizeSlider(["channel", 64, 32, 16], 64),
    }

    @lru_cache(maxsize=64)
    def losses(layer, bits, group_size):
        x, weight = layers[layer]
        return search_scale(
            x.abs().mean(0), [weight], lambda tried: [x @ tried[0].T], bits, group_size
        ).losses

    def compute(layer, r, bits, group_size):
        return view(layer, layers[layer][0], losses(layer, bits, group_size), r)

    return Explorer(controls, compute, AwqFigure())
