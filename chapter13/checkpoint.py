"""Writes and reads checkpoints in GPTQ's format, which other programs read and write too.

A checkpoint is a folder with safetensors files and the model's `config.json`, which contains a
`quantization_config`. `gptq_words.py` stores the codes of one weight in 32-bit words; this file
writes and reads the folder around them. `save_gptq` says which program reads which checkpoint.
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

SHARD = 2**27  # bytes of a file at most, and of its tensors in memory while it is written


def save_gptq(
    model: nn.Module,
    directory: Path | str,
    tokenizer=None,
    checkpoint_format: str = "gptq",
) -> None:
    """Writes a model with QuantizedLinear layers as a GPTQ checkpoint, with its tokenizer.

    `model`: a causal language model of transformers. All its linear layers except the head must be
    quantized with "absmax", "affine", "gptq" or "awq", with the same bits (2, 3, 4 or 8) and the
    same group size (an int or "channel"). Scales must be float16 numbers. Absmax becomes the
    unsigned grid of symmetric checkpoints, with zero point 2**(bits-1) and the same weights. All
    other tensors keep their data type. `desc_act` is false: the inputs stay in order, also after
    act-order with static groups, so no reader has to permute them.

    `checkpoint_format`, tried with AutoGPTQ 0.7.1 and GPTQModel 7.4.0:

    - "gptq": read by AutoGPTQ, transformers (which needs GPTQModel and optimum), and GPTQModel if
      the grid is symmetric. It cannot hold a zero point of 0. A group that has one is moved up by
      one level, codes and zero point, which changes no weight; this needs room above its highest
      code (as in a group of zeros).
    - "gptq_v2": read by GPTQModel and transformers. AutoGPTQ does not know it and would read wrong
      weights; it stops instead, because `quantize_config.json` is not written.

    vLLM was not run. By its source of 2026 it reads GPTQ checkpoints only through its Marlin
    kernels: a symmetric grid of 4 or 8 bits, with group size 32, 64, 128 or "channel".

    The directory appears complete or not at all. One that save_gptq wrote before is replaced;
    FileExistsError for any other that is not empty. Raises TypeError if `model` is not a model of
    transformers, and ValueError if the format cannot hold it: which layer, and what to do instead.
    """
    from transformers import PreTrainedModel

    if checkpoint_format not in FORMATS:
        raise ValueError(
            f'checkpoint_format must be "gptq" or "gptq_v2", not {checkpoint_format!r}'
        )
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"model must be a model of transformers, not a {type(model).__name__}")
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
    """Modules with another name in the model's own files: name in the model -> in the file.

    transformers renames some modules when it loads a model (GPT-NeoX' `embed_out` to `lm_head`);
    other programs expect the names of the file. Raises ValueError if transformers also regroups
    weights: such a checkpoint cannot be written.
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
    """Names and tensors of a checkpoint in the model's order, each made when it is needed."""
    done, seen = set(), set()
    for key, tensor in model.state_dict().items():
        memory = tensor.device, tensor.data_ptr(), tensor.shape
        tied = memory in seen and tensor.numel()  # already yielded, under its first name
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
            # AutoGPTQ's loader would tie a missing tensor to memory that was never filled
            yield key, tensor.clone()


def _renamed(
    tensors: Iterable[tuple[str, torch.Tensor]], owners: dict[str, str]
) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors, with the names of their modules replaced."""
    for key, tensor in tensors:
        owner, _, part = key.rpartition(".")
        yield (f"{owners[owner]}.{part}" if owner in owners else key), tensor


def _write_tensors(folder: Path, tensors: Iterator[tuple[str, torch.Tensor]]) -> None:
    """Writes safetensors files of at most SHARD bytes (or one tensor), and an index for several.

    Only the tensors of one file are in memory at a time.
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
    """A model with QuantizedLinear layers (affine) from a GPTQ checkpoint of any program.

    `directory`: holds `config.json` and safetensors files, in format "gptq" or "gptq_v2", symmetric
    or not, 2, 3, 4 or 8 bits. `model`: None builds it from `config.json`, on the CPU, in float32
    (unquantized tensors are cast), ready to evaluate, without a network or foreign code; or a model
    of that architecture, still unquantized, whose weights are replaced in place. Returns the model.

    Everything is checked before a given model is changed. Raises FileNotFoundError if the directory
    or a file does not exist, and ValueError, naming file or tensor, for parts that are damaged or
    missing or do not fit; for pickled weights (`.bin`, `.pt`), which may hold a program; for
    settings that QuantizedLinear does not support (a `g_idx` out of order, other bits or groups for
    some of the layers); and for a zero point of 0 in format "gptq", which programs read
    differently, unless GPTQModel wrote it: its encoding of 0 can be recognized.
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
    """The quantization_config of a model; ValueError if the format cannot hold the model."""
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
                f"{name} is quantized with a code book (NF4 or FP4), but the format only holds "
                'evenly spaced levels: use "absmax", "affine", "gptq" or "awq"'
            )
        if weight.bits not in BITS:
            raise ValueError(f"{name} has {weight.bits} bits; the format holds 2, 3, 4 or 8")
        if weight.group_size is None:
            raise ValueError(
                f"{name} has one scale for the whole tensor; the format needs at least one per "
                'row: use group_size="channel"'
            )
        if (weight.bits, weight.group_size) != (bits, group_size):
            raise ValueError(
                f"{name} has {weight.bits} bits and group size {weight.group_size!r}, "
                f"other layers {bits} and {group_size!r}: the format has one setting for all"
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
    """Raises FileExistsError if the directory has content that save_gptq did not write."""
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
            f"{directory} exists, and save_gptq replaces only checkpoints that it wrote itself: "
            "choose another name, or remove it yourself"
        )


def _own_version() -> str:
    try:
        return version("chapter13")
    except PackageNotFoundError:  # run from a checkout that was not installed
        return "unknown"


def _write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _read_settings(directory: Path) -> dict:
    """The checked quantization_config; AutoGPTQ also writes it to a separate file."""
    path = directory / "config.json"
    settings = read_json(path).get("quantization_config")
    if settings is None and (directory / "quantize_config.json").is_file():
        path = directory / "quantize_config.json"
        settings = read_json(path)
    if not isinstance(settings, dict):
        raise ValueError(f"{path} has no quantization_config: it is not a quantized checkpoint")

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
            raise ValueError(f"{path}: {key!r} is set, which QuantizedLinear does not support")
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
        raise ValueError(f"{missing[0]} is listed in {indices[0].name}, but no file has it")
    return tensors


PICKLED = (".bin", ".pt", ".pth")


def _read_layers(model, tensors, settings) -> dict[str, QuantizedLinear]:
    """The quantized layers of a checkpoint, if they fit the model."""
    layers = linear_layers(model)
    names = [key.removesuffix(".qweight") for key in tensors if key.endswith(".qweight")]
    if odd := sorted(set(names) - set(layers)):
        raise ValueError(
            f"{odd[0]} is quantized in the checkpoint, but this {type(model).__name__} has no "
            "unquantized linear layer of that name (the head does not count)"
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
    """A layer's bias in float32; AutoGPTQ stores zeros if the model has none."""
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
    """Embeddings, norms and all other unquantized tensors, in the model's data types."""
    parts = {"qweight", "qzeros", "scales", "g_idx", "bias"}
    owners = {key: key.rpartition(".")[0] for key in tensors}
    rest = {key: t for key, t in tensors.items() if owners[key] not in layers}
    for key in tensors.keys() - rest.keys():
        if key.rpartition(".")[2] not in parts:
            raise ValueError(f"{key} does not belong in a quantized layer")
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
                raise ValueError(
                    f"{key} has shape {list(rest[key].shape)}, but {wanted} in the model"
                )
            if not torch.equal(rest[key], value):
                raise ValueError(f"{key} and {given[0]} differ, but the model ties them")
        for key in keys:
            old = state[key]
            device = "cpu" if old.device.type == "meta" else old.device
            read[key] = value.to(device, old.dtype)
    ignored = [rf"({pattern})" for pattern in model._keys_to_ignore_on_load_unexpected or ()]
    ignored = re.compile("|".join([*ignored, r"rotary_emb\.inv_freq"]))  # by older programs
    if odd := sorted(key for key in rest.keys() - read.keys() if not ignored.search(key)):
        raise ValueError(f"{odd[0]} does not belong in this {type(model).__name__}")
    return read
