"""The pictures of notebook 03: packed bits, sets of levels, and what they cost and lose."""

from statistics import NormalDist

import numpy as np
from matplotlib.collections import LineCollection
from matplotlib.patches import Rectangle

from chapter13.plots.live import LiveFigure
from chapter13.plots.picture import COLORS, Picture, new_figure, style

METHODS = {"absmax": "INT4 absmax", "affine": "INT4 affine", "nf4": "NF4", "fp4": "FP4"}
METHOD_COLORS = {
    "absmax": COLORS["int4"],
    "affine": COLORS["affine"],
    "nf4": COLORS["nf4"],
    "fp4": COLORS["fp4"],
}
MARKERS = {"absmax": "s", "affine": "D", "nf4": "o", "fp4": "^"}
PARTS = ["#0072B2", "#E69F00", "#CC79A7", "#56B4E9"]  # codes first, then what comes on top


def code_counts(counts):
    """counts: how many weights have each of the codes -8 to 7 -> bars; an unused code is marked."""
    counts, codes = np.asarray(counts), np.arange(-8, 8)
    unused = codes[counts == 0]
    with style():
        figure, ax = new_figure(width=10, height=3.2)
        ax.bar(codes, counts, color=COLORS["int4"])
        for code in unused:
            ax.text(
                code,
                counts.max() * 0.04,
                "never\nused",
                ha="center",
                color=COLORS["highlight"],
                fontsize=14,
                weight="bold",
            )
        ax.set(xticks=codes, xlabel="code", ylabel="weights")
        ax.grid(axis="x", visible=False)
        return Picture(
            figure,
            f"Bars: how many weights have each code. {np.count_nonzero(counts)} of 16 codes "
            f"occur; never used: {', '.join(map(str, unused)) or 'none'}.",
        )


def bit_stream(codes, bits):
    """codes: a few ints below 2**bits -> their bits in a row, cut into codes and into bytes."""
    text = "".join(f"{code:0{bits}b}" for code in codes)
    total = -(-len(text) // 8)
    with style():
        figure, ax = new_figure(width=10, height=2.2)
        ax.set(xlim=(-0.2, 8 * total + 0.2), ylim=(-1.0, 2.0))
        ax.set_axis_off()
        for place, bit in enumerate(text):
            color = COLORS["int4"] if place // bits % 2 else COLORS["affine"]
            ax.add_patch(
                Rectangle(
                    (place, 0), 1, 1, facecolor=color, alpha=0.55, edgecolor="white", linewidth=2
                )
            )
            ax.text(
                place + 0.5, 0.5, bit, ha="center", va="center", fontsize=15, family="monospace"
            )
        for index, code in enumerate(codes):
            ax.text((index + 0.5) * bits, 1.35, f"{code}", ha="center", va="center", fontsize=15)
        for byte in range(total):
            ax.plot([8 * byte + 0.08, 8 * byte + 7.92], [-0.2, -0.2], color=COLORS["text"], lw=3)
            value = int(text[8 * byte : 8 * byte + 8].ljust(8, "0"), 2)
            ax.text(8 * byte + 4, -0.62, f"byte {byte}: {value}", ha="center", va="center")
        return Picture(
            figure,
            f"{len(codes)} codes of {bits} bits written one after the other, in two colors by "
            f"turns. They fill {total} bytes, marked below; a code may lie across two bytes.",
        )


def weights_and_levels(normalized, levels):
    """normalized: weights over their block's absmax; levels: name of a method -> its levels."""
    values = np.asarray(normalized).ravel()
    with style():
        figure, ax = new_figure(width=10, height=3.4)
        counts, edges = np.histogram(values, 121, (-1, 1))
        ax.stairs(counts / counts.max(), edges, fill=True, color=COLORS["original"], alpha=0.6)
        for row, (name, points) in enumerate(levels.items()):
            height = -0.16 - 0.2 * row
            ax.plot(
                np.asarray(points),
                np.full(len(points), height),
                linestyle="",
                marker=MARKERS[name],
                markersize=9,
                color=METHOD_COLORS[name],
                clip_on=False,
            )
            ax.text(1.06, height, METHODS[name], color=COLORS["text"], va="center", fontsize=13)
        ax.set(
            xlim=(-1.04, 1.4),
            ylim=(-0.1 - 0.2 * len(levels), 1.05),
            xlabel="weight / absmax of its block",
            ylabel="count (highest = 1)",
            yticks=[0, 0.5, 1],
            xticks=[-1, -0.5, 0, 0.5, 1],
        )
        inside = np.mean(np.abs(values) < 0.5)
        return Picture(
            figure,
            f"Histogram of the weights of a layer, each over the absmax of its block: {inside:.0%} "
            f"lie between -0.5 and 0.5. Below it the levels of "
            f"{' and '.join(METHODS[name] for name in levels)}.",
        )


def equal_slices(edges, points):
    """edges: quantiles that cut a bell curve (first and last infinite); points: one per slice."""
    curve = NormalDist()
    with style():
        figure, ax = new_figure(width=10, height=3.6)
        for index, (low, high) in enumerate(zip(edges[:-1], edges[1:], strict=True)):
            x = np.linspace(max(low, -3.2), min(high, 3.2), 40)
            y = [curve.pdf(value) for value in x]
            color = COLORS["nf4"] if index % 2 else COLORS["grid"]
            ax.fill_between(x, y, color=color, alpha=0.8, linewidth=0)
        x = np.linspace(-3.2, 3.2, 200)
        ax.plot(x, [curve.pdf(value) for value in x], color=COLORS["text"])
        ax.plot(
            points,
            np.zeros(len(points)),
            "o",
            color=COLORS["highlight"],
            markersize=8,
            clip_on=False,
        )
        ax.set(xlim=(-3.2, 3.2), ylim=(0, 0.43), yticks=[], xlabel="standard deviations")
        return Picture(
            figure,
            f"A bell curve cut into {len(points)} slices of equal area: narrow in the middle, wide "
            f"at the ends. A dot marks the middle of each slice's share, where a level would go.",
        )


def number_line(level_sets):
    """level_sets: method -> levels in [-1, 1] -> the sets above each other on one line."""
    with style():
        figure, ax = new_figure(width=10, height=3.2)
        names = list(level_sets)
        for row, name in enumerate(names):
            points = np.unique(np.asarray(level_sets[name]))
            ax.vlines(points, row - 0.3, row + 0.3, color=METHOD_COLORS[name], linewidth=4)
        ax.set(xlim=(-1.03, 1.03), ylim=(-0.6, len(names) - 0.4), xlabel="value / absmax")
        ax.set_yticks(range(len(names)), [METHODS[name] for name in names])
        ax.tick_params(axis="y", labelsize=14, length=0)
        ax.invert_yaxis()
        ax.grid(axis="y", visible=False)
        gaps = {name: np.diff(np.unique(np.asarray(level_sets[name]))) for name in names}
        told = "; ".join(
            f"{METHODS[name]} gaps from {gap.min():.3f} to {gap.max():.3f}"
            for name, gap in gaps.items()
        )
        return Picture(figure, f"The levels of each code book as lines between -1 and 1: {told}.")


def storage_bars(rows):
    """rows: label -> {part: bits per weight} -> stacked bars, the total at the end."""
    parts = list(dict.fromkeys(part for row in rows.values() for part in row))
    with style():
        figure, ax = new_figure(width=10, height=1.5 + 0.55 * len(rows))
        for index, row in enumerate(rows.values()):
            start = 0.0
            for part, bits in row.items():
                color = PARTS[parts.index(part)]
                ax.barh(index, bits, left=start, height=0.62, color=color, edgecolor="white")
                start += bits
            ax.text(start + 0.012, index, f"{start:.4g}", va="center", fontsize=14)
        for color, part in zip(PARTS, parts, strict=False):
            most = max(row.get(part, 0) for row in rows.values())
            seen = "" if most > 0.01 else f" ({most:.3f}: too thin to see)"
            ax.barh(0, 0, color=color, label=part + seen)
        ax.set_yticks(range(len(rows)), list(rows))
        ax.invert_yaxis()
        ax.grid(axis="y", visible=False)
        ax.set(xlim=(3.5, 4.65), xlabel="bits per weight (the axis starts at 3.5)")
        figure.legend(loc="outside upper center", ncols=len(parts))
        told = "; ".join(
            f"{label} {sum(row.values()):.4g} ("
            + ", ".join(f"{part} {bits:.2g}" for part, bits in row.items())
            + ")"
            for label, row in rows.items()
        )
        return Picture(figure, f"Bits per weight, part by part: {told}.")


def error_chart(table):
    """table: distribution -> {method: relative RMSE} -> a dot for each, a row a distribution."""
    with style():
        figure, ax = new_figure(width=10, height=1.3 + 0.5 * len(table))
        for row, errors in enumerate(table.values()):
            ax.hlines(row, min(errors.values()), max(errors.values()), color=COLORS["grid"], lw=5)
        for method in METHODS:
            ax.plot(
                [errors[method] for errors in table.values()],
                range(len(table)),
                linestyle="",
                marker=MARKERS[method],
                markersize=11,
                color=METHOD_COLORS[method],
                label=METHODS[method],
            )
        ax.set_yticks(range(len(table)), list(table))
        ax.set_ylim(len(table) - 0.5, -0.5)
        ax.grid(axis="y", visible=False)
        ax.set_xlim(left=0)
        ax.set_xlabel("relative RMSE (left is better)")
        figure.legend(loc="outside upper center", ncols=len(METHODS))
        best = ", ".join(
            f"{METHODS[min(errors, key=errors.get)]} on {name}" for name, errors in table.items()
        )
        return Picture(figure, f"Relative RMSE by weights and method. The smallest error: {best}.")


def curve_style(label, method):
    """How a method's curve is drawn: dashed and hollow where its scales are quantized twice."""
    double = "double" in label
    return {
        "label": label,
        "marker": MARKERS[method],
        "color": METHOD_COLORS[method],
        "linestyle": "--" if double else "-",
        "markerfacecolor": "white" if double else METHOD_COLORS[method],
    }


def error_per_bit(curves):
    """curves: label -> (method, [(block size, bits per weight, relative RMSE), ...])."""
    with style():
        figure, ax = new_figure(width=10, height=4.2)
        for label, (method, points) in curves.items():
            _, bits, errors = zip(*points, strict=True)
            ax.plot(bits, errors, **curve_style(label, method), markersize=9)
        for size, bits, error in next(iter(curves.values()))[1]:
            ax.annotate(
                f"{size}", (bits, error), xytext=(6, 6), textcoords="offset points", fontsize=12
            )
        ax.set(xlabel="bits per weight, scales included", ylabel="relative RMSE")
        ax.legend()
        at = {
            label: min(points, key=lambda point: abs(point[1] - 4.25))
            for label, (_, points) in curves.items()
        }
        told = "; ".join(
            f"{label} {error:.3g} at {bits:.4g} bits (blocks of {size})"
            for label, (size, bits, error) in at.items()
        )
        return Picture(
            figure,
            f"Error against bits per weight, a point for each block size (numbers at the first "
            f"curve). Nearest to 4.25 bits: {told}.",
        )


def error_sources(levels, x, scale):
    """Squared error of all weights up to a given size in their block, a curve for each method.

    levels: method -> ascending levels; x: weights over their block's absmax; scale: that absmax,
    one for each element of x.
    """
    x, scale = np.asarray(x).ravel(), np.asarray(scale).ravel()
    edges = np.linspace(0, 1, 101)
    sums = {}
    for name, points in levels.items():
        points = np.asarray(points)
        nearest = points[np.searchsorted((points[:-1] + points[1:]) / 2, x)]
        squared = ((x - nearest) * scale) ** 2
        held = np.histogram(np.abs(x), edges, weights=squared)[0] / ((scale * x) ** 2).sum()
        sums[name] = np.concatenate([[0], held.cumsum()])
    with style():
        figure, ax = new_figure(width=10, height=3.5)
        counts = np.histogram(np.abs(x), edges)[0]
        top = max(curve[-1] for curve in sums.values())
        ax.stairs(
            counts / counts.max() * top,
            edges,
            fill=True,
            color=COLORS["original"],
            alpha=0.3,
            label="how many weights (own scale)",
        )
        for name, curve in sums.items():
            ax.plot(edges, curve, color=METHOD_COLORS[name], linewidth=3, label=METHODS[name])
        ax.set(
            xlim=(0, 1),
            ylim=(0, 1.3 * top),
            xlabel="|weight| / absmax of its block",
            ylabel="squared errors up to here\n/ all weights squared",
        )
        ax.legend(loc="upper left", ncols=3)
        told = "; ".join(
            f"{METHODS[name]} {curve[50]:.2g} up to 0.5 and {curve[-1]:.2g} in all"
            for name, curve in sums.items()
        )
        return Picture(
            figure,
            f"Squared error of the weights up to a given size in their block, added up, over the "
            f"sum of all weights squared: {told}.",
        )


class CodeBookFigure(LiveFigure):
    """Shows an `explorers.codebooks.View`: the weights and their levels; where the error is."""

    def __init__(self):
        super().__init__(width=10, height=4.4, rows=2, sharex=True, height_ratios=[3, 2])
        top, bottom = self.axes
        with style():
            bins = np.linspace(-1, 1, 122)
            empty = np.zeros(len(bins) - 1)
            top.set(xlim=(-1.03, 1.03), ylim=(0, 1.05), ylabel="count\n(highest = 1)")
            bottom.set(ylim=(0, 1.05), ylabel="error\n(highest = 1)")
            bottom.set_xlabel(
                "weight / absmax of its block (affine: its place in the block's range)"
            )
            for ax in self.axes:
                ax.set_yticks([0, 0.5, 1])
            top.set_title("the weights (gray) and the levels in use (color)")
            bottom.set_title("where the squared error comes from")
            self._weights = top.stairs(empty, bins, fill=True, color=COLORS["original"], alpha=0.55)
            self._levels = LineCollection([], capstyle="butt")
            top.add_collection(self._levels, autolim=False)
            self._error = bottom.stairs(empty, bins, fill=True, color=COLORS["error"], alpha=0.85)
            self.animate(self._weights, self._levels, self._error)

    def update(self, view):
        self._weights.set_data(view.weight_counts / max(view.weight_counts.max(), 1))
        self._error.set_data(view.error_shares / (view.error_shares.max() or 1))
        heights = view.level_counts / view.level_counts.max()
        self._levels.set_segments(
            [((x, 0), (x, y)) for x, y in zip(view.levels, heights, strict=True)]
        )
        self._levels.set_color(METHOD_COLORS[view.method])
        self._levels.set_linewidth(np.clip(300 / view.level_total, 1, 7))
