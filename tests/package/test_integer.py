"""Integer grids: the chapter's functions on its own examples, properties, parity with torch.

`u` below is 2**-24, the relative error of one float32 operation.
"""

import dataclasses
import json
import math

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from tiny import generator, says

from chapter13 import (
    dequantize_absmax_int8,
    quantize_absmax,
    quantize_absmax_int8,
    quantize_affine,
    quantize_codebook,
    quantize_groupwise,
    quantize_int4_absmax,
    quantize_per_channel,
)
from chapter13.packing import PIECE
from chapter13.tensors import QuantizedTensor, pieces

U = 2.0**-24
QUANTIZERS = [quantize_absmax, quantize_affine]
CHAPTER = [quantize_absmax_int8, quantize_per_channel, quantize_groupwise, quantize_int4_absmax]
GROUPS = [None, "channel", 4]


def matrices(**elements):
    """float32 matrices whose rows are whole groups of four, subnormal numbers included."""
    floats = st.floats(width=32, allow_nan=False, allow_infinity=False, **elements)
    shapes = st.tuples(st.integers(1, 4), st.sampled_from([4, 8, 12, 16]))
    return shapes.flatmap(lambda s: hnp.arrays("float32", s, elements=floats)).map(torch.from_numpy)


def per_weight(values, weight):
    """Scales or zero points, repeated so that each weight has its own."""
    if values.dim() == 3:
        values = values.expand(-1, -1, weight.shape[1] // values.shape[1]).reshape(weight.shape)
    return values.expand(weight.shape)


# ---------------------------------------------------------------- the chapter's own functions


def formula(weight, absmax, steps):
    """The chapter's arithmetic, for inputs on which it does not fail."""
    scale = absmax / steps
    return (weight / scale).round().clamp(-steps - 1, steps).to(torch.int8), scale


def test_chapter_example_1():
    torch.manual_seed(42)
    weight = torch.randn(256, 256)
    codes, scale = quantize_absmax_int8(weight)
    expected, expected_scale = formula(weight, weight.abs().max(), 127.0)
    assert torch.equal(codes, expected)
    assert codes.dtype == torch.int8
    assert torch.equal(scale, expected_scale)
    assert scale.dtype == torch.float32
    assert scale.shape == ()
    assert torch.equal(dequantize_absmax_int8(codes, scale), expected.float() * expected_scale)


def test_chapter_example_2():
    torch.manual_seed(0)
    weight = torch.randn(512, 1024) * 0.02
    codes, scale = quantize_per_channel(weight)
    expected, expected_scale = formula(weight, weight.abs().amax(1, keepdim=True), 127.0)
    assert torch.equal(codes, expected)
    assert torch.equal(scale, expected_scale)
    assert scale.shape == (512, 1)

    for group_size in (64, 32, 1024, 1):
        codes, scale = quantize_groupwise(weight, group_size=group_size)
        groups = weight.view(512, -1, group_size)
        expected, expected_scale = formula(groups, groups.abs().amax(2, keepdim=True), 127.0)
        assert torch.equal(codes, expected)
        assert codes.shape == groups.shape
        assert torch.equal(scale, expected_scale)
        assert scale.shape == (512, 1024 // group_size, 1)
    assert torch.equal(quantize_groupwise(weight)[0], quantize_groupwise(weight, 64)[0])


def test_chapter_example_3():
    torch.manual_seed(0)
    weight = torch.randn(256, 256)
    codes, scale = quantize_int4_absmax(weight)
    expected, expected_scale = formula(weight, weight.abs().max(), 7.0)
    assert torch.equal(codes, expected)
    assert codes.dtype == torch.int8
    assert torch.equal(scale, expected_scale)


def test_per_channel_codes_dequantize_by_row():
    weight = torch.tensor([[1.27, -0.635], [0.0254, 0.0127]])
    codes, scale = quantize_per_channel(weight)
    # 0.635 / 0.01 and 0.0127 / 0.0002 lie on 63.5, but for rounding: either neighbour is right
    assert codes[:, 0].tolist() == [127, 127]
    error = (dequantize_absmax_int8(codes, scale) - weight).abs()
    assert (error <= scale * 0.5 * (1 + 128 * 2 * U)).all()


# ---------------------------------------------------------------- where the chapter's code fails


@pytest.mark.parametrize("function", CHAPTER + QUANTIZERS)
def test_all_zero(function):
    weight = torch.zeros(3, 64)
    result = function(weight)
    if isinstance(result, tuple):
        codes, scale = result
        assert not codes.any()
        assert not scale.signbit().any()
        assert torch.equal(dequantize_absmax_int8(codes, scale), torch.zeros(codes.shape))
    else:
        assert torch.equal(result.dequantize(), weight)


@pytest.mark.parametrize("quantize", QUANTIZERS)
@pytest.mark.parametrize("group_size", GROUPS)
def test_zero_rows_and_groups_stay_zero(quantize, group_size):
    weight = torch.randn(4, 16, generator=torch.Generator().manual_seed(0))
    weight[1] = 0
    weight[2, 4:8] = 0
    restored = quantize(weight, 4, group_size).dequantize()
    assert torch.equal(restored[1], torch.zeros(16))
    assert torch.equal(restored[2, 4:8], torch.zeros(4))
    assert restored[0].any()


@pytest.mark.parametrize("function", CHAPTER + QUANTIZERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_nan_and_inf(function, dtype):
    for value in (math.nan, math.inf, -math.inf):
        weight = torch.ones(3, 64, dtype=dtype)
        weight[1, 2] = weight[2, 0] = value
        with pytest.raises(ValueError, match=says("2 NaN", "Inf", 192, value, "[1, 2]")):
            function(weight)


@pytest.mark.parametrize("function", CHAPTER + QUANTIZERS)
def test_a_float64_beyond_float32_is_reported(function):
    weight = torch.ones(2, 64, dtype=torch.float64)
    weight[0, 1] = 1e300
    with pytest.raises(ValueError, match=says("1 NaN", "Inf", 128, "[0, 1]")):
        function(weight)


@pytest.mark.parametrize("function", CHAPTER + QUANTIZERS)
def test_what_is_no_weight(function):
    with pytest.raises(TypeError, match=says("floating point", "torch.int8")):
        function(torch.ones(2, 64, dtype=torch.int8))
    with pytest.raises(TypeError, match=says("torch.Tensor", "list")):
        function([[1.0] * 64])
    for shape in ((0, 64), (0,), (2, 0)):
        with pytest.raises(ValueError, match=says("empty", shape)):
            function(torch.ones(shape))


@pytest.mark.parametrize(
    "call",
    [
        quantize_per_channel,
        quantize_groupwise,
        lambda w: quantize_absmax(w, 8, "channel"),
        lambda w: quantize_affine(w, 8, 64),
    ],
)
@pytest.mark.parametrize("shape", [(64,), (2, 2, 64), ()])
def test_rows_need_a_matrix(call, shape):
    with pytest.raises(ValueError, match=says("(out_features, in_features)", shape)):
        call(torch.ones(shape))


@pytest.mark.parametrize("function", [quantize_absmax_int8, quantize_int4_absmax, *QUANTIZERS])
@pytest.mark.parametrize("shape", [(), (1,), (7,), (2, 3, 5)])
def test_any_shape_per_tensor(function, shape):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    result = function(weight)
    codes = result[0] if isinstance(result, tuple) else result.codes()
    assert codes.shape == shape
    if not isinstance(result, tuple):
        assert result.scale.shape == ()
        assert result.dequantize().shape == shape


@pytest.mark.parametrize("call", [quantize_groupwise, lambda w, g: quantize_absmax(w, 4, g)])
def test_group_size_that_does_not_fit(call):
    weight = torch.ones(2, 12)
    with pytest.raises(ValueError, match=says(5, "in_features", 12, "2, 3, 4, 6, 12")):
        call(weight, 5)
    with pytest.raises(ValueError, match=says(24, "in_features", 12)):
        call(weight, 24)
    for wrong in (0, -4, 2.0, "row", True):
        with pytest.raises(ValueError, match=says('None, "channel"', "positive int", repr(wrong))):
            call(weight, wrong)


@pytest.mark.parametrize("quantize", QUANTIZERS)
def test_bits_and_scale_dtype_out_of_range(quantize):
    for bits in (1, 9, 0, -8, 4.5, "8", True, None):
        with pytest.raises(ValueError, match=says("bits", "2 to 8", repr(bits))):
            quantize(torch.ones(2, 4), bits)
    for dtype in (torch.float64, torch.bfloat16, torch.int8):
        with pytest.raises(ValueError, match=says("scale_dtype", "torch.float32", "torch.float16")):
            quantize(torch.ones(2, 4), scale_dtype=dtype)


# ---------------------------------------------------------------- what the general functions hold


@pytest.mark.parametrize("quantize", QUANTIZERS)
@pytest.mark.parametrize("bits", range(2, 9))
def test_bytes_really_held(quantize, bits):
    weight = torch.randn(6, 64, generator=torch.Generator().manual_seed(2))
    zero_points = quantize is quantize_affine
    for group_size, scales in ((None, 1), ("channel", 6), (16, 24)):
        for scale_dtype, scale_bytes in ((torch.float16, 2), (torch.float32, 4)):
            quantized = quantize(weight, bits, group_size, scale_dtype)
            # every part is a whole number of bytes; 384 codes are for any number of bits
            expected = 384 * bits // 8 + scales * scale_bytes
            expected += zero_points * math.ceil(scales * bits / 8)
            assert quantized.nbytes == expected
            parts = [quantized.packed, quantized.scale, quantized.packed_zero_point]
            held = [p.untyped_storage().nbytes() for p in parts if p is not None]
            assert sum(held) == expected
            assert quantized.bits_per_weight == 8 * expected / 384
            assert (quantized.bits, quantized.shape) == (bits, (6, 64))
            assert quantized.group_size == group_size
            assert quantized.scale.dtype == scale_dtype


def test_bits_per_weight_of_the_usual_formats():
    weight = torch.randn(128, 128, generator=torch.Generator().manual_seed(3))
    assert quantize_absmax(weight, 4, 64).bits_per_weight == 4.25
    assert quantize_affine(weight, 4, 64).bits_per_weight == 4.3125
    assert quantize_absmax(weight).bits_per_weight == 8 + 16 / 128**2


@pytest.mark.parametrize("bits", range(2, 9))
def test_code_ranges_and_types(bits):
    weight = torch.randn(8, 64, generator=torch.Generator().manual_seed(4))
    top = 2 ** (bits - 1) - 1
    codes = quantize_absmax(weight, bits).codes()
    assert codes.dtype == torch.int8
    assert codes.abs().max() == top  # and -top - 1 is never used
    quantized = quantize_affine(weight, bits)
    codes = quantized.codes()
    assert codes.dtype == torch.uint8
    assert (codes.min(), codes.max()) == (0, 2**bits - 1)
    assert quantized.zero_point.dtype == torch.uint8
    assert quantize_absmax(weight, bits).zero_point is None


def test_shapes_of_scales_and_zero_points():
    weight = torch.randn(6, 64, generator=torch.Generator().manual_seed(5))
    for group_size, shape in ((None, ()), ("channel", (6, 1)), (16, (6, 4, 1)), (64, (6, 1, 1))):
        assert quantize_absmax(weight, 4, group_size).scale.shape == shape
        quantized = quantize_affine(weight, 3, group_size)
        assert quantized.scale.shape == quantized.zero_point.shape == shape


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("group_size", GROUPS)
def test_absmax_is_its_formula(bits, group_size):
    weight = torch.randn(8, 16, generator=torch.Generator().manual_seed(bits))
    quantized = quantize_absmax(weight, bits, group_size)
    steps = 2 ** (bits - 1) - 1
    groups = weight.view({None: (1, -1), "channel": (8, -1), 4: (-1, 4)}[group_size])
    scale = (groups.abs().amax(1, keepdim=True) / steps).to(torch.float16)
    assert torch.equal(quantized.scale.flatten(), scale.flatten())
    codes = (groups / scale.float()).round().view(weight.shape)
    assert torch.equal(quantized.codes().float(), codes)
    restored = quantized.codes() * per_weight(quantized.scale.float(), weight)
    assert torch.equal(quantized.dequantize(), restored)
    assert torch.equal(quantized.dequantize(torch.bfloat16), restored.bfloat16())


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("group_size", GROUPS)
def test_affine_is_its_formula(bits, group_size):
    weight = torch.randn(8, 16, generator=torch.Generator().manual_seed(bits)) + 0.7
    quantized = quantize_affine(weight, bits, group_size)
    levels = 2**bits - 1
    groups = weight.view({None: (1, -1), "channel": (8, -1), 4: (-1, 4)}[group_size])
    low = groups.amin(1, keepdim=True).clamp(max=0)
    high = groups.amax(1, keepdim=True).clamp(min=0)
    scale = ((high - low) / levels).to(torch.float16).float()
    zero_point = (-low / scale).round().clamp(0, levels)
    codes = ((groups / scale).round() + zero_point).clamp(0, levels).view(weight.shape)
    assert torch.equal(quantized.scale.flatten().float(), scale.flatten())
    assert torch.equal(quantized.zero_point.flatten().float(), zero_point.flatten())
    assert torch.equal(quantized.codes().float(), codes)
    restored = codes - per_weight(quantized.zero_point.float(), weight)
    restored *= per_weight(quantized.scale.float(), weight)
    assert torch.equal(quantized.dequantize(), restored)


def test_affine_range_includes_zero():
    weight = torch.tensor([[10.0, 11.0, 12.0, 15.0], [-1.0, -2.0, -3.0, -7.5]])
    quantized = quantize_affine(weight, 4, "channel")
    assert quantized.scale.flatten().tolist() == [1.0, 0.5]
    assert quantized.zero_point.flatten().tolist() == [0, 15]
    assert quantized.codes().tolist() == [[10, 11, 12, 15], [13, 11, 9, 0]]
    assert torch.equal(quantized.dequantize(), weight)


@pytest.mark.parametrize("quantize", QUANTIZERS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_floats_are_computed_in_float32(quantize, dtype):
    weight = torch.randn(8, 64, generator=torch.Generator().manual_seed(6)).to(dtype)
    for group_size in GROUPS:
        ours, expected = (quantize(w, 4, group_size) for w in (weight, weight.float()))
        assert torch.equal(ours.packed, expected.packed)
        assert torch.equal(ours.scale, expected.scale)
    codes, scale = quantize_absmax_int8(weight)
    assert scale.dtype == torch.float32
    assert torch.equal(codes, quantize_absmax_int8(weight.float())[0])


@pytest.mark.parametrize("quantize", QUANTIZERS)
def test_non_contiguous_and_parameters(quantize):
    weight = torch.randn(64, 8, generator=torch.Generator().manual_seed(7))
    for view in (weight.t(), weight[::2], weight[:, :4], weight.t()[:, ::2]):
        for group_size in GROUPS:
            ours, expected = (quantize(w, 4, group_size) for w in (view, view.contiguous()))
            assert torch.equal(ours.packed, expected.packed)
            assert torch.equal(ours.scale, expected.scale)
    parameter = torch.nn.Parameter(weight)
    assert not quantize(parameter, 4, 4).scale.requires_grad
    assert torch.equal(quantize_groupwise(weight.t(), 8)[0].view(8, 64), codes_by_8(weight.t()))


def codes_by_8(weight):
    return quantize_groupwise(weight.contiguous(), 8)[0].view(weight.shape)


@pytest.mark.parametrize("quantize", QUANTIZERS)
@pytest.mark.parametrize("shape", [(3, PIECE + 100), (PIECE // 512 + 7, 1024)])
def test_pieces_do_not_show(quantize, shape):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(8))
    for group_size in (None, "channel"):
        whole = quantize(weight, 8, group_size)
        error = (whole.dequantize() - weight).abs()
        assert (error <= 0.7 * per_weight(whole.scale.float(), weight)).all()
        if group_size:
            rows = [quantize(weight[i : i + 1], 8, group_size).codes() for i in range(shape[0])]
            assert torch.equal(whole.codes(), torch.cat(rows))


@pytest.mark.parametrize(
    "shape", [(1, 1), (7, 3), (3, PIECE + 5), (PIECE + 5, 1), (1000, 777), (2, 0)]
)
def test_pieces_are_small_and_cover_each_element_once(shape):
    visits = torch.zeros(shape, dtype=torch.uint8)
    for rows, columns in pieces(visits):
        assert 0 < visits[rows, columns].numel() <= PIECE
        visits[rows, columns] += 1
    assert (visits == 1).all()


def test_the_input_is_left_alone():
    weight = torch.randn(8, 64, generator=torch.Generator().manual_seed(9))
    before = weight.clone()
    for quantize in QUANTIZERS:
        quantized = quantize(weight, 8, 4)
        quantized.codes().zero_()
        assert quantized.codes().any()
    for function in CHAPTER:
        function(weight)
    assert torch.equal(weight, before)


# ---------------------------------------------------------------- scales that do not fit


@pytest.mark.parametrize("quantize", QUANTIZERS)
def test_scale_beyond_float16(quantize):
    weight = torch.ones(2, 8)
    weight[1] = 1e8
    with pytest.raises(ValueError, match=says("1 of 2", 65504, "scale_dtype=torch.float32", "nf4")):
        quantize(weight, 8, "channel")
    weight[1] = 1e-7
    quantized = quantize(weight, 8, "channel", torch.float32)
    error = (quantized.dequantize() - weight).abs()
    assert (error <= quantized.scale * 0.5 * (1 + 256 * 2 * U)).all()


SMALLEST = 2.0**-24  # of float16's numbers, and the distance between its subnormal ones


@pytest.mark.parametrize("quantize", QUANTIZERS)
@pytest.mark.parametrize("bits", range(2, 9))
def test_a_group_about_nothing_becomes_zeros(quantize, bits):
    weight = torch.randn(3, 16, generator=generator())
    steps = 2 ** (bits - 1) - 1 if quantize is quantize_absmax else 2**bits - 1
    # the scale is below half the smallest number, which float16 rounds to 0
    weight[1] = torch.linspace(0, 0.99 * steps * SMALLEST / 2, 16)
    quantized = quantize(weight, bits, "channel")
    assert quantized.scale[1] == 0
    assert quantized.dequantize()[1].tolist() == [0.0] * 16
    alone = quantize(weight[[0, 2]], bits, "channel")  # the other rows are what they would be
    assert torch.equal(quantized.dequantize()[[0, 2]], alone.dequantize())
    assert quantize(weight, bits, "channel", torch.float32).dequantize()[1].any()


@pytest.mark.parametrize("quantize", QUANTIZERS)
@pytest.mark.parametrize("bits", range(2, 9))
def test_a_subnormal_scale_clips_nothing(quantize, bits):
    """One that would round down too far is taken up: half a step is the largest error."""
    for times in torch.linspace(0.51, 40, 200).tolist():
        steps = 2 ** (bits - 1) - 1 if quantize is quantize_absmax else 2**bits - 1
        weight = torch.linspace(0, times * steps * SMALLEST, 16)[None]
        quantized = quantize(weight, bits)
        scale = quantized.scale.double()
        assert scale in ((times // 1) * SMALLEST, (times // 1 + 1) * SMALLEST)
        error = (quantized.dequantize().double() - weight.double()).abs()
        # the quotient, rounded to float32, is off by U of itself
        assert error.max() <= scale * (0.5 + steps * 2 * U)


@pytest.mark.parametrize("bits", range(3, 9))
def test_absmax_scale_that_just_holds(bits):
    steps = 2 ** (bits - 1) - 1
    # half a step beyond the grid: a tie, which would be rounded to a code that is not there
    largest = (steps + 0.5) * SMALLEST
    quantized = quantize_absmax(torch.tensor([[largest, -largest, SMALLEST]]), bits)
    assert quantized.scale.item() == SMALLEST
    assert quantized.codes().tolist() == [[steps, -steps, 1]]
    beyond = quantize_absmax(torch.tensor([[largest * (1 + 2.0**-22)]]), bits)
    assert beyond.scale.item() == 2 * SMALLEST


@pytest.mark.parametrize("bits", range(2, 9))
def test_affine_scale_that_just_holds(bits):
    levels = 2**bits - 1
    # half a step beyond the grid: zero point and lowest code are both rounded past their ends
    weight = torch.tensor([[-(levels + 0.5) * SMALLEST, 0.0]])
    quantized = quantize_affine(weight, bits)
    assert quantized.scale.item() == SMALLEST
    assert quantized.zero_point.item() == levels
    assert quantized.codes().tolist() == [[0, levels]]
    assert quantized.dequantize().tolist() == [[-levels * SMALLEST, 0.0]]
    # one float32 number more, on either side of zero or shared between them: the next scale
    beyond = (levels + 0.5) * SMALLEST * (1 + 2.0**-22)
    for low, high in ((-beyond, 0.0), (0.0, beyond), (-beyond / 2, beyond / 2)):
        assert quantize_affine(torch.tensor([[low, high]]), bits).scale.item() == 2 * SMALLEST


def test_affine_takes_weights_whose_grid_still_ends_within_float32():
    for low, high in ((-1.6e38, 1.6e38), (0.0, 3e38), (-3e38, 0.0)):
        weight = torch.tensor([[low, high]])
        quantized = quantize_affine(weight, 8, None, torch.float32)
        error = (quantized.dequantize().double() - weight.double()).abs()
        assert (error <= quantized.scale.double() * 0.5 * (1 + 2**8 * 8 * U)).all()


@pytest.mark.parametrize("group_size", GROUPS)
@given(matrices())
def test_absmax_error_is_at_most_half_a_float32_scale(group_size, weight):
    quantized = quantize_absmax(weight, 5, group_size, torch.float32)
    scale = per_weight(quantized.scale, weight).double()
    error = (quantized.dequantize().double() - weight.double()).abs()
    # the quotient and the product are rounded: each by u, relative, or by half the smallest number
    bound = scale * 0.5 + weight.double().abs() * 2 * U + 2.0**-150
    assert (error <= bound).all()


@pytest.mark.parametrize("group_size", GROUPS)
@given(matrices(min_value=-(2.0**126), max_value=2.0**126))
def test_affine_error_is_at_most_half_a_float32_scale(group_size, weight):
    quantized = quantize_affine(weight, 5, group_size, torch.float32)
    scale = per_weight(quantized.scale, weight).double()
    error = (quantized.dequantize().double() - weight.double()).abs()
    # the scale itself (difference and quotient rounded) may end 31 steps early by 2u of the range
    bound = scale * (0.5 + 31 * 4 * U) + weight.double().abs() * 2 * U + 2.0**-149
    assert (error <= bound).all()


@pytest.mark.parametrize("bits", range(2, 9))
@given(matrices(min_value=-100, max_value=100))
def test_error_bound_with_float16_scales(bits, weight):
    # keep scales normal in float16: rounding changes them by 2**-11 at most, relative
    groups = weight.view(-1, 4)
    assume(((groups.abs().amax(1) >= 0.01) | (groups == 0).all(1)).all())
    for quantize, steps in (
        (quantize_absmax, 2 ** (bits - 1) - 1),
        (quantize_affine, 2**bits - 1),
    ):
        quantized = quantize(weight, bits, 4)
        scale = per_weight(quantized.scale.double(), weight)
        error = (quantized.dequantize().double() - weight.double()).abs()
        # absmax never falls short: 127 / 2048 of a step is less than half of one
        short = steps * 2.0**-11 if quantize is quantize_affine else 0
        assert (error <= scale * (0.5 + short) * (1 + 2**-10) + 200 * U).all()


@pytest.mark.parametrize("bits", range(2, 9))
def test_the_largest_float32_does_not_become_inf(bits):
    largest = torch.finfo(torch.float32).max
    for weight in ([[largest, -largest], [largest, 1.0]], [[0.0, largest], [0.0, 1.0]]):
        weight = torch.tensor(weight)
        for group_size in (None, "channel"):
            quantized = quantize_absmax(weight, bits, group_size, torch.float32)
            error = (quantized.dequantize().double() - weight.double()).abs()
            assert (error <= quantized.scale.double() * 0.5 * (1 + 2**bits * 8 * U)).all()
    assert torch.equal(
        quantize_affine(weight, bits, "channel", torch.float32).codes(),
        torch.tensor([[0, 2**bits - 1]] * 2, dtype=torch.uint8),
    )
    for low in (-largest, -largest / 2):  # range beyond float32; and the last step only
        with pytest.raises(ValueError, match=says("3.4e+38", "float32")):
            quantize_affine(torch.tensor([[low, largest]]), bits, "channel", torch.float32)


# ---------------------------------------------------------------- properties


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("group_size", GROUPS)
@given(matrices(min_value=-64, max_value=64))
def test_absmax_is_idempotent(bits, group_size, weight):
    weight = torch.where(weight.abs() < 0.01, 0, weight)  # scales stay normal in float16
    once = quantize_absmax(weight, bits, group_size)
    twice = quantize_absmax(once.dequantize(), bits, group_size)
    assert torch.equal(once.codes(), twice.codes())
    assert torch.equal(once.scale, twice.scale)


@pytest.mark.parametrize("group_size", GROUPS)
@given(matrices(min_value=-64, max_value=64), st.integers(-6, 6))
def test_a_power_of_two_scales_through(group_size, weight, exponent):
    # a weight of w has an affine scale of at least w/15, which must stay normal in float16 when
    # it shrinks 64 times: w >= 2^-14 * 64 * 15
    weight = torch.where(weight.abs() < 0.0586, 0, weight)
    factor = 2.0**exponent
    for quantize in QUANTIZERS:
        plain, scaled = (quantize(w, 4, group_size) for w in (weight, weight * factor))
        assert torch.equal(plain.codes(), scaled.codes())
        assert torch.equal(plain.scale * factor, scaled.scale)


@pytest.mark.parametrize("bits", range(2, 9))
@given(matrices(min_value=-64, max_value=64))
def test_absmax_mirrors_signs(bits, weight):
    weight = torch.where(weight.abs() < 0.01, 0, weight)
    plain, mirrored = quantize_absmax(weight, bits, 4), quantize_absmax(-weight, bits, 4)
    assert torch.equal(plain.codes(), -mirrored.codes())
    assert torch.equal(plain.scale, mirrored.scale)


@given(matrices(min_value=-(2.0**126), max_value=2.0**126))
def test_finer_groups_never_raise_the_bound(weight):
    for quantize in QUANTIZERS:
        tensor, channel, group = (
            per_weight(quantize(weight, 4, size, torch.float32).scale, weight) for size in GROUPS
        )
        assert (channel <= tensor).all()
        assert (group <= channel).all()


def test_finer_groups_lower_the_error_of_a_loud_row():
    weight = torch.randn(16, 64, generator=torch.Generator().manual_seed(10))
    weight[3] *= 50
    errors = [
        (quantize_absmax(weight, 4, size).dequantize() - weight).square().mean() for size in GROUPS
    ]
    assert errors[0] > errors[1] > errors[2]


# ---------------------------------------------------------------- parity with torch


def near_ties(codes, reference, weight, scale, zero_point=None):
    """How many codes differ; asserts that each lies next to a tie, where torch may differ.

    torch multiplies by the reciprocal, rounded twice; the chapter divides, rounded once. So the two
    quotients lie within 3u of the true one, and codes differ only if half-way lies between them.
    torch also adds the zero point before it rounds to an integer: one more rounding of the sum.
    """
    differ = (codes != reference).view(-1)
    quotient = (weight.double() / per_weight(scale, weight).double()).view(-1)[differ]
    distance = (quotient.abs() - quotient.abs().floor() - 0.5).abs()
    bound = quotient.abs() * 3 * U
    if zero_point is not None:
        bound += (quotient + per_weight(zero_point.double(), weight).reshape(-1)[differ]).abs() * U
    assert (distance <= bound * (1 + 4 * U)).all()
    assert ((codes.view(-1)[differ] - reference.view(-1)[differ]).abs() == 1).all()
    return int(differ.sum())


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor:UserWarning")  # deprecated
def test_same_codes_as_torch_but_for_near_ties():
    generator = torch.Generator().manual_seed(11)
    weight = torch.randn(1000, 1000, generator=generator)
    codes, scale = quantize_absmax_int8(weight)
    reference = torch.quantize_per_tensor(weight, scale.item(), 0, torch.qint8).int_repr()
    assert near_ties(codes, reference, weight, scale) < 10

    codes, scale = quantize_per_channel(weight)
    zero_points = torch.zeros(1000, dtype=torch.int64)
    reference = torch.quantize_per_channel(weight, scale.view(-1), zero_points, 0, torch.qint8)
    assert near_ties(codes, reference.int_repr(), weight, scale) < 10


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor:UserWarning")
def test_near_ties_happen_and_only_they_differ():
    # weights half-way between two codes, or one float32 number beside: 127 is their absmax
    scale = 0.1
    ties = torch.arange(-126.5, 127) * scale
    weight = torch.cat([ties, *(torch.nextafter(ties, ties * far) for far in (0, 2))])
    weight = torch.cat([weight, torch.tensor([127 * scale])])
    codes, scale = quantize_absmax_int8(weight)
    reference = torch.quantize_per_tensor(weight, scale.item(), 0, torch.qint8).int_repr()
    assert 0 < near_ties(codes, reference, weight, scale) < 254


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor:UserWarning")
def test_affine_has_torchs_codes_but_for_near_ties():
    weight = torch.randn(1000, 1000, generator=torch.Generator().manual_seed(12)) + 1
    quantized = quantize_affine(weight, 8, None, torch.float32)
    reference = torch.quantize_per_tensor(
        weight, quantized.scale.item(), int(quantized.zero_point), torch.quint8
    )
    codes = quantized.codes().to(torch.int16)
    assert (
        near_ties(
            codes, reference.int_repr().short(), weight, quantized.scale, quantized.zero_point
        )
        < 10
    )

    quantized = quantize_affine(weight, 8, "channel", torch.float32)
    reference = torch.quantize_per_channel(
        weight,
        quantized.scale.view(-1),
        quantized.zero_point.view(-1).long(),
        0,
        torch.quint8,
    )
    codes = quantized.codes().to(torch.int16)
    assert (
        near_ties(
            codes, reference.int_repr().short(), weight, quantized.scale, quantized.zero_point
        )
        < 10
    )


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("quantize", QUANTIZERS)
def test_same_codes_on_a_gpu(quantize):
    weight = torch.randn(64, 128, generator=torch.Generator().manual_seed(13))
    for bits in range(2, 9):
        for group_size in (None, "channel", 32):
            ours, expected = (quantize(w, bits, group_size) for w in (weight.cuda(), weight))
            assert ours.packed.is_cuda
            assert torch.equal(ours.packed.cpu(), expected.packed)
            assert torch.equal(ours.dequantize().cpu(), expected.dequantize())


def test_repr_says_what_it_is():
    weight = torch.ones(2, 64)
    assert repr(quantize_absmax(weight, 4, 64)) == (
        "QuantizedTensor(absmax, shape=(2, 64), bits=4, group_size=64, 4.25 bits per weight)"
    )
    assert repr(quantize_affine(weight, 4, "channel")) == (
        "QuantizedTensor(affine, shape=(2, 64), bits=4, group_size='channel', "
        "4.312 bits per weight)"
    )


def test_dequantized_codes_are_float32_whatever_the_scale():
    codes = torch.tensor([3, -127], dtype=torch.int8)
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        restored = dequantize_absmax_int8(codes, torch.tensor(0.5, dtype=dtype))
        assert restored.dtype == torch.float32
        assert restored.tolist() == [1.5, -63.5]


# ---------------------------------------------------------------- a QuantizedTensor checks itself


def parts_of(kind):
    weight = torch.randn(4, 64, generator=generator())
    make = {
        "absmax": lambda: quantize_absmax(weight, 3, 16),
        "affine": lambda: quantize_affine(weight, 5, "channel"),
        "nf4": lambda: quantize_codebook(weight, "nf4", 48),
        "twice": lambda: quantize_codebook(weight, "fp4", 64, double_quant=True),
    }[kind]
    fields = dataclasses.fields(QuantizedTensor)
    return {field.name: getattr(make(), field.name) for field in fields}


ILLEGAL = {
    "a kind": ("absmax", {"kind": "e2m1"}, says("kind", "absmax", "affine", "nf4", "fp4")),
    "bits": ("absmax", {"bits": 9}, says("bits", "2 to 8", 9)),
    "a table's bits": ("nf4", {"bits": 3}, says("nf4", 16, "2**3")),
    "few bytes": ("absmax", {"shape": torch.Size((4, 80))}, says("packed", "[96]", "[120]")),
    "signed bytes": (
        "absmax",
        {"packed": torch.zeros(96, dtype=torch.int8)},
        says("packed", "int8", "uint8"),
    ),
    "no bytes": ("absmax", {"packed": None}, says("packed")),
    "no shape": ("absmax", {"shape": (4, 64)}, says("shape", "torch.Size")),
    "groups": ("absmax", {"group_size": 48}, says(48, "in_features", 64)),
    "group of 0": ("affine", {"group_size": 0}, says("group_size", "None", 0)),
    "a block": ("nf4", {"group_size": "channel"}, says("nf4", "'channel'")),
    "another block": ("nf4", {"group_size": 64}, says("scale", "[6]", "[4]")),
    "scales": (
        "absmax",
        {"group_size": "channel"},
        says("scale", "[4, 4, 1]"),
    ),
    "wide scales": (
        "absmax",
        {"stored_scale": torch.ones(4, 4, 1).double()},
        says("scale", "float64"),
    ),
    "half a table": ("nf4", {"stored_scale": torch.ones(6).half()}, says("scale", "float16")),
    "no zero point": ("affine", {"packed_zero_point": None}, says("zero_point")),
    "zero points": (
        "absmax",
        {"packed_zero_point": torch.zeros(6).byte()},
        says("absmax", "zero points"),
    ),
    "an offset": ("nf4", {"scale_offset": torch.tensor(1.0)}, says("scale_offset")),
    "no offset": ("twice", {"scale_offset": None}, says("scale_offset")),
    "nested": ("twice", {"kind": "absmax"}, says("absmax", "scales")),
}


@pytest.mark.parametrize("name", ILLEGAL)
def test_an_illegal_tensor_cannot_exist(name):
    kind, change, message = ILLEGAL[name]
    fields = parts_of(kind)
    QuantizedTensor(**fields)
    with pytest.raises(ValueError, match=message):
        QuantizedTensor(**fields | change)


@pytest.mark.parametrize("kind", ["absmax", "affine", "nf4", "twice"])
def test_damaged_plans_are_refused(kind):
    tensor = QuantizedTensor(**parts_of(kind))
    plan = json.loads(json.dumps(tensor.plan))
    for damaged in (None, {}, [], plan | {"shape": "4"}, plan | {"kind": []}, plan | {"bits": "4"}):
        with pytest.raises(ValueError, match=r"describes no|must be|is a table"):
            QuantizedTensor.from_parts(damaged, tensor.parts)
    for name in tensor.parts:
        rest = {key: part for key, part in tensor.parts.items() if key != name}
        with pytest.raises(ValueError, match=rf"{name.removeprefix('scale_')}\b"):
            QuantizedTensor.from_parts(plan, rest)


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize(("columns", "group_size"), [(64, 16), (64, "channel"), (9, 3), (5, -1)])
@pytest.mark.parametrize("quantize", QUANTIZERS)
def test_split_is_quantizing_the_rows_alone(quantize, columns, group_size, bits):
    """Rows of 5 or 9 codes end inside a byte."""
    weight = torch.randn(12, columns, generator=generator())
    heights = [1, 4, 7]
    parts = quantize(weight, bits, group_size).split(heights)
    for part, rows in zip(parts, weight.split(heights), strict=True):
        alone = quantize(rows, bits, group_size)
        assert part.plan == alone.plan
        assert list(part.parts) == list(alone.parts)
        for name, tensor in alone.parts.items():
            assert torch.equal(part.parts[name], tensor)
            assert part.parts[name].untyped_storage().nbytes() == tensor.nbytes


def test_what_cannot_be_split():
    weight = torch.randn(4, 64, generator=generator())
    for tensor in (quantize_absmax(weight), quantize_codebook(weight)):
        with pytest.raises(ValueError, match=says("split")):
            tensor.split([2, 2])
    with pytest.raises(ValueError, match=says("[2, 1]", "4 rows")):
        quantize_absmax(weight, 8, "channel").split([2, 1])


@pytest.mark.parametrize("quantize", QUANTIZERS)
def test_minus_one_is_per_channel(quantize):
    weight = torch.randn(4, 64, generator=generator())
    ours, theirs = quantize(weight, 4, "channel"), quantize(weight, 4, -1)
    assert theirs.group_size == "channel"
    assert torch.equal(ours.packed, theirs.packed)
    with pytest.raises(ValueError, match=says("-2")):
        quantize(weight, 4, -2)


@pytest.mark.parametrize("kind", ["absmax", "affine", "nf4", "twice"])
def test_parts_and_plan_are_all_of_a_tensor(kind):
    tensor = QuantizedTensor(**parts_of(kind))
    again = QuantizedTensor.from_parts(tensor.plan, tensor.parts)
    assert again.plan == tensor.plan
    assert list(again.parts) == list(tensor.parts)
    assert torch.equal(again.dequantize(), tensor.dequantize())
    named = {f"q_proj.{name}": part for name, part in tensor.parts.items()}
    named["scale"] = named["zero_point"] = named["scale_offset"] = torch.ones(3)  # of another one
    again = QuantizedTensor.from_parts(tensor.plan, named, "q_proj.")
    assert torch.equal(again.dequantize(), tensor.dequantize())
    for shape in ((4, 64), [4.0, 64], ["4", 64], "4"):
        with pytest.raises(ValueError, match=says("shape", repr(shape))):
            QuantizedTensor.from_parts(tensor.plan | {"shape": shape}, tensor.parts)


def test_a_single_row_can_be_split_off():
    weight = torch.randn(1, 48, generator=generator())
    tensor = quantize_affine(weight, 4, 16)
    (part,) = tensor.split([1])
    assert part.plan == tensor.plan
    assert torch.equal(part.dequantize(), tensor.dequantize())


@pytest.mark.parametrize("bits", [3, 4, 8])
@pytest.mark.parametrize(
    ("rows", "columns", "group_size"),
    [(7, 12, 12), (7, 36, 12), (7, 5, None), (7, 9, "channel"), (1, 24, 12)],
)
@pytest.mark.parametrize("quantize", QUANTIZERS)
def test_pieces_of_any_size_are_the_same_weight(
    quantize, rows, columns, group_size, bits, monkeypatch
):
    """With pieces as small as they can be each begins at a byte, a scale and, by rows, a row."""
    tensor = quantize(torch.randn(rows, columns, generator=generator()), bits, group_size)
    whole = tensor.dequantize()
    monkeypatch.setattr("chapter13.tensors.piece_size", lambda _: 1)
    assert torch.equal(tensor.dequantize(), whole)
    found = list(tensor.row_pieces())
    assert all(piece.shape[1:] == (columns,) for piece in found)
    assert torch.equal(torch.cat(found), whole)


@pytest.mark.parametrize(
    ("kind", "change", "words"),
    [
        ("absmax", {"packed": torch.ones(2).int()}, r"packed is int32 \[2\], not uint8 \[96\]$"),
        (
            "absmax",
            {"stored_scale": torch.ones(4, 4, 1).double()},
            r"scale is float64 \[4, 4, 1\], not float16 or float32 \[4, 4, 1\]$",
        ),
        ("absmax", {"shape": torch.Size((4, 8, 8))}, r"matrix, not shape \(4, 8, 8\)$"),
        (
            "twice",
            {"shape": torch.Size((4, 32)), "packed": torch.zeros(64).byte()},
            "fp4 .* scales",
        ),
    ],
)
def test_what_is_wrong_with_a_part_is_named(kind, change, words):
    with pytest.raises(ValueError, match=words):
        QuantizedTensor(**parts_of(kind) | change)
