"""What a model takes in memory: against real tensors, transformers' models and the package."""

import json
import math
from fractions import Fraction

import pytest
import torch
from tiny import says

from chapter13 import memory, quantize_absmax, quantize_codebook
from chapter13.fetch.download import require
from chapter13.memory import FORMATS, SHAPES, Shape

EMBEDDED = SHAPES[memory.EMBEDDED]
GROUPS = ["channel", 256, 128, 64, 32, 16]


def hf_model(shape, dtype=None):
    """transformers' model of this shape, without memory for its weights."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        num_hidden_layers=shape.layers,
        intermediate_size=shape.intermediate,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        tie_word_embeddings=shape.tied,
    )
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def part_of(name):
    """The part of `memory.parameters` that a parameter of transformers belongs to."""
    for word, part in {
        "embed_tokens": "embeddings",
        "norm": "norms",
        "self_attn": "attention",
        "mlp": "MLP",
        "lm_head": "head",
    }.items():
        if word in name:
            return part
    raise AssertionError(name)


@pytest.mark.parametrize("name", SHAPES)
def test_parameters_are_those_of_transformers(name):
    shape = SHAPES[name]
    model = hf_model(shape)
    counted = dict.fromkeys(memory.parameters(shape), 0)
    for parameter, value in model.named_parameters():
        counted[part_of(parameter)] += value.numel()
    assert memory.parameters(shape) == counted
    assert sum(memory.parameters(shape).values()) == model.num_parameters()
    layer = model.model.layers[0]
    linears = [m for m in layer.modules() if isinstance(m, torch.nn.Linear)]
    assert shape.linears() == [tuple(m.weight.shape) for m in linears]


def test_the_embedded_models_shape_and_tensors():
    from safetensors import safe_open

    folder = require("smollm2-135m")
    config = json.loads((folder / "config.json").read_text())
    fields = "vocab_size hidden_size num_hidden_layers intermediate_size num_attention_heads"
    fields += " num_key_value_heads head_dim tie_word_embeddings"
    assert EMBEDDED == Shape(*[config[field] for field in fields.split()])
    counted = dict.fromkeys(memory.parameters(EMBEDDED), 0)
    with safe_open(folder / "model.safetensors", "pt") as file:
        for name in file.keys():
            counted[part_of(name)] += math.prod(file.get_slice(name).get_shape())
    assert memory.parameters(EMBEDDED) == counted


def test_published_sizes():
    """The numbers of parameters that the models' papers and pages give, in billions."""
    published = {"Llama-3.2-1B": 1.24, "Llama-3-8B": 8.03, "Llama-3-70B": 70.6}
    published |= {"Llama-2-7B": 6.74, "Llama-2-13B": 13.0}
    for name, billions in published.items():
        assert float(f"{sum(memory.parameters(SHAPES[name]).values()) / 1e9:.3g}") == billions


def quantize(weight, format, group_size):
    if format.startswith("nf4"):
        return quantize_codebook(weight, "nf4", group_size, double_quant=format == "nf4+dq")
    return quantize_absmax(weight, FORMATS[format], group_size)


@pytest.mark.parametrize("format", [f for f in FORMATS if not f.startswith("fp")])
@pytest.mark.parametrize(
    "shape", [(576, 576), (192, 576), (576, 1536), (3, 40), (5, 7), (1, 1), (33, 512)]
)
def test_bytes_are_those_of_the_package(format, shape):
    """Short last blocks, odd counts of codes and settings that do not apply included."""
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)) + 0.1
    for group_size in GROUPS + [5, 7, 8]:
        try:
            held = quantize(weight, format, group_size)
        except ValueError:
            with pytest.raises(ValueError, match=r"does not divide|choose a number"):
                memory.linear_bytes(shape, format, group_size)
            continue
        codes, scales = memory.linear_bytes(shape, format, group_size)
        assert codes == held.packed.nbytes
        assert codes + scales == held.nbytes


@pytest.mark.parametrize(("format", "dtype"), [("fp32", torch.float32), ("fp16", torch.bfloat16)])
def test_floats_have_no_scales(format, dtype):
    codes, scales = memory.linear_bytes((3, 5), format, 64)
    assert (codes, scales) == (torch.zeros(3, 5, dtype=dtype).nbytes, 0)


def test_wrong_settings_are_named():
    with pytest.raises(ValueError, match=says("format", "fp32", "int2", "'int9'")):
        memory.linear_bytes((4, 4), "int9")
    # the size, the row's length, the weight's shape, and the largest that would do
    with pytest.raises(ValueError, match=says(128, 576, "192 x 576", 64)):
        memory.linear_bytes((192, 576), "int4", 128)


@pytest.mark.parametrize(("kept_bits", "size"), [(16, 2), (32, 4)])
def test_a_whole_model(weights, kept_bits, size):
    """INT4 with groups of 64, each real layer quantized."""
    held = [quantize_absmax(weight, 4, 64) for weight in weights.values()]
    parts = memory.weight_bytes(EMBEDDED, "int4", 64, kept_bits)
    assert parts["codes"] == sum(q.packed.nbytes for q in held)
    assert parts["scales"] == sum(q.scale.nbytes for q in held)
    others = sum(memory.parameters(EMBEDDED).values()) - sum(w.numel() for w in weights.values())
    assert parts["kept"] == others * size


def test_float_models_keep_their_own_format():
    for format, size in {"fp32": 4, "fp16": 2}.items():
        parts = memory.weight_bytes(SHAPES["Llama-2-7B"], format)
        assert sum(parts.values()) == 6_738_415_616 * size


TINY = Shape(64, 48, 3, 80, 6, 2, 16)


def test_kv_cache_is_that_of_transformers():
    model = hf_model(TINY).to_empty(device="cpu").half()
    for parameter in model.parameters():
        torch.nn.init.zeros_(parameter)
    tokens = torch.zeros(5, 7, dtype=torch.long)
    with torch.no_grad():
        layers = model(tokens, use_cache=True).past_key_values.layers
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in layers)
    assert memory.kv_cache_bytes(TINY, tokens=7, batch=5) == held


@pytest.mark.parametrize("bits", [8, 4])
def test_a_quantized_kv_cache_is_the_packages_bytes(bits):
    """One scale for each vector of each head of each token: channels of a (vectors, 16) matrix."""
    vectors = 2 * TINY.layers * TINY.kv_heads * 7 * 5
    held = quantize_absmax(torch.ones(vectors, TINY.head_dim), bits, "channel").nbytes
    assert memory.kv_cache_bytes(TINY, tokens=7, batch=5, bits=bits) == held


def test_similar_shapes_follow_llama_2():
    for name in ("Llama-2-7B", "Llama-2-13B"):
        shape = SHAPES[name]
        assert memory.similar_shape(sum(memory.parameters(shape).values()), shape.layers) == shape


@pytest.mark.parametrize("layers", [8, 32, 128])
@pytest.mark.parametrize("count", [1e8, 3e9, 6.3e11])
def test_no_neighbour_of_a_similar_shape_comes_closer(count, layers):
    shape = memory.similar_shape(count, layers)
    assert shape.layers == layers
    assert shape.hidden == 128 * shape.heads == shape.head_dim * shape.kv_heads

    def miss(heads):
        hidden = 128 * heads
        mlp = 256 * math.ceil(Fraction(8 * hidden, 3 * 256))
        other = Shape(32000, hidden, layers, mlp, heads, heads, 128)
        assert heads != shape.heads or other == shape
        return abs(sum(memory.parameters(other).values()) - count)

    nearby = range(max(1, shape.heads - 2), shape.heads + 3)
    assert min(nearby, key=miss) == shape.heads


def test_cards():
    assert list(memory.CARDS.values()) == sorted(memory.CARDS.values())
    assert max(memory.CARDS[card] for card in memory.CONSUMER) == 32
