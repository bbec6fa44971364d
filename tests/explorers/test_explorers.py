"""What holds for every explorer, and the base they share.

To have an explorer tested here, add it to PANELS. The numbers it shows are compared with the
package's own in a file of its own, tests/explorers/.
"""

import base64
import html
import io
import random
import re
from dataclasses import dataclass
from importlib import import_module

import ipywidgets as widgets
import numpy as np
import pytest
import torch
from ipywidgets.widgets.widget import _instances as living_widgets
from matplotlib.text import Text
from PIL import Image
from tiny import says, toy_model, weight

from chapter13.explorers.base import LINE, Explorer, _heading, lines
from chapter13.explorers.layers import GroupSizeSlider
from chapter13.explorers.table import Table
from chapter13.plots import LiveFigure, style

VIEW = "application/vnd.jupyter.widget-view+json"


PANELS = {  # module in chapter13.explorers (and a word more) -> a panel of it, given the module
    "formats": lambda module: module.explore_memory(),
    "formats number": lambda module: module.explore_number(),
    "absmax": lambda module: module.explore_absmax({"a": weight(), "b": 3 * weight()}),
    "granularity": lambda module: module.explore_granularity(weight()),
    "codebooks": lambda module: module.explore_codebooks(weight()),
    "distributions": lambda module: module.explore_distributions(weight()),
    "activations": lambda module: module.explore_activations(
        {"a": (50 * weight(), weight()), "b": (weight() ** 3 * 1e6, weight()[:5])}
    ),
    "awq": lambda module: module.explore_awq(
        {"a": (50 * weight(), weight()), "b": (weight() ** 3 * 1e4, weight()[:5])}
    ),
    "text": lambda module: module.explore_text(*toy_model()),
    "gptq columns": lambda module: module.explore_columns(weight()[:4, :8]),
    "gptq": lambda module: module.explore_layer(
        {
            name: module.Layer(given, {"a": tokens[:4], "b": tokens[2:] ** 3}, tokens[:2])
            for name, given in (("one", weight()), ("other", 3 * weight()[:5]))
            for tokens in [torch.randn(6, 16, weight().shape[1])]
        }
    ),
}


# --- every explorer ---------------------------------------------------------------------------


@pytest.fixture(params=PANELS)
def panel(request):
    module = import_module(f"chapter13.explorers.{request.param.split()[0]}")
    panel = PANELS[request.param](module)
    yield panel
    panel.close()


def positions(control):
    """Values of a control: all of a choice or of a short range, else a few from end to end."""
    if options := getattr(control, "options", None):
        return [option[1] if isinstance(option, tuple) else option for option in options]
    if isinstance(control, widgets.Checkbox | widgets.ToggleButton):
        return [False, True]
    if isinstance(control, widgets.FloatLogSlider):
        return [control.base ** float(x) for x in np.linspace(control.min, control.max, 7)]
    if isinstance(control, widgets.FloatText):
        return [0.15625, -0.1, 0.0, 70_000.0, -1e-8, 3.4e38, -1e300]
    steps = round((control.max - control.min) / control.step)
    kind = type(control.value)
    places = range(steps + 1) if steps <= 20 else np.linspace(0, steps, 7).round().astype(int)
    return [kind(control.min + int(place) * control.step) for place in places]


def some_settings(panel, count=30):
    """Each control at each position, the others as they are; then `count` random mixtures."""
    choices = {name: positions(control) for name, control in panel.controls.items()}
    settings = [{name: value} for name, values in choices.items() for value in values]
    mixed = random.Random(0)
    settings += [
        {name: mixed.choice(values) for name, values in choices.items()} for _ in range(count)
    ]
    return settings


def test_every_setting_is_answered(panel):
    """With a picture and a readout, or with a reason why not; never with an exception."""
    start = panel.settings
    applied = 0
    for changed in some_settings(panel):
        readout = panel.set(**start | changed)
        assert readout == panel.readout
        assert readout.strip()
        assert panel.alt.strip()
        assert panel.settings == start | changed
        applied += panel.view is not None and readout == panel.view.readout
    assert applied > 0


def test_same_settings_same_words_and_picture(panel):
    """Whatever was shown before: nothing is left of it."""
    start = panel.settings
    shown = panel.set(), panel._picture.value
    for changed in some_settings(panel, count=5):
        panel.set(**changed)
    assert (panel.set(**start), panel._picture.value) == shown


def test_a_moved_control_does_what_set_does(panel):
    for name, control in panel.controls.items():
        value = next(value for value in positions(control) if value != control.value)
        control.value = value  # as the browser does
        shown = panel.readout, panel._picture.value
        assert (panel.set(**{name: value}), panel._picture.value) == shown


def test_controls_are_named_in_words(panel):
    for control in panel.controls.values():
        assert control.description.strip()


def test_moving_makes_no_new_widgets(panel):
    before = len(living_widgets)
    start = panel.settings
    for changed in some_settings(panel, count=3):
        panel.set(**changed)
    panel.set(**start)  # the last settings may not apply
    panel.snapshots([{}])
    assert len(living_widgets) == before


def test_close_leaves_no_widget(panel):
    before = len(living_widgets)
    module = import_module(type(panel).__module__)
    assert module.Explorer is Explorer
    panel.close()
    closed = before - len(living_widgets)
    # each control, the bar, picture, text and panel, each with a layout, most with a style
    assert closed >= 2 * (len(panel.controls) + 4)
    panel.close()


def test_without_a_kernel_picture_and_readout_remain(panel):
    data, metadata = panel._repr_mimebundle_()
    assert data["text/plain"] == panel.readout
    assert metadata["image/png"]["alt"] == panel.alt
    assert VIEW in data
    png = base64.b64decode(data["image/png"])
    assert len(png) < 60_000
    assert Image.open(io.BytesIO(png)).size == panel.figure.canvas.get_width_height()


def shown(panel, monkeypatch):
    """What a cell that ends with the panel displays: (data, metadata) pairs."""
    outputs = []
    monkeypatch.setattr(
        "chapter13.explorers.base.display",
        lambda data, metadata=None, raw=False: outputs.append((data, metadata)),
    )
    panel._ipython_display_()
    return outputs


def test_words_stand_below_the_stored_picture_and_not_below_the_live_one(panel, monkeypatch):
    (picture, metadata), (words, _) = shown(panel, monkeypatch)
    assert picture.keys() == panel._repr_mimebundle_()[0].keys()
    assert metadata["image/png"]["alt"] == words["text/plain"] == panel.alt
    assert html.escape(panel.alt) in words["text/html"]
    live = words[VIEW]["model_id"]
    assert living_widgets[live].layout.display == "none"
    assert live != picture[VIEW]["model_id"]


def test_table_holds_the_readouts(panel):
    """Those of the first and the last position of each control, where they apply."""
    start, before = panel.settings, panel.readout
    choices = {name: positions(control) for name, control in panel.controls.items()}
    settings = []
    for name, values in choices.items():
        for value in (values[0], values[-1]):
            try:
                panel.compute(**start | {name: value})
            except ValueError:
                continue
            settings.append({name: value})
    table = panel.table(settings)
    assert (panel.settings, panel.readout) == (start, before)
    moved = {name for changed in settings for name in changed}
    assert [label for label, _ in table.head] == [
        control.description for name, control in panel.controls.items() if name in moved
    ]
    for number, changed in enumerate(settings):
        readout = panel.compute(**start | changed).readout
        told = [row for row in table.head if row[0] in dict(readout.rows)] + table.body
        column = {label: values[number] for label, values in told if values[number]}
        assert column == {label: str(value) for label, value in readout.rows}
        words = "".join(f"{label}{value}" for label, value in column.items())
        # nothing is told that the table has not; lines may break elsewhere
        assert "".join(words.split()) == "".join(readout.split())


def test_words_in_the_picture_are_large_and_inside(panel):
    figure = panel.figure.figure
    width, height = panel.figure.canvas.get_width_height()
    for changed in some_settings(panel, count=10):
        panel.set(**changed)
        # anew each time: other limits may need more ticks than there were
        labels = [ax.get_xticklabels() + ax.get_yticklabels() for ax in figure.axes]
        ticks = set(sum(labels, []))
        for text in figure.findobj(Text):
            if not text.get_visible() or not text.get_text().strip():
                continue
            assert text.get_fontsize() >= 12, text
            if text not in ticks:  # those outside the axes are not drawn
                box = text.get_window_extent()
                inside = box.x0 > -1 and box.y0 > -1 and box.x1 < width + 1 and box.y1 < height + 1
                assert inside, f"{text.get_text()!r} leaves the picture at {changed}"


# --- the base ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class View:
    height: float
    readout: str
    alt: str


class HeightFigure(LiveFigure):
    def __init__(self):
        super().__init__(width=4, height=2)
        with style():
            self.axes.set(xlim=(0, 1), ylim=(0, 10))
            (self.line,) = self.axes.plot([0, 1], [0, 0])
            self.animate(self.line)

    def update(self, view):
        self.line.set_ydata([view.height] * 2)


calls = []


def compute(bits, group_size, strength):
    calls.append((bits, group_size, strength))
    if group_size == 48:
        raise ValueError("group size 48 does not divide 128 <in_features>")
    if strength > 500:
        raise ArithmeticError("overflow")
    return View(bits, lines(("bits", bits), ("group size", group_size)), f"a line at {bits}")


@pytest.fixture
def toy():
    controls = {
        "bits": widgets.IntSlider(8, 2, 8, description="bits"),
        "group_size": GroupSizeSlider([None, 64, 48], None),
        "strength": widgets.FloatLogSlider(1, min=0, max=3, description="strength"),
    }
    panel = Explorer(controls, compute, HeightFigure())
    calls.clear()
    yield panel
    panel.close()


def test_set_moves_all_controls_and_computes_once(toy):
    assert toy.set(bits=3, group_size=64, strength=10) == "bits        3\ngroup size  64"
    assert calls == [(3, 64, 10)]
    assert toy.settings == {"bits": 3, "group_size": 64, "strength": 10}


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"bit": 3}, "no control 'bit' here; there are: bits, group_size, strength"),
        ({"bits": 9}, "bits cannot be 9; it takes 2 to 8"),
        ({"bits": 3.5}, "bits cannot be 3.5; it takes 2 to 8"),
        ({"bits": "three"}, "bits cannot be 'three'; it takes 2 to 8"),
        ({"group_size": 32}, "group_size cannot be 32; it takes None, 64, 48"),
        ({"strength": 0.5}, "strength cannot be 0.5; it takes 1 to 1000"),
    ],
)
def test_set_refuses_what_a_control_cannot_take_and_moves_nothing(toy, wrong, message):
    toy.set(bits=4)
    calls.clear()
    before = toy.settings, toy.readout, toy._picture.value
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        toy.set(**{"group_size": 64} | wrong)
    assert (toy.settings, toy.readout, toy._picture.value) == before
    assert calls == []
    toy.controls["bits"].value = 5  # and the panel still listens
    assert calls == [(5, None, 1)]


def test_settings_that_do_not_fit_are_explained(toy):
    fresh = toy.figure.pixels()
    readout = toy.set(group_size=48)
    assert readout == (
        "These settings do not apply: group size 48 does not divide 128 <in_features>"
    )
    assert "128 &lt;in_features&gt;" in toy._text.value
    stale = np.asarray(Image.open(io.BytesIO(toy._picture.value)))
    assert np.array_equal(stale, toy.figure.pixels(stale=True))
    assert not np.array_equal(stale, fresh)
    data, metadata = toy._repr_mimebundle_()
    assert data["text/plain"] == metadata["image/png"]["alt"] == readout
    toy.set(group_size=64)
    assert np.array_equal(toy.figure.pixels(), fresh)
    assert toy.readout == "bits        8\ngroup size  64"


def test_a_mistake_of_ours_is_shown_and_raised(toy):
    with pytest.raises(ArithmeticError, match="overflow"):
        toy.set(strength=1000)
    assert toy.readout == "ArithmeticError: overflow"
    assert "ArithmeticError: overflow" in toy._text.value
    with pytest.raises(ArithmeticError, match="overflow"):  # from the browser
        toy.controls["strength"].value = 900
    assert toy.set(strength=1) == "bits        8\ngroup size  None"


def test_what_takes_time_is_said_over_the_readout_and_then_gone(toy):
    said = []
    toy.busy = lambda bits, **settings: "loading <it> …" if bits == 3 else ""
    toy._text.observe(lambda change: said.append(change.new), "value")
    toy.set(bits=4)
    four = toy._text.value
    assert said == [four]
    toy.set(bits=3)
    assert "loading &lt;it&gt; …" in said[1]
    assert four in said[1]
    assert said[2:] == [toy._text.value]
    assert "loading" not in toy._text.value


def test_a_readout_in_a_browser(toy):
    readout = lines(("bits", 4), ("  <scale>", "1 & 2"))
    assert re.sub(' style="[^"]*"', "", readout.html) == (
        '<table><tbody><tr><th scope="row">bits</th><td>4</td></tr>'
        '<tr><th scope="row">&emsp;&lt;scale&gt;</th><td>1 &amp; 2</td></tr></tbody></table>'
    )
    toy.set(bits=5)
    assert toy._text.value.endswith(toy.readout.html)


def test_long_values_of_a_readout_are_wrapped():
    cards = "; ".join(["RTX\xa04080,\xa05080"] * 9)
    first, *others = lines(("bits", 4), ("  fits", cards)).splitlines()[1:]
    assert first.startswith("  fits  RTX 4080, 5080; RTX")
    assert others
    for line in others:
        assert line.startswith("        RTX 4080, 5080")
        assert len(line) <= LINE
    assert lines(("fits", cards)).rows == (("fits", cards),)


def test_words_reach_the_browser_with_the_picture(toy):
    toy.set(bits=6)
    assert toy._picture.tooltip == toy.alt == "a line at 6"
    assert toy._picture.get_state()["description"] == ""  # without it there is no title


def test_other_settings_are_read_and_nothing_moves(toy):
    before = toy.settings, toy.readout, toy.view
    elsewhere = toy.at(bits=3)
    assert (toy.settings, toy.readout, toy.view) == before
    assert toy.set(bits=3) == elsewhere.readout != before[1]
    with pytest.raises(ValueError, match=says("'bit'", "bits")):
        toy.at(bit=3)


def test_snapshots_are_rows_and_change_nothing(toy):
    before = toy.settings, toy.readout, toy.figure.pixels()
    picture = toy.snapshots([{"bits": 8}, {"bits": 3, "group_size": None}])
    assert picture.alt == "bits 8: a line at 8 bits 3, per tensor: a line at 3"
    assert (picture.width, picture.height) == (400, 2 * (40 + 200))
    rows = np.asarray(Image.open(io.BytesIO(picture.png)).convert("RGB"))
    assert not np.array_equal(rows[40:240], rows[280:480])
    assert toy.settings == before[0]
    assert toy.readout == before[1]
    assert np.array_equal(toy.figure.pixels(), before[2])


@pytest.mark.parametrize("width", [700, 1000])
@pytest.mark.parametrize("words", [1, 8, 24])
def test_a_heading_is_never_cut(words, width):
    strip = _heading(" ".join(["memory 48"] * words), width)
    assert strip.shape[1] == width
    dark = (strip < 250).any(2)
    assert dark.any()
    assert not dark[:, -4:].any()
    assert not dark[[0, -1]].any()


def test_snapshots_of_settings_that_do_not_fit_are_refused(toy):
    with pytest.raises(ValueError, match="does not divide"):
        toy.snapshots([{"group_size": 48}])


def test_table_side_by_side(toy):
    toy.set(strength=10)
    table = toy.table([{"bits": 8}, {"group_size": 64}, {"bits": 3, "group_size": None}])
    assert repr(table) == (
        "bits        8           8             3\n"
        "group size  per tensor  groups of 64  per tensor\n"
        "----------  ----------  ------------  ----------\n"
        "group size  None        64            None"
    )
    assert calls[-3:] == [(8, None, 10), (8, 64, 10), (3, None, 10)]


def test_table_of_settings_that_do_not_fit_is_refused(toy):
    with pytest.raises(ValueError, match="does not divide"):
        toy.table([{"group_size": 48}])


def test_table_in_a_browser():
    table = Table([("bits", ["8", "4"])], [("  <b>", ["1 & 2", ""])])
    assert re.sub(' style="[^"]*"', "", table._repr_html_()) == (
        "<table><thead><tr><th>bits</th><th>8</th><th>4</th></tr></thead><tbody>"
        "<tr><th>&emsp;&lt;b&gt;</th><td>1 &amp; 2</td><td></td></tr></tbody></table>"
    )


def test_settings_that_never_fitted():
    controls = {"bits": widgets.IntSlider(8, 2, 8, description="bits")}

    def never(bits):
        raise ValueError("nothing here")

    panel = Explorer(controls, never, HeightFigure())
    assert panel.readout == "These settings do not apply: nothing here"
    assert panel._repr_mimebundle_()[0]["text/plain"] == panel.readout
    panel.close()
