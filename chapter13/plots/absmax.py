"""The picture of notebook 01's explorer: an absmax grid over the weights, and the error it leaves.

Left, in gray, where the weights lie; on it a line for each level that is in use, as high as its
share of the weights. Right, the errors, on the same scale as the weights: an error histogram as
wide as the gray one means that nothing is left of most weights.
All heights are relative to the highest of their kind, so that only the shape counts.
"""

import numpy as np
from matplotlib.collections import LineCollection

from chapter13.plots.live import LiveFigure
from chapter13.plots.picture import COLORS, method_fill, style


class AbsmaxFigure(LiveFigure):
    """Shows an `explorers.absmax.View`."""

    def __init__(self):
        super().__init__(width=10, height=3.8, cols=2, width_ratios=[3, 2])
        grid, error = self.axes
        with style():
            grid.set(ylim=(0, 1.18), xlabel="weight", ylabel="count (highest = 1)")
            error.set(ylim=(0, 1.18), xlabel="error: weight − level")
            for ax in self.axes:
                ax.set_yticks([0, 0.5, 1])
                ax.locator_params(axis="x", nbins=6)  # more would touch in the narrow one
                ax.set_title(" ")  # room for the titles that change
            no_data = np.zeros(1), np.arange(2)
            gray = {"fill": True, "color": COLORS["original"], "alpha": 0.55}
            self._weights = grid.stairs(*no_data, label="weights", **gray)
            self._levels = LineCollection(
                [], capstyle="butt", label="levels in use", **method_fill("absmax")
            )
            grid.add_collection(self._levels, autolim=False)
            self._behind = error.stairs(*no_data, label="weights", **gray)
            self._error = error.stairs(
                *no_data, fill=True, color=COLORS["error"], alpha=0.85, label="errors"
            )
            # a legend needs its artists to look as they will
            for ax in self.axes:
                legend = ax.legend(loc="upper right", borderaxespad=0)
                for line in legend.get_lines():
                    line.set_linewidth(3)
            self._title = grid.set_title("")
            self._error_title = error.set_title("")
            self._outlier = grid.text(
                0.5,
                0.5,
                "",
                transform=grid.transAxes,
                color=COLORS["highlight"],
                fontsize=13,
                weight="bold",
            )
            self.animate(self._weights, self._levels, self._behind, self._error)
            self.animate(self._title, self._error_title, self._outlier)

    def update(self, view):
        if self.changed(view.limit):  # another layer
            for ax in self.axes:
                ax.set_xlim(-view.limit, view.limit)
            self.redraw()
        self._weights.set_data(view.weight_counts / view.weight_counts.max(), view.edges)
        self._behind.set_data(view.weight_counts / view.weight_counts.max(), view.edges)
        self._error.set_data(view.error_counts / view.error_counts.max(), view.edges)
        heights = view.level_counts / view.level_counts.max()
        self._levels.set_segments(
            [((x, 0), (x, y)) for x, y in zip(view.levels, heights, strict=True)]
        )
        # in points: the axes are some 380 wide; the line takes 60% of the gap between two levels
        gap = 380 * view.scale / (2 * view.limit)
        self._levels.set_linewidth(np.clip(0.6 * gap, 0.8, 7))
        used, levels = len(view.levels), 2**view.bits - 1
        self._title.set_text(f"{view.bits} bits: {used} of {levels} levels in use")
        self._error_title.set_text(f"{view.zeros:.1%} of the weights become 0")
        self._point_at(view.largest if abs(view.largest) > view.limit else None)

    def _point_at(self, outlier):
        """Words at the side where the largest weight lies, outside the picture; none for None."""
        if outlier is None:
            self._outlier.set_text("")
            return
        number = f"{float(f'{outlier:.3g}'):,g}"  # 2,190 rather than 2.19e+03
        if outlier > 0:
            self._outlier.set(text=f"largest weight: {number} →", x=0.995, ha="right")
        else:
            self._outlier.set(text=f"← largest weight: {number}", x=0.005, ha="left")
