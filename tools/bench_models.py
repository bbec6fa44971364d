"""`make bench`, the part on whole models: one token at a time, at batch 1, in each format.

Two models: the embedded one, and two decoder blocks of Llama-2-7B's shape with random weights,
which no cache holds. Every format is measured in a process of its own, so that its peak memory is
its own, and beside it stands the bound: a token cannot come faster than the memory delivers the
weights once.

    python -m tools.bench_models smollm2-135m "ours nf4"     one measurement, as JSON
"""

import json
import logging
import re
import subprocess
import sys
import time
import warnings
from pathlib import Path
from statistics import median

import torch

from chapter13 import models, quantize_model
from chapter13.dynamic import quantize_dynamic
from chapter13.memory import memory_breakdown
from chapter13.outliers import quantize_llm_int8
from chapter13.quiet import silence_torchao
from chapter13.whole_model.fused import fuse

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
BITSANDBYTES_NOISE = ("bitsandbytes.backends.cpu.ops", "bitsandbytes.autograd._functions")


def silence_libraries():
    """torchao's and bitsandbytes' hints on kernels that are not there."""
    silence_torchao()
    for logger in BITSANDBYTES_NOISE:
        logging.getLogger(logger).setLevel(logging.ERROR)


def build(name):
    """The model in float32: the embedded one, or two random blocks of a 7B model."""
    if name == models.EMBEDDED:
        return models.load(device="cpu")[0]
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    blocks = LLAMA_2_7B | {"num_hidden_layers": 2, "vocab_size": 1000}
    return LlamaForCausalLM(LlamaConfig(**blocks)).eval()


def ours(method, bits, group_size, dtype=torch.float32, **options):
    def change(model):
        return quantize_model(model, method, bits, group_size, progress=False, **options).to(dtype)

    return change


def fused(method):
    """Ours in 4 bits with a fused kernel, borrowed for NF4: see chapter13/whole_model/fused.py."""
    return lambda model: fuse(ours(method, 4, 64)(model))


def borrowed_dequantization(model):
    """The same on a processor without AVX512-BF16, whose way others can take too."""
    from bitsandbytes import functional

    functional.has_avx512bf16 = lambda: False
    return fused("nf4")(model)


def bitsandbytes(bits, plain=False, double_quant=True):
    """Each linear layer as bitsandbytes' own, as transformers would put them there.

    `double_quant`: of the scales of 4 bits, which is bitsandbytes' own default.

    `plain`: the way of processors without AVX512-BF16. Where there is that, bitsandbytes
    multiplies NF4 with a kernel of its own, all in bfloat16.
    """

    def change(model):
        for logger in BITSANDBYTES_NOISE:
            logging.getLogger(logger).setLevel(logging.ERROR)
        import bitsandbytes.nn as bnb

        from chapter13.whole_model.layers import replace_layers

        def make(_, layer):
            weight = layer.weight.data.cpu()  # on the way to a GPU they quantize
            if bits == 8:
                new = bnb.Linear8bitLt(
                    layer.in_features,
                    layer.out_features,
                    bias=False,
                    has_fp16_weights=False,
                    threshold=6.0,  # as transformers sets it; its own 0 keeps no outliers apart
                )
                new.weight = bnb.Int8Params(weight, requires_grad=False)
            else:
                new = bnb.Linear4bit(
                    layer.in_features,
                    layer.out_features,
                    bias=False,
                    compute_dtype=torch.bfloat16,
                    quant_type="nf4",
                )
                new.weight = bnb.Params4bit(
                    weight, False, quant_type="nf4", compress_statistics=double_quant
                )
                new.support_avx512bf16_for_cpu &= not plain
            return new.to(layer.weight.device).eval()

        return replace_layers(model, make, progress=False)

    return change


def torch_dynamic(model):
    warnings.simplefilter("ignore")  # deprecated, and still the chapter's way
    model.model = torch.ao.quantization.quantize_dynamic(
        model.model, {torch.nn.Linear}, dtype=torch.qint8
    )
    return model


def torchao(name):
    def change(model):
        from torchao import quantization

        quantization.quantize_(model.model, getattr(quantization, name)())
        return model

    return change


# of one format, ours stands before the others'
FORMATS = {
    "fp32": lambda model: model,
    "bf16": lambda model: model.bfloat16(),
    "ours int8 weights": ours("absmax", 8, "channel"),
    "ours int8 weights, bf16 activations": ours("absmax", 8, "channel", torch.bfloat16),
    "torchao int8 weights": torchao("Int8WeightOnlyConfig"),
    "ours LLM.int8()": lambda model: quantize_llm_int8(model, progress=False),
    "bitsandbytes LLM.int8()": bitsandbytes(8),
    "ours dynamic int8, per tensor": lambda model: quantize_dynamic(model, "per_tensor", False),
    "torch.ao dynamic int8": torch_dynamic,
    "ours dynamic int8, per token": lambda model: quantize_dynamic(model, "per_token", False),
    "torchao dynamic int8": torchao("Int8DynamicActivationInt8WeightConfig"),
    "ours int4, dequantizing": ours("absmax", 4, 64),
    "ours int4, fused": fused("absmax"),
    "ours nf4, dequantizing": ours("nf4", 4, 64),
    "ours nf4, borrowed dequantization": borrowed_dequantization,
    "bitsandbytes nf4, plain": bitsandbytes(4, plain=True),
    "ours nf4, fused (borrowed)": fused("nf4"),
    "bitsandbytes nf4, fused": bitsandbytes(4),
}


def wait(device):
    """Until a GPU has done what it was told; the CPU has."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def median_seconds(work, device, runs=9):
    """The median time of a piece of work on a device."""
    times = []
    for _ in range(runs):
        wait(device)
        start = time.perf_counter()
        work()
        wait(device)
        times.append(time.perf_counter() - start)
    return median(times)


def ms_per_token(model, count):
    """The median time of `count` greedy tokens after a prompt, one sequence, in milliseconds."""
    device = model.get_input_embeddings().weight.device
    ids = torch.arange(PROMPT, device=device)[None] + 100
    times = []
    with torch.inference_mode():
        state = model(ids, use_cache=True)
        for _ in range(count):
            token = state.logits[:, -1:].argmax(-1)
            wait(device)
            start = time.perf_counter()
            state = model(token, past_key_values=state.past_key_values, use_cache=True)
            wait(device)
            times.append(time.perf_counter() - start)
    return median(times) * 1e3


def measure(name, kind):
    """{ms per token, MB of weights, MB at the peak while tokens come} of one model and format."""
    silence_torchao()
    model = FORMATS[kind](build(name))
    before = reset_peak()
    milliseconds = ms_per_token(model, MODELS[name])
    parts = memory_breakdown(model)
    read = sum(parts.values())
    if name != models.EMBEDDED:  # an untied model reads one row of its embeddings
        read -= model.get_input_embeddings().weight.nbytes
    return {
        "ms_per_token": round(milliseconds, 1),
        "weights_mb": round(sum(parts.values()) / 1e6, 1),
        "read_mb": round(read / 1e6, 1),
        "peak_mb": round(peak() / 1e6),
        "before_mb": round(before / 1e6),
    }


def status(field):
    text = Path("/proc/self/status").read_text()
    return int(re.search(rf"^{field}:\s+(\d+) kB", text, re.MULTILINE)[1]) * 1024


def reset_peak():
    """Forgets the peak of making the model; returns the memory held now, in bytes."""
    Path("/proc/self/clear_refs").write_text("5")
    return status("VmRSS")


def peak():
    return status("VmHWM")


def has_fused_kernel():
    """Whether bitsandbytes multiplies NF4 with its own kernel on this processor."""
    logging.getLogger(BITSANDBYTES_NOISE[0]).setLevel(logging.ERROR)
    from bitsandbytes.functional import has_avx512bf16

    return has_avx512bf16()


def bandwidth():
    """GB/s at which this machine's memory delivers a float32 matrix that is but looked through.

    A maximum does next to nothing with a number; a product in float32 does not come as fast.
    """
    matrix = torch.randn(11008, 4096)
    return matrix.nbytes / median_seconds(matrix.amax, matrix.device) / 1e9


def bench():
    """All models in all formats: name -> format -> what `measure` returns, and the bound."""
    speed = bandwidth()
    print(f"memory: {speed:.1f} GB/s")
    measured = {"bandwidth_gb_per_s": round(speed, 1)}
    for name in MODELS:
        measured[name] = {}
        for kind in FORMATS:
            if "nf4, fused" in kind and not has_fused_kernel():
                continue
            # three processes, the median: one process may meet a busy moment
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
                f"{name:13} {kind:28} {run['ms_per_token']:7.1f} ms a token, bound "
                f"{run['bound_ms']:6.1f}   {run['weights_mb']:7.1f} MB, peak {run['peak_mb']} MB",
                flush=True,
            )
    return measured


if __name__ == "__main__":
    print(json.dumps(measure(*sys.argv[1:])))
