"""What `make bench` times, and the one clock and the one measure of memory."""

import pytest
import torch
from tiny import says

from tools import bench, bench_models, measure
from tools.formats import FORMATS


def test_unknown_names_are_refused():
    with pytest.raises(SystemExit, match=says("nf5", *bench.BENCHES)):
        bench.main(["nf5"])


def test_medians_alternate_and_skip_the_first_round():
    order = []
    times = measure.medians(lambda: order.append("a"), lambda: order.append("b"), runs=2)
    assert order == ["a", "b"] * 3
    assert all(seconds >= 0 for seconds in times)


def test_the_peak_of_a_piece_of_work_is_seen():
    size = 64 * 2**20
    with measure.memory() as used:
        block = torch.ones(size, dtype=torch.uint8)
        del block
    assert used.peak >= used.before
    # whole pages, and other threads' crumbs
    assert abs(used.extra - size) < size / 8
    with measure.memory() as idle:
        pass
    assert idle.extra < size / 8


def test_each_measured_format_is_in_the_registry():
    assert set(bench_models.MEASURED) <= set(FORMATS)
    assert set(bench_models.FUSED_NF4) <= set(bench_models.MEASURED)
