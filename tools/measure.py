"""Measures time and memory, for all measuring programs.

    seconds(work)                the time of one call, until the device has finished
    medians(ours, theirs)        median times of several functions, called in turn
    with memory() as used: ...   the bytes held before the block, and the peak in it

On a CPU this is the memory of the process, as Linux counts it; on a GPU the memory that PyTorch has
allocated there.
"""

import gc
import re
import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch

CPU = torch.device("cpu")


def wait(device):
    """Wait until a GPU has finished; a CPU always has finished."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(work, device=CPU):
    """The time that one call of `work` takes."""
    wait(device)
    start = time.perf_counter()
    work()
    wait(device)
    return time.perf_counter() - start


def medians(*sides, runs=5, device=CPU):
    """The median seconds of each function, called in turn; the first round only warms up."""
    rounds = []
    for _ in range(runs + 1):
        gc.collect()
        rounds.append([seconds(side, device) for side in sides])
    return [median(times) for times in zip(*rounds[1:], strict=True)]


@dataclass
class Memory:
    """Bytes held before a piece of work, and the peak during it, which includes these."""

    before: int
    peak: int = 0

    @property
    def extra(self):
        """The peak beyond what was held before."""
        return max(0, self.peak - self.before)


@contextmanager
def memory(device=CPU):
    """Measures the memory of the `with` block; `peak` is set when the block ends."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        used = Memory(torch.cuda.memory_allocated(device))
    else:
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins at what is held now
        used = Memory(process_bytes("VmRSS"))
    yield used
    if device.type == "cuda":
        used.peak = torch.cuda.max_memory_allocated(device)
    else:
        used.peak = process_bytes("VmHWM")


def process_bytes(field, process="self"):
    """A size that Linux reports for a process: VmRSS (now), VmHWM (peak), RssAnon or RssFile."""
    status = Path(f"/proc/{process}/status").read_text()
    return int(re.search(rf"^{field}:\s+(\d+) kB", status, re.MULTILINE)[1]) * 1024
