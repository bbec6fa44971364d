"""From notebook to deck, where no browser is needed: titles, links, captions, npm's packages."""

import json
import re
import shutil

import nbformat
import pytest
from tiny import says

from tools.slides import build


def test_packages_are_pinned_with_hashes_and_without_an_address():
    wanted = json.loads((build.HERE / "package.json").read_text())["dependencies"]
    text = (build.HERE / "package-lock.json").read_text()
    packages = json.loads(text)["packages"]
    del packages[""]
    assert {f"node_modules/{name}": version for name, version in wanted.items()} == {
        name: package["version"] for name, package in packages.items()
    }
    assert all(package["integrity"].startswith("sha512-") for package in packages.values())
    assert "http" not in text


@pytest.fixture
def empty(tmp_path, monkeypatch):
    """A place without the packages, and a PATH without npm; returns the folder for one."""
    shutil.copy(build.HERE / "package-lock.json", tmp_path)
    monkeypatch.setattr(build, "HERE", tmp_path)
    monkeypatch.setattr(build, "PACKAGES", tmp_path / "node_modules")
    monkeypatch.setenv("PATH", str(tmp_path))
    return tmp_path


def npm(folder, script):
    (folder / "npm").write_text(f"#!/bin/sh\n{script}\n")
    (folder / "npm").chmod(0o755)


def test_without_npm_it_says_how_to_get_it(empty):
    with pytest.raises(build.NoPackages, match=says("sudo apt-get install npm")):
        build.fetch_packages()


def test_what_npm_complains_about_is_shown(empty):
    npm(empty, "echo no network >&2; exit 1")
    with pytest.raises(build.NoPackages, match=says("no network")):
        build.fetch_packages()


def test_packages_are_fetched_once_and_again_when_the_versions_change(empty):
    lock, installed = empty / "package-lock.json", empty / "node_modules" / ".package-lock.json"
    installed.parent.mkdir()
    npm(empty, f'echo "$*" >> {empty}/log; /bin/cp {lock} {installed}')
    build.fetch_packages()
    build.fetch_packages()
    assert (empty / "log").read_text() == "ci\n"
    lock.write_text(lock.read_text().replace('"version": "4.6.1"', '"version": "4.6.2"'))
    build.fetch_packages()
    assert (empty / "log").read_text() == "ci\nci\n"


@pytest.mark.parametrize(
    ("source", "linked"),
    [
        ("see [02](02_granularity.ipynb)", "see [02](02_granularity.html)"),
        ("see [02](02_granularity.ipynb#6.-Price)", "see [02](02_granularity.html#6.-Price)"),
        ("a [term](glossary.md#gptq) and [one](../README.md)", "a term and one"),
        ("[paper](https://arxiv.org/abs/1)", "[paper](https://arxiv.org/abs/1)"),
        ("![words](picture.png) `w[0](x)`", "![words](picture.png) `w[0](x)`"),
    ],
)
def test_links_lead_to_decks_or_to_the_web(source, linked):
    assert build.link_decks(source) == linked


def test_the_opening_becomes_title_page_and_notes():
    opening = "# 9. AWQ\n\nYou can do this:\n\n- and that.\n\nTakes 5 minutes.\n"
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell(opening)])
    assert build.title_page(notebook) == "9. AWQ"
    page, notes = notebook.cells
    assert page.source == f"{build.COURSE}\n\n# 9. AWQ\n\nYou can do this:\n\n- and that."
    assert (notes.source, notes.metadata.slideshow.slide_type) == ("Takes 5 minutes.", "notes")


def test_only_captions_are_left_out():
    picture = {"data": {"image/png": ""}, "metadata": {"image/png": {"alt": "a < b"}}}
    caption = {"data": {"text/html": "<p>a &lt; b</p>", "text/plain": "a < b"}}
    table = {"data": {"text/html": "<table><td>1</td></table>"}}
    printed = {"output_type": "stream", "text": "a < b"}
    assert list(build.without_captions([picture, caption])) == [picture]
    assert list(build.without_captions([picture, table, printed])) == [picture, table, printed]
    assert list(build.without_captions([caption])) == [caption]


def test_a_deck_names_no_address_but_links():
    """Nothing but data and what lies in assets/ is loaded; a link is followed only by a click."""
    _, page = build.deck(build.numbered()[0])
    loaded = re.findall(r'(?:src|<link[^>]*href)="([^"]{0,40})', page)
    assert len(loaded) > 5
    assert not [each for each in loaded if not each.startswith(("data:", "assets/"))]
