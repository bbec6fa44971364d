"""The command line: quantize your own model, block by block, and measure what it lost.

    python -m chapter13 quantize MODEL OUT --method gptq
    python -m chapter13 evaluate OUT --reference MODEL

Integer grids are written as a GPTQ checkpoint, which other programs load too. NF4 and FP4 do not
fit that format; they are written as a safetensors file in the course's own format, with config and
tokenizer beside it.

The weights stay unchanged in their mapped files; about one block at a time is in memory, in
float32. Finished blocks are in OUT.unfinished (in OUT/.unfinished if OUT is already an empty
folder), from which an interrupted run resumes. OUT becomes a model only at the end.
"""

import argparse
import os
import shlex
import shutil
import sys
import warnings
from contextlib import contextmanager
from pathlib import Path

import torch

from chapter13 import checkpoint, corpus, evaluate, folders, models, summary
from chapter13.fetch.download import require
from chapter13.gptq_words import BITS, FORMATS, check_shape
from chapter13.memory import linear_bytes
from chapter13.model_files import load_tokenizer
from chapter13.quantize import LEARNED, ROUNDING, check_groups, quantize_model, report
from chapter13.tables import CODE_BOOKS
from chapter13.whole_model.layers import check_all_reached, linear_layers, weight_of
from chapter13.whole_model.walk import outside_blocks

DEVICE = "cpu, cuda, ...; default: CHAPTER13_DEVICE if it is set, else the GPU if there is one"
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
    """Runs a command; returns its exit code: 0, 1 for an error, 130 if it was interrupted."""
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
        _say(f"error: {' '.join(str(error).split())}")  # some of transformers' have many lines
        return 1
    except KeyboardInterrupt:
        _say("Interrupted.")
        return 130
    return 0


def quantize_command(args: argparse.Namespace) -> None:
    """Writes the quantized model to `args.out`, or raises and keeps the finished blocks."""
    _check_out(args)
    text = args.calibration_file and corpus.read_text(args.calibration_file)
    with _unfinished(args.out) as folder:
        skeleton = _check_model(args)
        _check_room(skeleton, args, folder)
        del skeleton
        model, tokenizer = models.load(args.model, args.device, mapped=True)
        _quantize(model, tokenizer, text, args, folder)
        result = folder / "result"
        if args.method in CODE_BOOKS:
            folders.save_own(model, tokenizer, result)
        else:
            checkpoint.save_gptq(model, result, tokenizer, _format(args))
            folders.forget_other_files(result)
        folders.move_in(result, args.out, but=[folder.name])
    size = sum(file.stat().st_size for file in args.out.iterdir() if file.is_file())
    command = shlex.join(["evaluate", str(args.out), "--reference", args.model])
    _say(f"{args.out}: {size / 1e6:.0f} MB. To measure the loss: python -m chapter13 {command}")


def _quantize(model, tokenizer, text: str | None, args: argparse.Namespace, folder: Path) -> None:
    """Quantizes a model in place; its blocks are then mapped from files in `folder`."""
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
    quantize_model(
        model, args.method, args.bits, args.group_size, resume=folder / "blocks", **options
    )
    _say(report(model))


def evaluate_command(args: argparse.Namespace) -> None:
    """Prints perplexity and, with a reference, KL divergence, with 95% intervals.

    With `args.recorded` it also prints the summary table's values for the same sequences.
    """
    recorded = _recorded(args)
    if args.reference:
        folders.kind(args.reference)  # raises now rather than after the model is read
    model, tokenizer = _open(args.model, args.device)
    tokens = corpus.evaluation_tokens(tokenizer, args.sequences, args.length)
    if recorded and not torch.equal(tokens, _embedded_tokens(args.sequences)):
        raise ValueError(
            f"{args.model} has a different tokenizer from {models.EMBEDDED}, for which the summary "
            "table was measured: leave out --recorded"
        )
    _check_length(model.config, args.length)
    reference = args.reference and _open(args.reference, args.device)[0]
    print(report(model))
    if reference:
        ours, divergence = evaluate.perplexity_and_kl(model, reference, tokens)
    else:
        ours, divergence = evaluate.perplexity(model, tokens), None
    print(f"perplexity: {ours!r}")
    if reference:
        theirs = evaluate.perplexity(reference, tokens)
        print(f"perplexity of the reference: {theirs!r}")
        print(f"difference, nats per token: {evaluate.difference(ours, theirs)!r}")
        print(f"KL divergence, nats per token: {divergence!r}")
    if recorded:
        print(f"recorded, {recorded.name}, on the same sequences:")
        _compare("perplexity", ours, recorded.perplexity)
        if divergence:
            _compare("KL divergence, nats per token", divergence, recorded.kl)


def _recorded(args: argparse.Namespace) -> summary.Row | None:
    """The row to compare with; ValueError, before any work, if it lacks these sequences."""
    if args.recorded is None:
        return None
    sequences, length = corpus.EVALUATION
    if args.length != length or args.sequences > sequences:
        raise ValueError(
            f"--recorded compares with the summary table's {sequences} sequences of {length} "
            f"tokens, not with {args.sequences} of {args.length}: leave out --length, and set "
            f"--sequences to {sequences} at most"
        )
    return summary.row(args.recorded)


def _embedded_tokens(sequences: int) -> torch.Tensor:
    tokenizer = load_tokenizer(str(require(models.EMBEDDED)), {"local_files_only": True})
    return corpus.evaluation_tokens(tokenizer, sequences)


def _compare(what: str, measured: evaluate.Score, recorded: evaluate.Score) -> None:
    recorded = recorded.first(len(measured.losses))
    print(f"    {what}: {recorded!r}")
    print(f"    difference, nats per token: {evaluate.difference(measured, recorded)!r}")


_open = folders.open_model


def _check_out(args: argparse.Namespace) -> None:
    """Raises ValueError if OUT is the model's own folder, or the name of a model."""
    if all(map(os.path.isdir, (args.out, args.model))) and args.out.samefile(args.model):
        raise ValueError(f"{args.out} is the model's own folder: name another folder")
    if args.out in (Path(args.model), Path(models.EMBEDDED)):
        raise ValueError(f"{args.out} is the name of a model: name another folder for the new one")


def _check_model(args: argparse.Namespace) -> torch.nn.Module:
    """The model without weights; ValueError if the method does not fit it."""
    if folders.kind(args.model) != "plain":
        raise ValueError(f"{args.model} is quantized already: name the model that it came from")
    skeleton = models.skeleton(args.model)
    if outside := outside_blocks(skeleton):
        raise ValueError(
            f"{args.model} has {len(outside)} linear layers outside its blocks, which this command "
            f"cannot quantize; the first is {outside[0]}"
        )
    check_all_reached(skeleton)
    if args.method not in CODE_BOOKS:
        checkpoint.file_names(skeleton)  # raises now rather than after the quantization
        check_groups(skeleton, args.group_size)
        for name, layer in linear_layers(skeleton).items():
            check_shape(name, weight_of(layer).shape)
    if args.method in LEARNED:
        _check_length(skeleton.config, args.calibration_length or 256)
    return skeleton


def _check_room(skeleton: torch.nn.Module, args: argparse.Namespace, folder: Path) -> None:
    """Raises OSError if the disk has too little room for the finished blocks and the result."""
    layers = {name: weight_of(layer) for name, layer in linear_layers(skeleton).items()}
    form = f"int{args.bits}"
    if args.method in CODE_BOOKS:
        form = "nf4+dq" if args.double_quant else "nf4"
    quantized = sum(sum(linear_bytes(w.shape, form, args.group_size)) for w in layers.values())
    # format "gptq" stores tied weights twice, for AutoGPTQ
    copies = args.method not in CODE_BOOKS and _format(args) == "gptq"
    kept = {
        name if copies else id(tensor): tensor.numel()
        for name, tensor in skeleton.state_dict(keep_vars=True).items()
        if name.rpartition(".")[0] not in layers
    }
    # if config.json has no data type, that of the files counts: at least two bytes
    width = getattr(skeleton.config.get_text_config().dtype, "itemsize", 2)
    finished = sum(file.stat().st_size for file in folder.glob("blocks/block-*"))
    needed = max(quantized - finished, 0) + quantized + sum(kept.values()) * width
    disk = shutil.disk_usage(folder)
    if disk.total and needed > disk.free:  # some network drives report 0
        raise OSError(
            f"No space left for {args.out}: finished blocks and result need about "
            f"{needed / 1e6:.1f} MB, {disk.free / 1e6:.1f} MB are free there"
        )


def _check_length(config, length: int) -> None:
    limit = getattr(config.get_text_config(), "max_position_embeddings", None)
    if limit and length > limit:
        raise ValueError(
            f"sequences of {length} tokens are too long: this model takes {limit} at most"
        )


def _check_options(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Ends the program (exit code 2) for options that do not go together."""
    method, bits = args.method, args.bits
    for name, methods in OPTIONS.items():
        if getattr(args, name) is not None and method not in methods:
            option = "--no-act-order" if name == "act_order" else f"--{name.replace('_', '-')}"
            parser.error(f"{option} is an option of {', '.join(methods)}, not of {method}")
    if method in CODE_BOOKS:
        if bits != 4:
            parser.error(f"{method} is a table of 16 values: it takes --bits 4, not {bits}")
        if not isinstance(args.group_size, int):
            parser.error(f"{method} has blocks, not channels: --group-size must be a number")
    elif bits not in BITS:
        held = ", ".join(map(str, BITS))
        parser.error(f"--bits must be one of {held}, as the GPTQ format requires, not {bits}")


def _format(args: argparse.Namespace) -> str:
    """The requested format, or the one that GPTQModel and transformers read for this grid."""
    symmetric = args.method == "absmax" or args.symmetric
    return args.format or ("gptq" if symmetric else "gptq_v2")


@contextmanager
def _unfinished(out: Path):
    """The folder beside or in OUT that keeps finished work; it is removed at the end."""
    from filelock import FileLock, Timeout

    folder = folders.run_folder(out)
    new = folders.make_run_folder(folder)
    try:
        with FileLock(folder / ".lock", timeout=0):
            folders.clear_half_moved(folder, out)
            # files that a killed run left incomplete
            for leftover in (*folder.glob("*result*"), *folder.glob("blocks/.*.part")):
                shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
            try:
                yield folder
            except BaseException as error:
                if not any(folder.glob("blocks/block-*")):
                    shutil.rmtree(folder, ignore_errors=True)
                    folders.remove_empty(new)
                elif not isinstance(error, ValueError):
                    _say(f"{folder} keeps the finished blocks: the same command resumes from them")
                raise
    except Timeout:
        raise ValueError(f"another run is writing to {folder}") from None
    shutil.rmtree(folder, ignore_errors=True)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _out(text: str) -> Path:
    if not text:
        raise argparse.ArgumentTypeError("the name of a folder is needed, and this one is empty")
    try:
        text.encode()
    except UnicodeEncodeError:  # the system gave a name in another encoding
        raise argparse.ArgumentTypeError(
            f"{ascii(text)} is not UTF-8, but names of files must be: name another folder"
        ) from None
    path = Path(text)
    # a folder before ".." need not exist
    return Path(os.path.realpath(path)) if ".." in path.parts else path


def _size(text: str) -> int | str:
    if text == "channel":
        return text
    if not text.isdecimal() or int(text) < 1:
        other = ", which is -1 in other programs" if text == "-1" else ""
        raise argparse.ArgumentTypeError(
            f'it must be a positive number or "channel"{other}, not {text!r}'
        )
    return int(text)


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"it must be a positive number, not {text!r}")
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
        raise argparse.ArgumentTypeError(f"it must be a number of 0 or more, not {text!r}")
    return value


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m chapter13",
        description="Quantize your own causal language model and measure what it lost. MODEL is "
        "smollm2-135m (the course's embedded model), the id of a model on the Hugging Face hub, or "
        "the folder of a model.",
    )
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    quantize = commands.add_parser(
        "quantize",
        help="write a quantized model, block by block",
        description="Quantize the linear layers of a model and write the model to the folder OUT. "
        "absmax, affine, gptq and awq write a checkpoint in the GPTQ format, nf4 and fp4 a file in "
        "the course's own format. To resume an interrupted run, give the same command again.",
    )
    quantize.set_defaults(run=quantize_command)
    quantize.add_argument("model", metavar="MODEL", help="name, hub id or folder")
    quantize.add_argument("out", metavar="OUT", type=_out, help="a new or empty folder")
    add = quantize.add_argument
    add("--method", required=True, choices=(*LEARNED, *ROUNDING))
    add("--bits", type=_positive, default=4, help="2, 3, 4 or 8 (default: 4)")
    add(
        "--group-size",
        type=_size,
        default=64,
        metavar="N",
        help='number of weights that share a scale, or "channel" for one scale per row '
        "(default: 64)",
    )
    add(
        "--format",
        choices=FORMATS,
        help="format of the GPTQ checkpoint (default: gptq for symmetric grids, gptq_v2 for "
        "others, which GPTQModel and transformers read). AutoGPTQ reads only gptq",
    )
    add("--device", type=_device, help=DEVICE)
    learning = quantize.add_argument_group("options of gptq and awq, which learn from text")
    add = learning.add_argument
    add("--calibration-sequences", type=_positive, metavar="N", help="how many (default: 16)")
    add("--calibration-length", type=_positive, metavar="N", help="tokens in each (default: 256)")
    add(
        "--calibration-file",
        type=Path,
        metavar="TEXT",
        help="your own text in UTF-8 (default: the course's news)",
    )
    own = quantize.add_argument_group("options of single methods")
    add = own.add_argument
    add("--symmetric", action="store_true", default=None, help="gptq: use a symmetric grid")
    add(
        "--no-act-order",
        dest="act_order",
        action="store_false",
        default=None,
        help="gptq: round columns from left to right, not those with the largest inputs first",
    )
    add(
        "--damp",
        type=_damp,
        metavar="X",
        help="gptq: added to the Hessian's diagonal, as a fraction of its mean (default: 0.01)",
    )
    add("--clip-search", action="store_true", default=None, help="gptq: also try narrower ranges")
    add(
        "--double-quant",
        action="store_true",
        default=None,
        help="nf4, fp4: quantize the scales too",
    )

    measure = commands.add_parser(
        "evaluate",
        help="measure a model, quantized or not",
        description="Print perplexity on encyclopedia text and, with a reference, KL divergence, "
        "each with its 95%% interval. MODEL may also be a folder that `quantize` wrote, or another "
        "GPTQ checkpoint.",
    )
    measure.set_defaults(run=evaluate_command)
    add = measure.add_argument
    add("model", metavar="MODEL", help="name, hub id or folder")
    add("--reference", metavar="MODEL", help="the model before it was quantized")
    add("--sequences", type=_positive, default=8, metavar="N", help="how many (default: 8)")
    add("--length", type=_positive, default=512, metavar="N", help="tokens in each (default: 512)")
    add(
        "--recorded",
        metavar="ROW",
        help="also print this row of the summary table, for the same sequences",
    )
    add("--device", type=_device, help=DEVICE)
    return parser


if __name__ == "__main__":
    sys.exit(main())
