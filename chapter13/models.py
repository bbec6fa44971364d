"""Load the course's embedded model, or any causal language model by its Hugging Face id.

Weights come from safetensors files alone: they hold numbers, where a pickle may hold a program.
"""

import json
import os
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import nn

from chapter13.fetch.download import GGUF, require
from chapter13.quiet import silence_torchao

EMBEDDED = "smollm2-135m"
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
HUB_TIMEOUT = 5  # seconds
WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"
LFS = b"version https://git-lfs"  # how a Git LFS pointer starts
TOKENIZERS = "tokenizer.json, tokenizer.model, or vocab.json with merges.txt"


def load(name: str = EMBEDDED, device: str | torch.device | None = None, mapped: bool = False):
    """A causal language model in float32, ready to evaluate, and its tokenizer.

    `name`: "smollm2-135m", the embedded model, for which no network is touched; else the id of a
    model on the Hugging Face hub, such as "gpt2", or a folder that holds one.
    `device`: as `find_device` takes it; None takes the GPU when there is one, else the CPU.
    `mapped`: keep the data type that the checkpoint says it has, and compute in float32 all the
    same (see `computes_in_float32`). The cast takes time at each use, but no memory: on the CPU a
    checkpoint in 16 bits, in one file or many, then stays where it is, on the disk.

    Returns (model, tokenizer), as transformers' Auto classes make them. On the CPU the weights of a
    float32 checkpoint are views of the mapped file, which programs that run side by side share in
    memory.

    Raises FileNotFoundError when the embedded model was not fetched yet, ConnectionError when the
    hub is out of reach and has not been asked for this model before, OSError (by transformers) when
    there is no such model or it has no safetensors file, ImportError when the tokenizer needs a
    package that is not installed, and ValueError as `find_device` and `check_files`, for a model
    that is not a decoder-only language model, is quantized or comes with code of its own, and for
    a checkpoint that lacks tensors or has one in another shape.
    """
    device = find_device(device)
    with _found(name) as (source, safe):
        from transformers import AutoModelForCausalLM

        config = _config(source, safe)
        if getattr(config, "quantization_config", None):
            raise ValueError(_quantized(source, "config.json has a quantization_config"))
        tokenizer = _tokenizer(source, safe)
        model, info = AutoModelForCausalLM.from_pretrained(
            source,
            config=config,
            dtype="auto" if mapped else torch.float32,
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # refused below, with the name of the tensor
            **safe,
        )
        _check_complete(source, info)
    model = model.to(device).eval()
    return computes_in_float32(model) if mapped else model, tokenizer


def find_device(name: str | torch.device | None = None) -> torch.device:
    """Where models go: to `name`, or where the environment variable CHAPTER13_DEVICE says ("cpu",
    "cuda", "cuda:1"), or to the GPU when there is one, else to the CPU.

    Raises ValueError for what is no device, and for a GPU that PyTorch does not find: why not.
    """
    name = name or os.environ.get("CHAPTER13_DEVICE")
    if not name:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"a device is called cpu, cuda or cuda:1, not {name!r}") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        why = f"it is built for CUDA {torch.version.cuda}, but no driver answers: see nvidia-smi"
        if torch.version.cuda is None:
            why = "it is a build for CPUs alone"
        raise ValueError(f"PyTorch {torch.__version__} finds no GPU: {why}")
    return device


def skeleton(name: str | Path, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A model of the shape that a model's `config.json` describes, its weights in no memory yet.

    Parameters are on torch's "meta" device, buffers are real. `name`: as `load` takes it; nothing
    but the configuration is fetched. Of a folder's weights the headers are read and, if the folder
    stores a head although its configuration says that the head is tied, these two tensors.

    Raises as `load`, except for what concerns tokenizers and missing tensors.
    """
    with _found(name) as (source, safe):
        from accelerate import init_empty_weights
        from transformers import AutoModelForCausalLM, GenerationConfig

        config = _config(source, safe)
        if hasattr(config, "quantization_config"):
            del config.quantization_config  # it will not be quantized in transformers' sense
        with init_empty_weights(include_buffers=False):
            model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)
        if (Path(source) / "generation_config.json").is_file():
            model.generation_config = GenerationConfig.from_pretrained(source, **safe)
    model.tie_weights()
    return model.eval()


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
        _check_pointer(file)
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
    _check_pointer(index)
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


def _check_pointer(file: Path) -> None:
    with file.open("rb") as opened:
        if opened.read(len(LFS)) == LFS:
            raise ValueError(
                f"{file} is a Git LFS pointer, not the file itself: run `git lfs pull` there"
            )


def _check_complete(source: str, info: dict) -> None:
    """Raises ValueError where transformers filled in random numbers; `info`: its loading info."""
    if packed := sorted(key for key in info["unexpected_keys"] if key.endswith(".qweight")):
        raise ValueError(_quantized(source, f"it has {packed[0]}"))
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


def _quantized(source: str, why: str) -> str:
    return (
        f"{source} is quantized ({why}): name the model that it came from, or load a GPTQ "
        "checkpoint with checkpoint.load_gptq"
    )


def _config(source: str, safe: dict):
    """A model's configuration, checked; `tie_word_embeddings` is what the weights say."""
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
    _check_pointer(file)
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


def _tokenizer(source: str, safe: dict):
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


def computes_in_float32(model: nn.Module) -> nn.Module:
    """Lets a model with weights in float16 or bfloat16 compute in float32; returns the model.

    Each module's own weights are cast while it computes, and the copies are gone afterwards: one
    layer at a time. Embeddings are looked up first and cast then. So Llama and GPT-2 compute, bit
    for bit, what they would with all weights cast to float32.
    """
    for module in model.modules():
        if any(map(_narrow, module.parameters(recurse=False))):
            if isinstance(module, nn.Embedding):
                module.register_forward_hook(lambda module, args, out: out.float())
            else:
                _casts_its_own(module)
    return model


def _casts_its_own(module: nn.Module) -> None:
    stored: dict[str, nn.Parameter] = {}

    def widen(module, args):
        for name, parameter in list(module.named_parameters(recurse=False)):
            if _narrow(parameter):
                stored[name] = parameter
                setattr(module, name, nn.Parameter(parameter.float(), requires_grad=False))

    def restore(module, args, out):
        while stored:
            setattr(module, *stored.popitem())

    module.register_forward_pre_hook(widen)
    module.register_forward_hook(restore, always_call=True)


def _narrow(parameter: torch.Tensor) -> bool:
    return parameter.dtype in (torch.float16, torch.bfloat16)


@contextmanager
def _found(name: str | Path):
    """(what transformers is to load, how) for a model's name; its errors in our words."""
    if name == EMBEDDED:
        source, local = str(require(EMBEDDED)), True
    else:
        source, local = str(name), Path(name).is_dir() or not _hub_answers(str(name))

    silence_torchao()  # before transformers comes in
    from transformers.utils import logging

    bars = logging.is_progress_bar_enabled()
    if local:
        logging.disable_progress_bar()  # over before it can be read
    try:
        yield source, {"trust_remote_code": False, "local_files_only": local}
    except OSError as error:
        if not local or Path(source).is_dir():
            raise
        raise ConnectionError(
            f"The Hugging Face hub cannot be reached, and {name!r} is not among the models fetched "
            f"from it before. Without a network use the embedded model: load({EMBEDDED!r})."
        ) from error
    finally:
        if bars:
            logging.enable_progress_bar()


def _hub_answers(name: str) -> bool:
    """One question with a time limit: offline, transformers would retry for 23 seconds."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    try:
        HfApi().model_info(name, timeout=HUB_TIMEOUT)
    except HfHubHTTPError:
        return True  # an answer: no such model, or not for us; transformers will say so
    except ValueError:
        raise  # no id that a model could have
    except Exception:  # no network, no name service, a proxy in the way, HF_HUB_OFFLINE
        return False
    return True


def linear_weights(path: Path | str | None = None) -> dict[str, torch.Tensor]:
    """The weights of the embedded model's linear layers, by name, in the model's order.

    Returns name -> float32 tensor (out_features, in_features), without the embeddings and the head;
    e.g. "model.layers.0.mlp.down_proj.weight" (576, 1536). `path`: another safetensors file.

    The tensors are views of the mapped file: the first look at a value reads it from disk, and
    programs that run side by side share one copy in memory. Do not change them in place: that never
    reaches the file, but every holder of the tensor sees it and it takes memory of its own. Work on
    a `.clone()`.

    Raises FileNotFoundError when the data was not fetched yet.
    """
    from safetensors import safe_open

    if path is None:
        path = require(EMBEDDED) / "model.safetensors"
    with safe_open(path, framework="pt") as file:
        names = [name for name in file.keys() if name.endswith("_proj.weight")]
        return {name: file.get_tensor(name) for name in sorted(names, key=_place)}


def gguf_path() -> Path:
    """The GGUF file that the embedded model was made from: 4-bit weights, channels as they were.

    Raises FileNotFoundError when the data was not fetched yet.
    """
    return require("smollm2-gguf") / GGUF


def _place(name: str) -> tuple[int, int]:
    """Sort key: layer 2 before layer 10, and inside a layer the order in which it computes."""
    _, _, layer, _, kind, _ = name.split(".")
    return int(layer), LINEARS.index(kind)
