"""Error measures of one tensor or layer.

Each measure takes the reference first and the approximation second, any shape and floating data
type, and returns a Python float. Sums are taken in float64, so that a CPU and a GPU agree.
"""

import math

import torch
from torch.linalg import vector_norm


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

    One more bit of a uniform grid adds about 6 dB.
    """
    relative = relative_rmse(reference, approximation)
    return -20 * math.log10(relative) if relative else math.inf


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
