"""A GGUF file is untrusted input: each lie is named with its byte, and costs next to nothing."""

import re
import struct
import time
import tracemalloc
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from tiny import says

from chapter13 import gguf_blocks, gguf_file
from chapter13.gguf_blocks import BlockTensor, plain, quantize, read
from chapter13.gguf_file import KINDS, NUMBERS, parse, write

CORPUS = sorted((Path(__file__).parents[1] / "gguf_corpus").glob("*.gguf"))


def text(words: str) -> bytes:
    return struct.pack("<Q", len(words.encode())) + words.encode()


def header(tensors=1, keys=0, version=3, magic=b"GGUF") -> bytes:
    return magic + struct.pack("<IQQ", version, tensors, keys)


def key(name: str, kind: int, value: bytes) -> bytes:
    return text(name) + struct.pack("<I", kind) + value


def tensor(name="w", shape=(32, 2), kind=2, offset=0) -> bytes:
    """The entry of a tensor; as in the file the innermost dimension comes first."""
    dimensions = struct.pack(f"<I{len(shape)}Q", len(shape), *shape)
    return text(name) + dimensions + struct.pack("<IQ", kind, offset)


def padded(head: bytes, data=bytes(64), alignment=32) -> bytes:
    return head + bytes(-len(head) % alignment) + data


SOUND = padded(header() + tensor())
ALIGN = "general.alignment"


def test_the_file_that_the_lies_are_told_about_is_sound():
    metadata, entries = parse(memoryview(SOUND))
    assert metadata == {}
    assert entries["w"] == gguf_file.Entry(gguf_file.KIND_OF["Q4_0"], (2, 32), 96, 36)


U32, U64 = struct.Struct("<I").pack, struct.Struct("<Q").pack
LIES = {
    "empty": (b"", 0, "4 bytes", 0),
    "another file": (b"PK\3\4" + bytes(40), 0, r"b'PK\x03\x04'"),
    "version 1": (header(version=1), 4, "version 1", 2, 3),
    "big-endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), 4, "big-endian"),
    "a short head": (SOUND[:12], 8, "number of tensors", "8 bytes", 4),
    "tensors": (header(2**64 - 1) + SOUND[24:], 8, 32 * (2**64 - 1), 144),
    "some tensors": (header(10) + SOUND[24:], 8, "10 tensors", "320 bytes"),
    "keys": (header(1, 2**60) + SOUND[24:], 16, "keys", 2**60),
    "length of a key": (
        header(0, 1) + U64(2**63) + bytes(20), 24, "key", 2**63,
    ),
    "a key twice": (
        header(0, 2) + key("a", 4, U32(1)) + key("a", 4, U32(2)), 41, "'a'", "twice",
    ),
    "a key in no UTF-8": (header(0, 1) + U64(2) + b"a\xff" + bytes(9), 33, "key", "UTF-8"),
    "type of a value": (header(0, 1) + key("a", 13, U64(0)), 37, "'a'", "type 13"),
    "a value cut off": (header(0, 1) + key("a", 10, bytes(3)), 37, "'a'", "8 bytes"),
    "length of a text": (header(0, 1) + key("a", 8, U64(5) + b"four"), 37, "5 bytes", "text"),
    "an array in an array": (
        header(0, 1) + key("a", 9, U32(9) + U64(1) + bytes(12)), 49, "array",
    ),
    "length of an array": (
        header(0, 1) + key("a", 9, U32(10) + U64(2**61) + bytes(8)), 41, "'a'", 2**61,
    ),
    "texts of an array": (
        header(0, 1) + key("a", 9, U32(8) + U64(2) + text("") + bytes(7)), 41, "16 bytes",
    ),
    "alignment 0": (padded(header(1, 1) + key(ALIGN, 4, U32(0)) + tensor()), 57, "alignment", 0),
    "alignment 48": (
        padded(header(1, 1) + key(ALIGN, 4, U32(48)) + tensor()), 57, 48, "power of two",
    ),
    "alignment as text": (
        padded(header(1, 1) + key(ALIGN, 8, text("32")) + tensor()), 63, "alignment", "uint32",
    ),
    "alignment beyond the end": (
        padded(header(1, 1) + key(ALIGN, 4, U32(2**31)) + tensor()), 90, 2147483684,
    ),
    "a tensor twice": (padded(header(2) + tensor() + tensor(offset=64)), 65, "'w'", "twice"),
    "no dimension": (padded(header() + tensor(shape=())), 33, "'w'", "0 dimensions", "1 to 4"),
    "many dimensions": (padded(header() + tensor(shape=(1,) * 5)), 33, "'w'", "5 dimensions"),
    "2**32 dimensions": (
        header() + text("w") + U32(2**32 - 1) + bytes(99), 33, "'w'", 4294967295,
    ),
    "an empty tensor": (padded(header() + tensor(shape=(32, 0))), 37, "(0, 32)", "empty"),
    "type of a tensor": (padded(header() + tensor(kind=4)), 53, "'w'", "type 4"),
    "rows without blocks": (padded(header() + tensor(shape=(33, 2))), 53, 33, "Q4_0"),
    "a huge tensor": (padded(header() + tensor(shape=(2**63, 2**63))), 57, 160),
    "offset beyond the end": (padded(header() + tensor(offset=64)), 57, 196),
    "a huge offset": (padded(header() + tensor(offset=2**64 - 32)), 57, "160 bytes"),
    "offset between": (padded(header() + tensor(offset=8)), 57, 8, 32),
    "one on another": (
        padded(header(2) + tensor() + tensor("v", offset=32), bytes(96)), 98, "'v'", "overlaps",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", LIES)
def test_each_lie_is_named_with_its_byte(name, tmp_path):
    data, byte, *facts = LIES[name]
    with pytest.raises(ValueError, match=rf"^(?=byte {byte}: ){says(*facts)}"):
        parse(memoryview(data))
    path = tmp_path / "lie.gguf"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=says("lie.gguf", f"byte {byte}")):
        read(path)


def full() -> bytes:
    """A file with a value of every type, arrays of them, and tensors of three kinds."""
    words = b""
    values = {number: np.array([1, 0, 1], dtype).tobytes() for number, dtype in NUMBERS.items()}
    values |= {7: b"\1\0\1", 8: text("ä") + text("") + text("b")}
    first = {number: value[: len(value) // 3] for number, value in values.items()} | {8: text("ä")}
    for number, value in values.items():
        words += key(f"one {number}", number, first[number])
        words += key(f"many {number}", 9, U32(number) + U64(3) + value)
    entries = tensor("a", (32, 2), 2, 0) + tensor("b", (3,), 0, 64) + tensor("c", (256,), 14, 96)
    data = bytes(range(36)) + bytes(28) + bytes(12) + bytes(20) + bytes(210)
    return padded(header(3, 2 * len(values)) + words + entries, data)


def consume(data: bytes) -> None:
    """Everything that a reader of a file may do with it, apart from the mapping itself."""
    metadata, entries = parse(memoryview(data))
    repr(metadata)
    tensors = gguf_blocks._Tensors(torch.frombuffer(bytearray(data), dtype=torch.uint8), entries)
    for name in tensors:
        if tensors[name].kind in gguf_blocks.PLAIN | gguf_blocks.DECODERS:
            tensors[name].dequantize()


def refusal(data: bytes) -> str | None:
    """How the file is refused, or None; anything but a ValueError that names a byte is raised."""
    try:
        consume(data)
    except ValueError as error:
        if not re.match(r"byte \d+: ", str(error)):
            raise
        return str(error)
    return None


def test_cut_off_anywhere():
    data = full()
    consume(data)
    for size in range(len(data)):
        with pytest.raises(ValueError, match="^byte "):
            consume(data[:size])


@pytest.mark.parametrize("change", ["zero", "ones", "flip", "sign"])
def test_every_byte_of_the_header_changed(change):
    """Either it is still a sound file, or the error names the byte: nothing else happens."""
    data, refused = full(), 0
    for place in range(len(data) - 306):
        spoiled = bytearray(data)
        spoiled[place] = {
            "zero": 0,
            "ones": 255,
            "flip": data[place] ^ 1,
            "sign": data[place] ^ 128,
        }[change]
        refused += refusal(bytes(spoiled)) is not None
    assert refused > 60


@pytest.mark.parametrize("path", CORPUS, ids=lambda path: path.stem)
def test_the_corpus_of_the_fuzzer(path):
    """What tools/fuzz_gguf.py found to reach new code. Its first word says how it must end."""
    assert (refusal(path.read_bytes()) is None) == path.stem.startswith("sound")


def test_the_corpus_is_there():
    stems = {path.stem.split("-")[0] for path in CORPUS}
    assert stems == {"sound", "bad"}
    assert sum(path.stat().st_size for path in CORPUS) < 100_000


def hostile(size: int) -> dict[str, bytes]:
    """Files of about a size that cost a careless reader most."""
    empty = size // 8
    texts = header(0, 1) + key("a", 9, U32(8) + U64(empty)) + bytes(8 * empty)
    keys = b"".join(key(f"{i:07}", 0, b"\0") for i in range(size // 20))
    entries = b"".join(tensor(f"{i:07}", (1,), 24, 32 * i) for i in range(size // 39))
    return {
        "empty texts": texts,
        "keys": header(0, size // 20) + keys,
        "tensors beyond the end": header(size // 39) + entries,
        "tensors": padded(header(size // 39) + entries, bytes(32 * (size // 39))),
    }


@pytest.mark.parametrize("name", hostile(1000))
def test_memory_and_time_grow_with_the_file_alone(name):
    """At most 30 bytes of memory for each byte of the header, and below 10 microseconds."""
    size = 200_000
    data = hostile(size)[name]
    tracemalloc.start()
    try:
        parse(memoryview(data))
    except ValueError:
        pass
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 30 * size
    start = time.process_time()
    try:
        parse(memoryview(data))
    except ValueError:
        pass
    assert time.process_time() - start < 10e-6 * size


# --- types, and writing ------------------------------------------------------------------------


def test_the_kinds_are_gguf_s():
    theirs = {int(kind): (kind.name, *sizes) for kind, sizes in gguf.GGML_QUANT_SIZES.items()}
    assert {n: (kind.name, kind.weights, kind.size) for n, kind in KINDS.items()} == theirs


VALUES = {
    "flag": True,
    "words": "grüße",
    "list": ["a", "", "ü"],
    "flags": np.array([True, False]),
    "nothing": np.array([], np.float32),
    **{f"n{number}": dtype.type(3) for number, dtype in NUMBERS.items()},
    **{f"a{number}": np.arange(5).astype(dtype) for number, dtype in NUMBERS.items()},
}


def tensors():
    weight = torch.randn(6, 64, generator=torch.Generator().manual_seed(0))
    stored = {kind: quantize(weight, kind) for kind in gguf_blocks.ENCODERS}
    return {"norm": plain(weight[0, :5]), **stored}


@pytest.mark.parametrize("alignment", [None, 8, 256])
def test_written_and_read_again(tmp_path, alignment):
    metadata = VALUES | ({} if alignment is None else {ALIGN: np.uint32(alignment)})
    path = write(tmp_path / "new.gguf", metadata, tensors())
    found = read(path)
    assert list(found.metadata) == list(metadata)
    for name, value in metadata.items():
        assert type(found.metadata[name]) is type(value)
        assert np.array_equal(found.metadata[name], value)
        if isinstance(value, (np.ndarray, np.generic)):
            assert found.metadata[name].dtype == value.dtype
    assert list(found.tensors) == list(tensors())
    for name, stored in tensors().items():
        assert found.tensors[name].kind == stored.kind
        assert found.tensors[name].shape == stored.shape
        assert torch.equal(found.tensors[name].blocks, stored.blocks)
    assert repr(found) == f"GGUF({len(metadata)} keys, 5 tensors)"
    assert [path.name for path in tmp_path.iterdir()] == ["new.gguf"]


def test_gguf_s_reader_reads_what_we_write(tmp_path):
    path = write(tmp_path / "new.gguf", VALUES, tensors())
    theirs = gguf.GGUFReader(path)
    for name, value in VALUES.items():
        if name != "nothing":  # it has no type for an empty array
            value = value.tolist() if hasattr(value, "tolist") else value
            assert theirs.fields[name].contents() == value
    for found, (name, stored) in zip(theirs.tensors, tensors().items(), strict=True):
        assert (found.name, found.tensor_type.name) == (name, stored.kind)
        assert found.data.tobytes() == stored.blocks.numpy().tobytes()


def test_we_read_what_gguf_s_writer_writes(tmp_path):
    path = tmp_path / "theirs.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_custom_alignment(64)
    writer.add_array("words", ["a", "b"])
    writer.add_float64("number", 0.1)
    weight = np.arange(64, dtype=np.float32).reshape(2, 32)
    writer.add_tensor("w", weight)
    blocks = gguf.quants.quantize(weight, gguf.GGMLQuantizationType.Q8_0)
    writer.add_tensor("q", blocks, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    found = read(path)
    assert found.metadata["general.architecture"] == "llama"
    assert found.metadata["words"] == ["a", "b"]
    assert found.metadata["number"] == 0.1
    assert torch.equal(found.tensors["w"].dequantize(), torch.from_numpy(weight))
    assert found.tensors["q"].blocks.numpy().tobytes() == blocks.tobytes()


def test_writing_to_a_tensor_does_not_reach_the_file(tmp_path):
    path = write(tmp_path / "new.gguf", {}, tensors())
    before = path.read_bytes()
    read(path).tensors["Q8_0"].blocks.zero_()
    assert path.read_bytes() == before


@pytest.mark.parametrize("value", [3, 0.5, None, b"bytes", [1, 2], ["a", 1], np.array(["a"])])
def test_values_whose_type_is_not_clear_are_refused(tmp_path, value):
    with pytest.raises(TypeError, match=says("'key'")):
        write(tmp_path / "new.gguf", {"key": value}, {})
    assert not list(tmp_path.iterdir())


def test_a_tensor_that_does_not_fit_its_shape_is_refused(tmp_path):
    wrong = BlockTensor("Q4_0", torch.Size([2, 32]), torch.zeros(1, 18, dtype=torch.uint8))
    with pytest.raises(ValueError, match=says("'w'", "Q4_0", "(2, 32)", 36, 18)):
        write(tmp_path / "new.gguf", {}, {"w": wrong})
    with pytest.raises(ValueError, match=says("general.alignment", 3)):
        write(tmp_path / "new.gguf", {ALIGN: np.uint32(3)}, {})
    assert not list(tmp_path.iterdir())


def test_an_interrupted_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "new.gguf"
    path.write_text("old")

    class Broken:
        kind, shape = "F32", (1,)

        class blocks:
            nbytes = 4

    with pytest.raises(AttributeError):
        write(path, {}, {"w": Broken})
    assert path.read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["new.gguf"]


def test_no_file(tmp_path):
    with pytest.raises(FileNotFoundError):
        read(tmp_path / "none.gguf")
    with pytest.raises(IsADirectoryError):
        read(tmp_path)


def test_a_part_of_a_split_file_is_not_read_as_the_whole(tmp_path):
    def split(number, count):
        metadata = {"split.no": number, "split.count": count, "split.tensors.count": np.int32(9)}
        return write(tmp_path / "part.gguf", metadata, tensors())

    for number in range(3):
        path = split(np.uint16(number), np.uint16(3))
        with pytest.raises(
            ValueError, match=says("part.gguf", f"part {number + 1} of 3", "--merge")
        ):
            read(path)
        with path.open("rb") as file:  # its bytes are sound
            assert len(parse(memoryview(file.read()))[1]) == len(tensors())
    for count in (0, 1):  # joined again, or never more than one
        assert list(read(split(np.uint16(0), np.uint16(count))).tensors) == list(tensors())
    for number, count in (("0", np.uint16(2)), (np.uint16(0), "2"), (np.uint16(0), np.ones(2))):
        with pytest.raises(ValueError, match=says("split.no", "integers")):
            read(split(number, count))


def test_a_part_that_the_gguf_library_wrote_is_recognized(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "w.gguf", "llama", split_max_tensors=1)
    for name in "ab":
        writer.add_tensor(name, np.ones((2, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    first, second = sorted(tmp_path.iterdir())
    for path, part in ((first, 1), (second, 2)):
        with pytest.raises(ValueError, match=says(f"part {part} of 2")):
            read(path)
