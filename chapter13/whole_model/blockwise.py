"""Quantizes a whole model block by block: can be resumed, and is undone after an error.

`walk.py` sends the calibration text through the blocks. This file has the loop around it: each
block's linear layers become `QuantizedLinear`, and each finished block can be kept in a file, from
which an interrupted run resumes. Methods that only round may use the same loop without any text, so
that a model need not fit into memory.
"""

import hashlib
import json
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from chapter13 import gptq
from chapter13.atomic import replacing
from chapter13.tensors import QuantizedTensor
from chapter13.whole_model.layers import (
    check_all_reached,
    evaluating,
    linear_layers,
    put_parameter,
    put_weight,
    weight_of,
)
from chapter13.whole_model.linear import QuantizedLinear
from chapter13.whole_model.storage import load_quantized, save_quantized
from chapter13.whole_model.walk import Walk

_EARLIER = {"method": "of an earlier version"}

Quantize = Callable[[Walk, int, Callable[[str, float], None]], dict[str, QuantizedTensor]]


def gptq_block(
    walk: Walk, index: int, report: Callable[[str, float], None], **options
) -> dict[str, QuantizedTensor]:
    """Quantizes a block by GPTQ while the text passes through it: name -> QuantizedTensor.

    Leaves the dequantized weights in the block's layers. Layers that read the same input share a
    Hessian. GPTQ treats rows independently, so their weights are stacked into one matrix and
    quantized in one loop over the columns. `report(name, loss)` gets each layer's
    `gptq.layer_loss`; `options` are those of `gptq.quantize`.
    """
    block, quantized = walk.blocks[index], {}

    def change(names, inputs):
        H = gptq.hessian(inputs)
        layers = [block.get_submodule(name) for name in names]
        weights = [weight_of(layer) for layer in layers]
        try:
            stacked = gptq.quantize(torch.cat(weights), H, **options)
        except ValueError as error:
            where = ", ".join(f"{walk.name}.{index}.{name}" for name in names)
            raise ValueError(f"{where}: {error}") from error
        parts = stacked.split([len(weight) for weight in weights])
        for name, layer, weight, part in zip(names, layers, weights, parts, strict=True):
            quantized[name] = part
            restored = part.dequantize()
            report(name, gptq.layer_loss(weight, restored, H))
            put_weight(layer, restored)

    walk.visit(index, change)
    return quantized


def quantize_blocks(
    model: nn.Module,
    tokens: torch.Tensor | None,
    quantize: Quantize,
    settings: dict,
    progress: bool = True,
    resume: Path | str | None = None,
) -> nn.Module:
    """Replaces every linear layer in the model's blocks with a QuantizedLinear.

    `quantize(walk, index, report)` quantizes one block as `gptq_block` does. `tokens`: calibration
    text, or None for a method that reads none. `settings`: the method and its options, which
    distinguish this run from others. `resume`: a folder that keeps each finished block; another
    call with the same model, tokens and settings resumes from them. The finished blocks are then
    mapped from these files, not in memory.

    The first block of each structure is tried out with its quantized layers before the others are
    quantized. After an error or an interruption the model is unchanged; the folder keeps its
    blocks. Raises ValueError if the folder holds another run, if a block does not compute with
    quantized layers, and for experts in one tensor.
    """
    from tqdm.auto import tqdm

    check_all_reached(model)
    undo, tried = [], set()
    with evaluating(model), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        walk = Walk(model, tokens)
        folder = resume and _open_folder(Path(resume), walk, tokens, settings)
        layers = linear_layers(walk.blocks)
        try:
            with tqdm(total=len(layers), desc=_label(settings), disable=not progress) as bar:
                for index, block in enumerate(walk.blocks):
                    undo.append(_Undo(block))
                    file = folder and folder / f"block-{index:04}.safetensors"
                    if file and file.exists():
                        bar.update(len(linear_layers(block)))
                        load_quantized(block, file)
                        walk.advance(index)
                        continue
                    structure = tuple((name, type(part)) for name, part in block.named_modules())
                    _replace_block(walk, index, quantize, bar)
                    if structure not in tried:
                        tried.add(structure)
                        walk.try_out(index)
                    if file:  # from here on the block is in the file, not in memory
                        save_quantized(block, file)
                        for name, layer in undo[-1].linears.items():
                            block.set_submodule(name, layer)
                        load_quantized(block, file)
        except BaseException:  # KeyboardInterrupt too
            for each in undo:
                each.restore()
            raise
    if caught:
        warnings.warn(f"{caught[0].message} ({len(caught)} such warnings)", stacklevel=3)
    return model


def _replace_block(walk: Walk, index: int, quantize: Quantize, bar) -> None:
    """Quantizes a block; its linear layers become `QuantizedLinear`."""
    block, where = walk.blocks[index], f"{walk.name}.{index}"

    def report(name, loss=None):
        text = f"{where}.{name}" if loss is None else f"{where}.{name}: loss {loss:.2%}"
        bar.set_postfix_str(text, refresh=False)
        bar.update()

    linears = linear_layers(block)
    originals = {name: layer.weight for name, layer in linears.items()}
    quantized = quantize(walk, index, report)
    for name, layer in linears.items():
        block.set_submodule(name, QuantizedLinear(quantized[name], layer.bias))
        layer.weight = originals[name]  # `_Undo` keeps the layer, which needs its old weight


class _Undo:
    """Restores a block to its present state, without copies of the weights.

    Norms and biases are replaced by copies: AWQ changes them, and a block's file overwrites them.
    """

    def __init__(self, block: nn.Module):
        self.block, self.linears = block, linear_layers(block)
        self.parameters = [
            (module, name, parameter)
            for module in block.modules()
            for name, parameter in module.named_parameters(recurse=False)
        ]
        for module, name, parameter in self.parameters:
            if parameter.dim() < 2:
                put_parameter(module, name, parameter.detach().clone())

    def restore(self) -> None:
        for name, layer in self.linears.items():
            self.block.set_submodule(name, layer)
        for module, name, parameter in self.parameters:
            setattr(module, name, parameter)


def _open_folder(folder: Path, walk: Walk, tokens: torch.Tensor | None, settings: dict) -> Path:
    """Makes the folder of a run, or checks that it belongs to this run."""
    digest = hashlib.sha256()
    if tokens is not None:
        digest.update(repr(tokens.shape).encode() + tokens.cpu().numpy().tobytes())
    for name, parameter in walk.model.named_parameters():
        start = parameter.detach().reshape(-1)[:8].float().cpu()  # reading all would be slow
        digest.update(f"{name} {tuple(parameter.shape)}".encode() + start.numpy().tobytes())
    run = {
        "settings": {name: str(value) for name, value in settings.items()},
        "model and tokens": digest.hexdigest(),
    }
    file = folder / "run.json"
    if file.exists():
        there = json.loads(file.read_text(encoding="utf-8"))
        if there != run:
            run = _label(there.get("settings", _EARLIER))
            raise ValueError(
                f"{folder} holds the blocks of another run ({run}), with "
                "another model, calibration or options: name another folder, or delete that one"
            )
        return folder
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder} is not empty and holds no run: name another folder")
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(file) as part:
        part.write_text(json.dumps(run), encoding="utf-8")
    return folder


def _label(settings: dict) -> str:
    """ "gptq, bits 4, group_size 64": the method and its options in words."""
    method, *options = settings.items()
    return ", ".join([method[1], *(f"{name} {value}" for name, value in options)])
