"""What `make mutants` reported last, and that its report keeps what it has to."""

import re

import pytest

from tools import mutants


@pytest.mark.parametrize("module", mutants.MODULES)
def test_enough_are_killed_and_each_survivor_has_its_reason(module):
    """Of each module whose code and tests are those that were counted; the others are skipped."""
    counts, reasons, survivors = mutants.read_report()
    if state := mutants.state_of(module, counts):
        pytest.skip(f"the mutants of {module} are {state}: run `make mutants`")
    assert not mutants.problems(module, counts[module], survivors, reasons)


def test_the_report_is_of_these_modules():
    counts, _, survivors = mutants.read_report()
    text = mutants.REPORT.read_text(encoding="utf-8")
    assert re.findall(r"^\| `(\S+)` \|", text, re.M) == list(mutants.MODULES)
    assert len(survivors) == text.count("\n### ")
    for module, count in counts.items():
        assert count.total > 0
        assert len([one for one in survivors if one.module == module]) == count.total - count.killed


@pytest.mark.parametrize("module", mutants.MODULES)
def test_modules_and_their_tests_are_there(module):
    assert mutants.source_of(module).is_file()
    for name in mutants.MODULES[module]:
        file, _, test = name.partition("::")
        assert f"def {test or 'test_'}" in (mutants.TESTS / file).read_text(encoding="utf-8")


@pytest.fixture
def project(tmp_path, monkeypatch):
    """Two modules with a test each, in a folder of their own."""
    tests = tmp_path / "tests" / "package"
    tests.mkdir(parents=True)
    (tmp_path / "chapter13").mkdir()
    for name in ("packing", "gptq"):
        (tmp_path / "chapter13" / f"{name}.py").write_text("def f(x):\n    return x + 1\n")
        (tests / f"test_{name}.py").write_text("def test_one():\n    assert f(1) == 2\n")
    (tmp_path / "pyproject.toml").write_text("[project]\nname = 'chapter13'\n")
    monkeypatch.setattr(mutants, "ROOT", tmp_path)
    monkeypatch.setattr(mutants, "TESTS", tests)
    monkeypatch.setattr(mutants, "WORK", tmp_path / "mutants")
    monkeypatch.setattr(mutants, "REPORT", tmp_path / "tests" / "mutants.md")
    modules = {"packing": ["test_packing.py"], "gptq": ["test_gptq.py::test_one"]}
    monkeypatch.setattr(mutants, "MODULES", modules)
    return tmp_path


SURVIVOR = mutants.Survivor("packing.f", "return x + 1", "return x + 2")


def counted(killed, total, module="packing"):
    return mutants.Count(killed, total, mutants.fingerprint(module))


def test_a_report_keeps_counts_and_reasons(project):
    counts = {"packing": counted(19, 20)}
    mutants.write_report(counts, [SURVIVOR], {})
    found = mutants.read_report()
    assert found == (counts, {SURVIVOR: "?"}, [SURVIVOR])
    assert mutants.problems("packing", counts["packing"], *found[:0:-1]) == [
        "packing: 1 survivors without a reason"
    ]
    text = mutants.REPORT.read_text()
    mutants.REPORT.write_text(text.replace("\n?\n", "\nBoth are the same.\n"))
    found = mutants.read_report()
    assert not mutants.problems("packing", counts["packing"], *found[:0:-1])
    mutants.write_report(found[0], found[2], found[1])
    assert mutants.read_report() == (counts, {SURVIVOR: "Both are the same."}, [SURVIVOR])


def test_too_few_or_unlisted_survivors():
    reasons = {SURVIVOR: "Both are the same."}
    assert mutants.problems("packing", mutants.Count(18, 19, ""), [SURVIVOR], reasons) == [
        "packing: 94.7% killed, less than 95%"
    ]
    assert mutants.problems("packing", mutants.Count(98, 100, ""), [SURVIVOR], reasons) == [
        "packing: 2 survived, 1 are listed"
    ]


def test_a_count_is_stale_once_the_code_or_a_test_changes(project):
    counts = {"packing": counted(20, 20)}
    mutants.write_report(counts, [], {})
    assert mutants.state_of("packing", counts) is None
    assert mutants.state_of("gptq", counts) == "not counted yet"
    source = project / "chapter13" / "packing.py"
    source.write_text('"""Words."""\n\n\ndef f(x):  # and more\n    return x + 1\n')
    assert mutants.state_of("packing", counts) is None
    for file in (source, project / "tests" / "package" / "test_packing.py"):
        before = file.read_text()
        file.write_text(before.replace("1", "3"))
        assert mutants.state_of("packing", counts).startswith("stale")
        mutants.write_report(counts, [], {})
        row = re.search("^.*`packing`.*$", mutants.REPORT.read_text(), re.M)[0]
        assert "| stale" in row
        file.write_text(before)
    assert mutants.state_of("packing", counts) is None


@pytest.fixture
def commands(monkeypatch):
    """What mutmut is asked for, and `ends`: what it says has become of the mutants."""
    asked, ends = [], {}
    monkeypatch.setattr(mutants, "mutmut", lambda folder, *words: asked.append(words[3:]))
    monkeypatch.setattr(mutants, "outcomes", lambda folder: ends)
    asked.append(ends)
    return asked


def test_a_run_is_taken_up_again(project, commands):
    """Nothing is repeated but what an interruption left open, or new tests may kill."""
    ends = commands.pop()
    folder, tests = project / "mutants" / "packing", project / "tests" / "package"
    mutants.run("packing", folder)
    mutants.run("packing", folder)  # the first was stopped before it had any result
    assert commands == [(), ()]
    commands.pop()
    ends |= {"a": "killed", "b": "survived", "c": "check was interrupted by user"}
    mutants.run("packing", folder)
    assert commands[1:] == [("c",)]
    ends |= {"d": "not checked"}
    mutants.run("packing", folder)
    assert commands[2:] == [("c",), ()]

    (folder / "kept").touch()
    file = tests / "test_packing.py"
    file.write_text(file.read_text() + "\n\ndef test_two():\n    assert f(2) == 3\n")
    mutants.run("packing", folder)
    assert commands[4:] == [("b", "c"), ()]
    assert (folder / "kept").exists()
    file.write_text("def test_two():\n    assert f(2) == 3\n")  # what test_one killed is open
    mutants.run("packing", folder)
    assert commands[6:] == [()]
    assert not (folder / "kept").exists()

    (folder / "kept").touch()
    (project / "chapter13" / "packing.py").write_text("def f(x):\n    return 1 + x\n")
    mutants.run("packing", folder)
    assert commands[7:] == [()]
    assert not (folder / "kept").exists()


def test_what_was_not_tried_is_no_count(project, commands):
    commands.pop().update(a="killed", b="not checked")
    with pytest.raises(SystemExit, match="packing: 1 mutants were not tried"):
        mutants.count("packing")
