"""Writes a Llama model as a quantized GGUF file, which llama.cpp loads and runs.

The weights are the model's. The metadata, which describes the model and its tokenizer, is copied
key by key from another GGUF file of the same model, after a check that it describes this model.
Besides the names of the tensors, one thing differs from transformers: rotary positions.
transformers rotates channel i of a head together with channel i + head_dim / 2, llama.cpp rotates
neighboring channels. So the rows of q and k are written with the halves of each head interleaved,
which does not change the scalar product of q and k.
"""

import math
from pathlib import Path

import numpy as np
import torch
from torch import nn

from chapter13 import gguf_file
from chapter13.gguf_blocks import GGUF, BlockTensor, plain, quantize, read

FILE_TYPES = {"Q4_0": 2, "Q4_1": 3, "Q8_0": 7}  # llama.cpp's numbers for the whole file
# Of embeddings and head. llama.cpp uses Q6_K beside 4-bit weights, but Q8_0 if the length of a row
# is not a multiple of 256.
EMBEDDING = "Q8_0"
FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)

MODULES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}

# llama.cpp's defaults for YaRN
YARN = {"beta_fast": 32, "beta_slow": 1, "truncate": True}
YARN |= dict.fromkeys(["attention_factor", "mscale", "mscale_all_dim"])


def write_model(model: nn.Module, kind: str, path: Path | str, like: Path | str) -> Path:
    """Writes a model as a quantized GGUF file, atomically; returns its path.

    `model`: a LlamaForCausalLM of transformers in float32, float16, bfloat16 or float64, without
    biases. `kind`: "Q8_0", "Q4_0" or "Q4_1" for the linear layers; embeddings and head are written
    in Q8_0, norms in float32. A head that equals the embeddings is left out: llama.cpp then uses
    the embeddings. The scaling of Llama 3's rotary positions becomes the tensor
    "rope_freqs.weight". `like`: a GGUF file of the same architecture and vocabulary, whose metadata
    is copied, except for keys that are only true of that file, such as how it was quantized or
    split.

    Raises ValueError for another kind; for a model that is not a Llama, or that llama.cpp's Llama
    cannot express; for a weight that is missing, unknown, of another shape or data type, not in
    memory, or not finite; and for a file `like` that describes another model, where a missing key
    means llama.cpp's default. Also raises as `read` and `quantize` do.
    """
    if kind not in FILE_TYPES:
        raise ValueError(f"kind must be one of {', '.join(FILE_TYPES)}, not {kind!r}")
    _check_config(getattr(model, "config", None))
    weights = _checked_weights(model)
    if _equal(weights["lm_head.weight"], weights["model.embed_tokens.weight"]):
        del weights["lm_head.weight"]
    metadata = _described(read(like), model.config, like, "lm_head.weight" in weights)
    metadata["general.file_type"] = np.uint32(FILE_TYPES[kind])
    metadata["general.quantization_version"] = np.uint32(2)
    tensors = {gguf_name(name): _stored(name, weights[name], kind, model) for name in weights}
    if model.config.rope_parameters["rope_type"] == "llama3":
        tensors["rope_freqs.weight"] = plain(rope_factors(model.config))
    return gguf_file.write(path, metadata, tensors)


def gguf_name(name: str) -> str:
    """The name that llama.cpp gives a weight of transformers' Llama; ValueError for others.

    >>> gguf_name("model.layers.3.mlp.down_proj.weight")
    'blk.3.ffn_down.weight'
    """
    module, _, weight = name.rpartition(".")
    prefix = ""
    if module.startswith("model.layers."):
        _, _, layer, module = module.split(".", 3)
        prefix = f"blk.{layer}."
    if module not in MODULES or weight != "weight":
        reason = ": biases cannot be written" if weight == "bias" else ""
        raise ValueError(f"{name!r} is not a weight of a Llama{reason}")
    return f"{prefix}{MODULES[module]}.weight"


def interleave(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """The rows of q or k in llama.cpp's order: in each head 0, half, 1, half + 1, ...

    >>> interleave(torch.arange(8).view(8, 1), heads=2).flatten().tolist()
    [0, 2, 1, 3, 4, 6, 5, 7]
    """
    halves = weight.reshape(heads, 2, -1, weight.shape[1])
    return halves.transpose(1, 2).reshape(weight.shape)


def rope_factors(config) -> torch.Tensor:
    """The divisors of a Llama 3's rotary frequencies in llama.cpp: float32 (head size / 2,).

    `config`: one whose `rope_parameters` are of type "llama3". Let n be the number of rotations
    within original_max_position_embeddings. From n = high_freq_factor on, a frequency is kept (1);
    up to n = low_freq_factor it is divided by `factor`; in between it is multiplied by a number
    that rises linearly with n from 1 / factor to 1. Equals the tensor that llama.cpp's converter
    computes.
    """
    rope = config.rope_parameters
    low, high, factor = rope["low_freq_factor"], rope["high_freq_factor"], rope["factor"]
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
    wavelengths = 2 * math.pi / (1 / rope["rope_theta"] ** exponents)
    length = rope["original_max_position_embeddings"]
    smooth = (length / wavelengths - low) / (high - low)
    factors = 1 / ((1 - smooth) / factor + smooth)
    factors[wavelengths < length / high] = 1
    factors[wavelengths > length / low] = factor
    return factors


def _stored(name: str, weight: torch.Tensor, kind: str, model: nn.Module) -> BlockTensor:
    config = model.config
    for part, heads in (("q", config.num_attention_heads), ("k", config.num_key_value_heads)):
        if name.endswith(f"self_attn.{part}_proj.weight"):
            weight = interleave(weight, heads)
    if name.endswith(("embed_tokens.weight", "lm_head.weight")):
        kind = EMBEDDING
    try:
        return plain(weight) if weight.dim() == 1 else quantize(weight, kind)
    except ValueError as error:
        raise ValueError(f"{name!r}: {error}") from None


def _equal(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether both hold the same values, whatever the config says about tied weights."""
    dtype = torch.promote_types(one.dtype, other.dtype)
    return torch.equal(one.to(other.device, dtype), other.to(dtype))


# --- the model -------------------------------------------------------------------------------


def _check_config(config) -> None:
    """Raises ValueError for a model that llama.cpp's Llama cannot compute from our file."""
    kind = getattr(config, "model_type", None)
    if kind != "llama":
        raise ValueError(f"the model's config.model_type is {kind!r}: it must be 'llama'")
    if config.hidden_act not in ("silu", "swish"):
        raise ValueError(f"config.hidden_act is {config.hidden_act!r}: llama.cpp computes 'silu'")
    if getattr(config, "sliding_window", None):
        raise ValueError(
            f"config.sliding_window is {config.sliding_window}: llama.cpp's Llama attends to all "
            "previous tokens, so it must be None"
        )
    _check_rope(config.rope_parameters)


def _check_rope(rope: dict) -> None:
    """Raises ValueError for rotary positions that cannot be written."""
    kind, factor = rope["rope_type"], rope.get("factor")
    if kind not in ("default", "linear", "llama3", "yarn"):
        raise ValueError(
            f"rotary positions of rope_type {kind!r} cannot be written: 'default', 'linear', "
            "'llama3' and 'yarn' can"
        )
    if rope.get("partial_rotary_factor") not in (None, 1):
        raise ValueError(
            f"partial_rotary_factor is {rope['partial_rotary_factor']}: llama.cpp's Llama rotates "
            "whole heads, so it must be 1"
        )
    if kind != "default" and not (isinstance(factor, (int, float)) and factor >= 1):
        raise ValueError(f"factor of rope_type {kind!r} is {factor}: it must be at least 1")
    if kind == "llama3" and not 0 < rope["low_freq_factor"] < rope["high_freq_factor"]:
        raise ValueError(
            f"low_freq_factor is {rope['low_freq_factor']}: it must be above 0 and below "
            f"high_freq_factor, {rope['high_freq_factor']}"
        )
    for name, default in YARN.items():
        if kind == "yarn" and rope.get(name) not in (None, default):
            raise ValueError(
                f"{name} of rope_type 'yarn' is {rope[name]}: only the default can be written, "
                f"{default}"
            )


def _shapes(config) -> dict[str, tuple[int, ...]]:
    """name -> shape of every weight of a Llama, the head included."""
    hidden, inner = config.hidden_size, config.intermediate_size
    q = config.num_attention_heads * config.head_dim
    kv = config.num_key_value_heads * config.head_dim
    layer = {
        "self_attn.q_proj": (q, hidden),
        "self_attn.k_proj": (kv, hidden),
        "self_attn.v_proj": (kv, hidden),
        "self_attn.o_proj": (hidden, q),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
        "input_layernorm": (hidden,),
        "post_attention_layernorm": (hidden,),
    }
    vocabulary = (config.vocab_size, hidden)
    shapes = {"model.embed_tokens": vocabulary, "model.norm": (hidden,), "lm_head": vocabulary}
    for index in range(config.num_hidden_layers):
        shapes |= {f"model.layers.{index}.{module}": shape for module, shape in layer.items()}
    return {f"{module}.weight": shape for module, shape in shapes.items()}


def _checked_weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """The model's weights by name; ValueError if they are not those of its config."""
    weights, shapes = dict(model.state_dict()), _shapes(model.config)
    for name, shape in shapes.items():
        if name not in weights:
            raise ValueError(_missing(model, name))
        _check_one(name, weights[name], shape)
    for name in weights:
        if name not in shapes:
            gguf_name(name)
            raise ValueError(
                f"the model has {name!r}, but its config.num_hidden_layers is "
                f"{model.config.num_hidden_layers}"
            )
    return weights


def _missing(model: nn.Module, name: str) -> str:
    path = name.removesuffix(".weight")
    module = dict(model.named_modules()).get(path)
    if module is None:
        return f"the model has no {name!r}: it must be a LlamaForCausalLM, not wrapped"
    return (
        f"{path!r} is a {type(module).__name__} without a weight: quantized layers cannot be "
        "written, so give the model before its quantization"
    )


def _check_one(name: str, weight, shape: tuple[int, ...]) -> None:
    if type(weight) is not torch.Tensor:
        raise ValueError(f"{name!r} is a {type(weight).__name__}: it must be a plain torch.Tensor")
    if weight.dtype not in FLOATS:
        raise ValueError(
            f"{name!r} is {weight.dtype}: it must be float32, float16, bfloat16 or float64, "
            "not quantized"
        )
    if weight.is_meta:
        raise ValueError(f"{name!r} is on the meta device, without values: load the model first")
    if tuple(weight.shape) != shape:
        raise ValueError(
            f"{name!r} has shape {tuple(weight.shape)}: by the model's config it must be {shape}"
        )
    size = gguf_file.KIND_OF[EMBEDDING].weights
    if len(shape) > 1 and shape[-1] % size:
        raise ValueError(
            f"{name!r} has rows of {shape[-1]}: they must be a multiple of {size}, a block's size"
        )


# --- the metadata ----------------------------------------------------------------------------


def _described(source: GGUF, config, like: Path | str, own_head: bool) -> dict:
    """The metadata to write: that of `source`, without the keys that are only true of its file.

    llama.cpp does not load a file without a context length, so a missing one is added.
    Raises ValueError if `source` describes another model.
    """
    _check_same(source.metadata, config, like)
    metadata = {key: value for key, value in source.metadata.items() if not _of_one_file(key)}
    if own_head != ("output.weight" in source.tensors):
        metadata.pop("general.size_label", None)  # it counts the head, if there is one
    metadata.setdefault("llama.context_length", np.uint32(config.max_position_embeddings))
    return metadata


def _of_one_file(key: str) -> bool:
    """Whether a key says how one file was made, so that it would be false in another.

    split.*: the number of parts. *quantize*: who quantized the file (general.quantized_by), with
    which importance matrix (quantize.imatrix.*), and with which version of a tool; this does not
    match general.quantization_version, which is set again, like general.file_type. general.uuid
    identifies the content. All other keys are kept: they describe the model and its tokenizer, like
    general.name, general.license and general.size_label, or apply to the new file, like
    general.alignment.
    """
    return key.startswith("split.") or "quantize" in key or key == "general.uuid"


def _check_same(metadata: dict, config, like: Path | str) -> None:
    """Raises ValueError unless the metadata describes a model of this configuration."""
    expected = _expected(metadata, config)
    for key, (value, default) in expected.items():
        found = metadata.get(key, default)
        if _says(found, value, config.num_hidden_layers):
            continue
        if key in metadata:
            found = f"is {_short(found)}"
        elif default is None:
            found = "is missing"
        else:
            found = f"is missing, which means {default}"
        raise ValueError(
            f"{like} describes another model: {key} {found}, the model's is {_short(value)}"
        )
    tokens = _tokens(metadata)
    if tokens not in (None, config.vocab_size):
        raise ValueError(
            f"{like} has another vocabulary: tokenizer.ggml.tokens has {tokens} entries, the "
            f"model's config.vocab_size is {config.vocab_size}"
        )
    for key in metadata:
        if key.startswith("llama.") and key not in expected:
            raise ValueError(
                f"{like} may describe another model: {key} is {_short(metadata[key])}, which has "
                "no counterpart here; `like` must be a file without this key"
            )


def _tokens(metadata: dict) -> int | None:
    """The number of tokens in the file's vocabulary; None if it has none."""
    tokens = metadata.get("tokenizer.ggml.tokens")
    return len(tokens) if isinstance(tokens, list) else None


def _says(found, value, layers: int) -> bool:
    """Whether a value is the expected one, or an array with a value per layer holds only that."""
    found = np.asarray(found)
    return found.shape in ((), (layers,)) and bool((found == value).all())


def _short(value) -> str:
    text = " ".join(str(value).split())
    return text if len(text) <= 60 else f"{text[:57]}..."


def _expected(metadata: dict, config) -> dict[str, tuple]:
    """key -> (the model's value, llama.cpp's default if the key is missing, or None)."""
    heads, length = config.num_attention_heads, config.max_position_embeddings
    even = config.hidden_size // heads
    same = {
        "general.architecture": ("llama", None),
        "general.type": ("model", "model"),
        "llama.block_count": (config.num_hidden_layers, None),
        "llama.context_length": (length, length),  # added if it is missing
        "llama.embedding_length": (config.hidden_size, None),
        "llama.feed_forward_length": (config.intermediate_size, None),
        "llama.attention.head_count": (heads, None),
        "llama.attention.head_count_kv": (config.num_key_value_heads, heads),
        "llama.attention.key_length": (config.head_dim, even),
        "llama.attention.value_length": (config.head_dim, even),
        "llama.attention.layer_norm_rms_epsilon": (np.float32(config.rms_norm_eps), None),
        "llama.attention.causal": (True, True),
        "llama.attention.sliding_window": (0, 0),
        "llama.expert_count": (0, 0),
        "llama.expert_used_count": (0, 0),
        "llama.vocab_size": (config.vocab_size, _tokens(metadata)),
        "llama.tensor_data_layout": ("Meta AI original pth",) * 2,  # the order of `interleave`
    }
    head = metadata.get("llama.attention.key_length", even)
    return same | {"llama.rope.dimension_count": (config.head_dim, head)} | _rope(metadata, config)


def _rope(metadata: dict, config) -> dict[str, tuple]:
    """The part of `_expected` about rotary positions; those of a Llama 3 are scaled by a tensor."""
    rope, length = config.rope_parameters, config.max_position_embeddings
    scaled = rope["rope_type"] in ("linear", "yarn")
    factor = np.float32(rope["factor"] if scaled else 1)
    kind = "yarn" if rope["rope_type"] == "yarn" else "linear"  # a factor of 1 changes nothing
    if factor == 1 and kind == "linear" and metadata.get("llama.rope.scaling.type") == "none":
        kind = "none"
    original = rope.get("original_max_position_embeddings") or length
    finetuned = metadata.get("llama.rope.scaling.finetuned")  # only says how it was trained
    old = metadata.get("llama.rope.scale_linear", 1)  # the factor's name in old files
    default = metadata.get("llama.context_length", length) if kind == "yarn" else original
    return {
        "llama.rope.freq_base": (np.float32(rope["rope_theta"]), 10000),
        "llama.rope.scaling.type": (kind, "linear"),
        "llama.rope.scale_linear": (factor, factor),
        "llama.rope.scaling.factor": (factor, old),
        "llama.rope.scaling.original_context_length": (original, default),
        "llama.rope.scaling.attn_factor": (1, 1),
        "llama.rope.scaling.yarn_beta_fast": (YARN["beta_fast"],) * 2,
        "llama.rope.scaling.yarn_beta_slow": (YARN["beta_slow"],) * 2,
        "llama.rope.scaling.finetuned": (finetuned, finetuned),
    }
