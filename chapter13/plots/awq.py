"""Pictures of AWQ: which input channels are scaled up, and the loss at each exponent."""

import math

import numpy as np

from chapter13.plots.live import LiveFigure
from chapter13.plots.picture import (
    COLORS,
    METHOD_LOOK,
    SERIES,
    Picture,
    method_fill,
    method_line,
    new_figure,
    set_ticks,
    style,
)

NEAREST = METHOD_LOOK["nearest"].label


def loss_curves(
    ratios: tuple[float, ...],
    losses: dict[str, list[float]],
    ordinary: dict[str, list[float]] | None = None,
) -> Picture:
    """One curve for each of up to four layers: its loss over r, as a multiple of that at r = 0.

    The best r of each curve is marked, and named where it is the last of `ratios`, so that a larger
    one might be better. `losses`: name -> a loss for each of `ratios`; `ordinary`: for some of the
    names, the loss on held-out text without first tokens, dashed, in the same colour.
    """
    words, curves, ordinary = [], [], ordinary or {}
    with style():
        figure, ax = new_figure(10, 4.2)
        for (name, values), color, marker in zip(losses.items(), SERIES, "osD^", strict=False):
            relative = np.array(values) / values[0]
            best = int(relative.argmin())
            curves.append(relative)
            ax.plot(ratios, relative, color=color, label=name)
            ax.plot(ratios[best], relative[best], marker, ms=11, color=color)
            told = f"{name} is best at r = {ratios[best]:.2f} with {relative[best]:.2g}"
            if best == len(ratios) - 1:
                told += ", the edge of the search"
                ax.annotate(
                    "edge of the search", (ratios[best], relative[best]), (-14, 12), ha="right",
                    textcoords="offset points", weight="bold",
                    bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1},
                )  # fmt: skip
            if name in ordinary:
                other = np.array(ordinary[name]) / ordinary[name][0]
                curves.append(other)
                ax.plot(ratios, other, "--", color=color)
                told += f" ({other[best]:.2g} held-out, no first tokens)"
            words.append(told)
        if ordinary:
            ax.plot([], [], "--", color=COLORS["text"], label="held-out, no first tokens")
        ax.axhline(1, lw=3, label=NEAREST, **method_fill("nearest"))
        ax.set(xlabel="r", ylabel="loss / that of rounding", yscale="log")
        set_loss_axis(ax, np.array(curves))
        figure.legend(loc="outside upper center", ncols=3)
    return Picture(figure, f"Curves of loss over r, {NEAREST} is 1: {'; '.join(words)}.")


class AwqFigure(LiveFigure):
    """Shows an `explorers.awq.View`: the channels at the left, the loss over r at the right.

    Dashed: the loss on held-out text without first tokens; NaN where there is no such text.
    """

    def __init__(self):
        super().__init__(width=10, height=4.2, cols=2, width_ratios=[3, 2])
        channels, loss = self.axes
        with style():
            channels.set(
                xscale="log", yscale="log", ylim=(1e-2, 1e3),
                xlabel="input channels, largest mean |x| first", ylabel="value of a channel",
            )  # fmt: skip
            gray, teal, red = COLORS["original"], SERIES[1], COLORS["highlight"]
            (self._before,) = channels.plot([], [], color=gray, lw=3, label="mean |x|")
            (self._after,) = channels.plot([], [], color=teal, ls="--", label="mean |x| / s")
            (self._s,) = channels.plot([], [], color=red, lw=3, label="s")
            self._band = channels.axvspan(0, 1, color=red, alpha=0.15, label="s ≥ 2")
            channels.set_title("Which channels are scaled up?")
            channels.legend(loc="upper right", ncols=2)
            loss.set(xlim=(-0.03, 0.98), yscale="log", xlabel="r", ylabel="loss / that of rounding")
            loss.set_title("Which r is best?")
            loss.axhline(1, lw=3, **method_fill("nearest"))
            look = {"lw": 3} | method_fill("awq")
            (self._curve,) = loss.plot([], [], label="calibration", **look)
            (self._ordinary,) = loss.plot(
                [], [], ls="--", label="held-out, no first tokens", **look
            )
            (self._best,) = loss.plot([], [], "D", ms=11, color=COLORS["text"], label="found r")
            (self._now,) = loss.plot([], [], "o", ms=9, color=red, label="this r")
            handles = [self._curve, self._ordinary, self._best, self._now]
            self.figure.legend(handles=handles, loc="outside upper right", ncols=4)
        self.animate(self._band, self._before, self._after, self._s)
        self.animate(self._curve, self._ordinary, self._best, self._now)

    def update(self, view):
        rank = np.arange(1, len(view.activation) + 1)
        relative = view.losses / view.losses[0]
        ordinary = view.ordinary / view.ordinary[0]
        if self.changed((len(rank), *view.losses)):  # another layer, bits or group size
            set_ticks(self.axes[0].xaxis, [1, 10, 100, 1000, 10000])
            self.axes[0].set_xlim(0.8, 1.2 * len(rank))
            set_loss_axis(self.axes[1], np.array([*relative, *ordinary[np.isfinite(ordinary)]]))
            self.redraw()
        self._before.set_data(rank, view.activation)
        self._after.set_data(rank, view.activation / view.s)
        self._s.set_data(rank, view.s)
        self._band.set_x(0.8)
        self._band.set_width(view.protected + 0.5 - 0.8)
        self._band.set_visible(view.protected > 0)
        best, now = int(relative.argmin()), view.ratios.index(view.r)
        self._curve.set_data(view.ratios, relative)
        self._ordinary.set_data(view.ratios, ordinary)
        self._best.set_data([view.ratios[best]], [relative[best]])
        self._now.set_data([view.r], [relative[now]])


def set_loss_axis(ax, relative):
    """A logarithmic axis around these losses, with a number at each doubling or each decade."""
    low, high = 0.8 * relative.min(), 1.25 * relative.max()
    base = 2 if high / low < 100 else 10
    exponents = range(math.ceil(math.log(low, base)), math.floor(math.log(high, base)) + 1)
    ticks = [float(base) ** exponent for exponent in exponents]
    ax.set_ylim(low, high)
    set_ticks(ax.yaxis, ticks)


def scale_curve(scales: list[float], errors: list[float]) -> Picture:
    """The error of an output against the scale of one channel, both on logarithmic axes."""
    best = int(np.argmin(errors))
    with style():
        figure, ax = new_figure(10, 3.6)
        ax.plot(scales, errors, ms=8, **method_line("awq"))
        ax.plot(scales[best], errors[best], "D", ms=12, color=COLORS["text"], label="best")
        ax.set(
            xscale="log", yscale="log", xlabel="s of the large channel",
            ylabel="mean squared error\nof the output",
        )  # fmt: skip
        set_ticks(ax.xaxis, [2**k for k in range(10)])
        ax.legend()
    return Picture(
        figure,
        f"Curve of the output's error over the scale of one channel: {errors[0]:.2g} without "
        f"scaling, at best {errors[best]:.2g} at s = {scales[best]:.3g}, and {errors[-1]:.2g} at "
        f"s = {scales[-1]:.3g}.",
    )
