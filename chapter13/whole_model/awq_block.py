"""AWQ on one transformer block: scales searched and folded, ranges clipped, weights rounded.

`awq.py` has the searches. This file has the part that depends on the block: which module's output
decides on a scale, and into which module the inverse of the scale is folded (`architectures.py`).
"""

from collections.abc import Callable

import torch
from torch.func import functional_call

from chapter13.awq import search_clip, search_scale, spread
from chapter13.integer import quantize_affine
from chapter13.packing import check_bits
from chapter13.tensors import QuantizedTensor, check_finite, check_group_size, grouped
from chapter13.whole_model.architectures import UNCLIPPED, fold, folds
from chapter13.whole_model.layers import (
    as_stored,
    linear_layers,
    put_parameter,
    put_weight,
    weight_of,
)
from chapter13.whole_model.walk import Walk, tokens_of


@torch.no_grad()
def awq_block(
    walk: Walk,
    index: int,
    report: Callable[[str, float], None],
    bits: int = 4,
    group_size: int | str = 64,
    scale_dtype: torch.dtype = torch.float16,
) -> dict[str, QuantizedTensor]:
    """Quantizes the next block of a walk, and sends the hidden states through it.

    Returns the quantized weights of its linear layers by their names in the block, as
    `quantize_affine` makes them. In the block itself, the scales are folded into norms and biases,
    which keep their data types, and the layers hold the dequantized weights in float32. All of
    these are new parameters: the old ones, from an earlier `dict(block.named_parameters())`, can be
    put back, also after an error.

    The loss of scales that are folded into a norm is that of the whole attention or MLP; the loss
    of scales that are folded into a linear layer is that of the layer that reads them. All scales
    are searched in the unchanged block, then folded; then each layer is clipped and rounded.
    `report(name, loss)` gets the squared error of each layer's output relative to the output.

    Raises as `folds`, `Walk.groups` and `quantize_affine`, naming the layer.
    """
    check_bits(bits)
    group_size = check_group_size(group_size)
    block = walk.blocks[index]
    plan, groups = folds(block), walk.groups(index)
    for name, layer in linear_layers(block).items():
        _check(name, weight_of(layer), group_size)
    dtypes = {name: parameter.dtype for name, parameter in block.named_parameters()}
    for name in dtypes:
        _cast(block, name, torch.float32)
    losses = {source: _loss_module(block, source, readers) for source, readers in plan.items()}
    seen = walk.calls(index, {*losses.values(), *(names[0] for names in groups)})
    inputs = {name: tokens_of(seen[names[0]]) for names in groups for name in names}

    found = {}
    for source, readers in plan.items():
        module = losses[source]
        found[source] = search_scale(
            inputs[readers[0]].abs().mean(0),
            [weight_of(block.get_submodule(name)) for name in readers],
            _outputs(block, module, readers, seen[module]),
            bits,
            group_size,
            scale_dtype,
        )
    for source, readers in plan.items():
        layers = [block.get_submodule(name) for name in readers]
        fold(block.get_submodule(source), layers, found[source].s)
        inputs |= {name: inputs[name] / found[source].s for name in readers}

    quantized = {}
    for name, layer in linear_layers(block).items():
        W = clipped = weight_of(layer)
        x = spread(inputs[name])
        if name.rpartition(".")[2] not in UNCLIPPED:
            limit = search_clip(W, x, bits, group_size, scale_dtype)
            clipped = W.reshape(len(W), limit.shape[1], -1).clamp(-limit, limit).view(W.shape)
        quantized[name] = quantize_affine(clipped, bits, group_size, scale_dtype)
        restored = quantized[name].dequantize()
        put_weight(layer, restored)
        error = (x @ (restored - W).T).square().sum().item()
        report(name, error / (x @ W.T).square().sum().item() if error else 0.0)
    # norms and biases return to their own data type; the dequantized weights stay in float32
    rounded = {f"{name}.weight" for name in quantized}
    for name, dtype in dtypes.items():
        if name not in rounded:
            _cast(block, name, dtype)
    walk.advance(index)
    return quantized


def _check(name, weight, group_size):
    try:
        if group_size is None:
            raise ValueError('AWQ needs a scale per row at least: group_size="channel", or an int')
        grouped(weight, group_size)
        check_finite(weight, weight.abs().amax())
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def _loss_module(block, source, readers):
    """The module whose output gives the loss: after a norm, the one that contains the readers."""
    after_norm = block.get_submodule(source).weight.dim() == 1
    return readers[0].rpartition(".")[0] if after_norm else readers[0]


def _outputs(block, owner, readers, calls):
    """A function from new weights of the readers to the outputs of the module `owner`."""
    module = block.get_submodule(owner)
    layers = {f"{name}.weight"[len(owner) + 1 :]: block.get_submodule(name) for name in readers}

    def run(weights):
        pairs = zip(layers.items(), weights, strict=True)
        changed = {key: as_stored(layer, weight) for (key, layer), weight in pairs}
        for args, kwargs in calls:
            out = functional_call(module, changed, args, kwargs)
            yield out[0] if isinstance(out, tuple) else out

    return run


def _cast(block, name, dtype):
    owner, _, own = name.rpartition(".")
    module = block.get_submodule(owner)
    put_parameter(module, own, getattr(module, own).to(dtype))
