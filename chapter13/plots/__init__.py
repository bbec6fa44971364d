"""Pictures of quantized weights: pure functions from data to a `Picture`, one file a notebook.

    from chapter13.plots import Picture, method_fill, new_figure, style

    def levels(codes):
        with style():                                   # the course's look, and only inside here
            figure, ax = new_figure(width=10, height=3.5)
            ax.bar(*np.unique(codes, return_counts=True), **method_fill("absmax"))
            ax.set(xlabel="code", ylabel="weights")
            return Picture(figure, alt="Bars: how many weights have each of the 16 codes.")

`METHOD_LOOK` says how each method is named and drawn; `method_fill` and `method_line` give its
artists their look and mark them. COLORS are those of roles: the original weights, an error.
A function that ends a notebook cell with such a picture shows it with its alternative text.
`live.LiveFigure` is the figure of an explorer, whose artists move without drawing the axes again.
"""

from chapter13.plots.live import LiveFigure
from chapter13.plots.picture import (
    COLORS,
    METHOD_LOOK,
    Picture,
    method_fill,
    method_line,
    new_figure,
    style,
)

__all__ = [
    "COLORS",
    "METHOD_LOOK",
    "LiveFigure",
    "Picture",
    "method_fill",
    "method_line",
    "new_figure",
    "style",
]
