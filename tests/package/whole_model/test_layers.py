"""Which layers of a model are linear, and swapping all of them or none."""

import pytest
import torch
from tiny import says, tiny_gpt2, tiny_llama
from torch import nn

from chapter13.whole_model.layers import (
    expert_stacks,
    is_conv1d,
    linear_layers,
    replace_layers,
    weight_of,
)


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
    import bitsandbytes

    class Conv1D(nn.Module):  # not the one of transformers
        pass

    class Adapted(nn.Linear):
        def __init__(self, *sides):
            super().__init__(*sides)
            self.A = nn.Parameter(torch.zeros(1, 2))

    class Scaled(nn.Linear):
        def forward(self, x):
            return super().forward(x) * 2

    class Failing(nn.Linear):
        def forward(self, x):
            raise RuntimeError("not today")

    class Buffered(nn.Linear):
        def __init__(self, *sides):
            super().__init__(*sides)
            self.register_buffer("mask", torch.ones(2, 2))

    theirs = (bitsandbytes.nn.Linear4bit(64, 64), bitsandbytes.nn.Linear8bitLt(64, 64))
    own = (Adapted(2, 2), Scaled(2, 2), Failing(2, 2), Buffered(2, 2))
    assert not linear_layers(nn.Sequential(*theirs, *own, Conv1D()))


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("bias", [True, False])
def test_a_subclass_that_computes_the_same_is_taken(bias, device):
    from transformers.models.falcon.modeling_falcon import FalconLinear

    layer = FalconLinear(40, 24, bias=bias, device=device)
    before = dict(layer.named_parameters())
    assert linear_layers(nn.Sequential(layer)) == {"0": layer}
    assert before.keys() == dict(layer.named_parameters()).keys()
    assert all(before[name] is parameter for name, parameter in layer.named_parameters())
    assert (layer.in_features, layer.out_features) == (40, 24)


def test_experts_in_one_tensor_are_refused():
    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate_up_proj = nn.Parameter(torch.zeros(8, 128, 64))

    model = nn.Sequential(nn.Linear(4, 4), Experts(), nn.Conv1d(64, 64, 4))
    assert list(expert_stacks(model)) == ["1.gate_up_proj"]
    with pytest.raises(ValueError, match=says("1.gate_up_proj", "8 experts")):
        replace_layers(model, lambda name, layer: nn.Identity(), progress=False)
    assert type(model[0]) is nn.Linear


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
    with pytest.raises(ValueError, match=says("Sequential", "nn.Linear", "Conv1D")):
        replace_layers(model, fail_at_last, progress=False)


def test_progress_is_shown(capsys):
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    replace_layers(model, lambda name, layer: nn.Identity(), description="at work")
    assert "at work: 100%" in capsys.readouterr().err
