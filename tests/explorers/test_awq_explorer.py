"""Notebook 09's explorer shows the package's own numbers."""

import re

import numpy as np
import pytest
import torch

from chapter13 import quantize_affine
from chapter13.awq import RATIOS, scales, search_scale
from chapter13.explorers.awq import explore_awq, view


@pytest.fixture
def layer():
    generator = torch.Generator().manual_seed(13)
    x = torch.randn(40, 64, generator=generator)
    x[:, ::16] *= 12
    return x, torch.randn(24, 64, generator=generator) * 0.1


def test_every_setting_by_the_definitions(layer):
    x, weight = layer
    panel = explore_awq({"one": layer})
    activation = x.abs().mean(0)
    for _, group_size in panel.controls["group_size"].options:
        for bits in range(2, 9):
            losses = []
            for r in RATIOS:
                s = scales(activation, r)
                restored = quantize_affine(weight * s, bits, group_size).dequantize() / s
                losses.append((x @ restored.T - x @ weight.T).square().double().mean().item())
            for r in RATIOS[::3]:
                readout = panel.set(r=r, bits=bits, group_size=group_size)
                shown = panel.view
                assert shown.losses == pytest.approx(losses, rel=1e-6)  # a mean in float64
                now, best = losses[RATIOS.index(r)] / losses[0], min(losses) / losses[0]
                assert re.search(rf"loss / plain rounding's +{now:.2g}\n", readout)
                at = RATIOS[losses.index(min(losses))]
                assert re.search(rf"AWQ finds, and its loss +{at:.2f}, {best:.2g}\n", readout)
    panel.close()


def test_protected_channels(layer):
    x, weight = layer
    losses = search_scale(x.abs().mean(0), [weight], lambda tried: [x @ tried[0].T]).losses
    assert view("one", x, losses, 0.0).protected == 0
    shown = view("one", x, losses, 0.5)
    activation = x.abs().mean(0)
    # twice the median's scale at r = 1/2: four times its activation
    assert shown.protected == (activation >= 4 * activation.median()).sum() == 4
    assert np.allclose(shown.s, (shown.activation / np.sort(activation)[31]) ** 0.5, rtol=1e-6)
    assert re.search(r"channels with s of 2 or more +4 of 64\n", shown.readout)
    assert (np.diff(shown.activation) <= 0).all()


def test_held_out_text_without_first_tokens(layer):
    x, weight = layer
    held_out = torch.randn(3, 10, 64, generator=torch.Generator().manual_seed(1))
    held_out[:, 0] *= 1000
    panel = explore_awq({"one": layer, "other": layer}, {"one": held_out})
    activation, ordinary = x.abs().mean(0), held_out[:, 1:].flatten(0, 1)
    losses = []
    for r in RATIOS:
        s = scales(activation, r)
        restored = quantize_affine(weight * s, 4, 64).dequantize() / s
        losses.append((ordinary @ (restored - weight).T).square().double().mean().item())
    readout = panel.set(r=0.4)
    assert panel.view.ordinary == pytest.approx(losses, rel=1e-4)
    now = losses[RATIOS.index(0.4)] / losses[0]
    assert re.search(rf"held-out, without first tokens +{now:.2g}\n", readout)
    assert f"{now:.2g} on held-out text without first tokens" in panel.alt
    assert panel.figure._ordinary.get_ydata()[-1] == pytest.approx(losses[-1] / losses[0])
    assert "first tokens" not in panel.set(layer="other")
    assert np.isnan(panel.view.ordinary).all()
    panel.close()
