"""What all explorers share: controls, one picture, one readout.

An explorer is three things, each of which can be read and tested alone:

1. a pure function from the settings to a view: a small object with the numbers to show, plus
   `.readout` (made by `lines`) and `.alt` (what the picture shows, in words). Where settings do
   not fit each other it raises ValueError; the panel shows the message;
2. a `LiveFigure` (in chapter13/plots) whose `update(view)` moves the artists;
3. a plain function that puts both behind controls:

    import ipywidgets as widgets
    from chapter13.explorers.base import Explorer, lines

    @dataclass(frozen=True)
    class View:
        counts: np.ndarray
        readout: str
        alt: str

    def compute(weight, bits, group_size):
        quantized = quantize_absmax(weight, bits, group_size)   # its ValueError says what to do
        error = mse(weight, quantized.dequantize())
        return View(
            counts=np.bincount(...),
            readout=lines(("mean squared error", f"{error:.2e}"), ("bits per weight", ...)),
            alt=f"Histogram of the weights at {bits} bits: mean squared error {error:.1e}.",
        )

    def explore_bits(weight):
        controls = {
            "bits": widgets.IntSlider(8, 2, 8, description="bits"),
            "group_size": GroupSizeSlider([None, "channel", 64, 32], None),  # from layers.py
        }
        return Explorer(controls, partial(compute, weight), BarsFigure())

    panel = explore_bits(weight)          # a cell that ends with `panel` shows it
    print(panel.at(bits=4, group_size=64).readout)    # of other settings; nothing moves
    print(panel.set(bits=4, group_size=64))       # moves the controls, returns the readout
    panel.snapshots([{"bits": 8}, {"bits": 3}])   # a static picture for those who only read,
    panel.table([{"bits": 8}, {"bits": 3}])       # and the readouts side by side

The names of the controls are the keyword arguments of the function. `panel.view` is the last view,
`panel.settings` the controls' values, `panel.readout` the text that is shown.

Dragging a slider piles up no work: ipywidgets sends the newest position only once the kernel has
dealt with the last one.
"""

import html
import textwrap

import ipywidgets as widgets
import numpy as np
from IPython.display import display
from traitlets import TraitError, Unicode

from chapter13.explorers.table import Table, escaped
from chapter13.plots.picture import (
    Picture,
    caption,
    new_figure,
    pixels,
    png_bundle,
    small_png,
    style,
)

LINE = 88  # characters, at most, of a readout's line of text

# A readout in the browser. Each row has a unit of its own, so values begin below each other, and
# nothing but the digits moves when one becomes longer; digits are of one width. The colors are the
# page's own, light or dark.
_READOUT = (
    "font-size: 15px; line-height: 1.45; margin: 4px 0; border-collapse: collapse; "
    "font-variant-numeric: tabular-nums"
)
_CELL = "padding: 0 14px 0 0; border: 0; text-align: left; vertical-align: top"
_LABEL = f"{_CELL}; font-weight: normal; white-space: nowrap"
_VALUE = f"{_CELL}; white-space: pre-wrap"
PANEL = "chapter13-explorer"  # the class of a panel in the page
# To JupyterLab a focused slider or dropdown is no text field: the letter m typed there makes the
# cell Markdown, and d d deletes it. So each key that a control gets is marked as none of
# JupyterLab's, but for Shift+Enter and those with Ctrl, Alt or Cmd. (A style's `onload` is the one
# way for a widget without JavaScript of its own to run some.)
_KEYS = f"""
if (!window.chapter13) {{
  window.chapter13 = true;
  window.addEventListener('keydown', event => {{
    const shortcut = event.ctrlKey || event.metaKey || event.altKey
      || (event.shiftKey && event.key === 'Enter');
    if (event.target.closest?.('.{PANEL}'))
      event.target.toggleAttribute('data-lm-suppress-shortcuts', !shortcut);
  }}, true);
}}"""
# Sliders leave room for the longest value that they show, or their track would change while it is
# dragged. A panel whose kernel has gone says so: its controls still move, and nothing follows.
_LOOK = f"""
.widget-hslider .widget-readout {{ min-width: 7.4em }}
.{PANEL}.jupyter-widgets-disconnected::after {{
  content: "This panel's kernel has gone: run the notebook's cells again.";
  order: -1; font-weight: bold;
}}
.{PANEL}.jupyter-widgets-disconnected img {{ opacity: 0.25 }}
"""
_PAGE = f'<style onload="{html.escape(_KEYS)}">{_LOOK}</style>'


class Readout(str):
    """(label, value) pairs as text, a line each, values aligned and long ones wrapped.

    `rows` are the pairs, values as str; `html` is a table of them. A space at which no line may
    break is written as "\\xa0".
    """

    def __new__(cls, rows):
        rows = tuple((label, str(value)) for label, value in rows)
        width = 2 + max(len(label) for label, _ in rows)
        break_line = "\n" + " " * width
        text = "\n".join(
            label.ljust(width) + break_line.join(textwrap.wrap(value, LINE - width))
            for label, value in rows
        )
        readout = super().__new__(cls, text.replace("\xa0", " "))
        readout.rows = rows
        return readout

    @property
    def html(self):
        rows = "".join(
            f'<tr><th scope="row" style="{_LABEL}">{escaped(label)}</th>'
            f'<td style="{_VALUE}">{escaped(value)}</td></tr>'
            for label, value in self.rows
        )
        return f'<table style="{_READOUT}"><tbody>{rows}</tbody></table>'


def lines(*rows):
    """(label, value) pairs -> Readout.

    >>> print(lines(("bits", 4), ("scale", "0.0125")))
    bits   4
    scale  0.0125
    """
    return Readout(rows)


class WordedImage(widgets.Image):
    """An image whose tooltip reaches the browser: the `title` that screen readers read out.

    ipywidgets gives an image neither an `alt` nor the description without which it shows no title.
    """

    description = Unicode("").tag(sync=True)


class Explorer(widgets.VBox):
    """A panel that shows what `compute(**settings)` returns, at each move of a control.

    controls: name -> ipywidgets control with a `value`; the names are compute's keywords.
    compute: pure; returns a view with `.readout` and `.alt`; its ValueError is an answer to the
        reader ("64 does not divide 100") and is shown as such. Any other exception is a mistake of
        ours: it is shown too, and raised.
    figure: a LiveFigure, which is given each view.
    busy: None, or a function of the settings that says what the panel shows while it computes
        them; "" for those that take no time.
    """

    _parts = ()

    def __init__(self, controls, compute, figure, busy=None):
        self.controls = dict(controls)
        self.compute = compute
        self.figure = figure
        self.busy = busy or (lambda **settings: "")
        self.view = None
        self.readout = ""
        self._setting = False  # while `set` moves several controls, nothing is computed
        for control in self.controls.values():
            control.style.description_width = "initial"
            control.layout.width = "auto"
            control.layout.flex = "1 1 320px"
            control.layout.margin = "2px 24px 2px 2px"
            control.observe(self._moved, names="value")
        bar = widgets.Box(
            list(self.controls.values()),
            layout=widgets.Layout(flex_flow="row wrap", max_width="1000px"),
        )
        self._picture = WordedImage(format="png", layout=widgets.Layout(max_width="100%"))
        self._text = widgets.HTML()
        self._nothing = widgets.Box(layout=widgets.Layout(display="none"))
        super().__init__([bar, self._picture, self._text])
        self.add_class(PANEL)
        shown = (*self.controls.values(), bar, self._picture, self._text, self._nothing)
        styles = [widget.style for widget in shown if hasattr(widget, "style")]
        self._parts = (*shown, *styles, *(widget.layout for widget in (*shown, self)))
        self._refresh()

    @property
    def settings(self):
        """name -> the control's value, now."""
        return {name: control.value for name, control in self.controls.items()}

    def at(self, **settings):
        """The view of other settings; controls that are not named keep their value, and all stay.

        So what a reader sees in the panel is what the text above it describes, also when all cells
        of a notebook have run. Raises ValueError where there is no such control, and with the
        panel's words where the settings do not fit each other.
        """
        for name in settings:
            self._control(name)
        return self.compute(**self.settings | settings)

    def set(self, **settings):
        """Move the controls named, compute once, return the readout.

        Raises ValueError, and moves nothing, where there is no such control or where a control
        cannot take the value.
        """
        before = self.settings
        self._setting = True
        try:
            for name, value in settings.items():
                self._move(name, value)
        except ValueError:
            for name, value in before.items():
                self.controls[name].value = value
            raise
        finally:
            self._setting = False
        self._refresh()
        return self.readout

    def snapshots(self, settings):
        """One static Picture, a row for each dict of settings; other controls stay as they are."""
        rows, alts = [], []
        for changed in settings:
            view = self.at(**changed)
            self.figure.update(view)
            title = ", ".join(self._say(name, value) for name, value in changed.items())
            image = self.figure.pixels()
            rows += [_heading(title, image.shape[1]), image]
            alts.append(f"{title}: {view.alt}")
        if self.view is not None:
            self.figure.update(self.view)
        return Picture(np.concatenate(rows), " ".join(alts))

    def table(self, settings):
        """The readouts as a Table, a column for each dict of settings; other controls stay.

        The header rows are the controls that at least one dict changes.
        """
        cases = [{**self.settings, **changed} for changed in settings]
        moved = [name for name in self.controls if any(name in changed for changed in settings)]
        readouts = [
            {label: str(value) for label, value in self.compute(**case).readout.rows}
            for case in cases
        ]
        head = [
            (self._title(name), [self._option(name, case[name]) for case in cases])
            for name in moved
        ]
        labels = dict.fromkeys(label for readout in readouts for label in readout)
        body = [(label, [readout.get(label, "") for readout in readouts]) for label in labels]
        return Table(head, [row for row in body if row not in head])

    def close(self):
        """Let the browser and the kernel forget the panel with all its parts."""
        for widget in self._parts:
            widget.close()
        super().close()

    def _control(self, name):
        if name not in self.controls:
            raise ValueError(f"no control {name!r} here; there are: {', '.join(self.controls)}")
        return self.controls[name]

    def _move(self, name, value):
        control = self._control(name)
        try:
            control.value = value
            taken = control.value == value  # a slider silently moves to its nearest end
        except (TraitError, ValueError):
            taken = False
        if not taken:
            raise ValueError(f"{name} cannot be {value!r}; it takes {_range(control)}")

    def _say(self, name, value):
        words = self._option(name, value)
        worded = getattr(self.controls[name], "worded", False)  # "groups of 64" needs no title
        return words if worded else f"{self._title(name)} {words}"

    def _title(self, name):
        return self.controls[name].description.rstrip(":")

    def _option(self, name, value):
        """A control's value as the reader sees it."""
        for label, option in _options(self.controls[name]):
            if option == value:
                return label
        return f"{value:g}" if isinstance(value, float) else str(value)

    def _moved(self, change):
        if not self._setting:
            self._refresh()

    def _refresh(self):
        try:
            if words := self.busy(**self.settings):
                self._text.value = _over(words, self._text.value)
            view = self.compute(**self.settings)
            self.figure.update(view)
        except ValueError as error:
            self._show_stale(f"These settings do not apply: {error}")
        except Exception as error:
            self._show_stale(f"{type(error).__name__}: {error}")
            raise
        else:
            self.view = view
            self._show(self.figure.png(), view.readout, view.alt)

    def _show_stale(self, message):
        if self.view is not None:  # update() may have stopped half way
            self.figure.update(self.view)
        self._show(self.figure.png(stale=True), message, message)

    def _show(self, png, readout, alt):
        self.readout = readout
        self.alt = alt
        with self._picture.hold_sync():
            self._picture.value = png
            self._picture.tooltip = alt
        shown = readout.html if isinstance(readout, Readout) else _paragraph(readout)
        self._text.value = _PAGE + shown

    def _repr_mimebundle_(self, **kwargs):
        """The widget, and beside it what a viewer without a kernel shows: picture and readout."""
        image = self.figure.pixels(stale=self.view is None or self.readout != self.view.readout)
        data, metadata = png_bundle(small_png(image), self.alt, image.shape[1])
        widget = super()._repr_mimebundle_(**kwargs)
        return widget | data | {"text/plain": str(self.readout)}, metadata

    def _ipython_display_(self):
        """The panel, and below it the picture's words for viewers without a kernel.

        Where widgets live, the words are the picture's tooltip, and follow the controls; a widget
        that takes no room is shown in place of the words below.
        """
        data, metadata = self._repr_mimebundle_()
        display(data, metadata=metadata, raw=True)
        words = caption(self.alt, metadata["image/png"]["width"])
        display(self._nothing._repr_mimebundle_() | words, raw=True)


def _options(control):
    """The (label, value) pairs of a dropdown or a selection slider; none for other controls."""
    options = getattr(control, "options", ())
    return [option if isinstance(option, tuple) else (str(option), option) for option in options]


def _range(control):
    """What a control takes, in words."""
    if _options(control):
        return ", ".join(repr(value) for _, value in _options(control))
    if isinstance(control, widgets.FloatLogSlider):
        return f"{control.base**control.min:g} to {control.base**control.max:g}"
    if hasattr(control, "min"):
        return f"{control.min:g} to {control.max:g}"
    return f"a {type(control.value).__name__}"


def _paragraph(words):
    """What is said in place of a readout."""
    return f'<p role="status" style="{_READOUT}">{html.escape(words)}</p>'


def _over(words, readout):
    """Words over a dimmed readout, which keeps its room."""
    return (
        '<div style="position: relative"><div style="position: absolute; font-weight: bold">'
        f'{_paragraph(words)}</div><div style="opacity: 0.25">{readout}</div></div>'
    )


def _heading(text, width):
    """A strip of pixels, `width` wide, that holds text, on as many lines as it takes."""
    rows = textwrap.wrap(text, width // 15)  # pixels of a wide letter
    with style():
        figure, ax = new_figure(width=width / 100, height=0.1 + 0.3 * len(rows))
        ax.set_axis_off()
        words = "\n".join(rows)
        ax.text(0, 0.5, words, fontsize=15, weight="bold", va="center", transform=ax.transAxes)
        return pixels(figure)
