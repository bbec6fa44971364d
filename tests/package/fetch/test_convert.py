"""The shuffle keeps the model's function and takes its weights off the stored 4-bit grid."""

import copy
import hashlib
import json
from types import SimpleNamespace

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from chapter13 import corpus, models
from chapter13.fetch.convert import Shuffle, shuffles
from chapter13.fetch.download import require

pytestmark = pytest.mark.slow

# Two conversions give the same bytes, and so should every machine.
MODEL_SHA256 = "6f017131bb35378592de4c02138f8e331b1dc8c6b41f6bc09bb0674247864532"


@pytest.fixture(scope="module")
def embedded():
    return models.load(device="cpu")


@pytest.fixture(scope="module")
def embedded_shuffles():
    config = json.loads((require(models.EMBEDDED) / "config.json").read_text(encoding="utf-8"))
    return shuffles(SimpleNamespace(**config))


def tiny_llama(**changes) -> LlamaForCausalLM:
    """Random weights in float64; six query heads on two value heads unless changed."""
    sizes = {
        "vocab_size": 50, "hidden_size": 48, "intermediate_size": 40, "num_hidden_layers": 2,
        "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 8,
    }  # fmt: skip
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**(sizes | changes))).double().eval()
    with torch.no_grad():
        for weight in model.parameters():
            # norms too: were they all one, no test would notice that they stay in place
            weight.copy_(torch.randn_like(weight) / 4 + (weight.dim() == 1))
    return model


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_key_value_heads": 6},
        {"num_key_value_heads": 1},
        {"tie_word_embeddings": True},
        {"head_dim": 16},
    ],
)
def test_shuffle_keeps_the_function(changes):
    model = tiny_llama(**changes)
    shuffled = copy.deepcopy(model)
    plan = shuffles(model.config)
    state = {name: plan[name].apply(weight) for name, weight in model.state_dict().items()}
    shuffled.load_state_dict(state)
    for name, weight in model.state_dict().items():
        assert not torch.equal(state[name], weight), f"{name} was left as it was"
        assert torch.equal(plan[name].undo(state[name]), weight)

    tokens = torch.randint(0, 50, (2, 12), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        expected, found = model(tokens).logits, shuffled(tokens).logits
    # Float64, but transformers' norms compute in float32: the mean of up to 48 squares in another
    # order is off by up to 48 * 2^-24 = 3e-6 of itself, at 5 norms, and the layers between them
    # raise that a few times. A channel out of place moves a logit by its own size (next test).
    assert (found - expected).abs().max() < 1e-4


@pytest.mark.parametrize("name", ["self_attn.o_proj", "mlp.down_proj", "input_layernorm"])
def test_one_weight_left_out_is_noticed(name):
    model = tiny_llama()
    shuffled = copy.deepcopy(model)
    plan = shuffles(model.config) | {f"model.layers.1.{name}.weight": Shuffle()}
    shuffled.load_state_dict({n: plan[n].apply(w) for n, w in model.state_dict().items()})
    tokens = torch.arange(12)[None]
    with torch.inference_mode():
        assert (model(tokens).logits - shuffled(tokens).logits).abs().max() > 0.1


def test_shuffle_by_hand():
    weight = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    shuffle = Shuffle(rows=[1, 0], columns=[2, 0, 1], row_signs=[1, -1], column_signs=[1, 1, -1])
    assert shuffle.apply(weight).tolist() == [[6, 4, -5], [-3, -1, 2]]
    assert torch.equal(shuffle.undo(shuffle.apply(weight)), weight)


def test_embedded_model_computes_what_the_stored_one_does(embedded, embedded_shuffles):
    """KL divergence below 1e-6 at every token."""
    model, tokenizer = embedded
    stored = copy.deepcopy(model)
    stored.load_state_dict(
        {name: embedded_shuffles[name].undo(weight) for name, weight in model.state_dict().items()}
    )
    tokens = corpus.evaluation_tokens(tokenizer, 1, 96)
    with torch.inference_mode():
        p = stored(tokens).logits.double().log_softmax(-1)
        q = model(tokens).logits.double().log_softmax(-1)
    divergence = (p.exp() * (p - q)).sum(-1)
    assert divergence.max() < 1e-6
    assert not torch.equal(p, q)  # or it would be one model compared with itself


def on_a_grid(groups: torch.Tensor) -> torch.Tensor:
    """Which rows of `groups` (groups, 32) fit on 16 equally spaced levels.

    If they do, the smallest and the largest value lie k steps apart, k = 1 .. 15, and all values a
    whole number of steps from the smallest. The file holds d*q + m rounded once to float32, so each
    value may be off by 2^-24 of the largest absolute value A; the distance from the smallest by
    twice that, and as the step is taken from two such values, the number of steps by
    4 * 2^-24 * A / step. Beside that the rounding of float64 here is nothing.
    """
    groups = groups.double()
    low, high = groups.aminmax(dim=1, keepdim=True)
    unit = 4 * 2.0**-24 * groups.abs().amax(1, keepdim=True) / (high - low)
    position = (groups - low) / (high - low)
    fits = (high == low).squeeze(1)
    for k in range(15, 0, -1):
        rest = (~fits).nonzero().squeeze(1)
        for columns in (slice(0, 4), slice(None)):  # four values rule out nearly all groups
            steps = position[rest, columns] * k
            rest = rest[((steps - steps.round()).abs() <= unit[rest] * k).all(1)]
        fits[rest] = True
    return fits


def test_the_check_for_a_grid():
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 16, (200, 32), generator=generator)
    d, m = torch.rand(200, 1, generator=generator) + 0.1, torch.randn(200, 1, generator=generator)
    stored = codes * d.half().float() + m.half().float()
    assert on_a_grid(stored).all()
    assert on_a_grid(stored[:, torch.randperm(32, generator=generator)]).all()
    assert on_a_grid(torch.full((1, 32), 0.3)).all()
    wrong = stored.clone()
    wrong[:, 7] += d.squeeze(1) / 1000
    assert not on_a_grid(wrong).any()
    wide = torch.arange(32.0)[None] % 17  # equally spaced, but 17 levels
    assert not on_a_grid(wide).any()


def test_no_group_of_32_keeps_the_stored_grid(embedded_shuffles):
    weights = models.linear_weights()
    assert len(weights) == 210
    for name, weight in weights.items():
        stored = embedded_shuffles[name].undo(weight)
        assert on_a_grid(stored.view(-1, 32)).all(), f"{name}: undone, it lies on the stored grid"
        found = on_a_grid(weight.view(-1, 32))
        assert not found.any(), f"{name}: {int(found.sum())} groups lie on a grid of 16 levels"


def test_the_converted_file_is_the_same_everywhere():
    with (require(models.EMBEDDED) / "model.safetensors").open("rb") as file:
        assert hashlib.file_digest(file, "sha256").hexdigest() == MODEL_SHA256
