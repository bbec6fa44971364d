"""A finished picture with its alternative text, and the look that all pictures share.

Figures are made without pyplot: nothing here changes the settings or the current figure of a
student's own plots, and nothing has to be closed.
"""

import base64
import html
import io
from contextlib import contextmanager
from pathlib import Path

import matplotlib.style
import numpy as np
from IPython.display import display
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from chapter13.atomic import replacing

DPI = 100  # a figure 10 inches wide fills a notebook's column: 1000 pixels, 12 pt text 17 pixels

# Okabe and Ito's palette, told apart by colour-blind readers too (https://jfly.uni-koeln.de/color/).
# A role has one colour through the whole course.
COLORS = {
    "original": "#999999",  # the weights before quantization
    "int8": "#0072B2",
    "int4": "#E69F00",
    "nf4": "#009E73",
    "fp4": "#CC79A7",
    "affine": "#56B4E9",  # an asymmetric grid
    "fp16": "#56B4E9",  # these two stand beside neither affine nor FP4
    "bf16": "#CC79A7",
    "error": "#D55E00",
    "highlight": "#D55E00",  # the one thing to look at
    "text": "#222222",
    "grid": "#D9D9D9",
}

STYLE = {
    "font.family": "DejaVu Sans",  # comes with matplotlib: the same on every machine
    "font.size": 13,
    "axes.titlesize": 14,
    "axes.titleweight": "bold",
    "axes.labelsize": 13,
    "xtick.labelsize": 12,
    "ytick.labelsize": 12,
    "legend.fontsize": 12,
    "legend.frameon": False,
    "text.color": COLORS["text"],
    "axes.labelcolor": COLORS["text"],
    "axes.edgecolor": COLORS["text"],
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": COLORS["grid"],
    "grid.linewidth": 0.8,
    "lines.linewidth": 2.0,
    "figure.facecolor": "white",
    "figure.dpi": DPI,
    "savefig.facecolor": "white",
}


@contextmanager
def style():
    """The course's look inside a `with` block, whatever the student has set outside it."""
    with matplotlib.style.context(["default", STYLE]):
        yield


def new_figure(width=10, height=4, rows=1, cols=1, **subplots):
    """A figure of `width` x `height` inches and its axes, as `Figure.subplots` returns them.

    Call it inside `style()`. Labels find their own room (constrained layout). Other keywords go
    to `Figure.subplots`, for example `sharey=True` or `width_ratios=[2, 1]`.
    """
    figure = Figure(figsize=(width, height), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, cols, **subplots)


def pixels(figure):
    """The figure drawn once: uint8 (height, width, 3)."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[:, :, :3].copy()


def small_png(image):
    """uint8 (height, width, 3) pixels -> PNG bytes with a palette of 128 colors."""
    file = io.BytesIO()
    palette = Image.fromarray(image).quantize(128, dither=Image.Dither.NONE)
    palette.save(file, "png", optimize=True)
    return file.getvalue()


def png_bundle(png, alt, width):
    """(data, metadata) of a notebook output: the PNG and its alternative text."""
    data = {"image/png": base64.b64encode(png).decode("ascii"), "text/plain": alt}
    return data, {"image/png": {"alt": alt, "width": width}}


def caption(alt, width):
    """The output that holds a picture's words, to stand below it.

    JupyterLab 4.6 and nbconvert 7.17 drop the `alt` in an image's metadata, so the words stand
    where everybody can read them. They are compared when notebooks are tested.
    """
    look = f"max-width: {width}px; margin: 0; font-size: 14px; color: #555"
    return {"text/html": f'<p style="{look}">{html.escape(alt)}</p>', "text/plain": alt}


class Picture:
    """A picture as PNG bytes with alternative text: what a plotting function returns.

    figure: a matplotlib Figure, or uint8 pixels (height, width, 3); drawn at once, kept as PNG.
    alt: what the picture shows, in words, for those who do not see it. Computed numbers in it are
    welcome, rounded: the text is stored beside the picture and compared when notebooks are tested.

    Raises ValueError where the alternative text is empty.
    """

    def __init__(self, figure, alt):
        if not alt.strip():
            raise ValueError("a picture needs an alternative text that says what it shows")
        image = pixels(figure) if isinstance(figure, Figure) else np.asarray(figure, np.uint8)
        self.alt = " ".join(alt.split())
        self.height, self.width = image.shape[:2]
        self.png = small_png(image)

    def save(self, path):
        """Write the PNG to `path`, whole or not at all; returns the path."""
        with replacing(path) as part:
            part.write_bytes(self.png)
        return Path(path)

    def __repr__(self):
        return self.alt

    def _repr_mimebundle_(self, include=None, exclude=None):
        return png_bundle(self.png, self.alt, self.width)

    def _ipython_display_(self):
        """The picture, and below it the alternative text as its caption."""
        data, metadata = png_bundle(self.png, self.alt, self.width)
        display(data, metadata=metadata, raw=True)
        display(caption(self.alt, self.width), raw=True)
