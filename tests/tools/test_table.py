"""`make results`: what stands, what is out of date, what is told; and the README's table."""

import ast
import dataclasses
import json
import re
from types import SimpleNamespace

import pytest
from tiny import says

from chapter13 import results
from tools import peers, readme, table
from tools.table_rows import MAKERS, ROWS, Row

ROW = Row("a row", "affine", "ours", {"method": "affine", "bits": 4, "group_size": 64})
FILES = ["chapter13/integer.py", "chapter13/packing.py"]


def test_readme_is_not_stale():
    assert readme.read(table.SECTION) == table.readme_section(results.load()), (
        "stale: run `make results`"
    )


def test_every_row_is_measured_and_no_other():
    records = {key for key in results.load() if key.startswith(table.KEY)}
    assert records == {table.KEY + row.name for row in ROWS}
    for key in records:
        assert set(table.PARTS) < set(results.load()[key]), key


def test_rows_are_sound():
    names = [row.name for row in ROWS]
    assert len(set(names)) == len(names)
    assert {row.maker for row in ROWS} == set(MAKERS)
    assert set(table.IN_README) <= set(names)


def test_all_see_the_same_tokens():
    losses = {
        len(record["quality"][measure]["losses"])
        for key, record in results.load().items()
        if key.startswith(table.KEY)
        for measure in ("perplexity", "kl")
    }
    assert losses == {table.EVALUATION[0]}
    assert table.EVALUATION[0] * (table.EVALUATION[1] - 1) > 16_000


@pytest.fixture
def known_inputs(monkeypatch):
    monkeypatch.setattr(table, "inputs", lambda: "the same model and tokens")


def test_a_row_stands_until_what_it_depends_on_changes(known_inputs, monkeypatch, tmp_path):
    monkeypatch.setattr(table, "ROOT", tmp_path)
    (tmp_path / "chapter13").mkdir()
    source = "def f(x):\n    return x + 1\n"
    for name in FILES:
        (tmp_path / name).write_text(source)

    def recorded(row=ROW):
        mark = table.fingerprint(row, "cost", FILES)
        cost = {"files": FILES, "fingerprint": mark}
        return {table.KEY + row.name: {"cost": cost, "family": row.family}}

    records = recorded()
    assert table.stands(records, ROW, "cost")
    assert not table.stands(records, ROW, "quality")
    assert not table.stands({}, ROW, "cost")
    other = dataclasses.replace(ROW, options=ROW.options | {"bits": 3})
    assert not table.stands(records, other, "cost")

    words = '"""What it does."""\n\n\ndef f(x):\n    """Adds."""\n    # one\n    return x + 1\n'
    (tmp_path / FILES[0]).write_text(words)
    assert table.stands(records, ROW, "cost"), "words change nothing"
    (tmp_path / FILES[0]).write_text(source.replace("1", "2"))
    assert not table.stands(records, ROW, "cost")
    (tmp_path / FILES[0]).unlink()
    assert not table.stands(records, ROW, "cost")
    (tmp_path / FILES[0]).write_text(source)
    assert table.stands(records, ROW, "cost")

    monkeypatch.setattr(results, "version_of", lambda name: "another")
    assert not table.stands(records, ROW, "cost")
    monkeypatch.undo()
    monkeypatch.setattr(table, "inputs", lambda: "other tokens")
    assert not table.stands(records, ROW, "cost")


def test_only_words_are_dropped(tmp_path, monkeypatch):
    monkeypatch.setattr(table, "ROOT", tmp_path)
    sources = ['def f():\n    """a"""\n', 'def f():\n    return """a"""\n', 'x = """a"""\n']
    seen = []
    for source in sources:
        (tmp_path / "f.py").write_text(source)
        seen.append(table.code("f.py"))
    assert len(set(seen)) == 3
    assert ast.dump(ast.parse("x = 'a'")) == seen[2]


def test_what_fails_is_told_and_the_rest_is_kept(known_inputs, monkeypatch, tmp_path, capsys):
    """One row fails, one lacks its library, one is measured: that one is in the file at once."""
    file = tmp_path / "results.json"
    load, write = results.load, results.record
    monkeypatch.setattr(results, "load", lambda path=file: load(path))
    monkeypatch.setattr(results, "record", lambda *args: write(*args, path=file))
    good = ROW
    bad = dataclasses.replace(ROW, name="bad", options={"method": "no such"})
    absent = Row("absent", "libraries", "peer", {"library": "autogptq", "options": ()})

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

    monkeypatch.setattr(table, "ROWS", [bad, absent, good])
    monkeypatch.setattr(peers, "python", missing)
    monkeypatch.setattr(table, "subprocess", SimpleNamespace(run=run))
    failed = table.measure_all([bad, absent, good], ["cost"], again=False)
    assert failed == ["absent", "bad"]
    assert set(results.load()) == {"table/a row"}
    record = results.load()["table/a row"]
    assert record["cost"]["bits_per_weight"] == 4.3
    assert record["cost"]["environment"] == where
    assert table.stands(results.load(), good, "cost")
    said = capsys.readouterr()
    assert "bad was not measured: no such method" in said.out + said.err
    assert "autogptq is not installed: run `make peers`" in said.out + said.err

    def never(*args, **options):
        raise AssertionError("measured although it stands")

    monkeypatch.setattr(table, "subprocess", SimpleNamespace(run=never))
    assert table.measure_all([good], ["cost"], again=False) == []


def test_unknown_rows_are_refused(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["table", "NF5"])
    with pytest.raises(SystemExit):
        table.main()
    assert re.search(says("'NF5'", "FP32, FP16"), capsys.readouterr().err)
