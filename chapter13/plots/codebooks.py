"""The pictures of notebook 03: packed bits, sets of levels, and what they cost and lose."""

from statistics import NormalDist

import numpy as np
from matplotlib.collections import LineCollection
from matplotlib.patches import Rectangle
from matplotlib.ticker import PercentFormatter

from chapter13.plots.live import LiveFigure
from chapter13.plots.picture import (
    COLORS,
    METHOD_LOOK,
    SERIES,
    Picture,
    method_fill,
    method_line,
    new_figure,
    style,
)
from chapter13.plots.shapes import draw_curves, draw_dot_rows, draw_level_rows, stacked_bars

LEVEL_WIDTH = 0.01  # of a bar in `code_books`, in units of absmax: nearer levels look like one


def labels(methods):
    return [METHOD_LOOK[method].label for method in methods]


def code_counts(counts):
    """counts: how many weights have each of the codes -8 to 7 -> bars with their numbers.

    A code that no weight has is marked.
    """
    counts, codes = np.asarray(counts), np.arange(-8, 8)
    unused = codes[counts == 0]
    with style():
        figure, ax = new_figure(width=10, height=3.2)
        ax.bar(codes, counts, **method_fill("absmax"))
        for code, count in zip(codes, counts.tolist(), strict=True):
            look = {"color": COLORS["highlight"], "weight": "bold"} if count == 0 else {}
            words = "never\nused" if count == 0 else f"{count:,}"
            ax.text(code, count + counts.max() * 0.03, words, ha="center", fontsize=12, **look)
        ax.set(xticks=codes, xlabel="code", ylabel="weights", ylim=(0, 1.15 * counts.max()))
        ax.grid(axis="x", visible=False)
        return Picture(
            figure,
            f"Bars: how many weights have each code. {np.count_nonzero(counts)} of 16 codes "
            f"occur; never used: {', '.join(map(str, unused)) or 'none'}. Weights with "
            f"code -7: {counts[1]:,}, with 7: {counts[15]:,}.",
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
            color = SERIES[place // bits % 2]
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
            f"{len(codes)} codes of {bits} bits written one after the other, in two "
            f"alternating colors. They fill {total} bytes, marked below; a code may lie across "
            "two bytes.",
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
                clip_on=False,
                **method_line(name) | {"linestyle": "", "ms": 9},
            )
            ax.text(
                1.06,
                height,
                METHOD_LOOK[name].label,
                color=COLORS["text"],
                va="center",
                fontsize=13,
            )
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
            f"{' and '.join(labels(levels))}.",
        )


def equal_slices(edges, points):
    """edges: quantiles that cut a bell curve (first and last infinite); points: one per slice."""
    curve = NormalDist()
    with style():
        figure, ax = new_figure(width=10, height=3.6)
        for index, (low, high) in enumerate(zip(edges[:-1], edges[1:], strict=True)):
            x = np.linspace(max(low, -3.2), min(high, 3.2), 40)
            y = [curve.pdf(value) for value in x]
            look = method_fill("nf4") if index % 2 else {"color": COLORS["grid"]}
            ax.fill_between(x, y, alpha=0.8, linewidth=0, **look)
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


def code_books(level_sets):
    """level_sets: method -> levels in [-1, 1] -> the sets above each other on one line."""
    sets = {method: np.unique(np.asarray(levels)) for method, levels in level_sets.items()}
    rows = dict(zip(labels(sets), sets.values(), strict=True))
    looks = {METHOD_LOOK[method].label: {"lw": 4} | method_fill(method) for method in sets}
    with style():
        figure, ax = new_figure(width=10, height=3.2)
        draw_level_rows(ax, rows, looks)
        for y, levels in enumerate(rows.values()):
            close = np.flatnonzero(np.diff(levels) < LEVEL_WIDTH)
            if len(close):  # their bars are drawn over each other
                ax.text(levels[close + 1].mean(), y - 0.34, f"{len(close) + 1} levels here",
                        ha="center", va="bottom", fontsize=12)  # fmt: skip
        ax.set(xlim=(-1.03, 1.03), xlabel="value / absmax")
        ax.grid(axis="x")
        ax.tick_params(axis="y", labelsize=14)
        told = "; ".join(
            f"{label} gaps from {np.diff(levels).min():.3f} to {np.diff(levels).max():.3f}"
            for label, levels in rows.items()
        )
        return Picture(figure, f"The levels of each code book as lines between -1 and 1: {told}.")


def storage_bars(rows):
    """What scales cost: label -> {part: bits per weight} -> a bar of all parts but the codes.

    The rows' labels are followed by their totals, codes included.
    """
    names, scales = {}, {}
    for label, row in rows.items():
        total = f"{label}: {sum(row.values()):.4g} bits"
        scales[total] = {part: bits for part, bits in row.items() if part != "codes"}
    for part in dict.fromkeys(part for row in scales.values() for part in row):
        most = max(row.get(part, 0) for row in scales.values())
        names[part] = part if most > 0.01 else f"{part} ({most:.3f}: too thin to see)"
    told = "; ".join(
        f"{label} {sum(row.values()):.4g} ("
        + ", ".join(f"{part} {bits:.2g}" for part, bits in row.items())
        + ")"
        for label, row in rows.items()
    )
    return stacked_bars(
        scales,
        "bits per weight for the scales, beside those of the codes",
        f"Bars of the scales' bits per weight. Part by part: {told}.",
        names,
        end="{:.3g}",
    )


def error_chart(table):
    """table: distribution -> {method: relative RMSE} -> a dot for each, a row a distribution."""
    methods = list(next(iter(table.values())))
    looks = {
        method: method_line(method) | {"label": METHOD_LOOK[method].label} for method in methods
    }
    with style():
        figure, ax = new_figure(width=10, height=1.3 + 0.5 * len(table))
        draw_dot_rows(ax, table, looks, spans=True)
        ax.set_xlim(left=0)
        ax.set_xlabel("relative RMSE (left is better)")
        figure.legend(loc="outside upper center", ncols=len(methods))
        best = ", ".join(
            f"{METHOD_LOOK[min(errors, key=errors.get)].label} on {name}"
            for name, errors in table.items()
        )
        return Picture(
            figure,
            f"Relative RMSE by weights and method. The method with the smallest error: {best}.",
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
            ax.plot(edges, curve, linewidth=3, label=METHOD_LOOK[name].label, **method_fill(name))
        ax.set(
            xlim=(0, 1),
            ylim=(0, 1.3 * top),
            xlabel="|weight| / absmax of its block",
            ylabel="squared error up to this size\n(% of all weights squared)",
        )
        ax.yaxis.set_major_formatter(PercentFormatter(1, decimals=1))
        ax.legend(loc="upper left", ncols=3)
        told = "; ".join(
            f"{METHOD_LOOK[name].label} {curve[50]:.2g} up to 0.5 and {curve[-1]:.2g} in all"
            for name, curve in sums.items()
        )
        return Picture(
            figure,
            "Curves: the squared error of all weights up to a given size in their block, as a "
            f"fraction of the squares of all weights: {told}.",
        )


def equal_bits(curves):
    """Relative RMSE against bits per weight, points of one block size joined by a thin line.

    curves: label -> (method, [(block size, bits per weight, relative RMSE), ...]).
    """
    sizes = {}
    for _, points in curves.values():
        for size, *place in points:
            sizes.setdefault(size, []).append(place)
    with style():
        figure, ax = new_figure(width=10, height=4.4)
        for size, places in sizes.items():
            x, y = np.transpose(sorted(places))
            ax.plot(x, y, ":", color=COLORS["text"], linewidth=1, zorder=1)
            ax.annotate(f"{size}", (x[0], y[0]), (-10, -5), textcoords="offset points",
                        ha="right", fontsize=12)  # fmt: skip
        draw_curves(
            ax, {label: (m, [p[1:] for p in ps]) for label, (m, ps) in curves.items()}, ms=8
        )
        ax.set(xlabel="bits per weight, scales included", ylabel="relative RMSE")
        left = min(point[1] for _, points in curves.values() for point in points)
        ax.set_xlim(left - 0.1, left + 1.4)  # beyond it lie float32 scales in the smallest blocks
        ax.legend(loc="upper right", title="numbers: block size")
        told = "; ".join(
            f"{label} {error:.3g} at {bits:.4g} bits"
            for label, (_, points) in curves.items()
            for _, bits, error in [min(points, key=lambda point: abs(point[1] - 4.25))]
        )
        return Picture(
            figure,
            "Error against bits per weight, a curve for each method and a point for each block "
            f"size, dotted lines between equal block sizes. Nearest to 4.25 bits: {told}.",
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
            top.set_title("Which levels do the weights take? (gray: weights, color: levels)")
            bottom.set_title("From which weights does the squared error come?")
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
        self._levels.set(**method_fill(view.method))
        self._levels.set_linewidth(np.clip(300 / view.level_total, 1, 7))
