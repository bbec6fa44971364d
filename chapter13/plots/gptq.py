"""The pictures of notebook 06: a loss with a valley, Hessians, and what calibration is worth."""

import numpy as np
from matplotlib import colormaps
from matplotlib.colors import LogNorm
from matplotlib.patches import Rectangle

from chapter13.plots.live import LiveFigure
from chapter13.plots.picture import (
    COLORS,
    METHOD_LOOK,
    SERIES,
    Picture,
    method_fill,
    method_line,
    method_named,
    new_figure,
    set_ticks,
    style,
)
from chapter13.plots.shapes import draw_dot_rows

NEAREST, GPTQ = METHOD_LOOK["nearest"].label, METHOD_LOOK["gptq"].label
PATCHES = 32  # rows and columns of a Hessian's picture, at most
HESSIAN_MAP = colormaps["cividis"].resampled(12)  # few steps keep the stored pictures small


def valley(weight, hessian, points, path):
    """The loss over two weights as ellipses, with the whole numbers as grid.

    weight: (2,), hessian: (2, 2). points: method -> (2,) grid point. path: (2,) points from the
    weight on, drawn as arrows.
    """
    weight, hessian = np.asarray(weight, float), np.asarray(hessian, float)
    x, y = np.meshgrid(np.linspace(-1.6, 1.6, 161), np.linspace(-1.15, 1.15, 161))
    offset = np.stack([x, y], -1)
    loss = np.einsum("...i,ij,...j", offset, hessian, offset)
    with style():
        figure, ax = new_figure(10, 4.2)
        levels = [0.03, 0.15, 0.5, 1.2]
        ax.contour(x + weight[0], y + weight[1], loss, levels, cmap="cividis", linewidths=1.5)
        inside = [
            np.arange(np.ceil(w - r), w + r) for w, r in zip(weight, (1.55, 1.1), strict=True)
        ]
        for grid_x in inside[0]:
            ax.plot([grid_x] * len(inside[1]), inside[1], "o", color=COLORS["original"], ms=9)
        white = {"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1}
        ax.plot(*weight, "X", color=COLORS["text"], ms=13, zorder=4)
        ax.annotate(
            "the weights", weight, (16, 4), textcoords="offset points", fontsize=14, bbox=white
        )
        for start, end in zip([weight, *path[:-1]], path, strict=True):
            arrow = {"arrowstyle": "-|>", "lw": 2.5} | method_fill("gptq")
            ax.annotate("", end, start, arrowprops=arrow)
        losses = {}
        for method, point in points.items():
            offset, label = np.asarray(point) - weight, METHOD_LOOK[method].label
            losses[label] = offset @ hessian @ offset
            ax.plot(*point, **method_line(method), ms=13, zorder=4)
            ax.annotate(
                f"{label}: loss {losses[label]:.2f}", point, (14, -18),
                textcoords="offset points", fontsize=14, weight="bold", bbox=white,
            )  # fmt: skip
        ax.set(xlabel="weight 1", ylabel="weight 2", aspect="equal")
        ax.set(xlim=(weight[0] - 1.6, weight[0] + 1.6), ylim=(weight[1] - 1.15, weight[1] + 1.15))
        ax.set(xticks=inside[0], yticks=inside[1])
        ax.grid(False)
        told = ", ".join(f"{label} {value:.2f}" for label, value in losses.items())
        return Picture(
            figure,
            "The loss over two weights: long narrow ellipses around the weights, a slanting "
            f"valley. Gray dots are the grid. Loss at two of them: {told}. Arrows lead along the "
            "valley to the better one.",
        )


def hessians(matrices):
    """title -> |H| on a logarithmic scale, each over its median diagonal element, side by side.

    Channels stay in their order. A cell is the largest element of its patch.
    """
    with style():
        figure, axes = new_figure(10, 4.4, cols=len(matrices), squeeze=False)
        told = []
        for ax, (title, matrix) in zip(axes[0], matrices.items(), strict=True):
            matrix = np.abs(np.asarray(matrix, float))
            diagonal = matrix.diagonal()
            matrix = _largest_of_patches(matrix / np.median(diagonal))
            image = ax.imshow(
                matrix, norm=LogNorm(1e-2, 1e4, clip=True), cmap=HESSIAN_MAP,
                interpolation="nearest", extent=(0, len(diagonal), len(diagonal), 0),
            )  # fmt: skip
            ax.set(title=title, xlabel="input channel", ylabel="input channel")
            ax.locator_params(nbins=4)
            ax.grid(False)
            power = round(np.log10(diagonal.max() / np.median(diagonal)))
            told.append(f"{title} some 10^{power} times")
        figure.colorbar(image, ax=axes, label="|H| / median of its diagonal")
        return Picture(
            figure,
            "The Hessian as a map, on a logarithmic scale: a bright diagonal, and lines where "
            "loud channels cross all others. The largest element of the diagonal over its median: "
            f"{', '.join(told)}.",
        )


def _largest_of_patches(matrix):
    edges = np.linspace(0, len(matrix), min(PATCHES, len(matrix)) + 1).astype(int)[:-1]
    return np.maximum.reduceat(np.maximum.reduceat(matrix, edges, 0), edges, 1)


def damping(damps, losses):
    """losses: text -> GPTQ's layer loss on it for each of `damps`, on logarithmic axes."""
    with style():
        figure, ax = new_figure(10, 3.2)
        for variant, (label, values) in enumerate(losses.items()):
            ax.plot(damps, values, ms=9, label=label, **method_line("gptq", variant))
        ax.set(xscale="log", yscale="log", xlabel="damping, share of the mean diagonal")
        ax.set_ylabel("layer loss")
        decades = np.log10(np.array(list(losses.values())))
        ax.set_ylim(10 ** np.floor(decades.min()), 10 ** np.ceil(decades.max()))
        ax.minorticks_off()
        ax.legend()
        one, other = (np.asarray(values) for values in losses.values())
        widest = damps[int(np.argmax(np.abs(np.log(one / other))))]
        return Picture(
            figure,
            f"Layer loss against damping, a curve each for {' and '.join(losses)}. They lie "
            f"farthest apart at {widest:g}.",
        )


def loss_ratios(ratios):
    """layer -> {label: GPTQ's loss over round-to-nearest's}: a row a layer, logarithmic.

    Two labels for two orders of the columns; the first is drawn hollow.
    """
    labels = list(next(iter(ratios.values())))
    looks = {
        label: method_line("gptq", label == labels[0]) | {"label": f"GPTQ, {label}"}
        for label in labels
    }
    with style():
        figure, ax = new_figure(10, 1.4 + 0.42 * len(ratios))
        draw_dot_rows(ax, ratios, looks)
        ax.axvline(1, lw=3, label=NEAREST, **method_fill("nearest"))
        ax.set(xscale="log", xlabel="layer loss / that of rounding")
        set_ticks(ax.xaxis, [0.01, 0.1, 1])
        figure.legend(loc="outside upper center", ncols=3)
        first, second = np.array([list(each.values()) for each in ratios.values()]).T
        lowest = min(ratios, key=lambda name: ratios[name][labels[1]])
        return Picture(
            figure,
            f"Layer loss over that of rounding to nearest, two dots for each of {len(ratios)} "
            f"layers. {labels[1]} lies below {labels[0]} in {(second < first).sum()} of them, and "
            f"lowest of all on {lowest}.",
        )


def amounts(curves, lines):
    """KL of GPTQ's model, in nats per token, against the number of calibration sequences.

    curves: kind of text -> {sequences: KL}; lines: label of a method that needs no calibration ->
    its KL.
    """
    with style():
        figure, ax = new_figure(10, 4)
        for variant, (text, points) in enumerate(curves.items()):
            look = method_line("gptq", variant) | {"label": f"GPTQ, {text}"}
            ax.plot(list(points), list(points.values()), ms=9, **look)
        for label, value in lines.items():
            ax.axhline(value, lw=3, label=label, **method_fill(method_named(label)))
        ax.set(xscale="log", xlabel="calibration sequences of 256 tokens", ylim=(0, None))
        set_ticks(ax.xaxis, sorted({count for points in curves.values() for count in points}))
        ax.set_ylabel("KL to full precision\n(nats per token)")
        ax.legend(loc="lower left", ncols=2)
        told = "; ".join(
            f"{label} from {points[min(points)]:.2f} with {min(points)} to "
            f"{points[max(points)]:.2f} with {max(points)}"
            for label, points in curves.items()
        )
        others = ", ".join(f"{label} {value:.2f}" for label, value in lines.items())
        return Picture(
            figure, f"KL against calibration sequences: {told}. For comparison {others}."
        )


class ColumnsFigure(LiveFigure):
    """Shows an `explorers.gptq.ColumnsView` of a matrix (rows, columns) with numbers in its cells.

    Rounded columns are orange. Below it what was added to each weight; right the loss so far.
    """

    def __init__(self, rows, columns):
        super().__init__(width=10, height=4.3, cols=2, width_ratios=[3, 2])
        matrix, loss = self.axes
        self._shape = rows, columns
        gap = 1.3  # between the two matrices, in rows
        with style():
            matrix.set(xlim=(0, columns), ylim=(2 * rows + gap, -0.8), xticks=[], yticks=[])
            matrix.grid(False)
            matrix.spines[:].set_visible(False)
            for top, words in ((0, "the weights now"), (rows + gap, "added so far")):
                matrix.text(0, top - 0.25, words, fontsize=14, weight="bold", va="bottom")
            self._cells, self._numbers = [], []
            for top in (0, rows + gap):
                for row, column in np.ndindex(rows, columns):
                    cell = Rectangle((column, top + row), 1, 1, edgecolor="white", lw=2)
                    self._cells.append(matrix.add_patch(cell))
                    self._numbers.append(
                        matrix.text(column + 0.5, top + row + 0.53, "", ha="center", va="center",
                                    fontsize=12)
                    )  # fmt: skip
            x = np.arange(columns + 1)
            loss.set(xlim=(-0.3, columns + 0.3), ylim=(-0.03, 1.25), xlabel="columns rounded")
            loss.set(ylabel=f"loss ({NEAREST} = 1)", xticks=x)
            self._curves = []
            for method in ("nearest", "gptq"):
                look = method_line(method) | {"label": METHOD_LOOK[method].label}
                self._curves += loss.plot(x, x * np.nan, ms=8, **look)
            loss.legend(loc="upper left")
            self.animate(*self._cells, *self._numbers, *self._curves)

    def update(self, view):
        rows, columns = self._shape
        top = np.abs(view.moved).max() or 1.0
        values = [*view.weights.ravel(), *view.moved.ravel()]
        for place, (cell, number, value) in enumerate(
            zip(self._cells, self._numbers, values, strict=True)
        ):
            column = place % columns
            rounded, moves = column < view.column, place >= rows * columns
            if moves:
                cell.set_facecolor(COLORS["error"] if rounded else SERIES[1])
                cell.set_alpha(0.1 + 0.7 * min(abs(value) / top, 1))
            else:
                cell.set_facecolor(METHOD_LOOK["gptq"].color if rounded else COLORS["grid"])
                cell.set_gid("method:gptq" if rounded else None)
                cell.set_alpha(0.35 if rounded else 0.5)
            text = f"{value:+.2f}" if moves else f"{value:.2f}"
            number.set_text("" if moves and abs(value) < 0.005 else text.replace("-", "−"))
            number.set_fontweight("bold" if column == view.column - 1 else "normal")
        for line, losses in zip(self._curves, (view.nearest_losses, view.losses), strict=True):
            line.set_ydata(losses)


class LayerFigure(LiveFigure):
    """Shows an `explorers.gptq.LayerView`: losses at the left, errors by channel at the right.

    Rounding to nearest, and below it or beside it GPTQ, unless the view is of rounding alone.
    """

    def __init__(self):
        super().__init__(width=10, height=3.9, cols=2)
        loss, channels = self.axes
        with style():
            self._dots, self._curves = [], []
            for method, shift, width in (("nearest", -0.2, 4), ("gptq", 0.2, 2.5)):
                look = method_line(method) | {"linestyle": "", "ms": 11}
                self._dots += loss.plot([np.nan] * 2, np.arange(2) + shift, **look)
                look = method_fill(method) | {"lw": width, "label": METHOD_LOOK[method].label}
                self._curves += channels.plot([], [], **look)
            self._numbers = [loss.text(1, 0, "", va="center", fontsize=13) for _ in range(4)]
            loss.set(xscale="log", xlim=(1e-7, 30), ylim=(1.6, -0.6), xlabel="layer loss")
            loss.set_yticks(range(2), ["calibration", "held-out"])
            loss.set_xticks([1e-6, 1e-4, 1e-2, 1])
            loss.minorticks_off()
            loss.grid(visible=False, axis="y")
            loss.set_title("error of the outputs, on two texts")
            channels.set(yscale="log", ylim=(1e-3, 3), xlim=(0, 1), xticks=[0, 0.5, 1])
            channels.set_xticklabels(["loudest", "input channels", "quietest"])
            channels.get_xticklabels()[0].set_ha("left")
            channels.get_xticklabels()[2].set_ha("right")
            channels.set_title("error of the weights, over their RMS")
            channels.legend(loc="lower right")
            self.animate(*self._dots, *self._numbers, *self._curves)

    def update(self, view):
        shown = np.clip(view.losses, 1e-7, 1)
        for dots, places in zip(self._dots, shown, strict=True):
            dots.set_xdata(places)
        heights = [y for dots in self._dots for y in dots.get_ydata()]
        for number, x, y, value in zip(
            self._numbers, shown.ravel(), heights, view.losses.ravel(), strict=True
        ):
            number.set(x=x * 2, y=y, text=f"{value:.2g}")
        x = (np.arange(view.errors.shape[1]) + 0.5) / view.errors.shape[1]
        for curve, errors in zip(self._curves, view.errors, strict=True):
            curve.set_data(x, np.maximum(errors, 1e-9))
        for artist in (self._dots[1], self._curves[1], *self._numbers[2:]):
            artist.set_visible(view.method == "gptq")
