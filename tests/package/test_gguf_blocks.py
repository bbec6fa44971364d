"""Block formats byte for byte as the gguf library, on weights random and nasty."""

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from hypothesis import given
from hypothesis import strategies as st
from tiny import says

from chapter13 import gguf_blocks, gguf_file, models
from chapter13.gguf_blocks import BlockTensor, plain, quantize

KINDS = ["Q8_0", "Q4_0", "Q4_1", "MXFP4"]
DECODED = [*KINDS, "Q4_K", "Q6_K"]


# the library warns where it divides by a subnormal scale or casts what does not fit
def quiet():
    return np.errstate(all="ignore")


def random(rows=64, columns=96, seed=0):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def sizes():
    """Weights from 2**-149 to 2**14, a row each: subnormal ones and scales that become 0 too."""
    exponents = torch.arange(-149, 15, dtype=torch.float64)
    return (random(len(exponents), 64, seed=1) * torch.exp2(exponents)[:, None]).float()


def beside_powers_of_two():
    """The largest of each block a few steps below a power of two, where log2 rounds up."""
    largest = [2.0**k * (1 - j * 2.0**-24) for k in range(-120, 14) for j in range(16)]
    largest = torch.tensor(largest)[:, None]
    return torch.cat([largest, -largest / 2, (largest / 3).expand(-1, 30)], 1)


def ties():
    """Weights in the middle between two codes, for every kind: multiples of 1/16 of the largest."""
    steps = torch.arange(-127, 128) / 16
    rows = [torch.full((32,), 0.0), steps[:32], steps[111:143], steps[-32:]]
    rows = torch.stack(rows)
    rows[:, 0] = torch.tensor([8.0, -8.0, 7.9375, -7.5])
    return torch.cat([rows, -rows, rows * 127 / 8, rows * 15 / 8])


def zeros(*shape):
    return torch.zeros(*shape)


def outlier():
    weight = random() * 0.02
    weight[3, 17], weight[5, 40] = 1e4, -1e4
    return weight


WEIGHTS = {
    "random": random,
    "three dimensions": lambda: random().view(4, 16, 96),
    "one row": lambda: random()[0],
    "sizes": sizes,
    "beside powers of two": beside_powers_of_two,
    "ties": ties,
    "zeros": lambda: zeros(4, 32),
    "negative zeros": lambda: -zeros(4, 32),
    "constant": lambda: torch.full((4, 32), 0.7),
    "negative constant": lambda: torch.full((4, 32), -0.7),
    "both extremes alike": lambda: torch.tensor([[1.0, -1.0] * 16, [-1.0, 1.0] * 16]),
    "one outlier": outlier,
    "the largest float16 scale": lambda: torch.tensor([[-65519.0 * 8] + [1.0] * 31]),
}


def reference(weight, kind):
    with quiet():
        return gguf.quants.quantize(weight.numpy(), Kind[kind])


def same_floats(found, expected):
    """The same bits; a NaN is as good as any other."""
    found, expected = found.numpy(), np.asarray(expected)
    nan = np.isnan(found) & np.isnan(expected)
    return (nan | (found.view(np.uint32) == expected.view(np.uint32))).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", WEIGHTS)
def test_bytes_and_values_equal_gguf(name, kind):
    weight = WEIGHTS[name]()
    if name == "the largest float16 scale" and kind in ("Q4_1", "Q8_0"):
        weight = weight / 8  # there the minimum itself is stored; Q8_0 has room for far more
    quantized = quantize(weight, kind)
    expected = reference(weight, kind)
    assert quantized.blocks.numpy().tobytes() == expected.tobytes()
    assert quantized.shape == weight.shape
    assert quantized.nbytes == expected.nbytes
    with quiet():
        assert same_floats(quantized.dequantize(), gguf.quants.dequantize(expected, Kind[kind]))


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data())
def test_any_block_equals_gguf(kind, data):
    number = st.floats(-(2.0**15), 2.0**15, width=32)
    few = data.draw(st.lists(number, min_size=1, max_size=4))
    block = data.draw(st.lists(st.sampled_from(few) | number, min_size=32, max_size=32))
    weight = torch.tensor([block])
    ours, theirs = quantize(weight, kind).blocks.numpy(), reference(weight, kind)
    if kind == "Q4_1" and weight.min() == 0:  # see the next test
        ours[:, 3] &= 127
        theirs[:, 3] &= 127
    assert ours.tobytes() == theirs.tobytes()


def test_of_zeros_of_both_signs_the_first_is_the_minimum():
    """The library's minimum of 0 and -0 depends on the processor; llama.cpp keeps the first."""
    weight = torch.full((2, 32), 0.0)
    weight[0, 0] = weight[1, 1:] = -0.0
    blocks = quantize(weight, "Q4_1").blocks
    assert blocks[:, 2:4].tolist() == [[0, 0x80], [0, 0]]
    theirs = reference(weight, "Q4_1")
    theirs[:, 3] = blocks[:, 3]
    assert blocks.numpy().tobytes() == theirs.tobytes()


@pytest.mark.parametrize("kind", DECODED)
def test_any_bytes_dequantize_as_in_gguf(kind):
    """Inf and NaN among the scales too: whatever a file holds."""
    size = gguf_file.KIND_OF[kind].size
    generator = torch.Generator().manual_seed(3)
    blocks = torch.randint(0, 256, (3000, size), dtype=torch.uint8, generator=generator)
    shape = torch.Size([1000, 3 * gguf_file.KIND_OF[kind].weights])
    tensor = BlockTensor(kind, shape, blocks)
    with quiet():
        expected = gguf.quants.dequantize(blocks.numpy().reshape(1000, -1), Kind[kind])
    assert same_floats(tensor.dequantize(), expected)


@pytest.mark.parametrize("kind", DECODED)
def test_codes_scale_and_minimum_make_the_weight(kind):
    block = gguf_file.KIND_OF[kind]
    generator = torch.Generator().manual_seed(4)
    blocks = torch.randint(0, 60, (40, block.size), dtype=torch.uint8, generator=generator)
    tensor = BlockTensor(kind, torch.Size([8, 5 * block.weights]), blocks)
    codes = tensor.codes()
    assert codes.dtype == torch.int8
    groups = codes.view(8, tensor.scale.shape[1], -1).float()
    weight = groups * tensor.scale + (0 if tensor.minimum is None else tensor.minimum)
    assert torch.equal(weight.view(8, -1), tensor.dequantize())
    assert (tensor.minimum is None) == (kind not in ("Q4_1", "Q4_K"))


def test_a_block_by_hand():
    """Q4_0: the largest magnitude, 4, becomes code -8, so the step is -0.5."""
    weight = torch.zeros(1, 32)
    weight[0, :3] = torch.tensor([4.0, -1.0, 0.3])
    weight[0, 16] = 2.5
    quantized = quantize(weight, "Q4_0")
    assert quantized.scale.flatten().tolist() == [-0.5]
    assert quantized.codes()[0, [0, 1, 2, 16, 17]].tolist() == [-8, 2, -1, -5, 0]
    # float16 -0.5 is 0xB800; stored is code + 8, the first sixteen codes in the low halves
    assert quantized.blocks[0, :5].tolist() == [0x00, 0xB8, 0x30, 0x8A, 0x87]
    assert quantized.dequantize()[0, [0, 1, 2, 16]].tolist() == [4.0, -1.0, 0.5, 2.5]


def test_bits_per_weight():
    weight = random(4, 256)
    bits = {kind: quantize(weight, kind).bits_per_weight for kind in KINDS}
    assert bits == {"Q8_0": 8.5, "Q4_0": 4.5, "Q4_1": 5.0, "MXFP4": 4.25}
    assert quantize(weight, "Q4_0").nbytes == 4 * 8 * 18
    assert repr(quantize(weight, "Q4_1")) == "BlockTensor(Q4_1, shape=(4, 256), 5 bits per weight)"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_data_types_count_as_float32(dtype):
    weight = random().to(dtype)
    for kind in KINDS:
        assert torch.equal(quantize(weight, kind).blocks, quantize(weight.float(), kind).blocks)
    assert quantize(weight, "Q4_0").dequantize(torch.bfloat16).dtype == torch.bfloat16


def test_many_pieces_and_memory_that_is_not_contiguous():
    weight = random(640, 1600).T  # 1600 rows of 640
    for kind in KINDS:
        quantized = quantize(weight, kind)
        assert torch.equal(quantized.blocks, quantize(weight.contiguous(), kind).blocks)
        whole = torch.cat([quantize(row, kind).dequantize()[None] for row in weight[::400]])
        assert torch.equal(quantized.dequantize()[::400], whole)


def test_plain_tensors():
    norm = random()[0]
    stored = plain(norm)
    assert stored.kind == "F32"
    assert torch.equal(stored.dequantize(), norm)
    assert stored.nbytes == norm.nbytes
    assert torch.equal(plain(norm.half()).dequantize(), norm.half().float())


@pytest.mark.parametrize("value", [torch.nan, torch.inf, 1e300])
def test_plain_tensors_must_be_finite_in_float32(value):
    norm = random()[0].double()
    norm[7] = value
    with pytest.raises(ValueError, match=says(1, "NaN", "Inf", 96, "[7]")):
        plain(norm)


@pytest.mark.parametrize(
    ("weight", "kind", "error", "said"),
    [
        (random(), "Q4_K", ValueError, says("Q8_0", "Q4_0", "Q4_1", "MXFP4", "'Q4_K'")),
        (random(columns=33), "Q4_0", ValueError, says("(64, 33)")),
        (torch.tensor(1.0), "Q4_0", ValueError, says(32, "()")),
        (torch.ones(4, 0), "Q4_0", ValueError, says("empty")),
        (
            torch.ones(4, 32, dtype=torch.int8),
            "Q4_0",
            TypeError,
            says("floating point", "torch.int8"),
        ),
        ([1.0] * 32, "Q4_0", TypeError, says("torch.Tensor")),
        (torch.full((2, 32), torch.nan), "MXFP4", ValueError, says("64 NaN", "Inf")),
        (torch.full((2, 32), torch.inf), "Q8_0", ValueError, says("64 NaN", "Inf")),
    ],
)
def test_what_cannot_be_quantized(weight, kind, error, said):
    with pytest.raises(error, match=said):
        quantize(weight, kind)


def test_a_nan_is_found_wherever_it_is():
    weight = random(640, 1600)
    weight[600, 1500] = torch.nan
    for kind in KINDS:
        with pytest.raises(ValueError, match=says(1, 1024000, "nan", "[600, 1500]")):
            quantize(weight, kind)


@pytest.mark.parametrize(("kind", "largest"), [("Q8_0", 127), ("Q4_0", 8), ("Q4_1", 1)])
def test_a_scale_beyond_float16_is_an_error(kind, largest):
    """65520 is the first number that rounds to Inf; gguf stores that Inf."""
    weight = random(3, 64)
    weight[1, 40] = -65536.0 * largest
    with pytest.raises(ValueError, match=says("float16", 65504)):
        quantize(weight, kind)
    with quiet():
        theirs = gguf.quants.dequantize(reference(weight, kind), Kind[kind])
    assert not np.isfinite(theirs).all()
    weight[1, 40] = -65472.0 * largest
    assert quantize(weight, kind).dequantize().isfinite().all()


def test_a_kind_that_is_not_decoded_says_so():
    tensor = BlockTensor("Q5_K", torch.Size([1, 256]), torch.zeros(1, 176, dtype=torch.uint8))
    for use in (tensor.dequantize, tensor.codes, lambda: tensor.scale):
        with pytest.raises(ValueError, match=says("Q5_K", "Q4_K", "Q6_K")):
            use()


def test_a_real_layer_equals_gguf(weights):
    weight = weights["model.layers.10.mlp.down_proj.weight"]
    for kind in KINDS:
        expected = reference(weight, kind)
        assert quantize(weight, kind).blocks.numpy().tobytes() == expected.tobytes()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("kind", KINDS)
def test_a_gpu_gives_the_same_bytes(kind):
    for name in ("random", "sizes", "ties"):
        weight = WEIGHTS[name]()
        on_gpu = quantize(weight.cuda(), kind)
        assert torch.equal(on_gpu.blocks.cpu(), quantize(weight, kind).blocks)
        assert torch.equal(on_gpu.dequantize().cpu(), quantize(weight, kind).dequantize())


# --- the embedded model's own file -----------------------------------------------------------


@pytest.fixture(scope="module")
def files():
    path = models.gguf_path()
    return gguf_blocks.read(path), gguf.GGUFReader(path)


@pytest.mark.slow
def test_metadata_equal_gguf_s_reader(files):
    ours, theirs = files
    fields = {name: f.contents() for name, f in theirs.fields.items() if name[:5] != "GGUF."}
    assert list(ours.metadata) == list(fields)
    for name, value in ours.metadata.items():
        value = value.tolist() if isinstance(value, (np.ndarray, np.generic)) else value
        assert value == fields[name], name
        assert type(value) is type(fields[name]), name


@pytest.mark.slow
def test_tensors_equal_gguf_s_reader(files):
    ours, theirs = files
    assert list(ours.tensors) == [tensor.name for tensor in theirs.tensors]
    assert len(ours.tensors) == 272
    for tensor in theirs.tensors:
        found = ours.tensors[tensor.name]
        assert found.kind == tensor.tensor_type.name
        assert list(found.shape) == tensor.shape[::-1].tolist()
        assert found.blocks.numpy().tobytes() == tensor.data.tobytes()
    for name in ("blk.0.ffn_down.weight", "blk.29.attn_norm.weight", "token_embd.weight"):
        tensor = next(tensor for tensor in theirs.tensors if tensor.name == name)
        expected = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        assert same_floats(ours.tensors[name].dequantize(), expected)


def test_what_was_read_is_written_again_to_the_byte(files, tmp_path):
    ours, _ = files
    copy = gguf_file.write(tmp_path / "copy.gguf", ours.metadata, ours.tensors)
    assert copy.read_bytes() == models.gguf_path().read_bytes()
