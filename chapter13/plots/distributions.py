"""The pictures of notebook 07: histograms of weights, codes and errors, and Q-Q plots."""

from statistics import NormalDist

import numpy as np
from matplotlib.collections import LineCollection
from matplotlib.ticker import FixedLocator, NullLocator

from chapter13.plots.live import LiveFigure
from chapter13.plots.picture import (
    COLORS,
    SERIES,
    Picture,
    method_fill,
    method_line,
    new_figure,
    set_ticks,
    style,
)


def percent(share):
    """A share in percent with one decimal; 100.0% and 0.0% only where it is all or nothing."""
    return f"{share:.1%}" if share in (0, 1) else f"{min(max(share, 0.001), 0.999):.1%}"


def _histograms(panels, xlabel, **layout):
    """Densities side by side, title -> (values, keywords of `hist`): (figure, axes, peaks)."""
    figure, axes = new_figure(width=10, cols=len(panels), **layout)
    peaks = []
    for ax, (title, (values, look)) in zip(axes, panels.items(), strict=True):
        heights, _, _ = ax.hist(values, density=True, **look)
        peaks.append(heights.max())
        ax.set(title=title, xlabel=xlabel.format(len(np.unique(values))))
    axes[0].set_ylabel("density")
    return figure, axes, peaks


def three_histograms(original, int8, int4, bins=80):
    """The chapter's picture: densities of three float arrays of any shape, `bins` bins each."""
    rounded = {"bins": bins} | method_fill("absmax")
    panels = {
        "FP32 original": (original, {"bins": bins, "color": COLORS["original"]}),
        "INT8 reconstructed": (int8, rounded),
        "INT4 reconstructed": (int4, rounded),
    }
    panels = {title: (np.ravel(values), look) for title, (values, look) in panels.items()}
    with style():
        figure, axes, peaks = _histograms(
            panels, "weight: {:,} distinct values", height=3.4, sharex=True
        )
        for ax in axes:
            ax.locator_params(axis="x", nbins=4)
        return Picture(
            figure,
            f"Three histograms with {bins} bins: the weights, a bell with its peak at a density of "
            f"{peaks[0]:.0f}; reconstructed from INT8, the same bell with teeth; reconstructed "
            f"from INT4, a comb whose teeth reach {peaks[2]:.0f}.",
        )


def same_data(values, bins):
    """One float array drawn with each of two numbers of bins, zoomed to the middle half."""
    values = np.asarray(values).ravel()
    limit = np.abs(values).max() / 2
    panels = {f"{count} bins": (values, {"bins": count} | method_fill("absmax")) for count in bins}
    with style():
        figure, axes, _ = _histograms(panels, "INT8 reconstructed weight", height=3.2, sharey=True)
        for ax in axes:
            ax.set_xlim(-limit, limit)
        return Picture(
            figure,
            f"The same numbers as two histograms. With {bins[0]} bins it shows teeth, with "
            f"{bins[1]} bins a smooth bell: the teeth come from the bins.",
        )


def code_bars(counts_by_title):
    """A panel for each title: `counts` of all codes, centred on zero, (codes, counts) pairs."""
    with style():
        figure, axes = new_figure(width=10, height=3.2, cols=len(counts_by_title), squeeze=False)
        words = []
        for ax, (title, (codes, counts)) in zip(axes[0], counts_by_title.items(), strict=True):
            ax.bar(codes, counts, width=1 if len(codes) > 16 else 0.8, **method_fill("absmax"))
            ax.set(title=title, xlabel="code")
            ax.locator_params(axis="x", integer=True)
            ax.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
            words.append(f"{title}, {np.count_nonzero(counts)} of {len(codes)} codes in use")
        axes[0, 0].set_ylabel("weights")
        return Picture(figure, f"Bars that count the codes: {'; '.join(words)}.")


def error_shapes(errors_by_title, bins=81):
    """A panel for each title: errors in units of the step, against the box of a uniform error."""
    look = {"bins": bins, "range": (-0.6, 0.6), "color": COLORS["error"]}
    panels = {title: (np.ravel(errors), look) for title, errors in errors_by_title.items()}
    with style():
        figure, axes, _ = _histograms(panels, "error / step", height=3.2, sharey=True)
        for ax in axes:
            ax.plot([-0.5, -0.5, 0.5, 0.5], [0, 1, 1, 0], color=COLORS["text"], ls="--", lw=2)
            ax.set_ylim(0, 2.1)
        words = []
        for title, (errors, _) in panels.items():
            middle = np.histogram(errors, [-0.05, 0.05])[0][0] / len(errors) / 0.1
            words.append(f"{title} {middle:.2f}")
        return Picture(
            figure,
            "Histograms of the error in steps of the grid; dashed, the box of a uniform error, "
            f"1 high. Height in the middle: {', '.join(words)}.",
        )


def histogram_pair(weight, approximation, bins=121):
    """Weights and their reconstruction, of any shape, on the same bins out to 4.5 sigma."""
    weight, approximation = np.asarray(weight).ravel(), np.asarray(approximation).ravel()
    limit = 4.5 * weight.std()
    edges = np.linspace(-limit, limit, bins + 1)
    counts = np.histogram(weight, edges)[0]
    others = np.histogram(approximation, edges)[0]
    with style():
        figure, ax = new_figure(width=10, height=3.2)
        ax.stairs(
            counts / counts.max(), edges, fill=True, color=COLORS["original"], label="weights"
        )
        look = {"lw": 1.5, "label": "reconstructed"} | method_fill("absmax")
        ax.stairs(others / counts.max(), edges, **look)
        ax.set(xlim=(-limit, limit), ylim=(0, 1.6), xlabel="weight", ylabel="count (highest = 1)")
        ax.set_yticks([0, 0.5, 1])
        ax.legend(loc="upper right")
        if others.max() > 1.6 * counts.max():
            share = others[bins // 2] / others.sum()
            told = f"{share:.0%} of the reconstructed\nweights are in the bin at 0"
            ax.text(-0.97 * limit, 1.55, told, va="top", fontsize=12, color=COLORS["text"])
        return Picture(
            figure,
            "Histogram of the weights, and on the same bins that of their reconstruction. "
            f"The bin around 0 holds {counts[bins // 2] / len(weight):.1%} of the weights and "
            f"{others[bins // 2] / len(weight):.1%} of the reconstruction.",
        )


def qq(points_by_title, xlabel, ylabel):
    """Quantiles against quantiles, a panel for each title: (x, y) arrays of one length."""
    with style():
        figure, axes = new_figure(
            width=10, height=3.8, cols=len(points_by_title), squeeze=False, sharey=True
        )
        farthest = []
        for ax, (title, (x, y)) in zip(axes[0], points_by_title.items(), strict=True):
            x, y = np.asarray(x), np.asarray(y)
            limit = 1.05 * np.abs(x).max()
            ax.plot([-limit, limit], [-limit, limit], color=COLORS["text"], ls="--", lw=1.2)
            ax.plot(x, y, "o", ms=4, color=SERIES[1])
            ax.set(title=title, xlabel=xlabel)
            farthest.append(f"{title}, {np.abs(y - x).max():.2g}")
        axes[0, 0].set_ylabel(ylabel)
        return Picture(
            figure,
            f"Q-Q plots, {ylabel} against {xlabel}; dashed, the diagonal on which equal "
            f"distributions lie. Farthest from it: {'; '.join(farthest)}.",
        )


def code_ticks(method, bits):
    """(places, words) on an axis from 0 to 1 that all 2**bits codes share, lowest level first.

    Integers are named by their codes; entries of a code book, which have none that matter, by
    their levels.
    """
    if method in ("nf4", "fp4"):  # NF4 has a single 0, FP4 two beside each other
        zero = 7.5 / 16 if method == "nf4" else 8 / 16
        return [0.5 / 16, zero, 15.5 / 16], ["level −1", "0", "1"]
    first = -(2 ** (bits - 1)) if method == "absmax" else 0
    quarters = range(4) if bits > 2 else (0, 2)
    shown = [quarter * 2**bits // 4 for quarter in quarters] + [2**bits - 1]
    words = [f"{first + index}".replace("-", "−") for index in shown]
    return [(index + 0.5) / 2**bits for index in shown], words


def tails(values_by_title):
    """Which share of the numbers lies beyond each distance from zero, in standard deviations.

    title -> float tensor of any shape, a curve for each; dashed, the normal distribution.
    """
    with style():
        figure, ax = new_figure(width=10, height=3.8)
        places = np.linspace(0.5, 5, 91)
        normal = [2 * NormalDist().cdf(-place) for place in places]
        ax.plot(places, normal, color=COLORS["text"], ls="--", label="normal distribution")
        ends = []
        for (title, values), color in zip(values_by_title.items(), SERIES, strict=False):
            distance = np.sort(np.abs(np.ravel(values) / np.std(np.ravel(values))))
            rank = len(distance) - np.unique(np.geomspace(1, len(distance), 400).astype(int))
            share = (len(distance) - rank) / len(distance)
            ax.plot(distance[rank], share, color=color, label=title)
            ax.plot(distance[-1], share[0], "o", ms=9, color=color)
            ends.append(f"{title} {distance[-1]:.1f} σ")
        ax.set(xscale="log", yscale="log", xlim=(0.5, 80), ylim=(5e-7, 1.5))
        set_ticks(ax.xaxis, [0.5, 1, 2, 5, 10, 20, 50])
        ax.yaxis.set_major_locator(FixedLocator([1e-6, 1e-4, 1e-2, 1]))
        ax.yaxis.set_major_formatter(lambda share, _: f"{100 * share:g}%")
        ax.yaxis.set_minor_locator(NullLocator())
        ax.set(xlabel="distance from zero, in σ", ylabel="weights beyond it")
        ax.legend(loc="lower left")
        return Picture(
            figure,
            "Curves on logarithmic axes: the share of the weights that lie beyond a distance from "
            f"zero; dashed, the normal distribution. The farthest weight: {', '.join(ends)}.",
        )


class DistributionsFigure(LiveFigure):
    """Shows an `explorers.distributions.View`.

    Above, gray, the weights; on it the histogram of the reconstruction, on the same bins, or, where
    a single scale makes few levels, on a bin for each level in use, which a tick marks. Below it,
    how often each code occurs, and the shape of the error, between a uniform one (dashed) and that
    of the weights themselves (gray). Right, quantiles of the reconstruction against those of the
    weights. All axes are in standard deviations (the error's in its root mean square), so they stay
    when the layer changes; heights are relative to the highest of the weights and of the codes.
    """

    def __init__(self):
        super().__init__(width=10, height=4.2, rows=2, cols=3, width_ratios=[1, 1, 1.1])
        grid = self.axes[0, 0].get_gridspec()
        for ax in (*self.axes[0], self.axes[1, 2]):
            ax.remove()
        with style():
            weights = self.figure.add_subplot(grid[0, :2])
            quantiles = self.figure.add_subplot(grid[:, 2])
            codes, errors = self.axes[1, :2]
            self.figure.suptitle("What is left of the distribution?", weight="bold", fontsize=14)
            weights.set(xlim=(-4.5, 4.5), ylim=(0, 1.5), yticks=[0, 0.5, 1])
            weights.set(xlabel="weight, in σ (gray: before)", ylabel="density / max")
            codes.set(xlim=(0, 1), ylim=(0, 1.1), yticks=[0, 0.5, 1])
            codes.set(xticks=[], ylabel="count / max")
            codes.set_xlabel("code", labelpad=20)  # room for the codes' names, which change
            codes.grid(visible=False)
            errors.set(xlim=(-3.5, 3.5), ylim=(0, 0.75), yticks=[0, 0.25, 0.5])
            errors.set(xlabel="error / RMS (gray: weights)")
            quantiles.set(
                xlim=(-8, 8), ylim=(-8, 8), xticks=range(-8, 9, 4), yticks=range(-8, 9, 4)
            )
            quantiles.set(xlabel="quantile of the weights, in σ", ylabel="reconstructed, in σ")
            errors.set_title("shape of the error", fontsize=12)
            quantiles.set_title("Q–Q plot", fontsize=12)
            for ax in (weights, codes):
                ax.set_title(" ", fontsize=12)  # room for the titles that change
            self._zeros = weights.set_title("", fontsize=12)
            self._used = codes.set_title("", fontsize=12)

            bins = np.linspace(-4.5, 4.5, 122)
            nothing = np.zeros(121), bins
            gray = {"fill": True, "color": COLORS["original"], "alpha": 0.55}
            self._weights = weights.stairs(*nothing, **gray)
            self._reconstruction = weights.stairs(*nothing, lw=1.5)
            self._levels = LineCollection([], capstyle="butt")
            weights.add_collection(self._levels, autolim=False)
            self._codes = codes.stairs(*nothing, fill=True)
            below = {"transform": codes.get_xaxis_transform(), "fontsize": 12}
            self._names = [
                codes.text(0, -0.06, "", ha="center", va="top", **below) for _ in range(5)
            ]
            self._shape = errors.stairs(*nothing, **gray)
            self._errors = errors.stairs(*nothing, lw=1.8, color=COLORS["error"])
            half = 3**0.5  # a uniform error reaches sqrt(3) times its root mean square
            (box,) = errors.plot(
                [-half, -half, half, half],
                [0, 0.5 / half, 0.5 / half, 0],
                color=COLORS["text"],
                ls="--",
                lw=1.5,
            )
            quantiles.plot([-8, 8], [-8, 8], color=COLORS["text"], ls="--", lw=1.2)
            (self._points,) = quantiles.plot([], [], "o", ms=3.5)
            self.animate(self._weights, self._reconstruction, self._levels, self._codes)
            self.animate(self._shape, self._errors, box, self._points, self._zeros, self._used)
            self.animate(*self._names)

    def update(self, view):
        layer, look = view.layer, method_fill(view.method)
        highest = layer.density.max()
        self._weights.set_data(layer.density / highest)
        self._reconstruction.set_data(view.density / highest, view.edges)
        self._reconstruction.set(edgecolor=look["color"], gid=look["gid"])
        self._levels.set_segments([((x, 0), (x, 0.12)) for x in view.levels])
        self._levels.set(linewidth=3 if len(view.levels) < 33 else 1, **look)

        names = [*zip(*code_ticks(view.method, view.bits), strict=True)] + [(0, "")] * 5
        for text, (place, words) in zip(self._names, names, strict=False):
            text.set(x=place, text=words)
        heights = view.code_counts / view.code_counts.max()
        self._codes.set_data(heights, np.linspace(0, 1, len(heights) + 1))
        self._codes.set(**look)
        self._shape.set_data(layer.density)
        self._errors.set_data(view.error_density)
        self._points.set_data(layer.quantiles, view.quantiles)
        self._points.set(**method_line(view.method))
        self._zeros.set_text(f"{percent(view.zeros)} of the weights become 0")
        self._used.set_text(f"{view.used} of {2**view.bits} in use, entropy {view.entropy:.2f}")
