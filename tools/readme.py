"""The README's generated sections: what a command measured, between two comments.

SECTION = readme.section("bench", "make bench")
readme.write(SECTION, text)
assert readme.read(SECTION) == text
"""

from pathlib import Path

FILE = Path(__file__).resolve().parent.parent / "README.md"


def section(name: str, command: str) -> tuple[str, str]:
    """The comments before and after a section."""
    return f"<!-- {name}: written by `{command}`, do not edit -->\n", f"<!-- end of {name} -->"


def read(section: tuple[str, str]) -> str:
    """What stands in a section. Raises ValueError where the README has lost its comments."""
    return _parts(section)[1]


def write(section: tuple[str, str], text: str) -> None:
    """Puts `text` into a section; raises as `read`."""
    before, _, after = _parts(section)
    start, end = section
    FILE.write_text(before + start + text + end + after, encoding="utf-8")


def table(rows) -> str:
    """Rows of words, the heads and the line below them included, as Markdown."""
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def _parts(section):
    start, end = section
    before, begun, rest = FILE.read_text(encoding="utf-8").partition(start)
    text, ended, after = rest.partition(end)
    if not (begun and ended):
        raise ValueError(f"README.md has lost the comments {start.strip()} and {end}")
    return before, text, after
