"""quantize_model: every linear layer of a model becomes a QuantizedLinear; saved, and loaded again.

Embeddings, norms and the output head keep their data type, as in bitsandbytes, GPTQ and AWQ.
"""

import json
import math
import os
from pathlib import Path

import torch
from torch import nn

from chapter13.codebook import CODE_BOOKS, quantize_codebook
from chapter13.integer import quantize_absmax, quantize_affine
from chapter13.layers import linear_layers, replace_layers, weight_of
from chapter13.linear import QuantizedLinear, assemble
from chapter13.packing import check_bits, packed_size
from chapter13.tensors import QuantizedTensor

METHODS = ("absmax", "affine", "nf4", "fp4")
_KEY = "chapter13"  # of our description, in the header of a safetensors file


def quantize_model(
    model: nn.Module,
    method: str,
    bits: int = 4,
    group_size: int | str | None = 64,
    calibration: torch.Tensor | None = None,
    progress: bool = True,
    **options,
) -> nn.Module:
    """Puts a QuantizedLinear in the place of every `nn.Linear` and `Conv1D` but the head.

    `method`: "absmax" or "affine" with `bits` 2 to 8 and a group size as `quantize_absmax` takes
    it; "nf4" or "fp4", whose block size is `group_size`. `options` go to the quantizer:
    `scale_dtype` for integers, `double_quant` for code books. `calibration`: for methods that
    learn from text; these four do not, and refuse it.

    Changes the model in place and returns it. `report(model)` says what was quantized and what was
    left. When anything fails, or the reader interrupts, the model is as it was.

    Raises ValueError before any work for an unknown method, bits or group sizes that do not fit
    (naming the layers, and the sizes that fit all of them), and for a model without linear layers;
    and for a weight with NaN or Inf.
    """
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, not {method!r}")
    if calibration is not None:
        raise ValueError(f"{method} rounds the weights alone: it takes no calibration tokens")
    check_bits(bits)
    if method in CODE_BOOKS:
        if bits != 4:
            raise ValueError(f"{method} is a table of 16 values: it takes 4 bits, not {bits}")
    else:
        _check_groups(model, group_size)

    def quantize(name: str, layer: nn.Module) -> QuantizedLinear:
        weight = weight_of(layer)
        try:
            if method in CODE_BOOKS:
                quantized = quantize_codebook(weight, method, group_size, **options)
            else:
                integer = {"absmax": quantize_absmax, "affine": quantize_affine}[method]
                quantized = integer(weight, bits, group_size, **options)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
        return QuantizedLinear(quantized, layer.bias)

    return replace_layers(model, quantize, progress, f"{method}, {bits} bits")


def report(model: nn.Module) -> str:
    """What of a model is quantized, at how many bits per weight, and what is not: a few lines."""
    quantized = [m.quantized for m in model.modules() if isinstance(m, QuantizedLinear)]
    weights = sum(each.shape.numel() for each in quantized)
    held = sum(each.nbytes for each in quantized)
    lines = ["no linear layer is quantized"]
    if quantized:
        bits = f"{8 * held / weights:.4g} bits per weight"
        lines = [f"{len(quantized)} linear layers: {weights / 1e6:.1f}M weights at {bits}"]
    kept: dict[str, list[int]] = {}
    seen = set()
    for name, parameter in model.named_parameters():  # names tied weights once
        owner = type(model.get_submodule(name.rpartition(".")[0])).__name__
        if parameter.data_ptr() not in seen:
            seen.add(parameter.data_ptr())
            dtype = str(parameter.dtype).removeprefix("torch.")
            kept.setdefault(f"{owner} in {dtype}", []).append(parameter.numel())
    for what, counts in kept.items():
        lines.append(f"left as it was: {what}, {len(counts)} tensors, {sum(counts) / 1e6:.2f}M")
    return "\n".join(lines)


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
        save_file(tensors, part, metadata={"format": "pt", _KEY: json.dumps(plans)})
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def load_quantized(model: nn.Module, path: Path | str) -> nn.Module:
    """Gives a model the weights of a file that `save_quantized` wrote; returns the model.

    `model`: of the same architecture, its linear layers still unquantized. All is compared before
    anything is changed. Raises ValueError where the file is not such a one, or not of this model:
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
    state = model.state_dict()
    for key, tensor in rest.items():
        if key not in state or state[key].shape != tensor.shape:
            raise ValueError(f"{path} holds {key} {list(tensor.shape)}, which does not fit here")
    given = {state[key].data_ptr() for key in rest}
    missing = [
        key
        for key, tensor in state.items()
        if key.rpartition(".")[0] not in layers and tensor.data_ptr() not in given
    ]
    if missing:
        raise ValueError(f"{path} lacks {len(missing)} tensors of this model, first {missing[0]}")
    device = next(model.parameters()).device
    replace_layers(model, lambda name, _: new[name].to(device), progress=False)
    model.load_state_dict(rest, strict=False)
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


def _check_groups(model: nn.Module, group_size: int | str | None) -> None:
    """Raises ValueError where the group size does not divide the rows of every layer."""
    if group_size in (None, "channel"):
        return
    if isinstance(group_size, bool) or not isinstance(group_size, int) or group_size < 1:
        raise ValueError(
            f'group_size must be None, "channel" or a positive int, not {group_size!r}'
        )
    widths = {name: weight_of(layer).shape[1] for name, layer in linear_layers(model).items()}
    wrong = [name for name, width in widths.items() if width % group_size]
    if wrong:
        common = math.gcd(*widths.values())
        fit = [str(size) for size in range(2, common + 1) if common % size == 0]
        raise ValueError(
            f"group size {group_size} does not divide the rows of {len(wrong)} layers, "
            f"first {wrong[0]} with in_features = {widths[wrong[0]]}; "
            f"these fit all layers: {', '.join(fit) or 'none'}"
        )
