"""Pictures of activations: where outliers live in a model, and what each remedy does to a layer."""

import numpy as np
from matplotlib.colors import LogNorm

from chapter13.plots.live import LiveFigure
from chapter13.plots.picture import (
    COLORS,
    METHOD_LOOK,
    SERIES,
    Picture,
    method_line,
    method_named,
    new_figure,
    style,
)
from chapter13.plots.shapes import draw_dot_rows

METHODS = tuple(
    METHOD_LOOK[method].label
    for method in ("per_tensor", "static", "per_token", "smoothquant", "llm_int8")
)
SHOWN = 60  # channels in the explorer's picture, the largest first
TOP = 60  # dB


def outlier_map(names: list[str], absmax: np.ndarray) -> Picture:
    """Layers x channels: the largest magnitude of each input channel, on a logarithmic scale.

    `absmax`: (layers, channels). Channels are sorted by their largest magnitude in any layer.
    """
    order = np.argsort(-absmax.max(0))
    shown = np.maximum(absmax[:, order], 1e-2)
    with style():
        figure, ax = new_figure(10, 4.6)
        image = ax.imshow(
            shown, aspect="auto", cmap="cividis", interpolation="nearest", norm=LogNorm()
        )
        ax.grid(visible=False)
        ax.set(xlabel="input channel, largest first", ylabel="layer")
        figure.colorbar(image, label="largest magnitude")
    share = np.sort(absmax.max(0))[::-1]
    return Picture(
        figure,
        f"Map of {len(names)} layers and {absmax.shape[1]} channels: the largest magnitudes stand "
        f"in a few columns, the same in most layers. The largest channel reaches {share[0]:.0f}, "
        f"the median channel {np.median(share):.0f}.",
    )


class ActivationsFigure(LiveFigure):
    """Shows an `explorers.activations.View`: channels at the left, errors of all ways right."""

    def __init__(self):
        super().__init__(width=10, height=4, cols=2, width_ratios=[3, 2])
        channels, error = self.axes
        x = np.arange(SHOWN)
        with style():
            channels.set(
                xlim=(-1, SHOWN), ylim=(1e-2, 1e6), yscale="log",
                xlabel=f"the {SHOWN} largest input channels", ylabel="largest magnitude",
            )  # fmt: skip
            empty = np.full(SHOWN, np.nan)
            gray, teal = COLORS["original"], SERIES[1]
            (self._before,) = channels.plot(x, empty, "o", ms=5, color=gray, label="activations")
            (self._after,) = channels.plot(x, empty, "x", ms=6, color=teal, label="smoothed")
            self._clip = channels.axhline(1, color=COLORS["error"], label="static clip")
            self._threshold = channels.axhline(
                1, color=COLORS["text"], ls="--", label="outlier threshold"
            )
            channels.legend(loc="upper right", ncols=2)
            looks = {label: method_line(method_named(label)) for label in METHODS}
            draw_dot_rows(error, {label: {label: 0} for label in METHODS}, looks)
            self._dots = error.lines[:]
            self._numbers = [
                error.text(0, row, "", va="center", weight="bold", fontsize=12)
                for row in range(len(METHODS))
            ]
            error.set(xlim=(0, TOP), xlabel="SQNR of the layer's output, dB")
            self.animate(self._before, self._after, self._clip, self._threshold)
            self.animate(*self._dots, *self._numbers)

    def update(self, view):
        for line, values in ((self._before, view.before), (self._after, view.after)):
            padded = np.full(SHOWN, np.nan)
            padded[: len(values)] = values
            line.set_ydata(padded)
        self._clip.set_ydata([view.clip] * 2)
        self._threshold.set_ydata([view.threshold] * 2)
        for dot, number, value in zip(self._dots, self._numbers, view.sqnr.values(), strict=True):
            place = min(max(value, 0), TOP - 10)
            dot.set_xdata([place])
            number.set_x(place + 3)
            number.set_text(f"{value:.1f}")
