"""The pictures of notebook 08: loss against bits, loss against the size of the model, a choice."""

import numpy as np

from chapter13.plots.live import LiveFigure
from chapter13.plots.picture import COLORS, Picture, new_figure, style

# a family has one colour and one mark
FAMILIES = {
    "cast": (COLORS["original"], "s"),
    "INT8 activations": ("#0072B2", "D"),
    "absmax": ("#E69F00", "o"),
    "affine": ("#56B4E9", "o"),
    "code book": ("#009E73", "^"),
    "GGUF": ("#CC79A7", "v"),
    "AWQ": ("#D55E00", "P"),
    "GPTQ": ("#222222", "X"),
    "GPTQ, clip search": ("#222222", "*"),
    "libraries": ("#8C6D31", "|"),
}
LEAST = 1e-5  # KL below it is drawn there: a logarithmic axis has no 0
BITS = (2, 3, 4, 5, 6, 8, 16, 32)


def _axes(ax):
    ax.set(xscale="log", yscale="log", xlim=(1.9, 36), ylim=(LEAST / 1.5, 30))
    ax.set_xticks(BITS, [str(bits) for bits in BITS])
    ax.minorticks_off()
    ax.set(xlabel="bits per weight, scales included", ylabel="KL to float32 (nats per token)")


def pareto(rows, front):
    """Loss against bits: a point a row with its 95% interval; a line through those none beats.

    rows: of `summary.rows`; front: of `summary.front`.
    """
    with style():
        figure, ax = new_figure(width=10, height=5.6)
        _axes(ax)
        edge = [(row.bits_per_weight, max(row.kl.value, LEAST)) for row in front]
        ax.step(*zip(*edge, strict=True), where="post", color=COLORS["grid"], lw=5, zorder=1)
        for family, (color, mark) in FAMILIES.items():
            members = [row for row in rows.values() if row.family == family]
            if not members:
                continue
            bits = [row.bits_per_weight for row in members]
            values = np.array([row.kl.value for row in members])
            ends = np.array([row.kl.interval for row in members]).clip(LEAST)
            shown = values.clip(LEAST)
            spans = np.abs(ends.T - shown)
            look = {"fmt": mark, "color": color, "ms": 11 if mark in "*|P" else 8, "lw": 1.5}
            ax.errorbar(bits, shown, spans, label=family, **look, mew=2 if mark == "|" else 1)
        ax.legend(loc="lower left", ncols=2)
    names = ", ".join(f"{row.name} ({row.bits_per_weight:.2f} bits)" for row in front)
    alt = (
        f"KL to the float32 model against bits per weight, both axes logarithmic, {len(rows)} "
        f"methods and sizes with 95% intervals. None beats these: {names}."
    )
    return Picture(figure, alt)


def sizes(published, own):
    """Perplexity lost against the size of the model.

    published: label -> {billions of parameters: loss in percent}; own: label -> (billions, loss).
    """
    marks = ("o", "X")
    with style():
        figure, ax = new_figure(width=10, height=4.8)
        for (label, points), color, mark in zip(
            published.items(), (COLORS["affine"], "#222222"), marks, strict=False
        ):
            ax.plot(*zip(*points.items(), strict=True), mark + "-", color=color, ms=8, label=label)
        for (label, (billions, loss)), mark in zip(own.items(), marks, strict=False):
            ax.plot(billions, loss, mark, color=COLORS["highlight"], ms=13, label=label)
        ax.set(xscale="log", yscale="log", xlabel="parameters (billions)")
        ax.set(ylabel="perplexity lost (%)")
        ticks = (0.1, 0.3, 1, 3, 10, 30, 100)
        ax.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        percents = (0.3, 1, 3, 10, 30, 100)
        ax.set_yticks(percents, [f"{percent:g}" for percent in percents])
        ax.minorticks_off()
        ax.legend(loc="lower left")
    said = [
        f"{label}: {points[min(points)]:.0f}% at {min(points):g} billion, "
        f"{points[max(points)]:.1f}% at {max(points):g} billion"
        for label, points in published.items()
    ]
    said += [
        f"{label}: {loss:.0f}% at {billions:g} billion" for label, (billions, loss) in own.items()
    ]
    return Picture(
        figure, f"Perplexity lost against parameters, both logarithmic. {'; '.join(said)}."
    )


class ChoiceFigure(LiveFigure):
    """All rows in gray, those that run and fit in colour, the choice ringed, the memory a wall."""

    def __init__(self, rows):
        super().__init__(width=10, height=4.6)
        bits = [row.bits_per_weight for row in rows.values()]
        values = [max(row.kl.value, LEAST) for row in rows.values()]
        with style():
            _axes(self.axes)
            self.axes.plot(bits, values, "o", color=COLORS["original"], ms=7)
            (self.fitting,) = self.axes.plot([], [], "o", color=COLORS["int8"], ms=10)
            (self.best,) = self.axes.plot(
                [], [], "o", color=COLORS["highlight"], ms=22, mew=3, fillstyle="none"
            )
            self.wall = self.axes.axvspan(36, 36, color=COLORS["original"], alpha=0.25)
            (self.wish,) = self.axes.plot([], [], "--", color=COLORS["text"], lw=1.5)
            self.name = self.axes.text(
                0.98, 0.95, "", transform=self.axes.transAxes, ha="right", va="top", fontsize=16
            )
            self.full = self.axes.text(0, 1.2 * LEAST, "does not fit", fontsize=14)
            self.animate(self.wall, self.full, self.wish, self.fitting, self.best, self.name)

    def update(self, view):
        choice = view.choice
        fitting = choice.fitting
        self.fitting.set_data(
            [row.bits_per_weight for row in fitting], [max(row.kl.value, LEAST) for row in fitting]
        )
        best = [choice.best] if choice.best else []
        self.best.set_data(
            [row.bits_per_weight for row in best], [max(row.kl.value, LEAST) for row in best]
        )
        left = min(max(choice.most_bits, 1.9), 36)
        self.wall.set_bounds(left, 0, 36 - left, 1)
        self.full.set_x(left * 1.03)
        self.full.set_visible(left < 24)  # else there is no room for it
        self.wish.set_data([1.9, 36], [view.most_kl] * 2)
        self.name.set_text(choice.best.name if choice.best else "none of these")
