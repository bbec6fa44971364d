"""What `make bench` times, and the one clock and the one measure of memory."""

import subprocess
import sys

import pytest
from tiny import says

from tools import bench, bench_models, markdown, measure
from tools.formats import FORMATS


def test_unknown_names_are_refused():
    with pytest.raises(SystemExit, match=says("nf5", *bench.BENCHES)):
        bench.main(["nf5"])


def test_medians_alternate_and_skip_the_first_round():
    order = []
    times = measure.medians(lambda: order.append("a"), lambda: order.append("b"), runs=2)
    assert order == ["a", "b"] * 3
    assert all(seconds >= 0 for seconds in times)


MEASURING = """
import torch
from tools import measure
with measure.memory() as used:
    block = torch.ones(64 * 2**20, dtype=torch.uint8)
    del block
with measure.memory() as idle:
    pass
print(used.extra, idle.extra)
"""


def test_the_peak_of_a_piece_of_work_is_seen():
    # a new process: one that has worked before may hold freed memory, and take it again
    done = subprocess.run(
        [sys.executable, "-c", MEASURING], cwd=markdown.ROOT, capture_output=True, text=True
    )
    used, idle = map(int, done.stdout.split())
    size = 64 * 2**20
    # whole pages, and the code that is read from disk at the first call
    assert abs(used - size) < size / 8
    assert idle < size / 8


def test_each_measured_format_is_in_the_registry():
    assert set(bench_models.MEASURED) <= set(FORMATS)
    assert set(bench_models.FUSED_NF4) <= set(bench_models.MEASURED)
