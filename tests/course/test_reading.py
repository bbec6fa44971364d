"""For those who run nothing: exported pages, tables beside pictures, links, the glossary."""

import re
from urllib.parse import unquote

import pytest
from bs4 import BeautifulSoup
from nbconvert import HTMLExporter

from tools import notebooks

ROOT = notebooks.ROOT
GLOSSARY = ROOT / "notebooks" / "glossary.md"
DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [
    ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "tests" / "mutants.md", GLOSSARY, *DOCS
]  # fmt: skip
COURSE = pytest.mark.parametrize("path", notebooks.numbered(), ids=lambda path: path.name)


# --- notebooks as HTML --------------------------------------------------------------------------

pages = {}


def page(path):
    """A notebook as nbconvert exports it, without running it."""
    if path not in pages:
        html, _ = HTMLExporter().from_notebook_node(notebooks.read(path))
        pages[path] = BeautifulSoup(html, "html.parser").main
    return pages[path]


@COURSE
def test_words_follow_each_picture(path):
    """nbconvert 7.17 writes "No description has been provided" into `alt`; ours stand below."""
    outputs = [
        output
        for cell in notebooks.read(path).cells
        for output in cell.get("outputs", [])
        if "image/png" in output.get("data", {})
    ]
    images = page(path).find_all("img")
    assert outputs
    assert len(images) == len(outputs)
    for image, output in zip(images, outputs, strict=True):
        assert image["src"].startswith("data:image/png;base64,")
        assert image["alt"].strip()
        assert image.find_next("p").text == output.metadata["image/png"]["alt"]


@COURSE
def test_nothing_in_the_page_needs_a_kernel(path):
    for script in page(path).find_all("script"):
        assert "widget" not in script.get("type", "")
    shown = page(path).text
    for leftover in ("Error displaying widget", "Explorer(", "VBox(", "<IPython.core"):
        assert leftover not in shown
    assert not page(path).select('[data-mime-type="application/vnd.jupyter.stderr"]')


@COURSE
def test_math_stands_between_dollars(path):
    """Else MathJax leaves it as it is."""
    soup = BeautifulSoup(str(page(path)), "html.parser")
    for code in soup.find_all(["pre", "code"]):
        code.decompose()
    words = re.sub(r"\$\$.+?\$\$|\$[^$\n]+\$", "", soup.text, flags=re.DOTALL)
    assert re.findall(r"\\[a-zA-Z]+.{20}", words) == []
    assert "$$" not in words


@COURSE
def test_links_of_the_page_lead_somewhere(path):
    for link in page(path).find_all("a", href=True):
        name, _, anchor = unquote(link["href"]).partition("#")
        if re.match(r"[a-z]+:", name):
            continue
        file = (path.parent / name).resolve() if name else path
        assert file.is_file(), link["href"]
        if anchor and file.suffix == ".ipynb":
            assert anchor in {unquote(tag["id"]) for tag in page(file).find_all(id=True)}


def displayed_panels(notebook):
    """Names of the explorers that a cell of the notebook ends with."""
    sources = [cell.source for cell in notebook.cells if cell.cell_type == "code"]
    made = re.findall(r"^(\w+) = (?:\w+\.)?explore_\w+\(", "\n".join(sources), re.MULTILINE)
    return [name for name in made if any(s.splitlines()[-1:] == [name] for s in sources)]


@COURSE
def test_other_settings_are_shown_beside_each_explorer(path):
    """For those who run nothing: pictures or a table of other settings, or what is read there."""
    code = [cell for cell in notebooks.read(path).cells if notebooks.is_code(cell)]
    for name in displayed_panels(notebooks.read(path)):
        (shown,) = (cell for cell in code if cell.source.splitlines()[-1] == name)
        assert "image/png" in shown.outputs[0].data, f"{name} has left no picture"
        other = re.compile(rf"\b{name}\.(at|snapshots|table)\(")
        asked = [cell for cell in code if other.search(cell.source)]
        assert asked, f"{name} is shown at one setting alone"
        for cell in asked:
            if f"{name}.snapshots(" in cell.source:
                assert "image/png" in cell.outputs[0].data, cell.id
            if f"{name}.table(" in cell.source:
                assert "<table" in cell.outputs[0].data["text/html"], cell.id


def test_there_are_explorers_to_ask_for():
    panels = {
        path.name[:2]: displayed_panels(notebooks.read(path)) for path in notebooks.numbered()
    }
    assert panels["00"] == ["numbers", "panel"]
    assert panels["06"] == ["columns", "panel"]
    assert all(panels.values())


# --- links between files ------------------------------------------------------------------------


def slug(heading):
    """The anchor that GitHub gives to a heading of a Markdown file."""
    kept = re.sub(r"[^\w\- ]", "", heading.strip().lower())
    return kept.replace(" ", "-")


def anchors(file):
    if file.suffix == ".ipynb":
        return notebooks.anchors(notebooks.read(file))
    return {slug(heading) for heading in re.findall(r"^#+ (.*)$", prose(file), re.MULTILINE)}


def prose(file):
    """A Markdown file without its blocks of code."""
    return re.sub(r"^```.*?^```", "", file.read_text(), flags=re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("file", PAGES, ids=lambda file: file.name)
def test_links_of_markdown_files_lead_somewhere(file):
    text = prose(file)
    assert not re.search(r"!\[\s*\]", text), "a picture without words"
    for target in re.findall(r"\]\(([^()\s]+)\)", text):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        place = file.parent / name if name else file
        assert place.exists(), target
        assert not anchor or anchor in anchors(place), target


def test_slugs_are_github_s():
    assert slug("Windows, macOS, or without make") == "windows-macos-or-without-make"
    assert slug("llama.cpp") == "llamacpp"
    assert slug("LLM.int8() & `Q4_0`") == "llmint8--q4_0"


# --- the glossary -------------------------------------------------------------------------------


def terms():
    """Term -> what the glossary says of it."""
    parts = re.split(r"^## (.*)$", GLOSSARY.read_text(), flags=re.MULTILINE)[1:]
    return dict(zip(parts[::2], parts[1::2], strict=True))


def test_glossary_goes_from_a_to_z():
    headings = re.findall(r"^## (.*)$", GLOSSARY.read_text(), re.MULTILINE)
    assert len(headings) > 50
    assert headings == sorted(set(headings), key=str.casefold)


# Terms of other programs and papers. Their entries lead to the nearest place in a notebook, or to
# the source.
ELSEWHERE = {
    "compressed-tensors",
    "E5M2",
    "IQ types",
    "Marlin",
    "SIMD",
    "throughput",
}


def test_terms_from_elsewhere_are_in_the_glossary():
    assert set(terms()) >= ELSEWHERE


@pytest.mark.parametrize("term", terms())
def test_glossary_leads_to_a_notebook_that_uses_the_term(term):
    told = terms()[term]
    links = re.findall(r"\]\(([^()\s]+\.ipynb)#[^()\s]+\)", told)
    assert told.count("$") % 2 == 0
    if term in ELSEWHERE:
        assert links or "](https://" in told
        return
    assert links, "no link to a place in a notebook"
    cells = notebooks.read(GLOSSARY.parent / links[0]).cells
    text = " ".join(cell.source for cell in cells if cell.cell_type == "markdown")
    # emphasis, `clip_search` and round-to-nearest are written otherwise, and are the same words
    text, word = (
        re.sub(r"[\s_-]+", " ", words.replace("*", "")).casefold()
        for words in (text, term.removesuffix(" quantization"))
    )
    assert word in text, f"{links[0]} does not say {term}"
