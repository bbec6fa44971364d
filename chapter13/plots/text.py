"""Two texts, one below the other: what a model wrote before and after, and where they diverge."""

from chapter13.plots.live import LiveFigure
from chapter13.plots.picture import COLORS, style

WIDTH = 86  # characters a line: so many fill the picture
LINES = 4
FONT_SIZE = 13


def printable(text: str) -> str:
    """The text with one visible character for each that the picture's font may not have."""
    return "".join(
        char if " " <= char <= "~" or char in "–—‘’“”…éèüöä" else " " if char.isspace() else "□"
        for char in text
    )


def wrapped(text: str, same: int) -> list[tuple[str, str]]:
    """Lines of at most WIDTH characters; each as (the part that agrees, the part that does not).

    `same`: how many characters of the text agree with the other one. Both parts are padded to
    their places with spaces, so that one drawn over the other makes the line. A line ends between
    two words; a word that is longer than a line is cut. After LINES lines comes an ellipsis.
    """
    shown, start = printable(text), 0
    lines = []
    while start < len(shown) and len(lines) < LINES:
        end = min(start + WIDTH, len(shown))
        if end < len(shown) and " " in shown[start : end + 1].strip():
            end = shown.rindex(" ", start, end + 1)
        line, split = shown[start:end], min(max(same - start, 0), end - start)
        lines.append((line[:split], " " * split + line[split:]))
        start = end
        while shown[start : start + 1] == " ":
            start += 1
    if start < len(shown):
        agreeing, other = lines[-1]
        lines[-1] = agreeing, other[: WIDTH - 1] + "…"
    return lines


class TextFigure(LiveFigure):
    """Shows an `explorers.text.View`: above the full-precision model's text, below the other's."""

    def __init__(self):
        super().__init__(width=10, height=2.9, rows=2)
        self._same, self._other = [], []
        with style():
            self.figure.suptitle("How does the text change?", x=0.004, ha="left", weight="bold")
            for ax, title in zip(self.axes, ("full precision", " "), strict=True):
                ax.set(xlim=(0, WIDTH), ylim=(LINES, 0), xticks=[], yticks=[])
                ax.grid(visible=False)
                ax.set_title(title, loc="left")
                for spine in ax.spines.values():
                    spine.set_visible(False)
            for ax in self.axes:
                for line in range(LINES):
                    place = (0, line + 0.5)
                    look = {"family": "DejaVu Sans Mono", "fontsize": FONT_SIZE, "va": "center"}
                    look["parse_math"] = False  # a dollar sign is a dollar sign
                    self._same.append(ax.text(*place, "", color=COLORS["text"], **look))
                    self._other.append(
                        ax.text(*place, "", color=COLORS["highlight"], weight="bold", **look)
                    )
            self._title = self.axes[1].set_title("", loc="left")
            self.animate(*self._same, *self._other, self._title)

    def update(self, view):
        self._title.set_text(
            f"{view.title}: {view.agree} of {view.count} tokens before the first difference"
        )
        both = (wrapped(view.reference, len(view.reference)), wrapped(view.text, view.same))
        for column, lines in enumerate(both):
            lines = lines + [("", "")] * (LINES - len(lines))
            for line, (same, other) in enumerate(lines):
                self._same[column * LINES + line].set_text(same)
                self._other[column * LINES + line].set_text(other)
