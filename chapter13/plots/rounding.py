"""The still pictures of notebook 01: rounding to a grid, the error it leaves, its size in dB."""

import numpy as np

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
from chapter13.plots.shapes import draw_rounding


def whole_grid(weights, scale, near=(-0.025, 0.065)):
    """Weights on an absmax grid of 8 bits: the whole grid above, the part `near` enlarged below.

    weights: (n,); scale: the step of the grid, in the weights' unit. Arrows in the lower picture
    lead from each weight to its level.
    """
    weights, scale = np.asarray(weights, float), float(scale)
    levels = np.arange(-127, 128) * scale
    shown = weights[(weights > near[0]) & (weights < near[1])]
    inside = levels[(levels > near[0]) & (levels < near[1])]
    color = METHOD_LOOK["absmax"].color
    with style():
        figure, (whole, part) = new_figure(width=10, height=4, rows=2)
        draw_rounding(whole, weights, levels, [], method_fill("absmax") | {"linewidth": 0.7})
        draw_rounding(part, shown, inside, np.round(shown / scale) * scale, method_fill("absmax"))
        whole.axvspan(*near, color=COLORS["grid"])
        whole.set(xlim=(-130 * scale, 130 * scale))
        whole.set_title(f"{len(weights)} weights above a grid of {len(levels)} levels")
        for level in inside:
            code = f"code {round(level / scale)}".replace("-", "−")
            part.text(level, -0.08, code, ha="center", va="top", fontsize=12, color=color)
        for weight in shown:
            part.text(weight, 1.12, f"{weight:.4g}".replace("-", "−"), ha="center")
        part.set(xlim=near, xlabel="weight")
        part.set_title("The gray strip, enlarged: each weight goes to the nearest level")
        return Picture(
            figure,
            alt=f"Above: {len(weights)} weights (black) and the {len(levels)} levels of the grid "
            f"(blue), {scale:.2g} apart. Below: the gray strip enlarged; arrows lead from "
            f"{len(shown)} weights to their nearest levels.",
        )


def error_histogram(errors, scale):
    """How the rounding errors lie inside one step of the grid.

    errors: any shape, in the unit of `scale`. The dashed line is what errors spread uniformly over
    the step would give.
    """
    steps = np.ravel(np.asarray(errors, float)) / float(scale)
    bins = 40
    counts, edges = np.histogram(steps, bins, (-0.5, 0.5))
    with style():
        figure, ax = new_figure(width=10, height=3.2)
        ax.stairs(counts, edges, fill=True, color=COLORS["error"], alpha=0.85, label="measured")
        flat = steps.size / bins
        ax.axhline(flat, color=COLORS["text"], linestyle="--", label="uniform")
        ax.set(xlim=(-0.6, 0.6), ylim=(0, 1.45 * counts.max()))
        ax.set(xlabel="error, in steps of the grid", ylabel="weights")
        ax.legend(loc="upper right", ncols=2)
        return Picture(
            figure,
            alt="The errors (orange) fill one step of the grid, from −1/2 to +1/2, evenly: each of "
            f"{bins} bars lies within {np.abs(counts / flat - 1).max():.0%} of their mean.",
        )


def sqnr_over_bits(bits, measured, expected):
    """Measured SQNR and the one that scale²/12 predicts, in dB, over bits per weight; (n,) each."""
    bits, measured, expected = (np.asarray(values, float) for values in (bits, measured, expected))
    with style():
        figure, ax = new_figure(width=10, height=3.6)
        ax.plot(bits, expected, "--", color=COLORS["text"], label="expected from scale² / 12")
        look = method_line("absmax") | {"linestyle": "", "ms": 10}
        ax.plot(bits, measured, label="measured", **look)
        for x, y in zip(bits, measured, strict=True):
            ax.annotate(f"{y:.1f}", (x, y), (-7, 7), textcoords="offset points", ha="right")
        ax.set(xlabel="bits per weight", ylabel="SQNR (dB)", xticks=bits)
        ax.set(xlim=(bits[0] - 0.5, bits[-1] + 0.3), ylim=(min(-5, expected.min() - 2), 46))
        ax.legend(loc="upper left")
        last, off = measured[-1] - measured[-2], np.abs(measured - expected)[1:].max()
        return Picture(
            figure,
            alt=f"SQNR rises with the bits, from {measured[0]:.1f} dB at {bits[0]:.0f} bits to "
            f"{measured[-1]:.1f} dB at {bits[-1]:.0f}; the last bit adds {last:.1f} dB. From "
            f"{bits[1]:.0f} bits on the points lie within {off:.2f} dB of the expected line.",
        )


def layers_sqnr(crest, sqnr, marked):
    """SQNR of many layers over their crest factor.

    crest: name -> max|w| / root mean square; sqnr: name -> dB at 8 bits; marked: name -> label, the
    layers to point at. The dashed line is what scale²/12 predicts for 8 bits.
    """
    names = list(crest)
    xs, ys = np.array([crest[name] for name in names]), np.array([sqnr[name] for name in names])
    with style():
        figure, ax = new_figure(width=10, height=4)
        line = np.geomspace(xs.min() * 0.93, xs.max() * 1.08, 50)
        expected = 10 * np.log10(12 * 127**2 / line**2)
        ax.plot(line, expected, "--", color=COLORS["text"], label="expected from scale² / 12")
        look = method_line("absmax") | {"linestyle": "", "alpha": 0.6}
        ax.plot(xs, ys, label=f"{len(names)} linear layers", **look)
        for name, label in marked.items():
            x, y = crest[name], sqnr[name]
            right = x < np.sqrt(xs.min() * xs.max())
            ax.plot(x, y, "o", color=COLORS["highlight"], markersize=11)
            ax.annotate(
                label,
                (x, y),
                (12, 8) if right else (-14, -16),
                textcoords="offset points",
                ha="left" if right else "right",
                color=COLORS["highlight"],
                weight="bold",
            )
        ax.set_xscale("log", base=2)
        set_ticks(ax.xaxis, [4, 8, 16, 32, 64])
        ax.set(xlabel="crest factor: largest weight / root mean square", ylabel="SQNR (dB)")
        ax.set_ylim(ys.min() - 4, ys.max() + 3)
        ax.legend(loc="upper right")
        off = np.abs(10 * np.log10(12 * 127**2 / xs**2) - ys).max()
        return Picture(
            figure,
            alt=f"The SQNR of {len(names)} layers at 8 bits falls from {ys.max():.1f} to "
            f"{ys.min():.1f} dB as the largest weight grows from {xs.min():.1f} to "
            f"{xs.max():.1f} times the root mean square; all lie within {off:.2f} dB of the "
            "expected line.",
        )
