"""`make results`: which rows are current or out of date, and what is reported."""

import ast
import dataclasses
import json
import re
from types import SimpleNamespace

import pytest
import torch
from tiny import says

from chapter13 import corpus, results
from chapter13.evaluate import Score
from tools import formats, peers, syntax, table
from tools.formats import FORMATS, MAKERS, STUDIES, TABLE, Format

ROW = Format("a row", "affine", "ours", {"method": "affine", "bits": 4, "group_size": 64})
FILES = ["chapter13/integer.py", "chapter13/packing.py"]


def test_every_row_is_measured_and_no_other():
    records = {key: each for key, each in results.load().items() if each["target"] == table.TARGET}
    assert set(records) == table.keys()
    for name, key in table.KEYS.items():
        assert set(table.PARTS_OF[name]) <= set(records[key]), name


def test_formats_are_sound():
    listed = [*TABLE, *STUDIES, *formats.KERNELS]
    assert len(FORMATS) == len(listed)  # each name once
    assert {kind.maker for kind in listed} == set(MAKERS)
    assert set(table.IN_README) <= set(table.IN_DOCS) <= {row.name for row in TABLE}


def test_all_see_the_same_tokens():
    records = results.load()
    for name, key in table.KEYS.items():
        for score in ("perplexity", "kl"):
            losses = records[key]["quality"][score]["losses"]
            assert len(losses) == FORMATS[name].sequences, name
    assert {row.sequences for row in TABLE} == {corpus.EVALUATION[0]}
    assert corpus.EVALUATION[0] * (corpus.EVALUATION[1] - 1) > 16_000


def test_recorded_intervals_are_those_of_the_losses():
    for key in table.KEYS.values():
        quality = results.load()[key]["quality"]
        for name in ("perplexity", "kl"):
            losses = torch.tensor(quality[name]["losses"], dtype=torch.float64)
            low, high = Score(losses, exponential=name == "perplexity").interval
            # losses are kept to 6 digits behind the point, intervals to 5
            slack = 1e-5 + 2e-6 * (high if name == "perplexity" else 1)
            assert quality[name]["interval"] == pytest.approx([low, high], abs=slack), key


@pytest.fixture
def known_inputs(monkeypatch):
    monkeypatch.setattr(table, "inputs", lambda: "the same model and tokens")
    names = ("a row", "bad", "absent")
    monkeypatch.setattr(table, "KEYS", {name: f"table/{name}" for name in names})
    monkeypatch.setattr(table, "PARTS_OF", dict.fromkeys(names, table.PARTS))


def test_a_row_is_current_until_what_it_depends_on_changes(known_inputs, monkeypatch, tmp_path):
    monkeypatch.setattr(table, "ROOT", tmp_path)
    (tmp_path / "chapter13").mkdir()
    source = "def f(x):\n    return x + 1\n"
    for name in FILES:
        (tmp_path / name).write_text(source)

    def recorded(row=ROW):
        mark = table.fingerprint(row, "cost", FILES)
        cost = {"files": FILES, "fingerprint": mark}
        return {f"table/{row.name}": {"cost": cost, "family": row.family}}

    records = recorded()
    assert table.is_current(records, ROW, "cost")
    assert not table.is_current(records, ROW, "quality")
    assert not table.is_current({}, ROW, "cost")
    other = dataclasses.replace(ROW, options=ROW.options | {"bits": 3})
    assert not table.is_current(records, other, "cost")

    words = '"""What it does."""\n\n\ndef f(x):\n    """Adds."""\n    # one\n    return x + 1\n'
    (tmp_path / FILES[0]).write_text(words)
    assert table.is_current(records, ROW, "cost"), "words change nothing"
    (tmp_path / FILES[0]).write_text(source.replace("1", "2"))
    assert not table.is_current(records, ROW, "cost")
    (tmp_path / FILES[0]).unlink()
    assert not table.is_current(records, ROW, "cost")
    (tmp_path / FILES[0]).write_text(source)
    assert table.is_current(records, ROW, "cost")

    with monkeypatch.context() as other:
        other.setattr(results, "version_of", lambda name: "another")
        assert not table.is_current(records, ROW, "cost")
    assert table.is_current(records, ROW, "cost")
    monkeypatch.setattr(table, "inputs", lambda: "other tokens")
    assert not table.is_current(records, ROW, "cost")


def test_only_words_are_dropped(tmp_path):
    sources = ['def f():\n    """a"""\n', 'def f():\n    return """a"""\n', 'x = """a"""\n']
    assert len({code(tmp_path, source) for source in sources}) == 3
    assert ast.dump(ast.parse("x = 'a'")) == code(tmp_path, sources[2])


def test_what_an_error_says_is_dropped_and_when_it_is_raised_is_not(tmp_path):
    raising = "if {}:\n    raise {}\n"
    first = code(tmp_path, raising.format("x > 1", 'ValueError(f"{x} is too large")'))
    assert first == code(tmp_path, raising.format("x > 1", 'ValueError("too large", x)'))
    assert first != code(tmp_path, raising.format("x > 2", 'ValueError(f"{x} is too large")'))
    assert first != code(tmp_path, raising.format("x > 1", 'TypeError(f"{x} is too large")'))
    assert first != code(tmp_path, raising.format("x > 1", 'print(f"{x} is too large")'))


def code(folder, source):
    (folder / "f.py").write_text(source)
    return syntax.code(folder / "f.py")


def test_what_fails_is_told_and_the_rest_is_kept(known_inputs, monkeypatch, tmp_path, capsys):
    """One row fails, one lacks its library, one is measured: that one is in the file at once."""
    file = tmp_path / "results.json"
    load, write = results.load, results.record
    monkeypatch.setattr(results, "load", lambda path=file: load(path))
    monkeypatch.setattr(results, "record", lambda *args: write(*args, path=file))
    good = ROW
    bad = dataclasses.replace(ROW, name="bad", options={"method": "no such"})
    absent = Format("absent", "libraries", "peer", {"library": "autogptq", "options": ()})

    def missing(peer):
        raise peers.NoPeer(f"{peer} is not installed: run `make peers`")

    where = {"machine": "the child's"}
    measured = {
        "environment": where,
        "files": FILES,
        "bits_per_weight": 4.3,
        "size_mb": 1.0,
        "tokens_per_s": None,
    }

    def run(command, **options):
        name = command[command.index("--measure") + 1]
        code = 1 if name == "bad" else 0
        words = "Loading\n" + json.dumps(measured)
        return SimpleNamespace(returncode=code, stdout=words, stderr="no such method")

    monkeypatch.setattr(peers, "python", missing)
    monkeypatch.setattr(table, "subprocess", SimpleNamespace(run=run))
    failed = table.measure_all([bad, absent, good], ["cost"], again=False)
    assert failed == ["absent", "bad"]
    assert set(results.load()) == {"table/a row"}
    record = results.load()["table/a row"]
    assert record["cost"]["bits_per_weight"] == 4.3
    assert record["cost"]["environment"] == where
    assert table.is_current(results.load(), good, "cost")
    said = capsys.readouterr()
    assert "bad was not measured: no such method" in said.out + said.err
    assert "autogptq is not installed: run `make peers`" in said.out + said.err

    def never(*args, **options):
        raise AssertionError("measured although it is current")

    monkeypatch.setattr(table, "subprocess", SimpleNamespace(run=never))
    assert table.measure_all([good], ["cost"], again=False) == []


def test_unknown_rows_are_refused(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["table", "NF5"])
    with pytest.raises(SystemExit):
        table.main()
    assert re.search(says("'NF5'", "FP32, FP16"), capsys.readouterr().err)
