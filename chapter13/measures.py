"""Error measures of one tensor or layer, and the size of a model.

Each measure takes the reference first and the approximation second, any shape and floating data
type, and returns a Python float. Sums are taken in float64, so a CPU and a GPU agree.
"""

import math

import torch
from torch.linalg import vector_norm

from chapter13.whole_model.layers import is_conv1d


def mse(reference: torch.Tensor, approximation: torch.Tensor) -> float:
    """Mean squared error, in the square of the tensors' unit."""
    return _norm(_difference(reference, approximation)) ** 2 / reference.numel()


def max_abs_error(reference: torch.Tensor, approximation: torch.Tensor) -> float:
    """The largest absolute error, in the tensors' unit."""
    return _difference(reference, approximation).abs().max().item()


def relative_rmse(reference: torch.Tensor, approximation: torch.Tensor) -> float:
    """Root mean squared error over root mean square of the reference; 0 if both are all zero."""
    error = _norm(_difference(reference, approximation))
    if error == 0:
        return 0.0
    signal = _norm(reference)
    return error / signal if signal else math.inf


def sqnr_db(reference: torch.Tensor, approximation: torch.Tensor) -> float:
    """Signal-to-quantization-noise ratio in dB: -20 log10(relative_rmse); inf without error.

    One more bit of a uniform grid is worth about 6 dB.
    """
    relative = relative_rmse(reference, approximation)
    return -20 * math.log10(relative) if relative else math.inf


def cosine(reference: torch.Tensor, approximation: torch.Tensor) -> float:
    """Cosine of the angle between the two, as flat vectors; NaN if either is all zero."""
    _check_shapes(reference, approximation)
    norms = _norm(reference) * _norm(approximation)
    dot = (reference.double() * approximation.double()).sum().item()
    return dot / norms if norms else math.nan


def model_size_mb(model: torch.nn.Module) -> float:
    """The bytes of a model's weights in MB (1e6 bytes), as a saved file would hold them.

    Counts what `state_dict` holds: parameters, buffers, packed weights of torch's quantized
    layers (which `parameters()` does not show), scales. Memory that two names share (tied
    embeddings) counts once.
    """
    return sum(memory_breakdown(model).values()) / 1e6


def memory_breakdown(model: torch.nn.Module) -> dict[str, int]:
    """The bytes of a model's weights by part; together they are `model_size_mb`.

    "linears": weights or codes of the linear layers, of whichever library; "scales": what these
    hold beside: scales, zero points, code books; "embeddings": embeddings and output head; "rest":
    norms, biases, other buffers.
    """
    modules = dict(model.named_modules())
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    breakdown = dict.fromkeys(("linears", "scales", "embeddings", "rest"), 0)
    linears: dict[str, list[int]] = {}
    seen: dict[tuple, int] = {}
    for key, value in model.state_dict().items():
        before = set(seen)
        _collect(value, seen)
        sizes = [seen[place] for place in seen if place not in before]
        owner, _, name = key.rpartition(".")
        # "weight.absmax" is of the layer that has the weight, "_packed_params" of that around it
        while owner not in modules or type(modules[owner]).__name__ == "LinearPackedParams":
            owner, _, name = owner.rpartition(".")
        module = modules[owner]
        if isinstance(module, torch.nn.Embedding) or module is head:
            breakdown["embeddings"] += sum(sizes)
        elif name != "bias" and ("Linear" in type(module).__name__ or is_conv1d(module)):
            linears.setdefault(owner, []).extend(sizes)
        else:
            breakdown["rest"] += sum(sizes)
    for sizes in linears.values():
        weight = max(sizes, default=0)  # the weight is the largest tensor of its layer
        breakdown["linears"] += weight
        breakdown["scales"] += sum(sizes) - weight
    return breakdown


def _collect(value, seen: dict[tuple, int]) -> None:
    """Adds the bytes of all tensors inside a value of a state dict, by where they lie in memory."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        for item in value:
            _collect(item, seen)
    elif hasattr(value, "__tensor_flatten__"):  # a tensor made of tensors, like torchao's
        for name in value.__tensor_flatten__()[0]:
            _collect(getattr(value, name), seen)
    elif isinstance(value, torch.Tensor):
        seen[value.device, value.data_ptr(), value.shape] = value.nbytes
        if value.is_quantized and value.qscheme() == torch.per_channel_affine:
            for part in (value.q_per_channel_scales(), value.q_per_channel_zero_points()):
                seen[value.data_ptr(), part.data_ptr()] = part.nbytes


def _difference(reference: torch.Tensor, approximation: torch.Tensor) -> torch.Tensor:
    _check_shapes(reference, approximation)
    dtype = torch.promote_types(torch.float32, reference.dtype)
    return reference.to(dtype) - approximation


def _norm(tensor: torch.Tensor) -> float:
    return vector_norm(tensor, dtype=torch.float64).item()


def _check_shapes(reference: torch.Tensor, approximation: torch.Tensor) -> None:
    if reference.shape != approximation.shape:
        raise ValueError(
            f"the shapes differ: {tuple(reference.shape)} and {tuple(approximation.shape)}"
        )
    if reference.numel() == 0:
        raise ValueError("the tensors are empty")
