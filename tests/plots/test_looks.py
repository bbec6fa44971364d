"""Every picture of the course: a method looks the same everywhere, and no bar stands on a log axis.

Pictures mark the artists of a method with a gid, "method:gptq". An artist that is not marked gives
itself away: by a label, or beside a tick, that is a method's, or by the colour of one.
"""

import inspect
from importlib import import_module
from pkgutil import iter_modules

import gallery
import numpy as np
import pytest
from matplotlib.collections import Collection
from matplotlib.colors import same_color, to_hex, to_rgba
from matplotlib.container import BarContainer
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle, StepPatch
from matplotlib.text import Annotation

from chapter13 import plots
from chapter13.plots import LiveFigure, picture
from chapter13.plots.picture import COLORS, METHOD_LOOK, SERIES, method_named

MODULES = [
    import_module(f"chapter13.plots.{module.name}") for module in iter_modules(plots.__path__)
]
ROLE_COLORS = {to_hex(color) for color in COLORS.values()}
METHOD_COLORS = {to_hex(look.color) for look in METHOD_LOOK.values()} - ROLE_COLORS


# --- what was drawn ---------------------------------------------------------------------------


def marked(artist):
    """("method", "gptq") of an artist with the gid "method:gptq"; (None, None) without one."""
    kind, _, name = (artist.get_gid() or "").partition(":")
    return (kind, name) if kind in ("method", "part") else (None, None)


def colors(artist):
    """The colours of what is drawn of an artist, as "#rrggbb", without white."""
    if isinstance(artist, Line2D):
        found = [artist.get_color()]
        if artist.get_marker() not in ("", "None", None):
            found += [artist.get_markerfacecolor(), artist.get_markeredgecolor()]
    else:
        found = [*np.atleast_1d(artist.get_edgecolor()), *np.atleast_1d(artist.get_facecolor())]
        found = np.reshape(found, (-1, 4)).tolist()
    shown = [color for color in found if not same_color(color, "none") and to_rgba(color)[3] > 0]
    return {to_hex(color) for color in shown} - {"#ffffff"}


def artists(ax):
    """Lines, patches and collections of some axes, arrows and the bars of intervals included."""
    arrows = [text.arrow_patch for text in ax.texts if isinstance(text, Annotation)]
    mapped = (child for child in ax.collections if child.get_array() is None)
    return [*ax.lines, *ax.patches, *mapped, *filter(None, arrows)]


def marker(artist):
    """The marker of a line, or None."""
    shape = artist.get_marker() if isinstance(artist, Line2D) else None
    return None if shape in ("", "None") else shape


def legends(figure):
    """(words, handle) of all legends."""
    found = [*figure.legends, *(ax.get_legend() for ax in figure.axes)]
    for legend in filter(None, found):
        for words, handle in zip(legend.get_texts(), legend.legend_handles, strict=True):
            yield words.get_text(), handle


def rows(ax):
    """(words, y) of the ticks on the vertical axis; none of an axis that shows another's."""
    for tick, words in zip(ax.get_yticks(), ax.get_yticklabels(), strict=False):
        yield words.get_text(), tick


def heights(artist):
    """The lowest and the highest place of an artist on the vertical axis."""
    if isinstance(artist, Line2D):
        places = np.asarray(artist.get_ydata(), float)
    elif isinstance(artist, Rectangle):
        places = np.array([artist.get_y(), artist.get_y() + artist.get_height()], float)
    elif isinstance(artist, Collection) and hasattr(artist, "get_segments"):
        places = np.concatenate([segment[:, 1] for segment in artist.get_segments()] or [[np.nan]])
    else:
        places = np.array([np.nan])
    return places.min(initial=np.inf), places.max(initial=-np.inf)


# --- the rules --------------------------------------------------------------------------------


def check_looks(figure):
    """AssertionError where an artist has not the look of its method."""
    drawn = [artist for ax in figure.axes for artist in artists(ax)]
    methods = {name for kind, name in map(marked, drawn) if kind == "method"}

    for artist in drawn:
        kind, name = marked(artist)
        if kind == "method":
            look = METHOD_LOOK[name]
            assert colors(artist) <= {to_hex(look.color)}, f"{artist} is no {look}"
            assert marker(artist) in (None, look.marker), f"{artist} is no {look}"
        elif kind is None:
            taken = colors(artist) & METHOD_COLORS
            assert not taken, f"{artist} is not marked, but {taken}"
        named = method_named(str(artist.get_label()))
        if named and kind != "part":
            assert name == named, f"{artist} is labelled {artist.get_label()!r}, marked {name}"

    for words, handle in legends(figure):
        named = method_named(words)
        if named:
            assert colors(handle) <= {to_hex(METHOD_LOOK[named].color)}, words
            assert marker(handle) in (None, METHOD_LOOK[named].marker), words
        elif colors(handle) & METHOD_COLORS:
            assert any(words == a.get_label() and marked(a)[0] == "method" for a in drawn), words

    for ax in figure.axes:
        for words, y in rows(ax):
            named = method_named(words)
            beside = [a for a in artists(ax) if heights(a)[0] - 0.3 <= y <= heights(a)[1] + 0.3]
            if named and not any(marked(artist)[0] == "part" for artist in beside):
                assert ("method", named) in map(marked, beside), f"nothing beside {words!r}"
        for text in ax.texts:
            named = method_named(text.get_text())
            assert named is None or named in methods, f"nothing is marked as {text.get_text()!r}"

    seen = [(METHOD_LOOK[name].color, METHOD_LOOK[name].marker) for name in methods]
    assert len(set(seen)) == len(seen), f"two methods look the same: {sorted(methods)}"


def check_bars(figure):
    """AssertionError where a bar's length is measured on a logarithmic axis."""
    for ax in figure.axes:
        held = [bar for bars in ax.containers if isinstance(bars, BarContainer) for bar in bars]
        for bars in ax.containers:
            if isinstance(bars, BarContainer):
                scale = ax.get_xscale() if bars.orientation == "horizontal" else ax.get_yscale()
                assert scale == "linear", f"{bars} on a {scale} axis"
        for patch in ax.patches:
            if isinstance(patch, StepPatch):
                assert ax.get_yscale() == "linear", f"{patch} on a logarithmic axis"
            elif isinstance(patch, Rectangle) and patch not in held:
                bands = (ax.get_xaxis_transform(), ax.get_yaxis_transform())
                if not any(patch.get_transform().contains_branch(band) for band in bands):
                    assert {ax.get_xscale(), ax.get_yscale()} == {"linear"}, patch


# --- every picture ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "draw", gallery.PICTURES, ids=lambda draw: f"{draw.__module__}.{draw.__name__}"
)
def test_methods_look_the_same_in_every_picture(draw):
    with gallery.kept_figures() as figures:
        assert gallery.PICTURES[draw](draw).alt
    for figure in figures:
        check_looks(figure)
        check_bars(figure)


def settings(panel):
    """Each choice of the controls that choose a method, the others as they are."""
    yield {}
    for name in ("method", "kind", "affine", "hardware"):
        for option in getattr(panel.controls.get(name), "options", ()):
            yield {name: option[1] if isinstance(option, tuple) else option}
    if "affine" in panel.controls:
        yield {"affine": True}


@pytest.mark.parametrize("name", gallery.PANELS)
def test_methods_look_the_same_in_every_panel(name):
    kind, make = gallery.PANELS[name]
    panel = make()
    assert type(panel.figure) is kind
    start = panel.settings
    for changed in settings(panel):
        panel.set(**start | changed)
        check_looks(panel.figure.figure)
        check_bars(panel.figure.figure)
    panel.close()


def test_every_picture_has_its_place_in_the_gallery():
    """A function that returns a Picture, or a live figure, is seen by the tests above."""
    made = {
        function
        for module in MODULES
        for name, function in inspect.getmembers(module, inspect.isfunction)
        if function.__module__ == module.__name__ and not name.startswith("_")
        if "Picture(" in (text := inspect.getsource(function)) or "return stacked_bars(" in text
    }
    assert made == set(gallery.PICTURES)
    live = {each for each in LiveFigure.__subclasses__() if each.__module__.startswith("chapter13")}
    assert live == {kind for kind, _ in gallery.PANELS.values()}


# --- the table --------------------------------------------------------------------------------


def test_roles_and_series_have_colours_of_their_own():
    for name, look in METHOD_LOOK.items():
        if name not in ("cast", "fp32"):  # the weights as they were
            assert to_hex(look.color) not in ROLE_COLORS | {to_hex(color) for color in SERIES}


def test_labels_are_told_apart():
    labels = [look.label for look in METHOD_LOOK.values()]
    assert len(set(labels)) == len(labels)
    for name, look in METHOD_LOOK.items():
        assert method_named(look.label) == name
        assert method_named(f"{look.label}, groups of 64") == name
    assert method_named("GPTQ, clip search") == "gptq_clip"
    assert method_named("layer 3") is None


# --- the rules notice -------------------------------------------------------------------------


def wrong_color(ax):
    ax.plot([0, 1], color="#0072B2", gid="method:gptq")


def wrong_marker(ax):
    ax.plot([0, 1], **picture.method_line("gptq") | {"marker": "o"})


def label_without_a_mark(ax):
    ax.plot([0, 1], color=SERIES[0], label="NF4, double quantization")


def color_without_a_mark(ax):
    ax.bar([0, 1], [1, 2], color=METHOD_LOOK["awq"].color)


def legend_of_its_own(ax):
    ax.legend(handles=[Patch(color=SERIES[0], label="AWQ")])


def row_without_a_mark(ax):
    ax.barh(["GPTQ", "other"], [1, 2], color=SERIES[0])


def name_beside_nothing(ax):
    ax.annotate("Q4_0", (0.5, 0.5))


def two_that_look_the_same(ax):
    for method in ("affine", "nearest"):
        ax.plot([0, 1], **picture.method_line(method))


def bars_on_a_logarithmic_axis(ax):
    ax.barh([0, 1], [1, 2], color=SERIES[0])
    ax.set_xscale("log")


def steps_on_a_logarithmic_axis(ax):
    ax.stairs([1, 2], fill=True, color=SERIES[0])
    ax.set_yscale("log")


def rectangle_on_a_logarithmic_axis(ax):
    ax.add_patch(Rectangle((1, 0), 3, 1, color=SERIES[0]))
    ax.set_xscale("log")


@pytest.mark.parametrize(
    "draw",
    [
        wrong_color,
        wrong_marker,
        label_without_a_mark,
        color_without_a_mark,
        legend_of_its_own,
        row_without_a_mark,
        name_beside_nothing,
        two_that_look_the_same,
    ],
    ids=lambda draw: draw.__name__,
)
def test_a_wrong_look_is_noticed(draw):
    figure = Figure()
    draw(figure.subplots())
    with pytest.raises(AssertionError):
        check_looks(figure)


@pytest.mark.parametrize(
    "draw",
    [
        bars_on_a_logarithmic_axis,
        steps_on_a_logarithmic_axis,
        rectangle_on_a_logarithmic_axis,
    ],
    ids=lambda draw: draw.__name__,
)
def test_a_bar_on_a_logarithmic_axis_is_noticed(draw):
    figure = Figure()
    draw(figure.subplots())
    with pytest.raises(AssertionError):
        check_bars(figure)
