"""`make slides`: a reveal.js deck of each notebook in build/slides/, and an index.html of them.

    python -m tools.slides.build [NOTEBOOK...]      all numbered ones if none is named

The decks show the stored notebooks; nothing is executed. nbconvert turns the cells into HTML
(template/slides), and fit.js lays them out in the browser, so that no slide must be scrolled. A
deck only loads files from build/slides/assets, so it can also be opened as a file.

reveal.js and MathJax come from npm, in the versions and with the hashes of package-lock.json.
"""

import argparse
import html
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
from nbconvert import SlidesExporter

from chapter13.atomic import replacing
from tools.notebooks import ROOT, numbered

HERE = Path(__file__).resolve().parent
PACKAGES = HERE / "node_modules"
DECKS = ROOT / "build" / "slides"
COURSE = "Quantizing language models, by hand"

ASSETS = [
    PACKAGES / "reveal.js" / "dist" / "reset.css",
    PACKAGES / "reveal.js" / "dist" / "reveal.css",
    PACKAGES / "reveal.js" / "dist" / "reveal.js",
    PACKAGES / "reveal.js" / "plugin" / "notes" / "notes.js",
    PACKAGES / "mathjax" / "es5" / "tex-svg.js",
    HERE / "slides.css",
    HERE / "mathjax-options.js",
    HERE / "fit.js",
    HERE / "start.js",
]
INDEX = """\
<!DOCTYPE html>
<html lang="en">
<meta charset="utf-8">
<title>{course}</title>
<style>body {{ font: 24px/1.6 sans-serif; max-width: 40em; margin: 2em auto; }}</style>
<h1>{course}</h1>
<p>Arrow keys turn the slides, S opens the speaker's view, O the overview, F the full screen.</p>
<ul>
{links}
</ul>
</html>
"""


class NoPackages(Exception):
    """Packages from npm that the slides need are missing and could not be fetched."""


def locked(lockfile):
    """{package: version} of an npm lock file."""
    packages = json.loads(lockfile.read_text(encoding="utf-8"))["packages"]
    return {name: package["version"] for name, package in packages.items() if name}


def fetch_packages():
    """Install the packages of package-lock.json if they are missing. NoPackages says what to do."""
    written_last = PACKAGES / ".package-lock.json"
    if written_last.exists() and locked(written_last) == locked(HERE / "package-lock.json"):
        return
    npm = shutil.which("npm")
    if npm is None:
        raise NoPackages(
            "The slides need npm, once, to fetch reveal.js and MathJax. On Debian or Ubuntu: "
            "sudo apt-get install npm; elsewhere it comes with Node.js."
        )
    done = subprocess.run([npm, "ci"], cwd=HERE, capture_output=True, text=True)
    if done.returncode:
        raise NoPackages(f"npm could not fetch reveal.js and MathJax:\n{done.stderr.strip()}")


def write(path, text):
    """Write atomically: a reader of `path` sees the old text or the new one."""
    with replacing(path) as part:
        part.write_text(text, encoding="utf-8", newline="\n")


def title_page(notebook):
    """Split the opening into the title page, for the audience, and the speaker's notes.

    The paragraph with the minutes and the needs goes into the notes. Returns the title.
    """
    opening = notebook.cells[0]
    heading, *paragraphs = re.split(r"\n\s*\n", opening.source.strip())
    practical = [each for each in paragraphs if re.search(r"\bminutes?\b", each)]
    about = [each for each in paragraphs if each not in practical]
    opening.source = "\n\n".join([COURSE, heading, *about])
    notes = nbformat.v4.new_markdown_cell("\n\n".join(practical))
    notes.metadata.slideshow = {"slide_type": "notes"}
    notebook.cells.insert(1, notes)
    notebook.metadata.title = heading.removeprefix("# ")
    return notebook.metadata.title


def link_decks(source):
    """Markdown whose links lead from deck to deck; links to other files become plain text."""
    parts = re.split(r"(```.*?```|`[^`]*`)", source, flags=re.DOTALL)  # text, code, text, code...
    for index in range(0, len(parts), 2):
        text = re.sub(r"\]\((\d\d_\w+)\.ipynb(#[^)\s]*)?\)", r"](\1.html\2)", parts[index])
        elsewhere = r"(?<!!)\[([^\[\]]+)\]\((?!https?:|\d\d_\w+\.html|#)[^()\s]+\)"
        parts[index] = re.sub(elsewhere, r"\1", text)
    return "".join(parts)


def without_captions(outputs):
    """The outputs without captions: HTML that repeats the alt text of the picture before it."""
    alt = None
    for output in outputs:
        data = output.get("data", {})
        words = html.unescape(re.sub(r"<[^>]+>", "", data.get("text/html", ""))).strip()
        if not words or words != alt:
            yield output
        alt = output.get("metadata", {}).get("image/png", {}).get("alt", alt)


def deck(path):
    """(title, HTML) of the notebook's deck. Needs no packages."""
    notebook = nbformat.read(path, as_version=4)
    title = title_page(notebook)
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            cell.source = link_decks(cell.source)
        else:
            cell.outputs = list(without_captions(cell.outputs))
    exporter = SlidesExporter(
        template_name="slides",
        extra_template_basedirs=[str(HERE / "template")],
        exclude_input_prompt=True,
        exclude_output_prompt=True,
        exclude_anchor_links=True,
    )
    return title, exporter.from_notebook_node(notebook)[0]


def build(paths, folder=DECKS):
    """Write the decks of the notebooks, their assets, and the index; returns the decks' paths.

    Raises NoPackages if reveal.js and MathJax are missing and cannot be fetched.
    """
    fetch_packages()
    (folder / "assets").mkdir(parents=True, exist_ok=True)
    for asset in ASSETS:
        shutil.copy(asset, folder / "assets" / asset.name)
    decks, links = [], []
    for path in paths:
        title, page = deck(path)
        decks.append(folder / f"{Path(path).stem}.html")
        write(decks[-1], page)
        links.append(f'<li><a href="{decks[-1].name}">{html.escape(title)}</a></li>')
    write(folder / "index.html", INDEX.format(course=COURSE, links="\n".join(links)))
    return decks


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("notebooks", nargs="*", type=Path, help="default: all numbered notebooks")
    arguments = parser.parse_args()
    try:
        decks = build(arguments.notebooks or numbered())
    except NoPackages as error:
        sys.exit(str(error))
    print(f"{len(decks)} decks: open {DECKS / 'index.html'}")


if __name__ == "__main__":
    main()
