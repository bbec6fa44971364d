"""Where the bytes of a model are, as one bar for each of its versions."""

from chapter13.plots.picture import COLORS, Picture, new_figure, style

PARTS = {  # part of memory.memory_breakdown -> its color
    "linears": COLORS["int8"],
    "scales": COLORS["error"],
    "embeddings": COLORS["original"],
    "rest": COLORS["text"],
}


def parts_picture(breakdowns: dict[str, dict[str, int]]) -> Picture:
    """Bars of MB, stacked by part. `breakdowns`: name -> what `memory.memory_breakdown` returns."""
    with style():
        figure, ax = new_figure(10, 1.4 + 0.7 * len(breakdowns))
        shown = [part for part in PARTS if any(parts[part] for parts in breakdowns.values())]
        for row, parts in enumerate(breakdowns.values()):
            left = 0.0
            for part in shown:
                width = parts[part] / 1e6
                label = part if row == 0 else None
                ax.barh(row, width, left=left, color=PARTS[part], height=0.6, label=label)
                left += width
            ax.text(left, row, f"  {left:.0f} MB", va="center", weight="bold")
        ax.set_yticks(range(len(breakdowns)), list(breakdowns))
        ax.invert_yaxis()
        ax.grid(visible=False, axis="y")
        ax.set(
            xlabel="MB", xlim=(0, 1.15 * max(sum(p.values()) for p in breakdowns.values()) / 1e6)
        )
        figure.legend(loc="outside upper center", ncols=len(PARTS))
    words = "; ".join(
        f"{name}: " + ", ".join(f"{part} {size / 1e6:.1f}" for part, size in parts.items())
        for name, parts in breakdowns.items()
    )
    return Picture(figure, f"Bars of a model's memory in MB, by part. {words}.")
