"""`make bench-gpu`: the methods on a GPU; notebook 08 has the CPU's losses beside.

The embedded model: rows of the summary table, by the same protocol (tools/table.py), each made and
measured on the GPU. And a model of Llama-2-7B's shape with random weights, one token at a time. All
in one process; memory is what PyTorch has allocated.

    python -m tools.bench_gpu
"""

import copy
import time
import warnings

import torch

from chapter13 import corpus, evaluate, models, results
from chapter13.memory import memory_breakdown
from tools import bench_models, gpu, readme
from tools.bench_models import LLAMA_2_7B, wait
from tools.table import EVALUATION, TOKENS, WEIGHTS, told
from tools.table_rows import MAKERS, MODEL, ROWS

ON_GPU = (
    "FP32",
    "FP16",
    "BF16",
    "INT8 weights, per channel",
    "torchao INT8 weights",
    "INT8 dynamic, per tensor",
    "INT8 dynamic, per token",
    "torchao INT8 dynamic",
    "INT8 static, per channel",
    "LLM.int8()",
    "bitsandbytes LLM.int8()",
    "INT4 affine, groups of 64",
    "NF4",
    "NF4, double quantization",
    "bitsandbytes NF4",
    "bitsandbytes NF4, double quantization",
    "AWQ INT4, groups of 64",
    "GPTQ INT4, groups of 64",
    "GPTQ INT4, groups of 64, clip search",
)
FORMATS = {  # in bfloat16, as such a model is stored
    "bf16": bench_models.FORMATS["bf16"],
    "ours int8 weights": bench_models.ours("absmax", 8, "channel", torch.bfloat16),
    "torchao int8 weights": bench_models.FORMATS["torchao int8 weights"],
    "ours LLM.int8()": bench_models.FORMATS["ours LLM.int8()"],
    "bitsandbytes LLM.int8()": bench_models.FORMATS["bitsandbytes LLM.int8()"],
    "ours dynamic int8, per token": bench_models.FORMATS["ours dynamic int8, per token"],
    "torchao dynamic int8": bench_models.FORMATS["torchao dynamic int8"],
    "ours int4": bench_models.ours("absmax", 4, 64, torch.bfloat16),
    "ours nf4": bench_models.ours("nf4", 4, 64, torch.bfloat16),
    "bitsandbytes nf4": bench_models.bitsandbytes(4),
}
SECTION = readme.section("gpu", "make bench-gpu")
PACKAGES = ("transformers", "bitsandbytes", "torchao")


def forget_peak(device):
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def peak_mb(device):
    """The most that PyTorch had allocated on the GPU since `forget_peak`."""
    return round(torch.cuda.max_memory_allocated(device) / 1e6) if device.type == "cuda" else None


def measure_row(row, source, tokenizer, tokens, logits):
    """Cost and quality of a row of the summary table, on the device where `source` is."""
    device = source.device
    model = copy.deepcopy(source)
    forget_peak(device)
    wait(device)
    start = time.perf_counter()
    made = MAKERS[row.maker](model, tokenizer, **row.options)
    wait(device)
    seconds, peak = time.perf_counter() - start, peak_mb(device)
    parts = memory_breakdown(made.model)
    scores = evaluate.perplexity_and_kl(made.model, logits, tokens, progress=False)
    forget_peak(device)
    return {
        "bits_per_weight": round(8 * (parts["linears"] + parts["scales"]) / WEIGHTS, 4),
        "size_mb": round(sum(parts.values()) / 1e6, 1),
        "quantize_s": round(seconds, 2),
        "quantize_peak_mb": peak,
        "tokens_per_s": round(1e3 / bench_models.ms_per_token(made.model, TOKENS), 1),
        "run_peak_mb": peak_mb(device),
        **{name: told(score) for name, score in zip(("perplexity", "kl"), scores, strict=True)},
    }


def large_model(device, shape):
    """A Llama of that shape with random weights, in bfloat16, made where it will be."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            return LlamaForCausalLM(LlamaConfig(**shape)).eval().requires_grad_(False)
    finally:
        torch.set_default_dtype(before)


def measure_format(kind, device, shape):
    """Memory and speed of a large model in one format."""
    model = large_model(device, shape)
    wait(device)
    start = time.perf_counter()
    model = FORMATS[kind](model)
    wait(device)
    seconds = time.perf_counter() - start
    forget_peak(device)
    milliseconds = bench_models.ms_per_token(model, TOKENS)
    held = sum(memory_breakdown(model).values())
    return {
        "quantize_s": round(seconds, 2),
        "ms_per_token": round(milliseconds, 2),
        "weights_mb": round(held / 1e6, 1),
        # one row of the embeddings is read for a token
        "read_mb": round((held - model.get_input_embeddings().weight.nbytes) / 1e6, 1),
        "peak_mb": peak_mb(device),
    }


def bandwidth(device):
    """GB/s at which the GPU's memory delivers a float32 matrix to a product with a vector."""
    matrix, vector = torch.randn(2**15, 2**14, device=device), torch.randn(2**14, device=device)
    seconds = bench_models.median_seconds(lambda: torch.mv(matrix, vector), device)
    return matrix.nbytes / seconds / 1e9


def attempt(what, work, *arguments):
    """What `work` measures, printed; or why it could not be: a library may lack a kernel."""
    try:
        measured = work(*arguments)
    except Exception as error:  # whatever a library does where it lacks a kernel
        measured = {"failed": f"{type(error).__name__}: {error}".splitlines()[0][:300]}
    print(f"{what:40}{measured}", flush=True)
    return measured


def bench_table(device):
    """The embedded model: row -> what `measure_row` returns."""
    source, tokenizer = models.load(MODEL, device=device)
    tokens = corpus.evaluation_tokens(tokenizer, *EVALUATION)
    rows = {row.name: row for row in ROWS}
    return {
        name: attempt(name, measure_row, rows[name], source, tokenizer, tokens, source)
        for name in ON_GPU
    }


def bench_large(device):
    """The large model: format -> what `measure_format` returns."""
    measured = {}
    for kind in FORMATS:
        measured[kind] = attempt(kind, measure_format, kind, device, LLAMA_2_7B)
        forget_peak(device)
    return measured


def readme_section(records):
    """The README's tables of a GPU, from data/results.json."""
    table, large = records["gpu/table"], records["gpu/7b"]
    small = table["rows"]["BF16"]["tokens_per_s"]
    return f"{_table_section(table)}\n\n{_large_section(large, small)}\n"


def _table_section(record):
    head = ("method", "perplexity", "KL, nats per token", "95%", "made in", "at most", "tokens/s")
    rows = [head, ("---",) * len(head)]
    for name, row in _measured(record["rows"], ON_GPU):
        low, high = row["kl"]["interval"]
        rows.append(
            (
                name,
                f"{row['perplexity']['value']:.2f}",
                f"{row['kl']['value']:.4f}",
                f"{low:.4f} to {high:.4f}",
                f"{row['quantize_s']:.1f} s",
                f"{row['quantize_peak_mb']} MB",
                f"{row['tokens_per_s']:.1f}",
            )
        )
    return (
        f"The embedded model on {_where(record)}, by the protocol of the summary table above; "
        "the reference is the float32 model on the same device. "
        "Time and the most memory that PyTorch allocated are those of making the model. Tokens per "
        "second, one at a time, say little about the formats: what they wait for is not the "
        "memory, see below.\n\n"
        f"{readme.table(rows)}{_missing(record['rows'])}"
    )


def _large_section(record, small):
    rows = [("format", "weights", "at most", "tokens/s", "bound", "made in"), ("---",) * 6]
    for kind, run in _measured(record["formats"], FORMATS):
        bound = record["bandwidth_gb_per_s"] * 1e3 / run["read_mb"]
        rows.append(
            (
                kind,
                f"{run['weights_mb'] / 1e3:.1f} GB",
                f"{run['peak_mb'] / 1e3:.1f} GB",
                f"{1e3 / run['ms_per_token']:.1f}",
                f"{bound:.0f}",
                f"{run['quantize_s']:.1f} s",
            )
        )
    return (
        f"A model of Llama-2-7B's shape, random weights, in bfloat16, on {_where(record)}; one "
        "token at a time. The bound is how often the memory, at "
        f"{record['bandwidth_gb_per_s']} GB/s, can deliver the weights. The embedded model in "
        f"bfloat16, a fiftieth of this one, comes at {small} tokens/s: where that is no faster, "
        "it is not the memory that is waited for, but what a token costs whatever the size, such "
        "as the launch of each small kernel from Python.\n\n"
        f"{readme.table(rows)}{_missing(record['formats'])}"
    )


def _measured(records, order):
    return [(name, records[name]) for name in order if "failed" not in records[name]]


def _missing(records):
    """In words, what was not measured, and why."""
    told = [f"{name} ({each['failed']})" for name, each in records.items() if "failed" in each]
    return f"\n\nNot measured: {'; '.join(told)}." if told else ""


def _where(record):
    where = record["environment"]
    return f"{where['machine']}, torch {where['versions']['torch']}, {where['date']}"


def main():
    device = gpu.find("Nothing was measured")
    bench_models.silence_libraries()
    warnings.simplefilter("ignore")
    speed = bandwidth(device)
    print(f"{torch.cuda.get_device_name(device)}: memory delivers {speed:.0f} GB/s")
    results.record("gpu/table", {"rows": bench_table(device)}, PACKAGES)
    large = {"bandwidth_gb_per_s": round(speed), "formats": bench_large(device)}
    results.record("gpu/7b", large, PACKAGES)
    readme.write(SECTION, readme_section(results.load()))


if __name__ == "__main__":
    main()
