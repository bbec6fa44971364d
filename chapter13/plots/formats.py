"""The pictures of notebook 00: parameters, bits, spacings, casts, sizes, and what fits."""

import numpy as np
import torch
from matplotlib.patches import Patch, Rectangle
from matplotlib.transforms import ScaledTranslation

from chapter13.plots.live import LiveFigure
from chapter13.plots.picture import (
    COLORS,
    SERIES,
    Picture,
    method_fill,
    method_line,
    new_figure,
    set_ticks,
    style,
)
from chapter13.plots.shapes import draw_dot_rows, draw_level_rows, part_fill, stacked_bars

PART_NAMES = {
    "codes": "weights of the layers",
    "scales": "their scales",
    "kept": "embeddings, head, norms",
}
# black digits on them
FIELDS = {"sign": "#E6A07C", "exponent": "#F5D58C", "mantissa": "#A8D8F0"}


def parameter_shares(models: dict[str, dict[str, int]]) -> Picture:
    """What share of each model's parameters each part has; models: name -> {part: parameters}.

    The norms are too few to be drawn; the alternative text says how many.
    """
    rows, said, norms = {}, [], 0.0
    for name, parts in models.items():
        total = sum(parts.values())
        shares = {part: 100 * count / total for part, count in parts.items()}
        norms = max(norms, shares.pop("norms"))
        rows[name] = shares
        said.append(f"{shares['embeddings'] + shares['head']:.0f}% of {name}")
    alt = "The share of each part in the parameters. Embeddings and head make up "
    alt += f"{', '.join(said)}. The norms, at most {norms:.2f}%, are not drawn."
    return stacked_bars(rows, "share of all parameters (%)", alt, inside="{:.1f}%", xlim=(0, 100))


def spacing(curves: dict[str, tuple[np.ndarray, np.ndarray]]) -> Picture:
    """The gap from a number to the next larger one; curves: format -> (magnitudes, gaps).

    Marked are the end of a format that ends before the others, its subnormals (where the gap is
    the same for numbers that differ by more than a factor of 4), and, between 1 and 2, bf16's gap
    over fp16's.
    """
    end = max(magnitudes[-1] for magnitudes, _ in curves.values())
    said = [
        "The gap to the next number against the number itself, both on log axes. It doubles "
        "whenever the number doubles, in steps, but not among the subnormals."
    ]
    bold = {"weight": "bold", "fontsize": 12}
    with style():
        figure, ax = new_figure(width=10, height=4.4)
        for name, (magnitudes, gaps) in curves.items():
            ax.loglog(magnitudes, gaps, label=name, lw=2.5, **method_fill(name))
            if magnitudes[-1] < end / 2:
                bar = {"color": COLORS["text"], "ms": 24, "mew": 3, "zorder": 3}
                ax.plot(magnitudes[-1], gaps[-1], "|", **bar)
                place = (magnitudes[-1], gaps[-1] / 20)
                ax.text(*place, f"the end of {name}", ha="center", va="top", **bold)
                said.append(f"The vertical bar marks the largest {name} number.")
            flat = magnitudes[gaps == gaps[0]]
            if flat[-1] > 4 * flat[0]:
                middle = np.sqrt(flat[0] * flat[-1])
                ax.text(middle, gaps[0] * 2, f"subnormals of {name}", ha="right", **bold)
                said.append(f"The subnormals of {name} lie up to {flat[-1]:.1g}.")
        if {"fp16", "bf16"} <= curves.keys():
            short, long = (np.interp(1.5, *curves[name]) for name in ("fp16", "bf16"))
            words, line = f"× {long / short:.0f}", {"arrowstyle": "-", "lw": 1.5}
            middle = (1.5, np.sqrt(short * long))
            ax.annotate(words, middle, (5, short / 30), arrowprops=line, **bold)
            said.append(f"From 1 to 2 the gap of bf16 is {long / short:.0f} times that of fp16.")
        ax.set(xlabel="magnitude of the number", ylabel="gap to the next number")
        ax.legend(loc="upper left")
    return Picture(figure, " ".join(said))


def cast_errors(weight: torch.Tensor, casts: dict[str, torch.Tensor]) -> Picture:
    """Histograms of the relative errors of casts, with half of each format's epsilon as a line.

    casts: format -> the weight in that format. Weights that come out exact are left out.
    """
    edges = np.logspace(-5, -2, 91)
    medians = []
    with style():
        figure, ax = new_figure(width=10, height=3.8)
        for name, cast in casts.items():
            errors = _relative_errors(weight, cast)
            share = np.histogram(errors, edges)[0] / len(errors)
            look, bound = method_fill(name), torch.finfo(cast.dtype).eps / 2
            ax.stairs(100 * share, edges, fill=True, alpha=0.6, label=name, **look)
            ax.axvline(bound, ls="--", lw=2, **look)
            place = {"transform": ax.get_xaxis_transform(), "va": "top"}
            ax.text(bound * 1.08, 1, f"$2^{{{round(np.log2(bound))}}}$", **place)
            medians.append(f"{np.median(errors[errors > 0]):.1e} for {name}")
        ax.set(xscale="log", xlim=(edges[0], edges[-1]), xlabel="relative error of a weight")
        ax.set(ylabel="weights (%)")
        ax.legend(loc="upper left")
    alt = (
        "Histograms of the relative error that a cast leaves, on a log axis; the dashed lines are "
    )
    return Picture(figure, f"{alt} half of each epsilon. The median is {', '.join(medians)}.")


def _relative_errors(weight: torch.Tensor, approximation: torch.Tensor) -> np.ndarray:
    """|approximation - weight| / |weight| of all weights that are not zero, flat."""
    weight, approximation = weight.double().flatten(), approximation.double().flatten()
    some = weight != 0
    return ((approximation - weight)[some] / weight[some]).abs().numpy()


def held_values(lines: dict[str, np.ndarray]) -> Picture:
    """The values a format can hold, a tick each; lines: label -> values."""
    look = {"color": COLORS["text"], "lw": 0.9}
    with style():
        figure, ax = new_figure(width=10, height=0.9 + 0.9 * len(lines))
        draw_level_rows(ax, lines, dict.fromkeys(lines, look))
        ax.set_xlabel("value")
    counts = ", ".join(f"{name}: {len(values)} values" for name, values in lines.items())
    alt = f"Every value between the ends, a tick each ({counts}). "
    return Picture(figure, alt + "The integer grid is even; the other is dense around zero.")


def relative_steps(weight: torch.Tensor, approximations: dict[str, torch.Tensor]) -> Picture:
    """The root mean square relative error of the weights by their magnitude.

    approximations: format -> the weight as that format holds it. Below, how many weights there are.
    """
    sizes = weight[weight != 0].abs().double().numpy()
    edges = np.logspace(np.log10(sizes.max()) - 4, np.log10(sizes.max() * 1.000001), 21)
    middles = np.sqrt(edges[1:] * edges[:-1])
    counts = np.histogram(sizes, edges)[0]
    with style():
        figure, (ax, below) = new_figure(
            width=10, height=4.3, rows=2, sharex=True, height_ratios=[3, 1]
        )
        for name, approximation in approximations.items():
            squares = _relative_errors(weight, approximation) ** 2
            sums = np.histogram(sizes, edges, weights=squares)[0]
            error = np.sqrt(sums / np.maximum(counts, 1))
            error[error == 0] = np.nan  # no error at all: no point on a log axis
            ax.loglog(middles, error, label=name, ms=6, **method_line(name))
        ax.axhline(1, color=COLORS["text"], lw=1.2, ls=":")
        ax.set(ylabel="relative error (RMS)", ylim=(3e-5, 3))
        ax.legend(loc="center left", bbox_to_anchor=(1, 0.5))
        shares = 100 * counts / counts.sum()
        below.stairs(shares, edges, fill=True, color=COLORS["original"])
        below.set(xlabel="magnitude of the weight", ylabel="weights (%)")
    lost = (approximations["int8"][weight != 0] == 0).double().mean().item()
    alt = (
        "The relative error of the weights by their magnitude, on log axes; below, how many "
        "weights there are. fp16 and bf16 treat large and small alike; in int8, the smaller the "
        f"weight, the larger its error: {lost:.0%} of the weights end up on zero, an error of 100% "
        "(dotted)."
    )
    return Picture(figure, alt)


def bytes_left(rows: dict[str, dict[str, float]]) -> Picture:
    """The bytes of models in several formats, in percent of float32; rows: name -> {part: %}."""
    said = ", ".join(f"{name} {sum(parts.values()):.0f}%" for name, parts in rows.items())
    kept = list(rows.values())[-1]
    alt = (
        f"What is left of the bytes in fp32: {said}. In the last row, embeddings, head and norms "
        f"make up {kept['kept'] / sum(kept.values()):.0%} of it."
    )
    most = max(sum(parts.values()) for parts in rows.values())
    label = "bytes (% of the model in fp32)"
    return stacked_bars(rows, label, alt, PART_NAMES, inside="{:.0f}%", xlim=(0, 1.01 * most))


def kv_cache(tokens: list[int], caches: dict[str, list[float]]) -> Picture:
    """GB of keys and values against the length of the text; caches: model -> GB for `tokens`."""
    with style():
        figure, ax = new_figure(width=10, height=3.9)
        for (name, gigabytes), color in zip(caches.items(), SERIES, strict=False):
            ax.loglog(tokens, gigabytes, color=color, marker="o", ms=6, label=name)
        ax.axhline(24, color=COLORS["text"], ls="--", lw=1.5)
        ax.text(tokens[0], 27, "all the memory of a 24 GB card", va="bottom", fontsize=12)
        ax.set(xlabel="tokens in the context", ylabel="KV cache (GB, 16 bits)")
        set_ticks(ax.xaxis, tokens)
        ax.set_xticklabels([f"{count // 1024}k" for count in tokens])
        set_ticks(ax.yaxis, [0.01, 0.1, 1, 10, 100, 1000])
        ax.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    last = ", ".join(f"{name} {gigabytes[-1]:.1f} GB" for name, gigabytes in caches.items())
    alt = f"The KV cache grows with the text; at {tokens[-1] // 1024}k tokens: {last}."
    return Picture(figure, alt)


def sizes_and_cards(sizes: dict[str, dict[str, float]], cards: dict[str, float]) -> Picture:
    """Each model in each format against memory; sizes: model -> {format: GB}; cards: name -> GB."""
    with style():
        figure, ax = new_figure(width=10, height=5.2)
        formats = next(iter(sizes.values()))
        looks = {format: method_line(format) | {"label": format} for format in formats}
        draw_dot_rows(ax, sizes, looks, spans=True)
        for memory in sorted(set(cards.values())):
            ax.axvline(memory, color=COLORS["text"], lw=1.2, ls="--", zorder=0)
            same = [name for name, most in cards.items() if most == memory]
            named = [name.removesuffix(", shared memory") for name in same]
            place = {"transform": ax.get_xaxis_transform(), "rotation": 40, "fontsize": 12}
            anchor = {"ha": "left", "va": "bottom", "rotation_mode": "anchor"}
            ax.text(memory, 1.02, f"{memory:g}: {'; '.join(named)}", **place, **anchor)
        ax.set(xscale="log", xlabel="GB of weights; dashed: GB of a card")
        set_ticks(ax.xaxis, [0.1, 0.3, 1, 3, 10, 30, 100, 300])
        ax.legend(loc="lower left", title="format")
    largest, row = list(sizes.items())[-1]
    alt = (
        "The weights of each model in each format, on a log axis; dashed lines mark the memory "
        f"of cards. {largest} goes from {row['fp32']:.0f} GB to {row['int4']:.0f} GB."
    )
    return Picture(figure, alt)


class BitsFigure(LiveFigure):
    """Shows an `explorers.formats.NumberView`: one number in fp32, fp16 and bf16, bit by bit."""

    def __init__(self):
        super().__init__(width=10, height=3.3)
        with style():
            ax = self.axes
            ax.set(xlim=(-0.2, 32.2), ylim=(0, 6.7))
            ax.text(0, 6.2, "One number in three formats", fontsize=14, weight="bold")
            ax.set_axis_off()
            self._places, self._heads = [], []
            for row, fields in enumerate([(1, 8, 23), (1, 5, 10), (1, 8, 7)]):
                bottom, left = 4.1 - 2 * row, 0
                for color, width in zip(FIELDS.values(), fields, strict=True):
                    box = Rectangle((left, bottom), width, 0.9, facecolor=color, edgecolor="black")
                    ax.add_patch(box)
                    left += width
                self._places += [(i + 0.5, bottom + 0.44) for i in range(sum(fields))]
                self._heads.append(ax.text(0, bottom + 1.1, "", fontsize=13, weight="bold"))
            # markers in the shape of digits are drawn four times as fast as texts
            like = {"linestyle": "", "ms": 11, "mew": 0, "color": "black"}
            self._digits = [ax.plot([], [], marker=f"$\\mathtt{{{d}}}$", **like)[0] for d in "01"]
            handles = [Patch(facecolor=c, edgecolor="black", label=n) for n, c in FIELDS.items()]
            ax.legend(handles=handles, loc="upper right", ncols=3, borderaxespad=0)
            self.animate(*self._heads, *self._digits)

    def update(self, view):
        for head, stored in zip(self._heads, view.stored, strict=True):
            head.set_text(f"{stored.format}: {stored.value:.9g}   ({stored.loss})")
        bits = np.array([int(bit) for stored in view.stored for bit in stored.bits])
        places = np.array(self._places)
        for digit, marks in enumerate(self._digits):
            marks.set_data(*places[bits == digit].T)


class MemoryFigure(LiveFigure):
    """Shows an `explorers.formats.MemoryView`: what a model takes, above the memory of cards.

    Beside a card that holds it: how many tokens per second it can write at most.
    """

    def __init__(self, cards: dict[str, float]):
        super().__init__(width=10, height=4.5)
        self._cards = cards
        with style():
            ax = self.axes
            top = len(cards) + 0.6
            labels = [f"{name}: {memory:g}" for name, memory in cards.items()]
            ax.set(
                yticks=[top, *range(len(cards) - 1, -1, -1)], yticklabels=["this model", *labels]
            )
            ax.set(xlabel="GB", ylim=(-0.6, top + 0.9))
            ax.grid(axis="y", visible=False)
            parts = ["codes", "scales", "kept", "KV cache"]
            self._parts = {
                part: ax.add_patch(Rectangle((0, top - 0.6), 0, 1.2, **part_fill(part)))
                for part in parts
            }
            self._memory = [
                ax.add_patch(Rectangle((0, y - 0.32), memory, 0.64))
                for y, memory in enumerate(reversed(cards.values()))
            ]
            handles = [Patch(label=PART_NAMES.get(part, part), **part_fill(part)) for part in parts]
            # a distance in points: one in widths of the axes would change with the layout
            away = ScaledTranslation(7 / 72, 0, self.figure.dpi_scale_trans)
            beside = {"transform": ax.get_yaxis_transform() + away, "va": "center"}
            ax.text(1, top, "tokens/s,\nat most", fontsize=12, **beside)
            # below the heading, which keeps their room: what they say does not move the axes
            beside["in_layout"] = False
            self._ceilings = [ax.text(1, y, "", **beside) for y in range(len(cards))]
            handles += [
                Patch(facecolor="#B9DDCF", edgecolor="#00634A", label="card holds it"),
                Patch(facecolor="white", edgecolor="#777777", label="too small"),
            ]
            title = {"title": "Which cards hold the model, and how fast can they write at most?"}
            bold = {"title_fontproperties": {"weight": "bold", "size": 14}}
            self.figure.legend(
                handles=handles, loc="outside upper center", ncols=3, **title, **bold
            )
            self._line = ax.axvline(0, color=COLORS["text"], lw=1.5, ls="--")
            self._total = ax.text(0, top, "", va="center", weight="bold")
            self.animate(*self._memory, self._line, *self._parts.values(), self._total)
            self.animate(*self._ceilings)

    def update(self, view):
        if self.changed(view.limit):
            self.axes.set_xlim(0, view.limit)
            self.redraw()
        left = 0
        for part, bar in self._parts.items():
            bar.set_x(left)
            bar.set_width(view.gigabytes[part])
            left += view.gigabytes[part]
        for bar, memory in zip(self._memory, reversed(self._cards.values()), strict=True):
            holds = memory >= view.total
            bar.set(facecolor="#B9DDCF" if holds else "white")
            bar.set(edgecolor="#00634A" if holds else "#777777")
        for words, card in zip(self._ceilings, reversed(self._cards), strict=True):
            most = view.ceilings.get(card)
            words.set_text("" if most is None else f"{float(f'{most:.3g}'):,g}")
        self._line.set_xdata([left, left])
        self._total.set_text(f" {view.total:.3g} GB")
        self._total.set_x(left)
