"""`make present`: an explorer in the slides moves, and nothing else does.

The page is driven in a headless browser. Where there is no Chromium or Chrome, or no npm, those
tests are skipped and the summary says so; with CHAPTER13_REQUIRE_BROWSER=1 that is a failure.
"""

import io
import os
import re
import signal
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import nbformat
import pytest
from conftest import from_npm, skip_or_fail
from PIL import Image, ImageChops
from tiny import says

from tools import present
from tools.browser import ROOT, wait_for
from tools.notebooks import numbered
from tools.slides.build import NoPackages, fetch_packages

WHAT = "THE LIVE SLIDES WERE"

LOOK = (Path(__file__).parent / "look_at_slides.js").read_text(encoding="utf-8")
REAL = next(path for path in numbered() if path.name.startswith("01_"))
WRITTEN = "written_by_a_slide.txt"

pytestmark = pytest.mark.timeout(900)  # starts kernels and browsers beside whatever else runs

EXPLORER = """\
import torch
from chapter13.explorers.absmax import explore_absmax

generator = torch.Generator().manual_seed(0)
panel = explore_absmax({"a": torch.randn(64, 64, generator=generator), "ones": torch.ones(4, 4)})
panel"""
PATHS = f"""\
import json, os
from pathlib import Path

print(len(json.loads(Path("../data/results.json").read_text())) > 0)
Path("../data/{WRITTEN}").write_text("x")
print("kernel", os.getpid())"""


# --- without a browser ---------------------------------------------------------------------


def test_a_notebook_is_found_by_number_and_by_path(tmp_path):
    courses = numbered()
    assert present.find("1", courses) == present.find("01", courses) == REAL
    assert present.find(str(REAL), courses) == REAL
    mine = tmp_path / "my_own.ipynb"
    mine.touch()
    assert present.find(str(mine), courses) == mine


@pytest.mark.parametrize("name", ["", "77", "notebooks/no.ipynb", "README.md", "notebooks"])
def test_a_wrong_name_lists_the_notebooks(name):
    with pytest.raises(SystemExit) as error:
        present.find(name, numbered())
    for path in numbered():
        assert f"make present NOTEBOOK=notebooks/{path.name}" in str(error.value)
    assert name in str(error.value)


def test_a_page_may_not_run_code():
    message = {"type": "execute_request", "id": "1", "content": {"code": "1"}, "metadata": {}}
    with pytest.raises(ValueError, match=says("execute_request")):
        present.Presentation(client=None).send(message)


def fake_npm(folder, monkeypatch, script):
    """Puts a program named npm first in PATH, and the scripts' folder elsewhere."""
    npm = folder / "npm"
    npm.write_text(f"#!/bin/sh\n{script}\n")
    npm.chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=os.pathsep)
    monkeypatch.setattr(present, "SCRIPTS", folder / "scripts")


def test_a_package_that_is_not_the_known_one_is_refused(tmp_path, monkeypatch):
    fake_npm(tmp_path, monkeypatch, 'echo other > "$3/other.tgz"')
    with pytest.raises(NoPackages, match=says("requirejs")):
        present.fetch_scripts()
    assert not list((tmp_path / "scripts").rglob("*.*js"))


def test_a_failing_npm_says_why(tmp_path, monkeypatch):
    fake_npm(tmp_path, monkeypatch, "echo no network >&2; exit 1")
    with pytest.raises(NoPackages, match=says("requirejs", "no network")):
        present.fetch_scripts()


# --- in a browser --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser(browser):
    """The browser, and what live slides need from npm."""
    try:
        from_npm(fetch_packages)
        from_npm(present.fetch_scripts)
    except NoPackages as error:
        skip_or_fail(WHAT, error)
    return browser


@dataclass
class Presented:
    """A running `make present`."""

    process: subprocess.Popen
    address: str
    log: Path

    @property
    def errors(self):
        """What it has written to stderr so far."""
        return self.log.read_text()

    def end(self):
        """Ctrl-C; returns the exit status."""
        self.process.send_signal(signal.SIGINT)
        return self.process.wait(60)


@contextmanager
def presenting(path, folder):
    """A Presented of the notebook at `path`, ended at last."""
    log = folder / "stderr.txt"
    env = os.environ | {"BROWSER": "true", "OMP_NUM_THREADS": "1", "TMPDIR": str(folder)}
    with log.open("wb") as stderr:
        process = subprocess.Popen(
            [sys.executable, "-m", "tools.present", str(path)],
            cwd=ROOT,
            env=env,
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
        )
    try:
        address = re.search(r"http://\S+", process.stdout.readline())
        assert address, log.read_text()
        yield Presented(process, address[0], log)
    finally:
        if process.poll() is None:
            process.terminate()
        process.communicate(timeout=60)


def cell(source, kind="code", role="-", **fields):
    new = getattr(nbformat.v4, f"new_{kind}_cell")
    return new(source, metadata={"slideshow": {"slide_type": role}}, **fields)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A notebook with one explorer, relative paths and a cell that fails."""
    path = tmp_path_factory.mktemp("notebook") / "my_small.ipynb"
    cells = [
        cell("# Small\n\nYou can drag $x^2$ for a minute.", "markdown", "slide"),
        cell("## Drag it", "markdown", "slide"),
        cell(EXPLORER, id="panel"),
        cell("## Paths", "markdown", "slide"),
        cell(PATHS),
        cell("## Broken", "markdown", "slide"),
        cell("1 / 0", id="broken"),
    ]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), path)
    return path


@pytest.fixture(scope="module")
def presented(browser, small, tmp_path_factory):
    with presenting(small, tmp_path_factory.mktemp("run")) as presented:
        yield presented


@contextmanager
def shown(browser, presented):
    """A page with the deck, its explorers alive; at the end it must have had no complaints."""
    page = browser.new_page(viewport={"width": 1280, "height": 720})
    host = presented.address.split("/")[2]
    ours = ("data:", "blob:", f"http://{host}/", f"ws://{host}/")
    complaints = []
    page.on(
        "request",
        lambda request: request.url.startswith(ours) or complaints.append(f"asks {request.url}"),
    )
    page.on("console", lambda said: said.type == "error" and complaints.append(said.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    try:
        page.goto(presented.address)
        page.wait_for_selector("html.live-ready", state="attached", timeout=60_000)
        yield page
        assert not complaints
    finally:
        page.close()


def go_to_explorer(page):
    """Turns to the first explorer's slide; returns the explorer."""
    page.evaluate(
        """() => {
            const slide = document.querySelector(".live").closest("section");
            const { h, v } = Reveal.getIndices(slide);
            Reveal.slide(h, v, 99);
        }"""
    )
    panel = page.locator(".live").first
    panel.locator("td").first.wait_for()
    return panel


def place(page):
    """Which slide is shown."""
    return page.evaluate("JSON.stringify(Reveal.getIndices())")


def readout(panel):
    return panel.locator(".widget-html-content").inner_text()


def pixels(panel):
    return Image.open(io.BytesIO(panel.locator("img").screenshot())).convert("RGB")


def moved(page, panel, move):
    """Does `move`; waits until readout and picture have changed; the slide is still the same."""
    before, text, picture = place(page), readout(panel), pixels(panel)
    move()
    wait_for(lambda: readout(panel) != text, "a new readout")
    wait_for(lambda: ImageChops.difference(pixels(panel), picture).getbbox(), "a new picture")
    assert place(page) == before


def to_other_end(page, panel):
    """Moves the first slider to an end at which it is not, wherever the last test left it.

    That test's page may have been closed before its last moves had reached the kernel.
    """
    handle = panel.locator(".noUi-handle").first
    handle.focus()
    at_end = handle.get_attribute("aria-valuenow") == handle.get_attribute("aria-valuemax")
    moved(page, panel, lambda: page.keyboard.press("Home" if at_end else "End"))


def middle(locator):
    box = locator.bounding_box()
    return box["x"] + box["width"] / 2, box["y"] + box["height"] / 2


@pytest.mark.browser
@pytest.mark.parametrize("size", [(1280, 720), (1920, 1080), (1000, 600)], ids=str)
def test_a_slider_follows_keys_and_mouse_and_the_slide_stays(size, browser, presented):
    with shown(browser, presented) as page:
        page.set_viewport_size(dict(zip(("width", "height"), size, strict=True)))
        panel = go_to_explorer(page)
        bits, outlier = panel.locator(".noUi-handle").all()
        bits.focus()
        moved(page, panel, lambda: page.keyboard.press("Home"))
        moved(page, panel, lambda: page.keyboard.press("ArrowRight"))
        assert bits.get_attribute("aria-valuenow") == "3.0"

        track = panel.locator(".noUi-base").last.bounding_box()
        goal = track["x"] + 0.6 * track["width"]  # on the outlier slider's grid of 40 steps

        def drag():
            page.mouse.move(*middle(outlier))
            page.mouse.down()
            page.mouse.move(goal, middle(outlier)[1], steps=6)
            page.mouse.up()

        moved(page, panel, drag)
        assert middle(outlier)[0] == pytest.approx(goal, abs=2)  # px: it lies where the mouse is
        moved(page, panel, lambda: page.keyboard.press("Home"))  # as other tests found it


@pytest.mark.browser
@pytest.mark.parametrize("control", [".noUi-handle", "select"])
def test_no_key_on_a_control_turns_the_slide(control, browser, presented):
    with shown(browser, presented) as page:
        panel = go_to_explorer(page)
        before = place(page)
        panel.locator(control).first.focus()
        for key in ["PageDown", "PageUp", "ArrowDown", "ArrowUp", "End", "n", "p", "j", "b", "o"]:
            page.keyboard.press(key)
        if control != "select":  # there it opens the list, as it should
            page.keyboard.press("Space")
        assert place(page) == before
        assert not page.evaluate("Reveal.isOverview() || Reveal.isPaused()")
        page.keyboard.press("Escape")  # the deck has the keys again
        page.keyboard.press("n")
        assert place(page) != before


@pytest.mark.browser
def test_a_swipe_on_an_explorer_does_not_turn_the_slide(browser, presented):
    swipe = """([element, from, to]) => {
        const send = (type, clientX) => element.dispatchEvent(new PointerEvent(
            type, { pointerType: "touch", clientX, clientY: 300, bubbles: true }));
        send("pointerdown", from); send("pointermove", to); send("pointerup", to);
    }"""
    with shown(browser, presented) as page:
        panel = go_to_explorer(page)
        before = place(page)
        page.evaluate(swipe, [panel.locator(".noUi-handle").first.element_handle(), 800, 300])
        assert place(page) == before
        heading = page.locator("section.present h2").last.element_handle()
        page.evaluate(swipe, [heading, 800, 300])
        assert place(page) != before  # elsewhere a swipe does turn it


@pytest.mark.browser
def test_all_windows_and_a_reload_show_the_same(browser, presented):
    with shown(browser, presented) as room, shown(browser, presented) as desk:
        panel, mirror = go_to_explorer(room), go_to_explorer(desk)
        to_other_end(room, panel)
        wait_for(lambda: readout(mirror) == readout(panel), "the other window")
        text = readout(panel)
        room.reload()
        room.wait_for_selector("html.live-ready", state="attached")
        panel = go_to_explorer(room)
        wait_for(lambda: readout(panel) == text, "the same readout")
        to_other_end(room, panel)


@pytest.mark.browser
def test_the_speakers_view_is_alive_too(browser, presented):
    with shown(browser, presented) as page:
        with page.expect_popup() as popup:
            page.keyboard.press("s")
        page.wait_for_timeout(500)  # the window asks for the deck's place when it is ready
        panel = go_to_explorer(page)
        frames = wait_for(lambda: popup.value.frames[1:], "the speaker's slides")
        mirror = frames[0].locator(".live").first
        mirror.locator("td").first.wait_for(timeout=60_000)
        for _ in range(2):
            to_other_end(page, panel)
            wait_for(lambda: readout(mirror) == readout(panel), "the speaker's slide")
        popup.value.close()


@pytest.mark.browser
def test_paths_work_and_the_course_stays_as_it_was(browser, presented, small):
    with shown(browser, presented) as page:
        printed = page.locator(".jp-RenderedText", has_text="kernel").first.text_content()
    assert printed.split()[0] == "True"
    assert nbformat.read(small, as_version=4).cells[2].outputs == []
    assert not (ROOT / "data" / WRITTEN).exists()


@pytest.mark.browser
def test_a_failing_cell_is_seen_on_the_slide_and_in_the_terminal(browser, presented):
    with shown(browser, presented) as page:
        page.locator("section", has_text="ZeroDivisionError").first.wait_for(state="attached")
    assert "cell broken: ZeroDivisionError: division by zero" in presented.errors


@pytest.mark.browser
@pytest.mark.parametrize("place", ["", "assets/start.js", "kernel"])
@pytest.mark.parametrize("query", ["", "?token=", "?token=0123456789abcdef0123456789abcdef"])
def test_who_has_no_token_gets_nothing(place, query, presented):
    address = presented.address.partition("?")[0]
    address = address.rpartition("/")[0] + f"/{place}" if place else address
    assert httpx.get(address + query, trust_env=False).status_code == 403


def look(page):
    """What look_at_slides.js finds wrong with the deck."""
    return page.evaluate(LOOK)["complaints"]


@pytest.mark.browser
def test_every_slide_fits(browser, presented):
    with shown(browser, presented) as page:
        panel = go_to_explorer(page)
        panel.locator("img").wait_for()
        assert look(page) == []


@pytest.mark.browser
def test_a_real_notebook(browser, tmp_path):
    before = REAL.read_bytes()
    with presenting("01", tmp_path) as presented, shown(browser, presented) as page:
        panel = go_to_explorer(page)
        slider = panel.locator(".noUi-handle").first
        slider.focus()
        at_end = slider.get_attribute("aria-valuenow") == slider.get_attribute("aria-valuemax")
        moved(page, panel, lambda: page.keyboard.press("ArrowLeft" if at_end else "ArrowRight"))
        assert look(page) == []
    assert "Error" not in presented.errors
    assert REAL.read_bytes() == before


def alive(process_id):
    try:
        os.kill(process_id, 0)
    except ProcessLookupError:
        return False
    return True


def kernel_of(browser, presented):
    """The kernel's process id, which the small notebook prints."""
    with shown(browser, presented) as page:
        text = page.locator(".jp-RenderedText", has_text="kernel").first.text_content()
    return int(re.search(r"kernel (\d+)", text)[1])


@pytest.mark.browser
def test_ctrl_c_ends_the_kernel_and_leaves_nothing(browser, small, tmp_path):
    with presenting(small, tmp_path) as presented:
        kernel = kernel_of(browser, presented)
        assert alive(kernel)
        assert presented.end() == 0
    assert not alive(kernel)
    assert "Traceback" not in presented.errors
    assert [each.name for each in tmp_path.iterdir()] == ["stderr.txt"]


@pytest.mark.browser
def test_a_kernel_that_dies_is_noticed(browser, small, tmp_path):
    with presenting(small, tmp_path) as presented:
        kernel = kernel_of(browser, presented)
        with shown(browser, presented) as page:
            os.kill(kernel, signal.SIGKILL)
            page.wait_for_selector("body.live-gone", timeout=60_000)
        assert presented.process.wait(60) == 1
    assert "the kernel has ended" in presented.errors
