"""The explorers of notebook 00: one number's bits, and the memory that a model takes."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import ipywidgets as widgets
import torch

from chapter13.explorers.base import Explorer, lines
from chapter13.explorers.layers import GroupSizeSlider
from chapter13.memory import (
    CARDS,
    FORMATS,
    SHAPES,
    kv_cache_bytes,
    parameters,
    similar_shape,
    weight_bytes,
)
from chapter13.plots.formats import BitsFigure, MemoryFigure

# Sources: NVIDIA's GeForce specifications (RTX 50) and white paper on the Ada architecture
# (RTX 4090), its data sheets of the L40S, the H100 SXM and the H200, AMD's of the MI300X, and
# Apple's announcement of the M4, which stands for the laptop. Of two cards in a line the faster.
BANDWIDTH = {
    "RTX 4060, 5060": 448,
    "RTX 4070, 5070": 672,
    "laptop, shared memory": 120,
    "RTX 4080, 5080": 960,
    "RTX 3090, 4090": 1008,
    "RTX 5090": 1792,
    "L40S": 864,
    "A100, H100": 3350,
    "H200": 4800,
    "MI300X": 5300,
}
"""How many GB per second the memory of each of `memory.CARDS` delivers at most."""

FLOATS = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
CUSTOM = "custom"
BILLIONS = [0.1, 0.2, 0.3, 0.5, 0.7, 1, 1.5, 2, 3, 4, 5, 7, 10, 13, 20, 30, 50, 70, 100, 200, 400]


@dataclass(frozen=True)
class Stored:
    """A number as one format holds it."""

    format: str
    bits: str
    """Sign, exponent and mantissa as 0 and 1."""
    value: float
    loss: str
    """What the cast lost, in words."""


@dataclass(frozen=True)
class NumberView:
    """What `explore_number` shows."""

    stored: list[Stored]
    """In fp32, fp16 and bf16."""
    readout: str
    alt: str


def number(value: float, power: int = 0) -> NumberView:
    """value * 2**power in the three floating-point formats.

    Raises ValueError for NaN and infinity, also where the product is one.
    """
    value *= 2.0**power
    if not math.isfinite(value):
        raise ValueError(f"the number must be finite, not {value}")
    stored = []
    for name, dtype in FLOATS.items():
        held = torch.tensor(value, dtype=torch.float64).to(dtype)
        width = 8 * held.element_size()
        code = held.view({32: torch.int32, 16: torch.int16}[width]).item()
        stored.append(
            Stored(name, f"{code % 2**width:0{width}b}", held.item(), _loss(value, held.item()))
        )
    return NumberView(
        stored=stored,
        readout=lines(
            ("number", f"{value:.6g}"), *[(s.format, f"{s.value:.9g}  ({s.loss})") for s in stored]
        ),
        alt=f"The bits of {value:.6g} in three formats. "
        + " ".join(f"{s.format} holds {s.value:.9g}." for s in stored),
    )


def _loss(value: float, held: float) -> str:
    if held == value:
        return "exact"
    if held in (float("inf"), -float("inf")):
        return "overflow: too large for the format"
    if held == 0:
        return "underflow: too small for the format"
    return f"relative error {abs(held - value) / abs(value):.1e}"


def explore_number():
    """A panel: a number that is typed, times a power of two, and its bits in fp32, fp16, bf16."""
    controls = {
        # no slider: in the browser one would round the number to its own steps
        "value": widgets.FloatText(0.15625, step=0.01, description="number"),
        "power": widgets.IntSlider(0, -30, 20, description="times 2 to the power"),
    }
    return Explorer(controls, number, BitsFigure())


@dataclass(frozen=True)
class MemoryView:
    """What `explore_memory` shows."""

    gigabytes: dict[str, float]
    """GB of "codes", "scales", "kept" (embeddings, head, norms) and "KV cache"."""
    total: float
    """GB."""
    holds: list[str]
    """The cards with at least that much memory."""
    read: float
    """GB that are read to write one token of each text."""
    ceilings: dict[str, float]
    """Tokens per second and text that each of these cards can write at most."""
    limit: float
    """Where the picture's axis ends, GB: the same for all formats, so that a bar shrinks."""
    readout: str
    alt: str


def memory(
    model: str,
    format: str,
    group_size: int | str,
    context: int,
    batch: int,
    kv_bits: int,
    billions: float,
    layers: int,
) -> MemoryView:
    """What a model takes to run; `billions` and `layers` count where the model is custom.

    One step of decoding reads the weights once, all but the table of embeddings where the head has
    a matrix of its own, and the KV cache of each text; it writes one token of each text. A card can
    do no more such steps in a second than its bandwidth allows.

    Raises ValueError for a group size that does not fit the model, as `memory.linear_bytes`.
    """
    shape = similar_shape(billions * 1e9, layers) if model == CUSTOM else SHAPES[model]
    sizes = weight_bytes(shape, format, group_size)
    weights = sum(sizes.values())
    sizes["KV cache"] = kv_cache_bytes(shape, context, batch, kv_bits)
    gigabytes = {part: size / 1e9 for part, size in sizes.items()}
    total = sum(sizes.values()) / 1e9
    holds = [card for card, most in CARDS.items() if most >= total]

    parts = parameters(shape)
    read = total - (0 if shape.tied else parts["embeddings"] * _kept_bytes(format) / 1e9)
    ceilings = {card: BANDWIDTH[card] / read for card in holds}
    count = sum(parts.values())
    in_layers = parts["attention"] + parts["MLP"]
    layer_bits = 8 * (sizes["codes"] + sizes["scales"]) / in_layers
    # lines break between cards, not inside a name
    cards = "; ".join(card.replace(" ", "\xa0") for card in holds) or "none of these cards alone"
    readout = lines(
        ("parameters", f"{count / 1e9:.3g} billion, {in_layers / count:.0%} of them in the layers"),
        ("weights", f"{_gb(weights)}, {4 * count / weights:.2f} times smaller than fp32"),
        ("  layers", f"{_gb(sizes['codes'])} + scales {_gb(sizes['scales'])}: "
                     f"{layer_bits:.4g} bits per weight"),
        ("  embeddings, head, norms", f"{_gb(sizes['kept'])}, not quantized"),
        ("KV cache", f"{_gb(sizes['KV cache'])} for {batch} x {context:,} tokens"),
        ("total", f"{total:.3g} GB = {total * 1e9 / 2**30:.3g} GiB"),
        ("read for each token", f"{read:.3g} GB{_speeds(ceilings.values())}"),
        ("fits", cards),
    )  # fmt: skip
    return MemoryView(
        gigabytes=gigabytes,
        total=total,
        holds=holds,
        read=read,
        ceilings=ceilings,
        limit=_limit((sum(weight_bytes(shape, "fp32").values()) + sizes["KV cache"]) / 1e9),
        readout=readout,
        alt=(
            f"{model} in {format} takes {total:.3g} GB, the KV cache of {batch} x {context:,} "
            f"tokens included; {len(holds)} of {len(CARDS)} kinds of cards hold it"
            f"{_speeds(ceilings.values())}."
        ),
    )


def _kept_bytes(format: str) -> int:
    """Of a parameter that is not quantized, as `weight_bytes` counts it."""
    return 4 if format == "fp32" else 2


def _speeds(most: Iterable[float]) -> str:
    """The range of ceilings in words; "" where there is none.

    >>> _speeds([62.04, 185.3]), _speeds([7.12]), _speeds([])
    (', at most 62 (slowest) to 185 (fastest) tokens/s', ', at most 7.12 tokens/s', '')
    """
    words = list(dict.fromkeys(_three_digits(speed) for speed in sorted(most)))
    if len(words) > 1:
        words = [f"{words[0]} (slowest) to {words[-1]} (fastest)"]
    return f", at most {words[0]} tokens/s" if words else ""


def _three_digits(number: float) -> str:
    return f"{float(f'{number:.3g}'):,g}"  # 17,700 rather than 1.77e+04


def _gb(size: float) -> str:
    return f"{size / 1e9:.3g} GB"


def _limit(total: float) -> float:
    """The smallest of 10, 20, 50, 100, 200, ... GB that leaves room for a label."""
    decade = 10
    while True:
        for step in (1, 2, 5):
            if total * 1.15 <= step * decade:
                return step * decade
        decade *= 10


def explore_memory():
    """A panel: a model's shape, format, context and batch; which cards hold it, and how fast."""
    controls = {
        "model": widgets.Dropdown(
            options=[*SHAPES, CUSTOM], value="Llama-2-7B", description="model"
        ),
        "format": widgets.SelectionSlider(
            options=list(FORMATS), value="fp32", description="format"
        ),
        "group_size": GroupSizeSlider(["channel", 256, 128, 64, 32, 16], 64),
        "context": widgets.SelectionSlider(
            options=[(f"{2**n}k", 1024 * 2**n) for n in range(8)],
            value=4096,
            description="context (tokens)",
        ),
        "batch": widgets.SelectionSlider(
            options=[2**n for n in range(7)], value=1, description="texts at once"
        ),
        "kv_bits": widgets.SelectionSlider(
            options=[16, 8, 4], value=16, description="KV cache (bits)"
        ),
        "billions": widgets.SelectionSlider(
            options=BILLIONS, value=3, description="custom: billions"
        ),
        "layers": widgets.IntSlider(32, 8, 128, description="custom: layers"),
    }

    def enable(_=None):
        """Gray out what has no effect now."""
        custom = controls["model"].value == CUSTOM
        controls["billions"].disabled = controls["layers"].disabled = not custom
        controls["group_size"].disabled = controls["format"].value in ("fp32", "fp16")

    for name in ("model", "format"):
        controls[name].observe(enable, names="value")
    enable()
    return Explorer(controls, memory, MemoryFigure(CARDS))
