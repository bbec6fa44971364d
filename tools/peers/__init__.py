"""Runs AutoGPTQ and GPTQModel, each in its own environment, through a small driver.

`make peers` builds the environments in .peers/. The drivers run there (see drive.py); this file
calls them from the course:

    run("autogptq", "solve", "in.safetensors", "out.safetensors", "--group-size", "-1")
"""

import json
import os
import subprocess
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
ENVIRONMENTS = ROOT / ".peers"
VERSIONS = {"autogptq": "0.7.1", "gptqmodel": "7.4.0"}


class NoPeer(Exception):
    """A peer's environment is missing; the message says what to do."""


def python(peer: str) -> Path:
    """The Python of a peer's environment. Raises NoPeer if `make peers` did not build it."""
    if peer not in VERSIONS:
        raise ValueError(f"there is no peer {peer!r}; choose from {', '.join(VERSIONS)}")
    path = ENVIRONMENTS / peer / "bin" / "python"
    if not (ENVIRONMENTS / peer / "installed").exists():
        raise NoPeer(f"{peer} is not installed in {ENVIRONMENTS / peer}: run `make peers`")
    return path


def run(peer: str, *arguments, threads: int | None = None) -> dict:
    """Runs a command of a peer's driver; returns its JSON, {"result": ..., "versions": ...}.

    `threads`: for torch in that process; None leaves it to torch. The library's own output is only
    shown if it fails. Raises NoPeer, and RuntimeError with the end of that output.
    """
    driver = Path(__file__).with_name(f"drive_{peer}.py")
    command = [str(python(peer)), str(driver), *map(str, arguments)]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONNOUSERSITE": "1"}
    environment.pop("PYTHONPATH", None)
    if threads:
        environment["OMP_NUM_THREADS"] = str(threads)
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise RuntimeError(f"{peer} failed: {' '.join(command)}\n{done.stderr[-4000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def run_many(peer: str, jobs: list[list], threads: int | None = None) -> dict:
    """Runs several commands in one process, because most take less time than importing a peer.

    Returns {"result": [one for each job], "versions": ...}. Raises as `run`.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "jobs.json"
        path.write_text(json.dumps([[str(word) for word in job] for job in jobs]))
        return run(peer, "many", path, threads=threads)


def cut(model, folder: Path | str, blocks: int = 2) -> Path:
    """Writes the first `blocks` blocks of a Llama-type model as a new model; returns its folder.

    `model`: of transformers; it is not changed. Embeddings, last norm and head stay, so the result
    computes with real tokens and weights in a fraction of the time, but its text makes no sense.
    """
    import copy

    config = copy.deepcopy(model.config)
    config.num_hidden_layers = blocks
    small = type(model)(config)
    state = model.state_dict()
    small.load_state_dict({name: state[name] for name in small.state_dict()})
    small.save_pretrained(folder)
    return Path(folder)
