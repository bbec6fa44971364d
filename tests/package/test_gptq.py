"""GPTQ on one weight: against the textbook, on nasty inputs, and what it promises."""

import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import generator, says

from chapter13 import gptq, quantize_affine
from chapter13.grids import CLIP_FRACTIONS, fit_grid
from chapter13.tensors import QuantizedTensor

CHOICES = [
    {"symmetric": symmetric, "act_order": act_order, "group_size": size}
    for symmetric in (False, True)
    for act_order in (False, True)
    for size in (8, 24, "channel")
]


def layer(rows=12, columns=48, tokens=200, seed=13):
    """A random weight, and inputs whose channels are correlated."""
    g = generator(seed)
    mix = torch.randn(columns, columns, generator=g)
    weight = torch.randn(rows, columns, generator=g)
    return weight, torch.randn(tokens, columns, generator=g) @ mix


def textbook(weight, inputs, bits, group_size, symmetric, act_order, damp=0.01):
    """GPTQ in float64, the columns to come solved for anew after each column.

    Returns the codes and, for each weight, how far from a tie between two codes it was rounded.
    """
    W, X = weight.double().clone(), inputs.double()
    columns = W.shape[1]
    size = columns if group_size == "channel" else group_size
    H = 2 / len(X) * X.T @ X
    order = list(range(columns))
    if act_order:
        order = H.diagonal().argsort(descending=True).tolist()
    H += damp * H.diagonal().mean() * torch.eye(columns)

    def grid(part):
        low, high = part.amin(1).clamp(max=0), part.amax(1).clamp(min=0)
        if symmetric:
            high = torch.maximum(high, -low)
            low = -high
        scale = ((high - low) / (2**bits - 1)).float().double()  # the library holds float32
        zero = torch.full_like(scale, 2 ** (bits - 1)) if symmetric else (-low / scale).round()
        return scale, zero

    grids = [grid(part) for part in W.split(size, dim=1)]
    codes, margins = torch.zeros(2, *W.shape, dtype=torch.float64)
    left = list(order)
    for j in order:
        if not act_order and j % size == 0:
            grids[j // size] = grid(W[:, j : j + size])
        scale, zero = grids[j // size]
        levels = W[:, j] / scale
        margins[:, j] = 0.5 - (levels - levels.round()).abs()
        codes[:, j] = (levels.round() + zero).clamp(0, 2**bits - 1)
        error = W[:, j] - (codes[:, j] - zero) * scale
        left.remove(j)
        if left:  # min over d of (e, d) H (e, d)^T, with e the error of column j
            step = torch.linalg.solve(H[left][:, left], H[left][:, [j]])
            W[:, left] += error[:, None] * step.T
    return codes, margins, order


@pytest.mark.parametrize("choice", CHOICES, ids=str)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_codes_are_the_textbooks(choice, bits):
    compared = 0
    for seed in range(5):
        weight, inputs = layer(seed=seed)
        expected, margins, order = textbook(weight, inputs, bits, **choice)
        got = gptq.quantize(
            weight, gptq.hessian(inputs), bits, scale_dtype=torch.float32, **choice
        ).codes()
        for row in range(len(weight)):
            # where a weight lies next to a tie float32 may go the other way, and all columns
            # after it then make up for another error: up to the first tie all codes agree
            near = (margins[row, order] < 1e-3).nonzero()
            columns = order[: int(near[0])] if len(near) else order
            assert torch.equal(got[row, columns].double(), expected[row, columns])
            compared += len(columns)
    # a weight is as near as that to a tie with a chance of 0.002, and the largest of a group
    # lies on one by construction of the symmetric grid: absmax / scale = (2**bits - 1) / 2
    assert compared > (0.2 if choice["symmetric"] else 0.8) * 5 * weight.numel()


@pytest.mark.parametrize("group_size", [8, "channel"])
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("scale_dtype", [torch.float16, torch.float32])
def test_a_diagonal_hessian_makes_it_round_to_nearest(group_size, bits, scale_dtype):
    weight, _ = layer()
    H = torch.diag(torch.rand(48, generator=generator()) + 0.1)
    nearest = quantize_affine(weight, bits, group_size, scale_dtype)
    for act_order in (False, True):
        ours = gptq.quantize(
            weight, H, bits, group_size, act_order=act_order, scale_dtype=scale_dtype
        )
        for part in ("packed", "stored_scale", "packed_zero_point"):
            assert torch.equal(getattr(ours, part), getattr(nearest, part))


@pytest.mark.parametrize("factor", [2.0**-20, 2.0**20])
@pytest.mark.parametrize("clip_search", [False, True])
def test_a_factor_on_the_hessian_changes_nothing(factor, clip_search):
    weight, inputs = layer()
    H = gptq.hessian(inputs)
    one, other = (
        gptq.quantize(weight, h, clip_search=clip_search, group_size=8) for h in (H, H * factor)
    )
    # a power of two changes exponents alone, in every operation but square roots, where an even
    # one halves: not one bit differs
    assert torch.equal(one.packed, other.packed)
    assert torch.equal(one.scale, other.scale)


def test_outputs_are_kept_better_than_by_rounding():
    weight, inputs = layer(rows=64, tokens=2000)
    H = gptq.hessian(inputs)
    nearest = gptq.layer_loss(weight, quantize_affine(weight, 4, 24).dequantize(), H)
    plain = gptq.layer_loss(weight, gptq.quantize(weight, H, 4, 24).dequantize(), H)
    assert plain < nearest


def test_layer_loss_is_that_of_the_outputs():
    weight, inputs = layer()
    other = quantize_affine(weight, 3, 8).dequantize()
    exact, ours = inputs.double() @ weight.double().T, inputs.double() @ other.double().T
    expected = ((exact - ours).square().sum() / exact.square().sum()).item()
    # H is rounded to float32 after sums of 200 products: 200 * 2**-24 relative to its diagonal
    assert gptq.layer_loss(weight, other, gptq.hessian(inputs)) == pytest.approx(expected, rel=1e-3)
    assert gptq.layer_loss(weight, weight, gptq.hessian(inputs)) == 0
    assert gptq.layer_loss(torch.zeros(2, 4), torch.zeros(2, 4), torch.eye(4)) == 0


def test_hessian_is_the_mean_of_products():
    _, inputs = layer()
    expected = 2 / 200 * inputs.double().T @ inputs.double()
    # 200 products, each rounded: an error of 200 * 2**-24 of the sum of their magnitudes at most
    bound = 200 * 2**-24 * 2 / 200 * inputs.double().abs().T @ inputs.double().abs()
    for batches in (inputs, inputs.split(33), iter(inputs.split(1)), [inputs]):
        assert ((gptq.hessian(batches) - expected).abs() <= bound).all()
    half = gptq.hessian(inputs.half())
    assert torch.equal(half, gptq.hessian(inputs.half().float()))
    assert half.dtype == torch.float32


@pytest.mark.parametrize("dead", [[0], [5, 6, 40], list(range(48))])
@pytest.mark.parametrize("act_order", [False, True])
def test_dead_channels_get_weight_zero(dead, act_order):
    weight, inputs = layer()
    inputs[:, dead] = 0
    quantized = gptq.quantize(weight, gptq.hessian(inputs), 4, 8, act_order=act_order)
    restored = quantized.dequantize()
    assert restored.isfinite().all()
    assert (restored[:, dead] == 0).all()


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_returns_a_quantized_tensor(bits, dtype):
    weight, inputs = layer()
    weight = weight.to(dtype)
    before = weight.clone()
    H = gptq.hessian(inputs)
    kept = H.clone()
    quantized = gptq.quantize(weight, H, bits, 8)
    assert isinstance(quantized, QuantizedTensor)
    assert (quantized.bits, quantized.group_size, quantized.shape) == (bits, 8, (12, 48))
    assert quantized.scale.shape == quantized.zero_point.shape == (12, 6, 1)
    assert quantized.scale.dtype == torch.float16
    assert torch.equal(weight, before)
    assert torch.equal(H, kept)
    same = gptq.quantize(weight.float(), H, bits, 8)
    assert torch.equal(quantized.packed, same.packed)


@pytest.mark.parametrize(
    "weight",
    [
        torch.zeros(3, 16),
        torch.ones(3, 16),
        -torch.ones(3, 16),
        torch.cat([torch.zeros(3, 8), torch.randn(3, 8, generator=generator())], dim=1),
        torch.full((3, 16), 1e-40),  # subnormal in float32
        torch.randn(3, 16, generator=generator()) * 1e30,
        torch.eye(16)[:3] * 1000,
        torch.randn(1, 16, generator=generator()),
    ],
    ids=["zeros", "ones", "minus ones", "a zero group", "subnormal", "huge", "outliers", "a row"],
)
@pytest.mark.parametrize("clip_search", [False, True])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("act_order", [False, True])
def test_nasty_weights(weight, clip_search, symmetric, act_order):
    g = generator()
    inputs = torch.randn(100, 16, generator=g) @ torch.randn(16, 16, generator=g)
    quantized = gptq.quantize(
        weight, gptq.hessian(inputs), 4, 8, symmetric, act_order,
        clip_search=clip_search, scale_dtype=torch.float32,
    )  # fmt: skip
    restored = quantized.dequantize()
    assert restored.isfinite().all()
    zero = (weight.view(3 if len(weight) == 3 else 1, 2, 8) == 0).all(-1)
    if act_order:  # without it, errors move a zero group before its scale is taken
        assert (restored.view(*zero.shape, 8)[zero] == 0).all()
    if (weight == 0).all():
        assert (restored == 0).all()


def test_too_few_tokens_warn_with_the_rank():
    weight, inputs = layer()
    with pytest.warns(UserWarning, match=says("30 calibration tokens", "30 of 48")):
        H = gptq.hessian(inputs[:30])
    assert gptq.quantize(weight, H, 4, 8).dequantize().isfinite().all()
    with pytest.raises(ValueError, match=says("30 of 48", "damp")):
        gptq.quantize(weight, H, 4, 8, damp=0)


def test_the_rank_of_many_dimensions_is_not_computed(monkeypatch):
    _, inputs = layer()
    monkeypatch.setattr(gptq, "RANKED", 47)
    monkeypatch.setattr(torch.linalg, "matrix_rank", lambda *_, **__: pytest.fail("too slow"))
    with pytest.warns(UserWarning, match=says("30 calibration tokens", "30 of 48")):
        gptq.hessian(inputs[:30])
    gptq.hessian(inputs)
    gptq.hessian(inputs[:1].expand(200, -1))  # known to be all alike, but at what price


def test_tokens_that_are_all_alike_warn_with_the_rank():
    _, inputs = layer()
    with pytest.warns(UserWarning, match=says("200 calibration tokens", "1 of 48")):
        gptq.hessian(inputs[:1].expand(200, -1))
    inputs[:, 24:] = inputs[:, :24]
    with pytest.warns(UserWarning, match=says("24 of 48")):
        gptq.hessian(inputs)


def test_massive_channels_are_no_reason_to_warn():
    _, inputs = layer()
    inputs = inputs * torch.logspace(-3, 3, 48)  # squared, twelve decades: more than float32 has
    inputs[:, 9] = 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gptq.hessian(inputs)


@pytest.mark.parametrize(
    ("spoil", "error", "message"),
    [
        ({"bits": 1}, ValueError, says("bits", "2 to 8", 1)),
        ({"bits": 9}, ValueError, says("bits", "2 to 8", 9)),
        ({"group_size": 7}, ValueError, says(7, "in_features", 48)),
        ({"group_size": None}, ValueError, says("GPTQ", 'group_size="channel"')),
        ({"group_size": 0}, ValueError, says("positive int", 0)),
        ({"damp": -0.1}, ValueError, says("damp", 0, "-0.1")),
        ({"damp": float("nan")}, ValueError, says("damp", 0, "nan")),
        ({"weight": torch.ones(48)}, ValueError, says("(out_features, in_features)", "(48,)")),
        (
            {"weight": torch.ones(2, 48, dtype=torch.int8)},
            TypeError,
            says("floating point", "torch.int8"),
        ),
        ({"weight": torch.full((2, 48), float("nan"))}, ValueError, says("96 NaN", "Inf")),
        ({"weight": torch.ones(0, 48)}, ValueError, says("empty", "(0, 48)")),
        ({"hessian": torch.eye(47)}, ValueError, says("Hessian", "(48, 48)", "(47, 47)")),
        (
            {"hessian": torch.full((48, 48), float("inf"))},
            ValueError,
            says("Hessian", "NaN", "Inf"),
        ),
        ({"hessian": -torch.eye(48)}, ValueError, says("Hessian", "inverted")),
        ({"scale_dtype": torch.bfloat16}, ValueError, says("scale_dtype", "torch.bfloat16")),
        (
            {"weight": torch.full((2, 48), 1e7)},
            ValueError,
            says("float16", "scale_dtype=torch.float32"),
        ),
    ],
)
def test_bad_input_is_named(spoil, error, message):
    weight, inputs = layer()
    good = {"weight": weight, "hessian": gptq.hessian(inputs), "bits": 4, "group_size": 8}
    with pytest.raises(error, match=message):
        gptq.quantize(**(good | spoil))


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (torch.ones(2, 3, 4), says("(tokens, in_features)", "(2, 3, 4)")),
        ([], says("calibration tokens")),
        (torch.ones(0, 4), says("calibration tokens")),
        (torch.full((9, 4), float("nan")), says("NaN", "Inf")),
        (torch.full((9, 4), 1e30), says("overflow")),
    ],
)
def test_bad_inputs_are_named(inputs, message):
    with pytest.raises(ValueError, match=message):
        gptq.hessian(inputs)


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 8), st.booleans())
def test_the_search_is_the_best_of_all_shares(seed, bits, symmetric):
    g = generator(seed)
    weights, importance = torch.randn(8, 5, generator=g), torch.rand(8, generator=g)
    found = fit_grid(weights, bits, symmetric, torch.float32, importance)

    def error(grid):
        rounded = grid.values(grid.codes(weights)).double()
        return importance.double() @ (rounded - weights.double()).square()

    # by hand, share by share: the grid of weights whose ends are cut off
    low, high = weights.amin(0).clamp(max=0), weights.amax(0).clamp(min=0)
    if symmetric:
        high = torch.maximum(high, -low)
        low = -high
    least = torch.stack(
        [
            error(fit_grid(torch.stack([low, high]) * share, bits, symmetric, torch.float32))
            for share in CLIP_FRACTIONS
        ]
    ).amin(0)
    # two shares within rounding of each other may change places: 8 products and sums in float32
    assert (error(found) <= least * (1 + 16 * 2**-24)).all()


def test_what_matters_is_not_cut_off():
    weights = torch.randn(64, 100, generator=generator())
    weights[0] = 30
    importance = torch.ones(64)
    plain = fit_grid(weights, 4, False, torch.float32)
    importance[0] = 0
    assert (fit_grid(weights, 4, False, torch.float32, importance).scale < plain.scale).all()
    importance[0] = 1e9  # even the narrowest step for the others gains less than its clipping costs
    found = fit_grid(weights, 4, False, torch.float32, importance)
    assert ((found.values(found.codes(weights)) - weights)[0].abs() <= plain.scale / 2).all()


def test_of_ranges_that_are_equally_good_the_widest_is_taken():
    weights = torch.randn(64, 100, generator=generator())
    plain = fit_grid(weights, 4, False, torch.float32)
    found = fit_grid(weights, 4, False, torch.float32, torch.zeros(64))  # nothing matters
    assert torch.equal(found.scale, plain.scale)
    assert torch.equal(found.zero, plain.zero)


@pytest.mark.parametrize("act_order", [False, True])
def test_the_search_weighs_each_column_by_the_hessian(act_order):
    weight, _ = layer()
    importance = torch.rand(48, generator=generator()) ** 4 + 1e-3
    H = torch.diag(importance)  # no error is passed on: each group is fitted as it is
    options = {"act_order": act_order, "scale_dtype": torch.float32}
    found = gptq.quantize(weight, H, 3, 8, clip_search=True, **options)
    for group in range(6):
        part = slice(8 * group, 8 * group + 8)
        grid = fit_grid(weight[:, part].T, 3, False, torch.float32, importance[part])
        assert torch.equal(found.scale[:, group, 0], grid.scale)
        assert torch.equal(found.zero_point[:, group, 0].float(), grid.zero)
    assert not torch.equal(found.scale, gptq.quantize(weight, H, 3, 8, **options).scale)


def test_the_rank_is_computed_where_float32_cannot_tell_channels_apart(monkeypatch):
    """Of two channels with correlation c, 1 - c^2 is left to the second: more than 2 * 2**-23?"""

    def inputs(e):  # c = 1 / sqrt(1 + e^2)
        return torch.tensor([[1.0, 1.0], [e, 0.0]])

    with pytest.warns(UserWarning, match="2 calibration tokens span 1 of 2 dimensions") as caught:
        gptq.hessian(inputs(2.0**-11))  # 2 * 2**-23
    assert caught[0].filename == __file__
    monkeypatch.setattr(torch.linalg, "matrix_rank", lambda *_, **__: pytest.fail("no need"))
    gptq.hessian(inputs(2.0**-10))  # four times as much
    _, others = layer()
    others[:, 9] = 0
    gptq.hessian(others)  # a dead channel is no missing dimension
