"""GPTQ: round a weight column by column; the columns to its right compensate for each error.

Frantar et al. 2022, https://arxiv.org/abs/2210.17323, with the paper's symbols. The outputs of a
linear layer on calibration inputs X (in_features, tokens) should change as little as possible:
minimize ||W X - Q X||^2, a quadratic form with the Hessian H = 2 X X^T, which is the same for every
row of W. If weight w in column j is rounded to q, the best correction of column j and all columns
to its right is to add

    - (w - q) / [H^-1]_jj * [H^-1]_j,j:

(Hassibi & Stork 1993), where H^-1 is the inverse for the columns that are not rounded yet. Row j of
one Cholesky factor U, H^-1 = U^T U, contains these numbers for every j, up to a factor that
cancels, so only one inverse is needed.
"""

import warnings
from collections.abc import Iterable

import torch

from chapter13.grids import fit_grid
from chapter13.packing import check_bits, pack
from chapter13.tensors import (
    QuantizedTensor,
    check_finite,
    check_group_size,
    check_weight,
    grouped,
    scale_shape,
)

COLUMNS_AT_ONCE = 64  # columns that are rounded before all later columns are updated together
RANKED = 2048  # the rank is computed up to this many dimensions: for 8192 it takes minutes


def hessian(inputs: torch.Tensor | Iterable[torch.Tensor]) -> torch.Tensor:
    """H = 2/n * sum of x x^T over n calibration tokens: float32 (in_features, in_features).

    `inputs`: (tokens, in_features) in any floating data type, or several such batches, which need
    not be in memory at the same time. (Dividing by n changes no code; it keeps H within range.)

    Warns, with the rank, if there are fewer inputs than dimensions, or if they span at most half of
    the dimensions. Beyond RANKED dimensions it warns only if there are fewer inputs, with their
    number instead of the rank. Raises ValueError for another shape, for no tokens, and for NaN or
    Inf.
    """
    total, n = None, 0
    for x in [inputs] if isinstance(inputs, torch.Tensor) else inputs:
        if x.dim() != 2:
            raise ValueError(f"inputs must have shape (tokens, in_features), not {tuple(x.shape)}")
        x = x.detach().float()
        total = x.T @ x if total is None else total.addmm_(x.T, x)
        n += len(x)
    if not n:
        raise ValueError("no calibration tokens reach this layer: give at least one")
    H = total.mul_(2 / n)
    if not H.isfinite().all():
        raise ValueError(f"the inputs hold NaN or Inf, or overflow when squared ({n} tokens)")
    large = len(H) > RANKED
    if n < len(H) or not (large or _spans(H)):
        rank = n if large else int(torch.linalg.matrix_rank(_correlation(H), hermitian=True))
        # Warn only up to half: float32 cannot tell a weak direction from a missing one, and heads
        # that attend only to the first token leave weak directions with any text.
        if n < len(H) or rank <= len(H) // 2:
            warnings.warn(
                f"{n} calibration tokens span {rank} of {len(H)} dimensions: what GPTQ moves into "
                "the others it has never seen. Calibrate with more, and more varied, tokens",
                stacklevel=2,
            )
    return H


def quantize(
    weight: torch.Tensor,
    hessian: torch.Tensor,
    bits: int = 4,
    group_size: int | str = 64,
    symmetric: bool = False,
    act_order: bool = True,
    damp: float = 0.01,
    clip_search: bool = False,
    scale_dtype: torch.dtype = torch.float16,
) -> QuantizedTensor:
    """The weight (out_features, in_features) on an affine grid, rounded for a small output error.

    `hessian`: the result of `hessian` for the layer's inputs, up to a factor. `group_size`:
    "channel" for one scale per row, or the number of neighboring weights in a row that share one.
    `symmetric`: the grid from -absmax to absmax, scale 2 absmax / (2**bits - 1), zero point in the
    middle. `act_order`: round the columns with the largest inputs first, while most other columns
    can still compensate; all scales are then fixed in advance. Without it, a group's scale is
    computed when the group is reached, from weights that already compensate for earlier errors.
    `damp`: added to the diagonal of H, as a fraction of its mean. `clip_search`: also try narrower
    ranges for each scale, and keep the one with the least squared error, weighted by the diagonal
    of H.

    Input channels that are always 0 ("dead") get weight 0. Raises as `quantize_affine`, and
    ValueError if the Hessian does not fit the weight, holds NaN or Inf, or cannot be inverted.
    """
    check_bits(bits)
    group_size = check_group_size(group_size)
    W, H = _checked(weight, hessian, group_size, damp)
    columns = W.shape[1]
    size = columns if group_size == "channel" else group_size

    # A channel that is always 0 gives no information on its weights and makes H singular.
    dead = H.diagonal() == 0
    H.diagonal()[dead] = 1
    W = W.masked_fill(dead, 0).T.contiguous()  # transposed: a column is contiguous, which is fast
    importance = H.diagonal().clone()

    def fit(first):
        """The grid of the group that begins with this column."""
        part = slice(first, first + size)
        return fit_grid(
            W[part], bits, symmetric, scale_dtype, importance[part] if clip_search else None
        )

    # Static groups: a column keeps the grid of its place, whatever the order of rounding.
    grids = [fit(first) for first in range(0, columns, size)]
    order = torch.arange(columns, device=W.device)
    if act_order:
        order = H.diagonal().argsort(descending=True)
        W, H = W[order], H[order][:, order]
    U = _factor(H, damp)

    codes = torch.empty(W.shape, dtype=torch.uint8, device=W.device)
    group_of = (order // size).tolist()
    start = 0
    while start < columns:
        stop = min(start + COLUMNS_AT_ONCE, columns)
        if not act_order:  # a block ends with its group: the next grid needs updated weights
            stop = min(stop, (start // size + 1) * size)
            if start % size == 0:
                grids[start // size] = fit(start)
        block, U1 = W[start:stop], U[start:stop, start:stop]
        errors = torch.empty_like(block)
        for j in range(stop - start):
            grid = grids[group_of[start + j]]
            codes[start + j] = code = grid.codes(block[j])
            # The error as the correction needs it; the block compensates for it immediately ...
            errors[j] = (block[j] - grid.values(code)) / U1[j, j]
            block[j + 1 :].addr_(U1[j, j + 1 :], errors[j], alpha=-1)
        # ... and all columns after the block in one matrix product, which is much faster.
        W[stop:].addmm_(U[start:stop, stop:].T, errors, alpha=-1)
        start = stop

    scales = torch.stack([grid.scale for grid in grids], dim=1)
    zeros = torch.stack([grid.zero for grid in grids], dim=1)
    return QuantizedTensor(
        kind="affine",
        packed=pack(codes[order.argsort()].T.contiguous(), bits),
        bits=bits,
        shape=weight.shape,
        group_size=group_size,
        stored_scale=scales.to(scale_dtype).view(scale_shape(weight.shape, group_size)),
        packed_zero_point=pack(zeros.to(torch.uint8), bits),
    )


def layer_loss(weight: torch.Tensor, approximation: torch.Tensor, hessian: torch.Tensor) -> float:
    """The relative squared error of a layer's outputs: ||(W - Q) X||^2 / ||W X||^2.

    `weight`, `approximation`: (out, in); `hessian`: (in, in), of the inputs X. 0 if both weights
    are the same.
    """
    W, H = weight.float(), hessian.float()
    difference = W - approximation.float()
    error = ((difference @ H).double() * difference).sum().item()  # squares may exceed float32
    return error / ((W @ H).double() * W).sum().item() if error else 0.0


def _checked(weight, hessian, group_size, damp):  # (W in float32, a copy of H)
    weight = check_weight(weight)
    if group_size is None:
        raise ValueError('GPTQ needs a scale per row at least: group_size="channel", or an int')
    grouped(weight, group_size)  # raises with the group sizes that fit
    check_finite(weight, weight.abs().amax())
    columns = weight.shape[1]
    if hessian.shape != (columns, columns):
        shapes = f"({columns}, {columns}), not {tuple(hessian.shape)}"
        raise ValueError(f"{columns} input channels need a Hessian of shape {shapes}")
    if not hessian.isfinite().all():
        raise ValueError("the Hessian holds NaN or Inf: the calibration inputs did")
    if not damp >= 0:
        raise ValueError(f"damp must be 0 or more, not {damp!r}")
    return weight.float(), hessian.float().clone()


def _factor(H: torch.Tensor, damp: float) -> torch.Tensor:
    """U, upper triangular, with (H + damping)^-1 = U^T U. Raises ValueError if H is singular."""
    # Damping limits how far weights move in directions that the calibration text hardly contains.
    H.diagonal().add_(damp * H.diagonal().mean())
    L, failed = torch.linalg.cholesky_ex(H)
    if failed:
        rank = int(torch.linalg.matrix_rank(_correlation(H), hermitian=True))
        raise ValueError(
            f"the Hessian has rank {rank} of {len(H)} and cannot be inverted: "
            "calibrate with more tokens, or raise damp (0.01 is usual)"
        )
    return torch.linalg.cholesky(torch.cholesky_inverse(L), upper=True)


def _spans(H: torch.Tensor) -> bool:
    """Whether the inputs behind H span all dimensions except those of dead channels."""
    L, failed = torch.linalg.cholesky_ex(_correlation(H))
    return not failed and bool((L.diagonal() ** 2 > len(H) * torch.finfo(H.dtype).eps).all())


def _correlation(H: torch.Tensor) -> torch.Tensor:
    """H with live channels scaled to the same size: large ones would hide the others' rank."""
    dead = H.diagonal() <= 0
    inverse = torch.where(dead, 1.0, H.diagonal()).rsqrt()
    return H * inverse * inverse[:, None] + torch.diag(dead.to(H.dtype))
