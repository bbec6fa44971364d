"""Shapes that several notebooks' pictures have: stacked bars, rows of dots or of levels, curves.

Functions that return a Picture are called by notebooks; those that take axes draw one part of a
picture for the functions of the other files.
"""

import numpy as np
from matplotlib.patches import Patch

from chapter13.plots.picture import (
    COLORS,
    Picture,
    method_line,
    method_named,
    new_figure,
    style,
)

# A part of a model or of its bytes has one colour; light ones, for the black numbers on them (Paul
# Tol's "light" scheme).
PART_COLORS = {
    "embeddings": "#FFAABB",
    "attention": "#77AADD",
    "MLP": "#99DDFF",
    "norms": "#EE8866",
    "head": "#EEDD88",
    "linears": "#77AADD",
    "codes": "#77AADD",
    "scales": "#EE8866",
    "second level": "#EEDD88",
    "kept": "#FFAABB",
    "rest": "#BBBBBB",
    "KV cache": "#44BB99",
}


def part_fill(part):
    """Keywords for the bar of a part: its colour, and a `gid` that says that it shows a part."""
    return {"color": PART_COLORS[part], "gid": f"part:{part}"}


def stacked_bars(rows, xlabel, alt, names=None, inside=None, end=None, xlim=None):
    """One horizontal bar a row, its parts side by side: Picture.

    rows: label -> {part: amount}, parts named in PART_COLORS, amounts in the unit of `xlabel`.
    names: part -> what the legend calls it. inside, end: formats of the numbers on parts (where
    there is room) and behind the bars, as "{:.0f}%". xlim: (from, to), else from 0.
    """
    parts = list(dict.fromkeys(part for row in rows.values() for part in row))
    left, right = xlim or (0, 1.13 * max(sum(row.values()) for row in rows.values()))
    with style():
        figure, ax = new_figure(width=10, height=1.5 + 0.62 * len(rows))
        for y, row in enumerate(rows.values()):
            start = 0.0
            for part, amount in row.items():
                look = {"edgecolor": "white", "linewidth": 1} | part_fill(part)
                ax.barh(y, amount, 0.66, start, facecolor=look.pop("color"), **look)
                if inside and amount > 0.055 * (right - left):
                    middle = start + amount / 2
                    ax.text(middle, y, inside.format(amount), ha="center", va="center")
                start += amount
            if end:
                ax.text(start, y, " " + end.format(start), va="center", weight="bold")
        ax.set(xlabel=xlabel, xlim=(left, right), yticks=range(len(rows)), yticklabels=list(rows))
        ax.invert_yaxis()
        ax.grid(axis="y", visible=False)
        names = names or {}
        handles = [Patch(label=names.get(part, part), **part_fill(part)) for part in parts]
        figure.legend(handles=handles, loc="outside upper center", ncols=len(handles))
        return Picture(figure, alt)


def memory_bars(breakdowns):
    """Where the bytes of a model are, a bar for each of its versions: Picture.

    breakdowns: label -> {part: bytes}, as `memory.memory_breakdown` returns them; drawn in MB.
    """
    held = [
        part
        for part in next(iter(breakdowns.values()))
        if any(b[part] for b in breakdowns.values())
    ]
    rows = {
        label: {part: parts[part] / 1e6 for part in held} for label, parts in breakdowns.items()
    }
    told = "; ".join(
        f"{label}: " + ", ".join(f"{part} {size / 1e6:.1f}" for part, size in parts.items())
        for label, parts in breakdowns.items()
    )
    alt = f"Bars of a model's memory in MB, by part. {told}."
    return stacked_bars(rows, "MB", alt, end="{:.0f} MB")


def draw_dot_rows(ax, rows, looks, spans=False):
    """A row for each label, in it a dot for each series; on `ax`, the first row at the top.

    rows: label -> {series: value}. looks: series -> keywords of its line, without `linestyle`.
    spans: a gray bar from the smallest to the largest of a row.
    """
    for series, look in looks.items():
        places = [(row[series], y) for y, row in enumerate(rows.values()) if series in row]
        ax.plot(*zip(*places, strict=True), **{"ms": 11, "zorder": 3} | look | {"linestyle": ""})
    for y, row in enumerate(rows.values() if spans else ()):
        ends = [min(row.values()), max(row.values())]
        ax.plot(ends, [y, y], color=COLORS["grid"], lw=5, solid_capstyle="butt")
    ax.set_yticks(range(len(rows)), list(rows))
    ax.set_ylim(len(rows) - 0.5, -0.5)
    ax.grid(axis="y", visible=False)


def dots(rows, xlabel, log=False):
    """A row for each label with its value as a dot, and its interval where there is one: Picture.

    rows: label -> value or (value, low, high), in the unit of `xlabel`. A label that is a method's
    has its look. log: a logarithmic axis, else it begins at 0.
    """
    values = np.array([np.broadcast_to(row, 3) for row in rows.values()], float)
    with style():
        figure, ax = new_figure(10, 1.2 + 0.5 * len(rows))
        looks = {}
        for y, (label, (value, low, high)) in enumerate(zip(rows, values, strict=True)):
            method = method_named(label)
            looks[label] = (
                method_line(method) if method else {"color": COLORS["text"], "marker": "o"}
            )
            if high > low:
                bar = {name: word for name, word in looks[label].items() if name != "marker"}
                ax.hlines(y, low, high, lw=2.5, **bar)
            ax.annotate(f"{value:.2g}", (high, y), (10, 0), textcoords="offset points",
                        va="center", weight="bold")  # fmt: skip
        draw_dot_rows(
            ax, {label: {label: v[0]} for label, v in zip(rows, values, strict=True)}, looks
        )
        ax.set_xlabel(xlabel)
        ax.margins(x=0.12)
        if log:
            ax.set_xscale("log")
        else:
            ax.set_xlim(0, 1.12 * values.max())
        told = ", ".join(f"{label} {row[0]:.2g}" for label, row in zip(rows, values, strict=True))
        intervals = " with 95% intervals" if (values[:, 2] > values[:, 1]).any() else ""
        return Picture(figure, f"Dots{intervals}, {xlabel}: {told}.")


def draw_level_rows(ax, rows, looks):
    """A row for each label, in it a bar at each of its values; on `ax`, the first row at the top.

    rows: label -> values, in the unit of the axis. looks: label -> keywords of its bars.
    """
    for y, (label, values) in enumerate(rows.items()):
        ax.vlines(values, y - 0.3, y + 0.3, **looks[label])
    ax.set_yticks(range(len(rows)), list(rows))
    ax.set_ylim(len(rows) - 0.4, -0.6)
    ax.tick_params(axis="y", length=0)
    ax.grid(visible=False)


def draw_curves(ax, curves, **look):
    """Curves on `ax`: label -> (method, (n, 2) points). Dashed where the label says "double"."""
    for label, (method, points) in curves.items():
        keywords = method_line(method, variant="double" in label) | look
        ax.plot(*zip(*points, strict=True), label=label, **keywords)


def draw_rounding(ax, values, levels, landed, look):
    """Numbers as dots above the levels of a grid, an arrow from each to where it lands; on `ax`.

    values: (n,); levels: (m,); landed: (n,), or () for no arrows; all in the unit of the axis.
    look: keywords of the levels.
    """
    ax.vlines(levels, 0, 0.4, **{"linewidth": 4} | look)
    ax.plot(values, np.ones(len(values)), "o", color=COLORS["text"], ms=10)
    arrow = {"arrowstyle": "-|>", "color": COLORS["error"], "linewidth": 2}
    for value, level in zip(values, landed, strict=len(landed) > 0):
        ax.annotate("", (level, 0.42), (value, 0.93), arrowprops=arrow)
    ax.set(yticks=[], ylim=(-0.35, 1.35))
    ax.grid(False)
    ax.spines["left"].set_visible(False)
