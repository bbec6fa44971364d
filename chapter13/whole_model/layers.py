"""The linear layers of a model: `torch.nn.Linear`, and GPT-2's `Conv1D`, which is one transposed.

A loop over `nn.Linear` alone leaves GPT-2 as it was: all linear layers of its blocks are
transformers' `Conv1D`, whose weight is (in_features, out_features).
"""

from collections.abc import Callable

import torch
from torch import nn


def is_conv1d(module: nn.Module) -> bool:
    """Whether a module is transformers' `Conv1D`; told by its name, so nothing is imported."""
    return type(module).__name__ == "Conv1D" and type(module).__module__.startswith("transformers")


def weight_of(layer: nn.Module) -> torch.Tensor:
    """The weight of a linear layer as (out_features, in_features), detached, without a copy."""
    weight = layer.weight.detach()
    return weight.T if is_conv1d(layer) else weight


def stored(layer: nn.Module, weight: torch.Tensor) -> torch.Tensor:
    """A weight (out_features, in_features) as the layer holds it, without a copy."""
    return weight.T if is_conv1d(layer) else weight


def put_weight(layer: nn.Module, weight: torch.Tensor) -> None:
    """Gives a linear layer another weight, (out_features, in_features); the old one stays as is."""
    layer.weight = nn.Parameter(stored(layer, weight), requires_grad=layer.weight.requires_grad)


def linear_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Name -> module of every `nn.Linear` and `Conv1D`, in the model's order, but not the head.

    The head (`model.get_output_embeddings()`, where a model has that) often shares the
    embeddings' memory, and is left alone with them, as by all libraries.
    """
    head = None
    if hasattr(model, "get_output_embeddings"):
        head = model.get_output_embeddings()
    return {
        name: module
        for name, module in model.named_modules()
        # type(), not isinstance: bitsandbytes' and torch's quantized layers derive from nn.Linear
        if (type(module) is nn.Linear or is_conv1d(module)) and module is not head
    }


def replace_layers(
    model: nn.Module,
    make: Callable[[str, nn.Module], nn.Module],
    progress: bool = True,
    description: str = "quantizing",
) -> nn.Module:
    """Puts `make(name, layer)` in the place of every linear layer; returns the model.

    All or none: when `make` fails, or the reader interrupts, the layers replaced so far are put
    back before the error goes on. Shows a progress bar over the layers if `progress`. Raises
    ValueError where there is no linear layer (left).
    """
    layers = linear_layers(model)
    if not layers:
        raise ValueError(
            f"{type(model).__name__} has no nn.Linear or Conv1D to quantize, besides its head: "
            "was it quantized before?"
        )
    from tqdm.auto import tqdm

    done = []
    try:
        for name, layer in tqdm(layers.items(), desc=description, disable=not progress):
            new = make(name, layer)
            done.append((name, layer))
            model.set_submodule(name, new)
    except BaseException:  # KeyboardInterrupt too
        for name, layer in done:
            model.set_submodule(name, layer)
        raise
    return model
