"""Reads and writes GGUF, the file format of llama.cpp: named metadata, then named tensors.

    "GGUF", version, number of tensors, number of keys        4 + 4 + 8 + 8 bytes
    each key:     name, type, value
    each tensor:  name, number of dimensions, dimensions (the innermost first), type, offset
    zeros up to a multiple of the alignment
    the tensors' bytes, each again padded to the alignment

Numbers are little-endian; a string is its length in 8 bytes, then UTF-8. gguf_blocks.py decodes the
bytes of a tensor.

A file is untrusted input. Every count, length, offset and type is checked against the size of the
file before it is used, so a wrong count cannot cause a large allocation. A damaged file raises a
ValueError that names the byte; the check takes time and memory in proportion to the header.
"""

import math
import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from chapter13.atomic import replacing

MAGIC = b"GGUF"
VERSIONS = (2, 3)  # their differences do not matter here; version 1 had shorter counts
ALIGNMENT = 32  # the default of the key "general.alignment"
MOST_DIMENSIONS = 4


@dataclass(frozen=True)
class Kind:
    """A data type of tensors: `size` bytes hold `weights` weights, a block."""

    name: str
    weights: int
    size: int


KINDS = {
    0: Kind("F32", 1, 4),
    1: Kind("F16", 1, 2),
    2: Kind("Q4_0", 32, 18),
    3: Kind("Q4_1", 32, 20),
    6: Kind("Q5_0", 32, 22),
    7: Kind("Q5_1", 32, 24),
    8: Kind("Q8_0", 32, 34),
    9: Kind("Q8_1", 32, 40),
    10: Kind("Q2_K", 256, 84),
    11: Kind("Q3_K", 256, 110),
    12: Kind("Q4_K", 256, 144),
    13: Kind("Q5_K", 256, 176),
    14: Kind("Q6_K", 256, 210),
    15: Kind("Q8_K", 256, 292),
    16: Kind("IQ2_XXS", 256, 66),
    17: Kind("IQ2_XS", 256, 74),
    18: Kind("IQ3_XXS", 256, 98),
    19: Kind("IQ1_S", 256, 50),
    20: Kind("IQ4_NL", 32, 18),
    21: Kind("IQ3_S", 256, 110),
    22: Kind("IQ2_S", 256, 82),
    23: Kind("IQ4_XS", 256, 136),
    24: Kind("I8", 1, 1),
    25: Kind("I16", 1, 2),
    26: Kind("I32", 1, 4),
    27: Kind("I64", 1, 8),
    28: Kind("F64", 1, 8),
    29: Kind("IQ1_M", 256, 56),
    30: Kind("BF16", 1, 2),
    34: Kind("TQ1_0", 256, 54),
    35: Kind("TQ2_0", 256, 66),
    39: Kind("MXFP4", 32, 17),
    40: Kind("NVFP4", 64, 36),
    41: Kind("Q1_0", 128, 18),
}
KIND_OF = {kind.name: kind for kind in KINDS.values()}

BOOL, STRING, ARRAY = 7, 8, 9  # types of metadata; all others are numbers:
NUMBERS = {0: "u1", 1: "i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4"}
NUMBERS |= {10: "<u8", 11: "<i8", 12: "<f8"}
NUMBERS = {number: np.dtype(name) for number, name in NUMBERS.items()}


@dataclass(frozen=True, slots=True)
class Entry:
    """Where a tensor is stored: `offset` from the start of the file, in bytes."""

    kind: Kind
    shape: tuple[int, ...]
    offset: int
    nbytes: int


class _Cursor:
    """Reads forward, never beyond the end."""

    def __init__(self, data: memoryview):
        self.data = data
        self.at = 0

    def fail(self, said: str, at: int | None = None):
        raise ValueError(f"byte {self.at if at is None else at}: {said}")

    def take(self, size: int, what: str) -> memoryview:
        left = len(self.data) - self.at
        if size > left:
            self.fail(f"{what} takes {size} bytes, but the file has {left} more")
        self.at += size
        return self.data[self.at - size : self.at]

    def integer(self, size: int, what: str) -> int:
        return int.from_bytes(self.take(size, what), "little")

    def count(self, smallest: int, what: str) -> int:
        """A number of items of at least `smallest` bytes each, for which there is room."""
        start = self.at
        count = self.integer(8, f"the number of {what}")
        left = len(self.data) - self.at
        if count * smallest > left:
            self.fail(
                f"{count} {what} take at least {count * smallest} bytes, "
                f"but the file has {left} more",
                start,
            )
        return count

    def string(self, what: str) -> str:
        start = self.at
        size = self.count(1, f"bytes of {what}")
        try:
            return str(self.take(size, what), "utf-8")
        except UnicodeDecodeError as error:
            self.fail(f"{what} is not UTF-8: {error.reason}", start + 8 + error.start)


def parse(data: memoryview) -> tuple[dict, dict[str, Entry]]:
    """Metadata and tensor entries of a GGUF file's bytes, each by name, in the file's order.

    A metadata value is a bool, a str, a NumPy number or array of the file's own data type, or a
    list of str. Raises ValueError, naming the byte, for an invalid file: not GGUF, another version
    or byte order, truncated, counts or lengths beyond the end, unknown types, names that occur
    twice, tensors outside the file, misaligned or overlapping.
    """
    cursor = _Cursor(data)
    if bytes(cursor.take(4, "the word GGUF")) != MAGIC:
        cursor.fail(f"this is no GGUF file: it begins with {bytes(data[:4])!r}", 0)
    version = cursor.integer(4, "the version")
    if version not in VERSIONS:
        swapped = int.from_bytes(version.to_bytes(4, "little"), "big")
        reason = "is big-endian" if swapped in VERSIONS else f"has version {version}"
        cursor.fail(f"the file {reason}; versions 2 and 3, little-endian, can be read", 4)
    tensors = cursor.count(32, "tensors")  # each has at least length, dimensions, type, offset
    keys = cursor.count(13, "keys")  # each has at least length, type, one byte of value

    metadata: dict = {}
    for _ in range(keys):
        start = cursor.at
        name = cursor.string("a key")
        if name in metadata:
            cursor.fail(f"the key {name!r} occurs twice", start)
        metadata[name] = _value(cursor, name)
    try:
        alignment = alignment_of(metadata)
    except ValueError as error:
        cursor.fail(str(error))

    entries: dict[str, tuple[int, Entry]] = {}
    for _ in range(tensors):
        start = cursor.at
        name = cursor.string("the name of a tensor")
        if name in entries:
            cursor.fail(f"the tensor {name!r} occurs twice", start)
        entries[name] = _entry(cursor, name)
    return metadata, _placed(cursor, entries, alignment)


def _value(cursor: _Cursor, key: str):
    kind = cursor.integer(4, f"the type of {key!r}")
    if kind != ARRAY:
        value = _values(cursor, kind, 1, key)[0]
        return bool(value) if kind == BOOL else value
    kind = cursor.integer(4, f"the type of the array {key!r}")
    # the format's description allows an array inside an array; no program that we know reads one
    smallest = 8 if kind == STRING else NUMBERS[kind].itemsize if kind in NUMBERS else 1
    return _values(cursor, kind, cursor.count(smallest, f"elements of {key!r}"), key)


def _values(cursor: _Cursor, kind: int, count: int, key: str):
    if kind == STRING:
        return [cursor.string(f"the text of {key!r}") for _ in range(count)]
    if kind == BOOL:
        return np.frombuffer(cursor.take(count, f"the value of {key!r}"), np.uint8) != 0
    if kind in NUMBERS:
        size = count * NUMBERS[kind].itemsize
        return np.frombuffer(cursor.take(size, f"the value of {key!r}"), NUMBERS[kind]).copy()
    cursor.fail(f"{key!r} has type {kind}; known are 0 to 12, and no array inside an array")


def alignment_of(metadata: dict) -> int:
    """The alignment of tensors in bytes; ValueError unless it is a power of two."""
    alignment = metadata.get("general.alignment", np.uint32(ALIGNMENT))
    if not isinstance(alignment, np.uint32) or int(alignment).bit_count() != 1:
        raise ValueError(f"general.alignment is {alignment}: it must be a uint32 power of two")
    return int(alignment)


def part_of(metadata: dict) -> tuple[int, int]:
    """(number of this part of a split file, from 1; number of parts); (1, 1) for a whole file.

    Raises ValueError if split.no or split.count is not an integer.
    """
    number, count = (metadata.get(f"split.{name}", np.uint16(0)) for name in ("no", "count"))
    if not isinstance(number, np.integer) or not isinstance(count, np.integer):
        raise ValueError(f"split.no is {number!r} and split.count {count!r}: both must be integers")
    return (int(number) + 1, int(count)) if count > 1 else (1, 1)  # 0 after a merge


def _entry(cursor: _Cursor, name: str) -> tuple[int, Entry]:
    """(position of the offset field in the file, the entry with the offset as stored)."""
    start = cursor.at
    dimensions = cursor.integer(4, f"the number of dimensions of {name!r}")
    if not 1 <= dimensions <= MOST_DIMENSIONS:
        cursor.fail(f"{name!r} has {dimensions} dimensions; 1 to {MOST_DIMENSIONS} can be", start)
    start = cursor.at
    shape = [cursor.integer(8, f"a dimension of {name!r}") for _ in range(dimensions)][::-1]
    if 0 in shape:
        cursor.fail(f"{name!r} has shape {tuple(shape)}: it is empty", start)
    start = cursor.at
    number = cursor.integer(4, f"the type of {name!r}")
    if number not in KINDS:
        cursor.fail(f"{name!r} has type {number}, which is not known", start)
    kind = KINDS[number]
    if shape[-1] % kind.weights:
        cursor.fail(
            f"{name!r} has rows of {shape[-1]}, but {kind.name} has blocks of {kind.weights}", start
        )
    start = cursor.at
    offset = cursor.integer(8, f"the offset of {name!r}")
    return start, Entry(kind, tuple(shape), offset, math.prod(shape) // kind.weights * kind.size)


def _placed(cursor: _Cursor, entries: dict[str, tuple[int, Entry]], alignment: int):
    """name -> Entry with its offset from the start of the file; checks that all tensors fit."""
    start = cursor.at + -cursor.at % alignment
    placed = {}
    for name, (at, entry) in entries.items():
        if entry.offset % alignment:
            cursor.fail(f"{name!r} begins at {entry.offset}, no multiple of {alignment}", at)
        end = start + entry.offset + entry.nbytes
        if end > len(cursor.data):
            cursor.fail(
                f"{name!r} ends at byte {end}, but the file has {len(cursor.data)} bytes", at
            )
        placed[name] = Entry(entry.kind, entry.shape, start + entry.offset, entry.nbytes)
    end = start
    for name, entry in sorted(placed.items(), key=lambda item: item[1].offset):
        if entry.offset < end:
            cursor.fail(f"{name!r} overlaps the tensor before it", entries[name][0])
        end = entry.offset + entry.nbytes
    return placed


def write(path: Path | str, metadata: dict, tensors: dict) -> Path:
    """Writes a GGUF file of version 3 atomically; returns the path.

    `metadata`: values as `parse` returns them, so that a file can be read and written again byte
    for byte; a Python int or float is refused, because it does not define its width. `tensors`:
    name -> an object with `.kind` (a name such as "Q4_0"), `.shape` and `.blocks` (uint8, a
    torch.Tensor of all its bytes). Raises TypeError for a value of another type, ValueError for an
    invalid alignment and for a tensor whose bytes do not fit its shape.
    """
    path = Path(path)
    alignment = alignment_of(metadata)
    header = [MAGIC, struct.pack("<IQQ", VERSIONS[-1], len(tensors), len(metadata))]
    for key, value in metadata.items():
        header += [_string(key), _typed(key, value)]
    offset = 0
    numbers = {kind.name: number for number, kind in KINDS.items()}
    for name, tensor in tensors.items():
        kind = KIND_OF[tensor.kind]
        nbytes = math.prod(tensor.shape) // kind.weights * kind.size
        if tensor.shape[-1] % kind.weights or tensor.blocks.nbytes != nbytes:
            raise ValueError(
                f"{name!r}, {kind.name} of shape {tuple(tensor.shape)}, takes {nbytes} bytes, "
                f"not {tensor.blocks.nbytes}"
            )
        dimensions = struct.pack(f"<I{len(tensor.shape)}Q", len(tensor.shape), *tensor.shape[::-1])
        place = struct.pack("<IQ", numbers[kind.name], offset)
        header += [_string(name), dimensions, place]
        offset += nbytes + -nbytes % alignment

    with replacing(path) as part, part.open("wb") as file:
        file.write(b"".join(header))
        file.write(bytes(-file.tell() % alignment))
        for tensor in tensors.values():
            file.write(tensor.blocks.contiguous().cpu().numpy().data)
            file.write(bytes(-tensor.blocks.nbytes % alignment))
    return path


def _string(text: str) -> bytes:
    encoded = text.encode("utf-8")
    return struct.pack("<Q", len(encoded)) + encoded


def _typed(key: str, value) -> bytes:
    """A metadata value, preceded by its type."""
    if isinstance(value, (list, np.ndarray)):
        kind, content = _plain(key, value)
        return struct.pack("<IIQ", ARRAY, kind, len(value)) + content
    kind, content = _plain(key, value if isinstance(value, np.generic) else [value])
    return struct.pack("<I", kind) + content


def _plain(key: str, values) -> tuple[int, bytes]:
    """(type, bytes) of consecutive values of one type."""
    if isinstance(values, list) and all(isinstance(value, str) for value in values):
        return STRING, b"".join(map(_string, values))
    if isinstance(values, list) and all(isinstance(value, bool) for value in values):
        return BOOL, bytes(values)
    if isinstance(values, (np.ndarray, np.generic)):
        if values.dtype == bool:
            return BOOL, values.tobytes()
        for number, dtype in NUMBERS.items():
            if values.dtype == dtype:
                return number, values.tobytes()
    raise TypeError(
        f"{key!r} cannot be written: a value must be a bool, a str, a list of str, or a NumPy "
        "number or array of 8 to 64 bits"
    )
