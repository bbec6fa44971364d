"""Which norm or layer feeds which linear layers: facts that no tensor of a model shows.

SmoothQuant and AWQ move factors from one module into the next, so they need to know which. The keys
of the tables are class names of transformer blocks in transformers; the values are module names
inside such a block.
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
# Which linear layers feed others channel by channel, up to a factor: attention averages values over
# tokens, a gate multiplies. Of `c_attn` this is only the last third, the values. GPT-2's
# `mlp.c_proj` follows a gelu, through which no factor can be folded: it is rounded unscaled here.
# (The authors' code scales it and divides after the gelu, at run time.)
CHAINED = {
    "LlamaDecoderLayer": {
        "self_attn.v_proj": ("self_attn.o_proj",),
        "mlp.up_proj": ("mlp.down_proj",),
    },
    "GPT2Block": {"attn.c_attn": ("attn.c_proj",)},
}
# Queries are multiplied by keys, so the error of one says little about the error of the product.
UNCLIPPED = ("q_proj", "k_proj", "c_attn")


def fold(source: nn.Module, readers: list[nn.Module], s: torch.Tensor) -> None:
    """Divides the outputs of `source` by s, and multiplies the columns of its `readers` by s.

    `source`: a norm with a gain (and bias) for each channel, or a linear layer, of which the last
    len(s) outputs are divided. Together they compute the same as before. Weights and biases become
    new parameters of the same data types: the old ones may be views of a mapped file.
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
    """Source -> readers, by name: the pairs in a block between which scales can be folded.

    A linear source must have an output for each input of its reader. With grouped-query attention
    it does not: several heads share their values, so `o_proj` is rounded unscaled, as in the
    published code. Raises ValueError for a block that is not Llama's or GPT-2's.
    """
    kind = type(block).__name__
    if kind not in SMOOTHED:
        raise ValueError(
            f"AWQ needs to know which norm or layer feeds which layers, and {kind} is not known. "
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
