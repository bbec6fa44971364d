"""Execute the notebooks, check them, or restore their original versions.

    python tools/notebooks.py rerun [NOTEBOOK...]   execute top to bottom and store the outputs
    python tools/notebooks.py check [NOTEBOOK...]   list the problems of stored notebooks
    python tools/notebooks.py reset                 restore git's version; keep yours as my_*.ipynb

Without names, the commands apply to all numbered notebooks. `rerun` stores nothing that changes
from run to run (widget ids, times, versions), so that two runs give the same bytes. nbval compares
the stored outputs with new ones (`make test`); `check` finds problems that nbval does not see.
"""

import argparse
import hashlib
import json
import re
import shutil
import subprocess
import sys
from itertools import count
from pathlib import Path
from statistics import median

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError
from tqdm import tqdm

from chapter13.atomic import replacing

ROOT = Path(__file__).resolve().parent.parent
NUMBERED = "[0-9][0-9]_*.ipynb"
CELL_TIMEOUT = 600  # seconds, as in `make test`: a cell may quantize a whole model

WIDGET_VIEW = "application/vnd.jupyter.widget-view+json"
KERNEL = {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"}
NOTEBOOK_METADATA = {"kernelspec", "language_info", "rise", "title"}
CELL_METADATA = {"slideshow", "tags", "editable", "jupyter", "nbsphinx", "nbgrader"}
SLIDE_TYPES = {"slide", "subslide", "fragment", "notes", "skip", "-"}

MOST_LINES = 15  # of one code cell
MEDIAN_LINES = 8  # of a notebook's code cells: the median lies below
FIGURE_WITHIN = 8  # code cells
MOST_BYTES = 300_000


def numbered():
    """The course's notebooks, in order."""
    return sorted((ROOT / "notebooks").glob(NUMBERED))


def read(path):
    """The notebook in format 4.5. A cell without an id gets one made from its place and source."""
    raw = json.loads(Path(path).read_text(encoding="utf-8"))
    for index, cell in enumerate(raw["cells"]):
        source = "".join(cell["source"])
        cell.setdefault("id", hashlib.sha1(f"{index} {source}".encode()).hexdigest()[:8])
    raw.update(nbformat=4, nbformat_minor=5)
    return nbformat.reads(json.dumps(raw), as_version=4)


def write(notebook, path):
    """Write the notebook atomically: a reader of `path` sees the old one or the new one."""
    with replacing(path) as part:
        part.write_text(nbformat.writes(notebook) + "\n", encoding="utf-8", newline="\n")


# --- rerun ---------------------------------------------------------------------------------


def execute(path):
    """The notebook at `path`, executed in a new kernel in its own folder, outputs normalized."""
    notebook = read(path)
    cells = sum(is_code(cell) for cell in notebook.cells)
    with tqdm(total=cells, desc=Path(path).name, unit=" cells") as bar:
        client = NotebookClient(
            notebook,
            kernel_name="python3",
            timeout=CELL_TIMEOUT,
            record_timing=False,
            store_widget_state=False,
            on_cell_executed=lambda **_: bar.update(),
            resources={"metadata": {"path": str(Path(path).resolve().parent)}},
        )
        client.execute()
    return normalize(notebook)


def normalize(notebook):
    """Remove from an executed notebook, in place, what differs between two runs; returns it."""
    language = notebook.metadata.get("language_info", {"name": "python"})
    language.pop("version", None)
    kept = {key: notebook.metadata[key] for key in ("rise", "title") if key in notebook.metadata}
    notebook.metadata = nbformat.from_dict(
        {"kernelspec": KERNEL, "language_info": language, **kept}
    )
    for cell in notebook.cells:
        for key in set(cell.metadata) - CELL_METADATA:
            del cell.metadata[key]
        if cell.cell_type == "code":
            cell.outputs = list(stored_outputs(cell.outputs))
    return notebook


def stored_outputs(outputs):
    """Outputs without widget views, with the pieces of one stream joined.

    How a stream is cut into pieces depends on timing, and a widget's id is random; the picture and
    the text beside a widget's view stay. stderr stays too, so that `check` reports it, because it
    would make nbval fail.
    """
    previous = None
    for output in outputs:
        if "data" in output:
            output.data.pop(WIDGET_VIEW, None)
            if not output.data:
                continue
        joins = previous is not None and output.output_type == "stream" == previous.output_type
        if joins and output.name == previous.name:
            previous.text += output.text
        else:
            if previous is not None:
                yield previous
            previous = output
    if previous is not None:
        yield previous


def rerun(paths):
    """Execute and store each notebook; one that fails is left unchanged. Returns 1 if any fails."""
    failed = 0
    for path in paths:
        try:
            notebook = execute(path)
        except (CellExecutionError, CellTimeoutError, DeadKernelError) as error:
            print(f"{path.name}: not stored\n{error}", file=sys.stderr)
            failed += 1
            continue
        write(notebook, path)
        wrong = output_problems(notebook)
        if wrong:
            print(f"{path.name}: stored, with problems:", *wrong, sep="\n  ", file=sys.stderr)
            failed += 1
    return 1 if failed else 0


# --- check ---------------------------------------------------------------------------------


def is_code(cell):
    return cell.cell_type == "code" and bool(cell.source.strip())


def named(index, cell):
    return f"cell {index} ({cell.id})"


def escapes_nbval(cell):
    """Whether a tag or a comment keeps nbval from comparing all outputs of this cell."""
    tags = set(cell.metadata.get("tags", []))
    tagged = {tag for tag in tags if tag.startswith("nbval-")} - {"nbval-check-output"}
    commented = re.search(r"^\s*#\s*(NBVAL_|PYTEST_VALIDATE_)", cell.source, re.MULTILINE)
    return bool(tagged or commented or tags & {"raises-exception", "skip-execution"})


def problems(path):
    """The problems of the notebook stored at `path`: a list of sentences, perhaps empty."""
    path = Path(path)
    notebook = read(path)
    found = output_problems(notebook) + metadata_problems(notebook) + shape_problems(notebook)
    found += text_problems(notebook) + link_problems(notebook, path) + panel_problems(notebook)
    found += navigation_problems(notebook, path.resolve())
    size = path.stat().st_size
    if size >= MOST_BYTES:
        found.append(f"{size / 1000:.0f} kB, should be below {MOST_BYTES / 1000:.0f} kB")
    return found


def output_problems(notebook):
    """Cells not executed in order, errors, stderr, widget views, pictures without alt text."""
    found = []
    expected = count(1)
    for index, cell in enumerate(notebook.cells):
        if cell.cell_type != "code":
            continue
        where = named(index, cell)
        tags = cell.metadata.get("tags", [])
        if not cell.source.strip():
            found.append(f"{where} is empty")
        elif "skip-execution" not in tags:
            # nbval compares nothing in a cell that was never executed
            number = next(expected)
            if cell.execution_count != number:
                found.append(f"{where} has execution count {cell.execution_count}, not {number}")
        for output in cell.outputs:
            if output.output_type == "error" and "raises-exception" not in tags:
                found.append(f"{where} stores an error: {output.ename}: {output.evalue}")
            if output.output_type == "stream" and output.name == "stderr":
                found.append(f"{where} writes to stderr: {output.text.strip()[:200]}")
            data = output.get("data", {})
            if WIDGET_VIEW in data:
                found.append(f"{where} stores a widget view, whose id is random")
            for mime in data:
                alt = output.metadata.get(mime, {}).get("alt", "")
                if mime.startswith("image/") and not alt.strip():
                    found.append(f"{where} has a picture ({mime}) without alt text")
    return found


def metadata_problems(notebook):
    """Metadata that an editor added, and cells without a slide role."""
    found = [f"metadata {key!r}" for key in sorted(set(notebook.metadata) - NOTEBOOK_METADATA)]
    if notebook.metadata.get("kernelspec", {}).get("name") != "python3":
        found.append("the kernel is not python3")
    if "version" in notebook.metadata.get("language_info", {}):
        found.append("the metadata contains the version of Python that ran it")
    for index, cell in enumerate(notebook.cells):
        where = named(index, cell)
        for key in sorted(set(cell.metadata) - CELL_METADATA):
            found.append(f"{where} has metadata {key!r}")
        role = cell.metadata.get("slideshow", {}).get("slide_type")
        if role not in SLIDE_TYPES:
            found.append(f"{where} has slide type {role!r}")
    return found


def shape_problems(notebook):
    """Cells that are too long, or a first picture that comes too late."""
    found = []
    code = [(index, cell) for index, cell in enumerate(notebook.cells) if is_code(cell)]
    if not code:
        return ["no code"]
    lines = [len(cell.source.splitlines()) for _, cell in code]
    for (index, cell), length in zip(code, lines, strict=True):
        if length > MOST_LINES:
            found.append(f"{named(index, cell)} has {length} lines, at most {MOST_LINES}")
    if median(lines) >= MEDIAN_LINES:
        found.append(f"the median cell has {median(lines)} lines, should be below {MEDIAN_LINES}")
    pictures = (
        number
        for number, (_, cell) in enumerate(code, start=1)
        if any(mime.startswith("image/") for out in cell.outputs for mime in out.get("data", {}))
    )
    first = next(pictures, None)
    if first is None or first > FIGURE_WITHIN:
        found.append(f"the first picture comes in code cell {first}, not within {FIGURE_WITHIN}")
    return found


def panel_problems(notebook):
    """Panels that a later cell moves: after Run All they no longer show what the text describes."""
    found, shown = [], set()
    for index, cell in enumerate(notebook.cells):
        if is_code(cell):
            moved = [name for name in sorted(shown) if re.search(rf"\b{name}\.set\(", cell.source)]
            found += [f"{named(index, cell)} moves {name}: use {name}.at(...)" for name in moved]
            last = cell.source.splitlines()[-1]
            if last.isidentifier() and re.search(rf"^{last} = .*\bexplore_", cell.source, re.M):
                shown.add(last)
    return found


def text_problems(notebook):
    """An opening without aim, minutes or needs; an ending without takeaways, exercises, papers."""
    found = []
    cells = notebook.cells
    first_code = next((i for i, cell in enumerate(cells) if is_code(cell)), len(cells))
    opening = "\n".join(cell.source for cell in cells[:first_code])
    if not opening.startswith("# "):
        found.append("does not open with a title")
    for what, words in {
        "what the reader will be able to do": r"\byou (can|will)\b|\bable to\b",
        "how long it takes (minutes)": r"\bminutes?\b",
        "what it needs": r"\bneeds?\b",
    }.items():
        if not re.search(words, opening, re.IGNORECASE):
            found.append(f"the opening does not say {what}")
    text = "\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
    headings = "\n".join(re.findall(r"^#+ .*$", text, re.MULTILINE))
    for word in ("takeaway", "exercise", "paper"):
        if word not in headings.lower():
            found.append(f"no heading has the word {word!r}")
    if re.search(r"!\[\s*\]", text):
        found.append("a picture in the text has no alt text")
    return found


def anchors(notebook):
    """The ids that Jupyter gives to headings: their text with dashes for spaces."""
    text = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    return {
        heading.strip().replace("`", "").replace("*", "").replace(" ", "-")
        for heading in re.findall(r"^#+ +(.*)$", text, re.MULTILINE)
    }


def link_problems(notebook, path):
    """Links to a file or a heading that does not exist; web addresses are not followed."""
    found = []
    for index, cell in enumerate(notebook.cells):
        if cell.cell_type != "markdown":
            continue
        for target in re.findall(r"\]\(([^()\s]+)\)", cell.source):
            if re.match(r"[a-z]+:", target):
                continue
            name, _, anchor = target.partition("#")
            file = path.parent / name if name else path
            if not file.exists():
                found.append(f"{named(index, cell)} links to {name}, which does not exist")
            elif anchor and file.suffix == ".ipynb":
                if anchor not in anchors(notebook if file == path else read(file)):
                    found.append(f"{named(index, cell)} links to {target}: no such heading")
    return found


def title(path):
    """A notebook's first heading."""
    return read(path).cells[0].source.splitlines()[0].removeprefix("# ")


def navigation(path):
    """The last cell of a numbered notebook: links to the notebooks before and after it."""
    course = numbered()
    place = course.index(path)
    links = [("Before", other) for other in course[:place][-1:]]
    links += [("Next", other) for other in course[place + 1 :][:1]]
    words = [f"{which}: [{title(other)}]({other.name})" for which, other in links]
    return " · ".join([*words, "[Glossary](glossary.md)"])


def navigation_problems(notebook, path):
    """A notebook of the course whose last cell is not `navigation`."""
    if path not in numbered() or notebook.cells[-1].source == navigation(path):
        return []
    return [f"the last cell should be: {navigation(path)}"]


def check(paths):
    """Print the problems of each notebook. Returns 1 if there are any."""
    total = 0
    for path in paths:
        found = problems(path)
        total += len(found)
        if found:
            print(path.name, *found, sep="\n  ")
    print(f"{len(paths)} notebooks checked, {total} problems")
    return 1 if total else 0


# --- reset ---------------------------------------------------------------------------------


def git(root, *arguments):
    """git's output, as bytes. Raises CalledProcessError, or FileNotFoundError without git."""
    done = subprocess.run(["git", "-C", root, *arguments], check=True, capture_output=True)
    return done.stdout


def content(raw):
    """The cells of a notebook, given as bytes, without their execution counts.

    Merely saving a notebook in JupyterLab changes the file: it adds Python's version and, if the
    cells have run, the widgets' ids. A file that is not a notebook is returned as bytes with Unix
    line ends, because git may have changed these to Windows'.
    """
    try:
        cells = normalize(nbformat.reads(raw.decode(), as_version=4)).cells
    except (ValueError, KeyError, AttributeError):  # not JSON, or not a notebook's
        return raw.replace(b"\r\n", b"\n")
    for part in cells + [output for cell in cells for output in cell.get("outputs", [])]:
        part.pop("execution_count", None)
    return cells


def reset(root=ROOT):
    """Restore the numbered notebooks of the last commit, and keep changed ones as my_*.ipynb.

    The copy is complete before the notebook is replaced, and both steps are atomic: an interrupted
    reset loses nothing and can be run again.
    """
    folder = Path(root) / "notebooks"
    try:
        listed = git(root, "ls-tree", "--name-only", "HEAD", "notebooks/").decode().splitlines()
    except FileNotFoundError:
        print("reset needs git, which is not installed; nothing was changed", file=sys.stderr)
        return 1
    except subprocess.CalledProcessError:
        listed = []
    names = sorted(Path(name).name for name in listed if Path(name).match(NUMBERED))
    if not names:
        print(
            f"reset needs a clone made by git, and {root} is not one; nothing was changed.\n"
            "Unpack the course again beside this folder instead.",
            file=sys.stderr,
        )
        return 1
    changed = 0
    for path in (folder / name for name in names):
        original = git(root, "show", f"HEAD:./notebooks/{path.name}")
        if path.exists():
            if content(path.read_bytes()) == content(original):
                continue
            print(f"{path.name} is restored; your version is {keep(path).name}")
        else:
            print(f"{path.name} was missing and is restored")
        with replacing(path) as part:
            part.write_bytes(original)
        changed += 1
    if not changed:
        print("All notebooks are unchanged: nothing to restore.")
    return 0


def keep(path):
    """Copy the notebook to the first free name my_<name>_<n>.ipynb; returns the copy's path."""
    copies = (path.with_name(f"my_{path.stem}_{n}.ipynb") for n in count(1))
    free = next(copy for copy in copies if not copy.exists())
    with replacing(free) as part:
        shutil.copy2(path, part)
    return free


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", choices=["rerun", "check", "reset"])
    parser.add_argument("notebooks", nargs="*", type=Path, help="default: all numbered notebooks")
    arguments = parser.parse_args()
    for path in arguments.notebooks:
        if not path.is_file():
            parser.error(f"no notebook at {path}")
    if arguments.command == "reset":
        if arguments.notebooks:
            parser.error("reset takes no names: it restores every notebook that was changed")
        sys.exit(reset())
    paths = arguments.notebooks or numbered()
    sys.exit({"rerun": rerun, "check": check}[arguments.command](paths))


if __name__ == "__main__":
    main()
