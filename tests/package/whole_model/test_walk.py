"""The walk through a model's blocks: what it finds, what it passes on, what it leaves alone."""

import pytest
import torch
from tiny import MODELS, TOKENS, says, tiny_gpt2, tiny_llama
from torch import nn

from chapter13.whole_model import walk as walking
from chapter13.whole_model.layers import linear_layers
from chapter13.whole_model.walk import Walk, find_blocks

LLAMA = [
    ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
    ["self_attn.o_proj"],
    ["mlp.gate_proj", "mlp.up_proj"],
    ["mlp.down_proj"],
]
GPT2 = [["attn.c_attn"], ["attn.c_proj"], ["mlp.c_fc"], ["mlp.c_proj"]]


def hidden_states(model, tokens):
    """What transformers itself says stands before each block, and after the last."""
    seen = []
    _, layers = find_blocks(model)

    def keep(module, args, kwargs, out=None):
        seen.append((args[0] if args else kwargs["hidden_states"]).detach())

    hooks = [block.register_forward_pre_hook(keep, with_kwargs=True) for block in layers]
    hooks.append(
        layers[-1].register_forward_hook(
            lambda module, args, out: seen.append(out[0] if isinstance(out, tuple) else out)
        )
    )
    with torch.no_grad():
        model(tokens, use_cache=False)
    for hook in hooks:
        hook.remove()
    return seen


@pytest.mark.parametrize("name", MODELS)
def test_hidden_states_are_the_models_own(name):
    model = MODELS[name]()
    expected = hidden_states(model, TOKENS)
    walk = Walk(model, TOKENS)
    assert len(walk.blocks) == 2
    for index in range(2):
        assert torch.equal(walk.hidden[0], expected[index])
        walk.advance(index)
    assert torch.equal(walk.hidden[0], expected[2])
    assert set(linear_layers(model)) >= {f"{walk.name}.{x}" for x in linear_layers(walk.blocks)}


@pytest.mark.parametrize(("make", "groups"), [(tiny_llama, LLAMA), (tiny_gpt2, GPT2)])
def test_layers_with_one_input_stand_together(make, groups):
    walk = Walk(make(), TOKENS)
    assert walk.groups(0) == walk.groups(1) == groups


@pytest.mark.parametrize("name", MODELS)
def test_every_linear_layer_is_in_one_group(name):
    walk = Walk(MODELS[name](), TOKENS)
    names = [layer for group in walk.groups(1) for layer in group]
    assert sorted(names) == sorted(linear_layers(walk.blocks[1]))


def inputs_of(model, tokens):
    """name -> what each linear layer reads when the model runs by itself."""
    seen = {}
    hooks = [
        layer.register_forward_pre_hook(
            lambda _, args, name=name: seen.__setitem__(name, args[0].detach())
        )
        for name, layer in linear_layers(model).items()
    ]
    with torch.no_grad():
        model(tokens)
    for hook in hooks:
        hook.remove()
    return {name: x.reshape(-1, x.shape[-1]) for name, x in seen.items()}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("at_once", [4096, 16])  # all in one batch, and a sequence at a time
def test_inputs_are_those_of_the_model(name, at_once, monkeypatch):
    monkeypatch.setattr(walking, "TOKENS_AT_ONCE", at_once)
    model = MODELS[name]()
    expected = inputs_of(model, TOKENS)
    walk = Walk(model, TOKENS)
    assert len(walk.hidden) == (1 if at_once > 16 else len(TOKENS))
    seen = {}
    for index in range(2):

        def look(names, inputs, index=index):
            x = torch.cat(list(inputs))
            seen.update({f"{walk.name}.{index}.{name}": x for name in names})

        walk.visit(index, look)
    assert set(seen) == {name for name in expected if name.startswith(walk.name)}
    for name, x in seen.items():
        # sequences that pass one by one take other kernels: float32 sums of up to 256 terms
        # through two blocks
        assert (x - expected[name]).abs().max() <= 1e-4 * expected[name].abs().max()


@pytest.mark.parametrize("at_once", [4096, 16])
def test_changes_reach_the_layers_after(at_once, monkeypatch):
    """Doubling a block's first layers on the way gives what a model with doubled weights gives."""
    monkeypatch.setattr(walking, "TOKENS_AT_ONCE", at_once)
    changed = tiny_llama()
    for name, layer in linear_layers(changed).items():
        if name.endswith(("v_proj", "o_proj")):
            layer.weight.data *= 2
    expected = hidden_states(changed, TOKENS)[2]

    model = tiny_llama()
    walk = Walk(model, TOKENS)
    for index in range(2):

        def double(names, inputs, index=index):
            for name in names:
                layer = walk.blocks[index].get_submodule(name)
                if name.endswith(("v_proj", "o_proj")):
                    layer.weight = nn.Parameter(layer.weight.detach() * 2)

        walk.visit(index, double)
    got = torch.cat(walk.hidden)
    assert (got - expected).abs().max() <= 1e-4 * expected.abs().max()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_models_are_walked_in_float32(dtype):
    model = tiny_llama().to(dtype)
    before = dict(model.named_parameters())
    places = {name: parameter.data_ptr() for name, parameter in before.items()}
    expected = hidden_states(tiny_llama().to(dtype).float(), TOKENS)
    walk = Walk(model, TOKENS)
    walk.advance(0)
    assert walk.hidden[0].dtype == torch.float32
    # the rotary tables are computed by the narrow model and have its precision, 2**-8 in bfloat16
    assert (walk.hidden[0] - expected[1]).abs().max() <= 2**-7 * expected[1].abs().max()
    for name, parameter in model.named_parameters():
        assert parameter is before[name]
        assert parameter.dtype == dtype
        assert parameter.data_ptr() == places[name]


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
def test_nothing_is_left_behind(make):
    model = make()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    walk = Walk(model, TOKENS)
    with pytest.raises(KeyError, match="out of the blue"):
        walk.visit(0, lambda names, inputs: (_ for _ in ()).throw(KeyError("out of the blue")))
    walk.advance(0)
    for module in model.modules():
        assert not module._forward_pre_hooks
        assert not module._forward_hooks
        assert "forward" not in vars(module)
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name])


def test_the_list_with_most_linear_layers_is_the_blocks():
    class Vision(nn.Module):
        def __init__(self):
            super().__init__()
            self.few = nn.ModuleList([nn.Linear(4, 4)])
            self.blocks = nn.ModuleList(
                nn.ModuleDict({"experts": nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])})
                for _ in range(3)
            )
            self.none = nn.ModuleList([nn.ReLU()] * 9)

    name, found = find_blocks(Vision())
    assert name == "blocks"
    assert len(found) == 3
    with pytest.raises(ValueError, match=says("Sequential", "blocks")):
        find_blocks(nn.Sequential(nn.Linear(4, 4)))


def test_a_layer_that_nothing_reaches_is_named():
    model = tiny_llama()
    model.model.layers[1].mlp.spare = nn.Linear(64, 64)
    walk = Walk(model, TOKENS)
    walk.groups(0)
    with pytest.raises(ValueError, match=says("model.layers.1", "mlp.spare")):
        walk.groups(1)


@pytest.mark.parametrize(
    ("tokens", "error", "message"),
    [
        (TOKENS.float(), TypeError, says("calibration", "tokens", "integer")),
        (TOKENS.tolist(), TypeError, says("calibration", "tokens", "integer")),
        (TOKENS[0], ValueError, says("(sequences, length)")),
        (TOKENS[:0], ValueError, says("(sequences, length)")),
        (TOKENS + 90, ValueError, says("0 to 99")),
        (TOKENS - 99, ValueError, says("0 to 99")),
    ],
)
def test_bad_tokens_are_named(tokens, error, message):
    with pytest.raises(error, match=message):
        Walk(tiny_llama(), tokens)
