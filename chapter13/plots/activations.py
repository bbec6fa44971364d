"""Pictures of activations: where outliers live in a model, and what each remedy does to a layer."""

import math

import numpy as np
from matplotlib.colors import LogNorm
from matplotlib.lines import Line2D

from chapter13.plots.live import LiveFigure
from chapter13.plots.picture import (
    COLORS,
    METHOD_LOOK,
    SERIES,
    Picture,
    method_line,
    method_named,
    new_figure,
    set_ticks,
    style,
)
from chapter13.plots.shapes import draw_dot_rows

METHODS = tuple(
    METHOD_LOOK[method].label
    for method in ("per_tensor", "static", "per_token", "smoothquant", "llm_int8")
)
SHOWN = 60  # channels in the explorer's picture, the largest first
MAPPED = 40  # channels in the map
TOP = 60  # dB


def outlier_map(names: list[str], relative: np.ndarray) -> Picture:
    """The input channels of layers that stand out: over all layers above, layer by layer below.

    `relative`: (layers, channels), the largest magnitude of each input channel as a multiple of its
    layer's median channel. The MAPPED channels with the largest median over layers are drawn.
    """
    typical = np.median(relative, 0)
    order = np.argsort(-typical, kind="stable")[:MAPPED]
    shown = relative[:, order]
    x = np.arange(len(order))
    with style():
        figure, (profile, ax) = new_figure(10, 5, rows=2, sharex=True, height_ratios=[2, 3])
        spread = {"color": COLORS["original"], "lw": 4}
        profile.vlines(x, shown.min(0), shown.max(0), label="all layers", **spread)
        profile.plot(x, typical[order], "o", ms=6, color=COLORS["text"], label="median layer")
        profile.set(xlim=(-0.5, len(order) - 0.5), ylim=(0, None), ylabel="× median")
        profile.set_title("Largest magnitude of a channel, as a multiple of the median channel")
        profile.legend(loc="upper right", ncols=2)
        image = ax.imshow(
            shown, aspect="auto", cmap="cividis", interpolation="nearest",
            norm=LogNorm(1, 20, clip=True),
        )  # fmt: skip
        ax.grid(visible=False)
        ax.set(xlabel="input channel, the largest first", ylabel="layer")
        bar = figure.colorbar(image, ax=ax, pad=0.01, label="× median")
        set_ticks(bar.ax.yaxis, [1, 2, 5, 10, 20])
    often = int((np.mean(relative > 4, 0) >= 0.5).sum())
    return Picture(
        figure,
        f"The {len(order)} largest of {relative.shape[1]} input channels in {len(names)} layers, "
        "each compared with the median channel of its layer. Above: the range over layers and the "
        "median layer. Below: a map of layers and channels. The largest channel reaches "
        f"{relative.max():.0f} times the median; {often} channels exceed 4 times the median in at "
        "least half of the layers.",
    )


class ActivationsFigure(LiveFigure):
    """Shows an `explorers.activations.View`: channels at the left, errors of all ways right.

    A filled marker is the median token, a hollow one the first token.
    """

    def __init__(self):
        super().__init__(width=10, height=4, cols=2, width_ratios=[3, 2])
        channels, error = self.axes
        x = np.arange(SHOWN)
        with style():
            channels.set(
                xlim=(-1, SHOWN), ylim=(1e-2, 1e6), yscale="log",
                xlabel=f"the {SHOWN} largest input channels", ylabel="largest magnitude",
                title="Which inputs are large?",
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
            looks = {
                (label, hollow): method_line(method_named(label), variant=hollow)
                for hollow in (True, False)
                for label in METHODS
            }
            rows = {label: {(label, True): 0, (label, False): 0} for label in METHODS}
            draw_dot_rows(error, rows, looks)
            self._first = error.lines[: len(METHODS)]
            self._dots = error.lines[len(METHODS) :]
            self._numbers = [
                error.text(TOP + 1, row, "", va="center", ha="right", weight="bold", fontsize=12)
                for row in range(len(METHODS))
            ]
            error.set(xlim=(-3, TOP + 2), xlabel="SQNR of one token's output, dB")
            error.set_title("How accurate is the output?")
            black = {"color": COLORS["text"], "ls": "", "marker": "o", "ms": 9}
            hollow = black | {"markerfacecolor": "white", "markeredgewidth": 2}
            handles = [Line2D([], [], label="median token (and its number)", **black)]
            handles.append(Line2D([], [], label="first token", **hollow))
            self.figure.legend(handles=handles, loc="outside lower right", ncols=2)
            self.animate(self._before, self._after, self._clip, self._threshold)
            self.animate(*self._first, *self._dots, *self._numbers)
        self.pixels()  # lays the axes out with the longest labels: other layers do not move them

    def update(self, view):
        limits = _decades(view)
        if self.changed(limits):
            self.axes[0].set_ylim(limits)
            self._background = None  # in the places that the axes have
        for line, values in ((self._before, view.before), (self._after, view.after)):
            padded = np.full(SHOWN, np.nan)
            padded[: len(values)] = values
            line.set_ydata(padded)
        self._clip.set_ydata([view.clip] * 2)
        self._threshold.set_ydata([view.threshold] * 2)
        for name, first, dot, number in zip(
            METHODS, self._first, self._dots, self._numbers, strict=True
        ):
            first.set_xdata([min(max(view.first[name], 0), TOP - 10)])
            dot.set_xdata([min(max(view.sqnr[name], 0), TOP - 10)])
            number.set_text(f"{round(view.sqnr[name], 1) + 0.0:.1f}")


def _decades(view):
    """The range of the channels' axis: whole decades, and room for the legend above."""
    held = [*view.before, *view.after, view.clip, view.threshold]
    held = [float(value) for value in held if value > 0]
    low, high = math.floor(math.log10(min(held))), math.ceil(math.log10(max(held)))
    return 10.0**low, 10.0 ** (high + 0.35 * (high - low))
