"""Code that the drivers of both peers share: commands in, tensors through safetensors, JSON out.

A driver runs in its peer's own environment and imports nothing of the course. It prints one line
of JSON on standard output; all output of the libraries goes to standard error.

    drive_PEER.py solve IN.safetensors OUT.safetensors [options]
    drive_PEER.py quantize MODEL_DIR TOKENS.safetensors OUT_DIR [options]
    drive_PEER.py logits CHECKPOINT_DIR TOKENS.safetensors OUT.safetensors [--through-transformers]
    drive_PEER.py many JOBS.json        a list of argument lists, answered by a list
"""

import argparse
import contextlib
import json
import os
import platform
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file


def main(solve, quantize, logits, packages):
    """Runs the command line with a peer's three functions; prints their results as JSON."""
    answer = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # includes the output of C code
    arguments = parser().parse_args()
    commands = {"solve": solve, "quantize": quantize, "logits": logits}
    if arguments.command == "many":
        jobs = json.loads(Path(arguments.jobs).read_text())
        result = [run(commands, parser().parse_args(job)) for job in jobs]
    else:
        result = run(commands, arguments)
    versions = {name: version(name) for name in ("torch", "transformers", *packages)}
    versions["python"] = platform.python_version()
    print(json.dumps({"result": result, "versions": versions}), file=answer, flush=True)


def run(commands, arguments):
    print(f"{arguments.command} {vars(arguments)}", file=sys.stderr, flush=True)
    return commands[arguments.command](arguments)


def parser():
    top = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = top.add_subparsers(dest="command", required=True)
    solve = commands.add_parser("solve", help="one linear layer, by the library's own solver")
    solve.add_argument("input", type=Path)
    solve.add_argument("output", type=Path)
    add_options(solve)
    quantize = commands.add_parser("quantize", help="a whole model, into the library's checkpoint")
    quantize.add_argument("model", type=Path)
    quantize.add_argument("tokens", type=Path)
    quantize.add_argument("output", type=Path)
    quantize.add_argument("--defaults", action="store_true", help="set only bits and group size")
    add_options(quantize)
    logits = commands.add_parser("logits", help="float32 logits of a checkpoint")
    logits.add_argument("checkpoint", type=Path)
    logits.add_argument("tokens", type=Path)
    logits.add_argument("output", type=Path)
    logits.add_argument("--through-transformers", action="store_true")
    many = commands.add_parser("many", help="many commands in one process")
    many.add_argument("jobs", type=Path)
    return top


def add_options(command):
    command.add_argument("--bits", type=int, default=4)
    command.add_argument("--group-size", type=int, default=64, help="-1: per channel")
    command.add_argument("--symmetric", action="store_true")
    command.add_argument("--act-order", action="store_true")
    command.add_argument("--static-groups", action="store_true")
    command.add_argument("--damp", type=float, default=0.01)


def read_problem(path):
    """(nn.Linear with the weight, inputs (tokens, in)) of a file with `weight` and `inputs`."""
    tensors = load_file(path)
    weight = tensors["weight"]
    layer = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    layer.weight.data = weight.clone()
    return layer, tensors["inputs"]


def write_solution(path, weight, inputs, solved, scale, zero, g_idx, seconds):
    """Writes codes, scales, zero points and the dequantized weight; returns the summary.

    `solved`: the dequantized weight (out, in); `scale`, `zero`: (out, groups); `g_idx`: (in,). The
    codes are computed from these; "exact" says whether they give the weight back bit for bit.
    """
    groups = g_idx.long()
    step, middle = scale.float()[:, groups], zero.float()[:, groups]
    codes = (solved.float() / step).round() + middle
    exact = torch.equal((codes - middle) * step, solved.float())
    difference = (weight.double() - solved.double()) @ inputs.double().T
    loss = difference.square().sum().item() / len(inputs)
    save_file(
        {
            "codes": codes.to(torch.int32).contiguous(),
            "scale": scale.float().contiguous(),
            "zero": zero.float().contiguous(),
            "g_idx": g_idx.to(torch.int32).contiguous(),
            "weight": solved.float().contiguous(),
        },
        path,
    )
    return {"loss": loss, "seconds": seconds, "exact": exact}


def read_tokens(path):
    """int64 (sequences, length)."""
    return load_file(path)["tokens"]


def write_logits(path, model, tokens):
    """float32 logits (sequences, length, vocabulary), one sequence at a time."""
    with torch.inference_mode():
        rows = [model(input_ids=row[None], use_cache=False).logits[0].float() for row in tokens]
    save_file({"logits": torch.stack(rows)}, path)


def linear_kind(model):
    """The kernel: the class that multiplies by the quantized weights, with its module."""
    kinds = {
        f"{type(module).__module__}.{type(module).__name__}"
        for module in model.modules()
        if hasattr(module, "qweight")
    }
    return ", ".join(sorted(kinds))


class Clock:
    """Seconds since it was made, and the process's peak memory in MB."""

    def __init__(self):
        self.start = time.perf_counter()

    def read(self):
        seconds = time.perf_counter() - self.start
        # not getrusage, whose peak includes that of the parent process
        status = Path("/proc/self/status").read_text()
        peak = int(status.partition("VmHWM:")[2].split()[0]) * 1024
        return {"seconds": seconds, "peak_mb": peak / 1e6}


@contextlib.contextmanager
def readable_by_old_transformers(folder):
    """The model's folder, or a folder of links to it, with `rope_theta` in its config.json.

    transformers 5 writes the base of the rotary positions into `rope_parameters`; transformers 4
    does not know that key, uses its default instead, and silently computes another model.
    """
    folder = folder.absolute()
    config = json.loads((folder / "config.json").read_text())
    parameters = config.get("rope_parameters") or {}
    if "rope_theta" in config or "rope_theta" not in parameters:
        yield folder
        return
    config["rope_theta"] = parameters["rope_theta"]
    with tempfile.TemporaryDirectory() as temporary:
        for path in folder.iterdir():
            if path.name != "config.json":
                (Path(temporary) / path.name).symlink_to(path)
        (Path(temporary) / "config.json").write_text(json.dumps(config))
        yield Path(temporary)
