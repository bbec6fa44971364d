"""Notebook 06's explorers and pictures show the package's own numbers."""

import itertools
import re
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny import tiny_llama

from chapter13 import gptq, quantize_affine
from chapter13.explorers.gptq import (
    BINS,
    CORRELATIONS,
    DAMPS,
    Layer,
    calibrate,
    collect,
    columns_view,
    correlated,
    explore_columns,
    explore_layer,
    hessians,
    layer_view,
    steps,
)
from chapter13.measures import relative_rmse
from chapter13.plots import gptq as pictures

BITS = (2, 3, 4)


def weight(rows=4, columns=8, seed=5):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


# --- column by column ---------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
def test_steps_end_where_the_package_does(seed):
    """The same codes: one inverts in float64 for each column, the other factors once in float32."""
    W = weight(seed=seed)
    for bits, correlation in itertools.product(BITS, CORRELATIONS):
        H = correlated(W.shape[1], correlation)
        Q = gptq.quantize(W, H, bits, "channel", act_order=False, damp=0, scale_dtype=torch.float32)
        done = steps(W, H, bits)
        # one scale apart would be another code; the same code is equal to float32's rounding
        assert done.weights[-1] == pytest.approx(Q.dequantize().numpy(), abs=1e-5)


def test_each_step_is_the_best_that_the_rest_can_do():
    """Against a direct solution: with the rounded columns fixed, the least loss over the others."""
    W, H = weight().double(), correlated(8, 0.8)
    done = steps(weight(), H, 3)
    for column in range(1, 8):
        now = torch.from_numpy(done.weights[column])
        fixed = (W - now)[:, :column]
        # d/d rest of tr(D H D^T) = 0
        rest = -torch.linalg.solve(H[column:, column:], H[column:, :column] @ fixed.T).T
        assert torch.allclose((W - now)[:, column:], rest, atol=1e-10)


def test_losses_by_the_definition():
    W, H = weight(), correlated(8, 0.8)
    done = steps(W, H, 3)
    nearest = quantize_affine(W, 3, "channel", torch.float32).dequantize().double()
    root = torch.linalg.cholesky(H)  # inputs whose mean products are H
    for column in range(9):
        mixed = torch.cat([nearest[:, :column], W[:, column:].double()], dim=1)
        error = ((W - mixed) @ root).square().sum().item()
        assert done.nearest_losses[column] == pytest.approx(error, rel=1e-5)
        now = torch.from_numpy(done.weights[column])
        error = ((W - now) @ root).square().sum().item()
        assert done.losses[column] == pytest.approx(error, rel=1e-9)
    assert (np.diff(done.losses) >= 0).all(), "each column can only add"


def test_without_correlation_nothing_moves():
    for bits in BITS:
        shown = columns_view(weight(), 8, 0.0, bits)
        assert (shown.losses == shown.nearest_losses).all()
        assert shown.losses[-1] == 1
        assert not columns_view(weight(), 3, 0.0, bits).moved[:, 3:].any()


@pytest.mark.parametrize("bits", BITS)
def test_columns_over_the_whole_grid(bits):
    W = weight()
    panel = explore_columns(W)
    for column, correlation in itertools.product(range(9), CORRELATIONS):
        readout = panel.set(column=column, correlation=correlation, bits=bits)
        done = steps(W, correlated(8, correlation), bits)
        unit = done.nearest_losses[-1]
        assert f"{column} of 8" in readout
        assert re.search(rf"GPTQ +{done.losses[column] / unit:.2f}\n", readout)
        assert re.search(rf"nearest +{done.nearest_losses[column] / unit:.2f} \(1.00", readout)
        assert (panel.view.weights == done.weights[column]).all()
        assert np.isfinite(panel.view.losses).sum() == column + 1
        assert panel.view.moved == pytest.approx(panel.view.weights - W.double().numpy())
    panel.close()


def test_weights_that_are_on_the_grid():
    """No loss to measure by, and nothing to divide by."""
    shown = columns_view(torch.zeros(2, 4), 4, 0.5, 3)
    assert (shown.losses == 0).all()
    assert not shown.moved.any()


# --- a layer ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def layers():
    generator = torch.Generator().manual_seed(13)
    mix = torch.randn(64, 64, generator=generator) / 8 + 0.2
    mix[:, 9] *= 40  # a loud channel

    def text(sequences):
        return torch.randn(sequences, 32, 64, generator=generator) @ mix

    made = {}
    for name, rows in (("one", 48), ("other", 16)):
        W = 0.1 * torch.randn(rows, 64, generator=generator)
        made[name] = Layer(W, {"news": text(8), "encyclopedia": text(9)}, text(4))
    return made


OPTIONS = list(itertools.product([False, True], [False, True], DAMPS[1:]))


@pytest.mark.parametrize("bits", range(2, 9))
def test_layer_over_the_whole_grid(layers, bits):
    W, held_out = layers["one"].weight, layers["one"].held_out
    texts = layers["one"].calibration["news"], held_out, held_out[:, 1:]
    calibrated = [calibrate(text) for text in texts]
    matrices = [gptq.hessian(text.flatten(0, 1)) for text in texts]
    for group_size in ("channel", 32, 16):
        nearest = quantize_affine(W, bits, group_size).dequantize()
        for act_order, clip_search, damp in OPTIONS:
            options = {"act_order": act_order, "clip_search": clip_search, "damp": damp}
            Q = gptq.quantize(W, matrices[0], bits, group_size, **options).dequantize()
            shown = layer_view(W, *calibrated, "gptq", bits, group_size, **options)
            expected = [[gptq.layer_loss(W, each, H) for H in matrices] for each in (nearest, Q)]
            assert shown.losses.tolist() == expected
            assert shown.ratios.tolist() == [b / a for a, b in zip(*expected, strict=True)]
            assert f"{relative_rmse(W, Q):.1%}" in shown.readout
            for loss, ratio in zip(expected[1], shown.ratios, strict=True):
                assert f"{loss:.2g}, {ratio:.2g} times rounding's" in shown.readout
        shown = layer_view(W, *calibrated, "affine", bits, group_size, **options)
        assert shown.losses.tolist() == [expected[0], expected[0]]
        assert (shown.ratios == 1).all()


def test_errors_by_channel(layers):
    layer = layers["one"]
    seen = calibrate(layer.calibration["news"])
    narrow = layer.weight[:, :16].contiguous()  # fewer than BINS: a bin is a channel
    few = calibrate(layer.calibration["news"][..., :16])
    shown = layer_view(narrow, few, few, few, "affine", 3, 16, True, False, 0.01)
    order = few.hessian.diagonal().argsort(descending=True)
    assert order[0] == 9
    Q = quantize_affine(narrow, 3, 16).dequantize()
    expected = (narrow - Q).square().mean(0).sqrt() / narrow.square().mean().sqrt()
    assert shown.errors[0] == pytest.approx(expected[order].numpy(), rel=1e-5)
    assert (shown.errors[0] == shown.errors[1]).all()
    assert layer_view(
        layer.weight, seen, seen, seen, "affine", 3, 16, True, False, 0.01
    ).errors.shape == (2, BINS)


def test_gptq_beats_rounding_on_the_text_it_saw(layers):
    panel = explore_layer(layers)
    for bits in (2, 3, 4):
        panel.set(bits=bits, group_size=16)
        losses = panel.view.losses
        assert losses[1, 0] < losses[0, 0]
    panel.set(method="affine")
    assert (panel.view.losses[0] == panel.view.losses[1]).all()
    panel.close()


def test_too_little_text_is_said(layers):
    panel = explore_layer(layers)
    assert "warning" not in panel.readout
    said = panel.set(amount=1)
    assert "warning" in said
    assert "span" in said
    assert "do not apply" in panel.set(damp=0.0)
    assert "cannot be inverted" in panel.readout
    assert "does not divide" in panel.set(damp=0.01, group_size=192)
    panel.close()


def test_amount_and_text_choose_what_is_calibrated_on(layers):
    panel = explore_layer(layers)
    assert list(panel.controls["amount"].options) == [1, 2, 4, 8]
    for name, text, amount in itertools.product(layers, ("news", "encyclopedia"), (2, 8)):
        panel.set(layer=name, text=text, amount=amount, group_size=16)
        layer = layers[name]
        x = layer.calibration[text][:amount]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            H = gptq.hessian(x.flatten(0, 1))
        loss = gptq.layer_loss(layer.weight, gptq.quantize(layer.weight, H, 4, 16).dequantize(), H)
        assert panel.view.losses[1, 0] == loss
        assert f"times rounding's, {32 * amount} tokens" in panel.readout
    panel.close()


def test_collect_sees_what_reaches_each_layer():

    model = tiny_llama(intermediate_size=128)
    tokens = torch.randint(90, (3, 16), generator=torch.Generator().manual_seed(1))
    wanted, hooks = {}, []
    for name, module in model.model.layers[1].named_modules():
        if isinstance(module, torch.nn.Linear):
            hooks.append(
                module.register_forward_pre_hook(
                    lambda _, args, name=name: wanted.setdefault(name, args[0].clone())
                )
            )
    with torch.no_grad():
        before = model(tokens).logits
    for hook in hooks:
        hook.remove()
    seen = collect(model, tokens, 1)
    assert set(seen) == set(wanted)
    for name, x in seen.items():
        assert x.shape == wanted[name].shape
        assert torch.allclose(x, wanted[name], atol=1e-5)
    with torch.no_grad():
        assert torch.equal(model(tokens).logits, before)


def test_hessians_of_several_layers_from_one_pass():
    model = tiny_llama(intermediate_size=128)
    tokens = torch.randint(90, (3, 60), generator=torch.Generator().manual_seed(1))
    names = [f"model.layers.{index}.mlp.down_proj" for index in (0, 1)]
    with torch.no_grad():
        before = model(tokens).logits
    found = hessians(model, tokens, names)
    assert list(found) == names
    for index, H in enumerate(found.values()):
        x = collect(model, tokens, index)["mlp.down_proj"]
        assert torch.allclose(H, gptq.hessian(x.flatten(0, 1)), rtol=1e-3, atol=1e-6)
    with torch.no_grad():
        assert torch.equal(model(tokens).logits, before)
    assert not any(layer._forward_pre_hooks for layer in model.modules())


# --- pictures -----------------------------------------------------------------------------------


def test_a_hessians_patches_keep_the_largest():
    matrix = np.ones((130, 130))
    matrix[129, 0] = 7
    small = pictures._largest_of_patches(matrix)
    assert small.shape == (pictures.PATCHES, pictures.PATCHES)
    assert small[-1, 0] == 7
    assert (small == 1).sum() == small.size - 1


def test_a_large_ratio_lies_at_the_edge_with_its_number(layers):
    panel = explore_layer(layers)
    figure = panel.figure
    (dots,) = [line for line in figure.axes[0].lines if line.get_gid() == "method:gptq"]
    assert dots.get_xdata() == pytest.approx(np.clip(panel.view.ratios, 0, figure.MOST))
    figure.update(replace(panel.view, ratios=np.array([0.25, 1.5, 7.0])))
    assert list(dots.get_xdata()) == [0.25, 1.5, figure.MOST]
    assert [text.get_text() for text in figure._numbers] == ["0.25", "1.5", "7"]
    assert dots.get_visible()
    panel.set(method="affine")
    assert not dots.get_visible()
    panel.close()
