"""The figure of an explorer: the axes are drawn once, and only what moves is drawn again.

Drawing axes, ticks and labels takes most of matplotlib's time (some 100 ms for three panels). So
the background is drawn once and kept; a new picture is that background, the few artists that
moved, and a PNG with light compression.

    class BarsFigure(LiveFigure):
        def __init__(self):
            super().__init__(width=10, height=3.5)          # self.figure, self.axes
            with style():
                self.axes.set(xlim=(-8.5, 7.5), ylim=(0, 1), xlabel="code", ylabel="share")
                self.bars = self.axes.stairs(np.zeros(16), np.arange(17) - 8.5, fill=True)
                self.animate(self.bars)                     # everything that moves

        def update(self, view):                             # view: what the explorer computed
            self.bars.set_data(view.shares)

Limits, ticks and labels stay as they are, unless `update` changes them and calls `self.redraw()`
(slow: the axes are drawn again). `if self.changed(view.limits):` says when that is due.
"""

import io

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image

from chapter13.plots.picture import COLORS, new_figure, style


class LiveFigure:
    """Axes drawn once, animated artists on top. Subclasses add artists and write `update(view)`."""

    def __init__(self, width=10, height=4, rows=1, cols=1, **subplots):
        with style():
            self.figure, self.axes = new_figure(width, height, rows, cols, **subplots)
            self._note = self.figure.text(
                0.5,
                0.5,
                "These settings do not apply: see below.\nThe picture shows the last that did.",
                ha="center",
                va="center",
                fontsize=18,
                weight="bold",
                animated=True,
                bbox={"facecolor": "white", "edgecolor": COLORS["highlight"], "lw": 2, "pad": 12},
            )
        self.canvas = FigureCanvasAgg(self.figure)
        self._artists = []
        self._background = None
        self._drawn_for = None

    def animate(self, *artists):
        """Name the artists that `update` moves; they are drawn in this order, above the axes."""
        for artist in artists:
            artist.set_animated(True)
            self._artists.append(artist)

    def changed(self, what):
        """True when `what` differs from that of the last call: another layer, other limits.

        what: what limits and ticks are made of, compared with `!=`. `update` sets them anew, and
        calls `redraw`, where this is true.
        """
        differs = what != self._drawn_for
        self._drawn_for = what
        return differs

    def redraw(self):
        """Draw the axes again with the next picture: limits, ticks or labels have changed."""
        self.figure.set_layout_engine("constrained")  # new labels may need more room
        self._background = None

    def update(self, view):
        """Move the artists to what `view` holds."""
        raise NotImplementedError

    def _draw(self, stale):
        if self._background is None:
            self.canvas.draw()
            self.figure.set_layout_engine("none")  # the axes stay where they are
            self._background = self.canvas.copy_from_bbox(self.figure.bbox)
        self.canvas.restore_region(self._background)
        renderer = self.canvas.get_renderer()
        for artist in self._artists:
            artist.draw(renderer)
        if stale:
            faded = np.asarray(self.canvas.buffer_rgba())
            faded[:] = 255 - (255 - faded) // 3
            faded[..., 3] = 255
            self._note.draw(renderer)
        return self.canvas.buffer_rgba()

    def pixels(self, stale=False):
        """The picture now: uint8 (height, width, 3). `stale`: faded, and marked in words."""
        return np.asarray(self._draw(stale))[:, :, :3].copy()

    def png(self, stale=False):
        """The picture now as PNG bytes, quickly made and therefore not small."""
        file = io.BytesIO()
        size = self.canvas.get_width_height()
        image = Image.frombuffer("RGBA", size, self._draw(stale), "raw", "RGBA", 0, 1)
        image.convert("RGB").save(file, "png", compress_level=1)
        return file.getvalue()
