"""Every slide of every deck in a headless browser: it fits its screen and can be read from afar.

Where there is no Chromium or Chrome, or no npm, the tests are skipped and the summary says so; with
CHAPTER13_REQUIRE_BROWSER=1 that is a failure.
"""

import base64
import functools
import http.server
import json
import re
import threading
from pathlib import Path

import nbformat
import numpy as np
import pytest
from conftest import from_npm, skip_or_fail
from pypdfium2 import PdfDocument
from pypdfium2.raw import FPDF_PAGEOBJ_IMAGE

from chapter13.plots import Picture
from tools.notebooks import numbered
from tools.slides import build
from tools.slides.pdf import print_pdf

pytestmark = pytest.mark.browser

WHAT = "THE SLIDES WERE"
LOOK = (Path(__file__).parent / "look_at_slides.js").read_text(encoding="utf-8")
PIXEL = base64.b64encode(Picture(np.zeros((9, 60, 3), np.uint8), "black").png).decode()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with all decks."""
    folder = tmp_path_factory.mktemp("slides")
    try:
        from_npm(build.fetch_packages)
        build.build(numbered(), folder)
    except build.NoPackages as error:
        skip_or_fail(WHAT, error)
    return folder


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def address(folder):
    """Where the folder is served: a free port on 127.0.0.1."""
    handler = functools.partial(Quiet, directory=folder)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def look(browser, url):
    """(complaints, facts) of the deck at `url`, all of its slides shown one after the other."""
    complaints = []
    page = browser.new_page(viewport={"width": 1280, "height": 720})
    ours = ("data:", url.rpartition("/")[0])
    page.on(
        "request",
        lambda request: (
            request.url.startswith(ours) or complaints.append(f"outside request: {request.url}")
        ),
    )
    page.on("console", lambda said: said.type == "error" and complaints.append(said.text))
    page.on("pageerror", lambda error: complaints.append(f"script error: {error}"))
    try:
        page.goto(url)
        page.wait_for_selector(".reveal.ready", state="attached", timeout=60_000)
        facts = page.evaluate(LOOK)
        return complaints + facts.pop("complaints"), facts
    finally:
        page.close()


@pytest.fixture(scope="module")
def seen(browser, address):
    """name of a deck -> what `look` says about it; each deck is looked at once."""
    return functools.cache(lambda name: look(browser, f"{address}/{name}.html"))


def shown(notebook):
    """The cells that a deck shows."""
    hidden = {"skip", "notes"}
    return [
        cell
        for cell in notebook.cells
        if cell.metadata.get("slideshow", {}).get("slide_type") not in hidden
    ]


def pictures(notebook):
    outputs = [output for cell in shown(notebook) for output in cell.get("outputs", [])]
    return [output for output in outputs if "image/png" in output.get("data", {})]


def words(text):
    """The longer words of Markdown or plain text, without formulas and addresses."""
    return set(re.findall(r"[A-Za-z]{4,}", re.sub(r"\$[^$]*\$|\]\([^)]*\)", "", text)))


def pictures_on(page):
    """Each picture as it is seen on a page of a PDF: gray pixels."""
    paper = page.render(scale=1, grayscale=True).to_numpy().astype(float)
    for image in page.get_objects(filter=[FPDF_PAGEOBJ_IMAGE]):
        left, bottom, right, top = map(round, image.get_bounds())
        yield paper[540 - top : 540 - bottom, left:right]


def blank(picture):
    return np.ptp(picture) == 0  # gray levels


every_deck = pytest.mark.parametrize("path", numbered(), ids=lambda path: path.stem)


@every_deck
def test_every_slide_fits_and_can_be_read(path, seen):
    complaints, facts = seen(path.stem)
    assert not complaints
    notebook = nbformat.read(path, as_version=4)
    code = [cell.source.strip() for cell in shown(notebook) if cell.cell_type == "code"]
    assert facts["code"] == code  # as text, none lost and none twice, in order
    assert facts["alts"] == [
        output.metadata["image/png"]["alt"].strip() for output in pictures(notebook)
    ]
    assert facts["title"] in notebook.cells[0].source
    for cell in notebook.cells:
        if cell.metadata.slideshow.slide_type == "notes":
            assert any(words(cell.source) <= words(said) for said in facts["notes"])
    assert facts["formulas"] or "$$" not in "".join(cell.source for cell in shown(notebook))


@every_deck
def test_the_pdf_has_a_page_for_each_slide_and_no_blank_pictures(path, browser, folder, seen):
    _, facts = seen(path.stem)
    with PdfDocument(print_pdf(browser, folder / f"{path.stem}.html")) as pdf:
        assert {page.get_size() for page in pdf} == {(960, 540)}  # points: 1280 x 720 px
        pages = [list(pictures_on(page)) for page in pdf]
    assert [len(page) for page in pages] == facts["pictures"]
    assert not [picture for page in pages for picture in page if blank(picture)]


def test_a_deck_opens_as_a_file(browser, folder):
    path = numbered()[1]
    complaints, facts = look(browser, (folder / f"{path.stem}.html").as_uri())
    assert not complaints
    assert facts["slides"] > 1


def test_the_index_lists_the_decks(browser, folder, address):
    page = browser.new_page()
    page.goto(f"{address}/index.html")
    names = page.eval_on_selector_all("li a", "links => links.map(a => a.getAttribute('href'))")
    page.close()
    assert names == [f"{path.stem}.html" for path in numbered()]


def test_the_speakers_view_shows_the_notes(browser, folder, address):
    page = browser.new_page()
    page.goto(f"{address}/{numbered()[0].stem}.html")
    page.wait_for_selector(".reveal.ready", state="attached")
    with page.expect_popup() as popup:
        page.keyboard.press("s")
    view = popup.value
    view.wait_for_function("document.querySelector('.speaker-controls-notes .value')?.innerText")
    assert "minutes" in view.inner_text(".speaker-controls-notes .value")
    page.close()


def cell(source, kind="markdown", role="subslide", **fields):
    new = nbformat.v4.new_markdown_cell if kind == "markdown" else nbformat.v4.new_code_cell
    return new(source, metadata={"slideshow": {"slide_type": role}}, **fields)


def picture(height, **metadata):
    """A cell with a black picture, 1000 pixels wide."""
    png = Picture(np.zeros((height, 1000, 3), np.uint8), "black").png
    data = {"image/png": base64.b64encode(png).decode()}
    output = nbformat.v4.new_output("display_data", data, metadata={"image/png": metadata})
    return cell("plot()", "code", outputs=[output])


LONG = "All of this is one paragraph, which cannot be broken. " * 120
WIDE = "<div><div style='width: 2000px'>wide</div></div>"
INNER = "<div style='height: 50px; overflow: auto'>" + "<p>line</p>" * 9 + "</div>"
FAULTS = {
    "sticks out below": [cell(f"## Long\n\n{LONG}")],
    "sticks out at the side": [cell(f"## Wide\n\n{WIDE}")],
    "has to be scrolled": [cell(f"## Inner\n\n{INNER}")],
    "px letters": [cell("## Small\n\n<p style='font-size: 17px'>small</p>")],
    "without alt": [picture(300, width=1000)],
    "smaller than drawn": [picture(900, width=1000, alt="black")],
    "missing picture": [cell("## Gone\n\n<img src='gone.png' alt='x'>")],
    "math not typeset": [cell("## Math\n\nAn amount: $\\frac{1}{2}")],
    "math with an error": [cell("## Math\n\n$\\frac{1}$")],
    "nothing below the heading": [cell("## Nothing")],
    "outside request": [cell("## Far\n\n<img src='http://127.0.0.2:9/a.png' alt='x'>")],
    "script error": [cell("## Script\n\n<script>missing_function()</script>")],
}


@pytest.fixture
def look_at(browser, folder, address, tmp_path):
    """A function that looks at a deck of these cells."""

    def look_at(cells):
        opening = cell("# 99. A notebook\n\nYou can see it in a minute.", role="slide")
        path = tmp_path / "99_test.ipynb"
        path.write_text(json.dumps(nbformat.v4.new_notebook(cells=[opening, *cells])), "utf-8")
        build.write(folder / "99_test.html", build.deck(path)[1])
        return look(browser, f"{address}/99_test.html")

    return look_at


@pytest.mark.parametrize("fault", FAULTS)
def test_a_bad_slide_is_found(fault, look_at):
    complaints, _ = look_at(FAULTS[fault])
    assert [complaint for complaint in complaints if fault in complaint], complaints


def test_what_is_long_goes_on_on_the_next_slide(look_at):
    text = [f"Paragraph {n} of forty, and some more words to make it longer." for n in range(40)]
    items = "\n".join(f"- item {n}" for n in range(40))
    lines = "\n".join(f"line {n}" for n in range(60))
    prints = [nbformat.v4.new_output("stream", name="stdout", text=lines)]
    complaints, facts = look_at(
        [
            cell("## Text\n\n" + "\n\n".join(text)),
            cell("## Items\n\n" + items),
            cell("## Prints"),
            cell("print()", "code", role="-", outputs=prints),
        ]
    )
    assert not complaints
    told = [f"Paragraph {n} of" for n in range(40)]
    told += [f"item {n} " for n in range(40)] + [f"line {n} " for n in range(60)]
    for words in told:  # each once, none lost
        assert sum((shown + " ").count(words) for shown in facts["words"]) == 1
    assert all(shown.startswith(("Quant", "Text", "Items", "Prints")) for shown in facts["words"])
