"""Coverage-guided fuzzing of the GGUF reader: `make fuzz`.

Atheris runs libFuzzer on Python: it mutates files, keeps those that reach new code, and stops at
the first file that raises anything except a ValueError that names a byte, takes more than 5 seconds
or uses too much memory. A valid file is also written and read again, and must be the same.

    python tools/fuzz_gguf.py -max_total_time=300 FOUND CORPUS      search; FOUND gets new files
    python tools/fuzz_gguf.py -merge=1 NEW FOUND CORPUS             fewest files that reach all code

Options are libFuzzer's own. Needs atheris, which `make fuzz` installs into a separate folder.
"""

import re
import sys
import tempfile
from pathlib import Path

import atheris
import numpy as np
import torch

with atheris.instrument_imports(include=["chapter13.gguf_file", "chapter13.gguf_blocks"]):
    from chapter13 import gguf_blocks, gguf_file

COPY = Path(tempfile.gettempdir()) / "chapter13-fuzz-copy.gguf"


def one_input(data: bytes) -> None:
    try:
        metadata, entries = gguf_file.parse(memoryview(data))
    except ValueError as error:
        if not re.match(r"byte \d+: ", str(error)):
            raise
        return
    mapping = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    tensors = gguf_blocks._Tensors(mapping, entries)
    for tensor in tensors.values():
        if tensor.kind in gguf_blocks.PLAIN | gguf_blocks.DECODERS:
            tensor.dequantize()
    if metadata.get("general.alignment", 0) > 1 << 16:
        return  # valid, but each tensor of the copy would be padded to that
    gguf_file.write(COPY, metadata, tensors)
    again, places = gguf_file.parse(memoryview(COPY.read_bytes()))
    assert list(again) == list(metadata)
    assert all(same(again[name], metadata[name]) for name in metadata)
    assert [(e.kind, e.shape) for e in places.values()] == [
        (e.kind, e.shape) for e in entries.values()
    ]


def same(first, second) -> bool:
    """Whether both are equal, including NaN."""
    if isinstance(first, (np.ndarray, np.generic)):
        return first.dtype == second.dtype and first.tobytes() == second.tobytes()
    return first == second


if __name__ == "__main__":
    atheris.Setup(sys.argv, one_input)
    atheris.Fuzz()
