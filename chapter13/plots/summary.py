"""The pictures of notebook 08: loss against bits, loss against the size of the model, a choice."""

import numpy as np

from chapter13.plots.live import LiveFigure
from chapter13.plots.picture import (
    COLORS,
    METHOD_LOOK,
    Picture,
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


def pareto(rows, front):
    """Loss against bits: a point a row with its 95% interval; a line through those none beats.

    rows: of `summary.rows`; front: of `summary.front`.
    """
    with style():
        figure, ax = new_figure(width=10, height=5.6)
        _axes(ax)
        edge = _places(front)
        ax.step(*edge, where="post", color=COLORS["grid"], lw=5, zorder=1)
        for method, members in _by_method(rows.values()).items():
            if not members:
                continue
            bits, values = _places(members)
            ends = np.array([row.kl.interval for row in members]).clip(LEAST)
            look = method_line(method) | {
                "linestyle": "",
                "lw": 1.5,
                "label": METHOD_LOOK[method].label,
            }
            look["ms"] = 11 if look["marker"] in "*|P" else 8
            look["mew"] = 2 if look["marker"] == "|" else 1
            ax.errorbar(bits, values, np.abs(ends.T - values), **look)
        ax.legend(loc="lower left", ncols=2)
    names = ", ".join(f"{row.name} ({row.bits_per_weight:.2f} bits)" for row in front)
    alt = (
        f"KL to the float32 model against bits per weight, both axes logarithmic, {len(rows)} "
        f"methods and sizes with 95% intervals. None beats these: {names}."
    )
    return Picture(figure, alt)


def loss_over_size(published, own):
    """Perplexity lost against the size of the model.

    published: label -> (method, {billions of parameters: loss in percent}); own: label -> (method,
    (billions, loss)), drawn large and hollow.
    """
    with style():
        figure, ax = new_figure(width=10, height=4.8)
        for label, (method, points) in published.items():
            ax.plot(*zip(*points.items(), strict=True), ms=8, label=label, **method_line(method))
        for label, (method, point) in own.items():
            look = method_line(method, variant=True) | {"linestyle": "", "ms": 12}
            ax.plot(*point, label=label, **look)
        ax.set(xscale="log", yscale="log", xlabel="parameters (billions)")
        ax.set(ylabel="perplexity lost (%)")
        set_ticks(ax.xaxis, (0.1, 0.3, 1, 3, 10, 30, 100))
        set_ticks(ax.yaxis, (0.3, 1, 3, 10, 30, 100))
        ax.legend(loc="lower left")
    said = [
        f"{label}: {points[min(points)]:.0f}% at {min(points):g} billion, "
        f"{points[max(points)]:.1f}% at {max(points):g} billion"
        for label, (_, points) in published.items()
    ]
    said += [
        f"{label}: {loss:.0f}% at {billions:g} billion"
        for label, (_, (billions, loss)) in own.items()
    ]
    return Picture(
        figure, f"Perplexity lost against parameters, both logarithmic. {'; '.join(said)}."
    )


class ChoiceFigure(LiveFigure):
    """All rows in gray, those that run and fit in colour, the choice ringed, the memory a wall."""

    def __init__(self, rows):
        super().__init__(width=10, height=4.6)
        with style():
            _axes(self.axes)
            gray = COLORS["original"]
            self.axes.plot(*_places(rows.values()), "o", color=gray, ms=7)
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
            self.full = self.axes.text(0, 1.2 * LEAST, "does not fit", fontsize=14)
            self.animate(self.wall, self.full, self.wish, *self.fitting.values())
            self.animate(self.best, self.name)

    def update(self, view):
        choice = view.choice
        for method, members in _by_method(choice.fitting).items():
            self.fitting[method].set_data(*_places(members))
        self.best.set_data(*_places([choice.best] if choice.best else []))
        left = min(max(choice.most_bits, 1.9), 36)
        self.wall.set_bounds(left, 0, 36 - left, 1)
        self.full.set_x(left * 1.03)
        self.full.set_visible(left < 24)  # else there is no room for it
        self.wish.set_data([1.9, 36], [view.most_kl] * 2)
        self.name.set_text(choice.best.name if choice.best else "none of these")
