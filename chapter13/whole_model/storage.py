"""A model's quantized layers in one safetensors file, bit for bit, and back."""

import json
import os
from pathlib import Path

import torch
from torch import nn

from chapter13.packing import packed_size
from chapter13.tensors import QuantizedTensor
from chapter13.whole_model.layers import linear_layers, replace_layers, weight_of
from chapter13.whole_model.linear import QuantizedLinear, assemble

_KEY = "chapter13"  # of our description, in the header of a safetensors file


def save_quantized(model: nn.Module, path: Path | str) -> None:
    """Writes a model with QuantizedLinear layers into one safetensors file, bit for bit.

    The file appears at once or not at all. Weights that two names share are stored once. What the
    codes mean (method, bits, shape, group size) stands in the header as JSON.
    """
    from safetensors.torch import save_file

    plans = {name: module.plan for name, module in _quantized_layers(model).items()}
    if not plans:
        raise ValueError(f"{type(model).__name__} has no quantized layer: quantize_model first")
    tensors, seen = {}, set()
    for name, tensor in model.state_dict().items():
        memory = tensor.device, tensor.data_ptr(), tensor.shape
        if memory not in seen or not tensor.numel():
            seen.add(memory)
            tensors[name] = tensor.contiguous()
    path = Path(path)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        # one entry alone: safetensors writes several in an order that changes from run to run
        save_file(tensors, part, metadata={_KEY: json.dumps(plans)})
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def load_quantized(model: nn.Module, path: Path | str) -> nn.Module:
    """Gives a model the weights of a file that `save_quantized` wrote; returns the model.

    `model`: of the same architecture, its linear layers still unquantized; one without memory, as
    `models.skeleton` makes it, then holds the mapped file. All is compared before anything is
    changed. Raises ValueError where the file is not such a one, or not of this model:
    which layer, and what differs.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            plans = json.loads((file.metadata() or {}).get(_KEY, "null"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except (SafetensorError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    if not isinstance(plans, dict):
        raise ValueError(f"{path} was not written by save_quantized: its header has no {_KEY!r}")
    layers = linear_layers(model)
    if set(plans) != set(layers):
        odd = sorted(set(plans) ^ set(layers))
        raise ValueError(f"{path} is of another model: {len(odd)} layers differ, first {odd[0]}")
    new = {}
    for name, layer in layers.items():
        own = {key[len(name) + 1 :]: t for key, t in tensors.items() if key.startswith(f"{name}.")}
        new[name] = QuantizedLinear(_checked(name, plans[name], own), own.get("bias"))
        if list(weight_of(layer).shape) != plans[name]["shape"]:
            shape = list(weight_of(layer).shape)
            raise ValueError(f"{name} has shape {shape}, in {path} {plans[name]['shape']}")
    rest = {key: t for key, t in tensors.items() if key.rpartition(".")[0] not in layers}
    state = model.state_dict(keep_vars=True)  # weights with two names are one object
    for key, tensor in rest.items():
        if key not in state or state[key].shape != tensor.shape:
            raise ValueError(f"{path} holds {key} {list(tensor.shape)}, which does not fit here")
    given = {id(state[key]) for key in rest}
    missing = [
        key
        for key, tensor in state.items()
        if key.rpartition(".")[0] not in layers and id(tensor) not in given
    ]
    if missing:
        raise ValueError(f"{path} lacks {len(missing)} tensors of this model, first {missing[0]}")
    device = next(model.parameters()).device
    hollow = device.type == "meta"
    place = "cpu" if hollow else device
    replace_layers(model, lambda name, _: new[name].to(place), progress=False)
    model.load_state_dict(rest, strict=False, assign=hollow)
    if hollow:
        model.tie_weights()
    return model


def _quantized_layers(model: nn.Module) -> dict[str, QuantizedLinear]:
    modules = model.named_modules()
    return {name: module for name, module in modules if isinstance(module, QuantizedLinear)}


def _checked(name: str, plan: dict, tensors: dict[str, torch.Tensor]) -> QuantizedTensor:
    """The QuantizedTensor of a file's layer, if codes and scales have the sizes that it says."""
    try:
        quantized = assemble(plan, tensors)
        expected = packed_size(quantized.shape.numel(), quantized.bits)
        if quantized.packed.dtype != torch.uint8 or quantized.packed.shape != (expected,):
            raise ValueError(f"{list(quantized.packed.shape)} packed bytes, not [{expected}]")
        quantized.dequantize()  # finds out whether the scales fit
    except (
        ArithmeticError,
        AttributeError,
        LookupError,
        RuntimeError,
        TypeError,
        ValueError,
    ) as error:
        raise ValueError(f"{name} in the file is damaged: {error!r}") from error
    return quantized
