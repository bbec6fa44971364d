"""A model's files, checked before the long work: weights, configuration, tokenizer.

What is wrong is said in one line that names the file, in place of another library's paragraph or a
model of random numbers.
"""

import json
from importlib.util import find_spec
from pathlib import Path

import torch

WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"
LFS = b"version https://git-lfs"  # how a Git LFS pointer starts
TOKENIZERS = "tokenizer.json, tokenizer.model, or vocab.json with merges.txt"


def check_files(folder: str | Path) -> None:
    """Raises unless a folder's safetensors files are whole, as far as their headers and sizes say.

    Checks the files that `load` would read: model.safetensors, else those that the index names,
    else all. A folder without any passes.

    Raises FileNotFoundError for a file that the index names and that is not there, ValueError for a
    Git LFS pointer in the place of a file, and for a file or an index that is cut off or corrupt.
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
                f"{file} is cut off or corrupt ({_short(error, 80)}): fetch it again"
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
    """Raises ValueError for a Git LFS pointer in the place of a file, OSError if there is none."""
    with file.open("rb") as opened:
        if opened.read(len(LFS)) == LFS:
            raise ValueError(
                f"{file} is a Git LFS pointer, not the file itself: run `git lfs pull` there"
            )


def check_complete(source: str, info: dict) -> None:
    """Raises ValueError where transformers filled in random numbers; `info`: its loading info."""
    if packed := sorted(key for key in info["unexpected_keys"] if key.endswith(".qweight")):
        raise ValueError(quantized_already(source, f"it has {packed[0]}"))
    if shapes := sorted(info["mismatched_keys"]):
        name, stored, expected = shapes[0]
        raise ValueError(
            f"{source}: {name} has shape {tuple(stored)}, config.json asks for {tuple(expected)} "
            f"({len(shapes)} such tensors). Fetch config.json and the weights again, from one place"
        )
    if missing := sorted(info["missing_keys"]):
        raise ValueError(
            f"{source} lacks {len(missing)} tensors that its config.json asks for, first "
            f"{missing[0]}. Fetch config.json and the weights again, from one place"
        )


def quantized_already(source: str, why: str) -> str:
    return (
        f"{source} is quantized ({why}): name the model that it came from, or load it with "
        "folders.open_model"
    )


def load_config(source: str, safe: dict):
    """A model's configuration; its `tie_word_embeddings` is what the weights of a folder say.

    `safe`: how transformers is to load. Raises ValueError or OSError, in one line, for files as
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
                "one may: pip install --upgrade transformers"
            ) from error
        raise ValueError(f"{source}: config.json is refused: {_short(error)}") from error
    made = _causal_class(source, config)
    if folder and getattr(config, "tie_word_embeddings", False) and _own_head(made, stored):
        config.tie_word_embeddings = False
    return config


def _check_config_file(folder: Path) -> str:
    """The model_type that config.json names; raises where there is none."""
    file = folder / "config.json"
    if not file.is_file():
        raise FileNotFoundError(f"{folder} holds no model: it has no config.json")
    check_pointer(file)
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not JSON ({_short(error, 80)}): fetch it again") from error
    if not isinstance(config, dict) or not config.get("model_type"):
        raise ValueError(f"{file} has no model_type, so it does not say which model this is")
    return config["model_type"]


def _causal_class(source: str, config) -> type:
    """The model class; raises ValueError unless it is a decoder-only causal language model."""
    from transformers import AutoModelForCausalLM

    mapping = AutoModelForCausalLM._model_mapping
    named = (getattr(config, "architectures", None) or [""])[0]
    if getattr(config, "is_encoder_decoder", False):
        what = "an encoder-decoder"
    elif hasattr(config, "vision_config"):
        what = "a vision-language model"
    elif type(config) not in mapping or config.get_text_config() is not config:
        what = "another architecture"
    elif "For" in named and "ForCausalLM" not in named:
        what = f"a {named}"
    else:
        return mapping[type(config)]
    raise ValueError(
        f"{source} is {what} (model_type {config.model_type!r}): this course takes decoder-only "
        "causal language models"
    )


def _own_head(made: type, stored: dict[str, Path]) -> bool:
    """Whether the files hold a head that differs from the embeddings that it could be tied to."""
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
    to install if it needs one, ValueError if it is damaged or comes with code of its own.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(source, **safe)
    except Exception as error:  # the tokenizers library raises bare ones
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
        raise ValueError(f"the tokenizer of {source} is refused: {_short(error)}") from error


def _holds_tokenizer(folder: Path) -> bool:
    files = {file.name for file in folder.iterdir()}
    vocabularies = {"tokenizer.json", "vocab.json", "vocab.txt", "merges.txt"}
    return bool(files & vocabularies) or any(
        name.endswith((".model", ".tiktoken", ".bpe", ".spm")) for name in files
    )


def _packages(source: str, said: str) -> list[str]:
    """What to install for a tokenizer, from its file and from transformers' error."""
    from huggingface_hub import try_to_load_from_cache

    said = said.lower()
    if not any(name in said for name in ("sentencepiece", "tiktoken", "protobuf")):
        return []
    file = Path(source) / "tokenizer.model"
    if not Path(source).is_dir():
        file = try_to_load_from_cache(source, file.name)
        file = Path(file) if isinstance(file, str) else None
    if file and file.is_file():
        # transformers names tiktoken for either; a SentencePiece file starts with a protobuf tag
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
    except ModuleNotFoundError:  # google, in which protobuf would be
        return False


def _own_code(source: str, file: str) -> str:
    return (
        f"{source} comes with code of its own (auto_map in {file}), which is not run here: "
        "trust_remote_code stays False. Name a model that transformers has itself"
    )


def _short(error: Exception, limit: int = 150) -> str:
    """An error in one line."""
    text = " ".join(str(error).split())
    return text if len(text) <= limit else f"{text[: limit - 3]}..."
