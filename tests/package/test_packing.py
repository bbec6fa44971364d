"""Packing is a bijection between codes and bytes, and its bit order is the documented one."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import says

from chapter13.packing import GPU_PIECE, PIECE, cut, pack, packed_size, piece_size, unpack

BITS = range(2, 9)


def slow_pack(codes: list[int], bits: int) -> list[int]:
    """The definition: write the codes as binary digits, one after the other, and cut bytes."""
    digits = "".join(f"{code:0{bits}b}" for code in codes)
    digits += "0" * (-len(digits) % 8)
    return [int(digits[i : i + 8], 2) for i in range(0, len(digits), 8)]


@st.composite
def codes_and_bits(draw):
    bits = draw(st.sampled_from(BITS))
    return draw(st.lists(st.integers(0, 2**bits - 1), max_size=70)), bits


@given(codes_and_bits())
def test_packs_as_defined_and_back(case):
    codes, bits = case
    packed = pack(torch.tensor(codes, dtype=torch.uint8), bits)
    assert packed.dtype == torch.uint8
    assert packed.tolist() == slow_pack(codes, bits)
    assert len(packed) == packed_size(len(codes), bits)
    assert unpack(packed, bits, len(codes)).tolist() == codes


@given(st.sampled_from(BITS), st.binary(min_size=56, max_size=56))
def test_every_stream_of_bytes_is_some_codes(bits, stream):
    # 56 bytes are a whole number of codes of 2, 4, 7 and 8 bits; of the others, what remains is cut
    count = 56 * 8 // bits // 8 * 8
    packed = torch.frombuffer(bytearray(stream), dtype=torch.uint8)[: packed_size(count, bits)]
    assert torch.equal(pack(unpack(packed, bits, count), bits), packed)


@pytest.mark.parametrize("bits", BITS)
def test_several_pieces_and_odd_offsets(bits):
    generator = torch.Generator().manual_seed(bits)
    codes = torch.randint(2**bits, (2 * PIECE + 8 + 13,), dtype=torch.uint8, generator=generator)
    for start in (0, 1, 3, 8):  # a view that starts anywhere, not on a machine word
        part = codes[start:]
        packed = pack(part, bits)
        assert len(packed) == packed_size(len(part), bits)
        assert torch.equal(unpack(packed, bits, len(part)), part)
        # the stream far from its start agrees with the definition: no piece is misplaced
        first = (len(part) - 40) // 8 * 8
        assert packed[first * bits // 8 :].tolist() == slow_pack(part[first:].tolist(), bits)


def test_pieces_are_small_on_a_cpu_alone():
    assert piece_size(torch.empty(1)) == PIECE
    assert piece_size(torch.empty(1, device="meta")) == GPU_PIECE


@pytest.mark.parametrize("bits", BITS)
def test_size_and_shape(bits):
    for count in range(20):
        assert packed_size(count, bits) == len(slow_pack([0] * count, bits))
    codes = torch.arange(24, dtype=torch.uint8) & (2**bits - 1)
    assert torch.equal(pack(codes.view(2, 3, 4), bits), pack(codes, bits))
    assert torch.equal(pack(codes.view(4, 6).t(), bits), pack(codes.view(4, 6).t().flatten(), bits))
    packed = pack(codes, bits)
    assert torch.equal(unpack(packed.view(1, -1), bits, 24), codes)


def test_unpacked_codes_of_8_bits_are_a_copy():
    packed = torch.arange(5, dtype=torch.uint8)
    unpack(packed, 8, 5).zero_()
    assert packed.tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("bits", [-1, 0, 1, 9, 2.5, "4"])
def test_bits_out_of_range(bits):
    with pytest.raises(ValueError, match=says("bits", "2 to 8", bits)):
        pack(torch.zeros(4, dtype=torch.uint8), bits)
    with pytest.raises(ValueError, match=says("bits", "2 to 8", bits)):
        unpack(torch.zeros(4, dtype=torch.uint8), bits, 4)


def test_other_errors():
    with pytest.raises(ValueError, match=says(4, "2 bits")):
        pack(torch.tensor([3, 4], dtype=torch.uint8), 2)
    with pytest.raises(TypeError, match=says("uint8", "torch.int8")):
        pack(torch.zeros(4, dtype=torch.int8), 4)
    for length in (1, 3):
        with pytest.raises(ValueError, match=says("3 codes", "4 bits", "2 bytes", length)):
            unpack(torch.zeros(length, dtype=torch.uint8), 4, 3)


@pytest.mark.parametrize("bits", range(2, 9))
def test_cut_is_packing_a_part(bits):
    codes = torch.randint(0, 2**bits, (37,), generator=torch.Generator().manual_seed(bits))
    codes = codes.to(torch.uint8)
    packed = pack(codes, bits)
    for start in range(38):
        for stop in range(start, 38):
            part = cut(packed, bits, start, stop)
            assert torch.equal(part, pack(codes[start:stop], bits))
            assert part.untyped_storage().nbytes() == part.numel()
    for start, stop in ((-1, 3), (5, 4), (0, 37 + 8)):
        with pytest.raises(ValueError, match=says(start, stop)):
            cut(packed, bits, start, stop)
