"""`make bench-large`: the command line on a billion parameters, and what 7B would cost.

Writes checkpoints with random weights in bfloat16, in several files: one of the shape of Llama 3.2
1B (but for the vocabulary, which is the embedded model's), and one with two blocks of the shape of
Llama 2 7B. Quantizes them with `python -m chapter13`, interrupts and kills it on the way, and
watches its memory from outside: anonymous pages are what a run really adds; pages of mapped files
are given back when others need the memory. Goes to data/results.json ("cli/..."), and from
there into the README.

    python tools/bench_large.py                 everything, in a temporary folder
    python tools/bench_large.py gptq --work DIR     only this: example, absmax, gptq, seven
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

sys.path.insert(0, str(results.FILE.parent.parent))  # a script finds its own folder alone
from tools import readme

SECTION = readme.section("large", "make bench-large")
KEY = "cli/"  # and the stage: each was measured on a machine and a day of its own
SHAPES = {  # blocks, hidden size, of the MLP, heads, of them with keys and values of their own
    "1b": (16, 2048, 8192, 32, 8),
    "7b": (2, 4096, 11008, 32, 32),
}
BLOCKS_OF_7B = 32


def make_checkpoint(folder, shape):
    """A random model in bfloat16, two blocks a file; returns the number of its parameters."""
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
    """One run of the command line, watched until it ends or is ended."""

    def __init__(self, model, out, method, end=None):
        """`end`: (signal, block) sends the signal when so many blocks are in their files."""
        blocks = out.with_name(f"{out.name}.unfinished") / "blocks"
        command = [sys.executable, "-m", "chapter13", "quantize", str(model), str(out)]
        self.anonymous_mb = self.file_mb = self.total_mb = 0
        self.peaks: dict[int, int] = {}
        """Largest anonymous memory while a block is under way, by its number."""
        self.seconds_at: dict[int, float] = {}
        """Seconds from the start until so many blocks were in their files."""
        start, cpu = time.perf_counter(), _cpu_seconds()
        process = subprocess.Popen(
            [*command, "--method", method],
            cwd=readme.FILE.parent,
            # a shell's background jobs ignore SIGINT, and so would this one
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
            lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        except OSError:
            return
        pages = {line.split(":")[0]: int(line.split()[1]) for line in lines if "Rss" in line}
        if "RssAnon" not in pages:
            return
        anonymous, files = pages["RssAnon"] // 1000, pages["RssFile"] // 1000
        self.anonymous_mb = max(self.anonymous_mb, anonymous)
        self.file_mb = max(self.file_mb, files)
        self.total_mb = max(self.total_mb, anonymous + files)
        self.peaks[finished] = max(self.peaks.get(finished, 0), anonymous)
        self.seconds_at.setdefault(finished, seconds)

    def measured(self):
        """The numbers that go on record."""
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
    """Of all processors together, by children that have ended."""
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
    """Interrupted after a quarter of the blocks, killed after half, then let through."""
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
    """Two blocks of a 7B model, measured; and 32 of them, by multiplication."""
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
    """The README's example: the embedded model by GPTQ, and what the evaluation prints."""
    run = Run("smollm2-135m", work / "smollm2-gptq", "gptq")
    assert run.code == 0
    command = [sys.executable, "-m", "chapter13", "evaluate", str(work / "smollm2-gptq")]
    printed = subprocess.run(
        [*command, "--reference", "smollm2-135m"],
        cwd=readme.FILE.parent,
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


def readme_section(records):
    """What the README says about it, from data/results.json: of the stages that were measured."""
    stages = {stage: records[KEY + stage] for stage in STAGES if KEY + stage in records}
    return "\n".join(text(stages) for stage, text in TEXTS.items() if stage in stages)


def example_text(stages):
    example = stages["example"]
    printed = "\n".join(example["printed"])
    return (
        f"The first took {example['seconds']:.0f} seconds on {example['environment']['machine']}, "
        f"the second prints\n\n```\n{printed}\n```\n"
    )


def large_text(stages):
    methods = {name: stages[name] for name in METHODS if name in stages}
    rows = [("", *(METHODS[method] for method in methods)), ("---",) * (1 + len(methods))]

    def row(what, value):
        rows.append((what, *(value(one) for one in methods.values())))

    row("machine", lambda one: f"{one['environment']['machine']}, {one['environment']['date']}")
    row("torch", lambda one: one["environment"]["versions"]["torch"])
    row("time", lambda one: f"{one['seconds'] / 60:.1f} minutes")
    row("time of a processor", lambda one: f"{one['cpu_seconds'] / 60:.1f} minutes")
    row("memory of its own while blocks are quantized", lambda one: f"{_blocks(one)} MB")
    row("at most, loading and writing included", lambda one: f"{one['anonymous_mb']} MB")
    row("pages of mapped files beside it", lambda one: f"{one['file_mb']} MB")
    row("written", lambda one: f"{one['out_mb']} MB")
    words = "absmax was interrupted on the way and killed later: the same bytes as unbroken."
    if "gptq" in methods:
        words += " GPTQ was broken off likewise, and went on; its time is that of all three runs."
    return (
        "A model of a billion parameters (`make bench-large`): the shape of Llama 3.2 1B with the "
        "embedded model's vocabulary, 1.07 billion random weights in bfloat16, in 9 files, 2.1 GB. "
        "Time is by the clock, on a machine that may have had other work; that of a processor is "
        "the run's own. Pages of mapped files are taken back by the system when others need the "
        f"memory; what a run needs is memory of its own.\n\n{readme.table(rows)}\n\n{words}\n"
    )


def seven_text(stages):
    seven, where = stages["seven"]["methods"], stages["seven"]["environment"]
    rows = [("", *(METHODS[method] for method in seven)), ("---",) * (1 + len(seven))]

    def row(what, value):
        rows.append((what, *(value(one) for one in seven.values())))

    row("a block, measured", lambda one: f"{one['seconds_per_block']:.0f} s")
    row("memory of its own, at most, measured", lambda one: f"{one['anonymous_mb']} MB")
    row(f"{BLOCKS_OF_7B} blocks, extrapolated", lambda one: _long(one["seconds_of_7b"]))
    return (
        f"And 7B, on {where['machine']}, extrapolated from two blocks of the shape of Llama 2 7B: "
        f"the time of the second times {BLOCKS_OF_7B}, that of writing by its share, and loading. "
        f"Memory is that of a block, however many there are.\n\n{readme.table(rows)}\n"
    )


TEXTS = {"example": example_text, "absmax": large_text, "seven": seven_text}
METHODS = {"absmax": "absmax", "gptq": "GPTQ, 16 x 256 tokens"}


def _blocks(one):
    """Over all blocks but the first, which comes with loading, and the end, with writing."""
    peaks = one["anonymous_mb_by_block"][1:-1]
    return f"{min(peaks)} to {max(peaks)}"


def _long(seconds):
    return f"{seconds / 60:.0f} minutes" if seconds < 5400 else f"{seconds / 3600:.1f} hours"


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("stages", nargs="*", metavar="STAGE", help=", ".join(STAGES))
    parser.add_argument("--work", type=Path, help="a folder for 9 GB; kept (default: temporary)")
    args = parser.parse_args(arguments)
    if unknown := set(args.stages) - set(STAGES):
        parser.error(f"no stage called {', '.join(unknown)}; there are: {', '.join(STAGES)}")
    with tempfile.TemporaryDirectory() as temporary:
        work = args.work or Path(temporary)
        work.mkdir(parents=True, exist_ok=True)
        for stage in args.stages or STAGES:
            results.record(KEY + stage, STAGES[stage](work), ("transformers", "safetensors"))
            readme.write(SECTION, readme_section(results.load()))


if __name__ == "__main__":
    main()
