"""Generated sections of README.md and docs/*.md: tables between two comments.

Only tables, and a line with machine and date, are generated; the sentences around them are written
by hand.

    SECTION = markdown.section("speed", "make bench")
    markdown.write(SECTION, text)
    assert markdown.read(SECTION) == text
"""

from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Section:
    """The comments before and after a section, and the file that it is in."""

    start: str
    end: str
    file: str


def section(name: str, command: str, file: str = "docs/measurements.md") -> Section:
    return Section(
        f"<!-- {name}: written by `{command}`, do not edit -->\n", f"<!-- end of {name} -->", file
    )


def read(section: Section) -> str:
    """The text of a section. Raises ValueError if the file has lost its comments."""
    return _parts(section)[1]


def write(section: Section, text: str) -> None:
    """Puts `text` into a section; raises as `read`."""
    before, _, after = _parts(section)
    file = ROOT / section.file
    file.write_text(before + section.start + text + section.end + after, encoding="utf-8")


def table(rows) -> str:
    """Rows of strings, the header first, as a Markdown table."""
    head, *rest = rows
    lines = [head, ("---",) * len(head), *rest]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def where(environment: dict, *packages: str) -> str:
    """Machine, versions and date of a measurement, as data/results.json has them."""
    versions = [f"{name} {environment['versions'][name]}" for name in packages]
    return ", ".join([environment["machine"], *versions, environment["date"]])


def _parts(section):
    text = (ROOT / section.file).read_text(encoding="utf-8")
    before, begun, rest = text.partition(section.start)
    inside, ended, after = rest.partition(section.end)
    if not (begun and ended):
        raise ValueError(
            f"{section.file} has lost the comments {section.start.strip()} and {section.end}"
        )
    return before, inside, after
