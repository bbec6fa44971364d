"""Which layers of a model are linear, and swapping all of them or none."""

import pytest
import torch
from test_outliers import tiny_gpt2
from test_static import tiny_llama
from torch import nn

from chapter13.whole_model.layers import is_conv1d, linear_layers, replace_layers, weight_of


def test_gpt2_has_none_that_a_loop_over_linear_would_find():
    model = tiny_gpt2()
    plain = [name for name, module in model.named_modules() if type(module) is nn.Linear]
    assert plain == ["lm_head"]
    layers = linear_layers(model)
    kinds = ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"]
    assert list(layers) == [f"transformer.h.{i}.{kind}" for i in range(2) for kind in kinds]
    assert all(is_conv1d(layer) for layer in layers.values())
    layer = layers["transformer.h.0.mlp.c_fc"]
    assert weight_of(layer).shape == (256, 64)
    x = torch.randn(3, 64)
    assert torch.allclose(x @ weight_of(layer).T + layer.bias, layer(x), atol=1e-5)


def test_llama():
    model = tiny_llama()
    assert len(linear_layers(model)) == 14
    assert "lm_head" not in linear_layers(model)
    assert not is_conv1d(model.model.layers[0].mlp.up_proj)


def test_layers_of_other_libraries_are_not_taken_for_plain_ones():
    class Derived(nn.Linear):
        pass

    class Conv1D(nn.Module):  # no transformers' one
        pass

    assert not linear_layers(nn.Sequential(Derived(2, 2), Conv1D()))


def test_all_or_none():
    model = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 3)), nn.Linear(3, 1))
    before = list(model.modules())

    def fail_at_last(name, layer):
        if name == "2":
            raise RuntimeError("no")
        return nn.Identity()

    with pytest.raises(RuntimeError, match="no"):
        replace_layers(model, fail_at_last, progress=False)
    assert list(model.modules()) == before
    replace_layers(model, lambda name, layer: nn.Identity(), progress=False)
    assert not linear_layers(model)
    with pytest.raises(ValueError, match="Sequential has no nn.Linear or Conv1D"):
        replace_layers(model, fail_at_last, progress=False)


def test_progress_is_shown(capsys):
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    replace_layers(model, lambda name, layer: nn.Identity(), description="at work")
    assert "at work: 100%" in capsys.readouterr().err
