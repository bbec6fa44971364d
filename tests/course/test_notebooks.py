"""The stored notebooks are fit for readers, and the tool that says so notices what is not.

nbval executes the notebooks and compares (`make test`); here is what nbval does not look at.
"""

import json
import os
import shutil
import subprocess

import nbformat
import pytest
from nbformat.v4 import (
    new_code_cell,
    new_markdown_cell,
    new_notebook,
    new_output,
)

from tools import notebooks

COURSE = [
    "00_number_formats.ipynb",
    "01_absmax_int8.ipynb",
    "02_granularity.ipynb",
    "03_int4_nf4.ipynb",
    "04_int8_activations.ipynb",
    "05_bitsandbytes.ipynb",
    "06_gptq.ipynb",
    "07_distributions.ipynb",
    "08_summary.ipynb",
    "09_awq.ipynb",
    "10_gguf.ipynb",
]

# Cells that nbval does not hold to their stored output: (notebook, cell id): why not.
# Sums in another order flip codes of activations, and that the second digit of KL and perplexity.
NOISE = "differs between processors; the cells assert each KL to 15% of the recorded one"
SEARCH = "a learned method's near ties fall otherwise elsewhere; each KL is held to 15% in its cell"
REVIEWED = {
    ("04_int8_activations.ipynb", "per-tensor-measure"): NOISE,
    ("04_int8_activations.ipynb", "per-token-measure"): NOISE,
    ("04_int8_activations.ipynb", "static-measure"): NOISE,
    ("04_int8_activations.ipynb", "llm-int8-measure"): NOISE,
    ("04_int8_activations.ipynb", "smoothquant-measure"): NOISE,
    ("04_int8_activations.ipynb", "all-picture"): NOISE,
    ("04_int8_activations.ipynb", "apart-table"): NOISE,
    ("04_int8_activations.ipynb", "fp8-measure"): NOISE,
    ("04_int8_activations.ipynb", "faster-time"): "times of this machine",
    ("09_awq.ipynb", "whole-awq"): SEARCH,
    ("09_awq.ipynb", "whole-gptq"): SEARCH,
    ("09_awq.ipynb", "whole-picture"): SEARCH,
    ("05_bitsandbytes.ipynb", "speed-table"): "shows what `make bench` recorded last, anywhere",
    ("05_bitsandbytes.ipynb", "gpu-table"): "shows what `make bench-gpu` recorded last, anywhere",
    ("10_gguf.ipynb", "llama-code"): "shows what `make llama` recorded last, anywhere",
}

# Notebooks above the usual size: name: why its figures cannot be smaller.
LARGE = {}


def test_every_notebook_of_the_course_is_there():
    assert [path.name for path in notebooks.numbered()] == COURSE


@pytest.mark.parametrize("path", notebooks.numbered(), ids=lambda path: path.name)
def test_stored_notebook_is_fit(path):
    found = notebooks.problems(path)
    if path.name in LARGE:
        found = [problem for problem in found if " kB, should be below " not in problem]
    assert not found


def test_only_reviewed_cells_escape_nbval():
    weakened = {
        (path.name, cell.id)
        for path in notebooks.numbered()
        for cell in notebooks.read(path).cells
        if notebooks.escapes_nbval(cell)
    }
    assert weakened == set(REVIEWED)


def test_the_last_cell_leads_on():
    first, second, *_, last = notebooks.numbered()
    assert "Before" not in notebooks.navigation(first)
    assert f"Next: [{notebooks.title(second)}]({second.name})" in notebooks.navigation(first)
    assert f"Before: [{notebooks.title(first)}]({first.name})" in notebooks.navigation(second)
    assert "Next" not in notebooks.navigation(last)
    lost = notebooks.read(first)
    lost.cells[-1].source = "The end."
    (found,) = notebooks.navigation_problems(lost, first)
    assert notebooks.navigation(first) in found


# --- the checks themselves, on a notebook made here ------------------------------------------


def picture(alt="A line that rises"):
    data = {"image/png": "iVBORw0KGgo=", "text/plain": alt}
    return new_output("display_data", data=data, metadata={"image/png": {"alt": alt}})


def role(kind="slide", **more):
    return {"slideshow": {"slide_type": kind}, **more}


@pytest.fixture
def fit():
    """A notebook that has everything."""
    opening = "# Rounding\n\nYou will be able to round. Takes 5 minutes, needs no GPU."
    ending = "## Takeaways\n\n## Exercises\n\n## Papers\n\n[again](#Takeaways) [](#Rounding)"
    return new_notebook(
        metadata={"kernelspec": notebooks.KERNEL, "language_info": {"name": "python"}},
        cells=[
            new_markdown_cell(opening, metadata=role()),
            new_code_cell("draw()", execution_count=1, outputs=[picture()], metadata=role("-")),
            new_code_cell("1 + 1", execution_count=2, metadata=role("-")),
            new_markdown_cell(ending, metadata=role()),
        ],
    )


def problems_of(notebook, folder):
    path = folder / "00_made_here.ipynb"
    notebooks.write(notebook, path)
    return notebooks.problems(path)


def test_a_fit_notebook_has_no_problems(fit, tmp_path):
    assert problems_of(fit, tmp_path) == []


def spoil_count(nb):
    nb.cells[2].execution_count = 3


def spoil_never_run(nb):
    nb.cells[2].execution_count = None


def spoil_stderr(nb):
    nb.cells[2].outputs = [new_output("stream", name="stderr", text="Warning: old")]


def spoil_error(nb):
    nb.cells[2].outputs = [new_output("error", ename="ValueError", evalue="no", traceback=[])]


def spoil_view(nb):
    nb.cells[2].outputs = [new_output("display_data", data={notebooks.WIDGET_VIEW: {}})]


def spoil_alt(nb):
    nb.cells[1].outputs = [picture(alt=" ")]


def spoil_picture(nb):
    nb.cells[1].outputs = []


def spoil_late_picture(nb):
    # eight code cells before it: one too many
    fillers = [new_code_cell("0", execution_count=n, metadata=role("-")) for n in range(1, 9)]
    nb.cells[1:1] = fillers
    nb.cells[9].execution_count, nb.cells[10].execution_count = 9, 10


def spoil_widget_state(nb):
    nb.metadata["widgets"] = {}


def spoil_python_version(nb):
    nb.metadata.language_info["version"] = "3.11.2"


def spoil_kernel(nb):
    nb.metadata.kernelspec = {"name": "my-env", "display_name": "my-env"}


def spoil_times(nb):
    nb.cells[1].metadata["execution"] = {}


def spoil_role(nb):
    del nb.cells[3].metadata["slideshow"]


def spoil_long_cell(nb):
    nb.cells[2].source = "\n".join("abcdefghijklmnop")


def spoil_median(nb):
    nb.cells[1].source = nb.cells[2].source = "\n".join("abcdefgh")


def spoil_empty(nb):
    nb.cells[2].source = " "


def spoil_title(nb):
    nb.cells[0].source = nb.cells[0].source.replace("# Rounding", "Rounding")


def spoil_minutes(nb):
    nb.cells[0].source = nb.cells[0].source.replace("minutes", "pages")


def spoil_needs(nb):
    nb.cells[0].source = nb.cells[0].source.replace("needs", "has")


def spoil_goal(nb):
    nb.cells[0].source = nb.cells[0].source.replace("You will be able to", "How to")


def spoil_takeaways(nb):
    nb.cells[3].source = nb.cells[3].source.replace("## Takeaways", "## Summary")


def spoil_file_link(nb):
    nb.cells[3].source += " [next](01_gone.ipynb)"


def spoil_heading_link(nb):
    nb.cells[3].source += " [up](#Nowhere)"


def spoil_text_picture(nb):
    nb.cells[3].source += " ![](https://example.org/a.png)"


def spoil_panel(nb):
    nb.cells[1].source = "panel = explore_bits(weight)\npanel.set(bits=3)\npanel"
    nb.cells[2].source = "print(panel.at(bits=4).readout)\nprint(panel.set(bits=2))"


def spoil_size(nb):
    nb.cells[2].outputs = [new_output("stream", name="stdout", text="x" * 300_000)]


@pytest.mark.parametrize(
    ("spoil", "complaint"),
    [
        (spoil_count, "has execution count 3, not 2"),
        (spoil_never_run, "has execution count None, not 2"),
        (spoil_stderr, "writes to stderr: Warning: old"),
        (spoil_error, "stores an error: ValueError: no"),
        (spoil_view, "stores a widget view"),
        (spoil_alt, "without alt text"),
        (spoil_picture, "the first picture comes in code cell None"),
        (spoil_late_picture, "the first picture comes in code cell 9"),
        (spoil_widget_state, "metadata 'widgets'"),
        (spoil_python_version, "the version of Python"),
        (spoil_kernel, "the kernel is not python3"),
        (spoil_times, "has metadata 'execution'"),
        (spoil_role, "has slide type None"),
        (spoil_long_cell, "has 16 lines, at most 15"),
        (spoil_median, "the median cell has 8"),
        (spoil_empty, "is empty"),
        (spoil_title, "does not open with a title"),
        (spoil_minutes, "does not say how long it takes"),
        (spoil_needs, "does not say what it needs"),
        (spoil_goal, "does not say what the reader will be able to do"),
        (spoil_takeaways, "no heading has the word 'takeaway'"),
        (spoil_file_link, "links to 01_gone.ipynb, which does not exist"),
        (spoil_heading_link, "links to #Nowhere: no such heading"),
        (spoil_text_picture, "a picture in the text has no alt text"),
        (spoil_panel, "moves panel: use panel.at(...)"),
        (spoil_size, "should be below 300 kB"),
    ],
)
def test_a_spoiled_notebook_is_noticed(fit, tmp_path, spoil, complaint):
    spoil(fit)
    assert complaint in "\n".join(problems_of(fit, tmp_path))


@pytest.mark.parametrize(
    ("source", "tags"),
    [
        ("1", ["nbval-ignore-output"]),
        ("1", ["nbval-skip"]),
        ("1", ["raises-exception"]),
        ("1", ["skip-execution"]),
        ("# NBVAL_IGNORE_OUTPUT\n1", []),
        ("#PYTEST_VALIDATE_IGNORE_OUTPUT\n1", []),
    ],
)
def test_what_escapes_nbval_is_noticed(source, tags):
    assert notebooks.escapes_nbval(new_code_cell(source, metadata={"tags": tags}))
    assert not notebooks.escapes_nbval(new_code_cell("1", metadata={"tags": ["answer"]}))


# --- rerun -----------------------------------------------------------------------------------

PIECES = """\
import sys, time
for word in "stdout", "in", "pieces":
    print(word, flush=True)
    time.sleep(0.2)
"""
WIDGET = """\
import ipywidgets
class Panel(ipywidgets.VBox):
    def _repr_mimebundle_(self, **_):
        data = {**super()._repr_mimebundle_(), "text/plain": "a panel", "image/png": b"png"}
        return data, {"image/png": {"alt": "a panel"}}
Panel([ipywidgets.IntSlider()])
"""


def made_by_hand(tmp_path, *sources):
    path = tmp_path / "00_made_here.ipynb"
    cells = [new_code_cell(source, metadata=role("-", collapsed=True)) for source in sources]
    notebook = new_notebook(cells=cells, metadata={"widgets": {}, "rise": {"scroll": True}})
    for cell in notebook.cells:
        del cell["id"]
    notebook.nbformat_minor = 4
    path.write_text(json.dumps(notebook))
    return path


def test_rerun_gives_the_same_bytes_twice(tmp_path):
    path = made_by_hand(tmp_path, PIECES, WIDGET, "2 + 2")
    assert notebooks.rerun([path]) == 0
    first = path.read_bytes()
    assert notebooks.rerun([path]) == 0
    assert path.read_bytes() == first

    stored = nbformat.read(path, as_version=4)
    pieces, panel, four = stored.cells
    assert [output.text for output in pieces.outputs] == ["stdout\nin\npieces\n"]
    assert set(panel.outputs[0].data) == {"text/plain", "image/png"}
    assert four.outputs[0].data["text/plain"] == "4"
    assert [cell.execution_count for cell in stored.cells] == [1, 2, 3]
    assert [cell.metadata for cell in stored.cells] == [role("-")] * 3
    assert set(stored.metadata) == {"kernelspec", "language_info", "rise"}
    assert not notebooks.output_problems(stored)
    assert [item.name for item in tmp_path.iterdir()] == [path.name]


def test_rerun_leaves_a_failing_notebook_alone(tmp_path, capsys):
    path = made_by_hand(tmp_path, "1", "1 / 0")
    before = path.read_bytes()
    assert notebooks.rerun([path]) == 1
    assert path.read_bytes() == before
    assert "ZeroDivisionError" in capsys.readouterr().err


def test_rerun_reports_stderr(tmp_path, capsys):
    path = made_by_hand(tmp_path, "import sys; print('old', file=sys.stderr)")
    assert notebooks.rerun([path]) == 1
    assert "writes to stderr: old" in capsys.readouterr().err


# --- reset -----------------------------------------------------------------------------------


@pytest.fixture
def clone(tmp_path, monkeypatch):
    """A repository of two notebooks, committed."""
    if shutil.which("git") is None:
        pytest.fail("these tests need git, as make reset does")
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path))
    folder = tmp_path / "clone" / "notebooks"
    folder.mkdir(parents=True)
    for name in "00_first.ipynb", "01_second.ipynb":
        (folder / name).write_text(f"{name} as it came\n")
    author = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
    for command in ["init", "-q"], ["add", "."], [*author, "commit", "-q", "-m", "all"]:
        subprocess.run(["git", "-C", folder.parent, *command], check=True)
    return folder.parent


def texts(clone):
    return {path.name: path.read_text() for path in (clone / "notebooks").iterdir()}


def test_reset_keeps_what_the_student_did(clone):
    original = texts(clone)
    for n, words in enumerate(["my first try\n", "my second try\n"], start=1):
        (clone / "notebooks" / "00_first.ipynb").write_text(words)
        assert notebooks.reset(clone) == 0
        original[f"my_00_first_{n}.ipynb"] = words
        assert texts(clone) == original


def test_reset_changes_nothing_where_nothing_changed(clone, capsys):
    original = texts(clone)
    (clone / "notebooks" / "01_second.ipynb").write_bytes(b"01_second.ipynb as it came\r\n")
    assert notebooks.reset(clone) == 0
    assert texts(clone) == original  # text mode reads Windows' line ends as plain ones
    assert "unchanged" in capsys.readouterr().out


def saved_after_a_run(notebook):
    """As JupyterLab saves a notebook of which one cell was run twice: nothing else changed."""
    notebook.metadata["language_info"] = {"name": "python", "version": "3.12.1"}
    notebook.cells[0].metadata["trusted"] = True
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.execution_count += 1
            cell.metadata["execution"] = {"iopub.execute_input": "2026-01-01T00:00:00Z"}
            for output in cell.outputs:
                if output.output_type != "stream":
                    output.data[notebooks.WIDGET_VIEW] = {"model_id": "random"}
    return notebook


def spoil_source(notebook):
    notebook.cells[-1].source += "mine"


def spoil_output(notebook):
    cell = next(cell for cell in notebook.cells if cell.get("outputs"))
    cell.outputs.append(new_output("stream", text="mine"))


def spoil_slide(notebook):
    notebook.cells[0].metadata.slideshow.slide_type = "notes"


def spoil_order(notebook):
    notebook.cells.reverse()


@pytest.mark.parametrize("change", [None, spoil_source, spoil_output, spoil_slide, spoil_order])
def test_a_save_alone_is_no_change(fit, clone, change):
    path = clone / "notebooks" / "00_first.ipynb"
    notebooks.write(fit, path)
    author = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
    commit = ["git", "-C", clone, *author, "commit", "-q", "-a", "-m", "a notebook"]
    subprocess.run(commit, check=True)
    original = path.read_bytes()
    saved = saved_after_a_run(notebooks.read(path))
    if change:
        change(saved)
    notebooks.write(saved, path)
    theirs = path.read_bytes()
    assert theirs != original
    assert notebooks.reset(clone) == 0
    kept = [copy.read_bytes() for copy in path.parent.glob("my_*")]
    if change:
        assert (path.read_bytes(), kept) == (original, [theirs])
    else:
        assert (path.read_bytes(), kept) == (theirs, [])


def test_reset_brings_back_a_deleted_notebook(clone):
    original = texts(clone)
    (clone / "notebooks" / "01_second.ipynb").unlink()
    assert notebooks.reset(clone) == 0
    assert texts(clone) == original


@pytest.mark.parametrize("step", ["the copy", "the original"])
def test_an_interrupted_reset_loses_nothing(clone, monkeypatch, step):
    replace, left = os.replace, ["the copy", "the original"].index(step)

    def interrupt(*paths):
        nonlocal left
        if left == 0:
            raise KeyboardInterrupt
        left -= 1
        replace(*paths)

    (clone / "notebooks" / "00_first.ipynb").write_text("mine\n")
    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", interrupt)
        with pytest.raises(KeyboardInterrupt):
            notebooks.reset(clone)
    assert texts(clone)["00_first.ipynb"] == "mine\n"
    assert notebooks.reset(clone) == 0
    assert texts(clone)["00_first.ipynb"] == "00_first.ipynb as it came\n"
    kept = [text for name, text in texts(clone).items() if name.startswith("my_")]
    assert set(kept) == {"mine\n"}


@pytest.mark.parametrize("missing", ["clone", "git"])
def test_reset_says_what_it_needs(clone, monkeypatch, capsys, missing):
    if missing == "git":
        monkeypatch.setenv("PATH", "")
    else:
        shutil.rmtree(clone / ".git")
    (clone / "notebooks" / "00_first.ipynb").write_text("mine\n")
    before = texts(clone)
    assert notebooks.reset(clone) == 1
    assert texts(clone) == before
    assert "nothing was changed" in capsys.readouterr().err
