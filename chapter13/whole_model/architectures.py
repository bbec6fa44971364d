"""What no tensor shows of an architecture: which norm or layer feeds which linear layers.

SmoothQuant and AWQ move factors from one module into the next, and have to know where they go. By
the class name of a transformer block in transformers; inside, module names in the block.
"""

import torch
from torch import nn

from chapter13.whole_model.layers import as_stored, put_parameter, weight_of

# Which norm feeds which linear layers.
SMOOTHED = {
    "LlamaDecoderLayer": {
        "input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj"),
    },
    "GPT2Block": {"ln_1": ("attn.c_attn",), "ln_2": ("mlp.c_fc",)},
}
# Which linear layers put out what the next ones read, channel by channel, up to a factor: values
# are averaged over tokens, a gate multiplies. Of `c_attn` only the last third, the values. GPT-2's
# `mlp.c_proj` stands behind a gelu, which no factor passes through: it is rounded unscaled.
CHAINED = {
    "LlamaDecoderLayer": {
        "self_attn.v_proj": ("self_attn.o_proj",),
        "mlp.up_proj": ("mlp.down_proj",),
    },
    "GPT2Block": {"attn.c_attn": ("attn.c_proj",)},
}
# Queries are multiplied with keys, and the error of each says little about that of the product.
UNCLIPPED = ("q_proj", "k_proj", "c_attn")


def fold(source: nn.Module, readers: list[nn.Module], s: torch.Tensor) -> None:
    """Divides what `source` puts out by s, and multiplies the columns of its `readers` by s.

    `source`: a norm with a gain (and bias) for each channel, or a linear layer, whose last len(s)
    outputs are meant. Together they compute the same as before. Weights and biases become new
    parameters of their data types: the old ones may lie in a mapped file that others read.
    """
    divisor = s
    if source.weight.dim() == 1:
        _put(source, "weight", source.weight / s)
    else:
        divisor = torch.cat([s.new_ones(len(weight_of(source)) - len(s)), s])
        _put(source, "weight", as_stored(source, weight_of(source) / divisor[:, None]))
    if getattr(source, "bias", None) is not None:
        _put(source, "bias", source.bias / divisor)
    for layer in readers:
        _put(layer, "weight", as_stored(layer, weight_of(layer) * s))


def _put(module, name, tensor):
    put_parameter(module, name, tensor.to(getattr(module, name).dtype))


def folds(block: nn.Module) -> dict[str, tuple[str, ...]]:
    """Source -> readers, by name, of a block's scales that can be folded.

    A linear source has to put out a channel for each one of its reader's. With grouped-query
    attention it does not: several heads share their values, and `o_proj` is rounded unscaled, as
    in the published code. Raises ValueError for a block that is not Llama's or GPT-2's.
    """
    kind = type(block).__name__
    if kind not in SMOOTHED:
        raise ValueError(
            f"AWQ needs to know which norm or layer feeds which layers; of {kind} it does not. "
            f"Known blocks: {', '.join(SMOOTHED)}"
        )

    def width(name):
        return weight_of(block.get_submodule(name)).shape

    chained = {
        source: readers
        for source, readers in CHAINED[kind].items()
        if width(source)[0] >= width(readers[0])[1]
    }
    return SMOOTHED[kind] | chained
