"""`make bench`, the part on whole models: one token at a time, at batch size 1, in each format.

Two models: the embedded one, and two decoder blocks of Llama-2-7B's shape with random weights,
which do not fit into a cache. Each format is measured in its own process, to get its own peak
memory. The bound on the time per token is the time in which the memory delivers all weights once.

    python -m tools.bench_models smollm2-135m NF4     one measurement, as JSON
"""

import json
import logging
import subprocess
import sys
from statistics import median

import torch

from chapter13 import models
from chapter13.memory import memory_breakdown
from tools import formats, measure

MODELS = {"smollm2-135m": 24, "7B blocks": 12}  # name -> tokens timed
LLAMA_2_7B = {  # its shape
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "vocab_size": 32000,
}
PROMPT = 16  # tokens before the first timed one

# of one format, ours first
MEASURED = (
    "FP32",
    "BF16",
    "INT8 weights, per channel",
    "INT8 weights, per channel, in bfloat16",
    "torchao INT8 weights",
    "LLM.int8()",
    "bitsandbytes LLM.int8()",
    "INT8 dynamic, per tensor",
    "torch.ao INT8 dynamic",
    "INT8 dynamic, per token",
    "torchao INT8 dynamic",
    "INT4 absmax, groups of 64",
    "INT4 absmax, groups of 64, fused",
    "NF4",
    "NF4, bitsandbytes' dequantization",
    "bitsandbytes NF4, double quantization, plain",
    "NF4, fused",
    "bitsandbytes NF4, double quantization",
)
# bitsandbytes' kernel for processors with AVX512-BF16
FUSED_NF4 = ("NF4, fused", "bitsandbytes NF4, double quantization")


def build(name):
    """The model in float32: the embedded one, or two random blocks of a 7B model."""
    if name == models.EMBEDDED:
        return models.load(device="cpu")[0]
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    blocks = LLAMA_2_7B | {"num_hidden_layers": 2, "vocab_size": 1000}
    return LlamaForCausalLM(LlamaConfig(**blocks)).eval()


def ms_per_token(model, count):
    """The median time per token of `count` greedy tokens after a prompt, in milliseconds."""
    device = model.get_input_embeddings().weight.device
    ids = torch.arange(PROMPT, device=device)[None] + 100
    state = None

    def predict():
        nonlocal state
        state = model(ids, past_key_values=state and state.past_key_values, use_cache=True)

    times = []
    with torch.inference_mode():
        predict()
        for _ in range(count):
            ids = state.logits[:, -1:].argmax(-1)
            times.append(measure.seconds(predict, device))
    return median(times) * 1e3


def measure_format(name, kind):
    """{ms per token, MB of weights, peak MB during generation, ...} of one model and format."""
    formats.silence_libraries()
    model = formats.make(formats.FORMATS[kind], build(name), None).model
    with measure.memory() as used:
        milliseconds = ms_per_token(model, MODELS[name])
    held = read = sum(memory_breakdown(model).values())
    if name != models.EMBEDDED:  # an untied model reads one row of its embeddings
        read -= model.get_input_embeddings().weight.nbytes
    return {
        "ms_per_token": round(milliseconds, 1),
        "weights_mb": round(held / 1e6, 1),
        "read_mb": round(read / 1e6, 1),
        "peak_mb": round(used.peak / 1e6),
        "before_mb": round(used.before / 1e6),
    }


def has_fused_kernel():
    """Whether bitsandbytes multiplies NF4 with its own kernel on this processor."""
    logging.getLogger(formats.BITSANDBYTES_NOISE[0]).setLevel(logging.ERROR)
    from bitsandbytes.functional import has_avx512bf16

    return has_avx512bf16()


def bandwidth():
    """GB/s at which this machine's memory delivers a float32 matrix that is only read.

    Measured with a maximum, which hardly computes anything; a float32 product is slower.
    """
    matrix = torch.randn(11008, 4096)
    return matrix.nbytes / measure.medians(matrix.amax, runs=9)[0] / 1e9


def bench():
    """All models in all formats: name -> format -> result of `measure_format`, and the bound."""
    speed = bandwidth()
    print(f"memory: {speed:.1f} GB/s")
    measured = {"bandwidth_gb_per_s": round(speed, 1)}
    for name in MODELS:
        measured[name] = {}
        for kind in MEASURED:
            if kind in FUSED_NF4 and not has_fused_kernel():
                continue
            # the median of three processes: the machine may be busy during one of them
            runs = [
                json.loads(
                    subprocess.run(
                        [sys.executable, "-m", "tools.bench_models", name, kind],
                        check=True,
                        capture_output=True,
                        text=True,
                    ).stdout.splitlines()[-1]
                )
                for _ in range(3)
            ]
            run = sorted(runs, key=lambda each: each["ms_per_token"])[1]
            run["bound_ms"] = round(run["read_mb"] / speed, 1)
            measured[name][kind] = run
            print(
                f"{name:13} {kind:44} {run['ms_per_token']:7.1f} ms per token, bound "
                f"{run['bound_ms']:6.1f}   {run['weights_mb']:7.1f} MB, peak {run['peak_mb']} MB",
                flush=True,
            )
    return measured


if __name__ == "__main__":
    print(json.dumps(measure_format(*sys.argv[1:])))
