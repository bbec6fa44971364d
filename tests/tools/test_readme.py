"""What README.md and docs/ say of the course is so: size, notebooks, minutes, the one result."""

import re

import pytest

from chapter13 import results
from tools import markdown, notebooks, table

ROOT = markdown.ROOT
README = (ROOT / "README.md").read_text(encoding="utf-8")
TEACHING = (ROOT / "docs" / "teaching.md").read_text(encoding="utf-8")
MOST_BYTES = 9 * 1024
LINK = r"\]\((?:\.\./)?notebooks/(\d\d_\w+\.ipynb)\)"


def minutes(path):
    """How long a notebook takes to work through, as its opening says."""
    opening = notebooks.read(path).cells[0].source  # its cells run for fewer minutes
    return max(map(int, re.findall(r"\b(\d+) minutes", opening.replace("an hour", "60 minutes"))))


MINUTES = {path.name: minutes(path) for path in notebooks.numbered()}


def listed(text):
    """notebook -> minutes, from the rows of a table that have both a number and links."""
    found = {}
    for row in re.findall(r"^\|.*\|$", text, re.MULTILINE):
        names, times = re.findall(LINK, row), re.search(r"\| (\d\d(?: \+ \d\d)*) \|", row)
        if names and times:
            found |= dict(zip(names, map(int, times[1].split("+")), strict=True))
    return found


def part(text, heading):
    """What is below a heading of the second level."""
    return re.search(rf"^## {heading}\n(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)[1]


def test_the_readme_fits_on_two_screens():
    assert len(README.encode()) <= MOST_BYTES


def test_the_readme_lists_every_notebook_with_its_minutes_and_the_glossary():
    assert listed(part(README, "The notebooks")) == MINUTES
    assert "](notebooks/glossary.md)" in README


def test_nothing_to_paste_holds_a_placeholder():
    for block in re.findall(r"^```.*?^```", README, re.MULTILINE | re.DOTALL):
        assert not re.search(r"[<>]|\.\.\.|…", block)


def test_the_hours_are_those_of_the_notebooks():
    assert "eight to nine hours" in README
    assert "eight to nine hours" in TEACHING
    assert 8 <= sum(MINUTES.values()) / 60 <= 9
    short = re.search(r"work through ([\d, and]+), in about four hours", README)[1]
    taken = [MINUTES[name] for name in MINUTES if name[:2] in re.findall(r"\d\d", short)]
    assert len(taken) == 5
    assert 3.75 <= sum(taken) / 60 <= 4.25


@pytest.mark.parametrize(("heading", "most"), [("90 minutes", 90), ("One day", 5 * 60)])
def test_a_short_syllabus_takes_the_notebooks_minutes(heading, most):
    times = listed(part(TEACHING, heading))
    assert len(times) >= 2
    assert times == {name: MINUTES[name] for name in times}
    assert 0.9 * most <= sum(times.values()) <= most


def test_the_full_syllabus_has_every_notebook_in_sessions_of_100_minutes():
    text = part(TEACHING, "The full course")
    assert listed(text) == MINUTES
    sessions = re.findall(r"^\| \d \| ([\d +]+) \|", text, re.MULTILINE)
    assert len(sessions) == 6
    assert all(sum(map(int, session.split("+"))) <= 100 for session in sessions)


def kl(name):
    return results.load()[table.KEYS[name]]["quality"]["kl"]["value"]


def test_the_sentences_on_the_result_hold():
    sixteen, eight, awq, gptq, nf4, mxfp4 = map(kl, table.IN_README)
    assert max(sixteen, eight) < 0.01  # "almost nothing"
    assert max(awq, gptq) < min(nf4, mxfp4)  # "lose least"
    low, high = results.load()[table.KEYS[table.IN_README[2]]]["quality"]["kl"]["interval"]
    assert low < gptq < high  # "close"
    assert kl("GPTQ INT3, groups of 64, clip search") < kl("AWQ INT3, groups of 64")
