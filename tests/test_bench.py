"""The README's table of speeds says what data/results.json holds."""

import pytest

from chapter13 import results
from tools import bench


def test_readme_is_not_stale():
    text = bench.README.read_text(encoding="utf-8")
    _, _, rest = text.partition(bench.SECTION[0])
    section, end, _ = rest.partition(bench.SECTION[1])
    assert end, "the README has lost the comments between which `make bench` writes"
    assert section == bench.readme_section(results.load()), "stale: run `make bench`"


def test_unknown_names_are_refused():
    with pytest.raises(SystemExit, match="there are: int8, nf4, packing, sliders, import, models"):
        bench.main(["nf5"])


def test_medians_alternate_and_skip_the_first_round():
    order = []
    times = bench.medians(lambda: order.append("a"), lambda: order.append("b"), runs=2)
    assert order == ["a", "b"] * 3
    assert all(seconds >= 0 for seconds in times)
