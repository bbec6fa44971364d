"""quantize_model: every linear layer of a model becomes a QuantizedLinear.

Embeddings, norms and the output head keep their data type, as in bitsandbytes, GPTQ and AWQ.
"""

import math
from functools import partial
from pathlib import Path

import torch
from torch import nn

from chapter13.codebook import quantize_codebook
from chapter13.integer import quantize_absmax, quantize_affine
from chapter13.packing import check_bits
from chapter13.tables import CODE_BOOKS
from chapter13.tensors import QuantizedTensor, check_group_size, is_group_size
from chapter13.whole_model.awq_block import awq_block
from chapter13.whole_model.blockwise import gptq_block, quantize_blocks
from chapter13.whole_model.layers import linear_layers, replace_layers, weight_of
from chapter13.whole_model.linear import QuantizedLinear, quantized_layers
from chapter13.whole_model.walk import outside_blocks

ROUNDING = ("absmax", "affine", "nf4", "fp4")
LEARNED = {"gptq": gptq_block, "awq": awq_block}


def quantize_model(
    model: nn.Module,
    method: str,
    bits: int = 4,
    group_size: int | str | None = 64,
    calibration: torch.Tensor | None = None,
    progress: bool = True,
    resume: Path | str | None = None,
    **options,
) -> nn.Module:
    """Replaces every `nn.Linear` and `Conv1D` except the head with a QuantizedLinear.

    `method`:

    - "absmax" or "affine", with `bits` 2 to 8 and a group size as `quantize_absmax` takes it;
      options: `scale_dtype`
    - "nf4" or "fp4", whose block size is `group_size`; options: `double_quant`
    - "gptq" or "awq", which learn from `calibration`, int64 tokens (sequences, length), and
      quantize the layers in the model's blocks; options: those of `gptq.quantize`, or
      `scale_dtype`. AWQ supports the blocks of Llama and GPT-2, and also changes their norms

    `resume`: a folder that keeps finished blocks: after an interruption the same call resumes from
    them. The model's blocks are then mapped from its files, not in memory.

    Changes the model in place and returns it. `report(model)` says which parts are quantized and
    which are not. After an error or an interruption the model is unchanged.

    Raises ValueError before any work for an unknown method, bits or group sizes that do not fit
    (naming the layers, and the sizes that fit all of them), for calibration that is missing or not
    used, for a model without linear layers, for experts in one tensor, and if `resume` is set and
    some linear layers lie outside the blocks; later for a weight with NaN or Inf, and for a block
    that does not compute with quantized layers.
    """
    if method not in (*ROUNDING, *LEARNED):
        names = ", ".join((*ROUNDING, *LEARNED))
        raise ValueError(f"method must be one of {names}, not {method!r}")
    check_bits(bits)
    if method not in CODE_BOOKS:
        group_size = check_group_size(group_size)
    elif not is_group_size(group_size):
        raise ValueError(
            f"{method} needs a positive number of weights per block as its group_size, not "
            f"{group_size!r}"
        )
    settings = {"method": method, "bits": bits, "group_size": group_size, **options}
    if method in LEARNED:
        if calibration is None:
            raise ValueError(
                f"{method} learns from text: give calibration tokens, such as "
                "corpus.calibration_tokens(tokenizer, sequences=16, length=256)"
            )
        check_groups(model, group_size)
        learn = partial(LEARNED[method], bits=bits, group_size=group_size, **options)
        return quantize_blocks(model, calibration, learn, settings, progress, resume)
    if calibration is not None:
        raise ValueError(f"{method} only rounds the weights: it takes no calibration tokens")
    if method in CODE_BOOKS:
        if bits != 4:
            raise ValueError(f"{method} is a table of 16 values: it takes 4 bits, not {bits}")
    else:
        check_groups(model, group_size)

    def rounded(name: str, layer: nn.Module) -> QuantizedTensor:
        weight = weight_of(layer)
        try:
            if method in CODE_BOOKS:
                return quantize_codebook(weight, method, group_size, **options)
            integer = {"absmax": quantize_absmax, "affine": quantize_affine}[method]
            return integer(weight, bits, group_size, **options)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error

    if resume is None:
        make = lambda name, layer: QuantizedLinear(rounded(name, layer), layer.bias)  # noqa: E731
        return replace_layers(model, make, progress, f"{method}, {bits} bits")

    if outside := outside_blocks(model):
        raise ValueError(
            f"{len(outside)} linear layers lie outside the model's blocks, first {outside[0]}: "
            "quantize this model without resume"
        )

    def round_block(walk, index, report):
        quantized = {}
        for name, layer in linear_layers(walk.blocks[index]).items():
            quantized[name] = rounded(f"{walk.name}.{index}.{name}", layer)
            report(name)
        return quantized

    return quantize_blocks(model, None, round_block, settings, progress, resume)


def report(model: nn.Module) -> str:
    """A few lines: which parts of a model are quantized, with bits per weight, and which not."""
    quantized = [layer.quantized for layer in quantized_layers(model).values()]
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
        lines.append(f"not quantized: {what}, {len(counts)} tensors, {sum(counts) / 1e6:.2f}M")
    return "\n".join(lines)


def check_groups(model: nn.Module, group_size: int | str | None) -> None:
    """Raises ValueError if the group size is invalid or does not divide the rows of every layer."""
    group_size = check_group_size(group_size)
    if group_size in (None, "channel"):
        return
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
