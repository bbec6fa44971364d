"""What `make results` measures: each row of the table, and how its model is made.

A row names one of the makers below and gives it options. A new method is a new maker, or an old
one with other options; a new row is one line in ROWS. tools/table.py does the rest.
"""

import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from chapter13 import corpus, gguf_blocks, models, quantize_model
from chapter13.dynamic import quantize_dynamic
from chapter13.outliers import quantize_llm_int8, smooth
from chapter13.static import calibrate, quantize_static
from chapter13.whole_model.layers import linear_layers
from tools import bench_models, llamacpp, peers

CALIBRATION = (16, 256)  # sequences, length
MODEL = models.EMBEDDED


@dataclass(frozen=True)
class Row:
    """A row of the table. `maker` is a key of MAKERS, with its options."""

    name: str
    family: str  # one colour in pictures: rows that differ in bits or groups alone
    maker: str
    options: dict = field(default_factory=dict)
    packages: tuple[str, ...] = ()  # whose versions matter, beside torch and transformers


@dataclass
class QuantizedModel:
    """A quantized model, and what is known of how it came about."""

    model: nn.Module
    bits_per_weight: float | None = None  # None: from the bytes that the model holds
    size_mb: float | None = None  # the same
    runs: bool = True  # False: the format's own kernel is not at hand, its speed not measured
    seconds: float | None = None  # None: the time that the maker took
    peak_mb: float | None = None
    versions: dict = field(default_factory=dict)  # of an environment of its own


def calibration_tokens(tokenizer):
    return corpus.calibration_tokens(tokenizer, *CALIBRATION)


def float_model(model, tokenizer, dtype):
    return QuantizedModel(model.to(getattr(torch, dtype)))


def ours(model, tokenizer, calibrated=False, **options):
    if calibrated:
        options["calibration"] = calibration_tokens(tokenizer)
    return QuantizedModel(quantize_model(model, progress=False, **options))


def ours_dynamic(model, tokenizer, granularity):
    return QuantizedModel(quantize_dynamic(model, granularity, False))


def ours_static(model, tokenizer, observer):
    statistics = calibrate(model, calibration_tokens(tokenizer), progress=False)
    return QuantizedModel(quantize_static(model, statistics, observer, progress=False))


def ours_smooth(model, tokenizer):
    statistics = calibrate(model, calibration_tokens(tokenizer), progress=False)
    return QuantizedModel(quantize_dynamic(smooth(model, statistics), "per_token", False))


def ours_llm_int8(model, tokenizer):
    return QuantizedModel(quantize_llm_int8(model, progress=False))


def ours_gguf(model, tokenizer, kind):
    """The linear layers in a format of llama.cpp, dequantized: that program would multiply them."""
    held, weights = 0, 0
    for layer in linear_layers(model).values():
        block = gguf_blocks.quantize(layer.weight, kind)
        layer.weight = nn.Parameter(block.dequantize(), requires_grad=False)
        held, weights = held + block.nbytes, weights + layer.weight.numel()
    rest = bench_models.memory_breakdown(model)
    size = held + rest["embeddings"] + rest["rest"]
    return QuantizedModel(model, 8 * held / weights, size / 1e6, runs=False)


def gguf_as_it_came(model, tokenizer):
    """The file that the embedded model was taken from, read by transformers."""
    path = models.gguf_path()
    linear = [t for name, t in gguf_blocks.read(path).tensors.items() if t.kind == "Q4_1"]
    held, weights = sum(t.nbytes for t in linear), sum(t.shape.numel() for t in linear)
    return QuantizedModel(
        llamacpp.load(path), 8 * held / weights, path.stat().st_size / 1e6, runs=False
    )


def bitsandbytes(model, tokenizer, **options):
    return QuantizedModel(bench_models.bitsandbytes(**options)(model))


def torch_ao(model, tokenizer):
    return QuantizedModel(bench_models.torch_dynamic(model))


def torchao(model, tokenizer, config):
    return QuantizedModel(bench_models.torchao(config)(model))


def peer(model, tokenizer, library, options):
    """AutoGPTQ or GPTQModel in an environment of its own; its checkpoint, in our layers."""
    from safetensors.torch import save_file

    from chapter13.checkpoint import load_gptq

    with tempfile.TemporaryDirectory() as folder:
        source, tokens, output = (Path(folder) / name for name in ("model", "tokens", "out"))
        peers.cut(model, source, model.config.num_hidden_layers)
        tokenizer.save_pretrained(source)
        save_file({"tokens": calibration_tokens(tokenizer)}, tokens)
        sizes = ("--bits", 4, "--group-size", 64)
        answer = peers.run(library, "quantize", source, tokens, output, *sizes, *options)
        made = load_gptq(output)
    result = answer["result"]
    return QuantizedModel(
        made,
        runs=False,
        seconds=result["seconds"],
        peak_mb=result["peak_mb"],
        versions=answer["versions"],
    )


MAKERS = {
    maker.__name__: maker
    for maker in (
        float_model,
        ours,
        ours_dynamic,
        ours_static,
        ours_smooth,
        ours_llm_int8,
        ours_gguf,
        gguf_as_it_came,
        bitsandbytes,
        torch_ao,
        torchao,
        peer,
    )
}


def absmax(bits, group_size):
    return {"method": "absmax", "bits": bits, "group_size": group_size}


def affine(bits, group_size):
    return {"method": "affine", "bits": bits, "group_size": group_size}


def learned(method, bits=4, group_size=64, **options):
    return {"method": method, "bits": bits, "group_size": group_size, "calibrated": True} | options


def code_book(kind, double_quant=False):
    return {"method": kind, "double_quant": double_quant}


BNB, AO = ("bitsandbytes",), ("torchao",)
SAME_OPTIONS = ("--act-order", "--static-groups")  # as ours: asymmetric, damping .01

ROWS = [
    Row("FP32", "cast", "float_model", {"dtype": "float32"}),
    Row("FP16", "cast", "float_model", {"dtype": "float16"}),
    Row("BF16", "cast", "float_model", {"dtype": "bfloat16"}),
    Row("INT8 weights, per tensor", "absmax", "ours", absmax(8, None)),
    Row("INT8 weights, per channel", "absmax", "ours", absmax(8, "channel")),
    Row("torchao INT8 weights", "libraries", "torchao", {"config": "Int8WeightOnlyConfig"}, AO),
    Row(
        "INT8 dynamic, per tensor",
        "INT8 activations",
        "ours_dynamic",
        {"granularity": "per_tensor"},
    ),
    Row("torch.ao INT8 dynamic", "libraries", "torch_ao"),
    Row(
        "INT8 dynamic, per token", "INT8 activations", "ours_dynamic", {"granularity": "per_token"}
    ),
    Row(
        "torchao INT8 dynamic",
        "libraries",
        "torchao",
        {"config": "Int8DynamicActivationInt8WeightConfig"},
        AO,
    ),
    Row("INT8 static, per channel", "INT8 activations", "ours_static", {"observer": "minmax"}),
    Row("INT8 static, percentile", "INT8 activations", "ours_static", {"observer": "percentile"}),
    Row("INT8 SmoothQuant, per token", "INT8 activations", "ours_smooth"),
    Row("LLM.int8()", "INT8 activations", "ours_llm_int8"),
    Row("bitsandbytes LLM.int8()", "libraries", "bitsandbytes", {"bits": 8}, BNB),
    Row("INT6 affine, groups of 64", "affine", "ours", affine(6, 64)),
    Row("INT5 affine, groups of 64", "affine", "ours", affine(5, 64)),
    Row("INT4 absmax, per tensor", "absmax", "ours", absmax(4, None)),
    Row("INT4 absmax, per channel", "absmax", "ours", absmax(4, "channel")),
    Row("INT4 absmax, groups of 64", "absmax", "ours", absmax(4, 64)),
    Row("INT4 absmax, groups of 32", "absmax", "ours", absmax(4, 32)),
    Row("INT4 absmax, groups of 16", "absmax", "ours", absmax(4, 16)),
    Row("INT4 affine, per channel", "affine", "ours", affine(4, "channel")),
    Row("INT4 affine, groups of 64", "affine", "ours", affine(4, 64)),
    Row("INT4 affine, groups of 32", "affine", "ours", affine(4, 32)),
    Row("INT4 affine, groups of 16", "affine", "ours", affine(4, 16)),
    Row("INT3 affine, groups of 64", "affine", "ours", affine(3, 64)),
    Row("INT3 affine, groups of 16", "affine", "ours", affine(3, 16)),
    Row("INT2 affine, groups of 64", "affine", "ours", affine(2, 64)),
    Row("INT2 affine, groups of 16", "affine", "ours", affine(2, 16)),
    Row("NF4", "code book", "ours", code_book("nf4")),
    Row("NF4, double quantization", "code book", "ours", code_book("nf4", True)),
    Row("FP4", "code book", "ours", code_book("fp4")),
    Row("bitsandbytes NF4", "libraries", "bitsandbytes", {"bits": 4, "double_quant": False}, BNB),
    Row("bitsandbytes NF4, double quantization", "libraries", "bitsandbytes", {"bits": 4}, BNB),
    Row("GGUF Q8_0", "GGUF", "ours_gguf", {"kind": "Q8_0"}),
    Row("GGUF Q4_1", "GGUF", "ours_gguf", {"kind": "Q4_1"}),
    Row("GGUF Q4_0", "GGUF", "ours_gguf", {"kind": "Q4_0"}),
    Row("GGUF MXFP4", "GGUF", "ours_gguf", {"kind": "MXFP4"}),
    Row("GGUF Q4_1, as it came", "GGUF", "gguf_as_it_came"),
    Row("AWQ INT4, groups of 64", "AWQ", "ours", learned("awq")),
    Row("AWQ INT3, groups of 64", "AWQ", "ours", learned("awq", 3)),
    Row("GPTQ INT4, groups of 64", "GPTQ", "ours", learned("gptq")),
    Row("GPTQ INT3, groups of 64", "GPTQ", "ours", learned("gptq", 3)),
    Row(
        "GPTQ INT4, groups of 64, clip search",
        "GPTQ, clip search",
        "ours",
        learned("gptq", clip_search=True),
    ),
    Row(
        "GPTQ INT4, groups of 32, clip search",
        "GPTQ, clip search",
        "ours",
        learned("gptq", 4, 32, clip_search=True),
    ),
    Row(
        "GPTQ INT3, groups of 64, clip search",
        "GPTQ, clip search",
        "ours",
        learned("gptq", 3, clip_search=True),
    ),
    Row(
        "GPTQ INT2, groups of 16, clip search",
        "GPTQ, clip search",
        "ours",
        learned("gptq", 2, 16, clip_search=True),
    ),
    Row(
        "AutoGPTQ INT4, groups of 64",
        "libraries",
        "peer",
        {"library": "autogptq", "options": SAME_OPTIONS},
    ),
    Row(
        "GPTQModel INT4, groups of 64",
        "libraries",
        "peer",
        {"library": "gptqmodel", "options": SAME_OPTIONS},
    ),
    Row(
        "GPTQModel INT4, its defaults",
        "libraries",
        "peer",
        {"library": "gptqmodel", "options": ("--defaults",)},
    ),
]
