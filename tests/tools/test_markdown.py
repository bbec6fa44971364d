"""Generated sections: written in their place and nowhere else, and what data/results.json says."""

import pytest

from chapter13 import results
from tools import bench, bench_gpu, bench_large, llamacpp, markdown, table

SECTION = markdown.section("speed", "make speed", "A.md")
GENERATED = {
    table.SECTION: table.table_section,
    table.RESULT: table.result_section,
    bench.SECTION: bench.layer_section,
    bench.MODELS_SECTION: bench.models_section,
    bench_gpu.TABLE_SECTION: bench_gpu.table_section,
    bench_gpu.LARGE_SECTION: bench_gpu.large_section,
    llamacpp.SECTION: llamacpp.table_section,
    **bench_large.SECTIONS,
}


@pytest.mark.parametrize("section", GENERATED, ids=lambda section: section.start)
def test_no_section_is_stale(section):
    expected = GENERATED[section](results.load())
    assert markdown.read(section) == expected, f"stale: {section.start}"


def test_every_section_is_held_here():
    files = [markdown.ROOT / "README.md", *(markdown.ROOT / "docs").glob("*.md")]
    names = {file.relative_to(markdown.ROOT).as_posix(): file for file in files}
    assert {section.file for section in GENERATED} <= set(names)
    for name, file in names.items():
        ours = [section for section in GENERATED if section.file == name]
        assert file.read_text(encoding="utf-8").count("do not edit -->") == len(ours), name


@pytest.fixture
def file(tmp_path, monkeypatch):
    monkeypatch.setattr(markdown, "ROOT", tmp_path)
    return tmp_path / "A.md"


def test_a_section_is_replaced_and_the_rest_kept(file):
    file.write_text("before\n" + SECTION.start + "old\n" + SECTION.end + "\nafter\n")
    markdown.write(SECTION, "new\n")
    assert markdown.read(SECTION) == "new\n"
    assert file.read_text() == "before\n" + SECTION.start + "new\n" + SECTION.end + "\nafter\n"


@pytest.mark.parametrize("text", ["", SECTION.start, SECTION.end])
def test_lost_comments_are_named_and_nothing_is_written(file, text):
    file.write_text(text)
    with pytest.raises(ValueError, match="A.md.*speed"):
        markdown.write(SECTION, "new")
    assert file.read_text() == text


def test_a_table():
    assert markdown.table([("a", "b"), ("1", "2")]) == "| a | b |\n| --- | --- |\n| 1 | 2 |"
