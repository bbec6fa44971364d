"""`make bench`: speed and memory side by side with the reference libraries.

Measures a matrix of the largest shape in a 7B model, the sliders of the explorers, and whole models
(tools/bench_models.py). Times are medians of several runs, ours and the library's in turn.

    python -m tools.bench                everything
    python -m tools.bench nf4 sliders    only these: int8, nf4, packing, sliders, import, models
"""

import statistics
import subprocess
import sys
from functools import partial

import torch

from chapter13 import (
    models,
    quantize_absmax,
    quantize_codebook,
    quantize_model,
    quantize_per_channel,
    results,
)
from chapter13.packing import pack, packed_size, unpack
from tools import bench_models, markdown, measure

TARGET = "make bench"
SHAPE = (11008, 4096)  # the largest matrix of a 7B model's MLP
SECTION = markdown.section("bench", TARGET)
MODELS_SECTION = markdown.section("bench models", TARGET)


def keys():
    """The records that this program writes."""
    return {f"bench/{name}" for name in BENCHES}


def matrix(dtype=torch.float32):
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(0)).mul_(0.02).to(dtype)


def bench_int8():
    weight = matrix()

    def plain():
        scale = weight.abs().amax(dim=1, keepdim=True) / 127.0
        return (weight / scale).round().clamp(-128, 127).to(torch.int8), scale

    assert torch.equal(quantize_per_channel(weight)[0], plain()[0])
    ours, theirs = measure.medians(lambda: quantize_per_channel(weight), plain)
    packed, _ = measure.medians(lambda: quantize_absmax(weight, 8, "channel"), plain)
    extra, plain_extra = (
        extra_memory(work) / weight.nbytes for work in (lambda: quantize_per_channel(weight), plain)
    )
    show("INT8 per channel", ours, theirs, "three torch operations")
    show("the same, in a QuantizedTensor", packed, theirs, "three torch operations")
    print(f"{'':34}peak memory beyond the matrix: {extra:.2f} of it, against {plain_extra:.2f}")
    record(
        "int8",
        {
            "ours_ms": ms(ours),
            "quantized_tensor_ms": ms(packed),
            "plain_torch_ms": ms(theirs),
            "ratio": ratio(theirs, ours),
            "extra_memory": round(extra, 2),
            "plain_extra_memory": round(plain_extra, 2),
        },
    )


def bench_nf4():
    import bitsandbytes.functional as reference

    weight = matrix()
    packed, _ = reference.quantize_4bit(weight, blocksize=64, quant_type="nf4")
    assert torch.equal(quantize_codebook(weight).packed, packed.view(-1))
    measured = {}
    for kind, double in (("nf4", False), ("nf4", True), ("fp4", False)):
        ours, theirs = measure.medians(
            lambda kind=kind, double=double: quantize_codebook(weight, kind, double_quant=double),
            lambda kind=kind, double=double: reference.quantize_4bit(
                weight, blocksize=64, quant_type=kind, compress_statistics=double
            ),
            runs=3,
        )
        name = kind + "_double" * double
        show(f"{kind.upper()}{' double quantization' * double}", ours, theirs, "bitsandbytes")
        measured[name] = {
            "ours_ms": ms(ours),
            "bitsandbytes_ms": ms(theirs),
            "ratio": ratio(theirs, ours),
        }
    quantized, state = quantize_codebook(weight), reference.quantize_4bit(weight, quant_type="nf4")
    ours, theirs = measure.medians(quantized.dequantize, lambda: reference.dequantize_4bit(*state))
    show("NF4 back to float32", ours, theirs, "bitsandbytes")
    measured["nf4_dequantize"] = {
        "ours_ms": ms(ours),
        "bitsandbytes_ms": ms(theirs),
        "ratio": ratio(theirs, ours),
    }
    record("nf4", measured, ("bitsandbytes",))


def bench_packing():
    count = SHAPE[0] * SHAPE[1]
    measured = {}
    for bits in range(2, 9):
        codes = torch.randint(2**bits, (count,), dtype=torch.uint8)
        packed = pack(codes, bits).clone()
        copy, packing, unpacking = measure.medians(
            codes.clone,
            lambda b=bits, c=codes: pack(c, b),
            lambda b=bits, p=packed: unpack(p, b, count),
        )
        speed = {
            name: round(count / seconds / 1e9, 2)
            for name, seconds in (("pack", packing), ("unpack", unpacking), ("copy", copy))
        }
        print(
            f"{bits} bits, {packed_size(count, bits) / 1e6:5.1f} MB packed   "
            f"pack {speed['pack']:5.2f} GB/s   unpack {speed['unpack']:5.2f} GB/s   "
            f"plain copy {speed['copy']:5.2f} GB/s"
        )
        measured[f"{bits}_bits_gb_per_s"] = speed
    record("packing", measured)


def bench_import():
    def seconds(statement):
        command = [
            sys.executable,
            "-c",
            f"import time, torch, numpy; t = time.perf_counter(); "
            f"{statement}; print(time.perf_counter() - t)",
        ]
        return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)

    beyond = statistics.median(seconds("import chapter13") for _ in range(5))
    print(f"import chapter13, beyond torch and numpy: {beyond * 1e3:.1f} ms")
    record("import", {"beyond_torch_ms": ms(beyond)})


def bench_sliders():
    from chapter13.explorers import absmax, codebooks, distributions, formats, granularity

    layers = {shape: torch.randn(shape) * 0.02 for shape in ((1536, 576), (4096, 4096))}
    explorers = {
        "01 absmax": absmax.explore_absmax,
        "02 granularity": granularity.explore_granularity,
        "03 code books": codebooks.explore_codebooks,
        "07 distributions": distributions.explore_distributions,
    }
    measured = {}
    panels = [("00 number", "", formats.explore_number), ("00 memory", "", formats.explore_memory)]
    panels += [
        (name, " x ".join(map(str, shape)), partial(explore, weight))
        for name, explore in explorers.items()
        for shape, weight in layers.items()
    ]
    for name, shape, make in panels:
        panel = make()
        times = [milliseconds for _ in range(2) for milliseconds in moves(panel)]
        panel.close()
        median, slowest = statistics.median(times), max(times)
        print(
            f"{name:18}{shape:12} {len(times):3} moves   median {median:6.1f} ms   "
            f"slowest {slowest:6.1f} ms"
        )
        measured[f"{name} {shape}".strip()] = {
            "median_ms": round(median, 1),
            "slowest_ms": round(slowest, 1),
        }
    record("sliders", measured, ("matplotlib", "ipywidgets"))


def bench_whole_models():
    quantizing = {}
    for method in ("absmax", "nf4"):
        model = models.load(device="cpu")[0]
        quantize = partial(quantize_model, model, method, progress=False)
        quantizing[f"quantize_{method}_s"] = round(measure.seconds(quantize), 2)
    print(f"the embedded model's linear layers to 4 bits: {quantizing}")
    measured = bench_models.bench() | quantizing
    packages = ("bitsandbytes", "torchao", "transformers")
    record("models", measured, packages)


def moves(panel):
    """Milliseconds from each move of a control to the new picture, in the kernel."""
    start = panel.settings
    for name, control in panel.controls.items():
        for value in positions(control):
            panel.set(**start)
            yield measure.seconds(partial(panel.set, **{name: value})) * 1e3


def positions(control):
    """Up to seven values of a control, from end to end, without its present value."""
    if options := getattr(control, "options", None):
        values = [option[1] if isinstance(option, tuple) else option for option in options]
    elif hasattr(control, "base"):
        values = [
            control.base ** (control.min + i * (control.max - control.min) / 6) for i in range(7)
        ]
    elif hasattr(control, "min"):
        span = control.max - control.min
        values = [type(control.value)(control.min + i * span / 6) for i in range(7)]
    elif isinstance(control.value, float):  # typed
        values = [0.1, -1.5, 70_000.0, 1e-8, 3.4e38]
    else:
        values = [False, True]
    values = [value for value in values if value != control.value]
    return values[:: max(1, len(values) // 7)][:7]


def layer_section(records):
    """The table of speeds on one matrix and of the explorers, from data/results.json."""
    int8, nf4, packing = (records[f"bench/{name}"] for name in ("int8", "nf4", "packing"))
    sliders = {
        name: times["median_ms"]
        for name, times in records["bench/sliders"].items()
        if isinstance(times, dict) and "median_ms" in times
    }
    small, large = (
        [median for name, median in sliders.items() if shape in name]
        for shape in ("1536 x 576", "4096 x 4096")
    )
    slowest_pack = min(packing[f"{bits}_bits_gb_per_s"]["pack"] for bits in range(2, 8))
    four = packing["4_bits_gb_per_s"]
    copies = [packing[f"{bits}_bits_gb_per_s"]["copy"] for bits in range(2, 9)]
    rows = [
        ("what", "chapter13", "beside it", "ratio"),
        *(
            (
                f"{what} of {SHAPE[0]} x {SHAPE[1]} weights",
                f"{nf4[key]['ours_ms']:.0f} ms",
                f"bitsandbytes {nf4[key]['bitsandbytes_ms']:.0f} ms",
                f"{nf4[key]['ratio']} x as fast",
            )
            for what, key in (
                ("NF4, blocks of 64,", "nf4"),
                ("NF4 with double quantization", "nf4_double"),
                ("FP4, blocks of 64,", "fp4"),
                ("NF4 back to float32", "nf4_dequantize"),
            )
        ),
        (
            "INT8 per channel, the same matrix",
            f"{int8['ours_ms']:.0f} ms",
            f"three torch operations {int8['plain_torch_ms']:.0f} ms",
            f"{int8['ratio']} x as fast",
        ),
        (
            "extra memory for it, result included",
            f"{int8['extra_memory']} of the matrix",
            f"three torch operations {int8['plain_extra_memory']}",
            "",
        ),
        (
            "packing 4-bit codes, and back",
            f"{four['pack']} and {four['unpack']} GB/s",
            f"a plain copy {statistics.median(copies)} GB/s",
            "",
        ),
        ("packing, slowest of 2 to 7 bits", f"{slowest_pack} GB/s", "", ""),
        (
            "slider to new picture, in the kernel, 1536 x 576 weights",
            f"{min(small):.0f} to {max(small):.0f} ms",
            "",
            "",
        ),
        (
            "the same, 4096 x 4096 weights",
            f"{min(large):.0f} to {max(large):.0f} ms",
            "",
            "",
        ),
        (
            "`import chapter13`, beyond torch and numpy",
            f"{records['bench/import']['beyond_torch_ms']:.0f} ms",
            "",
            "",
        ),
    ]
    where = markdown.where(records["bench/nf4"]["environment"], "torch", "bitsandbytes")
    return f"{markdown.table(rows)}\n\nMedians; {where}.\n"


def models_section(records):
    """Tokens per second of whole models, one row per format, from data/results.json."""
    record = records["bench/models"]
    small, large = record["smollm2-135m"], record["7B blocks"]
    rows = [
        ("format", "embedded model", "peak memory", "two blocks of a 7B model", "bound", "memory")
    ]
    for kind in bench_models.MEASURED:
        if kind not in small:  # bitsandbytes' kernel needs AVX512-BF16
            continue
        one, two = small[kind], large[kind]
        rows.append(
            (
                kind,
                f"{1e3 / one['ms_per_token']:.0f} tokens/s",
                f"{one['peak_mb']} MB",
                f"{1e3 / two['ms_per_token']:.1f} tokens/s",
                f"{1e3 / two['bound_ms']:.1f}",
                f"{two['weights_mb']:.0f} MB",
            )
        )
    where = markdown.where(record["environment"], "torch", "bitsandbytes", "torchao")
    return (
        f"{markdown.table(rows)}\n\n{where}; memory at {record['bandwidth_gb_per_s']} GB/s. "
        f"All linear layers of the embedded model to 4 bits: {record['quantize_absmax_s']} s "
        f"(absmax), {record['quantize_nf4_s']} s (NF4).\n"
    )


def extra_memory(work):
    """The most bytes that `work` allocated at a time, result included."""
    work()  # memory that stays allocated after the first call is not counted
    with measure.memory() as used:
        kept = work()
    del kept
    return used.extra


def show(what, ours, theirs, whose):
    print(
        f"{what:34}{ours * 1e3:8.1f} ms   {whose} {theirs * 1e3:8.1f} ms   "
        f"{theirs / ours:5.1f} times as fast"
    )


def record(name, measured, packages=()):
    results.record(f"bench/{name}", measured, TARGET, packages)


def ms(seconds):
    return round(seconds * 1e3, 1)


def ratio(theirs, ours):
    return round(theirs / ours, 1)


BENCHES = {
    "int8": bench_int8,
    "nf4": bench_nf4,
    "packing": bench_packing,
    "sliders": bench_sliders,
    "import": bench_import,
    "models": bench_whole_models,
}


def main(names):
    unknown = [name for name in names if name not in BENCHES]
    if unknown:
        sys.exit(f"no benchmark named {', '.join(unknown)}; choose from {', '.join(BENCHES)}")
    print(f"{results.machine()}; a {SHAPE[0]} x {SHAPE[1]} matrix, medians")
    for name in names or BENCHES:
        BENCHES[name]()
    records = results.load()
    if keys() <= set(records):
        markdown.write(SECTION, layer_section(records))
        markdown.write(MODELS_SECTION, models_section(records))


if __name__ == "__main__":
    main(sys.argv[1:])
