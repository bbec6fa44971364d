"""The notebooks' explorers in real JupyterLab, moved by keyboard and mouse in a headless browser.

Where there is no Chromium or Chrome the tests are skipped and the summary says so; with
CHAPTER13_REQUIRE_BROWSER=1 that is a failure. Screenshots are left in screenshots/.
"""

import io
import shutil

import pytest
from PIL import Image, ImageChops

from tools.browser import NOTEBOOK, ROOT, explorer, jupyterlab, wait_for
from tools.notebooks import WIDGET_VIEW

NOTEBOOKS = [
    path
    for path in sorted((ROOT / "notebooks").glob("[0-9][0-9]_*.ipynb"))
    if "chapter13.explorers" in path.read_text(encoding="utf-8")
]
WHAT = "THE EXPLORERS WERE"
SCREENSHOTS = ROOT / "screenshots"

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def lab(browser, tmp_path_factory):
    """JupyterLab on copies of the notebooks, beside an empty data/ for what they write."""
    course = tmp_path_factory.mktemp("course")
    (course / "data").mkdir()
    (course / "notebooks").mkdir()
    for path in NOTEBOOKS:
        shutil.copy(path, course / "notebooks")
    with jupyterlab(course / "notebooks") as lab:
        yield lab


def pixels(locator):
    return Image.open(io.BytesIO(locator.screenshot())).convert("RGB")


def moved(panel, move):
    """Does `move`; waits until readout and picture have both changed."""
    text, picture = panel.locator(".widget-html-content"), panel.locator("img")
    old_text, old_pixels = text.inner_text(), pixels(picture)
    move()
    wait_for(lambda: text.inner_text() != old_text, "a new readout")
    wait_for(lambda: ImageChops.difference(pixels(picture), old_pixels).getbbox(), "a new picture")


def drag(page, handle, distance):
    box = handle.bounding_box()
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    page.mouse.move(x, y)
    page.mouse.down()
    page.mouse.move(x + distance, y, steps=6)
    page.mouse.up()


def check_outputs(notebook):
    """Every code cell has run, without an error and without a word on stderr."""
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] != "code" or not source.strip():
            continue
        assert cell["execution_count"], f"this cell did not run:\n{source}"
        for output in cell["outputs"]:
            if "raises-exception" not in cell["metadata"].get("tags", []):
                failure = f"{source}\n\n{output.get('ename')}: {output.get('evalue')}"
                assert output["output_type"] != "error", failure
            assert output.get("name") != "stderr", f"{source}\n\n{output.get('text')}"
            if "image/png" in output.get("data", {}):
                assert output["metadata"]["image/png"]["alt"], f"a picture without words:\n{source}"


def letters_stay_in(panel, page):
    """Types on every control what would delete a cell, make it Markdown, and add one above it."""
    cells = f"{NOTEBOOK}.content.widgets.map(cell => cell.model.type + cell.model.id)"
    before = page.evaluate(cells)
    for control in panel.locator(".noUi-handle, select, input, button").all():
        if control.is_visible() and control.is_enabled():
            control.focus()
            page.keyboard.type("ddma")
    assert page.evaluate(cells) == before


def a_lost_kernel_is_told(panel, page):
    """Restarts the kernel: the panel, which no longer answers, says so and dims its picture."""
    words = "panel => getComputedStyle(panel, '::after').content"
    assert "kernel" not in panel.evaluate(words)
    page.evaluate(f"{NOTEBOOK}.sessionContext.session.kernel.restart()")
    wait_for(lambda: "kernel has gone" in panel.evaluate(words), "words on the lost kernel")
    assert panel.locator("img").evaluate("img => getComputedStyle(img).opacity") < "0.5"


def the_next_day(page, lab, name):
    """Saves the notebook, ends its kernel and opens it again: each panel has left its picture."""
    live = page.evaluate(f"{NOTEBOOK}.context.model.toJSON()")
    panels = [
        index
        for index, cell in enumerate(live["cells"])
        if any(WIDGET_VIEW in output.get("data", {}) for output in cell.get("outputs", ()))
    ]
    assert panels
    page.evaluate("jupyterapp.commands.execute('docmanager:save')")
    page.wait_for_function(f"!{NOTEBOOK}.context.model.dirty")
    lab.shut_down(name)
    lab.open(page, name)
    for index in panels:
        page.evaluate(f"{NOTEBOOK}.content.scrollToItem({index}, 'center')")
        cell = page.locator(f'.jp-Cell[data-windowed-list-index="{index}"]')
        cell.locator(".jp-RenderedImage img").first.wait_for()
        assert "Error displaying widget" not in cell.inner_text()


def test_there_are_explorers_to_test():
    assert NOTEBOOKS


@pytest.mark.timeout(1800)  # a notebook that quantizes whole models, with one thread
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_explorer_moves_in_jupyterlab(path, browser, lab):
    SCREENSHOTS.mkdir(exist_ok=True)
    page = browser.new_page(viewport={"width": 1400, "height": 1000})
    ours = ("data:", "blob:", lab.url, lab.url.replace("http", "ws"))
    outside, complaints = [], []
    page.on("request", lambda request: request.url.startswith(ours) or outside.append(request.url))
    page.on("console", lambda said: said.type == "error" and complaints.append(said.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.set_default_timeout(120_000)
    try:
        check_outputs(lab.run_all(page, path.name))
        panel = explorer(page)
        page.wait_for_timeout(500)  # what the cells said last may still be on its way to the panel
        readout = panel.locator(".widget-html-content").inner_text()
        assert "do not apply" not in readout, f"the notebook leaves its explorer dimmed: {readout}"
        handle = panel.locator(".noUi-handle").first
        handle.focus()
        # a slider that stands at its end has only one way to go
        at_end = handle.get_attribute("aria-valuenow") == handle.get_attribute("aria-valuemax")
        moved(panel, lambda: page.keyboard.press("ArrowLeft" if at_end else "ArrowRight"))
        if path == NOTEBOOKS[0]:  # the mouse works alike everywhere
            moved(panel, lambda: drag(page, handle, -60 if at_end else 60))
        assert panel.locator("img").get_attribute("title"), "a picture without words"
        letters_stay_in(panel, page)
        panel.screenshot(path=SCREENSHOTS / f"{path.stem}_panel.png")
        a_lost_kernel_is_told(panel, page)
        panel.screenshot(path=SCREENSHOTS / f"{path.stem}_lost.png")
        the_next_day(page, lab, path.name)
        assert not outside, f"requests to the outside: {outside}"
        assert not complaints, f"the browser's console says: {complaints}"
    finally:
        page.screenshot(path=SCREENSHOTS / f"{path.stem}.png")  # of a failure, too
        page.close()
        lab.shut_down(path.name)
