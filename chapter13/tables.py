"""The tables of values that codes represent: NF4, bitsandbytes FP4, and the 8-bit dynamic map.

A code is an index into such a table; `codebook.py` finds the nearest value for each weight, and a
`QuantizedTensor` names its table by its kind.
"""

from functools import cache
from statistics import NormalDist

import torch


@cache
def nf4_code_book() -> torch.Tensor:
    """The 16 values of NormalFloat4, ascending, float32 (16,).

    Quantiles of the normal distribution in equal steps of probability: eight steps from the
    outermost quantile to the median above zero, seven below, and zero itself, all divided by the
    largest. The mixed precisions are those of the published table, whose last digits depend on
    them.
    """
    outermost = 0.9677083  # the mean of 1 - 1/30 and 1 - 1/32: half a level from each side's end
    quantile = NormalDist().inv_cdf
    positive = [quantile(p) for p in torch.linspace(outermost, 0.5, 9)[:-1].tolist()]
    negative = [-quantile(p) for p in torch.linspace(outermost, 0.5, 8)[:-1].tolist()]
    values = torch.tensor(sorted([*negative, 0.0, *positive]))
    return values / values.max()


@cache
def fp4_code_book() -> torch.Tensor:
    """The 16 values of bitsandbytes FP4 by code, float32 (16,): a sign bit and 8 magnitudes.

    Not in ascending order, and not the E2M1 of the OCP standard. Code 8 is a second zero.
    """
    magnitudes = torch.tensor([0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0]) / 12
    return torch.cat([magnitudes, -magnitudes]) + 0.0  # both zeros positive


@cache
def dynamic_code_book() -> torch.Tensor:
    """The signed 8-bit dynamic map (Dettmers 2015), ascending, float32 (256,).

    Seven decades from 1e-7 to 1, each with twice as many values as the one below, at the centers
    of equal intervals; plus zero and one.
    """
    values = [0.0, 1.0]
    for decade in range(7):
        edges = torch.linspace(0.1, 1, 2**decade + 1)
        centres = (edges[:-1] + edges[1:]) / 2 * 10 ** (decade - 6)
        values += centres.tolist() + (-centres).tolist()
    return torch.tensor(sorted(values))


CODE_BOOKS = {"nf4": nf4_code_book, "fp4": fp4_code_book}
TABLES = CODE_BOOKS | {"dynamic": dynamic_code_book}
"""By kind; "dynamic" is only for the scales of double quantization."""
