"""`make bench-peers`: the whole embedded model by GPTQ, ours and both libraries', side by side.

All get the same calibration tokens and quantize to 4 bits in groups of 64; round-to-nearest and
bitsandbytes' NF4 stand beside. Each works in a process of its own, one after the other, with
torch's threads on the same cores. What comes out is measured here, with the same arithmetic for
all: perplexity and KL to the full-precision model on the same evaluation tokens, and the paired
interval of the difference to AutoGPTQ. The table goes to data/results.json as "bench/peers".

    python tools/bench_peers.py                everything, about a quarter of an hour
    python tools/bench_peers.py --orders       only how far our KL moves by luck
    python tools/bench_peers.py --blocks 2     a trial on the first blocks; records nothing
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from chapter13 import corpus, evaluate, models, quantize_model, results
from chapter13.whole_model.linear import QuantizedLinear
from chapter13.whole_model.storage import load_quantized, save_quantized

sys.path.insert(0, str(results.FILE.parent.parent))  # a script finds its own folder alone
from tools import bench_models, peers

CALIBRATION = (16, 256)  # sequences, length
EVALUATION = (12, 512)
BITS, GROUP_SIZE = 4, 64
ORDERS = 6  # of the calibration sequences: how much KL varies when only rounding ties change
SAME_OPTIONS = ("--act-order", "--static-groups")  # asymmetric, damping .01

OURS = {
    "chapter13": {"method": "gptq"},
    "chapter13, clip search": {"method": "gptq", "clip_search": True},
    "round-to-nearest": {"method": "affine"},
}
PEERS = {
    "AutoGPTQ": ("autogptq", SAME_OPTIONS),
    "GPTQModel": ("gptqmodel", SAME_OPTIONS),
    "GPTQModel, its defaults": ("gptqmodel", ("--defaults",)),
}
NF4 = "bitsandbytes NF4"
BASELINE = "AutoGPTQ"  # what the others are compared with


def nf4(model):
    """bitsandbytes' NF4 in blocks of 64 without double quantization, its values in float32."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    from chapter13.whole_model.layers import linear_layers

    for layer in linear_layers(model).values():
        quantized = quantize_4bit(layer.weight.detach(), blocksize=64, quant_type="nf4")
        layer.weight = torch.nn.Parameter(dequantize_4bit(*quantized), requires_grad=False)
    return model


def quantize_here(name, folder, tokens, output):
    """One of our methods, or bitsandbytes', in this very process; {seconds, peak_mb}."""
    model, _ = models.load(str(folder), device="cpu")
    start = time.perf_counter()
    if name == NF4:
        nf4(model)
    else:
        options = dict(OURS[name])
        if options["method"] == "gptq":
            options["calibration"] = load_file(tokens)["tokens"]
        quantize_model(model, bits=BITS, group_size=GROUP_SIZE, progress=False, **options)
    seconds = time.perf_counter() - start
    peak = bench_models.peak() / 1e6
    if name != NF4:
        save_quantized(model, output)
    return {"seconds": seconds, "peak_mb": peak}


def quantize(name, folder, tokens, output):
    """Runs a method in a process of its own; (summary, the quantized model, versions)."""
    if name in PEERS:
        from chapter13.checkpoint import load_gptq

        peer, options = PEERS[name]
        sizes = ("--bits", BITS, "--group-size", GROUP_SIZE)
        answer = peers.run(peer, "quantize", folder, tokens, output, *sizes, *options)
        return answer["result"], load_gptq(output), answer["versions"]
    command = [sys.executable, __file__, "--only", name, str(folder), str(tokens), str(output)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    model, _ = models.load(str(folder), device="cpu")
    model = nf4(model) if name == NF4 else load_quantized(model, output)
    return json.loads(done.stdout.splitlines()[-1]), model, {}


def bits_per_weight(model):
    """From the bytes really held; None where none of the layers is ours."""
    layers = [m.quantized for m in model.modules() if isinstance(m, QuantizedLinear)]
    if not layers:
        return None
    held = sum(each.nbytes for each in layers)
    return round(8 * held / sum(each.shape.numel() for each in layers), 4)


def measure(folder, tokenizer, work):
    """Runs all methods: (the record, name -> KL of each sequence)."""
    tokens = work / "tokens.safetensors"
    save_file({"tokens": corpus.calibration_tokens(tokenizer, *CALIBRATION)}, tokens)
    text = corpus.evaluation_tokens(tokenizer, *EVALUATION)
    model, _ = models.load(str(folder), device="cpu")
    reference = evaluate.cache_logits(model, text, work / "reference", progress=False)
    plain = evaluate.perplexity(model, text, progress=False)
    print(f"{results.machine()}; full precision: perplexity {plain:.2f}", flush=True)
    methods, scores, versions = {}, {}, {}
    for name in [*OURS, *PEERS, NF4]:
        summary, model, used = quantize(name, folder, tokens, work / name)
        if name in PEERS:
            versions[PEERS[name][0]] = used
        perplexity, scores[name] = evaluate.perplexity_and_kl(
            model, reference, text, progress=False
        )
        low, high = scores[name].interval
        methods[name] = {
            "seconds": round(summary["seconds"], 1),
            "peak_mb": round(summary["peak_mb"]),
            "bits_per_weight": bits_per_weight(model),
            "perplexity": round(perplexity.value, 3),
            "kl": round(scores[name].value, 5),
            "kl_interval": [round(low, 5), round(high, 5)],
        }
        print(line(name, methods[name]), flush=True)
    for name, score in scores.items():
        if name != BASELINE:
            apart = evaluate.difference(score, scores[BASELINE])
            low, high = apart.interval
            methods[name]["kl_less_baseline"] = round(apart.value, 5)
            methods[name]["kl_less_baseline_interval"] = [round(low, 5), round(high, 5)]
    return {
        "orders": orders(folder, load_file(tokens)["tokens"], text, reference),
        "calibration": list(CALIBRATION),
        "evaluation": list(EVALUATION),
        "perplexity": round(plain.value, 3),
        "baseline": BASELINE,
        "methods": methods,
        "peers": versions,
    }


def orders(folder, tokens, text, reference):
    """Our KL with the calibration sequences in other orders: sums differ in their last digits."""
    found = []
    for seed in range(ORDERS):
        shuffled = tokens[
            torch.randperm(len(tokens), generator=torch.Generator().manual_seed(seed))
        ]
        model, _ = models.load(str(folder), device="cpu")
        options = {"bits": BITS, "group_size": GROUP_SIZE, "progress": False}
        quantize_model(model, "gptq", calibration=shuffled, **options)
        score = evaluate.kl_divergence(model, reference, text, progress=False)
        found.append(round(score.value, 5))
        print(f"chapter13, calibration text in order {seed}: KL {found[-1]:.4f}", flush=True)
    return found


def line(name, row):
    return (
        f"{name:26}{row['seconds']:8.1f} s{row['peak_mb']:7} MB   perplexity "
        f"{row['perplexity']:7.2f}   KL {row['kl']:.4f}"
    )


def comparison(record):
    """The record in sentences: times and KL against the libraries and the plain grids."""
    methods = record["methods"]
    ours, base = methods["chapter13"], methods[BASELINE]
    lines = []
    for name, row in methods.items():
        if name in PEERS:
            lines.append(f"{name} takes {row['seconds'] / ours['seconds']:.1f} times our time")
    for name, row in methods.items():
        if name != BASELINE:
            low, high = row["kl_less_baseline_interval"]
            lines.append(
                f"{name}: KL {row['kl'] / base['kl']:.3f} of {BASELINE}'s, "
                f"{row['kl_less_baseline']:+.4f} (95%: {low:+.4f} to {high:+.4f})"
            )
    low, high = min(record["orders"]), max(record["orders"])
    mean = sum(record["orders"]) / len(record["orders"])
    lines.append(
        f"our KL in {len(record['orders'])} orders of the calibration text: {low:.4f} to "
        f"{high:.4f}, mean {mean:.4f}, {mean / base['kl']:.3f} of {BASELINE}'s"
    )
    for name in ("round-to-nearest", NF4):
        lines.append(f"our KL is {ours['kl'] / methods[name]['kl']:.3f} of that of {name}")
    return lines


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--blocks", type=int, help="only the first blocks of the model")
    parser.add_argument("--orders", action="store_true", help="measure our KL's spread alone")
    parser.add_argument("--only", nargs=4, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    bench_models.silence_libraries()
    warnings.filterwarnings("ignore", message=".*calibration tokens span")
    if arguments.only:
        name, *paths = arguments.only
        print(json.dumps(quantize_here(name, *map(Path, paths))))
        return
    if arguments.orders:
        with tempfile.TemporaryDirectory() as folder:
            model, tokenizer = models.load(device="cpu")
            text = corpus.evaluation_tokens(tokenizer, *EVALUATION)
            reference = evaluate.cache_logits(model, text, Path(folder) / "reference")
            tokens = corpus.calibration_tokens(tokenizer, *CALIBRATION)
            record = results.load()["bench/peers"]
            record["orders"] = orders(models.EMBEDDED, tokens, text, reference)
        results.record("bench/peers", record, ("transformers", "bitsandbytes"))
        return
    for peer in peers.VERSIONS:
        try:
            peers.python(peer)
        except peers.NoPeer as error:
            sys.exit(str(error))
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        model, tokenizer = models.load(device="cpu")
        place = work / "model"
        peers.cut(model, place, arguments.blocks or model.config.num_hidden_layers)
        tokenizer.save_pretrained(place)
        del model
        record = measure(place, tokenizer, work)
    print(*comparison(record), sep="\n")
    if not arguments.blocks:
        results.record("bench/peers", record, ("transformers", "bitsandbytes"))


if __name__ == "__main__":
    main()
