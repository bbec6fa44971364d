"""The summary: what `make results` measured, read for notebook 08; and which rows fit a memory.

Each row is one method at one size on the embedded model, with the losses of each evaluation
sequence, so that two rows can be compared sequence by sequence. `OPT` and `LLAMA` hold published
figures of larger models.
"""

import difflib
from dataclasses import dataclass

import torch

from chapter13 import memory, results
from chapter13.evaluate import Score

TABLE = "table/"
STUDY = "study/"
AS_IT_CAME = "GGUF Q4_1, as it came"
"""The file that the embedded model was taken from. Its loss is 0 because the course starts from the
numbers in this very file; it says nothing about Q4_1."""

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

    Raises ValueError if nothing was measured yet.
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


def comparable(rows: dict[str, Row]) -> dict[str, Row]:
    """The rows without the file that the model came in, whose loss of 0 means nothing."""
    return {name: row for name, row in rows.items() if name != AS_IT_CAME}


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
    """The rows that no other row beats: each smaller one loses more (Pareto), smallest first.

    Rows that another row matches or beats in both size and loss are dropped. Rows come as `rows`
    gives them.
    """
    kept: list[Row] = []
    for row in sorted(rows.values(), key=lambda row: (row.bits_per_weight, row.kl.value)):
        if not kept or row.kl.value < kept[-1].kl.value:
            kept.append(row)
    return kept


LLAMA_CPP = "llama.cpp: CPU, Apple or other GPU"
VLLM = "NVIDIA GPU, vLLM server"
RUNS_ON = {
    LLAMA_CPP: ("GGUF Q",),
    "CPU, PyTorch": (
        "BF16",
        "FP32",
        "INT8 dynamic",
        "torchao INT8",
        "torch.ao",
        "bitsandbytes",
        "NF4",
    ),
    "NVIDIA GPU, transformers": (
        "FP16",
        "BF16",
        "NF4",
        "LLM.int8()",
        "bitsandbytes",
        "torchao INT8 weights",
        "GPTQ INT4",
        "AWQ INT4",
    ),
    VLLM: ("FP16", "BF16", "GPTQ INT4", "AWQ INT4", "INT8 dynamic, per token"),
}
"""Program -> the rows whose kind of format it loads, by its documentation; a row is named by its
start. A program that loads a format need not be fast with it: see `NOTES`. Formats that this course
did not measure (llama.cpp's K and I types, FP8 and others) are not listed."""

NOTES = {
    (VLLM, "GPTQ INT4"): "measured asymmetric; vLLM's fast kernel is symmetric only",
    (VLLM, "INT8 dynamic"): "not at compute capability 10 and above: vLLM has FP8 there",
}
"""(program, start of a row's name) -> what to know before using the one with the other."""

OTHER_BITS = {LLAMA_CPP: 8.5}
"""Bits per weight of embeddings and head where they are not kept in 16 bits: llama.cpp quantizes
them too; counted as Q8_0, as `gguf_model.write_model` writes them."""


def needed_gb(
    shape: memory.Shape, bits_per_weight: float, context: int, other_bits: float = 16
) -> float:
    """GB of a model's weights and of the KV cache of one text in 16 bits.

    `bits_per_weight`: of the linear layers; `other_bits`: of embeddings, norms and head. What the
    program needs for itself and for activations comes on top.
    """
    parts = memory.parameters(shape)
    linear = parts["attention"] + parts["MLP"]
    others = sum(parts.values()) - linear
    weights = (linear * bits_per_weight + others * other_bits) / 8
    return (weights + memory.kv_cache_bytes(shape, context)) / 1e9


@dataclass(frozen=True)
class Choice:
    """Which of the rows a program loads and a memory holds."""

    fitting: list[Row]
    best: Row | None
    """The least KL on the embedded model of those; None if none fits or none is below the limit."""
    takes_gb: float | None
    """What the model takes with `best`, the KV cache included."""
    note: str
    """What to know before using `best` with this program; mostly empty."""
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
    """Of the rows that `hardware` loads and `memory_gb` holds, the one with the least KL.

    `most_kl`: the largest KL to accept, in nats per token. The KL is that of the embedded model:
    other models lose other amounts, and not always in this order. Of rows within 2% of the least KL
    the smallest is taken. Raises ValueError for hardware that is not in RUNS_ON.
    """
    if hardware not in RUNS_ON:
        raise ValueError(f"hardware must be one of {', '.join(RUNS_ON)}, not {hardware!r}")

    def needed(bits):
        return needed_gb(shape, bits, context, OTHER_BITS.get(hardware, 16))

    runs = [row for row in comparable(rows).values() if row.name.startswith(RUNS_ON[hardware])]
    fitting = [row for row in runs if needed(row.bits_per_weight) <= memory_gb]
    good = [row for row in fitting if row.kl.value <= most_kl]
    best, takes, note = None, None, ""
    if good:
        least = min(row.kl.value for row in good)
        level = [row for row in good if row.kl.value <= 1.02 * least + 1e-4]
        best = min(level, key=lambda row: row.bits_per_weight)
        takes = needed(best.bits_per_weight)
        for (program, start), words in NOTES.items():
            if program == hardware and best.name.startswith(start):
                note = words
    return Choice(fitting, best, takes, note, (memory_gb - needed(0)) / (needed(1) - needed(0)))
