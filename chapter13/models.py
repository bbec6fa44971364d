"""Load the course's embedded model, or any causal language model by its Hugging Face id.

Weights come from safetensors files alone: they hold numbers, where a pickle may hold a program.
"""

import os
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

from chapter13.fetch.download import GGUF, require
from chapter13.model_files import (
    in_one_line,
    load_config,
    load_tokenizer,
    load_weights,
    quantized_already,
)
from chapter13.quiet import silence_torchao

EMBEDDED = "smollm2-135m"
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
HUB_TIMEOUT = 5  # seconds


def load(name: str = EMBEDDED, device: str | torch.device | None = None, mapped: bool = False):
    """A causal language model in float32, ready to evaluate, and its tokenizer.

    `name`: "smollm2-135m", the embedded model, for which no network is touched; else the id of a
    model on the Hugging Face hub, such as "gpt2", or a folder that holds one.
    `device`: as `find_device` takes it; None takes the GPU when there is one, else the CPU.
    `mapped`: keep the data type that the checkpoint says it has, and compute in float32 all the
    same (see `compute_in_float32`). The cast takes time at each use, but no memory: on the CPU a
    checkpoint in 16 bits, in one file or many, then stays where it is, on the disk.

    Returns (model, tokenizer), as transformers' Auto classes make them. On the CPU the weights of a
    float32 checkpoint are views of the mapped file, which programs that run side by side share in
    memory.

    Raises FileNotFoundError when the embedded model was not fetched yet, ConnectionError when the
    hub is out of reach and has not been asked for this model before, OSError (by transformers) when
    there is no such model or it has no safetensors file, ImportError when the tokenizer needs a
    package that is not installed, and ValueError as `find_device` and `check_files`, for a model
    that is not a decoder-only language model, is quantized or comes with code of its own, for a
    checkpoint that lacks tensors or has one in another shape, and for a name that is no folder and
    that no model on the hub can have. Warns of tensors that the model does not use.
    """
    device = find_device(device)
    with _found(name) as (source, safe):
        config = load_config(source, safe)
        if getattr(config, "quantization_config", None):
            raise ValueError(quantized_already(source, "config.json has a quantization_config"))
        tokenizer = load_tokenizer(source, safe)
        model = load_weights(source, config, "auto" if mapped else torch.float32, safe)
    model = model.to(device).eval()
    return compute_in_float32(model) if mapped else model, tokenizer


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
    """A model of the shape that a model's `config.json` describes, its weights not allocated yet.

    Parameters are on torch's "meta" device, buffers are real. `name`: as `load` takes it; nothing
    but the configuration is fetched. Of a folder's weights the headers are read and, if the folder
    stores a head although its configuration says that the head is tied, these two tensors.

    Raises as `load`, except for what concerns tokenizers and missing tensors.
    """
    with _found(name) as (source, safe):
        from accelerate import init_empty_weights
        from transformers import AutoModelForCausalLM, GenerationConfig

        config = load_config(source, safe)
        if hasattr(config, "quantization_config"):
            del config.quantization_config  # it will not be quantized in transformers' sense
        with init_empty_weights(include_buffers=False):
            model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)
        if (Path(source) / "generation_config.json").is_file():
            model.generation_config = GenerationConfig.from_pretrained(source, **safe)
    model.tie_weights()
    return model.eval()


def compute_in_float32(model: nn.Module) -> nn.Module:
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
    elif Path(name).is_file():
        raise ValueError(f"{name} is a file: name the folder that holds the model")
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
            if len(str(error)) <= 300 and "\n" not in str(error):
                raise
            raise OSError(in_one_line(error, 300)) from error  # transformers writes paragraphs
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
    except ValueError as error:
        raise ValueError(
            f"there is no folder {name}, and it is not the id of a model: {in_one_line(error, 80)}"
        ) from error
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
