"""What `make lab` writes when a notebook is saved: the picture of a panel, not the panel."""

import copy
from types import SimpleNamespace

import ipywidgets as widgets
import nbformat
import pytest

from tools.browser import ROOT
from tools.notebooks import WIDGET_VIEW as LINK


@pytest.fixture(scope="module")
def hook():
    """The function that the server calls before it writes a file."""
    config = SimpleNamespace(ContentsManager=SimpleNamespace())
    source = (ROOT / "tools" / "jupyter" / "jupyter_server_config.py").read_text(encoding="utf-8")
    exec(source, {"c": config})
    return config.ContentsManager.pre_save_hook


def notebook(*bundles):
    outputs = [nbformat.v4.new_output("display_data", data=dict(data)) for data in bundles]
    printed = nbformat.v4.new_output("stream", text="words\n")
    cell = nbformat.v4.new_code_cell("panel", outputs=[*outputs, printed])
    content = nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell("# One"), cell])
    return {"type": "notebook", "content": content}


def test_a_panel_is_saved_as_its_picture(hook):
    bundle = widgets.Box()._repr_mimebundle_() | {
        "image/png": "iVBORw0KGgo=",
        "text/plain": "bits  8",
    }
    words = widgets.Box()._repr_mimebundle_() | {"text/html": "<p>What it shows</p>"}
    assert LINK in bundle
    assert LINK in words
    model = notebook(bundle, words)
    hook(model=model, path="01.ipynb", contents_manager=None)
    outputs = model["content"].cells[1].outputs
    assert [set(output.get("data", {})) for output in outputs] == [
        {"image/png", "text/plain"},
        {"text/html", "text/plain"},
        set(),
    ]
    nbformat.validate(model["content"])


@pytest.mark.parametrize(
    "model",
    [
        notebook({LINK: {"model_id": "1"}, "text/plain": "50%"}),  # nothing else to show
        notebook({"image/png": "iVBORw0KGgo=", "text/plain": "a figure"}),
        {"type": "file", "content": "text"},
        {"type": "directory", "content": None},
        {"type": "notebook", "content": None},
    ],
)
def test_all_else_is_saved_unchanged(hook, model):
    before = copy.deepcopy(model)
    hook(model=model, path="x", contents_manager=None)
    assert model == before
