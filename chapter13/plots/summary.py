"""The pictures of notebook 08: loss against bits, loss against a model's size, which rows fit."""

import numpy as np

from chapter13.plots.live import LiveFigure
from chapter13.plots.picture import (
    COLORS,
    METHOD_LOOK,
    Picture,
    method_fill,
    method_line,
    new_figure,
    set_ticks,
    style,
)

# family of rows -> the method in whose look they are drawn; FP4 has a look of its own
FAMILIES = {
    "cast": "cast",
    "INT8 activations": "activations",
    "absmax": "absmax",
    "affine": "affine",
    "code book": "nf4",
    "GGUF": "GGUF",
    "AWQ": "awq",
    "GPTQ": "gptq",
    "GPTQ, clip search": "gptq_clip",
    "libraries": "libraries",
}
LEAST = 1e-5  # KL below it is drawn there: a logarithmic axis has no 0
BITS = (2, 3, 4, 5, 6, 8, 16, 32)


def _by_method(rows):
    """method -> those of the rows that are drawn in its look, in METHOD_LOOK's order."""
    groups = {method: [] for method in METHOD_LOOK if method in {*FAMILIES.values(), "fp4"}}
    for row in rows:
        groups["fp4" if row.name == "FP4" else FAMILIES[row.family]].append(row)
    return groups


def _places(rows):
    """(bits per weight, KL) of the rows, the latter LEAST at least: two arrays."""
    places = [(row.bits_per_weight, max(row.kl.value, LEAST)) for row in rows]
    return np.array(places).reshape(-1, 2).T


def _axes(ax):
    ax.set(xscale="log", yscale="log", xlim=(1.9, 36), ylim=(LEAST / 1.5, 30))
    set_ticks(ax.xaxis, BITS)
    ax.minorticks_off()
    ax.set(xlabel="bits per weight, scales included", ylabel="KL to float32 (nats per token)")


def _draw_rows(ax, rows, **look):
    """A marker for each row in the look of its method, and its 95% interval if `intervals`."""
    for method, members in _by_method(rows).items():
        if not members:
            continue
        bits, values = _places(members)
        ends = np.array([row.kl.interval for row in members]).clip(LEAST)
        line = method_line(method) | {"linestyle": "", "label": METHOD_LOOK[method].label} | look
        line["mew"] = 2 if line["marker"] == "|" else 1
        ax.errorbar(bits, values, np.abs(ends.T - values), **line)


def pareto(rows, front):
    """Loss against bits: a marker for each row, a line through those that no other row beats.

    rows: of `summary.rows`; front: of `summary.front`.
    """
    with style():
        figure, ax = new_figure(width=10, height=5.4)
        _axes(ax)
        edge = _places(front)
        ax.step(*edge, where="post", color=COLORS["grid"], lw=5, zorder=1)
        _draw_rows(ax, rows.values(), ms=8, lw=1.5)
        ax.set_title("All rows")
        ax.legend(loc="lower left", ncols=2)
    ends = f"{front[0].bits_per_weight:.2f} to {front[-1].bits_per_weight:.2f} bits"
    alt = (
        f"KL to the float32 model against bits per weight, both axes logarithmic, {len(rows)} "
        f"rows with 95% intervals. A gray line joins the {len(front)} rows that no other row "
        f"beats, from {ends}."
    )
    return Picture(figure, alt)


def pareto_named(rows, front, bits=(3, 6.5), others=()):
    """The part of `pareto` between `bits`, below a KL of 2, with 95% intervals and names.

    rows, front: as for `pareto`. others: names of rows beside the front that get a name too. Names
    are shortened: "g64" is groups of 64, "DQ" double quantization, "clip" a clip search.
    """
    inside = [
        row
        for row in rows.values()
        if bits[0] <= row.bits_per_weight <= bits[1] and row.kl.value <= 2
    ]
    named = [row for row in front if row in inside]
    with style():
        figure, ax = new_figure(width=10, height=5.7)
        ax.step(*_places(front), where="post", color=COLORS["grid"], lw=6, zorder=1)
        _draw_rows(ax, inside, ms=8, elinewidth=3)
        least = min(row.kl.value for row in inside)
        ax.set(yscale="log", xlim=(bits[0] - 0.1, bits[1] + 0.1), ylim=(least / 1.7, 2.2))
        set_ticks(ax.yaxis, (0.02, 0.05, 0.1, 0.2, 0.5, 1, 2))
        ax.set(xlabel="bits per weight, scales included", ylabel="KL to float32 (nats per token)")
        ax.set_title(f"The frontier of what we tried, {bits[0]:g} to {bits[1]:g} bits")
        for row in named:
            left = row.bits_per_weight < bits[0] + 0.2 * (bits[1] - bits[0])
            place, side = ((-2, -12), "left") if left else ((-12, -6), "right")
            _name(ax, row, place, side, "top", weight="bold")
        for row in inside:
            if row.name in others:
                _name(ax, row, (10, 1), "left", "bottom")
        ax.legend(loc="upper right", ncols=2)
    told = "; ".join(f"{row.name}, {row.bits_per_weight:.2f} bits, {row.kl:.3f}" for row in named)
    alt = (
        f"KL to the float32 model, logarithmic, against bits per weight from {bits[0]:g} to "
        f"{bits[1]:g}: {len(inside)} rows with 95% intervals. On the frontier: {told}."
    )
    return Picture(figure, alt)


def _name(ax, row, place, side, up, **look):
    """A row's short name beside its marker, `place` points away."""
    words = row.name.replace(", groups of ", " g").replace(", per ", " per ")
    words = words.replace(", double quantization", " DQ").replace(", clip search", " clip")
    at = (row.bits_per_weight, max(row.kl.value, LEAST))
    ax.annotate(words, at, place, textcoords="offset points", ha=side, va=up, fontsize=13, **look)


def loss_over_size(published, own, top=100):
    """Perplexity lost against the size of the model.

    published: label -> (method, {billions of parameters: loss in percent}); own: label -> (method,
    (billions, loss)), drawn large and hollow. A loss above `top` is an arrow at the upper edge with
    its number; no line leads there.
    """
    beyond = {}
    with style():
        figure, ax = new_figure(width=10, height=4.8)
        for label, (method, points) in published.items():
            shown = [(x, y if y <= top else np.nan) for x, y in points.items()]
            ax.plot(*zip(*shown, strict=True), ms=8, label=label, **method_line(method))
            for x, y in points.items():
                if y > top:
                    beyond.setdefault(label, []).append((x, y))
                    arrow = {"arrowstyle": "-|>", "lw": 2.5} | method_fill(method)
                    ax.annotate("", (x, 1.6 * top), (x, 0.8 * top), arrowprops=arrow)
                    ax.annotate(f"{y:.0f}%", (x, 1.1 * top), (8, 0), textcoords="offset points",
                                weight="bold", va="center")  # fmt: skip
        for label, (method, point) in own.items():
            look = method_line(method, variant=True) | {"linestyle": "", "ms": 12}
            ax.plot(*point, label=label, **look)
        ax.set(xscale="log", yscale="log", xlabel="parameters (billions)")
        ax.set(ylabel="perplexity lost (%)", ylim=(0.25, 1.7 * top))
        set_ticks(ax.xaxis, (0.1, 0.3, 1, 3, 10, 30, 100))
        set_ticks(ax.yaxis, (0.3, 1, 3, 10, 30, 100))
        ax.legend(loc="lower left")
    said = [
        f"{label}: {points[min(points)]:.0f}% at {min(points):g} billion, "
        f"{points[max(points)]:.1f}% at {max(points):g} billion"
        for label, (_, points) in published.items()
    ]
    said += [
        f"{label}, arrow: {loss:.0f}% at {billions:g} billion"
        for label, points in beyond.items()
        for billions, loss in points
    ]
    said += [
        f"{label}: {loss:.0f}% at {billions:g} billion"
        for label, (_, (billions, loss)) in own.items()
    ]
    return Picture(
        figure,
        "The percentage by which perplexity rises, against parameters, both logarithmic. "
        f"{'; '.join(said)}.",
    )


class ChoiceFigure(LiveFigure):
    """All rows; those that a program loads and the memory holds in colour, the least KL ringed.

    Filled gray: the memory does not hold them. Hollow: it does, but the program does not load them.
    """

    def __init__(self, rows):
        super().__init__(width=10, height=4.6)
        self.rows = list(rows.values())
        with style():
            _axes(self.axes)
            gray = {"color": COLORS["original"], "ms": 7, "linestyle": "", "marker": "o"}
            (self.large,) = self.axes.plot([], [], **gray)
            (self.foreign,) = self.axes.plot(
                [], [], label="fits, but this program does not load it", fillstyle="none", **gray
            )
            self.fitting = {}
            for method in _by_method(rows.values()):
                look = method_line(method) | {"linestyle": "", "ms": 10}
                (self.fitting[method],) = self.axes.plot([], [], **look)
            (self.best,) = self.axes.plot(
                [], [], "o", color=COLORS["highlight"], ms=22, mew=3, fillstyle="none"
            )
            self.wall = self.axes.axvspan(36, 36, color=COLORS["original"], alpha=0.25)
            (self.wish,) = self.axes.plot([], [], "--", color=COLORS["text"], lw=1.5)
            self.name = self.axes.text(
                0.98, 0.95, "", transform=self.axes.transAxes, ha="right", va="top", fontsize=16
            )
            self.axes.set_title(" ")  # room for the question
            self.question = self.axes.text(
                0.5,
                1.03,
                "",
                transform=self.axes.transAxes,
                ha="center",
                va="bottom",
                fontsize=15,
                weight="bold",
            )
            self.full = self.axes.text(0, 1.2 * LEAST, "does not fit", fontsize=14)
            self.figure.legend(loc="outside lower right")
            self.animate(self.wall, self.full, self.wish, self.large, self.foreign)
            self.animate(*self.fitting.values(), self.best, self.name, self.question)

    def update(self, view):
        choice = view.choice
        others = [row for row in self.rows if row not in choice.fitting]
        held = [row for row in others if row.bits_per_weight <= choice.most_bits]
        self.foreign.set_data(*_places(held))
        self.large.set_data(*_places([row for row in others if row not in held]))
        for method, members in _by_method(choice.fitting).items():
            self.fitting[method].set_data(*_places(members))
        self.best.set_data(*_places([choice.best] if choice.best else []))
        left = min(max(choice.most_bits, 1.9), 36)
        self.wall.set_bounds(left, 0, 36 - left, 1)
        self.full.set_x(left * 1.03)
        self.full.set_visible(left < 24)  # else there is no room for it
        self.wish.set_data([1.9, 36], [view.most_kl] * 2)
        self.wish.set_visible(view.most_kl < 30)
        self.name.set_text(f"least KL: {choice.best.name}" if choice.best else "none of these")
        self.question.set_text(view.title)
