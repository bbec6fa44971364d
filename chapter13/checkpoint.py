"""GPTQ's checkpoint format, out and in: what AutoGPTQ, GPTQModel, transformers and vLLM load.

A folder with safetensors, the model's `config.json` and in it a `quantization_config`. How a
weight's codes are stored in 32-bit words is in `gptq_words.py`; here is what makes and reads the
folder around them.
"""

import json
import re
import tempfile
from collections.abc import Iterable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from torch import nn

from chapter13.gptq_words import (
    BITS,
    FLOATS,
    FORMATS,
    check_shape,
    from_gptq,
    to_gptq,
)
from chapter13.model_files import check_pointer, read_json
from chapter13.models import skeleton
from chapter13.tensors import check_part
from chapter13.whole_model.layers import has_tied_head, linear_layers, weight_of
from chapter13.whole_model.linear import QuantizedLinear, quantized_layers

SHARD = 2**27  # bytes of a file, at most, and of what is in memory of it when it is written


def save_gptq(
    model: nn.Module,
    directory: Path | str,
    tokenizer=None,
    checkpoint_format: str = "gptq",
) -> None:
    """Writes a model with QuantizedLinear layers as a GPTQ checkpoint, tokenizer beside it.

    `model`: a causal language model of transformers, all its linear layers but the head quantized
    with "absmax", "affine" or "gptq", at the same bits (2, 3, 4 or 8) and the same group size (an
    int or "channel"). Scales must be float16 numbers. Absmax becomes the unsigned grid of the
    symmetric checkpoints, zero point 2**(bits-1): the same weights. All other tensors keep their
    data type. `desc_act` is false: the inputs stay in their order, also after an act-order over
    static groups, so no reader has to permute them.

    `checkpoint_format`: who reads which was tried with AutoGPTQ 0.7.1 and GPTQModel 7.4.0.

    - "gptq": AutoGPTQ, transformers (which needs GPTQModel and optimum), and GPTQModel if the grid
      is symmetric. It cannot hold a zero point of 0; a group that has it is moved up by one level,
      codes and zero point, which changes no weight, where its highest code leaves room (as in a
      group of zeros).
    - "gptq_v2": GPTQModel and transformers. AutoGPTQ does not know it and would read wrong weights;
      it stops instead, as `quantize_config.json` is not written.

    vLLM was not run. By its source it takes both, with layer sizes that divide into words and
    groups, which hold here; its fast kernel (Marlin) wants a symmetric grid of 4 or 8 bits and
    group size 32, 64, 128 or "channel".

    The directory appears whole or not at all. One that save_gptq wrote before is replaced as a
    whole; FileExistsError for any other that is not empty. Raises TypeError for what is no model
    of transformers, and ValueError where the format cannot hold the model: which layer, and what to
    do instead.
    """
    from transformers import PreTrainedModel

    if checkpoint_format not in FORMATS:
        raise ValueError(
            f'checkpoint_format must be "gptq" or "gptq_v2", not {checkpoint_format!r}'
        )
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"needs a model of transformers, not a {type(model).__name__}")
    directory = Path(directory)
    _check_place(directory)
    layers = quantized_layers(model)
    names = file_names(model)
    settings = _settings(model, layers) | {"checkpoint_format": checkpoint_format}

    directory.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(
        dir=directory.parent, prefix=f".{directory.name}.", ignore_cleanup_errors=True
    ) as temporary:
        folder = Path(temporary) / "new"
        folder.mkdir()
        _write_tensors(folder, _renamed(_stored_tensors(model, layers, checkpoint_format), names))
        _write_json(folder / "config.json", _model_config(model, settings))
        if checkpoint_format == "gptq":
            _write_json(folder / "quantize_config.json", settings)
        if model.generation_config is not None:
            model.generation_config.save_pretrained(folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        if directory.exists():
            directory.rename(Path(temporary) / "former")
        folder.rename(directory)


def file_names(model: nn.Module) -> dict[str, str]:
    """Modules that have another name in the model's own files: name in the model -> in the file.

    transformers renames some modules when it loads a model (GPT-NeoX' `embed_out` to `lm_head`);
    other programs look for the names of the file. Raises ValueError if it regroups weights as well:
    such a checkpoint cannot be written.
    """
    from transformers.core_model_loading import revert_weight_conversion

    layers = quantized_layers(model)
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    shapes |= {f"{name}.weight": layer.quantized.shape for name, layer in layers.items()}
    ours = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    files = revert_weight_conversion(model, dict(ours))
    name_of = {id(tensor): name for name, tensor in files.items()}
    for name, tensor in ours.items():
        if id(tensor) not in name_of:
            raise ValueError(
                f"{type(model).__name__} holds {name} in another form than the model's own files: "
                "a GPTQ checkpoint of it cannot be written"
            )
    owners = {
        name.rpartition(".")[0]: name_of[id(t)].rpartition(".")[0] for name, t in ours.items()
    }
    return {name: other for name, other in owners.items() if name != other}


def _stored_tensors(
    model: nn.Module, layers: dict[str, QuantizedLinear], checkpoint_format: str
) -> Iterator[tuple[str, torch.Tensor]]:
    """Names and tensors of a checkpoint in the model's order, each made when its turn comes."""
    done, seen = set(), set()
    for key, tensor in model.state_dict().items():
        memory = tensor.device, tensor.data_ptr(), tensor.shape
        tied = memory in seen and tensor.numel()  # given already, under its first name
        seen.add(memory)
        owner = key.rpartition(".")[0]
        if owner in layers and owner not in done:
            done.add(owner)
            layer = layers[owner]
            try:
                stored = to_gptq(layer.quantized, checkpoint_format)
            except ValueError as error:
                raise ValueError(f"{owner}: {error}") from error
            if layer.bias is not None:
                stored["bias"] = layer.bias
            yield from ((f"{owner}.{part}", tensor) for part, tensor in stored.items())
        elif owner in layers:
            continue
        elif not tied:
            yield key, tensor
        elif checkpoint_format == "gptq":
            # AutoGPTQ's loader ties what it did not find to memory that nothing was read into
            yield key, tensor.clone()


def _renamed(
    tensors: Iterable[tuple[str, torch.Tensor]], owners: dict[str, str]
) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors, with other names for the modules that own them."""
    for key, tensor in tensors:
        owner, _, part = key.rpartition(".")
        yield (f"{owners[owner]}.{part}" if owner in owners else key), tensor


def _write_tensors(folder: Path, tensors: Iterator[tuple[str, torch.Tensor]]) -> None:
    """Writes safetensors files of SHARD bytes at most (or one tensor), and an index of several.

    The tensors of one file are in memory at a time.
    """
    from safetensors.torch import save_file

    shard, size, files, total = {}, 0, [], 0

    def write():
        save_file(shard, folder / f"{len(files)}.part", metadata={"format": "pt"})
        files.append(list(shard))
        shard.clear()

    for key, tensor in tensors:
        if shard and size + tensor.nbytes > SHARD:
            write()
            size = 0
        shard[key] = tensor.contiguous()
        size += tensor.nbytes
        total += tensor.nbytes
    write()
    if len(files) == 1:
        (folder / "0.part").rename(folder / "model.safetensors")
        return
    place = {}
    for number, keys in enumerate(files):
        name = f"model-{number + 1:05}-of-{len(files):05}.safetensors"
        (folder / f"{number}.part").rename(folder / name)
        place |= dict.fromkeys(keys, name)
    index = {"metadata": {"total_size": total}, "weight_map": place}
    _write_json(folder / "model.safetensors.index.json", index)


def load_gptq(directory: Path | str, model: nn.Module | None = None) -> nn.Module:
    """A model with QuantizedLinear layers (affine) from a GPTQ checkpoint, whoever wrote it.

    `directory`: holds `config.json` and safetensors, in format "gptq" or "gptq_v2", symmetric or
    not, 2, 3, 4 or 8 bits. `model`: None builds it from `config.json`, on the CPU, in float32 (what
    is not quantized is cast), ready to evaluate, without a network or foreign code; or a model of
    that architecture, still unquantized, whose weights are replaced in place. Returns the model.

    All is checked before a given model is changed. Raises FileNotFoundError where there is no such
    directory or file, and ValueError, naming file or tensor, for what is damaged or missing or does
    not fit; for pickled weights (`.bin`, `.pt`), which may hold a program; for settings that these
    layers cannot express (a `g_idx` out of order, other bits or groups for some of the layers); and
    for a zero point of 0 in format "gptq", which its readers do not agree about, unless GPTQModel
    wrote it: its encoding of 0 can be recognised.
    """
    directory = Path(directory)
    settings = _read_settings(directory)
    tensors = _read_tensors(directory)
    built = skeleton(directory) if model is None else model
    names = {file: name for name, file in file_names(built).items()}
    tensors = dict(_renamed(tensors.items(), names))
    layers = _read_layers(built, tensors, settings)
    rest = _read_rest(built, tensors, layers)

    for name, layer in layers.items():
        built.set_submodule(name, layer)
    built.load_state_dict(rest, strict=False, assign=True)
    built.tie_weights()
    return built.eval() if model is None else built


def _settings(model: nn.Module, layers: dict[str, QuantizedLinear]) -> dict:
    """The quantization_config of a model that the format can hold; else ValueError."""
    if not layers:
        raise ValueError(f"{type(model).__name__} has no quantized layer: quantize_model first")
    if left := list(linear_layers(model)):
        raise ValueError(f"{len(left)} linear layers are not quantized, first {left[0]}")
    first, *_ = layers.values()
    bits, group_size = first.quantized.bits, first.quantized.group_size
    symmetric = True
    for name, layer in layers.items():
        weight = layer.quantized
        if weight.kind not in ("absmax", "affine"):
            raise ValueError(
                f"{name} is quantized with a code book (NF4 or FP4), but the format holds evenly "
                'spaced levels: use "absmax", "affine" or "gptq"'
            )
        if weight.bits not in BITS:
            raise ValueError(f"{name} has {weight.bits} bits; the format holds 2, 3, 4 or 8")
        if weight.group_size is None:
            raise ValueError(
                f"{name} has one scale for the whole tensor; the format holds one per row at "
                'least: use group_size="channel"'
            )
        if (weight.bits, weight.group_size) != (bits, group_size):
            raise ValueError(
                f"{name} has {weight.bits} bits and group size {weight.group_size!r}, "
                f"other layers {bits} and {group_size!r}: the format holds one setting for all"
            )
        check_shape(name, weight.shape)
        if weight.kind == "affine":
            symmetric &= bool((weight.zero_point == 1 << (bits - 1)).all())
    return {
        "quant_method": "gptq",
        "bits": bits,
        "group_size": -1 if group_size == "channel" else group_size,
        "desc_act": False,
        "sym": symmetric,
        "true_sequential": True,
        "meta": {"quantizer": [f"chapter13:{_own_version()}"]},
    }


def _model_config(model: nn.Module, settings: dict) -> dict:
    """What goes into config.json; the base of the rotary embedding also under its former names.

    transformers 4, and AutoGPTQ with it, knows no `rope_parameters` and would silently take 10000.
    """
    config = json.loads(model.config.to_json_string())
    config["architectures"] = [type(model).__name__]
    config["tie_word_embeddings"] = has_tied_head(model)
    config["dtype"] = str(model.dtype).removeprefix("torch.")
    config["quantization_config"] = settings
    rope = config.get("rope_parameters") or {}
    if "rope_theta" in rope:
        config["rope_theta"] = rope["rope_theta"]
        if rope.get("rope_type", "default") != "default":
            config["rope_scaling"] = rope
    return config


def _check_place(directory: Path) -> None:
    """Raises FileExistsError where something lies that save_gptq did not write."""
    if not directory.exists() or (directory.is_dir() and not any(directory.iterdir())):
        return
    try:
        config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
        makers = config["quantization_config"]["meta"]["quantizer"]
        ours = any(maker.startswith("chapter13:") for maker in makers)
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        ours = False
    if not ours:
        raise FileExistsError(
            f"{directory} exists and is not a checkpoint that save_gptq wrote, and it replaces "
            "nothing else: choose another name, or remove it yourself"
        )


def _own_version() -> str:
    try:
        return version("chapter13")
    except PackageNotFoundError:  # run from a checkout that was not installed
        return "unknown"


def _write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _read_settings(directory: Path) -> dict:
    """The quantization_config, checked; AutoGPTQ also keeps it in a file of its own."""
    path = directory / "config.json"
    settings = read_json(path).get("quantization_config")
    if settings is None and (directory / "quantize_config.json").is_file():
        path = directory / "quantize_config.json"
        settings = read_json(path)
    if not isinstance(settings, dict):
        raise ValueError(f"{path} has no quantization_config: not a quantized checkpoint")

    settings = {"quant_method": "gptq", "checkpoint_format": settings.get("format")} | settings
    if settings["checkpoint_format"] is None:
        settings["checkpoint_format"] = "gptq"
    if settings["quant_method"] != "gptq":
        raise ValueError(f"{path}: quant_method is {settings['quant_method']!r}, not 'gptq'")
    if settings["checkpoint_format"] not in FORMATS or settings.get("is_marlin_format"):
        raise ValueError(
            f"{path}: the format is {settings['checkpoint_format']!r}"
            f"{', for Marlin' if settings.get('is_marlin_format') else ''}; "
            f"only {' and '.join(FORMATS)} can be read"
        )
    if settings.get("bits") not in BITS:
        raise ValueError(f"{path}: bits is {settings.get('bits')!r}, not 2, 3, 4 or 8")
    size = settings.get("group_size")
    if isinstance(size, bool) or not isinstance(size, int) or not (size == -1 or size > 0):
        raise ValueError(f"{path}: group_size is {size!r}, neither -1 nor a positive int")
    for key in ("dynamic", "rotation"):  # of GPTQModel
        if settings.get(key):
            raise ValueError(f"{path}: {key!r} is set, which QuantizedLinear cannot express")
    return settings


def _read_tensors(directory: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint's safetensors files, by name, mapped from disk."""
    from safetensors import SafetensorError, safe_open

    indices = list(directory.glob("*.safetensors.index.json"))
    if len(indices) == 1:
        named = read_json(indices[0]).get("weight_map")
        if not isinstance(named, dict) or not all(isinstance(v, str) for v in named.values()):
            raise ValueError(f"{indices[0]} has no weight_map")
        files = [directory / Path(name).name for name in sorted(set(named.values()))]
    else:
        files, named = list(directory.glob("*.safetensors")), {}
        if len(files) != 1:
            pickled = sorted(path.name for path in directory.glob("*") if path.suffix in PICKLED)
            found = f"{', '.join(pickled)}, which may hold a program" if pickled else "none"
            raise ValueError(
                f"{directory} must hold one .safetensors file, or several with one index; found "
                + (f"{len(files)}" if files else found)
            )
    tensors = {}
    for path in files:
        check_pointer(path)
        try:
            with safe_open(path, framework="pt") as file:
                tensors |= {name: file.get_tensor(name) for name in file.keys()}
        except SafetensorError as error:
            raise ValueError(f"{path} cannot be read: {error}") from error
    if missing := sorted(set(named) - set(tensors)):
        raise ValueError(f"{missing[0]} stands in {indices[0].name} but in no file")
    return tensors


PICKLED = (".bin", ".pt", ".pth")


def _read_layers(model, tensors, settings) -> dict[str, QuantizedLinear]:
    """The quantized layers of a checkpoint, if they fit the model."""
    layers = linear_layers(model)
    names = [key.removesuffix(".qweight") for key in tensors if key.endswith(".qweight")]
    if odd := sorted(set(names) - set(layers)):
        raise ValueError(
            f"{odd[0]} is quantized in the checkpoint, but no linear layer of this "
            f"{type(model).__name__} that is still unquantized (its head is left alone)"
        )
    if not names:
        raise ValueError("the checkpoint has no quantized layer: there is no .qweight")
    read = {}
    for name in names:
        weight = weight_of(layers[name])
        device = "cpu" if weight.device.type == "meta" else weight.device
        try:
            quantized = from_gptq(_own(tensors, name), weight.shape, settings)
            bias = _read_bias(tensors.get(f"{name}.bias"), layers[name])
        except ValueError as error:
            raise ValueError(f"{name}.{error}") from error
        read[name] = QuantizedLinear(quantized, bias).to(device)
    return read


def _own(tensors, name):
    parts = ("qweight", "qzeros", "scales", "g_idx")
    return {part: tensors.get(f"{name}.{part}") for part in parts}


def _read_bias(bias: torch.Tensor | None, layer: nn.Module) -> torch.Tensor | None:
    """A layer's bias in float32; AutoGPTQ stores zeros where the model has none."""
    if bias is None:
        if layer.bias is not None:
            raise ValueError("bias is missing")
        return None
    check_part("bias", bias, (weight_of(layer).shape[0],), FLOATS)
    if layer.bias is not None:
        return bias.float()
    if bias.any():
        raise ValueError("bias is not zero, but this model's layer has no bias")
    return None


def _read_rest(model, tensors, layers) -> dict[str, torch.Tensor]:
    """Embeddings, norms and what else is not quantized, in the model's data types."""
    parts = {"qweight", "qzeros", "scales", "g_idx", "bias"}
    owners = {key: key.rpartition(".")[0] for key in tensors}
    rest = {key: t for key, t in tensors.items() if owners[key] not in layers}
    for key in tensors.keys() - rest.keys():
        if key.rpartition(".")[2] not in parts:
            raise ValueError(f"{key} has no place in a quantized layer")
    state = model.state_dict(keep_vars=True)
    shared: dict[int, list[str]] = {}  # tied weights: one tensor of the model, several names
    for key, tensor in state.items():
        if key.rpartition(".")[0] not in layers:
            shared.setdefault(id(tensor), []).append(key)
    read = {}
    for keys in shared.values():
        given = [key for key in keys if key in rest]
        if not given:
            raise ValueError(f"{keys[0]} is missing")
        value = rest[given[0]]
        for key in given:
            if rest[key].shape != state[key].shape:
                wanted = list(state[key].shape)
                raise ValueError(f"{key} has shape {list(rest[key].shape)}, the model {wanted}")
            if not torch.equal(rest[key], value):
                raise ValueError(f"{key} and {given[0]} differ, but the model ties them")
        for key in keys:
            old = state[key]
            device = "cpu" if old.device.type == "meta" else old.device
            read[key] = value.to(device, old.dtype)
    ignored = [rf"({pattern})" for pattern in model._keys_to_ignore_on_load_unexpected or ()]
    ignored = re.compile("|".join([*ignored, r"rotary_emb\.inv_freq"]))  # of older programs
    if odd := sorted(key for key in rest.keys() - read.keys() if not ignored.search(key)):
        raise ValueError(f"{odd[0]} has no place in this {type(model).__name__}")
    return read
