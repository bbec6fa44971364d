"""GPTQ and AWQ for a whole model: block by block, resumable, and undone where it fails.

What a method needs of the calibration text, and what the next block gets to see, is told in
`blocks.py`. Here is the frame around it: each block's linear layers become `QuantizedLinear`; each
finished block can be kept in a file, from which an interrupted run goes on. Methods that only
round may go the same way, without any text: then a model need not fit into memory.
"""

import hashlib
import json
import os
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from chapter13 import gptq
from chapter13.packing import pack
from chapter13.tensors import QuantizedTensor
from chapter13.whole_model.layers import linear_layers, put_weight, weight_of
from chapter13.whole_model.linear import QuantizedLinear
from chapter13.whole_model.storage import load_quantized, save_quantized
from chapter13.whole_model.walk import Walk, find_blocks

Learn = Callable[[Walk, int, Callable[[str, float], None]], dict[str, QuantizedTensor]]


class Unread:
    """What stands for a `Walk` where no text is read: the blocks alone."""

    def __init__(self, model: nn.Module):
        self.name, self.blocks = find_blocks(model)
        self.model = model.eval()

    def advance(self, index: int) -> None:
        """Nothing passes through."""


def gptq_block(
    walk: Walk, index: int, done: Callable[[str, float], None], **options
) -> dict[str, QuantizedTensor]:
    """Quantizes a block by GPTQ while the walk goes through it: name -> QuantizedTensor.

    Leaves the dequantized weights in the block's layers. Layers that read the same input share its
    Hessian, and are one matrix to GPTQ, whose rows have nothing to do with each other: one loop
    over the columns serves them all. `done(name, loss)` is told each layer's `gptq.layer_loss`;
    `options` are those of `gptq.quantize`.
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
        parts = _split(stacked, [len(weight) for weight in weights])
        for name, layer, weight, part in zip(names, layers, weights, parts, strict=True):
            quantized[name] = part
            restored = part.dequantize()
            done(name, gptq.layer_loss(weight, restored, H))
            put_weight(layer, restored)

    walk.visit(index, change)
    return quantized


def _split(stacked: QuantizedTensor, heights: list[int]) -> list[QuantizedTensor]:
    """An affine weight whose rows belong to several layers, as a weight for each."""
    parts = (stacked.codes(), stacked.stored_scale, stacked.zero_point)
    return [
        replace(
            stacked,
            packed=pack(codes.contiguous(), stacked.bits),
            shape=codes.shape,
            stored_scale=scale.clone(),
            packed_zero_point=pack(zero.contiguous(), stacked.bits),
        )
        for codes, scale, zero in zip(*(part.split(heights) for part in parts), strict=True)
    ]


def quantize_blocks(
    model: nn.Module,
    tokens: torch.Tensor | None,
    learn: Learn,
    description: str,
    progress: bool = True,
    resume: Path | str | None = None,
) -> nn.Module:
    """Puts a QuantizedLinear in the place of every linear layer in the model's blocks.

    `learn(walk, index, done)` quantizes one block as `gptq_block` does. `tokens`: calibration text,
    or None for a method that reads none, to which an `Unread` is given. `description`: all that
    tells this run from others, in words. `resume`: a folder that keeps each finished block; called
    again with the same model, tokens and description, the run goes on where it ended. With it, the
    finished blocks are held in these files, not in memory.

    When anything fails, or the reader interrupts, the model is as it was; what stands in the folder
    stays. Raises ValueError where the folder holds another run.
    """
    from tqdm.auto import tqdm

    training = model.training
    walk = Unread(model) if tokens is None else Walk(model, tokens)
    folder = resume and _open_folder(Path(resume), walk, tokens, description)
    layers = linear_layers(walk.blocks)
    undo = []
    try:
        with (
            tqdm(total=len(layers), desc=description, disable=not progress) as bar,
            warnings.catch_warnings(record=True) as caught,
        ):
            warnings.simplefilter("always")
            for index, block in enumerate(walk.blocks):
                undo.append(_undo(block))
                file = folder and folder / f"block-{index:04}.safetensors"
                if file and file.exists():
                    bar.update(len(linear_layers(block)))
                    load_quantized(block, file)
                    walk.advance(index)
                    continue

                def done(name, loss=None, where=f"{walk.name}.{index}"):
                    text = f"{where}.{name}" if loss is None else f"{where}.{name}: loss {loss:.2%}"
                    bar.set_postfix_str(text, refresh=False)
                    bar.update()

                originals = {name: layer.weight for name, layer in linear_layers(block).items()}
                quantized = learn(walk, index, done)
                linears = linear_layers(block)
                for name, layer in linears.items():
                    block.set_submodule(name, QuantizedLinear(quantized[name], layer.bias))
                    layer.weight = originals[name]  # `undo` keeps the layer: not with a new weight
                if file:  # from here on the block lies in the file, not in memory
                    save_quantized(block, file)
                    for name, layer in linears.items():
                        block.set_submodule(name, layer)
                    load_quantized(block, file)
    except BaseException:  # KeyboardInterrupt too
        for restore in undo:
            restore()
        raise
    finally:
        model.train(training)
    if caught:
        warnings.warn(f"{caught[0].message} ({len(caught)} such warnings)", stacklevel=3)
    return model


def _undo(block: nn.Module) -> Callable[[], None]:
    """What brings a block back to how it is now. Takes no copy of a weight.

    Norms and biases, which AWQ changes and a file overwrites in place, become copies here.
    """
    linears = linear_layers(block)
    parameters = [
        (module, name, parameter)
        for module in block.modules()
        for name, parameter in module.named_parameters(recurse=False)
    ]
    for module, name, parameter in parameters:
        if parameter.dim() < 2:
            copy = parameter.detach().clone()
            setattr(module, name, nn.Parameter(copy, requires_grad=parameter.requires_grad))

    def undo():
        for name, layer in linears.items():
            block.set_submodule(name, layer)
        for module, name, parameter in parameters:
            setattr(module, name, parameter)

    return undo


def _open_folder(
    folder: Path, walk: Walk | Unread, tokens: torch.Tensor | None, description: str
) -> Path:
    """Makes the folder of a run, or makes sure that it is this run's."""
    digest = hashlib.sha256()
    if tokens is not None:
        digest.update(repr(tokens.shape).encode() + tokens.cpu().numpy().tobytes())
    for name, parameter in walk.model.named_parameters():
        start = parameter.detach().reshape(-1)[:8].float().cpu()  # of each: all would be slow
        digest.update(f"{name} {tuple(parameter.shape)}".encode() + start.numpy().tobytes())
    run = {"description": description, "model and tokens": digest.hexdigest()}
    file = folder / "run.json"
    if file.exists():
        there = json.loads(file.read_text(encoding="utf-8"))
        if there != run:
            raise ValueError(
                f"{folder} holds the blocks of another run ({there.get('description')}), with "
                "another model, calibration or options: name another folder, or delete that one"
            )
        return folder
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder} is not empty and holds no run: name another folder")
    folder.mkdir(parents=True, exist_ok=True)
    part = folder / f".run.{os.getpid()}.part"
    part.write_text(json.dumps(run), encoding="utf-8")
    part.replace(file)
    return folder
