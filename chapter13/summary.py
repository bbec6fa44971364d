"""The summary: what `make results` measured, read for notebook 08, and what to make of it.

Each row is one method at one size on the embedded model, with the losses of each evaluation
sequence, so that two rows can be compared pair by pair. `OPT` and `LLAMA` hold published figures of
larger models beside it.
"""

import difflib
from dataclasses import dataclass

import torch

from chapter13 import memory, results
from chapter13.evaluate import Score

TABLE = "table/"
STUDY = "study/"

# Perplexity on WikiText-2: parameters in billions -> full precision, 4 bits rounded to nearest,
# 4 bits by GPTQ; one scale for each row of a weight. Frantar et al. 2022, table 3.
OPT = {
    0.125: (27.65, 37.28, 31.12),
    0.35: (22.00, 25.94, 24.24),
    1.3: (14.63, 48.17, 15.47),
    2.7: (12.47, 16.92, 12.87),
    6.7: (10.86, 12.10, 11.39),
    13: (10.13, 11.32, 10.31),
    30: (9.56, 10.98, 9.63),
    66: (9.34, 110.0, 9.55),
    175: (8.34, 10.54, 8.37),
}

# The same of Llama-2-7B with groups of 128: Lin et al. 2023 (AWQ), table 4.
LLAMA = {"full precision": 5.47, "INT4 affine": 5.73, "GPTQ": 5.63, "AWQ": 5.60}


@dataclass(frozen=True)
class Row:
    """One method at one size on the embedded model; None where something was not measured."""

    name: str
    family: str
    """Rows that differ in bits or group size alone."""
    bits_per_weight: float
    """Of the linear layers, scales included, from the bytes held."""
    size_mb: float
    """Of the whole model, embeddings included."""
    quantize_s: float
    quantize_peak_mb: int
    tokens_per_s: float | None
    run_peak_mb: int | None
    perplexity: Score
    kl: Score
    """To the float32 model, in nats per token."""
    machine: str
    """Of the losses; the costs may be from another machine, or with more threads."""
    date: str


def rows(records: dict[str, dict] | None = None) -> dict[str, Row]:
    """name -> Row of all that data/results.json holds, the smallest bits per weight first.

    Raises ValueError where nothing was measured yet.
    """
    records = results.load() if records is None else records
    found = [
        _row(key.removeprefix(TABLE), record)
        for key, record in records.items()
        if key.startswith(TABLE) and {"cost", "quality"} <= set(record)
    ]
    if not found:
        raise ValueError("data/results.json holds no table: run `make results`")
    return {row.name: row for row in sorted(found, key=lambda row: (row.bits_per_weight, row.name))}


def studies(records: dict[str, dict] | None = None) -> dict[str, Score]:
    """name -> KL of what `make results` measured beside the table; empty if nothing was measured.

    On the first 8 texts: "4 x news" (GPTQ with clip search after 4 calibration sequences of 256
    tokens), "order 1" (GPTQ with its 16 sequences in another order), "AWQ, 2 x 128 tokens". On all
    33: "damping 0.1", "GPTQ INT4, columns in order", and the same and rounding with clip search.
    """
    records = results.load() if records is None else records
    return {
        key.removeprefix(STUDY): _score(record, "kl")
        for key, record in records.items()
        if key.startswith(STUDY)
    }


def row(name: str) -> Row:
    """One row of data/results.json. Raises ValueError, with similar names, if there is none."""
    found = rows()
    if name not in found:
        similar = difflib.get_close_matches(name, found, n=3, cutoff=0.4) or list(found)[:3]
        raise ValueError(f"the summary table has no row {name!r}; similar: {'; '.join(similar)}")
    return found[name]


def _row(name: str, record: dict) -> Row:
    cost, quality = record["cost"], record["quality"]
    kept = ("bits_per_weight", "size_mb", "quantize_s", "quantize_peak_mb")
    run = ("tokens_per_s", "run_peak_mb")
    return Row(
        name,
        record["family"],
        **{key: cost[key] for key in (*kept, *run)},
        perplexity=_score(record, "perplexity"),
        kl=_score(record, "kl"),
        machine=quality["environment"]["machine"],
        date=quality["environment"]["date"],
    )


def _score(record: dict, name: str) -> Score:
    losses = torch.tensor(record["quality"][name]["losses"], dtype=torch.float64)
    return Score(losses, exponential=name == "perplexity")


def front(rows: dict[str, Row]) -> list[Row]:
    """The rows that no other beats: each smaller one loses more (Pareto), the smallest first.

    Rows that another row matches or beats in both size and loss are dropped. Rows come as `rows`
    gives them.
    """
    kept: list[Row] = []
    for row in sorted(rows.values(), key=lambda row: (row.bits_per_weight, row.kl.value)):
        if not kept or row.kl.value < kept[-1].kl.value:
            kept.append(row)
    return kept


# What runs a format today, by the documentation of those programs; a row is named by its start.
RUNS_ON = {
    "CPU or Apple, llama.cpp": ("GGUF Q", "GGUF MXFP4"),
    "CPU, PyTorch": (
        "BF16",
        "FP32",
        "INT8 dynamic",
        "torchao INT8",
        "torch.ao",
        "bitsandbytes",
        "NF4",
    ),
    "NVIDIA GPU, transformers": ("FP16", "BF16", "NF4", "LLM.int8()", "bitsandbytes", "GPTQ INT4"),
    "NVIDIA GPU, vLLM server": ("FP16", "BF16", "GPTQ INT4", "AWQ INT4", "INT8 dynamic, per token"),
}


def needed_gb(shape: memory.Shape, bits_per_weight: float, context: int) -> float:
    """GB of a model's weights and of the KV cache of one text, embeddings and cache in 16 bits."""
    parts = memory.parameters(shape)
    linear = parts["attention"] + parts["MLP"]
    kept = sum(parts.values()) - linear
    weights = linear * bits_per_weight / 8 + kept * 2
    return (weights + memory.kv_cache_bytes(shape, context)) / 1e9


@dataclass(frozen=True)
class Choice:
    """What fits, and what of it loses least."""

    fitting: list[Row]
    best: Row | None
    """None: nothing fits, or nothing that fits is good enough."""
    most_bits: float
    """Bits per weight at which the memory is full; 0 or less: not even the rest fits."""


def choose(
    rows: dict[str, Row],
    shape: memory.Shape,
    memory_gb: float,
    hardware: str,
    context: int = 4096,
    most_kl: float = float("inf"),
) -> Choice:
    """Of the rows that run on `hardware` and fit into `memory_gb`, the one with the least KL.

    `most_kl`: what the reader accepts, in nats per token, measured on the embedded model: larger
    models lose less, in the same order. Of rows within 2% of the least KL the smallest is taken.
    Raises ValueError for hardware that is not in RUNS_ON.
    """
    if hardware not in RUNS_ON:
        raise ValueError(f"hardware must be one of {', '.join(RUNS_ON)}, not {hardware!r}")
    runs = [
        row
        for row in rows.values()
        if row.name.startswith(RUNS_ON[hardware]) and "as it came" not in row.name
    ]
    fitting = [row for row in runs if needed_gb(shape, row.bits_per_weight, context) <= memory_gb]
    good = [row for row in fitting if row.kl.value <= most_kl]
    best = None
    if good:
        least = min(row.kl.value for row in good)
        level = [row for row in good if row.kl.value <= 1.02 * least + 1e-4]
        best = min(level, key=lambda row: row.bits_per_weight)
    empty, full = needed_gb(shape, 0, context), needed_gb(shape, 1, context)
    return Choice(fitting, best, (memory_gb - empty) / (full - empty))
