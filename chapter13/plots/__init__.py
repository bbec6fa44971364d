"""Pictures of quantized weights: pure functions from data to a `Picture`, one file a notebook.

    from chapter13.plots import COLORS, Picture, new_figure, style

    def levels(codes):
        with style():                                   # the course's look, and only inside here
            figure, ax = new_figure(width=10, height=3.5)
            ax.bar(*np.unique(codes, return_counts=True), color=COLORS["int4"])
            ax.set(xlabel="code", ylabel="weights")
            return Picture(figure, alt="Bars: how many weights have each of the 16 codes.")

A function that ends a notebook cell with such a picture shows it with its alternative text.
`live.LiveFigure` is the figure of an explorer, whose artists move without drawing the axes again.
"""

from chapter13.plots.live import LiveFigure
from chapter13.plots.picture import COLORS, Picture, new_figure, style

__all__ = ["COLORS", "LiveFigure", "Picture", "new_figure", "style"]
