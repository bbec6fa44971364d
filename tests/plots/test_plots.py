"""Pictures carry words, are written whole, and leave the student's own plots alone."""

import io
import subprocess
import sys

import matplotlib
import numpy as np
import pytest
from PIL import Image

from chapter13.plots import COLORS, LiveFigure, Picture, new_figure, picture, style


def bars(heights=(1, 3, 2)):
    with style():
        figure, ax = new_figure(width=6, height=3)
        ax.bar(range(len(heights)), heights, color=COLORS["original"])
        ax.set(title="bars", xlabel="code", ylabel="weights")
        return Picture(figure, alt=f"{len(heights)} bars.")


class LineFigure(LiveFigure):
    """A line from (0, 0) to (1, view); the axes reach as far as the view if it is above 1."""

    def __init__(self):
        super().__init__(width=4, height=2)
        with style():
            self.axes.set(xlim=(0, 1), ylim=(0, 1))
            (self.line,) = self.axes.plot([0, 1], [0, 0])
            self.animate(self.line)

    def update(self, view):
        self.line.set_ydata([0, view])
        if view > 1:
            self.axes.set_ylim(0, view)
            self.redraw()


def decode(png):
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))


def test_picture_has_the_size_asked_for():
    drawn = bars()
    assert (drawn.width, drawn.height) == (600, 300)
    assert decode(drawn.png).shape == (300, 600, 3)


@pytest.mark.parametrize("alt", ["", "  \n"])
def test_picture_without_words_is_refused(alt):
    with style():
        figure, _ = new_figure()
    with pytest.raises(ValueError, match="alternative text"):
        Picture(figure, alt)


def test_words_go_beside_the_picture(monkeypatch):
    shown = []
    monkeypatch.setattr(picture, "display", lambda data, **how: shown.append((data, how)))
    drawn = Picture(np.zeros((4, 6, 3), np.uint8), 'less < "more" &\n   all')
    assert repr(drawn) == 'less < "more" & all'
    drawn._ipython_display_()
    (image, how), (caption, _) = shown
    assert image["text/plain"] == caption["text/plain"] == drawn.alt
    assert how["metadata"] == {"image/png": {"alt": drawn.alt, "width": 6}}
    assert "less &lt; &quot;more&quot; &amp; all" in caption["text/html"]


def test_a_small_palette_does_not_show():
    """Even on what needs most colors, a smooth map with text on it."""
    with style():
        figure, ax = new_figure(width=6, height=4)
        ax.imshow(np.add.outer(np.arange(60.0), np.arange(90.0)), cmap="viridis", aspect="auto")
        ax.set_title("error of each weight")
    image = picture.pixels(figure)
    difference = np.abs(decode(picture.small_png(image)).astype(int) - image)
    assert difference.mean() < 3  # of 255
    assert np.quantile(difference, 0.99) < 16


def test_save_writes_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "picture.png"
    assert bars().save(path) == path
    assert path.read_bytes() == bars().png

    def fail(self, target):
        raise OSError("disk full")

    monkeypatch.setattr("pathlib.Path.replace", fail)
    with pytest.raises(OSError, match="disk full"):
        bars((4, 4, 4)).save(path)
    assert path.read_bytes() == bars().png
    assert list(tmp_path.iterdir()) == [path]


def test_pictures_neither_take_nor_change_a_students_settings():
    expected = bars().png
    with matplotlib.rc_context({"font.size": 40, "axes.facecolor": "black", "axes.grid": False}):
        before = dict(matplotlib.rcParams)
        assert bars().png == expected
        LineFigure().png()
        assert dict(matplotlib.rcParams) == before


def test_pictures_do_without_pyplot():
    code = (
        "import sys, chapter13.plots as plots\n"
        "with plots.style():\n"
        "    plots.Picture(plots.new_figure()[0], 'axes')\n"
        "sys.exit('matplotlib.pyplot' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_live_figure_shows_what_a_fresh_one_would():
    live, fresh = LineFigure(), LineFigure()
    for view in (0.2, 0.9, 0.4):
        live.update(view)
        live.pixels()
    fresh.update(0.4)
    assert np.array_equal(live.pixels(), fresh.pixels())
    live.update(0.9)
    assert not np.array_equal(live.pixels(), fresh.pixels())


def test_live_figure_draws_its_axes_again_when_asked():
    live, fresh = LineFigure(), LineFigure()
    live.pixels()
    live.update(7)
    fresh.update(7)
    assert np.array_equal(live.pixels(), fresh.pixels())


def test_live_png_holds_the_pixels():
    live = LineFigure()
    live.update(0.5)
    assert np.array_equal(decode(live.png()), live.pixels())


def test_stale_picture_is_faded_and_marked_and_leaves_no_trace():
    live = LineFigure()
    live.update(0.5)
    fresh, stale = live.pixels(), live.pixels(stale=True)
    corner = np.s_[:50, :]  # beside the words
    assert fresh[corner].min() < 100 < stale[corner].min()
    assert stale[60:140].min() < 60, "the words are dark"
    assert np.array_equal(live.pixels(), fresh)
