"""Codes of 2 to 8 bits, packed into bytes without a gap, and back.

The codes form one stream of bits, each code with its highest bit first: with 4 bits the first of
two codes is the high nibble of its byte (the order of bitsandbytes), with 3 bits eight codes fill
exactly three bytes.

>>> pack(torch.tensor([1, 2, 3], dtype=torch.uint8), bits=4)
tensor([18, 48], dtype=torch.uint8)
>>> unpack(torch.tensor([18, 48], dtype=torch.uint8), bits=4, count=3)
tensor([1, 2, 3], dtype=torch.uint8)

The codes are not packed one by one, but in whole machine words. Eight codes of one byte each are
read as four 16-bit lanes of two codes; a shift and an "or" put the two side by side. The same step
on 32-bit and 64-bit lanes joins the pairs, until the bits fill whole bytes. The first byte of a
lane must be its lowest, so this needs a little-endian machine.
"""

import torch

_LANES = {16: torch.int16, 32: torch.int32, 64: torch.int64}
PIECE = 1 << 18  # elements processed at a time: 1 MiB of float32 stays in the cache
GPU_PIECE = 1 << 24  # on a GPU each piece costs kernel launches, so pieces are larger: 64 MiB


def piece_size(tensor: torch.Tensor) -> int:
    """Elements to process at once on this tensor's device."""
    return PIECE if tensor.device.type == "cpu" else GPU_PIECE


def packed_size(count: int, bits: int) -> int:
    """The number of bytes that `count` codes of `bits` bits take."""
    return (count * bits + 7) // 8


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Packs uint8 codes of any shape, each below 2**bits, into `packed_size` bytes.

    Unused bits of the last byte are zero. Codes of 8 bits are returned unchanged, without a copy.
    Raises ValueError if `bits` is not 2 to 8 or a code does not fit, TypeError if the codes are not
    uint8.
    """
    check_bits(bits)
    if codes.dtype != torch.uint8:
        raise TypeError(f"packing needs uint8 codes, not {codes.dtype}")
    codes = codes.reshape(-1)
    if codes.numel() and int(codes.max()) >= 1 << bits:
        raise ValueError(f"code {int(codes.max())} does not fit in {bits} bits")
    if bits == 8:
        return codes

    lane, width = _lane(bits)
    codes_in_lane, bytes_in_lane = lane // 8, width // 8
    lanes = -(-codes.numel() // codes_in_lane)
    packed = codes.new_empty(lanes, bytes_in_lane)
    step = piece_size(codes)
    for start in range(0, codes.numel(), step):
        piece = codes[start : start + step]
        missing = -piece.numel() % codes_in_lane
        if missing or piece.storage_offset() % codes_in_lane:  # a wide view needs whole lanes
            piece = torch.cat([piece, piece.new_zeros(missing)])
        first = start // codes_in_lane
        merged = _merge(piece, bits, lane).view(torch.uint8).view(-1, codes_in_lane)
        rows = packed[first : first + len(merged)]
        for byte in range(bytes_in_lane):  # the word's highest byte comes first in the stream
            rows[:, byte] = merged[:, bytes_in_lane - 1 - byte]
    size = packed_size(codes.numel(), bits)
    # a slice would keep the memory of the longer tensor
    return packed.view(-1) if packed.numel() == size else packed.view(-1)[:size].clone()


def unpack(packed: torch.Tensor, bits: int, count: int) -> torch.Tensor:
    """The first `count` codes of a packed stream, as uint8 in one dimension.

    Raises ValueError if `bits` is not 2 to 8 or the stream's length does not match `count` codes.
    """
    check_bits(bits)
    packed = packed.reshape(-1)
    if packed.numel() != packed_size(count, bits):
        raise ValueError(
            f"{count} codes of {bits} bits take {packed_size(count, bits)} bytes, "
            f"not {packed.numel()}"
        )
    if bits == 8:
        return packed.clone()

    lane, width = _lane(bits)
    codes_in_lane, bytes_in_lane = lane // 8, width // 8
    lanes = -(-count // codes_in_lane)
    codes = packed.new_empty(lanes, codes_in_lane)
    step = piece_size(packed) // codes_in_lane
    for first in range(0, lanes, step):
        piece = packed[first * bytes_in_lane : (first + step) * bytes_in_lane]
        if missing := -piece.numel() % bytes_in_lane:
            piece = torch.cat([piece, piece.new_zeros(missing)])
        piece = piece.view(-1, bytes_in_lane)
        words = piece.new_zeros(len(piece), codes_in_lane)
        for byte in range(bytes_in_lane):
            words[:, bytes_in_lane - 1 - byte] = piece[:, byte]
        codes[first : first + step] = _split(words.view(-1), bits, lane).view(-1, codes_in_lane)
    return codes.view(-1)[:count]


def cut(packed: torch.Tensor, bits: int, start: int, stop: int) -> torch.Tensor:
    """Codes `start` to `stop` of a packed stream as a new stream with its own memory.

    Nothing is unpacked: bytes are copied, and shifted if the first code starts inside a byte.
    Raises ValueError if `bits` is not 2 to 8 or the stream has fewer than `stop` codes.
    """
    check_bits(bits)
    first, shift = divmod(start * bits, 8)
    last = packed_size(stop, bits)
    if not 0 <= start <= stop or last > packed.numel():
        raise ValueError(f"codes {start} to {stop} are not in a stream of {packed.numel()} bytes")
    part = packed[first:last]
    if shift:
        part = torch.cat([part, part.new_zeros(1)])
        part = part[:-1] << shift | part[1:] >> (8 - shift)
    part = part[: packed_size(stop - start, bits)].clone()
    if rest := (stop - start) * bits % 8:  # unused bits are zero
        part[-1] &= 0xFF << (8 - rest) & 0xFF
    return part


def _lane(bits: int) -> tuple[int, int]:
    """The narrowest lane, in bits, whose codes fill whole bytes, and how many bits they fill."""
    lane, width = 8, bits
    while width % 8:
        lane, width = lane * 2, width * 2
    return lane, width


def _merge(codes: torch.Tensor, bits: int, lane: int) -> torch.Tensor:
    """Doubles the lanes from 8 bits to `lane`, joining two neighbors each time."""
    half, width, words = 8, bits, codes
    while half < lane:
        words = words.view(_LANES[half * 2])
        # the first neighbor is the low half: it moves up by the other's width
        words = (words << width | words >> half) & ((1 << 2 * width) - 1)
        half, width = half * 2, width * 2
    return words


def _split(words: torch.Tensor, bits: int, lane: int) -> torch.Tensor:
    """The inverse of `_merge`: halves the lanes until each holds one code."""
    half = lane // 2
    while half >= 8:
        width = bits * half // 8
        words = words.view(_LANES[half * 2])
        words = words >> width | (words & ((1 << width) - 1)) << half
        half //= 2
    return words.view(torch.uint8)


def check_bits(bits: int) -> None:
    """Raises ValueError unless `bits` is a number of bits that codes can have."""
    if isinstance(bits, bool) or bits not in range(2, 9):
        raise ValueError(f"bits must be a whole number from 2 to 8, not {bits!r}")
