"""`make bench-large`: the command line on a billion parameters, and an estimate for 7B.

Writes checkpoints with random weights in bfloat16, in several files: one of the shape of Llama 3.2
1B (except for the vocabulary, which is the embedded model's), and one with two blocks of the shape
of Llama 2 7B. Quantizes them with `python -m chapter13`, interrupts and kills some runs, and
observes their memory from outside: anonymous pages are the memory that a run adds; pages of mapped
files are freed when other programs need memory. The records in data/results.json are "cli/...".

    python -m tools.bench_large                     everything, in a temporary folder
    python -m tools.bench_large gptq --work DIR     only one stage: example, absmax, gptq, seven
"""

import argparse
import hashlib
import json
import resource
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from chapter13 import results
from chapter13.fetch.download import require
from tools import markdown
from tools.measure import process_bytes

TARGET = "make bench-large"
EXAMPLE = markdown.section("example", TARGET, "docs/package.md")
LARGE = markdown.section("large", TARGET)
SEVEN = markdown.section("seven", TARGET)
SHAPES = {  # blocks, hidden size, width of the MLP, heads, heads of keys and values
    "1b": (16, 2048, 8192, 32, 8),
    "7b": (2, 4096, 11008, 32, 32),
}
BLOCKS_OF_7B = 32


def make_checkpoint(folder, shape):
    """A random model in bfloat16, two blocks per file; returns the number of its parameters."""
    from safetensors.torch import save_file
    from transformers import AutoTokenizer, LlamaConfig

    blocks, hidden, mlp, heads, kv_heads = SHAPES[shape]
    tokenizer = AutoTokenizer.from_pretrained(require("smollm2-135m"))
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=mlp,
        num_hidden_layers=blocks,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        vocab_size=len(tokenizer),
        tie_word_embeddings=True,
        dtype="bfloat16",
        architectures=["LlamaForCausalLM"],
    )
    config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    generator = torch.Generator().manual_seed(13)

    def matrix(rows, columns):
        return torch.randn(rows, columns, generator=generator).mul_(0.02).bfloat16()

    def block(index):
        place, few = f"model.layers.{index}.", hidden // heads * kv_heads
        sides = {
            "self_attn.q_proj": (hidden, hidden),
            "self_attn.k_proj": (few, hidden),
            "self_attn.v_proj": (few, hidden),
            "self_attn.o_proj": (hidden, hidden),
            "mlp.gate_proj": (mlp, hidden),
            "mlp.up_proj": (mlp, hidden),
            "mlp.down_proj": (hidden, mlp),
        }
        norms = "input_layernorm", "post_attention_layernorm"
        return {f"{place}{name}.weight": matrix(*side) for name, side in sides.items()} | {
            f"{place}{norm}.weight": torch.ones(hidden, dtype=torch.bfloat16) for norm in norms
        }

    places, count = {}, 0
    files = blocks // 2 + 1
    for number in range(files):
        if number < blocks // 2:
            tensors = block(2 * number) | block(2 * number + 1)
        else:
            tensors = {
                "model.embed_tokens.weight": matrix(len(tokenizer), hidden),
                "model.norm.weight": torch.ones(hidden, dtype=torch.bfloat16),
            }
        name = f"model-{number + 1:05}-of-{files:05}.safetensors"
        save_file(tensors, folder / name, metadata={"format": "pt"})
        places |= dict.fromkeys(tensors, name)
        count += sum(tensor.numel() for tensor in tensors.values())
    index = {"metadata": {"total_size": 2 * count}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return count


class Run:
    """One run of the command line, observed until it ends or is stopped."""

    def __init__(self, model, out, method, end=None):
        """`end`: (signal, count) sends the signal when that many blocks are in their files."""
        blocks = out.with_name(f"{out.name}.unfinished") / "blocks"
        command = [sys.executable, "-m", "chapter13", "quantize", str(model), str(out)]
        self.anonymous_mb = self.file_mb = self.total_mb = 0
        self.peaks: dict[int, int] = {}
        """Largest anonymous memory during a block, by the block's number."""
        self.seconds_at: dict[int, float] = {}
        """Seconds from the start until that many blocks were in their files."""
        start, cpu = time.perf_counter(), _cpu_seconds()
        process = subprocess.Popen(
            [*command, "--method", method],
            cwd=markdown.ROOT,
            # background jobs of a shell ignore SIGINT; this process must not inherit that
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        while process.poll() is None:
            finished = len(list(blocks.glob("block-*.safetensors")))
            self._note(process.pid, finished, time.perf_counter() - start)
            if end and finished >= end[1]:
                process.send_signal(end[0])
                end = None
            time.sleep(0.05)
        self.seconds = time.perf_counter() - start
        self.cpu_seconds = _cpu_seconds() - cpu
        self.code = process.returncode

    def _note(self, pid, finished, seconds):
        try:
            sizes = [process_bytes(field, pid) for field in ("RssAnon", "RssFile")]
        except (OSError, TypeError):  # it has just ended
            return
        anonymous, files = (size // 1_000_000 for size in sizes)
        self.anonymous_mb = max(self.anonymous_mb, anonymous)
        self.file_mb = max(self.file_mb, files)
        self.total_mb = max(self.total_mb, anonymous + files)
        self.peaks[finished] = max(self.peaks.get(finished, 0), anonymous)
        self.seconds_at.setdefault(finished, seconds)

    def measured(self):
        """The numbers to record."""
        times = [self.seconds_at[n] for n in sorted(self.seconds_at)]
        steps = [b - a for a, b in zip(times[1:], times[2:], strict=False)]
        return {
            "seconds": round(self.seconds, 1),
            "cpu_seconds": round(self.cpu_seconds, 1),
            "seconds_per_block": round(statistics.median(steps), 2) if steps else None,
            "anonymous_mb": self.anonymous_mb,
            "file_mb": self.file_mb,
            "together_mb": self.total_mb,
            "anonymous_mb_by_block": [self.peaks[n] for n in sorted(self.peaks)],
        }


def _cpu_seconds():
    """CPU time of all children that have ended, over all processors."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def digest(folder):
    """One number for all files of a folder."""
    total = hashlib.sha256()
    for file in sorted(folder.iterdir()):
        total.update(file.name.encode())
        with file.open("rb") as content:
            total.update(hashlib.file_digest(content, "sha256").digest())
    return total.hexdigest()


def size_mb(folder):
    return sum(file.stat().st_size for file in folder.iterdir()) // 1_000_000


def broken(model, out, method):
    """Three runs: interrupted after a quarter of the blocks, killed after half, completed."""
    blocks = SHAPES["1b"][0]
    runs = [
        Run(model, out, method, (signal.SIGINT, blocks // 4)),
        Run(model, out, method, (signal.SIGKILL, blocks // 2)),
    ]
    assert [run.code for run in runs] == [130, -signal.SIGKILL], [run.code for run in runs]
    assert not out.exists()
    runs.append(Run(model, out, method))
    assert runs[-1].code == 0
    return runs


def bench_absmax(work):
    """An uninterrupted and a twice-interrupted run give identical bytes."""
    model = checkpoint(work, "1b")
    whole = Run(model, work / "absmax", "absmax")
    assert whole.code == 0
    broken(model, work / "absmax-broken", "absmax")
    assert digest(work / "absmax") == digest(work / "absmax-broken")
    return whole.measured() | {"out_mb": size_mb(work / "absmax")}


def bench_gptq(work):
    model = checkpoint(work, "1b")
    runs = broken(model, work / "gptq", "gptq")
    each = [run.measured() for run in runs]
    return {
        "seconds": round(sum(one["seconds"] for one in each), 1),
        "cpu_seconds": round(sum(one["cpu_seconds"] for one in each), 1),
        "seconds_by_run": [one["seconds"] for one in each],
        "seconds_per_block": each[-1]["seconds_per_block"],
        **{
            name: max(one[name] for one in each)
            for name in ("anonymous_mb", "file_mb", "together_mb")
        },
        "anonymous_mb_by_block": each[-1]["anonymous_mb_by_block"],
        "out_mb": size_mb(work / "gptq"),
    }


def bench_seven(work):
    """Two blocks of a 7B model, measured, and all 32 blocks, extrapolated."""
    model = checkpoint(work, "7b")
    measured = {}
    for method in ("gptq", "absmax"):
        run = Run(model, work / f"7b-{method}", method)
        assert run.code == 0
        first, second = run.seconds_at[1], run.seconds_at[2]
        block, writing = second - first, run.seconds - second
        whole = first - block + BLOCKS_OF_7B * block + BLOCKS_OF_7B / 2 * writing
        measured[method] = run.measured() | {
            "seconds_per_block": round(block, 1),
            "seconds_of_7b": round(whole),
        }
    return {"methods": measured}


def bench_example(work):
    """The documented example: the embedded model by GPTQ, and the output of its evaluation."""
    run = Run("smollm2-135m", work / "smollm2-gptq", "gptq")
    assert run.code == 0
    command = [sys.executable, "-m", "chapter13", "evaluate", str(work / "smollm2-gptq")]
    printed = subprocess.run(
        [*command, "--reference", "smollm2-135m"],
        cwd=markdown.ROOT,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    ).stdout
    return run.measured() | {"printed": printed.splitlines()}


STAGES = {
    "example": bench_example,
    "absmax": bench_absmax,
    "gptq": bench_gptq,
    "seven": bench_seven,
}


def checkpoint(work, shape):
    folder = work / shape
    if not (folder / "model.safetensors.index.json").exists():
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        make_checkpoint(folder, shape)
    return folder


def keys():
    """The records that this program writes."""
    return {f"cli/{stage}" for stage in STAGES}


METHODS = {"absmax": "absmax", "gptq": "GPTQ, 16 x 256 tokens"}


def example_section(records):
    """The output of the two documented commands, from data/results.json."""
    example = records["cli/example"]
    printed = "\n".join(example["printed"])
    where = markdown.where(example["environment"])
    took = f"The first command took {example['seconds']:.0f} seconds"
    return f"```\n{printed}\n```\n\n{took}; {where}.\n"


def large_section(records):
    """The table of a model of a billion parameters, from data/results.json."""
    methods = {name: records[f"cli/{name}"] for name in METHODS}
    rows = [("", *METHODS.values())]

    def row(what, value):
        rows.append((what, *(value(one) for one in methods.values())))

    row("machine", lambda one: markdown.where(one["environment"], "torch"))
    row("elapsed time", lambda one: f"{one['seconds'] / 60:.1f} minutes")
    row("CPU time", lambda one: f"{one['cpu_seconds'] / 60:.1f} minutes")
    row("anonymous memory while blocks are quantized", lambda one: f"{_blocks(one)} MB")
    row("peak anonymous memory", lambda one: f"{one['anonymous_mb']} MB")
    row("mapped pages in memory, peak", lambda one: f"{one['file_mb']} MB")
    row("written", lambda one: f"{one['out_mb']} MB")
    return f"{markdown.table(rows)}\n"


def seven_section(records):
    """The table of a 7B model, extrapolated from two of its blocks, from data/results.json."""
    record = records["cli/seven"]
    methods = record["methods"]
    rows = [("", *(METHODS[method] for method in methods))]

    def row(what, value):
        rows.append((what, *(value(one) for one in methods.values())))

    row("time per block, measured", lambda one: f"{one['seconds_per_block']:.0f} s")
    row("peak anonymous memory, measured", lambda one: f"{one['anonymous_mb']} MB")
    row(f"{BLOCKS_OF_7B} blocks, extrapolated", lambda one: _long(one["seconds_of_7b"]))
    return f"{markdown.table(rows)}\n\n{markdown.where(record['environment'], 'torch')}\n"


SECTIONS = {EXAMPLE: example_section, LARGE: large_section, SEVEN: seven_section}


def _blocks(one):
    """Over all blocks except the first, which includes loading, and the end, which writes."""
    peaks = one["anonymous_mb_by_block"][1:-1]
    return f"{min(peaks)} to {max(peaks)}"


def _long(seconds):
    return f"{seconds / 60:.0f} minutes" if seconds < 5400 else f"{seconds / 3600:.1f} hours"


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("stages", nargs="*", metavar="STAGE", help=", ".join(STAGES))
    parser.add_argument("--work", type=Path, help="folder for 9 GB, kept (default: temporary)")
    args = parser.parse_args(arguments)
    if unknown := set(args.stages) - set(STAGES):
        parser.error(f"no stage named {', '.join(unknown)}; choose from {', '.join(STAGES)}")
    with tempfile.TemporaryDirectory() as temporary:
        work = args.work or Path(temporary)
        work.mkdir(parents=True, exist_ok=True)
        for stage in args.stages or STAGES:
            packages = "transformers", "safetensors"
            results.record(f"cli/{stage}", STAGES[stage](work), TARGET, packages)
    records = results.load()
    if keys() <= set(records):
        for section, text in SECTIONS.items():
            markdown.write(section, text(records))


if __name__ == "__main__":
    main()
