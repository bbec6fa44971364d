"""What `make mutants` reported last: enough killed, and a reason for each survivor."""

import re

from tools import mutants


def test_enough_are_killed_and_each_survivor_has_its_reason():
    text = mutants.REPORT.read_text(encoding="utf-8")
    killed, total = map(int, re.search(r"^(\d+) of (\d+) mutants killed", text, re.M).groups())
    assert killed / total >= mutants.ENOUGH
    reasons = mutants.known_reasons()
    assert len(reasons) == text.count("\n### ")
    assert "?" not in reasons.values()


def test_a_report_keeps_its_reasons(tmp_path, monkeypatch):
    monkeypatch.setattr(mutants, "REPORT", tmp_path / "mutants.md")
    changes = {"a": ("packing.pack", "x + 1", "x + 2"), "b": ("errors.mse", "return a", "return b")}
    monkeypatch.setattr(mutants, "change", changes.get)
    outcome = {"a": "survived", "b": "killed", "c": "timeout"}
    assert mutants.report(outcome) == (2 / 3, 1)
    text = mutants.REPORT.read_text()
    assert "2 of 3 mutants killed" in text
    mutants.REPORT.write_text(text.replace("\n?\n", "\nBoth are the same.\n"))
    assert mutants.report(outcome) == (2 / 3, 0)
    assert mutants.known_reasons() == {changes["a"]: "Both are the same."}
    assert mutants.report({**outcome, "b": "survived"}) == (1 / 3, 1)
