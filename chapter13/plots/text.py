"""Two texts side by side: what a model wrote before and after, and from where on they part."""

import textwrap

from chapter13.plots.live import LiveFigure
from chapter13.plots.picture import COLORS, style

WIDTH = 44  # characters a line
LINES = 9
FONT_SIZE = 13


def printable(text: str) -> str:
    """The text with one visible character for each that the picture's font may not have."""
    return "".join(
        char if " " <= char <= "~" or char in "–—‘’“”…éèüöä" else " " if char.isspace() else "□"
        for char in text
    )


def wrapped(text: str, same: int) -> list[tuple[str, str]]:
    """Lines of WIDTH characters; each as (the part that agrees, the part that does not).

    `same`: how many characters of the text agree with the other one. Both parts are padded to
    their places with spaces, so that one drawn over the other makes the line.
    """
    marked = textwrap.TextWrapper(width=WIDTH, drop_whitespace=False, replace_whitespace=False)
    lines, start = [], 0
    for line in marked.wrap(printable(text))[:LINES]:
        split = min(max(same - start, 0), len(line))
        lines.append((line[:split], " " * split + line[split:]))
        start += len(line)
    return lines


class TextFigure(LiveFigure):
    """Shows an `explorers.text.View`: left the full-precision model's text, right the other's."""

    def __init__(self):
        super().__init__(width=10, height=3.3, cols=2)
        self._same, self._other = [], []
        with style():
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
        self._title.set_text(f"{view.title}: the same for {view.agree} of {view.count} tokens")
        both = (wrapped(view.reference, len(view.reference)), wrapped(view.text, view.same))
        for column, lines in enumerate(both):
            lines = lines + [("", "")] * (LINES - len(lines))
            for line, (same, other) in enumerate(lines):
                self._same[column * LINES + line].set_text(same)
                self._other[column * LINES + line].set_text(other)
