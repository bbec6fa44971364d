"""The pictures of notebook 06: a loss with a valley, Hessians, damping, orders of the columns."""

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
    weight on, drawn as arrows. Each ellipse bears its loss.
    """
    weight, hessian = np.asarray(weight, float), np.asarray(hessian, float)
    x, y = np.meshgrid(np.linspace(-1.6, 1.6, 161), np.linspace(-1.15, 1.15, 161))
    offset = np.stack([x, y], -1)
    loss = np.einsum("...i,ij,...j", offset, hessian, offset)
    with style():
        figure, ax = new_figure(10, 4.2)
        levels = [0.03, 0.15, 0.5, 1.2]
        look = {"colors": "#666666", "linewidths": 1.5, "antialiased": False}  # a smaller file
        ax.contour(x + weight[0], y + weight[1], loss, levels, **look)
        inside = [
            np.arange(np.ceil(w - r), w + r) for w, r in zip(weight, (1.55, 1.1), strict=True)
        ]
        for grid_x in inside[0]:
            ax.plot([grid_x] * len(inside[1]), inside[1], "o", color=COLORS["original"], ms=9)
        white = {"facecolor": "white", "edgecolor": "none", "pad": 1}
        for level in levels[1:]:  # the innermost has no room for its number
            aside = np.array([1, -0.3])
            place = weight + aside * np.sqrt(level / (aside @ hessian @ aside))
            ax.text(*place, f"{level:g}", ha="center", va="center", fontsize=12, bbox=white)
        ax.plot(*weight, "X", color=COLORS["text"], ms=13, zorder=4)
        ax.annotate("the weights", weight, (-14, -6), textcoords="offset points", ha="right",
                    fontsize=14, bbox=white)  # fmt: skip
        for start, end in zip([weight, *path[:-1]], path, strict=True):
            arrow = {"arrowstyle": "-|>", "lw": 2.5, "color": COLORS["text"]}
            arrow |= {"shrinkA": 0, "shrinkB": 0, "mutation_scale": 14, "zorder": 5}
            ax.annotate("", end, start, arrowprops=arrow)
        losses = {}
        for method, point in points.items():
            offset, label = np.asarray(point) - weight, METHOD_LOOK[method].label
            losses[label] = offset @ hessian @ offset
            ax.plot(*point, **method_line(method), ms=13, zorder=4)
            aside = 14 if offset[1] > 0 else -24
            ax.annotate(
                f"{label}: loss {losses[label]:.2f}", point, (0, aside), ha="center",
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

    Channels stay in their order. A cell is the largest element of a patch: PATCHES x PATCHES of
    them make a picture.
    """
    with style():
        figure, axes = new_figure(10, 4.4, cols=len(matrices), squeeze=False)
        told, patches = [], []
        for ax, (title, matrix) in zip(axes[0], matrices.items(), strict=True):
            matrix = np.abs(np.asarray(matrix, float))
            diagonal = matrix.diagonal()
            matrix = _largest_of_patches(matrix / np.median(diagonal))
            image = ax.imshow(
                matrix, norm=LogNorm(1e-2, 1e6, clip=True), cmap=HESSIAN_MAP,
                interpolation="nearest", extent=(0, len(diagonal), len(diagonal), 0),
            )  # fmt: skip
            ax.set(title=title, xlabel="input channel", ylabel="input channel")
            ax.locator_params(nbins=4)
            ax.grid(False)
            patches.append(f"{-(-len(diagonal) // PATCHES)}")
            power = round(np.log10(diagonal.max() / np.median(diagonal)))
            told.append(f"{title} about 10^{power}")
        figure.colorbar(image, ax=axes, label="|H| / median of its diagonal")
        return Picture(
            figure,
            "Hessians as maps, on a logarithmic scale. A cell shows the largest "
            f"of {' or '.join(patches)} by as many elements. Bright rows and columns belong to "
            "channels with large activations. The largest element of the diagonal over its median: "
            f"{', '.join(told)}.",
        )


def _largest_of_patches(matrix):
    edges = np.linspace(0, len(matrix), min(PATCHES, len(matrix)) + 1).astype(int)[:-1]
    return np.maximum.reduceat(np.maximum.reduceat(matrix, edges, 0), edges, 1)


def damping(damps, losses, nearest):
    """GPTQ's layer loss for each of `damps`, on logarithmic axes, with the least one marked.

    losses: text -> a loss for each of `damps`; of two texts, the second is held out. nearest:
    round-to-nearest's loss on the second.
    """
    with style():
        figure, ax = new_figure(10, 3.4)
        ax.axhline(nearest, lw=3, label=f"{NEAREST}, held-out text", **method_fill("nearest"))
        for variant, (label, values) in enumerate(losses.items()):
            ax.plot(damps, values, ms=9, label=f"GPTQ, {label}", **method_line("gptq", variant))
        held_out = list(losses.values())[-1]
        best = int(np.argmin(held_out))
        ring = {"marker": "o", "ms": 20, "mfc": "none", "mew": 2, "color": COLORS["text"]}
        ax.plot(damps[best], held_out[best], **ring)
        ax.annotate("lowest", (damps[best], held_out[best]), (0, 14), textcoords="offset points",
                    ha="center", weight="bold")  # fmt: skip
        ax.set(xscale="log", yscale="log", xlabel="damping, as a fraction of the mean diagonal")
        ax.set_ylabel("layer loss")
        decades = np.log10([*np.ravel(list(losses.values())), nearest])
        ax.set_ylim(10 ** np.floor(decades.min()), 10 ** np.ceil(decades.max()))
        set_ticks(ax.xaxis, damps)
        ax.minorticks_off()
        ax.legend(loc="lower right")
        told = "; ".join(
            f"{label} from {values[0]:.2g} at {damps[0]:g} to {values[-1]:.2g} at {damps[-1]:g}"
            for label, values in losses.items()
        )
        return Picture(
            figure,
            f"Layer loss against damping. GPTQ, {told}. The held-out loss is lowest "
            f"at {damps[best]:g}, with {held_out[best]:.2g}; {NEAREST} has {nearest:.2g} on that "
            "text.",
        )


def loss_ratios(panels):
    """Losses over round-to-nearest's on logarithmic axes: a panel for each text, side by side.

    panels: title -> {row: {label: loss over that of rounding}}. The same rows and two labels in
    all panels, for two orders of the columns; the first is drawn hollow.
    """
    rows = list(next(iter(panels.values())))
    labels = list(next(iter(panels.values()))[rows[0]])
    looks = {
        label: method_line("gptq", label == labels[0]) | {"label": f"GPTQ, {label}"}
        for label in labels
    }
    told = []
    with style():
        figure, axes = new_figure(
            10, 1.7 + 0.36 * len(rows), cols=len(panels), sharex=True, sharey=True, squeeze=False
        )
        for ax, (title, ratios) in zip(axes[0], panels.items(), strict=True):
            draw_dot_rows(ax, ratios, looks)
            ax.axvline(1, lw=3, label=NEAREST, **method_fill("nearest"))
            ax.set(title=title, xscale="log", xlabel="relative to rounding")
            values = np.array([[each[label] for label in labels] for each in ratios.values()])
            counts = ", ".join(
                f"{label} in {count}"
                for label, count in zip(labels, (values > 1).sum(0), strict=True)
            )
            told.append(f"{title}: above rounding's {counts} of {len(rows)} rows")
        lowest = min(np.min([list(each.values()) for each in p.values()]) for p in panels.values())
        decades = [0.001, 0.01, 0.1, 1, 10, 100]
        set_ticks(axes[0][0].xaxis, decades if lowest < 0.1 else [0.1, 0.2, 0.5, 1, 2])
        handles, names = axes[0][0].get_legend_handles_labels()
        figure.legend(handles, names, loc="outside upper center", ncols=3)
        return Picture(
            figure,
            "GPTQ's loss over that of rounding to nearest, a row of two dots for each of "
            f"{', '.join(rows)}. {'; '.join(told)}.",
        )


def paired(differences, baseline):
    """Differences from `baseline` as dots with their intervals, a row for each: Picture.

    differences: label -> (mean difference, low, high) of KL, in nats per token, sequence by
    sequence on the same texts. A label that begins with a method's has its look; so has `baseline`.
    """
    values = np.array(list(differences.values()), float)
    with style():
        figure, ax = new_figure(10, 1.3 + 0.45 * len(differences))
        method = method_named(baseline)
        look = method_fill(method) if method else {"color": COLORS["original"]}
        ax.axvline(0, lw=3, label=baseline, **look)
        looks = {}
        for y, (label, (value, low, high)) in enumerate(differences.items()):
            method = method_named(label)
            looks[label] = (
                method_line(method) if method else {"color": COLORS["text"], "marker": "o"}
            )
            bar = {name: word for name, word in looks[label].items() if name != "marker"}
            ax.hlines(y, low, high, lw=2.5, **bar)
            ax.annotate(f"{value:+.3f}".replace("-", "−"), (high, y), (10, 0),
                        textcoords="offset points", va="center", weight="bold")  # fmt: skip
        rows = {label: {label: each[0]} for label, each in differences.items()}
        draw_dot_rows(ax, rows, looks)
        ax.set_xlabel(f"KL minus that of {baseline}, nats per token")
        ax.locator_params(axis="x", nbins=7)
        ends = values.min(initial=0), values.max(initial=0)
        ax.set_xlim(ends[0] - 0.05 * np.ptp(ends), ends[1] + 0.18 * np.ptp(ends))
        told = "; ".join(
            f"{label} {value:+.3f} ({low:.3f} to {high:.3f})"
            for label, (value, low, high) in zip(differences, values, strict=True)
        )
        return Picture(
            figure,
            f"Dots with paired 95% intervals: KL minus that of {baseline}. {told}.",
        )


def amounts(curves, lines):
    """KL after GPTQ with clip search, in nats per token, against the calibration sequences.

    curves: kind of text -> {sequences: KL}; lines: label of another method -> its KL, dashed where
    the label names a variant of the method ("round to nearest, clip search").
    """
    with style():
        figure, ax = new_figure(10, 4)
        for variant, (text, points) in enumerate(curves.items()):
            look = method_line("gptq_clip", variant)
            look |= {"label": f"{METHOD_LOOK['gptq_clip'].label}, {text}"}
            ax.plot(list(points), list(points.values()), ms=12, **look)
        for label, value in lines.items():
            dash = "--" if "," in label else "-"
            ax.axhline(value, lw=3, ls=dash, label=label, **method_fill(method_named(label)))
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
            figure,
            f"KL after GPTQ with clip search, against calibration sequences: {told}. For "
            f"comparison {others}.",
        )


class ColumnsFigure(LiveFigure):
    """Shows an `explorers.gptq.ColumnsView` of a matrix (rows, columns) with numbers in its cells.

    Rounded columns are orange. Below it what was added to each weight: red where that is a rounding
    error, green where it compensates for those of other columns. At the right, the loss so far.
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
            now = "the weights now (orange: rounded)"
            added = "added so far (red: rounding error, green: compensation)"
            for top, words in ((0, now), (rows + gap, added)):
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
            loss.set(ylabel=f"loss ({NEAREST} = 1)", xticks=x, title="Who ends lower?")
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
            text = f"{value:+.2f}" if moves and abs(value) >= 0.005 else f"{value:.2f}"
            number.set_text("0.00" if abs(value) < 0.005 else text.replace("-", "−"))
            number.set_fontweight("bold" if column == view.column - 1 else "normal")
        for line, losses in zip(self._curves, (view.nearest_losses, view.losses), strict=True):
            line.set_ydata(losses)


class LayerFigure(LiveFigure):
    """Shows an `explorers.gptq.LayerView`: losses at the left, errors by channel at the right.

    The losses are shown as multiples of round-to-nearest's; those above MOST lie at the edge, with
    their number. GPTQ is not drawn where the view is of rounding alone.
    """

    MOST = 2.0
    TEXTS = ("calibration", "held-out", "held-out,\nno first tokens")

    def __init__(self):
        super().__init__(width=10, height=3.9, cols=2)
        loss, channels = self.axes
        with style():
            loss.axvline(1, lw=3, **method_fill("nearest"))
            look = method_line("gptq") | {"linestyle": "", "ms": 12}
            (self._dots,) = loss.plot([np.nan] * 3, np.arange(3), **look)
            self._numbers = [
                loss.text(0, y - 0.3, "", ha="center", va="center", fontsize=13, weight="bold")
                for y in range(3)
            ]
            loss.set(xlim=(-0.05, self.MOST), ylim=(2.5, -0.6))
            loss.set_xlabel("layer loss / that of rounding")
            loss.set_yticks(range(3), self.TEXTS)
            loss.set_xticks([0, 0.5, 1, 1.5, 2])
            loss.grid(visible=False, axis="y")
            loss.set_title("How much of rounding's error is left?")
            self._curves = []
            for method, width in (("nearest", 4), ("gptq", 2.5)):
                look = method_fill(method) | {"lw": width, "label": METHOD_LOOK[method].label}
                self._curves += channels.plot([], [], **look)
            channels.set(yscale="log", ylim=(1e-3, 3), xlim=(0, 1), xticks=[0, 0.5, 1])
            channels.set_xticklabels(["largest inputs", "", "smallest inputs"])
            channels.get_xticklabels()[0].set_ha("left")
            channels.get_xticklabels()[2].set_ha("right")
            channels.set_xlabel("input channels")
            channels.set(title="Which weights move most?", ylabel="RMS error / RMS weight")
            channels.legend(loc="lower right")
            self.animate(self._dots, *self._numbers, *self._curves)

    def update(self, view):
        places = np.clip(view.ratios, 0, self.MOST)
        self._dots.set_xdata(places)
        for number, place, ratio in zip(self._numbers, places, view.ratios, strict=True):
            number.set(x=np.clip(place, 0.15, self.MOST - 0.12), text=f"{ratio:.2g}")
        x = (np.arange(view.errors.shape[1]) + 0.5) / view.errors.shape[1]
        for curve, errors in zip(self._curves, view.errors, strict=True):
            curve.set_data(x, np.maximum(errors, 1e-9))
        for artist in (self._dots, self._curves[1], *self._numbers):
            artist.set_visible(view.method == "gptq")
