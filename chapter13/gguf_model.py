"""A Llama-type model out as a GGUF file, quantized, which llama.cpp loads and runs.

The weights are the model's; what describes it and its tokenizer is taken from another GGUF file of
the same architecture, key by key. Beside the names of the tensors one thing differs from torch:
rotary positions. transformers turns channel i of a head together with channel i + half of it,
llama.cpp two neighbours. So the rows of q and k go out with the halves of each head interleaved,
which changes nothing in a scalar product of the two.
"""

from pathlib import Path

import numpy as np
import torch
from torch import nn

from chapter13 import gguf_file
from chapter13.gguf_blocks import BlockTensor, plain, quantize, read

FILE_TYPES = {"Q4_0": 2, "Q4_1": 3, "Q8_0": 7}  # what llama.cpp calls the whole file
EMBEDDING = "Q8_0"  # of embeddings and head, as llama.cpp chooses it beside 4-bit weights

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


def write_model(model: nn.Module, kind: str, path: Path | str, like: Path | str) -> Path:
    """Quantizes a model into a GGUF file, which appears whole or not at all; returns its path.

    `model`: of type Llama, as transformers makes it, in any floating data type. `kind`: "Q8_0",
    "Q4_0" or "Q4_1" for the linear layers; embeddings and head go out in Q8_0, norms in float32.
    `like`: a GGUF file of the same architecture and vocabulary, whose metadata is copied.

    Raises ValueError for another kind, a weight that a Llama does not have, and a file `like` that
    describes another model; and as `read` and `quantize`.
    """
    if kind not in FILE_TYPES:
        raise ValueError(f"kind must be one of {', '.join(FILE_TYPES)}, not {kind!r}")
    metadata = dict(read(like).metadata)
    _check_same(metadata, model.config, like)
    metadata["general.file_type"] = np.uint32(FILE_TYPES[kind])
    metadata["general.quantization_version"] = np.uint32(2)
    weights = model.state_dict()
    if model.config.tie_word_embeddings:
        weights.pop("lm_head.weight", None)  # the embeddings once more
    tensors = {gguf_name(name): _stored(name, weights[name], kind, model) for name in weights}
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
        raise ValueError(f"{name!r} is no weight of a Llama")
    return f"{prefix}{MODULES[module]}.weight"


def interleave(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """The rows of q or k in llama.cpp's order: in each head 0, half, 1, half + 1, ...

    >>> interleave(torch.arange(8).view(8, 1), heads=2).flatten().tolist()
    [0, 2, 1, 3, 4, 6, 5, 7]
    """
    halves = weight.view(heads, 2, -1, weight.shape[1])
    return halves.transpose(1, 2).reshape(weight.shape)


def _stored(name: str, weight: torch.Tensor, kind: str, model: nn.Module) -> BlockTensor:
    if weight.dim() == 1:
        return plain(weight)
    if name.endswith(("embed_tokens.weight", "lm_head.weight")):
        return quantize(weight, EMBEDDING)
    config = model.config
    for part, heads in (("q", config.num_attention_heads), ("k", config.num_key_value_heads)):
        if name.endswith(f"self_attn.{part}_proj.weight"):
            weight = interleave(weight, heads)
    return quantize(weight, kind)


def _check_same(metadata: dict, config, like: Path | str) -> None:
    """ValueError unless the metadata describes a model of this configuration."""
    expected = {
        "general.architecture": config.model_type,
        "llama.block_count": config.num_hidden_layers,
        "llama.embedding_length": config.hidden_size,
        "llama.feed_forward_length": config.intermediate_size,
        "llama.attention.head_count": config.num_attention_heads,
        "llama.attention.head_count_kv": config.num_key_value_heads,
        "llama.attention.layer_norm_rms_epsilon": np.float32(config.rms_norm_eps),
        "llama.rope.freq_base": np.float32(config.rope_parameters["rope_theta"]),
        "llama.vocab_size": config.vocab_size,
    }
    for key, value in expected.items():
        if metadata.get(key) != value:
            raise ValueError(
                f"{like} describes another model: {key} is {metadata.get(key)}, the model's {value}"
            )
