"""Saves a model's quantized layers in one safetensors file, bit for bit, and loads them."""

import json
from pathlib import Path

import torch
from torch import nn

from chapter13.atomic import replacing
from chapter13.tensors import QuantizedTensor
from chapter13.whole_model.layers import linear_layers, replace_layers, weight_of
from chapter13.whole_model.linear import QuantizedLinear, quantized_layers

_KEY = "chapter13"  # the key of our description in the header of a safetensors file


def save_quantized(model: nn.Module, path: Path | str) -> None:
    """Writes a model with QuantizedLinear layers into one safetensors file, bit for bit.

    The file is written atomically. Weights that two names share are stored once. The header says in
    JSON what the codes mean (method, bits, shape, group size). Raises ValueError if no layer is
    quantized.
    """
    from safetensors.torch import save_file

    plans = {name: module.plan for name, module in quantized_layers(model).items()}
    if not plans:
        raise ValueError(f"{type(model).__name__} has no quantized layer: quantize_model first")
    tensors, seen = {}, set()
    for name, tensor in model.state_dict().items():
        memory = tensor.device, tensor.data_ptr(), tensor.shape
        if memory not in seen or not tensor.numel():
            seen.add(memory)
            tensors[name] = tensor.contiguous()
    with replacing(path) as part:
        # a single entry: safetensors writes several in an order that changes from run to run
        save_file(tensors, part, metadata={_KEY: json.dumps(plans)})


def load_quantized(model: nn.Module, path: Path | str) -> nn.Module:
    """Gives a model the weights of a file that `save_quantized` wrote; returns the model.

    `model`: of the same architecture, its linear layers still unquantized; a model on the meta
    device (`models.skeleton`) gets tensors mapped from the file. Everything is checked before
    anything is changed. Raises ValueError if save_quantized did not write the file, or if it
    belongs to another model: which layer, and what differs.
    """
    plans, tensors = _read(path)
    layers = linear_layers(model)
    if set(plans) != set(layers):
        odd = sorted(set(plans) ^ set(layers))
        raise ValueError(
            f"{path} belongs to another model: {len(odd)} layers differ, first {odd[0]}"
        )
    new = {}
    for name, layer in layers.items():
        own = {key[len(name) + 1 :]: t for key, t in tensors.items() if key.startswith(f"{name}.")}
        try:
            quantized = QuantizedTensor.from_parts(plans[name], own)
            new[name] = QuantizedLinear(quantized, own.get("bias"))
        except ValueError as error:
            raise ValueError(f"{path}: {name} is damaged: {error}") from error
        if weight_of(layer).shape != quantized.shape:
            shape = list(weight_of(layer).shape)
            raise ValueError(f"{name} has shape {shape}, but {list(quantized.shape)} in {path}")
    rest = {key: t for key, t in tensors.items() if key.rpartition(".")[0] not in layers}
    _check_rest(model, layers, rest, path)
    device = next(model.parameters()).device
    on_meta = device.type == "meta"
    place = "cpu" if on_meta else device
    replace_layers(model, lambda name, _: new[name].to(place), progress=False)
    model.load_state_dict(rest, strict=False, assign=on_meta)
    if on_meta:
        model.tie_weights()
    return model


def _read(path: Path | str) -> tuple[dict, dict[str, torch.Tensor]]:
    """(the description of each layer, all tensors by name, mapped) of a saved file."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            plans = json.loads((file.metadata() or {}).get(_KEY, "null"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except (SafetensorError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    if not isinstance(plans, dict):
        raise ValueError(f"{path} was not written by save_quantized: its header has no {_KEY!r}")
    return plans, tensors


def _check_rest(model, layers, rest, path) -> None:
    """Raises ValueError unless `rest` has exactly the tensors that are not quantized."""
    state = model.state_dict(keep_vars=True)  # weights with two names are one object
    for key, tensor in rest.items():
        if key not in state or state[key].shape != tensor.shape:
            raise ValueError(
                f"{path} holds {key} {list(tensor.shape)}, which does not fit this model"
            )
    given = {id(state[key]) for key in rest}
    missing = [
        key
        for key, tensor in state.items()
        if key.rpartition(".")[0] not in layers and id(tensor) not in given
    ]
    if missing:
        raise ValueError(f"{path} lacks {len(missing)} tensors of this model, first {missing[0]}")
