"""The explorer of notebook 09: one layer's channels, scaled by their activations."""

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
    ordinary: np.ndarray
    """The same on held-out text, without the first token of each sequence, or NaN."""
    r: float
    activation: np.ndarray
    """Mean |x| of each input channel, descending."""
    s: np.ndarray
    """The scale of each of these channels at `r`, over that of the median channel."""
    protected: int
    """How many of these are 2 or more."""
    readout: str
    alt: str


def view(
    layer: str, x, losses: tuple[float, ...], r: float, ordinary: tuple[float, ...] | None = None
) -> View:
    """One layer at one r. `x`: (tokens, in_features); `losses`: as `search_scale` gives them.

    `ordinary`: the losses on held-out text, without the first token of each sequence.
    """
    if ordinary is None:
        ordinary = (np.nan,) * len(losses)
    activation = x.abs().mean(0)
    activation = activation.sort(descending=True, stable=True)[0]
    s = scales(activation, r)
    s = s / s.median()  # a factor that all channels share changes nothing
    protected = int((s >= 2).sum())
    now = losses[RATIOS.index(r)] / losses[0]
    best = RATIOS[losses.index(min(losses))]
    least = min(losses) / losses[0]
    without = ordinary[RATIOS.index(r)] / ordinary[0]
    rows = [("loss / plain rounding's", f"{now:.2g}")]
    if not np.isnan(without):
        rows.append(("held-out, without first tokens", f"{without:.2g}"))
    said = "" if np.isnan(without) else f", {without:.2g} on held-out text without first tokens"
    return View(
        ratios=RATIOS,
        losses=np.array(losses),
        ordinary=np.array(ordinary),
        r=r,
        activation=activation.numpy(),
        s=s.numpy(),
        protected=protected,
        readout=lines(
            *rows,
            ("r that AWQ finds, and its loss", f"{best:.2f}, {least:.2g}"),
            ("channels with s of 2 or more", f"{protected} of {len(s)}"),
            ("s, over the median channel's", f"{s.min():.2g} to {s.max():.2g}"),
        ),
        alt=(
            f"Left: mean |x| of the {len(s)} input channels of {layer}, from "
            f"{activation[0]:.2g} down to {activation[-1]:.2g}, as they are and divided by s. "
            f"With r = {r:.2f} the weights of {protected} are scaled up twofold or more. "
            f"Right: the loss over r, {now:.2g} times that of plain rounding here{said}; AWQ finds "
            f"r = {best:.2f} with {least:.2g}."
        ),
    )


def explore_awq(
    layers: dict[str, tuple[torch.Tensor, torch.Tensor]],
    held_out: dict[str, torch.Tensor] | None = None,
) -> Explorer:
    """A panel: the exponent r, bits and group size, on the inputs and weight of one layer.

    `layers`: name -> (inputs (tokens, in_features), weight (out_features, in_features)), float32;
    from a GPU, they are copied to the CPU. The loss is that of the layer's own output. `held_out`:
    name -> inputs (sequences, length, in_features) of other text; the loss on all but the first
    token of each sequence is shown too.
    """
    layers = {name: (x.cpu(), weight.cpu()) for name, (x, weight) in layers.items()}
    ordinary = {name: x[:, 1:].cpu().flatten(0, 1) for name, x in (held_out or {}).items()}
    controls = {
        "layer": widgets.Dropdown(options=list(layers), description="layer"),
        "r": widgets.SelectionSlider(options=list(RATIOS), value=0.5, description="r"),
        "bits": widgets.IntSlider(4, 2, 8, description="bits"),
        "group_size": GroupSizeSlider(["channel", 64, 32, 16], 64),
    }

    @lru_cache(maxsize=64)
    def losses(layer, bits, group_size):
        x, weight = layers[layer]
        activation = x.abs().mean(0)

        def over(inputs):
            def output(tried):
                return [inputs @ tried[0].T]

            return search_scale(activation, [weight], output, bits, group_size).losses

        return over(x), over(ordinary[layer]) if layer in ordinary else None

    def compute(layer, r, bits, group_size):
        every, others = losses(layer, bits, group_size)
        return view(layer, layers[layer][0], every, r, others)

    return Explorer(controls, compute, AwqFigure())
