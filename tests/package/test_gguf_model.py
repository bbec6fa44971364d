"""Whole models as GGUF files: names, row order, metadata; and that llama.cpp means the same.

llama.cpp itself takes minutes to build, so `make llama` runs it and keeps its log-probabilities in
tests/llamacpp.json; here our file is held against them.
"""

import copy
import json
import math
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from tiny import says
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, MistralConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from chapter13 import corpus, gguf_file, models, results
from chapter13.gguf_blocks import plain, quantize, read
from chapter13.gguf_model import FILE_TYPES, gguf_name, interleave, rope_factors, write_model
from chapter13.quantize import quantize_absmax
from chapter13.whole_model.linear import QuantizedLinear
from tools import llamacpp

REFERENCE = json.loads((Path(__file__).parents[1] / "llamacpp.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def embedded():
    return models.load(device="cpu")


@pytest.fixture(scope="module")
def written(embedded, tmp_path_factory):
    path = tmp_path_factory.mktemp("gguf") / "Q4_0.gguf"
    return write_model(embedded[0], "Q4_0", path, models.gguf_path())


@pytest.fixture(scope="module")
def loaded(written):
    """The file as transformers reads it."""
    return llamacpp.load(written)


@pytest.fixture(scope="module")
def tokens(embedded):
    return corpus.evaluation_tokens(embedded[1], REFERENCE["sequences"], REFERENCE["length"])


@pytest.fixture(scope="module")
def ours(loaded, tokens):
    with torch.inference_mode():
        return llamacpp.log_probabilities(loaded(tokens).logits, tokens)


def deinterleave(rows: torch.Tensor, heads: int) -> torch.Tensor:
    """What llama.cpp's order undoes to, head by head, written with plain loops."""
    half = len(rows) // heads // 2
    order = [
        head * 2 * half + 2 * (channel % half) + channel // half
        for head in range(heads)
        for channel in range(2 * half)
    ]
    return rows[order]


@pytest.mark.slow
def test_every_weight_under_its_name(embedded, written):
    model, _ = embedded
    stored = read(written).tensors
    weights = model.state_dict()
    del weights["lm_head.weight"]  # tied
    assert sorted(stored) == sorted(gguf_name(name) for name in weights)
    assert sorted(stored) == sorted(read(models.gguf_path()).tensors)
    for name, weight in weights.items():
        found = stored[gguf_name(name)]
        kind = "F32" if weight.dim() == 1 else "Q8_0" if "embed" in name else "Q4_0"
        expected = plain(weight) if kind == "F32" else quantize(weight, kind)
        assert (found.kind, found.shape) == (kind, weight.shape)
        values, heads = found.dequantize(), {"q_proj": 9, "k_proj": 3}.get(name.split(".")[-2])
        if heads:
            values = deinterleave(values, heads)
        assert torch.equal(values, expected.dequantize()), name


@pytest.mark.slow
def test_metadata_is_that_of_the_other_file(written):
    ours, theirs = read(written).metadata, read(models.gguf_path()).metadata
    changed = {name for name in theirs if not np.array_equal(ours[name], theirs[name])}
    assert list(ours) == list(theirs)
    assert changed == {"general.file_type"}
    assert ours["general.file_type"] == 2


@pytest.mark.slow
def test_transformers_reads_the_very_weights(embedded, loaded):
    """By way of the gguf library, which knows nothing of ours: names and row order included."""
    original = embedded[0].state_dict()
    original.pop("lm_head.weight")  # the embeddings once more
    for name in original:
        weight, kind = loaded.state_dict()[name], "Q8_0" if "embed" in name else "Q4_0"
        expected = original[name]
        if expected.dim() == 2:
            expected = quantize(expected, kind).dequantize()
        assert torch.equal(weight, expected), name


def test_rotary_rows_by_hand():
    rows = torch.arange(12.0).view(12, 1)
    assert interleave(rows, 2).flatten().tolist() == [0, 3, 1, 4, 2, 5, 6, 9, 7, 10, 8, 11]
    assert torch.equal(deinterleave(interleave(rows, 3), 3), rows)


@pytest.mark.slow
def test_llamacpp_predicts_the_same(loaded, ours, tokens):
    """Its log-probabilities are off ours by what rounding the inputs to Q8_0 does, no more.

    That effect is measured here, in torch. The two roundings part after a few layers, because a
    code turns on the last bit of a sum, and are then noise of one size: so the typical difference
    must be within a factor of 2 of it, and the mean of all within 4 of its standard errors.
    """
    with torch.inference_mode(), llamacpp.quantized_inputs(loaded):
        rounded = llamacpp.log_probabilities(loaded(tokens).logits, tokens)
    noise = (rounded - ours).abs().median()
    difference = torch.tensor(REFERENCE["Q4_0"], dtype=torch.float64) - ours
    assert 0.5 * noise < difference.abs().median() < 2 * noise
    error = difference.std() / difference.numel() ** 0.5
    assert difference.mean().abs() < 4 * error


@pytest.mark.slow
def test_a_wrong_row_order_would_be_noticed(loaded, ours, tokens):
    """The same comparison with the rows of q and k interleaved once too often: far outside."""
    wrong = copy.deepcopy(loaded)
    with torch.inference_mode():
        for layer in wrong.model.layers:
            for module, heads in ((layer.self_attn.q_proj, 9), (layer.self_attn.k_proj, 3)):
                module.weight.copy_(interleave(module.weight, heads))
        found = llamacpp.log_probabilities(wrong(tokens[:1]).logits, tokens[:1])
    theirs = torch.tensor(REFERENCE["Q4_0"][:1], dtype=torch.float64)
    assert (found - theirs).abs().median() > 10 * (ours[:1] - theirs).abs().median()


def test_what_make_llama_recorded():
    for kind in FILE_TYPES:
        found = results.load()[f"llama.cpp {kind}"]
        assert abs(found["perplexity llama.cpp"] / found["perplexity"] - 1) < 0.02
        assert found["same likeliest token"] > 0.9
        recorded = torch.tensor(REFERENCE[kind], dtype=torch.float64)
        # the log-probabilities are rounded to three digits, so their mean by at most half of one
        assert found["perplexity llama.cpp"] == pytest.approx(
            (-recorded.mean()).exp().item(), rel=5.1e-4
        )


def tiny(**changes) -> LlamaForCausalLM:
    sizes = {
        "vocab_size": 64, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": False,
    }  # fmt: skip
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**(sizes | changes)))


def description(model) -> dict:
    config = model.config
    counts = {
        "block_count": config.num_hidden_layers,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "vocab_size": config.vocab_size,
        "context_length": config.max_position_embeddings,
    }
    return {
        "general.architecture": "llama",
        **{f"llama.{name}": np.uint32(count) for name, count in counts.items()},
        "llama.attention.layer_norm_rms_epsilon": np.float32(config.rms_norm_eps),
        "llama.rope.freq_base": np.float32(config.rope_parameters["rope_theta"]),
    }


def like_file(folder, model, drop=(), **changes) -> Path:
    """A GGUF file without tensors that describes the model, some keys changed or left out."""
    metadata = description(model) | {key.replace("__", "."): v for key, v in changes.items()}
    metadata = {key: value for key, value in metadata.items() if key not in drop}
    return gguf_file.write(folder / "like.gguf", metadata, {})


def write_new(folder, model, **changes):
    """The file that `write_model` makes of the model, as `read` shows it."""
    return read(
        write_model(model, "Q8_0", folder / "new.gguf", like_file(folder, model, **changes))
    )


def refused(folder, model, said, **changes):
    with pytest.raises(ValueError, match=said) as raised:
        write_new(folder, model, **changes)
    assert "\n" not in str(raised.value)
    assert not (folder / "new.gguf").exists()


def with_gguf(path) -> dict[str, np.ndarray]:
    """The tensors' values as the gguf library reads them."""
    return {
        tensor.name: gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        for tensor in gguf.GGUFReader(path).tensors
    }


# --- the weights -----------------------------------------------------------------------------


@pytest.mark.parametrize("says", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_a_head_of_its_own_goes_out_too(tmp_path, says, dtype):
    """Whatever the config says: the weights in memory decide."""
    model = tiny().to(dtype)
    model.config.tie_word_embeddings = says
    stored = write_new(tmp_path, model).tensors
    assert len(stored) == 2 * 9 + 3
    head = model.lm_head.weight
    assert torch.equal(stored["output.weight"].blocks, quantize(head, "Q8_0").blocks)
    values = with_gguf(tmp_path / "new.gguf")
    for name, module in (("output.weight", head), ("token_embd.weight", model.model.embed_tokens)):
        weight = getattr(module, "weight", module)
        expected = quantize(weight, "Q8_0").dequantize()
        assert np.array_equal(values[name], expected.numpy())
    assert not np.array_equal(values["output.weight"], values["token_embd.weight"])


@pytest.mark.parametrize("says", [False, True])
def test_a_head_equal_to_the_embeddings_is_left_out(tmp_path, says):
    shared, copied = tiny(tie_word_embeddings=True), tiny()
    copied.lm_head.weight.data.copy_(copied.model.embed_tokens.weight)
    for model in (shared, copied):
        model.config.tie_word_embeddings = says
        stored = write_new(tmp_path, model).tensors
        assert len(stored) == 2 * 9 + 2
        assert "output.weight" not in stored
        expected = quantize(model.model.embed_tokens.weight, "Q8_0").blocks
        assert torch.equal(stored["token_embd.weight"].blocks, expected)


def test_a_head_that_equals_the_embeddings_only_when_rounded_is_its_own(tmp_path):
    model = tiny()
    model.model.embed_tokens.bfloat16()
    model.lm_head.weight.data.copy_(model.model.embed_tokens.weight)
    assert "output.weight" not in write_new(tmp_path, model).tensors
    model.lm_head.weight.data[5, 7] *= 1 + 2**-20
    assert "output.weight" in write_new(tmp_path, model).tensors


def test_heads_larger_than_hidden_size_over_their_number(tmp_path):
    model = tiny(head_dim=32)
    sizes = dict.fromkeys(
        ["llama__attention__key_length", "llama__attention__value_length"], np.uint32(32)
    )
    stored = write_new(tmp_path, model, **sizes).tensors
    for name, heads in (("q", 4), ("k", 2)):
        weight = getattr(model.model.layers[1].self_attn, f"{name}_proj").weight
        found = stored[f"blk.1.attn_{name}.weight"].dequantize()
        assert torch.equal(deinterleave(found, heads), quantize(weight, "Q8_0").dequantize())
    (tmp_path / "new.gguf").unlink()
    for key in ("key_length", "value_length"):
        left = {name: size for name, size in sizes.items() if key not in name}
        key = f"llama.attention.{key}"
        refused(tmp_path, model, f"{key} is missing, which means 16, the model's is 32", **left)
    changed = sizes | {"llama__rope__dimension_count": np.uint32(16)}
    refused(tmp_path, model, "rope.dimension_count is 16, the model's is 32", **changed)


class Scaled(torch.Tensor):
    """Some library's own tensor."""


def broken(name):
    """A model with one fault, by the fault's name."""
    model = tiny()
    layer, config = model.model.layers[1], model.config
    match name:
        case "quantized":
            layer.mlp.up_proj = QuantizedLinear(quantize_absmax(layer.mlp.up_proj.weight, 4, 32))
        case "no head":
            return model.model
        case "wrapped":
            wrapper = nn.ModuleDict({"inner": model})
            wrapper.config = config
            return wrapper
        case "no config":
            return nn.Linear(2, 2)
        case "a layer less":
            config.num_hidden_layers = 3
        case "a layer more":
            config.num_hidden_layers = 1
        case "shape":
            layer.mlp.down_proj.weight = nn.Parameter(torch.ones(64, 128))
        case "heads":
            config.num_key_value_heads = 4
        case "meta":
            layer.self_attn.o_proj.to("meta")
        case "int8":
            layer.mlp.gate_proj.weight = nn.Parameter(
                torch.ones(96, 64, dtype=torch.int8), requires_grad=False
            )
        case "float8":
            layer.mlp.gate_proj.to(torch.float8_e4m3fn)
        case "subclass":
            weight = torch.ones(96, 64).as_subclass(Scaled)
            layer.mlp.gate_proj.weight = nn.Parameter(weight, requires_grad=False)
        case "rows":
            return tiny(intermediate_size=100)
        case "nan":
            layer.self_attn.v_proj.weight.data[3, 4] = torch.nan
        case "nan in a norm":
            model.model.norm.weight.data[9] = torch.nan
        case "more":
            model.score = nn.Linear(64, 2, bias=False)
        case "mlp bias":
            return tiny(mlp_bias=True)
        case "activation":
            config.hidden_act = "gelu"
        case "window":
            config.sliding_window = 128
        case "type":
            sizes = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 96}
            sizes |= {"num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2}
            return AutoModelForCausalLM.from_config(MistralConfig(**sizes))
    return model


FAULTS = {
    "quantized": says("'model.layers.1.mlp.up_proj'", "QuantizedLinear"),
    "no head": says("'model.embed_tokens.weight'", "LlamaForCausalLM"),
    "wrapped": says("'model.embed_tokens.weight'", "LlamaForCausalLM"),
    "no config": says("config.model_type", "None", "'llama'"),
    "a layer less": says("'model.layers.2.self_attn.q_proj.weight'"),
    "a layer more": says("'model.layers.1", "config.num_hidden_layers", 1),
    "shape": says("1.mlp.down_proj.weight", "(64, 128)", "(64, 96)"),
    "heads": says("0.self_attn.k_proj.weight", "(32, 64)", "(64, 64)"),
    "meta": says("1.self_attn.o_proj.weight", "meta"),
    "int8": says("1.mlp.gate_proj.weight", "torch.int8", "float32", "float16"),
    "float8": says("1.mlp.gate_proj.weight", "torch.float8_e4m3fn", "float32"),
    "subclass": says("1.mlp.gate_proj.weight", "Scaled", "torch.Tensor"),
    "rows": says("0.mlp.down_proj.weight", 100, 32),
    "nan": says("1.self_attn.v_proj.weight", "1 NaN", "Inf", "[3, 4]"),
    "nan in a norm": says("'model.norm.weight'", "1 NaN", "Inf", "[9]"),
    "more": says("'score.weight'", "Llama"),
    "mlp bias": says("biases", "Llama"),
    "activation": says("config.hidden_act", "'gelu'", "'silu'"),
    "window": says("config.sliding_window", 128, "None"),
    "type": says("config.model_type", "'mistral'", "'llama'"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_model_that_cannot_be_written_says_why(tmp_path, name):
    model = broken(name)
    like = like_file(tmp_path, tiny(intermediate_size=100 if name == "rows" else 96))
    with pytest.raises(ValueError, match=FAULTS[name]) as raised:
        write_model(model, "Q4_0", tmp_path / "new.gguf", like)
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "new.gguf").exists()


def test_other_kinds_and_other_weights_are_refused(tmp_path):
    model = tiny(attention_bias=True)
    like = like_file(tmp_path, model)
    with pytest.raises(ValueError, match=says("kind", "Q4_0", "Q4_1", "Q8_0", "'Q4_K'")):
        write_model(model, "Q4_K", tmp_path / "new.gguf", like)
    with pytest.raises(ValueError, match=says("q_proj.bias", "Llama")):
        write_model(model, "Q8_0", tmp_path / "new.gguf", like)
    assert not (tmp_path / "new.gguf").exists()


# --- the metadata ----------------------------------------------------------------------------


@pytest.mark.parametrize("key", sorted(description(tiny())))
def test_a_file_of_another_model_is_refused(tmp_path, key):
    model = tiny(rope_parameters={"rope_type": "default", "rope_theta": 5e5})
    value = description(model)[key]
    value = "gpt2" if key == "general.architecture" else value + value.dtype.type(1)
    refused(tmp_path, model, says(key, value), **{key: value})
    if key != "llama.context_length":
        refused(tmp_path, model, says(key, "missing"), drop=[key])


TOKENS = [f"t{index}" for index in range(64)]
DEFAULTS = {  # key -> (what the model must be for the default to fit, another, the default)
    "llama.attention.head_count_kv": ({"num_key_value_heads": 4}, {"num_key_value_heads": 2}, 4),
    "llama.rope.freq_base": ({}, {"rope_parameters": {"rope_theta": 5e5}}, 10000),
    "llama.attention.key_length": ({}, {"head_dim": 32}, 16),
    "llama.vocab_size": ({}, {"vocab_size": 96}, 64),
}


@pytest.mark.parametrize("key", DEFAULTS)
def test_a_key_that_is_missing_has_its_default(tmp_path, key):
    fits, other, default = DEFAULTS[key]
    tokens = {"tokenizer.ggml.tokens": TOKENS}
    found = write_new(tmp_path, tiny(**fits), drop=[key], **tokens)
    assert key not in found.metadata
    (tmp_path / "new.gguf").unlink()
    refused(
        tmp_path, tiny(**other), f"{key} is missing, which means {default}, the model's is ",
        drop=[key], **tokens,
    )  # fmt: skip


def test_a_context_length_is_added_where_it_is_missing(tmp_path):
    model = tiny(max_position_embeddings=512)
    found = write_new(tmp_path, model, drop=["llama.context_length"]).metadata
    assert found["llama.context_length"] == 512
    assert found["llama.context_length"].dtype == np.uint32


def test_a_rotary_dimension_that_is_missing_is_the_head_s(tmp_path):
    model = tiny(head_dim=32)
    sizes = {f"llama.attention.{name}_length": np.uint32(32) for name in ("key", "value")}
    assert "llama.rope.dimension_count" not in write_new(tmp_path, model, **sizes).metadata


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("general.type", "adapter"),
        ("llama.attention.key_length", np.uint32(8)),
        ("llama.attention.value_length", np.uint32(8)),
        ("llama.rope.dimension_count", np.uint32(8)),
        ("llama.attention.sliding_window", np.uint32(128)),
        ("llama.attention.causal", False),
        ("llama.expert_count", np.uint32(8)),
        ("llama.expert_used_count", np.uint32(2)),
        ("llama.tensor_data_layout", "another"),
        ("llama.rope.scaling.type", "yarn"),
        ("llama.rope.scaling.type", "longrope"),
        ("llama.rope.scaling.factor", np.float32(4)),
        ("llama.rope.scale_linear", np.float32(4)),
        ("llama.rope.scaling.original_context_length", np.uint32(64)),
        ("llama.rope.scaling.attn_factor", np.float32(1.5)),
        ("llama.rope.scaling.yarn_beta_fast", np.float32(16)),
        ("llama.rope.scaling.yarn_beta_slow", np.float32(2)),
        ("llama.attention.head_count_kv", np.array([2, 1], np.uint32)),
        ("llama.attention.head_count_kv", np.array([2, 2, 2], np.uint32)),
        ("llama.block_count", "2"),
    ],
)
def test_what_no_shape_shows_is_compared(tmp_path, key, value):
    short = str(value).replace("[", r"\[")
    refused(tmp_path, tiny(), f"another model: {key} is {short}, the model's is ", **{key: value})


def test_keys_that_cannot_be_compared_are_refused(tmp_path):
    unknown = {"llama.attention.scale": np.float32(0.5)}
    refused(tmp_path, tiny(), r"llama\.attention\.scale is 0\.5, which has no counter", **unknown)


def test_another_vocabulary_is_refused(tmp_path):
    tokens = {"tokenizer.ggml.tokens": TOKENS[:-1]}
    refused(
        tmp_path, tiny(), "tokenizer.ggml.tokens has 63 entries, the .*vocab_size is 64", **tokens
    )


def test_a_file_that_says_the_same_in_other_keys(tmp_path):
    """Optional keys that fit a model without scaling, and a value for each layer."""
    model = tiny(max_position_embeddings=512)
    said = {
        "general.type": "model",
        "llama.attention.key_length": np.uint32(16),
        "llama.attention.value_length": np.uint32(16),
        "llama.rope.dimension_count": np.uint32(16),
        "llama.attention.head_count_kv": np.array([2, 2], np.uint32),
        "llama.attention.causal": True,
        "llama.expert_count": np.uint32(0),
        "llama.rope.scaling.factor": np.float32(1),
        "llama.rope.scaling.finetuned": False,
        "llama.rope.scaling.original_context_length": np.uint32(512),
        "llama.tensor_data_layout": "Meta AI original pth",
        "tokenizer.ggml.tokens": TOKENS,
        "general.alignment": np.uint32(64),
    }  # fmt: skip
    for kind in ("linear", "none"):
        found = write_new(tmp_path, model, **said, **{"llama.rope.scaling.type": kind}).metadata
        assert all(np.array_equal(found[key], value) for key, value in said.items())
        assert found["llama.rope.scaling.type"] == kind


def test_how_another_file_was_made_is_not_copied(tmp_path):
    gone = {
        "split.no": np.uint16(0),
        "split.count": np.uint16(0),
        "split.tensors.count": np.int32(21),
        "general.quantized_by": "somebody",
        "general.uuid": "1",
        "quantize.imatrix.file": "imatrix.dat",
        "quantize.imatrix.entries_count": np.int32(224),
        "somebody.quantize_version": "2",
    }
    kept = {
        "general.name": "Tiny",
        "general.license": "mit",
        "tokenizer.ggml.tokens": TOKENS,
        "general.file_type": np.uint32(15),
        "general.quantization_version": np.uint32(1),
    }
    found = write_new(tmp_path, tiny(), **gone, **kept).metadata
    assert not gone.keys() & found.keys()
    assert kept.keys() <= found.keys()
    assert (found["general.file_type"], found["general.quantization_version"]) == (7, 2)
    theirs = gguf.GGUFReader(tmp_path / "new.gguf").fields
    assert {key for key in theirs if not key.startswith("GGUF.")} == found.keys()
    assert theirs["general.file_type"].contents() == 7


def test_a_size_label_goes_where_the_head_does_not_count_alike(tmp_path):
    """A file without output.weight: its label does not count a head."""
    label = {"general.size_label": "6K"}
    assert "general.size_label" not in write_new(tmp_path, tiny(), **label).metadata
    model = tiny(tie_word_embeddings=True)
    assert write_new(tmp_path, model, **label).metadata["general.size_label"] == "6K"


def test_a_part_of_a_split_file_describes_no_model(tmp_path):
    parts = {"split.no": np.uint16(1), "split.count": np.uint16(2)}
    refused(tmp_path, tiny(), r"like\.gguf is part 2 of 2 of a split file", **parts)


# --- rotary positions ------------------------------------------------------------------------

LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
}  # fmt: skip


def converted(rope, size):
    """llama.cpp's factors, one frequency after the other, each of float32."""
    factors = []
    for frequency in 1.0 / (rope["rope_theta"] ** (torch.arange(0, size, 2).float() / size)):
        wavelength = 2 * math.pi / frequency
        rotations = rope["original_max_position_embeddings"] / wavelength
        if wavelength < rope["original_max_position_embeddings"] / rope["high_freq_factor"]:
            factors.append(1)
        elif wavelength > rope["original_max_position_embeddings"] / rope["low_freq_factor"]:
            factors.append(rope["factor"])
        else:
            low, high = rope["low_freq_factor"], rope["high_freq_factor"]
            smooth = (rotations - low) / (high - low)
            factors.append(1 / ((1 - smooth) / rope["factor"] + smooth))
    return torch.tensor(factors, dtype=torch.float32)


@pytest.mark.parametrize("size", [16, 64, 128])
@pytest.mark.parametrize("factor", [3.0, 8.0, 32.0])
def test_llama_3_s_frequencies_are_those_of_transformers(size, factor):
    rope = LLAMA3 | {"factor": factor}
    config = LlamaConfig(head_dim=size, rope_parameters=rope, max_position_embeddings=131072)
    factors = rope_factors(config)
    assert torch.equal(factors, converted(rope, size))
    assert factors[0] == 1
    assert factors[-1] == factor
    unscaled, _ = LlamaRotaryEmbedding.compute_default_rope_parameters(config)
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config)
    # from the same numbers, all positive, each takes three roundings of at most 2**-24
    error = unscaled.double() / factors.double() / scaled.double() - 1
    assert error.abs().max() < 7 * 2**-24


@pytest.mark.parametrize("kind", [None, "none", "linear"])
def test_llama_3_s_scaling_becomes_a_tensor(tmp_path, kind):
    model = tiny(rope_parameters=LLAMA3, max_position_embeddings=131072)
    said = {"llama.rope.scaling.type": kind} if kind else {}
    stored = write_new(tmp_path, model, **said)
    found = stored.tensors["rope_freqs.weight"]
    assert (found.kind, found.shape) == ("F32", (8,))
    assert torch.equal(found.dequantize(), converted(LLAMA3, 16))
    assert np.array_equal(
        with_gguf(tmp_path / "new.gguf")["rope_freqs.weight"], converted(LLAMA3, 16).numpy()
    )
    assert "llama.rope.scaling.factor" not in stored.metadata
    (tmp_path / "new.gguf").unlink()
    scaled = {"llama.rope.scaling.factor": np.float32(8)}
    refused(tmp_path, model, r"scaling.factor is 8\.0, the model's is 1\.0", **said, **scaled)


def test_other_models_get_no_frequencies_of_llama_3(tmp_path):
    model = tiny()
    factors = {"rope_freqs.weight": plain(torch.ones(8))}
    like = gguf_file.write(tmp_path / "like.gguf", description(model), factors)
    stored = read(write_model(model, "Q8_0", tmp_path / "new.gguf", like)).tensors
    assert "rope_freqs.weight" not in stored


TYPE, FACTOR = "llama.rope.scaling.type", "llama.rope.scaling.factor"
ORIGINAL, OLD = "llama.rope.scaling.original_context_length", "llama.rope.scale_linear"


def test_linear_scaling(tmp_path):
    model = tiny(rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0})
    four, two = np.float32(4), np.float32(2)
    for said in ({TYPE: "linear", FACTOR: four}, {FACTOR: four}, {OLD: four}):
        found = write_new(tmp_path, model, **said).metadata
        assert {key: found[key] for key in said} == said
    (tmp_path / "new.gguf").unlink()
    refused(tmp_path, model, rf"{FACTOR} is missing, which means 1, the model's is 4\.0")
    for said in ({FACTOR: two}, {OLD: two}, {FACTOR: four, OLD: two}):
        refused(tmp_path, model, r"is 2\.0, the model's is 4\.0", **said)
    for kind in ("none", "yarn"):
        said = {TYPE: kind, FACTOR: four}
        refused(tmp_path, model, f"{TYPE} is {kind}, the model's is linear", **said)


def test_yarn(tmp_path):
    rope = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "beta_fast": 32.0}
    rope |= {"original_max_position_embeddings": 512}
    model = tiny(rope_parameters=rope, max_position_embeddings=2048)
    said = {TYPE: "yarn", FACTOR: np.float32(4), ORIGINAL: np.uint32(512)}
    found = write_new(tmp_path, model, **said).metadata
    assert {key: found[key] for key in said} == said
    (tmp_path / "new.gguf").unlink()
    for key, words in (
        (TYPE, "is missing, which means linear, the model's is yarn"),
        (FACTOR, r"is missing, which means 1, the model's is 4\.0"),
        (ORIGINAL, "is missing, which means 2048, the model's is 512"),
    ):
        refused(tmp_path, model, f"{key} {words}", **{k: v for k, v in said.items() if k != key})


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"rope_type": "dynamic"}, "rope_type 'dynamic' cannot be written: 'default', 'linear'"),
        ({"rope_type": "longrope"}, "rope_type 'longrope' cannot be written"),
        ({"rope_type": "linear", "factor": None}, "factor of rope_type 'linear' is None"),
        ({"rope_type": "linear", "factor": 0.5}, r"factor of rope_type 'linear' is 0\.5"),
        ({"partial_rotary_factor": 0.5}, r"partial_rotary_factor is 0\.5: .* must be 1"),
        ({"rope_type": "yarn", "attention_factor": 1.1}, r"attention_factor .* 'yarn' is 1\.1"),
        ({"rope_type": "yarn", "mscale": 0.7}, r"mscale of rope_type 'yarn' is 0\.7"),
        ({"rope_type": "yarn", "beta_slow": 2}, "beta_slow .* is 2: only the default .*, 1"),
        ({"rope_type": "yarn", "truncate": False}, "truncate .* is False"),
        ({"rope_type": "llama3", "low_freq_factor": 4.0}, r"low_freq_factor is 4\.0: .* below"),
    ],
)
def test_rotary_positions_that_cannot_be_written(tmp_path, changes, said):
    model = tiny()
    model.config.rope_parameters = LLAMA3 | {"rope_type": "default", "factor": 4.0} | changes
    refused(tmp_path, model, said)
