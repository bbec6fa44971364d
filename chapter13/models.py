"""Load the course's embedded model, or any causal language model by its Hugging Face id.

Weights are read only from safetensors files, which hold numbers; a pickle may hold a program.
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

    `name`: "smollm2-135m", the embedded model, which needs no network; or the id of a model on the
    Hugging Face hub, such as "gpt2"; or the folder of a model.
    `device`: as for `find_device`; None takes the GPU if there is one, else the CPU.
    `mapped`: keep the data type of the checkpoint, but compute in float32 (see
    `compute_in_float32`). The cast takes time at each use, and memory for one layer at a time: on
    the CPU a 16-bit checkpoint, in one file or several, stays memory-mapped on the disk.

    Returns (model, tokenizer), as transformers' Auto classes make them. On the CPU the weights of a
    float32 checkpoint are views of the mapped file, which several processes share in memory.

    Raises FileNotFoundError if the embedded model was not fetched yet, ConnectionError if the hub
    cannot be reached and the model is not in its cache, OSError (by transformers) if there is no
    such model or it has no safetensors file, ImportError if the tokenizer needs a package that is
    not installed, and ValueError as `find_device` and `check_files`, for a model that is not a
    decoder-only language model, is quantized or comes with its own code, for a checkpoint that
    lacks tensors or has one in another shape, and for a name that is neither a folder nor a valid
    id. Warns about tensors that the model does not use.
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
    """The device for models: `name`, else the environment variable CHAPTER13_DEVICE ("cpu",
    "cuda", "cuda:1"), else the GPU if there is one, else the CPU.

    Raises ValueError if there is no such device; for a GPU that PyTorch does not find it says why.
    """
    name = name or os.environ.get("CHAPTER13_DEVICE")
    if not name:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"the device must be cpu, cuda or cuda:1, not {name!r}") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        why = f"it is built for CUDA {torch.version.cuda}, but no driver answers: see nvidia-smi"
        if torch.version.cuda is None:
            why = "it is a build for CPUs alone"
        raise ValueError(f"PyTorch {torch.__version__} finds no GPU: {why}")
    return device


def skeleton(name: str | Path, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The model that `config.json` describes, without memory for its weights.

    Parameters are on the meta device, buffers are real. `name`: as for `load`; only the
    configuration is fetched. In a folder the headers of the weights are read, and the head and the
    embeddings too if a head is stored although the configuration says that it is tied.

    Raises as `load`, except for errors of tokenizers and missing tensors.
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
    """Makes a model with weights in float16 or bfloat16 compute in float32; returns the model.

    Each module's own weights are cast while it computes, so there are copies of one layer at a
    time. Embeddings are cast after the look-up. Llama and GPT-2 then compute, bit for bit, the same
    as with all weights cast to float32.
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
    """(source, loading options) of a model for transformers; shortens transformers' errors."""
    if name == EMBEDDED:
        source, local = str(require(EMBEDDED)), True
    elif Path(name).is_file():
        raise ValueError(f"{name} is a file: name the folder that holds the model")
    else:
        source, local = str(name), Path(name).is_dir() or not _hub_answers(str(name))

    silence_torchao()  # before transformers is imported
    from transformers.utils import logging

    bars = logging.is_progress_bar_enabled()
    if local:
        logging.disable_progress_bar()  # loading is too fast for a bar
    try:
        yield source, {"trust_remote_code": False, "local_files_only": local}
    except OSError as error:
        if not local or Path(source).is_dir():
            if len(str(error)) <= 300 and "\n" not in str(error):
                raise
            raise OSError(in_one_line(error, 300)) from error  # transformers writes paragraphs
        raise ConnectionError(
            f"The Hugging Face hub cannot be reached, and {name!r} is not among the models that "
            f"were fetched before. Without a network use the embedded model: load({EMBEDDED!r})."
        ) from error
    finally:
        if bars:
            logging.enable_progress_bar()


def _hub_answers(name: str) -> bool:
    """Asks the hub once, with a time limit: offline, transformers would retry for 23 seconds."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    try:
        HfApi().model_info(name, timeout=HUB_TIMEOUT)
    except HfHubHTTPError:
        return True  # an answer: no such model, or no access to it; transformers will report it
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

    The tensors are views of the mapped file: the first access to a value reads it from disk, and
    several processes share one copy in memory. Do not change them in place: the file does not
    change, but all code that uses the tensor sees the change, and it takes extra memory. Work on a
    `.clone()`.

    Raises FileNotFoundError if the data was not fetched yet.
    """
    from safetensors import safe_open

    if path is None:
        path = require(EMBEDDED) / "model.safetensors"
    with safe_open(path, framework="pt") as file:
        names = [name for name in file.keys() if name.endswith("_proj.weight")]
        return {name: file.get_tensor(name) for name in sorted(names, key=_place)}


def gguf_path() -> Path:
    """The GGUF file that the embedded model was made from: 4-bit weights, channels not shuffled.

    Raises FileNotFoundError if the data was not fetched yet.
    """
    return require("smollm2-gguf") / GGUF


def _place(name: str) -> tuple[int, int]:
    """Sort key: layer 2 before layer 10, and within a layer the order of computation."""
    _, _, layer, _, kind, _ = name.split(".")
    return int(layer), LINEARS.index(kind)
