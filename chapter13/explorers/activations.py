"""The explorer of notebook 04: one layer's activations in INT8, five ways.

Each token's output is scored alone. The first token of a sequence may be a thousand times larger
than all others; in a sum over tokens, only its error would count.
"""

from dataclasses import dataclass
from functools import lru_cache

import ipywidgets as widgets
import numpy as np
import torch

from chapter13.dynamic import Int8Linear
from chapter13.explorers.base import Explorer, lines
from chapter13.outliers import MixedLinear, smoothing, split_outliers
from chapter13.plots.activations import METHODS, SHOWN, ActivationsFigure
from chapter13.static import StaticInt8Linear, Statistics

PERCENTILES = [99.0, 99.9, 99.99, 99.999, 100.0]


@dataclass(frozen=True)
class View:
    """What the explorer shows at one position of its controls."""

    before: np.ndarray
    """The largest magnitudes of the SHOWN largest channels, descending."""
    after: np.ndarray
    """Those of the same channels, divided by SmoothQuant's s."""
    clip: float
    """Where the static grid ends."""
    threshold: float
    columns: int
    """Outlier columns of LLM.int8()."""
    sqnr: dict[str, float]
    """Of the median token's output in dB, by the names in METHODS."""
    first: dict[str, float]
    """The same of the first token."""
    readout: str
    alt: str


def token_sqnr(exact: torch.Tensor, approximation: torch.Tensor) -> torch.Tensor:
    """The signal-to-quantization-noise ratio of each row in dB: (rows,), inf without error."""
    signal = exact.double().square().sum(-1)
    noise = (exact.double() - approximation).square().sum(-1)
    return torch.where(noise == 0, torch.inf, 10 * torch.log10(signal / noise))


def view(x, weight, percentile: float, alpha: float, threshold: float) -> View:
    """Each token's output, each way, against float32. `x`: (tokens, in), `weight`: (out, in)."""
    statistics = Statistics.empty(x.shape[1])
    statistics.add(x)
    clip = statistics.clip("percentile", percentile)
    absmax = statistics.channel_absmax
    s = smoothing(absmax, [weight], alpha)
    outputs = {
        "per tensor": Int8Linear(weight, None, "per_tensor")(x),
        "static": StaticInt8Linear(weight, None, clip or 1.0)(x),
        "per token": Int8Linear(weight, None, "per_token")(x),
        "SmoothQuant": Int8Linear(weight * s, None, "per_token")(x / s),
        "LLM.int8()": MixedLinear(weight, None, threshold)(x),
    }
    exact = x @ weight.T
    tokens = {name: token_sqnr(exact, outputs[name]) for name in METHODS}
    sqnr = {name: values.median().item() for name, values in tokens.items()}
    first = {name: values[0].item() for name, values in tokens.items()}
    columns = len(split_outliers(x.half(), threshold)[2])
    largest = absmax.argsort(descending=True, stable=True)[:SHOWN]
    best = max(sqnr, key=sqnr.get)
    return View(
        before=absmax[largest].numpy(),
        after=(absmax / s)[largest].numpy(),
        clip=clip,
        threshold=threshold,
        columns=columns,
        sqnr=sqnr,
        first=first,
        readout=lines(
            *(
                (f"{name}, SQNR", f"{_db(sqnr[name])} dB; first token {_db(first[name])} dB")
                for name in METHODS
            ),
            ("static grid ends at", f"{clip:.3g} of {statistics.absmax:.3g}"),
            ("outlier columns", f"{columns} of {x.shape[1]}"),
        ),
        alt=(
            f"Left: the largest magnitudes of the layer's {len(largest)} largest input channels, "
            f"from {absmax.max():.3g} down, before and after smoothing with alpha {alpha:g}; the "
            f"static grid ends at {clip:.3g}, outliers begin at {threshold:g}. Right: SQNR of one "
            "token's output in dB, the median token and in parentheses the first: "
            + ", ".join(f"{name} {_db(sqnr[name])} ({_db(first[name])})" for name in METHODS)
            + f". Best for the median token: {best}."
        ),
    )


def _db(value: float) -> str:
    return f"{round(value, 1) + 0.0:.1f}"  # -0.0 + 0.0 is 0.0


def explore_activations(layers: dict[str, tuple[torch.Tensor, torch.Tensor]]):
    """A panel: percentile, alpha and threshold, on the inputs and weight of one layer.

    `layers`: name -> (inputs (tokens, in_features), weight (out_features, in_features)), float32;
    from a GPU, they are copied to the CPU.
    """
    layers = {name: (x.cpu(), weight.cpu()) for name, (x, weight) in layers.items()}
    controls = {
        "layer": widgets.Dropdown(options=list(layers), description="layer"),
        "percentile": widgets.SelectionSlider(
            options=PERCENTILES, value=100.0, description="static: percentile"
        ),
        "alpha": widgets.FloatSlider(
            0.5, min=0, max=1, step=0.05, description="SmoothQuant: alpha"
        ),
        "threshold": widgets.IntSlider(6, 1, 20, description="LLM.int8(): threshold"),
    }

    @lru_cache(maxsize=256)
    def compute(layer, percentile, alpha, threshold):
        return view(*layers[layer], percentile, alpha, float(threshold))

    return Explorer(controls, compute, ActivationsFigure())
