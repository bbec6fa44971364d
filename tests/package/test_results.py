"""The results file: merged by key, replaced at once, with what is needed to measure again."""

import json

import pytest
import torch
from tiny import says

from chapter13 import results


def test_records_are_merged_by_key(tmp_path):
    path = tmp_path / "results.json"
    assert results.load(path) == {}
    results.record("a", {"seconds": 1.5}, "make a", path=path)
    results.record("b", {"seconds": 2.5}, "make b", ("pillow",), path=path)
    results.record("a", {"seconds": 3.5}, "make a", path=path)
    records = results.load(path)
    assert records["a"]["seconds"] == 3.5
    assert records["b"]["seconds"] == 2.5
    assert records["b"]["target"] == "make b"
    assert list(tmp_path.iterdir()) == [path]


def test_what_a_record_says_of_its_environment(tmp_path):
    path = tmp_path / "results.json"
    results.record("a", {}, "make a", ("no-such-package",), path=path)
    environment = results.load(path)["a"]["environment"]
    assert environment["versions"]["torch"] == torch.__version__.split("+")[0] or (
        environment["versions"]["torch"] == torch.__version__
    )
    assert environment["versions"]["no-such-package"] == "not installed"
    assert len(environment["date"]) == 10
    assert str(torch.get_num_threads()) in environment["machine"]


def test_an_interrupted_write_loses_nothing(tmp_path, monkeypatch):
    path = tmp_path / "results.json"
    results.record("a", {"seconds": 1}, "make a", path=path)
    before = path.read_bytes()
    with pytest.raises(TypeError):  # what JSON cannot hold
        results.record("b", {"seconds": torch}, "make b", path=path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("text", ["", "{", "[]", '{"a": 1}'])
def test_a_broken_file_is_not_overwritten(tmp_path, text):
    path = tmp_path / "results.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=says(path, "git")):
        results.record("a", {}, "make a", path=path)
    assert path.read_text() == text


def test_the_projects_own_file_is_readable():
    for key, measured in results.load().items():
        assert {"machine", "versions", "date", "commit"} == set(measured["environment"]), key
        json.dumps(measured)
