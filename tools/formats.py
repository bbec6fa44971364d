"""The registry: every model in a format that this project measures, and how it is made.

A format names one of the makers below and its options. A new method is a new maker, or an old one
with other options; a new format is one line in TABLE, STUDIES or KERNELS. tools/table.py measures
the first two; `make bench` and `make bench-gpu` choose theirs by name.
"""

import logging
import random
import tempfile
import warnings
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from chapter13 import corpus, gguf_blocks, gptq, models, quantize_model
from chapter13.dynamic import quantize_dynamic
from chapter13.memory import memory_breakdown
from chapter13.outliers import quantize_llm_int8, smooth
from chapter13.quiet import silence_torchao
from chapter13.seeded import permutation
from chapter13.static import calibrate, quantize_static
from chapter13.whole_model.blockwise import quantize_blocks
from chapter13.whole_model.fused import fuse
from chapter13.whole_model.layers import linear_layers, put_weight, replace_layers, weight_of
from tools import llamacpp, measure, peers

MODEL = models.EMBEDDED
WEIGHTS = 106_168_320  # of the embedded model's linear layers
BITSANDBYTES_NOISE = ("bitsandbytes.backends.cpu.ops", "bitsandbytes.autograd._functions")


@dataclass(frozen=True)
class Format:
    """A model in some format. `maker` is a key of MAKERS, with its options."""

    name: str
    family: str  # formats that differ only in bits or group size
    maker: str
    options: dict = field(default_factory=dict)
    packages: tuple[str, ...] = ()  # whose versions matter, besides torch and transformers
    sequences: int = corpus.EVALUATION[0]  # of the evaluation tokens


@dataclass
class QuantizedModel:
    """A quantized model, and the cost of making it."""

    model: nn.Module
    bits_per_weight: float | None = None  # None: from the bytes that the model holds
    size_mb: float | None = None  # the same
    runs: bool = True  # False: the format's own kernel is missing, so its speed is not measured
    seconds: float | None = None  # None: the time that the maker took
    peak_mb: float | None = None
    versions: dict = field(default_factory=dict)  # of a separate environment


def make(kind: Format, model, tokenizer, device=measure.CPU) -> QuantizedModel:
    """The model in a format, with the cost of making it; `model` itself may be changed."""
    made = []
    with measure.memory(device) as used:
        seconds = measure.seconds(
            lambda: made.append(MAKERS[kind.maker](model, tokenizer, **kind.options)), device
        )
    made = made[0]
    if made.seconds is None:
        made.seconds, made.peak_mb = seconds, used.peak / 1e6
    if made.bits_per_weight is None:
        parts = memory_breakdown(made.model)
        made.bits_per_weight = 8 * (parts["linears"] + parts["scales"]) / WEIGHTS
        made.size_mb = made.size_mb or sum(parts.values()) / 1e6
    return made


def silence_libraries():
    """Silences torchao's and bitsandbytes' hints on missing kernels."""
    silence_torchao()
    for logger in BITSANDBYTES_NOISE:
        logging.getLogger(logger).setLevel(logging.ERROR)


# --- makers ----------------------------------------------------------------------------------


def calibration_tokens(
    tokenizer,
    source="news",
    sequences=corpus.CALIBRATION[0],
    length=corpus.CALIBRATION[1],
    order=None,
):
    """Tokens of "news" or of "encyclopedia" articles that evaluation never sees.

    `order`: a seed that puts the sequences in another order.
    """
    if source == "news":
        tokens = corpus.calibration_tokens(tokenizer, sequences, length)
    else:
        tokens = corpus.encyclopedia_tokens(tokenizer, sequences, length, "calibration")
    return tokens if order is None else tokens[permutation(sequences, random.Random(order))]


def float_model(model, tokenizer, dtype):
    return QuantizedModel(model.to(getattr(torch, dtype)))


def ours(model, tokenizer, calibration=None, dtype=None, fused=False, **options):
    """`calibration`: options of `calibration_tokens`; `fused`: with a fused kernel for 4 bits."""
    if calibration is not None:
        options["calibration"] = calibration_tokens(tokenizer, **calibration)
    quantize_model(model, progress=False, **options)
    if dtype:
        model.to(getattr(torch, dtype))
    return QuantizedModel(fuse(model) if fused else model)


def ours_weighted(model, tokenizer, **options):
    """Rounded to nearest with GPTQ's clip search: no column moves where H is diagonal."""

    def quantize_block(walk, index, report):
        block, quantized = walk.blocks[index], {}

        def change(names, inputs):
            H = gptq.hessian(inputs).diagonal().diag()
            for name in names:
                layer = block.get_submodule(name)
                quantized[name] = gptq.quantize(weight_of(layer), H, clip_search=True, **options)
                put_weight(layer, quantized[name].dequantize())
                report(name)

        walk.visit(index, change)
        return quantized

    tokens = calibration_tokens(tokenizer)
    quantize_blocks(model, tokens, quantize_block, {"method": "weighted"} | options, False)
    return QuantizedModel(model)


def ours_borrowing(model, tokenizer, **options):
    """NF4 with bitsandbytes' dequantization, as on a processor without AVX512-BF16."""
    from bitsandbytes import functional

    functional.has_avx512bf16 = lambda: False
    return ours(model, tokenizer, fused=True, **options)


def ours_dynamic(model, tokenizer, granularity):
    return QuantizedModel(quantize_dynamic(model, granularity, False))


def ours_static(model, tokenizer, observer, **options):
    statistics = calibrate(model, calibration_tokens(tokenizer), progress=False)
    return QuantizedModel(quantize_static(model, statistics, observer, progress=False, **options))


def ours_smooth(model, tokenizer):
    statistics = calibrate(model, calibration_tokens(tokenizer), progress=False)
    return QuantizedModel(quantize_dynamic(smooth(model, statistics), "per_token", False))


def ours_llm_int8(model, tokenizer):
    return QuantizedModel(quantize_llm_int8(model, progress=False))


def ours_gguf(model, tokenizer, kind):
    """The linear layers in a format of llama.cpp, dequantized: only llama.cpp multiplies codes."""
    held, weights = 0, 0
    for layer in linear_layers(model).values():
        block = gguf_blocks.quantize(layer.weight, kind)
        layer.weight = nn.Parameter(block.dequantize(), requires_grad=False)
        held, weights = held + block.nbytes, weights + layer.weight.numel()
    rest = memory_breakdown(model)
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


def bitsandbytes(model, tokenizer, bits, double_quant=True, plain=False):
    """Each linear layer as bitsandbytes' own, as transformers would put them there.

    `double_quant`: of the scales of 4 bits, which is bitsandbytes' own default.

    `plain`: the way of processors without AVX512-BF16. Where there is that, bitsandbytes
    multiplies NF4 with a kernel of its own, all in bfloat16.
    """
    silence_libraries()
    import bitsandbytes.nn as bnb

    def new_layer(_, layer):
        weight = layer.weight.data.cpu()  # on the way to a GPU they quantize
        sizes = layer.in_features, layer.out_features
        if bits == 8:
            # threshold: as transformers sets it; its own 0 keeps no outliers apart
            new = bnb.Linear8bitLt(*sizes, bias=False, has_fp16_weights=False, threshold=6.0)
            new.weight = bnb.Int8Params(weight, requires_grad=False)
        else:
            new = bnb.Linear4bit(*sizes, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4")
            new.weight = bnb.Params4bit(
                weight, False, quant_type="nf4", compress_statistics=double_quant
            )
            new.support_avx512bf16_for_cpu &= not plain
        return new.to(layer.weight.device).eval()

    return QuantizedModel(replace_layers(model, new_layer, progress=False))


def torch_ao(model, tokenizer):
    warnings.simplefilter("ignore")  # deprecated, and still the chapter's way
    model.model = torch.ao.quantization.quantize_dynamic(
        model.model, {torch.nn.Linear}, dtype=torch.qint8
    )
    return QuantizedModel(model)


def torchao(model, tokenizer, config):
    silence_libraries()
    from torchao import quantization

    quantization.quantize_(model.model, getattr(quantization, config)())
    return QuantizedModel(model)


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
        ours_weighted,
        ours_borrowing,
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

# --- formats ---------------------------------------------------------------------------------


def absmax(bits, group_size):
    return {"method": "absmax", "bits": bits, "group_size": group_size}


def affine(bits, group_size):
    return {"method": "affine", "bits": bits, "group_size": group_size}


def learned(method, bits=4, group_size=64, **options):
    return {"method": method, "bits": bits, "group_size": group_size, "calibration": {}} | options


def code_book(kind, double_quant=False):
    return {"method": kind, "double_quant": double_quant}


BNB, AO = ("bitsandbytes",), ("torchao",)
SAME_OPTIONS = ("--act-order", "--static-groups")  # as ours: asymmetric, damping .01

TABLE = [
    Format("FP32", "cast", "float_model", {"dtype": "float32"}),
    Format("FP16", "cast", "float_model", {"dtype": "float16"}),
    Format("BF16", "cast", "float_model", {"dtype": "bfloat16"}),
    Format("INT8 weights, per tensor", "absmax", "ours", absmax(8, None)),
    Format("INT8 weights, per channel", "absmax", "ours", absmax(8, "channel")),
    Format("torchao INT8 weights", "libraries", "torchao", {"config": "Int8WeightOnlyConfig"}, AO),
    Format(
        "INT8 dynamic, per tensor",
        "INT8 activations",
        "ours_dynamic",
        {"granularity": "per_tensor"},
    ),
    Format("torch.ao INT8 dynamic", "libraries", "torch_ao"),
    Format(
        "INT8 dynamic, per token", "INT8 activations", "ours_dynamic", {"granularity": "per_token"}
    ),
    Format(
        "torchao INT8 dynamic",
        "libraries",
        "torchao",
        {"config": "Int8DynamicActivationInt8WeightConfig"},
        AO,
    ),
    Format("INT8 static, per channel", "INT8 activations", "ours_static", {"observer": "minmax"}),
    Format(
        "INT8 static, percentile", "INT8 activations", "ours_static", {"observer": "percentile"}
    ),
    Format(
        "INT8 static, percentile 99.999",
        "INT8 activations",
        "ours_static",
        {"observer": "percentile", "percentile": 99.999},
    ),
    Format("INT8 static, least squares", "INT8 activations", "ours_static", {"observer": "mse"}),
    Format("INT8 SmoothQuant, per token", "INT8 activations", "ours_smooth"),
    Format("LLM.int8()", "INT8 activations", "ours_llm_int8"),
    Format("bitsandbytes LLM.int8()", "libraries", "bitsandbytes", {"bits": 8}, BNB),
    Format("INT6 affine, groups of 64", "affine", "ours", affine(6, 64)),
    Format("INT5 affine, groups of 64", "affine", "ours", affine(5, 64)),
    Format("INT4 absmax, per tensor", "absmax", "ours", absmax(4, None)),
    Format("INT4 absmax, per channel", "absmax", "ours", absmax(4, "channel")),
    Format("INT4 absmax, groups of 64", "absmax", "ours", absmax(4, 64)),
    Format("INT4 absmax, groups of 32", "absmax", "ours", absmax(4, 32)),
    Format("INT4 absmax, groups of 16", "absmax", "ours", absmax(4, 16)),
    Format("INT4 affine, per channel", "affine", "ours", affine(4, "channel")),
    Format("INT4 affine, groups of 64", "affine", "ours", affine(4, 64)),
    Format("INT4 affine, groups of 32", "affine", "ours", affine(4, 32)),
    Format("INT4 affine, groups of 16", "affine", "ours", affine(4, 16)),
    Format("INT3 affine, groups of 64", "affine", "ours", affine(3, 64)),
    Format("INT3 affine, groups of 16", "affine", "ours", affine(3, 16)),
    Format("INT2 affine, groups of 64", "affine", "ours", affine(2, 64)),
    Format("INT2 affine, groups of 16", "affine", "ours", affine(2, 16)),
    Format("NF4", "code book", "ours", code_book("nf4")),
    Format("NF4, double quantization", "code book", "ours", code_book("nf4", True)),
    Format("FP4", "code book", "ours", code_book("fp4")),
    Format(
        "bitsandbytes NF4", "libraries", "bitsandbytes", {"bits": 4, "double_quant": False}, BNB
    ),
    Format("bitsandbytes NF4, double quantization", "libraries", "bitsandbytes", {"bits": 4}, BNB),
    Format("GGUF Q8_0", "GGUF", "ours_gguf", {"kind": "Q8_0"}),
    Format("GGUF Q4_1", "GGUF", "ours_gguf", {"kind": "Q4_1"}),
    Format("GGUF Q4_0", "GGUF", "ours_gguf", {"kind": "Q4_0"}),
    Format("GGUF MXFP4", "GGUF", "ours_gguf", {"kind": "MXFP4"}),
    Format("GGUF Q4_1, as it came", "GGUF", "gguf_as_it_came"),
    Format("AWQ INT4, groups of 64", "AWQ", "ours", learned("awq")),
    Format("AWQ INT3, groups of 64", "AWQ", "ours", learned("awq", 3)),
    Format("GPTQ INT4, groups of 64", "GPTQ", "ours", learned("gptq")),
    Format("GPTQ INT3, groups of 64", "GPTQ", "ours", learned("gptq", 3)),
    Format(
        "GPTQ INT4, groups of 64, clip search",
        "GPTQ, clip search",
        "ours",
        learned("gptq", clip_search=True),
    ),
    Format(
        "GPTQ INT4, groups of 32, clip search",
        "GPTQ, clip search",
        "ours",
        learned("gptq", 4, 32, clip_search=True),
    ),
    Format(
        "GPTQ INT3, groups of 64, clip search",
        "GPTQ, clip search",
        "ours",
        learned("gptq", 3, clip_search=True),
    ),
    Format(
        "GPTQ INT2, groups of 16, clip search",
        "GPTQ, clip search",
        "ours",
        learned("gptq", 2, 16, clip_search=True),
    ),
    Format(
        "AutoGPTQ INT4, groups of 64",
        "libraries",
        "peer",
        {"library": "autogptq", "options": SAME_OPTIONS},
    ),
    Format(
        "GPTQModel INT4, groups of 64",
        "libraries",
        "peer",
        {"library": "gptqmodel", "options": SAME_OPTIONS},
    ),
    Format(
        "GPTQModel INT4, its defaults",
        "libraries",
        "peer",
        {"library": "gptqmodel", "options": ("--defaults",)},
    ),
]

"""The summary table, row by row."""


def gptq_after(**calibration):
    return learned("gptq", clip_search=True, calibration=calibration)


STUDIES = [
    Format(
        f"{sequences} x {source}",
        "calibration text",
        "ours",
        gptq_after(source=source, sequences=sequences),
        sequences=8,
    )
    for source in ("news", "encyclopedia")
    for sequences in (1, 4, 16, 64, 128)
    if (source, sequences) != ("news", 16)
]
STUDIES += [
    Format(
        f"order {seed}",
        "calibration order",
        "ours",
        learned("gptq", calibration={"order": seed}),
        sequences=8,
    )
    for seed in range(1, 6)
]
STUDIES.append(
    Format(
        "AWQ, 2 x 128 tokens",
        "AWQ",
        "ours",
        learned("awq", calibration={"sequences": 2, "length": 128}),
        sequences=8,
    )
)
STUDIES += [
    Format("INT4 affine, groups of 64, clip search", "affine", "ours_weighted", {"group_size": 64}),
    Format("GPTQ INT4, columns in order", "GPTQ", "ours", learned("gptq", act_order=False)),
    Format(
        "GPTQ INT4, columns in order, clip search",
        "GPTQ, clip search",
        "ours",
        learned("gptq", act_order=False, clip_search=True),
    ),
]
STUDIES += [
    Format(f"damping {damp}", "damping", "ours", learned("gptq", clip_search=True, damp=damp))
    for damp in (0.001, 0.05, 0.1, 0.5)
]
"""Records for notebook 06: GPTQ with clip search after 1 to 128 sequences of two kinds of text (16
of news are in the table); GPTQ with its 16 sequences in other orders; the parts of GPTQ one by one:
the clip search alone, the paper's column order, dampings other than the table's 0.01. Records for
notebook 09: AWQ with little text. Only quality is measured."""

KERNELS = [
    Format(
        "INT8 weights, per channel, in bfloat16",
        "absmax",
        "ours",
        absmax(8, "channel") | {"dtype": "bfloat16"},
    ),
    Format(
        "INT4 absmax, groups of 64, in bfloat16",
        "absmax",
        "ours",
        absmax(4, 64) | {"dtype": "bfloat16"},
    ),
    Format("NF4, in bfloat16", "code book", "ours", code_book("nf4") | {"dtype": "bfloat16"}),
    Format("INT4 absmax, groups of 64, fused", "absmax", "ours", absmax(4, 64) | {"fused": True}),
    Format("NF4, fused", "code book", "ours", code_book("nf4") | {"fused": True}, BNB),
    Format(
        "NF4, bitsandbytes' dequantization", "code book", "ours_borrowing", code_book("nf4"), BNB
    ),
    Format(
        "bitsandbytes NF4, double quantization, plain",
        "libraries",
        "bitsandbytes",
        {"bits": 4, "plain": True},
        BNB,
    ),
]
"""The same codes with other kernels or data types, for the benchmarks of speed."""

FORMATS = {kind.name: kind for kind in (*TABLE, *STUDIES, *KERNELS)}
