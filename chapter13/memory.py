"""The memory that a language model needs: its parameters, their bytes, the KV cache.

`model_size_mb` and `memory_breakdown` count the bytes of a model in memory. The rest is arithmetic
on the published shape of a decoder of the Llama family: embeddings; in each layer four attention
matrices, three MLP matrices and two norms; a final norm; and a head, which small models share with
the embeddings ("tied"). Bytes follow `QuantizedTensor.nbytes`. Not counted: activations and the
memory that the driver reserves.

GB means 1e9 bytes.
"""

from dataclasses import dataclass

import torch

from chapter13.packing import packed_size
from chapter13.whole_model.layers import is_conv1d

FORMATS = {
    "fp32": 32,
    "fp16": 16,  # and bf16
    "int8": 8,
    "int7": 7,
    "int6": 6,
    "int5": 5,
    "nf4": 4,
    "int4": 4,
    "nf4+dq": 4,  # NF4 with double quantization
    "int3": 3,
    "int2": 2,
}
"""Bits per code, without scales. "intN" is absmax with float16 scales."""


@dataclass(frozen=True)
class Shape:
    """The shape of a decoder of the Llama family, as its published configuration gives it."""

    vocabulary: int
    """Tokens, each with a row in the embeddings."""
    hidden: int
    """Numbers per token between the layers."""
    layers: int
    intermediate: int
    """Width of the MLP's hidden layer."""
    heads: int
    kv_heads: int
    """Heads of keys and values; fewer than `heads` in grouped-query attention."""
    head_dim: int
    tied: bool = False
    """Whether the head shares the embedding matrix."""

    def linears(self) -> list[tuple[int, int]]:
        """(out_features, in_features) of one layer's q, k, v, o, gate, up and down projection."""
        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        attention = [(queries, self.hidden), *[(keys, self.hidden)] * 2, (self.hidden, queries)]
        mlp = [*[(self.intermediate, self.hidden)] * 2, (self.hidden, self.intermediate)]
        return attention + mlp


SHAPES = {
    "SmolLM2-135M (the course's)": Shape(49152, 576, 30, 1536, 9, 3, 64, tied=True),
    "Llama-3.2-1B": Shape(128256, 2048, 16, 8192, 32, 8, 64, tied=True),
    "Llama-2-7B": Shape(32000, 4096, 32, 11008, 32, 32, 128),
    "Llama-3-8B": Shape(128256, 4096, 32, 14336, 32, 8, 128),
    "Llama-2-13B": Shape(32000, 5120, 40, 13824, 40, 40, 128),
    "Llama-3-70B": Shape(128256, 8192, 80, 28672, 64, 8, 128),
}
EMBEDDED = next(iter(SHAPES))

CARDS = {
    "RTX 4060, 5060": 8,
    "RTX 4070, 5070": 12,
    "laptop, shared memory": 16,
    "RTX 4080, 5080": 16,
    "RTX 3090, 4090": 24,
    "RTX 5090": 32,
    "L40S": 48,
    "A100, H100": 80,
    "H200": 141,
    "MI300X": 192,
}
"""Published memory in GB; for the A100 that of the larger model."""
CONSUMER = list(CARDS)[:6]


def parameters(shape: Shape) -> dict[str, int]:
    """The number of parameters by part. The head is 0 if it is tied to the embeddings."""
    sizes = [out * in_ for out, in_ in shape.linears()]
    embeddings = shape.vocabulary * shape.hidden
    return {
        "embeddings": embeddings,
        "attention": shape.layers * sum(sizes[:4]),
        "MLP": shape.layers * sum(sizes[4:]),
        "norms": (2 * shape.layers + 1) * shape.hidden,
        "head": 0 if shape.tied else embeddings,
    }


def linear_bytes(
    shape: tuple[int, int], format: str, group_size: int | str = 64
) -> tuple[int, int]:
    """(bytes of the codes, bytes of the scales) of a weight (out_features, in_features).

    `format`: a key of FORMATS. `group_size`: how many weights share a scale, or "channel" for one
    per row; floating-point formats have no scales. For NF4 it counts weights of the flattened
    matrix, the last block may be short, and "channel" does not apply.

    Equal to `.nbytes` of `quantize_absmax(weight, bits, group_size)` and of
    `quantize_codebook(weight, "nf4", group_size, double_quant)`. Raises ValueError as these do:
    for a group size that does not divide in_features, and for NF4 per channel.
    """
    if format not in FORMATS:
        raise ValueError(f"format must be one of {', '.join(FORMATS)}, not {format!r}")
    out_features, in_features = shape
    count = out_features * in_features
    codes = packed_size(count, FORMATS[format])
    if format in ("fp32", "fp16"):
        return codes, 0
    if format.startswith("nf4"):
        if group_size == "channel":
            raise ValueError("NF4 has blocks of a fixed size, not channels: choose a number")
        blocks = -(-count // group_size)
        if format == "nf4":
            return codes, 4 * blocks
        return codes, blocks + 4 * -(-blocks // 256) + 4
    if group_size == "channel":
        return codes, 2 * out_features
    if in_features % group_size:
        raise ValueError(
            f"group size {group_size} does not divide {in_features}, the in_features of a "
            f"{out_features} x {in_features} weight; powers of two up to "
            f"{in_features & -in_features} do"
        )
    return codes, 2 * count // group_size


def weight_bytes(
    shape: Shape, format: str, group_size: int | str = 64, kept_bits: int = 16
) -> dict[str, int]:
    """The bytes of all weights: "codes" and "scales" of the linear layers, and "kept".

    "kept" are embeddings, head and norms, which are usually not quantized: with `kept_bits` bits
    each, or 32 if the format is fp32. Raises as `linear_bytes`.
    """
    sizes = [linear_bytes(linear, format, group_size) for linear in shape.linears()]
    parts = parameters(shape)
    kept = parts["embeddings"] + parts["norms"] + parts["head"]
    return {
        "codes": shape.layers * sum(codes for codes, _ in sizes),
        "scales": shape.layers * sum(scales for _, scales in sizes),
        "kept": kept * (32 if format == "fp32" else kept_bits) // 8,
    }


def kv_cache_bytes(shape: Shape, tokens: int, batch: int = 1, bits: int = 16) -> int:
    """The bytes of all keys and values of `batch` texts of `tokens` tokens.

    Below 16 bits, the vector of each head and token has its own float16 scale.
    """
    vector = packed_size(shape.head_dim, bits) + (2 if bits < 16 else 0)
    return 2 * shape.layers * shape.kv_heads * vector * tokens * batch


def similar_shape(count: float, layers: int) -> Shape:
    """A shape like Llama 2's, with about `count` parameters in `layers` layers.

    Llama 2's rules: 32000 tokens, heads of 128, and an MLP 8/3 as wide as the hidden size, rounded
    up to a multiple of 256. The hidden size is the multiple of 128 that gives the closest count.
    """

    def shape(heads: int) -> Shape:
        hidden = 128 * heads
        return Shape(32000, hidden, layers, -(-8 * hidden // 768) * 256, heads, heads, 128)

    def total(heads: int) -> int:
        return sum(parameters(shape(heads)).values())

    heads = 1
    while total(heads + 1) <= count:
        heads += 1
    return shape(min(heads, heads + 1, key=lambda h: abs(total(h) - count)))


def model_size_mb(model: torch.nn.Module) -> float:
    """The bytes of a model's weights in MB (1e6 bytes), as a saved file would hold them.

    Counts everything in `state_dict`: parameters, buffers, packed weights of torch's quantized
    layers (which `parameters()` does not show), scales. Memory that two names share (tied
    embeddings) counts once.
    """
    return sum(memory_breakdown(model).values()) / 1e6


def memory_breakdown(model: torch.nn.Module) -> dict[str, int]:
    """The bytes of a model's weights by part; together they are `model_size_mb`.

    "linears": weights or codes of the linear layers, of any library; "scales": their scales, zero
    points and code books; "embeddings": embeddings and output head; "rest": norms, biases, other
    buffers.
    """
    modules = dict(model.named_modules())
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    breakdown = dict.fromkeys(("linears", "scales", "embeddings", "rest"), 0)
    linears: dict[str, list[int]] = {}
    seen: dict[tuple, int] = {}
    for key, value in model.state_dict().items():
        before = set(seen)
        _collect(value, seen)
        sizes = [seen[place] for place in seen if place not in before]
        owner, _, name = key.rpartition(".")
        # "weight.absmax" belongs to the layer of the weight, "_packed_params" to the one around it
        while owner not in modules or type(modules[owner]).__name__ == "LinearPackedParams":
            owner, _, name = owner.rpartition(".")
        module = modules[owner]
        if isinstance(module, torch.nn.Embedding) or module is head:
            breakdown["embeddings"] += sum(sizes)
        elif name != "bias" and ("Linear" in type(module).__name__ or is_conv1d(module)):
            linears.setdefault(owner, []).extend(sizes)
        else:
            breakdown["rest"] += sum(sizes)
    for sizes in linears.values():
        weight = max(sizes, default=0)  # the weight is the largest tensor of its layer
        breakdown["linears"] += weight
        breakdown["scales"] += sum(sizes) - weight
    return breakdown


def _collect(value, seen: dict[tuple, int]) -> None:
    """Adds the bytes of all tensors inside a value of a state dict, by their place in memory."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        for item in value:
            _collect(item, seen)
    elif hasattr(value, "__tensor_flatten__"):  # a tensor made of tensors, like torchao's
        for name in value.__tensor_flatten__()[0]:
            _collect(getattr(value, name), seen)
    elif isinstance(value, torch.Tensor):
        seen[value.device, value.data_ptr(), value.shape] = value.nbytes
        if value.is_quantized and value.qscheme() == torch.per_channel_affine:
            for part in (value.q_per_channel_scales(), value.q_per_channel_zero_points()):
                seen[value.data_ptr(), part.data_ptr()] = part.nbytes
