"""`make bench-gpu`: the methods on a GPU; notebook 08 compares them with the CPU's losses.

Measures rows of the summary table with the embedded model, by the same protocol (tools/table.py),
each made and measured on the GPU; and a model of Llama-2-7B's shape with random weights, one token
at a time. Everything runs in one process; memory is what PyTorch has allocated.

    python -m tools.bench_gpu
"""

import copy
import warnings

import torch

from chapter13 import corpus, evaluate, models, results
from chapter13.memory import memory_breakdown
from tools import bench_models, formats, gpu, markdown, measure
from tools.bench_models import LLAMA_2_7B
from tools.formats import FORMATS, MODEL
from tools.table import TOKENS, recorded

TARGET = "make bench-gpu"
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
LARGE = (  # in bfloat16, as such a model is stored
    "BF16",
    "INT8 weights, per channel, in bfloat16",
    "torchao INT8 weights",
    "LLM.int8()",
    "bitsandbytes LLM.int8()",
    "INT8 dynamic, per token",
    "torchao INT8 dynamic",
    "INT4 absmax, groups of 64, in bfloat16",
    "NF4, in bfloat16",
    "bitsandbytes NF4, double quantization",
)
TABLE_SECTION = markdown.section("gpu table", TARGET, "docs/gpu.md")
LARGE_SECTION = markdown.section("gpu 7b", TARGET, "docs/gpu.md")
PACKAGES = ("transformers", "bitsandbytes", "torchao")


def keys():
    """The records that this program writes."""
    return {"gpu/table", "gpu/7b"}


def measure_row(name, source, tokenizer, tokens, logits):
    """Cost and quality of a row of the summary table, on the device where `source` is."""
    device = source.device
    made = formats.make(FORMATS[name], copy.deepcopy(source), tokenizer, device)
    scores = evaluate.perplexity_and_kl(made.model, logits, tokens, progress=False)
    with measure.memory(device) as used:
        milliseconds = bench_models.ms_per_token(made.model, TOKENS)
    return {
        "bits_per_weight": round(made.bits_per_weight, 4),
        "size_mb": round(made.size_mb, 1),
        "quantize_s": round(made.seconds, 2),
        "quantize_peak_mb": round(made.peak_mb),
        "tokens_per_s": round(1e3 / milliseconds, 1),
        "run_peak_mb": round(used.peak / 1e6),
        **{name: recorded(score) for name, score in zip(("perplexity", "kl"), scores, strict=True)},
    }


def large_model(device, shape):
    """A Llama of that shape with random weights, in bfloat16, made on the device."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            return LlamaForCausalLM(LlamaConfig(**shape)).eval().requires_grad_(False)
    finally:
        torch.set_default_dtype(before)


def measure_large(name, device, shape):
    """Memory and speed of a large model in one format."""
    made = formats.make(FORMATS[name], large_model(device, shape), None, device)
    with measure.memory(device) as used:
        milliseconds = bench_models.ms_per_token(made.model, TOKENS)
    held = sum(memory_breakdown(made.model).values())
    return {
        "quantize_s": round(made.seconds, 2),
        "ms_per_token": round(milliseconds, 2),
        "weights_mb": round(held / 1e6, 1),
        # one row of the embeddings is read for a token
        "read_mb": round((held - made.model.get_input_embeddings().weight.nbytes) / 1e6, 1),
        "peak_mb": round(used.peak / 1e6),
    }


def bandwidth(device):
    """GB/s at which the GPU's memory delivers a float32 matrix to a product with a vector."""
    matrix, vector = torch.randn(2**15, 2**14, device=device), torch.randn(2**14, device=device)
    seconds = measure.medians(lambda: torch.mv(matrix, vector), runs=9, device=device)[0]
    return matrix.nbytes / seconds / 1e9


def attempt(what, work, *arguments):
    """The result of `work`, also printed; or its error, as a library may lack a kernel."""
    try:
        measured = work(*arguments)
    except Exception as error:  # libraries raise different errors if they lack a kernel
        measured = {"failed": f"{type(error).__name__}: {error}".splitlines()[0][:300]}
    print(f"{what:40}{measured}", flush=True)
    return measured


def bench_table(device):
    """The embedded model: row -> the result of `measure_row`."""
    source, tokenizer = models.load(MODEL, device=device)
    tokens = corpus.evaluation_tokens(tokenizer)
    return {
        name: attempt(name, measure_row, name, source, tokenizer, tokens, source) for name in ON_GPU
    }


def bench_large(device):
    """The large model: format -> the result of `measure_large`."""
    return {name: attempt(name, measure_large, name, device, LLAMA_2_7B) for name in LARGE}


def table_section(records):
    """The table of the embedded model on a GPU, from data/results.json."""
    record = records["gpu/table"]
    rows = [("method", "perplexity", "KL, nats per token", "95%", "made in", "peak memory")]
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
            )
        )
    where = markdown.where(record["environment"], "torch")
    return f"{markdown.table(rows)}\n\n{where}{_missing(record['rows'])}\n"


def large_section(records):
    """The table of a 7B model on a GPU, from data/results.json."""
    record = records["gpu/7b"]
    rows = [("format", "weights", "peak memory", "tokens/s", "bound", "made in")]
    for kind, run in _measured(record["formats"], LARGE):
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
    where = markdown.where(record["environment"], "torch")
    speed = f"memory at {record['bandwidth_gb_per_s']} GB/s"
    return f"{markdown.table(rows)}\n\n{where}; {speed}.{_missing(record['formats'])}\n"


def _missing(records):
    """The rows that could not be measured, and why, so that no row is dropped silently."""
    failed = [f"{name} ({each['failed']})" for name, each in records.items() if "failed" in each]
    return f" Not measured: {'; '.join(failed)}." if failed else ""


def _measured(records, order):
    """The rows that the record has: fewer after an interrupted run, or if a kernel is missing."""
    found = [(name, records[name]) for name in order if name in records]
    return [(name, record) for name, record in found if "failed" not in record]


def main():
    device = gpu.find("Nothing was measured")
    formats.silence_libraries()
    warnings.simplefilter("ignore")
    speed = bandwidth(device)
    print(f"{torch.cuda.get_device_name(device)}: memory delivers {speed:.0f} GB/s")
    results.record("gpu/table", {"rows": bench_table(device)}, TARGET, PACKAGES)
    large = {"bandwidth_gb_per_s": round(speed), "formats": bench_large(device)}
    results.record("gpu/7b", large, TARGET, PACKAGES)
    records = results.load()
    markdown.write(TABLE_SECTION, table_section(records))
    markdown.write(LARGE_SECTION, large_section(records))


if __name__ == "__main__":
    main()
