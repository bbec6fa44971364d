"""The README's table of speeds says what data/results.json holds."""

import pytest
from tiny import says

from chapter13 import results
from tools import bench, readme


def test_readme_is_not_stale():
    assert readme.read(bench.SECTION) == bench.readme_section(results.load()), (
        "stale: run `make bench`"
    )


def test_unknown_names_are_refused():
    with pytest.raises(
        SystemExit, match=says("nf5", "int8, nf4, packing, sliders, import, models")
    ):
        bench.main(["nf5"])


def test_medians_alternate_and_skip_the_first_round():
    order = []
    times = bench.medians(lambda: order.append("a"), lambda: order.append("b"), runs=2)
    assert order == ["a", "b"] * 3
    assert all(seconds >= 0 for seconds in times)
