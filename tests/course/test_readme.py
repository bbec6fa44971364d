"""The README's generated sections: written in their place, and nowhere else."""

import pytest
from tiny import says

from tools import readme


@pytest.fixture
def file(tmp_path, monkeypatch):
    monkeypatch.setattr(readme, "FILE", tmp_path / "README.md")
    return readme.FILE


SECTION = readme.section("speed", "make speed")


def test_a_section_is_replaced_and_the_rest_kept(file):
    file.write_text("before\n" + SECTION[0] + "old\n" + SECTION[1] + "\nafter\n")
    readme.write(SECTION, "new\n")
    assert readme.read(SECTION) == "new\n"
    assert file.read_text() == "before\n" + SECTION[0] + "new\n" + SECTION[1] + "\nafter\n"


@pytest.mark.parametrize("text", ["", SECTION[0], SECTION[1]])
def test_lost_comments_are_named_and_nothing_is_written(file, text):
    file.write_text(text)
    with pytest.raises(ValueError, match=says("README.md", "speed", "make speed")):
        readme.write(SECTION, "new")
    assert file.read_text() == text
