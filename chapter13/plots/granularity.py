"""The pictures of notebook 02: where errors lie, what decides a scale, and what a scale costs.

Errors are drawn in percent of the root mean square of the weights they belong to, so that layers
with weights of different size can be compared.
"""

import numpy as np
from matplotlib import colormaps
from matplotlib.colors import LogNorm

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
from chapter13.plots.shapes import draw_rounding

# told apart by colour-blind readers, and in gray; few steps keep the stored pictures small
ERROR_MAP = colormaps["cividis"].resampled(10)
ERROR_RANGE = 0.003, 1  # |error| / RMS of the weights: the ends of the color scale of all maps


def shared_scales(weight, approximations):
    """A small matrix, and its errors under several granularities, cell by cell.

    weight: (rows, columns). approximations: title -> (approximation, weights that share a scale),
    the latter a (rows, columns) shape, drawn as frames. At most 8 columns: numbers are written in
    the cells.
    """
    weight = np.asarray(weight)
    rows, columns = weight.shape
    with style():
        figure, axes = new_figure(10, 3.6, rows=2, cols=2)
        panels = {"the weights": (None, (rows, columns))} | approximations
        errors = {
            title: np.abs(np.asarray(approximation) - weight)
            for title, (approximation, _) in approximations.items()
        }
        largest = max(values.max() for values in errors.values()) or 1.0
        for ax, (title, (approximation, shared)) in zip(axes.flat, panels.items(), strict=False):
            ax.set(xlim=(0, columns), ylim=(rows, 0), xticks=[], yticks=[], title=title)
            ax.grid(False)
            ax.spines[:].set_visible(False)
            if approximation is None:
                values, shade = weight, np.zeros_like(weight)
            else:
                values = errors[title]
                shade = np.sqrt(values / largest)  # small errors can be seen beside large ones
            for row, column in np.ndindex(rows, columns):
                strong = shade[row, column]
                text = f"{values[row, column]:.1f}".removesuffix(".0")
                if text in ("0", "-0"):  # exact: a blank cell says it best
                    continue
                ax.fill_between(
                    [column, column + 1], row, row + 1, color=COLORS["error"], alpha=0.75 * strong,
                    linewidth=0,
                )  # fmt: skip
                ax.text(
                    column + 0.5, row + 0.53, text, ha="center", va="center", fontsize=13,
                    weight="bold" if strong else "normal",
                )  # fmt: skip
            if approximation is None:
                continue
            for top in range(0, rows, shared[0]):
                for left in range(0, columns, shared[1]):
                    x = np.array([0.05, shared[1] - 0.05])[[0, 1, 1, 0, 0]] + left
                    y = np.array([0.07, shared[0] - 0.07])[[0, 0, 1, 1, 0]] + top
                    ax.plot(x, y, color=COLORS["text"], linewidth=2, clip_on=False)
        said = "; ".join(f"{title} {values.mean():.2f}" for title, values in errors.items())
        return Picture(
            figure,
            alt=f"A {rows} by {columns} matrix and its absolute errors; a frame holds the "
            "weights that share a scale, blank cells are exact, the darker a cell the larger its "
            f"error. On average: {said}.",
        )


def largest_of(sizes, expected, groups):
    """The expected largest magnitude of n standard normal numbers, and the groups' own.

    sizes, expected: the curve. groups: label -> (n, measured mean absmax in standard deviations).
    """
    with style():
        figure, ax = new_figure(10, 3.3)
        ax.plot(sizes, expected, color=COLORS["original"], label="expected for normal numbers")
        for label, (n, measured) in groups.items():
            ax.plot(n, measured, "o", color=COLORS["highlight"], markersize=10)
            ax.annotate(
                f"{label}: {measured:.2f}",
                (n, measured),
                xytext=(8, -20),
                textcoords="offset points",
                weight="bold",
            )
        ax.set(
            xscale="log",
            ylim=(0, 6),
            xlim=(sizes[0], sizes[-1] * 4),
            xlabel="how many numbers share a scale",
            ylabel="largest magnitude\n(standard deviations)",
        )
        ax.legend(loc="upper left")
        said = ", ".join(f"{measured:.2f} {label}" for label, (_, measured) in groups.items())
        return Picture(
            figure,
            alt="Curve: the expected largest magnitude of n normal numbers grows slowly with n. "
            f"Points: what the matrix has, in standard deviations: {said}.",
        )


def row_absmax(layers):
    """The largest weights of rows: label -> (rows,) absmax / RMS of the matrix, in any order."""
    with style():
        figure, ax = new_figure(10, 3.3)
        said = []
        for color, (label, absmax) in zip(SERIES, layers.items(), strict=False):
            absmax = np.sort(np.asarray(absmax))
            share = np.linspace(0, 100, len(absmax))
            ax.plot(share, absmax, color=color, label=label, linewidth=3)
            said.append(f"{label}: {absmax[0]:.1f} to {absmax[-1]:.1f}")
        ax.set(
            yscale="log",
            xlabel="rows, sorted by their largest weight (%)",
            ylabel="largest |weight| of the row\n(× RMS of the matrix)",
        )
        set_ticks(ax.yaxis, [0.3, 0.5, 1, 2, 3, 5, 10, 20, 30, 50])
        ax.legend(loc="upper left")
        return Picture(
            figure,
            alt="Curves: the largest magnitude of each row, rows sorted, in units of the matrix's "
            f"RMS. {'; '.join(said)}.",
        )


def grids(values, absmax, affine):
    """Eight numbers or so on two grids: the levels of each, and where each number lands.

    absmax, affine: (levels, approximation of the values).
    """
    values = np.asarray(values)
    with style():
        figure, axes = new_figure(10, 4, rows=2, sharex=True)
        said = []
        for ax, method, grid in zip(axes, ("absmax", "affine"), (absmax, affine), strict=True):
            levels, landed = (np.asarray(places) for places in grid)
            draw_rounding(ax, values, levels, landed, method_fill(method))
            inside = ((levels >= values.min() - 1e-6) & (levels <= values.max() + 1e-6)).sum()
            label = METHOD_LOOK[method].label
            ax.set_title(f"{label}: {inside} of {len(levels)} levels lie among the numbers")
            ax.set_ylim(0, 1.25)
            error = np.abs(values - landed).mean()
            said.append(f"{label}, {inside} of {len(levels)} levels useful, mean error {error:.3f}")
        axes[1].set_xlabel("value")
        return Picture(
            figure,
            alt="Dots: the numbers; bars: the levels of a grid; arrows: where each number goes. "
            f"{'; '.join(said)}.",
        )


def error_maps(maps):
    """Absolute errors of one layer side by side on one color scale.

    maps: title -> (rows, columns) mean |error| of patches of weights / RMS of the weights.
    """
    maps = {title: np.asarray(values) for title, values in maps.items()}
    with style():
        figure, axes = new_figure(10, 4.2, cols=len(maps), sharey=True)
        norm = LogNorm(*ERROR_RANGE)
        for ax, (title, values) in zip(axes, maps.items(), strict=True):
            image = ax.imshow(
                np.clip(values, norm.vmin, norm.vmax), norm=norm, cmap=ERROR_MAP, aspect="auto",
                interpolation="nearest",
            )  # fmt: skip
            ax.set(title=title, xticks=[], yticks=[], xlabel="input channels")
            ax.grid(False)
            ax.spines[:].set_visible(False)
        axes[0].set_ylabel("output channels (rows)")
        bar = figure.colorbar(image, ax=axes, pad=0.015, aspect=25)
        bar.set_label("mean |error| (% of RMS weight)")
        _percent_ticks(bar.ax.yaxis)
        said = ", ".join(f"{title} {values.mean():.1%}" for title, values in maps.items())
        return Picture(
            figure,
            alt="Maps of one layer's absolute error on one color scale, dark is small. Mean error "
            f"in percent of the weights' RMS: {said}.",
        )


def frontier(points, best):
    """Relative RMSE against bits per weight.

    points: method ("absmax" or "affine") -> bits -> (bits per weight, relative RMSE) pairs, the one
    with the fewest bits per weight being per tensor: it stands alone, left of its curve.
    best: the pairs that no other beats in both, drawn as a line.
    """
    with style():
        figure, ax = new_figure(10, 4.3)
        count = sum(len(pairs) for curves in points.values() for pairs in curves.values())
        x, y = np.transpose(sorted(best))
        ax.plot(
            x, y, color=COLORS["highlight"], linewidth=9, alpha=0.35, solid_capstyle="round",
            label="frontier: nothing is better",
        )  # fmt: skip
        for method, curves in points.items():
            for bits, pairs in curves.items():
                x, y = _first_apart(sorted(pairs)).T
                label = METHOD_LOOK[method].label if bits == max(curves) else None
                look = {"lw": 1.5} | method_line(method, variant=method == "affine")
                ax.plot(x, y, ms=5, label=label, **look | {"markeredgewidth": 1.2})
                if method == "absmax":
                    ax.annotate(
                        f"{bits} bits", (x[0], y[0]), xytext=(0, 9), textcoords="offset points",
                        ha="center", weight="bold", fontsize=13,
                    )  # fmt: skip
        ax.set(yscale="log", xlabel="bits per weight, scales included", ylabel="relative RMSE")
        ax.set_ylim(top=ax.get_ylim()[1] * 1.5)
        _percent_ticks(ax.yaxis)
        ax.legend(loc="upper right")
        return Picture(
            figure,
            alt="One curve for each number of bits and kind of grid: relative RMSE falls as "
            "smaller groups take more bits per weight; a point to the left of each curve is per "
            f"tensor. {len(best)} of {count} settings lie on the frontier.",
        )


class GranularityFigure(LiveFigure):
    """Shows an `explorers.granularity.View`."""

    def __init__(self):
        super().__init__(width=10, height=4, cols=2, width_ratios=[5, 6])
        errors, cost = self.axes
        with style():
            norm = LogNorm(*ERROR_RANGE, clip=True)
            self._map = errors.imshow(
                np.ones((2, 2)), norm=norm, cmap=ERROR_MAP, aspect="auto", extent=(0, 1, 0, 1),
                interpolation="nearest",
            )  # fmt: skip
            errors.set(xticks=[], yticks=[], xlabel="input channels", ylabel="output channels")
            errors.set_title("Where? |error|, % of RMS weight")
            errors.grid(False)
            errors.spines[:].set_visible(False)
            bar = self.figure.colorbar(self._map, ax=errors, pad=0.02, aspect=25)
            _percent_ticks(bar.ax.yaxis)
            cost.set(yscale="log", xlim=(1.7, 9.8), xlabel="bits per weight, scales included")
            cost.set_title("What does less error cost in bits?")
            cost.set_ylabel("relative RMSE")
            cost.set_xticks(range(2, 10))
            self._curves = [
                cost.plot([], [], marker="o", markersize=4, linewidth=1.5)[0] for _ in range(2, 9)
            ]
            (self._point,) = cost.plot(
                [], [], "o", markersize=13, markerfacecolor="none", markeredgewidth=3,
                color=COLORS["highlight"],
            )  # fmt: skip
            self.animate(self._map, *self._curves, self._point)

    def update(self, view):
        if self.changed(view.limits):  # another layer
            cost = self.axes[1]
            low, high = view.limits
            low = low or 1e-6  # a layer without any error has no place on a logarithmic axis
            cost.set_ylim(low / 1.5, max(high, low) * 1.5)
            _percent_ticks(cost.yaxis)
            self.redraw()
        self._map.set_data(view.error_map)
        looks = {True: method_line("affine" if view.affine else "absmax") | {"lw": 3}}
        looks[False] = {"color": COLORS["original"], "marker": "o", "lw": 1.2, "gid": None}
        for bits, (curve, points) in enumerate(zip(self._curves, view.curves, strict=True), 2):
            curve.set_data(*_first_apart(points).T)
            curve.set(**looks[bits == view.bits])
        self._point.set_data([view.bits_per_weight], [view.relative_rmse])


def _first_apart(points):
    """The points (n, 2) without those that are NaN, and a gap behind the first: a line breaks."""
    first, rest = np.split(np.asarray(points, float), [1])
    return np.concatenate([first, [[np.nan, np.nan]], rest[~np.isnan(rest[:, 0])]])


def _percent_ticks(axis):
    set_ticks(axis, [digit * 10.0**power for power in range(-6, 3) for digit in (1, 3)])
    axis.set_major_formatter(lambda value, _: f"{100 * value:g}%")
