"""`make llama`: our GGUF files in llama.cpp, compared with the same weights in torch.

Writes the embedded model in each format. llama.cpp (in its own environment, see
tools/peers/llamacpp.py) predicts evaluation tokens and continues them; torch does the same with the
weights that transformers dequantizes from the same file. Records both in data/results.json, and
llama.cpp's log-probabilities in tests/llamacpp.json for the tests.

There is one difference: llama.cpp also quantizes the inputs of each linear layer to Q8_0, to
multiply integers. `quantized_inputs` does the same in torch, so that this effect can be measured
alone.
"""

import json
import subprocess
import tempfile
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import nn

from chapter13 import corpus, models, results
from chapter13.atomic import replacing
from chapter13.gguf_blocks import quantize
from chapter13.gguf_model import FILE_TYPES, write_model
from chapter13.quiet import silence_torchao
from tools import markdown

ROOT = Path(__file__).parent.parent
PEER = ROOT / ".peers" / "llamacpp" / "bin" / "python"
REFERENCE = ROOT / "tests" / "llamacpp.json"
TARGET = "make llama"
KEYS = {kind: f"llama.cpp {kind}" for kind in FILE_TYPES}
SECTION = markdown.section("llama", TARGET, "docs/peers.md")
SEQUENCES, LENGTH, NEW = 4, 128, 24


def keys():
    """The records that this program writes."""
    return set(KEYS.values())


@contextmanager
def quantized_inputs(model: nn.Module):
    """Inside the `with` block, inputs of linear layers are rounded to Q8_0, as in llama.cpp."""

    def rounded(_, inputs):
        return (quantize(inputs[0], "Q8_0").dequantize(),)

    linears = [module for module in model.modules() if isinstance(module, nn.Linear)]
    hooks = [module.register_forward_pre_hook(rounded) for module in linears]
    try:
        yield model
    finally:
        for hook in hooks:
            hook.remove()


def load(path: Path) -> nn.Module:
    """The model of a GGUF file, its weights dequantized by transformers, float32 on the CPU."""
    from transformers import AutoModelForCausalLM

    silence_torchao()
    where = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    return AutoModelForCausalLM.from_pretrained(
        **where, dtype=torch.float32, local_files_only=True
    ).eval()


def log_probabilities(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """The log-probability of each token but the first: float64 (sequences, length - 1)."""
    log_p = torch.log_softmax(logits[:, :-1].double(), -1)
    return log_p.gather(2, tokens[:, 1:, None])[:, :, 0]


def median_kl(reference: torch.Tensor, logits: torch.Tensor) -> float:
    """The median KL over all positions, in nats: a few positions depend on the last bit."""
    p, q = (torch.log_softmax(each.double(), -1) for each in (reference, logits))
    return (p.exp() * (p - q)).sum(-1).median().item()


def run_llamacpp(path: Path, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(logits, generated tokens) of llama.cpp."""
    given, output = path.with_suffix(".npy"), path.with_suffix(".npz")
    np.save(given, tokens.numpy())
    driver = ROOT / "tools" / "peers" / "llamacpp.py"
    subprocess.run([PEER, driver, path, given, output, str(NEW)], check=True)
    with np.load(output) as found:
        return torch.from_numpy(found["logits"]), torch.from_numpy(found["greedy"])


def measure(path: Path, tokens: torch.Tensor) -> tuple[dict, torch.Tensor]:
    """(the record of a file, llama.cpp's log-probabilities of the tokens)."""
    theirs, their_text = run_llamacpp(path, tokens)
    model = load(path)
    with torch.inference_mode():
        ours = model(tokens).logits
        with quantized_inputs(model):
            rounded = model(tokens).logits
        mask = torch.ones_like(tokens)
        text = model.generate(tokens, attention_mask=mask, max_new_tokens=NEW, do_sample=False)
    text = text[:, LENGTH:]
    same = (text == their_text).int().cumprod(1).sum(1)
    logs = {
        name: log_probabilities(logits, tokens)
        for name, logits in (("", ours), (" llama.cpp", theirs), (" Q8_0 inputs", rounded))
    }
    measured = {f"perplexity{name}": (-log.mean()).exp().item() for name, log in logs.items()}
    measured |= {
        "KL llama.cpp": median_kl(ours, theirs),
        "KL Q8_0 inputs": median_kl(ours, rounded),
        "same likeliest token": (ours.argmax(-1) == theirs.argmax(-1)).double().mean().item(),
        "written tokens alike": same.tolist(),
        "tokens": f"{SEQUENCES} x {LENGTH}, then {NEW} written",
        "megabytes": path.stat().st_size / 1e6,
    }
    return measured, logs[" llama.cpp"]


def table_section(records: dict) -> str:
    """The table that compares llama.cpp with torch, from data/results.json."""
    rows = [
        (
            "file",
            "MB",
            "perplexity, llama.cpp",
            "perplexity, ours",
            "KL of llama.cpp",
            "KL of Q8_0 inputs alone",
            "same top token",
            "identical greedy tokens",
        )
    ]
    for kind, key in KEYS.items():
        each = records[key]
        alike = ", ".join(str(count) for count in each["written tokens alike"])
        rows.append(
            (
                kind,
                f"{each['megabytes']:.1f}",
                f"{each['perplexity llama.cpp']:.2f}",
                f"{each['perplexity']:.2f}",
                f"{each['KL llama.cpp']:.4f}",
                f"{each['KL Q8_0 inputs']:.4f}",
                f"{each['same likeliest token']:.1%}",
                f"{alike} of {NEW}",
            )
        )
    where = markdown.where(each["environment"])
    version = f"llama-cpp-python {each['llama-cpp-python']}"
    return f"{markdown.table(rows)}\n\n{where}, {version}; tokens: {each['tokens']}.\n"


def main() -> None:
    if not PEER.exists():
        raise SystemExit("llama.cpp is not installed: run `make llama`")
    from transformers.utils import logging

    logging.disable_progress_bar()
    model, tokenizer = models.load(device="cpu")
    tokens = corpus.evaluation_tokens(tokenizer, SEQUENCES, LENGTH)
    version = subprocess.run(
        [PEER, "-c", "import llama_cpp; print(llama_cpp.__version__)"],
        capture_output=True, text=True, check=True,
    ).stdout.strip()  # fmt: skip
    reference = {"llama-cpp-python": version, "sequences": SEQUENCES, "length": LENGTH}
    with tempfile.TemporaryDirectory() as folder:
        for kind in FILE_TYPES:
            path = write_model(model, kind, Path(folder) / f"{kind}.gguf", models.gguf_path())
            measured, log_p = measure(path, tokens)
            measured["llama-cpp-python"] = version
            results.record(KEYS[kind], measured, TARGET, ("transformers", "gguf"))
            reference[kind] = [[round(x, 3) for x in row] for row in log_p.tolist()]
            print(kind, json.dumps(measured), flush=True)
    with replacing(REFERENCE) as part:
        part.write_text(json.dumps(reference) + "\n", encoding="utf-8")
    markdown.write(SECTION, table_section(results.load()))


if __name__ == "__main__":
    main()
