"""The command line: quantize a model of your own, block by block, and measure what it lost.

    python -m chapter13 quantize MODEL OUT --method gptq
    python -m chapter13 evaluate OUT --reference MODEL

Integer grids go out as a GPTQ checkpoint, which other programs load too; NF4 and FP4, for which
there is no such format, as a safetensors file of our own beside config and tokenizer.

The weights stay in their mapped files, as they are: in memory there is about one block in float32
at a time. What is finished lies in OUT.unfinished, from which an interrupted run goes on; OUT
appears when all is done.
"""

import argparse
import json
import shutil
import sys
import warnings
from contextlib import contextmanager
from pathlib import Path

import torch

from chapter13 import checkpoint, corpus, evaluate, models
from chapter13.quantize import LEARNED, ROUNDING, check_groups, quantize_model, report
from chapter13.tables import CODE_BOOKS
from chapter13.whole_model import storage
from chapter13.whole_model.layers import linear_layers, weight_of
from chapter13.whole_model.walk import outside_blocks

DEVICE = "cpu, cuda, ...; default: CHAPTER13_DEVICE if it is set, else the GPU if there is one"
OWN = "quantized.safetensors"  # in a folder with NF4 or FP4
OPTIONS = {  # which option belongs to which methods
    "double_quant": tuple(CODE_BOOKS),
    "symmetric": ("gptq",),
    "act_order": ("gptq",),
    "damp": ("gptq",),
    "clip_search": ("gptq",),
    "calibration_sequences": tuple(LEARNED),
    "calibration_length": tuple(LEARNED),
    "calibration_file": tuple(LEARNED),
    "format": tuple(method for method in (*LEARNED, *ROUNDING) if method not in CODE_BOOKS),
}


def main(arguments: list[str] | None = None) -> int:
    """Runs a command; returns its exit code: 0, 1 for an error, 130 where it was interrupted."""
    parser = _parser()
    args = parser.parse_args(arguments)
    if args.run is quantize_command:
        _check_options(parser, args)
    warnings.showwarning = lambda message, *_, **__: _say(f"warning: {message}")
    from safetensors import SafetensorError

    try:
        args.run(args)
    except Exception as error:
        expected = isinstance(error, (ValueError, OSError, ImportError, SafetensorError))
        if not expected and "No space left" not in str(error):  # tokenizers raise bare Exceptions
            raise
        _say(f"error: {' '.join(str(error).split())}")  # some of transformers' are paragraphs
        return 1
    except KeyboardInterrupt:
        _say("Interrupted.")
        return 130
    return 0


def quantize_command(args: argparse.Namespace) -> None:
    """Writes the quantized model to `args.out`, or raises and leaves what is finished beside it."""
    out, integer = args.out, args.method not in CODE_BOOKS
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FileExistsError(f"{out} exists and is not empty: name another folder")
    text = args.calibration_file and corpus.read_text(args.calibration_file)
    _check_model(args, integer)

    model, tokenizer = models.load(args.model, args.device, mapped=True)
    options = {
        name: getattr(args, name)
        for name in ("double_quant", "symmetric", "act_order", "damp", "clip_search")
        if getattr(args, name) is not None
    }
    if args.method in LEARNED:
        size = args.calibration_sequences or 16, args.calibration_length or 256
        options["calibration"] = (
            corpus.calibration_tokens(tokenizer, *size)
            if text is None
            else corpus.text_tokens(tokenizer, text, *size)
        )
    with _unfinished(out) as folder:
        quantize_model(
            model, args.method, args.bits, args.group_size, resume=folder / "blocks", **options
        )
        _say(report(model))
        result = folder / "result"
        if integer:
            checkpoint.save_gptq(model, result, tokenizer, _format(args))
        else:
            _save_own(model, tokenizer, result)
        if out.exists():
            out.rmdir()  # it is empty, or an error
        result.rename(out)
    size = sum(file.stat().st_size for file in out.iterdir())
    _say(
        f"{out}: {size / 1e6:.0f} MB. What it lost: python -m chapter13 evaluate {out} "
        f"--reference {args.model}"
    )


def evaluate_command(args: argparse.Namespace) -> None:
    """Prints perplexity and, beside a reference, KL divergence, with 95% intervals."""
    model, tokenizer = _open(args.model, args.device)
    tokens = corpus.evaluation_tokens(tokenizer, args.sequences, args.length)
    _check_length(model.config, args.length)
    reference = args.reference and _open(args.reference, args.device)[0]
    print(report(model))
    if not reference:
        print(f"perplexity: {evaluate.perplexity(model, tokens)!r}")
        return
    ours, divergence = evaluate.perplexity_and_kl(model, reference, tokens)
    print(f"perplexity: {ours!r}")
    theirs = evaluate.perplexity(reference, tokens)
    print(f"perplexity of the reference: {theirs!r}")
    print(f"difference, nats per token: {evaluate.difference(ours, theirs)!r}")
    print(f"KL divergence, nats per token: {divergence!r}")


def _open(name: str, device: torch.device | None):
    """A model and its tokenizer: quantized by us, a GPTQ checkpoint, or as `models.load` has it."""
    folder, kind = Path(name), _kind(name)
    if kind is None:
        return models.load(name, device, mapped=True)
    from transformers import AutoTokenizer

    if kind == "gptq":
        model = checkpoint.load_gptq(folder)
    else:
        model = storage.load_quantized(models.skeleton(folder), folder / OWN)
        models.compute_in_float32(model)
    tokenizer = AutoTokenizer.from_pretrained(
        folder, trust_remote_code=False, local_files_only=True
    )
    return model.to(models.find_device(device)), tokenizer


def _kind(name: str) -> str | None:
    """What a folder holds: "gptq", "own", or None for a model that is not quantized."""
    folder = Path(name)
    if not folder.is_dir():
        return None
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder} holds no model: it has no config.json")
    if (folder / OWN).is_file():
        return "own"
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return "gptq" if config.get("quantization_config") else None


def _check_model(args: argparse.Namespace, integer: bool) -> None:
    """Raises ValueError where the method does not fit the model, before its weights are fetched."""
    if _kind(args.model):
        raise ValueError(f"{args.model} is quantized already: name the model that it came from")
    hollow = models.skeleton(args.model)
    if outside := outside_blocks(hollow):
        raise ValueError(
            f"{args.model} has {len(outside)} linear layers outside its blocks, first "
            f"{outside[0]}, which this command does not reach"
        )
    if integer:
        check_groups(hollow, args.group_size)
        for name, layer in linear_layers(hollow).items():
            checkpoint.check_shape(name, weight_of(layer).shape)
    if args.method in LEARNED:
        _check_length(hollow.config, args.calibration_length or 256)


def _check_length(config, length: int) -> None:
    limit = getattr(config.get_text_config(), "max_position_embeddings", None)
    if limit and length > limit:
        raise ValueError(f"sequences of {length} tokens: this model takes {limit} at most")


def _check_options(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Ends the program (exit code 2) for options that do not go together."""
    method, bits = args.method, args.bits
    for name, methods in OPTIONS.items():
        if getattr(args, name) is not None and method not in methods:
            option = "--no-act-order" if name == "act_order" else f"--{name.replace('_', '-')}"
            parser.error(f"{option} belongs to {', '.join(methods)}, not to {method}")
    if method in CODE_BOOKS:
        if bits != 4:
            parser.error(f"{method} is a table of 16 values: it takes --bits 4, not {bits}")
        if not isinstance(args.group_size, int):
            parser.error(f"{method} takes blocks of so many weights: give --group-size a number")
    elif bits not in checkpoint.BITS:
        held = ", ".join(map(str, checkpoint.BITS))
        parser.error(f"--bits must be one of {held}, which the GPTQ format holds, not {bits}")


def _format(args: argparse.Namespace) -> str:
    """The one asked for, or the one that the programs of today read for this grid."""
    symmetric = args.method == "absmax" or args.symmetric
    return args.format or ("gptq" if symmetric else "gptq_v2")


@contextmanager
def _unfinished(out: Path):
    """The folder beside OUT that keeps what is finished; it goes when all is done."""
    from filelock import FileLock, Timeout

    folder = out.with_name(f"{out.name}.unfinished")
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(folder / ".lock", timeout=0):
            # what a killed run left half written
            for leftover in (*folder.glob("*result*"), *folder.glob("blocks/.*.part")):
                shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
            try:
                yield folder
            except BaseException as error:
                if not any(folder.glob("blocks/block-*")):
                    shutil.rmtree(folder, ignore_errors=True)
                elif not isinstance(error, ValueError):
                    _say(f"{folder} keeps the finished blocks: the same command goes on from there")
                raise
    except Timeout:
        raise ValueError(f"another run is writing to {folder}") from None
    shutil.rmtree(folder, ignore_errors=True)


def _save_own(model, tokenizer, folder: Path) -> None:
    folder.mkdir()
    storage.save_quantized(model, folder / OWN)
    model.config.save_pretrained(folder)
    if model.generation_config is not None:
        model.generation_config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _size(text: str) -> int | str:
    if text == "channel":
        return text
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f'a positive number or "channel", not {text!r}')
    return int(text)


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"a positive number, not {text!r}")
    return int(text)


def _device(text: str) -> torch.device:
    try:
        return models.find_device(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _damp(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"a number of 0 or more, not {text!r}")
    return value


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m chapter13",
        description="Quantize a causal language model of your own, and measure what it lost. "
        "MODEL is smollm2-135m (the course's embedded model), the id of a model on the Hugging "
        "Face hub, or a folder that holds one.",
    )
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    quantize = commands.add_parser(
        "quantize",
        help="write a quantized model, block by block",
        description="Quantize the linear layers of a model and write it to the folder OUT. absmax, "
        "affine, gptq and awq give a checkpoint in the GPTQ format, nf4 and fp4 a file of our own. "
        "An interrupted run goes on when the same command is given again.",
    )
    quantize.set_defaults(run=quantize_command)
    quantize.add_argument("model", metavar="MODEL", help="name, hub id or folder")
    quantize.add_argument("out", metavar="OUT", type=Path, help="a folder that is not there yet")
    add = quantize.add_argument
    add("--method", required=True, choices=(*LEARNED, *ROUNDING))
    add("--bits", type=_positive, default=4, help="2, 3, 4 or 8 (default: 4)")
    add(
        "--group-size",
        type=_size,
        default=64,
        metavar="N",
        help='weights that share a scale, or "channel": one scale a row (default: 64)',
    )
    add(
        "--format",
        choices=checkpoint.FORMATS,
        help="of the GPTQ checkpoint; the default is what "
        "GPTQModel and transformers read: gptq for symmetric grids, gptq_v2 for others. AutoGPTQ "
        "reads gptq alone",
    )
    add("--device", type=_device, help=DEVICE)
    learning = quantize.add_argument_group("methods that learn from text")
    add = learning.add_argument
    add("--calibration-sequences", type=_positive, metavar="N", help="default: 16")
    add("--calibration-length", type=_positive, metavar="N", help="tokens of each (default: 256)")
    add(
        "--calibration-file",
        type=Path,
        metavar="TEXT",
        help="your own text, UTF-8 (default: the course's news)",
    )
    own = quantize.add_argument_group("options of single methods")
    add = own.add_argument
    add("--symmetric", action="store_true", default=None, help="gptq: zero point in the middle")
    add(
        "--no-act-order",
        dest="act_order",
        action="store_false",
        default=None,
        help="gptq: columns from left to right, not the largest inputs first",
    )
    add(
        "--damp",
        type=_damp,
        metavar="X",
        help="gptq: added to the Hessian's diagonal, as a share of its mean (default: 0.01)",
    )
    add("--clip-search", action="store_true", default=None, help="gptq: try narrower ranges too")
    add(
        "--double-quant",
        action="store_true",
        default=None,
        help="nf4, fp4: quantize the scales as well",
    )

    measure = commands.add_parser(
        "evaluate",
        help="measure a model, quantized or not",
        description="Perplexity on encyclopedia text and, with a reference, KL divergence, each "
        "with its 95%% interval. MODEL may also be what `quantize` wrote, or a GPTQ checkpoint.",
    )
    measure.set_defaults(run=evaluate_command)
    add = measure.add_argument
    add("model", metavar="MODEL", help="name, hub id or folder")
    add("--reference", metavar="MODEL", help="the model before it was quantized")
    add("--sequences", type=_positive, default=16, metavar="N", help="default: 16")
    add("--length", type=_positive, default=256, metavar="N", help="tokens of each (default: 256)")
    add("--device", type=_device, help=DEVICE)
    return parser


if __name__ == "__main__":
    sys.exit(main())
