"""A finished picture with its alternative text, and the look that all pictures share.

Figures are made without pyplot: nothing here changes the settings or the current figure of a
student's own plots, and nothing has to be closed.
"""

import base64
import html
import io
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import matplotlib.style
import numpy as np
from IPython.display import display
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator
from PIL import Image

from chapter13.atomic import replacing

DPI = 100  # a figure 10 inches wide fills a notebook's column: 1000 pixels, 12 pt text 17 pixels

# What a colour says wherever it occurs. Vermilion, gray and black belong to roles alone: no method
# has them, except that a cast of the weights is drawn like the weights.
COLORS = {
    "original": "#999999",  # the weights before quantization
    "error": "#D55E00",
    "highlight": "#D55E00",  # the one thing to look at
    "text": "#222222",
    "grid": "#D9D9D9",
}

# Layers, texts, models: curves beside each other that are no methods. No method has these colours.
SERIES = ("#AA4499", "#44AA99", "#661100", "#CCBB44")


@dataclass(frozen=True)
class Look:
    """How a method is named and drawn in all pictures: a label, a colour, a matplotlib marker."""

    label: str
    color: str
    marker: str


# Blue for integers, green and olive for code books, orange and pink for what learns from text, wine
# for llama.cpp's formats, indigo for quantized activations. The hues are those of Okabe and Ito
# (https://jfly.uni-koeln.de/color/) and of Paul Tol (https://sronpersonalpages.nl/~pault/), which
# colour-blind readers tell apart; methods that share a hue have markers of their own. A name for a
# family, or another name of the same thing, looks like what it stands for: they never meet.
METHOD_LOOK = {
    "absmax": Look("absmax", "#0072B2", "o"),
    "affine": Look("affine", "#56B4E9", "D"),
    "nearest": Look("round to nearest", "#56B4E9", "D"),  # affine, beside what learns
    "nf4": Look("NF4", "#009E73", "^"),
    "fp4": Look("bitsandbytes FP4", "#999933", "v"),
    "e2m1": Look("E2M1", "#999933", "s"),
    "gptq": Look("GPTQ", "#E69F00", "s"),
    "gptq_clip": Look("GPTQ, clip search", "#E69F00", "*"),
    "awq": Look("AWQ", "#CC79A7", "P"),
    "GGUF": Look("GGUF", "#882255", "X"),
    "Q4_0": Look("Q4_0", "#882255", "X"),
    "Q4_1": Look("Q4_1", "#882255", "<"),
    "Q4_K": Look("Q4_K", "#882255", ">"),
    "Q8_0": Look("Q8_0", "#882255", "p"),
    "MXFP4": Look("MXFP4", "#882255", "H"),
    "activations": Look("INT8 activations", "#332288", "D"),
    "per_tensor": Look("per tensor", "#332288", "o"),
    "static": Look("static", "#332288", "s"),
    "per_token": Look("per token", "#332288", "D"),
    "smoothquant": Look("SmoothQuant", "#332288", "^"),
    "llm_int8": Look("LLM.int8()", "#332288", "P"),
    "libraries": Look("libraries", "#8C6D31", "|"),
    "cast": Look("cast", COLORS["original"], "s"),
    # number formats
    "fp32": Look("fp32", COLORS["original"], "s"),
    "fp16": Look("fp16", "#117733", "D"),
    "bf16": Look("bf16", "#DDAA33", "d"),
    "int8": Look("int8", "#0072B2", "o"),
    "int4": Look("int4", "#003A66", "^"),
}


def method_fill(method):
    """Keywords for the artist of a method that has no marker: `color`, and the `gid` that marks it.

    method: a key of METHOD_LOOK. tests/plots/test_looks.py finds a method's artists by their gid
    "method:..." and compares colours and markers with the table.
    """
    return {"color": METHOD_LOOK[method].color, "gid": f"method:{method}"}


def method_line(method, variant=False):
    """Keywords for the line of a method: its `marker` too; a second `variant` is dashed, hollow."""
    keywords = method_fill(method) | {"marker": METHOD_LOOK[method].marker}
    if variant:
        keywords |= {"linestyle": "--", "markerfacecolor": "white", "markeredgewidth": 2}
    return keywords


def method_named(label):
    """The key of the method whose label this is, before a comma or a "+", or None.

    >>> method_named("NF4, double quantization"), method_named("layer 3")
    ('nf4', None)
    """
    keys = {look.label: key for key, look in METHOD_LOOK.items()}
    named = [words for words in keys if f"{label},".startswith((f"{words},", f"{words} +"))]
    return keys[max(named, key=len)] if named else None


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


def set_ticks(axis, places, form="{:g}"):
    """Ticks at these places alone, written in this form: on logarithmic axes round numbers.

    axis: `ax.xaxis` or `ax.yaxis`. Those beyond the axis' limits are not drawn.
    """
    axis.set_major_locator(FixedLocator(places))
    axis.set_major_formatter(FuncFormatter(lambda value, _: form.format(value)))
    axis.set_minor_locator(NullLocator())


def pixels(figure):
    """The figure drawn once: uint8 (height, width, 3)."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[:, :, :3].copy()


def small_png(image):
    """uint8 (height, width, 3) pixels -> PNG bytes with a palette of 64 colors."""
    file = io.BytesIO()
    palette = Image.fromarray(image).quantize(64, dither=Image.Dither.NONE)
    palette.save(file, "png", optimize=True)
    return file.getvalue()


def png_bundle(png, alt, width):
    """(data, metadata) of a notebook output: the PNG and its alternative text."""
    data = {"image/png": base64.b64encode(png).decode("ascii"), "text/plain": alt}
    return data, {"image/png": {"alt": alt, "width": width}}


_INK = "var(--jp-ui-font-color1, #333)"  # JupyterLab's own, dark or light


def caption(alt, width):
    """A picture's alternative text as an output, to be shown below it.

    JupyterLab 4.6 and nbconvert 7.17 drop the `alt` in an image's metadata, so the text is shown
    where everybody can read it. They are compared when notebooks are tested.
    """
    look = f"max-width: {width}px; margin: 0; font-size: 14px; color: {_INK}"
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
