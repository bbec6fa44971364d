"""The pictures of notebook 10: bytes of a file, blocks, and what block formats cost and lose."""

import numpy as np
from matplotlib.patches import Rectangle

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
from chapter13.plots.shapes import draw_curves

CURVES = {  # label -> method
    "absmax": "absmax",
    "affine": "affine",
    "NF4": "nf4",
    "NF4, double quantization": "nf4",
}
TINTS = ["#F9D9B0", "#BFE3F6", "#B9E3D6", "#EBCBDD", "#F6EFA6", "#D9D9D9", "#F2B8A0", "#9CC3DF"]
TINTS.append("#8FCFB8")
ROW = 16  # bytes in a row of the dump


def file_bytes(data, fields):
    """data: the first bytes of a file; fields: [(label, length), ...] -> the bytes in colors.

    Fields follow each other from the first byte, each named above its first byte; the bytes left
    over stay white.
    """
    starts = dict(zip(np.cumsum([0] + [length for _, length in fields]), fields, strict=False))
    field_of = np.repeat(np.arange(len(fields)), [length for _, length in fields])[: len(data)]
    rows, pitch = -(-len(data) // ROW), 1.4
    with style():
        figure, ax = new_figure(width=10, height=0.4 + 0.66 * rows)
        ax.set(xlim=(-0.8, ROW), ylim=(pitch * rows - 0.3, -0.5))
        ax.set_axis_off()
        for place, byte in enumerate(data):
            x, y = place % ROW, pitch * (place // ROW)
            color = TINTS[field_of[place] % len(TINTS)] if place < len(field_of) else "white"
            ax.add_patch(Rectangle((x, y), 1, 1, facecolor=color, edgecolor="white", linewidth=2))
            shown = chr(byte) if 32 < byte < 127 else "·"
            ax.text(x + 0.5, y + 0.36, f"{byte:02x}", ha="center", va="center", family="monospace")
            ax.text(
                x + 0.5, y + 0.76, shown, ha="center", va="center", fontsize=11, color="#555555"
            )
            if place in starts:
                ax.text(x + 0.04, y - 0.04, starts[place][0], fontsize=12, weight="bold")
        for row in range(rows):
            ax.text(-0.15, pitch * row + 0.5, f"{row * ROW}", ha="right", va="center", fontsize=12)
        told = ", ".join(f"{label} ({length} bytes)" for label, length in fields)
        return Picture(figure, f"The first {len(data)} bytes of the file, colored: {told}.")


def block_bytes(block, numbers):
    """A block of 4-bit codes: its bytes in halves, and which weight each half belongs to.

    block: the bytes; numbers: names of the float16 numbers at its beginning.
    """
    block = bytes(block)
    first = 2 * len(numbers)
    with style():
        figure, ax = new_figure(width=10, height=3.0)
        ax.set(xlim=(-1.6, len(block)), ylim=(3.6, -1.0))
        ax.set_axis_off()
        for index, name in enumerate(numbers):
            value = np.frombuffer(block, "<f2", 1, 2 * index)[0]
            box = Rectangle(
                (2 * index, 0), 2, 2, facecolor=TINTS[2 + index], edgecolor="white", lw=3
            )
            ax.add_patch(box)
            ax.text(2 * index + 1, 0.7, name, ha="center", va="center", weight="bold")
            ax.text(2 * index + 1, 1.4, f"{value:.3g}", ha="center", va="center", fontsize=12)
        for place in range(first, len(block)):
            j = place - first
            for row, code in ((0, block[place] & 15), (1, block[place] >> 4)):
                color = TINTS[row]
                box = Rectangle((place, row), 1, 1, facecolor=color, edgecolor="white", lw=3)
                ax.add_patch(box)
                ax.text(place + 0.5, row + 0.5, f"{code}", ha="center", va="center", fontsize=15)
            ax.text(place + 0.5, -0.35, f"w{j}", ha="center", fontsize=12)
            ax.text(place + 0.5, 2.5, f"w{j + 16}", ha="center", fontsize=12)
        for row, label in ((0, "low\nhalves"), (1, "high\nhalves")):
            ax.text(-0.15, row + 0.5, label, ha="right", va="center", fontsize=12)
        ax.text(len(block) / 2, 3.3, f"{len(block)} bytes, 32 weights", ha="center")
        return Picture(
            figure,
            f"A block of {len(block)} bytes: {' and '.join(numbers)} in two bytes each, then 16 "
            "bytes, whose low halves are the codes of weights 0 to 15 and whose high halves are "
            "those of weights 16 to 31.",
        )


def block_grids(values, grids):
    """values: the weights of a block; grids: label -> levels -> weights on each grid, and errors.

    Above the weights as dots between the levels, below their errors as bars.
    """
    values = np.asarray(values)
    with style():
        figure, axes = new_figure(
            10, 4.6, 2, len(grids), sharey="row", sharex=True, height_ratios=[3, 2], squeeze=False
        )
        told = []
        for (above, below), (label, levels) in zip(axes.T, grids.items(), strict=True):
            levels = np.sort(np.asarray(levels))
            nearest = levels[np.abs(values[:, None] - levels).argmin(1)]
            above.hlines(levels, -1, len(values), color=COLORS["original"], linewidth=1.5)
            above.plot(values, "o", color=COLORS["text"], markersize=6)
            below.bar(range(len(values)), nearest - values, 0.6, color=COLORS["error"])
            below.axhline(0, color=COLORS["text"], linewidth=1)
            error = np.sqrt(np.mean((values - nearest) ** 2) / np.mean(values**2))
            above.set_title(f"{label}: relative RMSE {error:.1%}")
            below.set(xlabel="weight of the block", xticks=[0, len(values) - 1])
            below.set_xlim(-1, len(values))
            above.grid(visible=False)
            below.grid(axis="x", visible=False)
            inside = (levels >= values.min()) & (levels <= values.max())
            told.append(
                f"{label}, {inside.sum()} of {len(levels)} levels within the weights' range, "
                f"relative RMSE {error:.1%}"
            )
        axes[0][0].set_ylabel("weights and levels")
        axes[1][0].set_ylabel("error")
        return Picture(
            figure,
            f"Dots: the {len(values)} weights of a block; lines: the levels of each grid; bars "
            f"below: the errors. {'; '.join(told)}.",
        )


def block_sizes(points):
    """points: [(weights in a block, bits per weight, relative RMSE), ...] -> both against size."""
    sizes, bits, errors = (np.array(column) for column in zip(*points, strict=True))
    with style():
        figure, (left, right) = new_figure(10, 3.4, 1, 2)
        for ax, y, label, color in (
            (left, bits, "bits per weight", SERIES[1]),
            (right, errors, "relative RMSE", COLORS["error"]),
        ):
            ax.plot(sizes, y, "o-", color=color, markersize=8)
            ax.axvline(32, color=COLORS["text"], linestyle=":", linewidth=2)
            ax.set_xscale("log", base=2)
            set_ticks(ax.xaxis, sizes)
            ax.set(xlabel="weights in a block", ylabel=label)
        told = ", ".join(
            f"{size}: {bit:.4g} bits, {error:.1%}"
            for size, bit, error in points
            if size in (16, 32, 64)
        )
        return Picture(
            figure,
            "Left: bits per weight fall as blocks grow. Right: the error rises. "
            f"A dotted line marks 32. {told}.",
        )


def formats_over_bits(curves, kinds):
    """Relative RMSE of a layer against bits per weight.

    curves: label -> (method, [(bits per weight, relative RMSE), ...]), a point for each block size.
    kinds: method -> (bits per weight, relative RMSE, words), single points named by the words.
    """
    with style():
        figure, ax = new_figure(width=10, height=4.8)
        draw_curves(ax, curves, ms=7)
        for method, (bits, error, words) in kinds.items():
            ax.plot(bits, error, **method_line(method), linestyle="", ms=16, zorder=5)
            down = -5 if words == METHOD_LOOK[method].label else -18  # long names go below
            ax.annotate(words, (bits, error), (14, down), textcoords="offset points", weight="bold")
        errors = [error for _, points in curves.values() for _, error in points]
        ax.set(xlim=(4, 5.4), ylim=(0.9 * min(errors), 1.03 * max(errors)))
        ax.set(xlabel="bits per weight, scales included", ylabel="relative RMSE of the layer")
        ax.legend(loc="upper right")
        told = "; ".join(f"{words} {e:.3g} at {bits:.4g} bits" for bits, e, words in kinds.values())
        return Picture(
            figure,
            "Relative RMSE of a layer against bits per weight: a curve for each method, a point "
            f"for each block size; and single formats: {told}.",
        )


def top_levels(ratios, top):
    """ratios: absmax of a block over its scale; top: the largest level -> where blocks lie."""
    ratios = np.asarray(ratios)
    beyond = np.mean(ratios > top)
    with style():
        figure, ax = new_figure(width=10, height=3.0)
        edges = np.linspace(4, 8, 65)
        counts, _ = np.histogram(ratios, edges)
        clipped = edges[:-1] >= top
        ax.bar(
            edges[:-1][~clipped], counts[~clipped], 1 / 16, align="edge", color=COLORS["original"]
        )
        ax.bar(edges[:-1][clipped], counts[clipped], 1 / 16, align="edge", color=COLORS["error"])
        ax.axvline(top, color=COLORS["text"], linewidth=2)
        ax.text(top + 0.03, counts.max() * 1.02, "largest level", fontsize=13)
        ax.set(xlim=(4, 8), ylim=(0, counts.max() * 1.2), ylabel="blocks")
        ax.set_xlabel("largest magnitude of the block / scale")
        return Picture(
            figure,
            f"Histogram of the blocks by largest magnitude over scale, from 4 to 8. The largest "
            f"level is {top}: {beyond:.0%} of the blocks reach beyond it.",
        )


class GGUFFigure(LiveFigure):
    """Shows an `explorers.gguf.View`: the formats on the layer, and one block on its grid."""

    def __init__(self):
        super().__init__(width=10, height=4.4, cols=2, width_ratios=[3, 2])
        left, right = self.axes
        with style():
            left.set(xlabel="bits per weight, scales included", ylabel="relative RMSE of the layer")
            left.set(xlim=(4, 5.4))
            left.yaxis.set_major_formatter("{x:.2f}")  # labels of one width: the axes stay put
            right.set(xlim=(-1, 32), ylim=(-1.25, 1.25), xticks=[0, 8, 16, 24, 31])
            right.set(xlabel="weight of the block", ylabel="weight / absmax of the block")
            left.set_title("What does less error cost in bits?")
            right.set_title("Where are a block's levels?")
            right.grid(visible=False)
            nowhere = [(np.nan, np.nan)]
            draw_curves(left, {label: (method, nowhere) for label, method in CURVES.items()}, ms=6)
            self._curves = dict(zip(CURVES, left.lines, strict=True))
            self._kinds = {}
            for kind in ("Q4_0", "Q4_1", "MXFP4"):
                look = method_line(kind) | {"linestyle": "", "label": METHOD_LOOK[kind].label}
                (self._kinds[kind],) = left.plot([], [], **look)
            left.legend(loc="upper right", ncols=2)
            self._levels = right.hlines([], -1, 32, linewidth=1.5)
            self._errors = right.vlines([], [], [], color=COLORS["error"], linewidth=2)
            (self._weights,) = right.plot([], [], "o", color=COLORS["text"], markersize=5)
            self.animate(*self._curves.values(), *self._kinds.values())
            self.animate(self._levels, self._errors, self._weights)

    def update(self, view):
        errors = [error for points in view.curves.values() for _, error in points]
        errors += [view.kinds[kind][1] for kind in self._kinds]
        top = 1.35 * max(errors) or 1.0  # room for the legend
        bottom = 0.8 * min(errors) if min(errors) > 0.2 * top else -0.02 * top
        if self.changed((bottom, top)):
            self.axes[0].set_ylim(bottom, top)
            self._background = None  # drawn anew, in the same places: `redraw` would move them
        for label, line in self._curves.items():
            line.set_data(*zip(*view.curves.get(label) or [(np.nan, np.nan)], strict=True))
        for kind, mark in self._kinds.items():
            bits, error = view.kinds[kind]
            mark.set_data([bits], [error])
            mark.set_markersize(20 if kind == view.kind else 10)
        x = np.arange(len(view.values))
        self._weights.set_data(x, view.values)
        self._levels.set_segments([((-1, y), (32, y)) for y in view.levels])
        self._levels.set(linewidth=1.5 if len(view.levels) < 40 else 0.4, **method_fill(view.kind))
        self._errors.set_segments(
            [((i, a), (i, b)) for i, a, b in zip(x, view.values, view.restored, strict=True)]
        )
