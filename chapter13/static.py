"""Static INT8: the activations' scale is fixed in advance, from calibration text.

Computing the range at each call costs a pass over the activations; a fixed scale does not, and it
may clip rare extremes on purpose. An observer derives the magnitude at the end of the grid from the
activations of the calibration text:

- "minmax": the largest magnitude
- "percentile": the magnitude that this percentage of the activations does not exceed
- "mse": the magnitude whose grid has the least squared error, clipping included

Weights have a scale for each row, as in torchao's `Int8StaticActivationInt8WeightConfig`.

torch.ao's `MinMaxObserver`, symmetric, gives the same scale as "minmax", and its
`PerChannelMinMaxObserver` the same scales for weights. Its `HistogramObserver` minimizes the same
error as "mse" in another way: it repeatedly cuts 1e-5 of the values off one end and stops as soon
as its estimate of the error grows, often at the first step. "mse" tries 128 ends and takes the
best.
"""

import math
from dataclasses import dataclass

import torch
from torch import nn

from chapter13.dynamic import Int8Linear
from chapter13.whole_model.int8 import int8_matmul
from chapter13.whole_model.layers import (
    evaluating,
    linear_layers,
    replace_layers,
    watch,
    weight_of,
)

OBSERVERS = ("minmax", "percentile", "mse")
BINS = 2048
_STEPS = 127.5
_EPS = torch.finfo(torch.float32).eps  # the smallest scale, as in both libraries


@dataclass
class Statistics:
    """Statistics of one layer's inputs, gathered batch by batch; no input is kept."""

    channel_absmax: torch.Tensor
    """float32 (in_features,): the largest magnitude of each input channel."""
    top: float
    """Upper end of the histogram: a power of two, or 0 if all inputs so far were zero."""
    counts: torch.Tensor
    """int64 (BINS,): how many magnitudes lie in each of the equal bins from 0 to `top`."""

    @classmethod
    def empty(cls, in_features: int) -> "Statistics":
        return cls(torch.zeros(in_features), 0.0, torch.zeros(BINS, dtype=torch.int64))

    @property
    def absmax(self) -> float:
        return self.channel_absmax.max().item()

    def add(self, inputs: torch.Tensor) -> None:
        """Counts inputs (..., in_features). Raises ValueError if they hold NaN or Inf."""
        magnitudes = inputs.detach().reshape(-1, inputs.shape[-1]).float().abs().cpu()
        channel = magnitudes.amax(0)
        if not channel.isfinite().all():
            bad = int((~magnitudes.isfinite()).sum())
            raise ValueError(
                f"activations hold {bad} NaN or Inf among {magnitudes.numel()} values, first in "
                f"channel {int((~channel.isfinite()).nonzero()[0])}"
            )
        self.channel_absmax = torch.maximum(self.channel_absmax, channel)
        if self.absmax == 0:
            self.counts[0] += magnitudes.numel()
            return
        top = 2.0 ** math.ceil(math.log2(self.absmax))
        while self.top and self.top < top:  # twice the range: two bins become one
            merged = self.counts.view(-1, 2).sum(1)
            self.counts = torch.cat([merged, torch.zeros_like(merged)])
            self.top *= 2
        self.top = self.top or top
        # float64 also holds 2**128, the upper end for the largest float32 numbers
        self.counts += torch.histc(magnitudes.double(), BINS, 0, self.top).long()

    def clip(self, observer: str = "minmax", percentile: float = 99.9) -> float:
        """The magnitude that the outermost code represents, by an observer's rule.

        `percentile`: only for "percentile", above 0, at most 100. Raises ValueError for another
        observer, another percentile, and if there was no input.
        """
        if observer not in OBSERVERS:
            raise ValueError(f"observer must be one of {', '.join(OBSERVERS)}, not {observer!r}")
        if not 0 < percentile <= 100:
            raise ValueError(f"percentile must lie above 0 and not above 100, not {percentile!r}")
        if not self.counts.sum():
            raise ValueError("no inputs were seen: calibrate with text that reaches this layer")
        if observer == "minmax" or self.absmax == 0:
            return self.absmax
        edges = torch.linspace(0, self.top, BINS + 1, dtype=torch.float64)[1:]
        if observer == "percentile":
            share = self.counts.double().cumsum(0) / self.counts.sum()
            first = int((share >= percentile / 100).nonzero()[0])
            return min(edges[first].item(), self.absmax)
        centers = edges - self.top / BINS / 2
        candidates = edges[BINS // 128 - 1 :: BINS // 128].clamp(max=self.absmax).unique()
        return min(candidates.tolist(), key=lambda clip: self._squared_error(centers, clip))

    def _squared_error(self, centers: torch.Tensor, clip: float) -> float:
        """The error of a grid that ends at `clip`, weighted by the count of each magnitude."""
        scale = clip / _STEPS
        restored = (centers / scale).round().clamp(max=127) * scale
        return ((centers - restored).square() * self.counts).sum().item()


def calibrate(
    model: nn.Module, tokens: torch.Tensor, batch_size: int = 4, progress: bool = True
) -> dict[str, Statistics]:
    """Statistics of the inputs of every linear layer except the head, by the layer's name.

    `tokens`: int64 (sequences, length), of calibration text. One pass is enough for all observers,
    SmoothQuant and pictures. The model is not changed. Raises ValueError if there is no linear
    layer, tokens have another shape, or an input is not finite.
    """
    if tokens.dim() != 2 or not tokens.numel():
        raise ValueError(f"tokens must have shape (sequences, length), not {tuple(tokens.shape)}")
    layers = linear_layers(model)
    if not layers:
        raise ValueError(f"{type(model).__name__} has no nn.Linear or Conv1D besides its head")
    from tqdm.auto import tqdm

    statistics = {
        name: Statistics.empty(weight_of(layer).shape[1]) for name, layer in layers.items()
    }
    device = next(model.parameters()).device
    with (
        watch(layers, lambda name, args, kwargs: statistics[name].add(*args)),
        evaluating(model),
        torch.inference_mode(),
        tqdm(total=len(tokens), desc="calibrating", unit=" seq", disable=not progress) as bar,
    ):
        for batch in tokens.split(batch_size):
            model(batch.to(device))
            bar.update(len(batch))
    return statistics


class StaticInt8Linear(Int8Linear):
    """Like Int8Linear per token, but with one scale for all activations, fixed in advance.

    `clip`: the magnitude at the grid's end; activations beyond it are clipped. The scale is at
    least float32's eps. Raises ValueError unless `clip` is positive and finite.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None, clip: float):
        if not 0 < clip < math.inf:
            raise ValueError(f"clip must be positive and finite, not {clip!r}")
        super().__init__(weight, bias, "per_token")
        scale = torch.tensor(max(clip / _STEPS, _EPS), device=self.codes.device)
        self.register_buffer("activation_scale", scale)

    def quantize(self, x: torch.Tensor) -> torch.Tensor:
        """The int8 codes of activations, in their shape."""
        scaled = x.float() * (1.0 / self.activation_scale)
        return scaled.round_().clamp_(-128, 127).to(torch.int8)

    def product(self, x: torch.Tensor) -> torch.Tensor:
        return int8_matmul(self.quantize(x), self.codes).float() * self.activation_scale

    def extra_repr(self) -> str:
        clip = self.activation_scale.item() * _STEPS
        return f"{self.in_features}, {self.out_features}, static, clip={clip:.4g}"


def quantize_static(
    model: nn.Module,
    calibration: dict[str, Statistics],
    observer: str = "minmax",
    percentile: float = 99.9,
    progress: bool = True,
) -> nn.Module:
    """Replaces every linear layer except the head with a StaticInt8Linear; returns the model.

    `calibration`: the result of `calibrate` for this model. After an error the model is unchanged.
    Raises ValueError as `Statistics.clip`, and if a layer was not calibrated.
    """
    missing = set(linear_layers(model)) - set(calibration)
    if missing:
        raise ValueError(f"{len(missing)} layers were not calibrated, first {min(missing)}")

    def make(name: str, layer: nn.Module) -> StaticInt8Linear:
        clip = calibration[name].clip(observer, percentile)
        return StaticInt8Linear(weight_of(layer), layer.bias, clip or 1.0)  # 1: all inputs were 0

    return replace_layers(model, make, progress, f"INT8, static {observer}")
