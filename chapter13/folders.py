"""Folders with models: what a folder holds, how to open it, how to write a new one atomically.

`open_model` loads in a notebook what `python -m chapter13 quantize` wrote in a shell.
"""

import copy
import json
import os
import shutil
import tempfile
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

import torch

from chapter13 import checkpoint, models
from chapter13.atomic import replacing
from chapter13.model_files import load_tokenizer, read_json
from chapter13.whole_model import storage
from chapter13.whole_model.layers import has_tied_head

OWN = "quantized.safetensors"  # the weights in a folder with NF4 or FP4
UNFINISHED = ".unfinished"  # a run's folder inside OUT; the end of its name if it is beside OUT
_MOVED = "moved.json"  # in a run's folder: the names of the files that go into OUT
_LONGEST = 80  # characters that may be added to the path of a run's folder
_OF_OTHER_FILES = (  # keys that describe files of the old folder, or how it was opened
    "auto_map",
    "transformers_weights",
    "local_files_only",
    "is_local",
)
_FETCHED = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja")


def kind(name: str | Path) -> str:
    """The kind of a model: "gptq", "own" or "plain". No weights are read.

    - "gptq": a GPTQ checkpoint, with its settings in `config.json` or, as AutoGPTQ wrote them at
      first, only in `quantize_config.json`
    - "own": a folder that `save_own` wrote
    - "plain": not quantized, for `models.load`

    `name`: "smollm2-135m", a folder, or the id of a model on the Hugging Face hub, of which only
    `config.json` is fetched.

    Raises FileNotFoundError if there is no such folder, no `config.json` in it or no weights;
    ValueError if the name is neither a folder nor an id, if `config.json` is damaged, if another
    program quantized the model (the message names it), or if the folder holds only an adapter, only
    GGUF files, or only pickled weights; and as `models.load` for an id.
    """
    folder = Path(name)
    if str(name) == models.EMBEDDED:
        return "plain"
    if not os.path.isdir(folder):
        _check_id(str(name))
        return "gptq" if _quantizer(name, _fetch_config(name)) else "plain"
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder} holds no model: {_why_none(folder)}")
    if (folder / OWN).is_file():
        return "own"
    if _quantizer(folder, read_json(folder / "config.json")):
        return "gptq"
    _check_weights(folder)
    return "plain"


def open_model(name: str | Path, device: str | torch.device | None = None):
    """A model, quantized or not, and its tokenizer.

    `name`: a folder that `python -m chapter13 quantize` wrote, a GPTQ checkpoint of any program, or
    a name for `models.load`. `device`: as for `models.find_device`.

    Returns (model, tokenizer). The model is ready to evaluate; weights that are not quantized keep
    the data type of the file, and all computation is in float32. Raises as `kind`, `models.load`,
    `checkpoint.load_gptq` and `storage.load_quantized`.
    """
    device = models.find_device(device)
    found = kind(name)
    if found == "plain":
        return models.load(str(name), device, mapped=True)
    folder = Path(name)
    if not folder.is_dir():
        folder = _fetch(str(name))
    if found == "gptq":
        model = checkpoint.load_gptq(folder)
    else:
        model = storage.load_quantized(models.skeleton(folder), folder / OWN)
        models.compute_in_float32(model)
    safe = {"trust_remote_code": False, "local_files_only": True}
    return model.to(device), load_tokenizer(str(folder), safe)


def save_own(model, tokenizer, folder: Path | str) -> None:
    """Writes a quantized model, its configuration and tokenizer, for `open_model` to read.

    It works for every method of `quantize_model`; NF4 and FP4 have no other format here. The folder
    must be new or empty. `config.json` comes last, so that no program opens an incomplete folder.

    Raises FileExistsError if the folder is not empty, FileNotFoundError or NotADirectoryError if it
    cannot be made, and ValueError if no layer is quantized.
    """
    folder = Path(folder)
    check_new(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    place = {"dir": folder} if folder.is_dir() else {"dir": folder.parent}
    with tempfile.TemporaryDirectory(prefix=f".{folder.name[:40]}.", **place) as temporary:
        made = Path(temporary) / "new"
        made.mkdir()
        storage.save_quantized(model, made / OWN)
        config = copy.deepcopy(model.config)
        config.tie_word_embeddings = has_tied_head(model)
        config.save_pretrained(made)
        if model.generation_config is not None:
            model.generation_config.save_pretrained(made)
        tokenizer.save_pretrained(made)
        forget_other_files(made)
        move_in(made, folder, but=[Path(temporary).name])


def forget_other_files(folder: Path) -> None:
    """Removes settings of a new model that refer to files that are only in the old folder.

    `transformers_weights` names a weights file, so that no program would find the new one;
    `auto_map` names Python files, which are not copied (nor run here).
    """
    for name in "config.json", "tokenizer_config.json":
        file = folder / name
        settings = read_json(file) if file.is_file() else {}
        kept = {key: value for key, value in settings.items() if key not in _OF_OTHER_FILES}
        if kept != settings:
            text = json.dumps(kept, indent=2, ensure_ascii=False)
            file.write_text(f"{text}\n", encoding="utf-8")


def check_new(folder: Path, but: Iterable[str] = ()) -> None:
    """Raises OSError, with advice, if no new folder can be made at this path.

    A folder that exists must be empty, except for the names in `but` and for `lost+found`, which
    every ext4 disk has.
    """
    if not os.path.lexists(folder):
        there = next((parent for parent in folder.parents if os.path.lexists(parent)), None)
        if there is not None and not os.path.isdir(there):
            what = "a file" if os.path.exists(there) else "a link to nothing"
            raise NotADirectoryError(
                f"{there} is {what}, so {folder} cannot be a folder in it: name another folder"
            )
    elif not os.path.exists(folder):
        raise FileNotFoundError(
            f"{folder} is a link to {os.readlink(folder)}, which does not exist: make that folder "
            "first, or name another"
        )
    elif not folder.is_dir() or {*os.listdir(folder)} - {"lost+found", *but}:
        raise FileExistsError(f"{folder} exists and is not empty: name another folder")


def run_folder(out: Path) -> Path:
    """The path of the folder in which a run keeps its finished work until OUT is complete.

    It is beside OUT, and the result in it is renamed to OUT at the end. If OUT exists already, it
    is inside OUT, and the files are moved at the end: neither a mount point nor a shell's current
    directory can be replaced, and OUT may be a link to another disk. Raises OSError as `check_new`.
    """
    inside = out / UNFINISHED
    beside = out.with_name(f"{out.name}{UNFINISHED}") if out.name else inside  # "." has no name
    check_new(out, [UNFINISHED, *_half_moved(inside, out), *_half_moved(beside, out)])
    if not os.path.lexists(out):
        return beside
    earlier = os.path.isdir(beside) and beside.stat().st_dev == out.stat().st_dev
    return beside if earlier else inside  # beside: OUT was made by hand after a run began


def make_run_folder(folder: Path) -> list[Path]:
    """Makes a run's folder and its parents; returns the new ones, the innermost first.

    Raises OSError if it cannot be written to, if its path is too long for the files' names, or if
    it holds anything that no run wrote, because the folder is deleted at the end.
    """
    if strange := _strange(folder):
        raise FileExistsError(
            f"{folder}, where unfinished work is kept, holds {strange[0]}, which `quantize` did "
            "not write: move it elsewhere, or name another OUT"
        )
    new = [each for each in (folder, *folder.parents) if not os.path.lexists(each)]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="." * (_LONGEST - 8), dir=folder):
            pass
    except OSError as error:
        remove_empty(new)
        raise type(error)(
            f"{folder}, where unfinished work is kept, cannot be written to: {error.strerror}. "
            "Name another OUT"
        ) from error
    return new


def remove_empty(folders: Iterable[Path]) -> None:
    """Removes the folders that exist and are empty; the innermost must come first."""
    for folder in folders:
        with suppress(OSError):
            folder.rmdir()


def clear_half_moved(folder: Path, out: Path) -> None:
    """Removes from OUT the files of a run that was killed while moving them there."""
    for name in _half_moved(folder, out):
        path = out / name
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    (folder / _MOVED).unlink(missing_ok=True)


def move_in(made: Path, out: Path, but: Iterable[str] = ()) -> None:
    """Renames a complete folder to `out`; if that exists, moves the files in, `config.json` last.

    Without a `config.json` no program takes a folder for a model. Raises OSError as `check_new`.
    """
    check_new(out, but)
    if not os.path.lexists(out):
        made.rename(out)
        return
    names = sorted(os.listdir(made), key=lambda name: (name == "config.json", name))
    with replacing(made.parent / _MOVED) as part:
        part.write_text(json.dumps(names), encoding="utf-8")
    for name in names:
        (made / name).rename(out / name)


def _half_moved(folder: Path, out: Path) -> list[str]:
    """The names of files that a killed run may have moved into OUT; none if OUT is complete."""
    file = folder / _MOVED
    if not os.path.isfile(file) or os.path.lexists(out / "config.json"):
        return []
    return json.loads(file.read_text(encoding="utf-8"))


def _strange(folder: Path) -> list[str]:
    """Names in a run's folder that no run wrote; hidden files are incomplete and do not count."""
    if not os.path.isdir(folder):
        return []
    names = {*os.listdir(folder)} - {"blocks", "result", _MOVED}
    blocks = folder / "blocks"
    if blocks.is_dir() and not (blocks / "run.json").is_file():
        names |= {f"blocks/{name}" for name in os.listdir(blocks) if not name.startswith(".")}
    return sorted(name for name in names if not name.startswith("."))


def _check_id(name: str) -> None:
    """Raises if a name that is not a folder cannot be the id of a model either."""
    if os.path.isfile(name):
        hint = _GGUF if name.endswith(".gguf") else "name the folder that it is in"
        raise ValueError(f"{name} is a file, not a folder with a model: {hint}")
    if os.path.isdir(f"{name.rstrip('/' + os.sep)}{UNFINISHED}"):
        raise FileNotFoundError(
            f"there is no folder {name} yet, because `quantize` did not finish; the same command "
            "continues the run"
        )
    path = name.startswith((".", "~")) or name.endswith(("/", os.sep)) or os.path.isabs(name)
    if path or len(Path(name).parts) > 2 or os.path.islink(name):
        raise FileNotFoundError(f"there is no folder {name}")
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError:
        raise ValueError(
            f"{name!r} is neither a folder nor the id of a model on the Hugging Face hub, such as "
            "gpt2 or owner/model"
        ) from None


_GGUF = "GGUF is not read here; name the model in safetensors that the file was made from"


def _why_none(folder: Path) -> str:
    """Why a folder without a config.json cannot be opened."""
    lacks = "it has no config.json"
    if (folder / UNFINISHED).is_dir():
        return f"{lacks}, because `quantize` did not finish; the same command continues the run"
    if (folder / "adapter_config.json").is_file():
        return f"{lacks}, {_adapter(folder)}"
    if any(folder.glob("*.gguf")):
        return f"{lacks}, only GGUF. {_GGUF}"
    return lacks


def _adapter(folder: Path) -> str:
    base = read_json(folder / "adapter_config.json").get("base_model_name_or_path")
    named = f" ({base})" if base else ""
    return f"only an adapter (LoRA): merge it into the model that it was trained on{named} first"


def _check_weights(folder: Path) -> None:
    """Raises unless a folder that is not quantized has weights that `models.load` reads."""
    suffixes = {Path(name).suffix for name in os.listdir(folder) if not name.startswith("adapter_")}
    if ".safetensors" in suffixes:
        return
    if (folder / "adapter_config.json").is_file():
        raise ValueError(f"{folder} holds no weights, {_adapter(folder)}")
    if ".gguf" in suffixes:
        raise ValueError(f"{folder} holds only GGUF files: {_GGUF}")
    if pickled := sorted(suffixes & set(checkpoint.PICKLED)):
        raise ValueError(
            f"{folder} holds weights only as {', '.join(pickled)}, pickled files that may hold a "
            "program: save the model as safetensors first"
        )
    raise FileNotFoundError(f"{folder} holds no weights: it has no .safetensors file")


def _quantizer(name: str | Path, config: dict) -> str | None:
    """ "gptq" or None, by the settings of a model; ValueError for those of another program."""
    nested = config.get("text_config")  # of models that also read images
    nested = nested if isinstance(nested, dict) else {}
    settings = (
        config.get("quantization_config")
        or config.get("compression_config")
        or nested.get("quantization_config")
        or {}
    )
    if "quantization" in config:
        program = "MLX"
    elif settings:
        program = _program(settings)
    else:
        files = {"quantize_config.json": "gptq", "quant_config.json": "awq"}
        files["hf_quant_config.json"] = "modelopt"
        program = next((files[file] for file in files if Path(name, file).is_file()), None)
    if program not in ("gptq", None):
        raise ValueError(
            f"{name} is quantized already, by {program}, whose format cannot be read here: name "
            "the model that it came from"
        )
    return program


def _program(settings: object) -> str:
    if not isinstance(settings, dict):
        return "an unknown program"
    bitsandbytes = settings.get("load_in_4bit") or settings.get("load_in_8bit")
    return settings.get("quant_method") or ("bitsandbytes" if bitsandbytes else "gptq")


def _fetch_config(name: str | Path) -> dict:
    """The config.json of a model on the hub."""
    with models._found(name) as (source, safe):
        from transformers import PretrainedConfig

        return PretrainedConfig.get_config_dict(source, **safe)[0]


def _fetch(name: str) -> Path:
    """The folder with a copy of a model on the hub."""
    with models._found(name) as (source, safe):
        from huggingface_hub import snapshot_download

        local = safe["local_files_only"]
        return Path(snapshot_download(source, allow_patterns=_FETCHED, local_files_only=local))
