"""The numbers that notebook 07's explorer shows are the package's own, on its whole grid."""

import math
from itertools import product

import numpy as np
import pytest
import torch
from tiny import generator, normal

from chapter13 import awq, gptq, models, quantize_absmax, quantize_affine, quantize_codebook
from chapter13.explorers import distributions, layers
from chapter13.explorers.distributions import (
    EDGES,
    GROUP_SIZES,
    METHOD_LABELS,
    PROBABILITIES,
    WEIGHT_LEARNERS,
    LayerInputs,
    Texts,
    count_codes,
    entropy,
    explore_distributions,
    level_edges,
    prepare,
    view,
)
from chapter13.explorers.layers import quantize
from chapter13.measures import max_abs_error, mse, sqnr_db
from chapter13.plots.distributions import percent
from chapter13.tables import CODE_BOOKS

METHODS = ["absmax", "affine", "nf4", "fp4"]  # that only round
BITS = range(2, 9)
OUTLIERS = [1, 100]


WEIGHTS = {
    "normal": normal(24, 128) * 0.02,
    "heavy tails": 0.02 * normal(24, 128) ** 3,
    "one outlier": torch.cat([normal(23, 128), 40 * normal(1, 128, seed=1)]),
    "all positive": normal(24, 128).abs() + 1,
    "half a group of zeros": normal(24, 128) * (torch.arange(128) > 40),
    "bfloat16": normal(24, 128).bfloat16(),
    "not contiguous": normal(128, 128).T,
    "zeros": torch.zeros(4, 128),
    "alike": torch.full((4, 128), 0.7),
}


def by_hand(weight, method, bits, group_size):
    """The same weight quantized by the package itself."""
    if method in ("absmax", "affine"):
        return {"absmax": quantize_absmax, "affine": quantize_affine}[method](
            weight, bits, group_size
        )
    sizes = {None: weight.numel(), "channel": weight.shape[1]}
    return quantize_codebook(weight, method, sizes.get(group_size, group_size))


def shown_numbers(readout):
    """label -> value of a readout's lines."""
    return dict(line.split("  ", 1) for line in readout.splitlines())


def test_the_test_knows_every_method():
    assert set(METHOD_LABELS) == {*METHODS, *WEIGHT_LEARNERS}


@pytest.mark.parametrize("name", WEIGHTS)
@pytest.mark.parametrize("method", METHODS)
def test_numbers_are_the_packages_own(name, method):
    given = WEIGHTS[name]
    layer = prepare(given)
    given = given.float()
    for bits, group_size, outlier in product(BITS, GROUP_SIZES, OUTLIERS):
        if method in CODE_BOOKS and bits != 4:
            with pytest.raises(ValueError, match=f"{method.upper()} .* not {bits}.*Set bits to 4"):
                view(layer, method, bits, group_size, outlier)
            continue
        weight = given.clone()
        weight[divmod(int(given.abs().argmax()), given.shape[1])] *= outlier
        quantized = by_hand(weight, method, bits, group_size)
        approximation = quantized.dequantize()
        shown = view(layer, method, bits, group_size, outlier)

        codes, counts = np.unique(quantized.codes().numpy(), return_counts=True)
        assert shown.used == len(codes)
        assert sorted(shown.code_counts[shown.code_counts > 0]) == sorted(counts)
        assert len(shown.code_counts) == 2**bits
        shares = counts / weight.numel()
        expected = -sum(share * math.log2(share) for share in shares)
        # both sums: at most 256 terms of at most 0.54, each off by a few parts in 2**53
        assert abs(shown.entropy - expected) <= 256 * 2.0**-50
        assert shown.zeros == 1 - (approximation != 0).sum().item() / weight.numel()
        off = (weight - approximation).double().norm() / (given.double().norm() or 1)
        # mean squares of up to 4096 squares in float32, against float64
        assert shown.relative_error == pytest.approx(off.item(), rel=1e-4)

        readout = {label: value.strip() for label, value in shown_numbers(shown.readout).items()}
        assert readout == {
            "standard deviation σ": f"{layer.sigma:.3g}",
            "codes in use": f"{len(codes)} of {2**bits}",
            "entropy of the codes": f"{shown.entropy:.2f} of {bits} bits",
            "weights that become 0": percent(shown.zeros),
            "mean squared error": f"{mse(weight, approximation):.2e}",
            "SQNR": f"{expected_sqnr(given, weight, approximation):.1f} dB",
            "largest error": f"{max_abs_error(weight, approximation):.2e}",
            "memory": f"{quantized.bits_per_weight:.3g} bits per weight",
        }
        assert f"{len(codes)} of {2**bits} in use" in shown.alt
        if outlier == 1:
            assert readout["SQNR"] == f"{sqnr_db(weight, approximation):.1f} dB"
        check_pictures(layer, shown, given, weight, quantized, approximation)


def expected_sqnr(given, weight, approximation):
    """In dB; the signal is that of the weights as given, without the outlier."""
    noise = (weight - approximation).double().square().sum().item()
    return 10 * math.log10(given.double().square().sum().item() / noise) if noise else math.inf


def test_all_weights_are_drawn_or_a_seeded_choice(monkeypatch):
    weight = normal(40, 64)
    assert torch.equal(prepare(weight).drawn, torch.arange(weight.numel()))
    monkeypatch.setattr(layers, "DRAWN", 1000)
    layers.drawn.cache_clear()
    layer = prepare(weight)
    assert torch.equal(layer.drawn, prepare(weight).drawn)
    assert layer.drawn.max() < weight.numel()
    for method, group_size in product(METHODS, [None, 64]):
        quantized = by_hand(weight, method, 4, group_size)
        shown = view(layer, method, 4, group_size, 1)
        check_pictures(layer, shown, weight, weight, quantized, quantized.dequantize())
        assert shown.code_counts.sum() == weight.numel()  # numbers and codes are of all


def check_pictures(layer, shown, given, weight, quantized, approximation):
    """The histograms and quantiles of a view, against numpy's own of the weights drawn."""
    assert len(layer.drawn) == min(layers.DRAWN, weight.numel())
    before, after = given.reshape(-1)[layer.drawn], approximation.view(-1)[layer.drawn]
    assert np.array_equal(layer.density, numpy_density(before, layer.sigma))
    errors = after - weight.reshape(-1)[layer.drawn]
    unit = mse(weight, approximation) ** 0.5 or 1.0
    assert np.array_equal(shown.error_density, numpy_density(errors, unit))

    for quantiles, values in [(layer.quantiles, before), (shown.quantiles, after)]:
        expected = np.quantile(values.numpy(), PROBABILITIES, method="nearest")
        assert np.array_equal(quantiles, expected / layer.sigma)

    if quantized.scale.numel() > 1:
        assert len(shown.levels) == 0
        assert np.array_equal(shown.edges, EDGES)
        assert np.array_equal(shown.density, numpy_density(after, layer.sigma))
        return
    levels, counts = np.unique(after.numpy(), return_counts=True)
    assert np.array_equal(shown.levels, levels / layer.sigma)
    # each bin holds the weights of its level: its area is their share
    areas = shown.density * np.diff(shown.edges)
    assert np.allclose(areas, counts / len(after), rtol=1e-12, atol=0)
    assert (shown.edges[:-1] < shown.levels).all()
    assert (shown.levels < shown.edges[1:]).all()


def numpy_density(values, unit):
    """np.histogram on the same edges, which it takes as half open, but for the last."""
    edges = (EDGES * unit).astype(np.float32)
    values = values.numpy().ravel()
    counts = np.histogram(values[values < edges[-1]], edges)[0]
    return counts / (values.size * np.diff(EDGES))


def test_bins_meet_halfway_between_levels():
    assert level_edges(np.array([-1.0, 0.0, 2.0])).tolist() == [-1.5, -0.5, 1, 3]
    assert level_edges(np.array([0.7])).tolist() == [0, 1.4]
    assert level_edges(np.array([0.0])).tolist() == [-1, 1]


def test_codes_are_counted_from_the_lowest_level_to_the_highest():
    weight = torch.tensor([[-1.0, -0.9, -0.3, 0.0, 0.1, 0.4, 0.9, 1.0]])
    for method in METHODS:
        quantized = by_hand(weight, method, 4, None)
        values = np.repeat(np.arange(16), count_codes(quantized))  # the rank of each weight's level
        assert len(values) == 8
        # more weights on a lower level than another means: the sorted weights get these ranks
        approximation = quantized.dequantize().view(-1)
        changes = np.diff(approximation.sort().values.numpy()) > 0
        assert np.array_equal(np.diff(values) > 0, changes), method


@pytest.mark.parametrize("bits", BITS)
def test_every_code_has_its_place(bits):
    half = 2 ** (bits - 1) - 1
    for code in range(-half, half + 1):
        weight = torch.tensor([[half, code]]) / half
        counts = count_codes(quantize_absmax(weight, bits))
        expected = np.zeros(2**bits, int)
        for each in (half, code):
            expected[each + half + 1] += 1
        assert np.array_equal(counts, expected)


@pytest.mark.parametrize(
    ("counts", "bits"), [([8], 0), ([1, 1], 1), ([1, 0, 1], 1), ([4, 2, 1, 1], 1.75), ([3] * 16, 4)]
)
def test_entropy(counts, bits):
    assert entropy(np.array(counts)) == bits


@pytest.mark.parametrize(
    ("share", "words"),
    [(0, "0.0%"), (1e-7, "0.1%"), (0.1234, "12.3%"), (0.99999, "99.9%"), (1, "100.0%")],
)
def test_percent_says_all_and_nothing_only_where_it_is(share, words):
    assert percent(share) == words


def test_a_large_matrix_is_shown_by_whole_rows_and_its_extremes(monkeypatch):
    monkeypatch.setattr(layers, "MOST", 64 * 10)
    weight = normal(1000, 64)
    weight[123, 4], weight[876, 5] = 9.0, -8.0
    layer = prepare(weight)
    assert 10 <= len(layer.weight) <= 12
    kept = [row for row in range(1000) if (layer.weight == weight[row]).all(1).any()]
    assert len(kept) == len(layer.weight)
    assert {0, 123, 876, 900} <= set(kept)
    for method in ("absmax", "affine"):  # so a scale for the whole tensor is the same
        whole = by_hand(weight, method, 4, None)
        part = quantize(layer.weight, method, 4, None)
        assert part.scale == whole.scale
    assert (
        f"rows measured          {len(kept)} of 1000\n" in view(layer, "absmax", 4, 64, 1).readout
    )


@pytest.mark.parametrize(
    ("weight", "error", "words"),
    [
        (torch.ones(5), ValueError, "out_features, in_features"),
        (torch.tensor([[1.0, math.nan]]), ValueError, "NaN or Inf"),
        (torch.empty(0, 4), ValueError, "empty"),
        (torch.ones(2, 4, dtype=torch.int8), TypeError, "floating"),
        ([[1.0]], TypeError, "torch.Tensor"),
    ],
)
def test_bad_weights(weight, error, words):
    with pytest.raises(error, match=words):
        explore_distributions(weight)


def test_scales_that_float16_cannot_hold_are_explained_by_what_the_panel_has():
    panel = explore_distributions(1e8 * normal(4, 96))
    said = panel.set(method="absmax", bits=8, group_size=32)
    assert "cannot be held in float16" in said
    assert "choose NF4 or FP4" in said
    assert "scale_dtype" not in said  # there is no such control
    assert "do not apply" not in panel.set(method="nf4", bits=4)
    panel.close()


# --- methods that learn from inputs ---------------------------------------------------------------


@pytest.fixture(scope="module")
def seen():
    inputs = normal(300, 128, seed=3) @ (normal(128, 128, seed=4) + 0.3)
    inputs[:, 7] *= 30
    return LayerInputs(inputs, gptq.hessian(inputs), gptq.hessian(normal(200, 128, seed=5)))


@pytest.mark.parametrize("name", WEIGHTS)
@pytest.mark.parametrize("method", WEIGHT_LEARNERS)
def test_learned_numbers_are_the_packages_own(name, method, seen):
    given = WEIGHTS[name]
    layer, given = prepare(given, lambda: seen), given.float()
    for bits, group_size in product((2, 4, 8), ("channel", 64, 16)):
        shown = view(layer, method, bits, group_size, 1)
        if method == "gptq":
            quantized = gptq.quantize(given, seen.hessian, bits, group_size)
            approximation = quantized.dequantize()
        else:
            x = seen.x[::3]  # 100 of 300 tokens: at most AWQ_TOKENS
            outputs = lambda weights, x=x: [x @ W.T for W in weights]  # noqa: E731
            s = awq.search_scale(x.abs().mean(0), [given], outputs, bits, group_size).s
            quantized = quantize_affine(given * s, bits, group_size)
            approximation = quantized.dequantize() / s
        check_pictures(layer, shown, given, given, quantized, approximation)
        assert f"{mse(given, approximation):.2e}" in shown.readout
        loss = gptq.layer_loss(given, approximation, seen.held_out)
        rounded = quantize_affine(given, bits, group_size).dequantize()
        assert shown.output_losses == (loss, gptq.layer_loss(given, rounded, seen.held_out))
        assert f"error of the outputs, held-out text  {loss:.2g}, affine" in shown.readout


def test_learned_methods_say_what_they_need():
    panel = explore_distributions(normal(4, 128))
    for method in WEIGHT_LEARNERS:
        assert "a scale per row at least" in panel.set(method=method, group_size=None)
        assert "learns from a layer's inputs" in panel.set(group_size=64)
    panel.close()


def test_what_reaches_a_layer_of_the_embedded_model(monkeypatch):
    tokens = {name: torch.randint(49152, (1, 16), generator=generator()) for name in "ab"}
    monkeypatch.setattr(distributions, "calibration_tokens", lambda *_: tokens["a"])
    monkeypatch.setattr(distributions, "evaluation_tokens", lambda *_: tokens["b"])
    texts = Texts()
    model, _ = models.load(device="cpu")
    for block, name in ((3, "mlp.down_proj"), (0, "self_attn.k_proj")):  # backwards too
        wanted = []
        linear = model.model.layers[block].get_submodule(name)
        hook = linear.register_forward_pre_hook(lambda _, args, kept=wanted: kept.append(args[0]))
        with torch.no_grad():
            for each in tokens.values():
                model(each)
        hook.remove()
        shown = texts.inputs(block, name.rpartition(".")[2])
        # the same float32 operations on the same numbers; kernels may sum in another order
        apart = (shown.x - wanted[0][0]).norm() / wanted[0].norm()
        assert apart < 1e-4
        for hessian, x in zip((shown.hessian, shown.held_out), wanted, strict=True):
            expected = 2 / 16 * x[0].double().T @ x[0].double()
            assert (hessian - expected).norm() < 1e-4 * expected.norm()


def test_a_group_size_that_does_not_divide_is_explained():
    panel = explore_distributions(normal(4, 96))
    said = panel.set(group_size=64)
    assert "64 does not divide in_features = 96" in said
    assert "8 does not divide" not in panel.set(group_size=32)
    panel.close()
