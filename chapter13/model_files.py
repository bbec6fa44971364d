"""Checks a model's files before any long work: weights, configuration, tokenizer.

An error is one line that names the file, instead of another library's paragraph or a model with
random weights.
"""

import json
import logging
import warnings
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import nn

WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"
LFS = b"version https://git-lfs"  # how a Git LFS pointer starts
TOKENIZERS = "tokenizer.json, tokenizer.model, or vocab.json with merges.txt"
AGAIN = "Fetch config.json and the weights again, from one place"
FLOATS = ("F64", "F32", "F16", "BF16")  # as safetensors names data types
QUANTIZED = (".qweight", ".weight_packed", ".weight_scale", ".weight_scale_inv", ".absmax", ".SCB")


def read_json(path: Path) -> dict:
    """The object in a JSON file; ValueError, naming the file, if it holds anything else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # neither JSON nor UTF-8
        raise ValueError(f"{path} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} does not hold a JSON object")
    return content


def check_files(folder: str | Path) -> None:
    """Raises unless a folder's safetensors files are complete, by their headers and sizes.

    Checks the files that `load` would read: model.safetensors, else those that the index names,
    else all. A folder without such files passes.

    Raises FileNotFoundError if a file that the index names is missing, ValueError for a Git LFS
    pointer instead of a file, and for a file or an index that is truncated or corrupt.
    """
    _stored(Path(folder))


def _stored(folder: Path) -> dict[str, Path]:
    """Tensor name -> the file that holds it, for the files that `check_files` checks."""
    from safetensors import SafetensorError, safe_open

    places = {}
    for file in _weight_files(folder):
        check_pointer(file)
        try:
            with safe_open(file, framework="pt") as opened:
                places |= dict.fromkeys(opened.keys(), file)
        except SafetensorError as error:
            raise ValueError(
                f"{file} is truncated or corrupt ({in_one_line(error, 80)}): fetch it again"
            ) from error
    return places


def _weight_files(folder: Path) -> list[Path]:
    index = folder / INDEX
    if (folder / WHOLE).is_file():
        return [folder / WHOLE]
    if not index.is_file():
        return sorted(folder.glob("*.safetensors"))
    check_pointer(index)
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index} is not an index of safetensors files: fetch it again") from error
    if missing := [name for name in names if not (folder / name).is_file()]:
        raise FileNotFoundError(
            f"{folder} lacks {missing[0]}, which {INDEX} names "
            f"({len(missing)} of {len(names)} files are missing): fetch it again"
        )
    return [folder / name for name in names]


def check_pointer(file: Path) -> None:
    """Raises ValueError for a Git LFS pointer instead of a file, OSError if there is no file."""
    with file.open("rb") as opened:
        if opened.read(len(LFS)) == LFS:
            raise ValueError(
                f"{file} is a Git LFS pointer, not the file itself: run `git lfs pull` there"
            )


def load_weights(source: str, config, dtype: torch.dtype | str, safe: dict) -> nn.Module:
    """The model that `config` describes, with all of its weights from the checkpoint.

    `dtype`, `safe`: for transformers' `from_pretrained`. Raises ValueError for quantized weights
    and if a parameter's tensor is missing or has another shape. Warns about unused tensors.
    """
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    if Path(source).is_dir():
        _refuse_quantized(Path(source))
    try:
        with _without_report():
            model, info = AutoModelForCausalLM.from_pretrained(
                source,
                config=config,
                dtype=dtype,
                use_safetensors=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # refused below, with the name of the tensor
                **safe,
            )
    except SafetensorError as error:  # in the hub's cache: a folder was checked before
        raise ValueError(
            f"the copy of {source} in the Hugging Face cache is truncated or corrupt "
            f"({in_one_line(error, 80)}): delete it there and load the model again"
        ) from error
    except RuntimeError as error:
        if "conversion of the weights" not in str(error):
            raise
        raise ValueError(
            f"{source} lacks tensors that transformers merges into one, such as those of the "
            f"experts. {AGAIN}"
        ) from error
    _check_complete(source, model, info)
    _check_unused(source, model, sorted(info["unexpected_keys"]))
    return model


def _refuse_quantized(folder: Path) -> None:
    """Raises ValueError for weights whose scales transformers would ignore."""
    from safetensors import safe_open

    for path in _weight_files(folder):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():
                dtype = file.get_slice(name).get_dtype()
                if name.endswith(".qweight"):
                    raise ValueError(quantized_already(str(folder), f"it has {name}"))
                if name.endswith(QUANTIZED) or (name.endswith("weight") and dtype not in FLOATS):
                    raise ValueError(
                        f"{folder} is quantized (it has {name} in {dtype}), but its config.json "
                        "does not say how: name the model that it came from"
                    )


def _check_complete(source: str, model: nn.Module, info: dict) -> None:
    """Raises ValueError if transformers filled in random weights; `info`: its loading info."""
    if packed := sorted(key for key in info["unexpected_keys"] if key.endswith(QUANTIZED)):
        raise ValueError(quantized_already(source, f"it has {packed[0]}"))
    if shapes := sorted(info["mismatched_keys"]):
        name, stored, expected = shapes[0]
        raise ValueError(
            f"{source}: {name} has shape {tuple(stored)}, but config.json requires "
            f"{tuple(expected)} ({len(shapes)} such tensors). {AGAIN}"
        )
    if missing := sorted(info["missing_keys"]):
        only_the_head = set(missing) <= set(getattr(model, "_tied_weights_keys", None) or ())
        tied = 'if its head is tied to the embeddings, set "tie_word_embeddings": true there'
        raise ValueError(
            f"{source} lacks {len(missing)} tensors that its config.json requires, first "
            f"{missing[0]}. {AGAIN}{f'; {tied}' if only_the_head else ''}"
        )


def _check_unused(source: str, model: nn.Module, unused: list[str]) -> None:
    """Raises ValueError for parameters that the layers lack; warns about other unused tensors."""
    owned = {name: _owner(model, name) for name in unused}
    for name, (owner, leaf) in owned.items():
        if owner is not None and owner._parameters.get(leaf, leaf) is None:
            raise ValueError(
                f"{source} has {name}, but config.json describes layers without {leaf}. {AGAIN}"
            )
    # older programs stored tensors that a model computes itself, such as GPT-2's causal mask
    rest = [name for name, (owner, leaf) in owned.items() if not (owner and leaf in owner._buffers)]
    if rest:
        warnings.warn(
            f"{source} has {len(rest)} tensors that a {type(model).__name__} with its config.json "
            f"does not use, first {rest[0]}",
            stacklevel=4,
        )


def _owner(model: nn.Module, name: str) -> tuple[nn.Module | None, str]:
    """The module that a checkpoint's tensor would belong to, and the tensor's name there."""
    path, _, leaf = name.rpartition(".")
    for prefix in "", f"{model.base_model_prefix}.":
        try:
            return model.get_submodule(prefix + path), leaf
        except AttributeError:
            pass
    return None, leaf


@contextmanager
def _without_report():
    """Silences transformers' table of missing tensors, which `_check_complete` reports."""
    logger = logging.getLogger("transformers.modeling_utils")

    def errors_only(record):
        return record.levelno >= logging.ERROR

    logger.addFilter(errors_only)  # a level of its own would make transformers check more
    try:
        yield
    finally:
        logger.removeFilter(errors_only)


def quantized_already(source: str, why: str) -> str:
    return (
        f"{source} is quantized ({why}): name the model that it came from, or load it with "
        "folders.open_model"
    )


def load_config(source: str, safe: dict):
    """A model's configuration; for a folder, `tie_word_embeddings` follows the stored weights.

    `safe`: loading options for transformers. Raises ValueError or OSError, in one line, as
    `check_files`, for a damaged config.json, and for a model that is not a decoder-only causal
    language model of transformers.
    """
    from transformers import AutoConfig
    from transformers import __version__ as version

    folder = Path(source) if Path(source).is_dir() else None
    if folder:
        kind = _check_config_file(folder)
        stored = _stored(folder)
    try:
        config = AutoConfig.from_pretrained(source, **safe)
    except Exception as error:
        if isinstance(error, OSError) and not folder:
            raise
        if "trust_remote_code" in str(error):
            raise ValueError(_own_code(source, "config.json")) from error
        if "does not recognize this architecture" in str(error):
            named = repr(kind) if folder else "the one that its config.json names"
            raise ValueError(
                f"{source}: transformers {version} does not know the model_type {named}; a newer "
                "version may: pip install --upgrade transformers"
            ) from error
        raise ValueError(f"{source}: config.json is refused: {in_one_line(error)}") from error
    made = _causal_class(source, config)
    if folder and getattr(config, "tie_word_embeddings", False) and _own_head(made, stored):
        config.tie_word_embeddings = False
    return config


def _check_config_file(folder: Path) -> str:
    """The model_type that config.json names; raises if there is none."""
    file = folder / "config.json"
    if not file.is_file():
        raise FileNotFoundError(f"{folder} holds no model: it has no config.json")
    check_pointer(file)
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(
            f"{file} is not JSON ({in_one_line(error, 80)}): fetch it again"
        ) from error
    if not isinstance(config, dict) or not config.get("model_type"):
        raise ValueError(f"{file} has no model_type, so it does not say which model this is")
    return config["model_type"]


def _causal_class(source: str, config) -> type:
    """The model class; raises ValueError unless it is a decoder-only causal language model."""
    from transformers import AutoModelForCausalLM, AutoModelForMaskedLM

    mapping = AutoModelForCausalLM._model_mapping
    masked = type(config) in AutoModelForMaskedLM._model_mapping
    named = (getattr(config, "architectures", None) or [""])[0]
    if getattr(config, "is_encoder_decoder", False):
        what = "an encoder-decoder"
    elif hasattr(config, "vision_config"):
        what = "a vision-language model"
    elif type(config) not in mapping or config.get_text_config() is not config:
        what = "another architecture"
    elif masked and not getattr(config, "is_decoder", True):
        what = "an encoder"
    elif "For" in named and "ForCausalLM" not in named:
        what = f"a {named}"
    else:
        return mapping[type(config)]
    raise ValueError(
        f"{source} is {what} (model_type {config.model_type!r}): this course takes decoder-only "
        "causal language models"
    )


def _own_head(made: type, stored: dict[str, Path]) -> bool:
    """Whether the files hold a head that differs from the embeddings it could be tied to."""
    pairs, prefix = made._tied_weights_keys, f"{made.base_model_prefix}."
    for head, embeddings in pairs.items() if isinstance(pairs, dict) else ():
        found = [
            key
            for name in (head, embeddings)
            for key in dict.fromkeys((name, name.removeprefix(prefix)))
            if key in stored
        ]
        if len(found) == 2 and not torch.equal(*(_tensor(stored[key], key) for key in found)):
            return True
    return False


def _tensor(file: Path, name: str) -> torch.Tensor:
    from safetensors import safe_open

    with safe_open(file, framework="pt") as opened:
        return opened.get_tensor(name)


def load_tokenizer(source: str, safe: dict):
    """A model's tokenizer. Raises FileNotFoundError if there is none, ImportError with the package
    to install if it needs one, ValueError if it is damaged, has a Git LFS pointer instead of a
    file, or comes with its own code.
    """
    from transformers import AutoTokenizer

    if Path(source).is_dir():
        for file in sorted(Path(source).iterdir()):
            if file.suffix in (".json", ".model", ".txt") and file.is_file():
                check_pointer(file)
    try:
        return AutoTokenizer.from_pretrained(source, **safe)
    except Exception as error:  # the tokenizers library raises bare Exceptions
        folder = Path(source) if Path(source).is_dir() else None
        if isinstance(error, OSError) and not folder:
            raise
        if "trust_remote_code" in str(error):
            raise ValueError(_own_code(source, "tokenizer_config.json")) from error
        if folder and not _holds_tokenizer(folder):
            raise FileNotFoundError(f"{folder} has no tokenizer: it needs {TOKENIZERS}") from error
        if packages := _packages(source, str(error)):
            raise ImportError(
                f"the tokenizer of {source} needs a package: pip install {' '.join(packages)}"
            ) from error
        raise ValueError(f"the tokenizer of {source} is refused: {in_one_line(error)}") from error


def _holds_tokenizer(folder: Path) -> bool:
    files = {file.name for file in folder.iterdir()}
    vocabularies = {"tokenizer.json", "vocab.json", "vocab.txt", "merges.txt"}
    return bool(files & vocabularies) or any(
        name.endswith((".model", ".tiktoken", ".bpe", ".spm")) for name in files
    )


def _packages(source: str, said: str) -> list[str]:
    """The packages to install for a tokenizer, by its file and transformers' error."""
    from huggingface_hub import try_to_load_from_cache

    said = said.lower()
    if not any(name in said for name in ("sentencepiece", "tiktoken", "protobuf")):
        return []
    file = Path(source) / "tokenizer.model"
    if not Path(source).is_dir():
        file = try_to_load_from_cache(source, file.name)
        file = Path(file) if isinstance(file, str) else None
    if file and file.is_file():
        # transformers names tiktoken for both; a SentencePiece file starts with a protobuf tag
        piece = file.read_bytes()[:1] == b"\n"
    else:
        piece = "tiktoken" not in said
    modules = (
        {"sentencepiece": "sentencepiece", "protobuf": "google.protobuf"}
        if piece or "protobuf" in said
        else {"tiktoken": "tiktoken"}
    )
    return [package for package, module in modules.items() if not _installed(module)]


def _installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # there is no package google, which would contain protobuf
        return False


def _own_code(source: str, file: str) -> str:
    return (
        f"{source} comes with code of its own (auto_map in {file}), which is not run here: "
        "trust_remote_code stays False. Name a model that transformers has itself"
    )


def in_one_line(error: Exception, limit: int = 150) -> str:
    """An error in one line."""
    text = " ".join(str(error).split())
    return text if len(text) <= limit else f"{text[: limit - 3]}..."
