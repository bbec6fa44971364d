"""Two methods for outliers in activations: LLM.int8() separates them, SmoothQuant moves them.

A few input channels of a transformer's linear layers are tens of times larger than the rest. One
scale for all channels of a token then leaves only a few codes for the others.

- LLM.int8() (Dettmers et al. 2022, https://arxiv.org/abs/2208.07339), as bitsandbytes does it:
  columns with a magnitude of 6 or more are multiplied in float16, the others in int8
- SmoothQuant (Xiao et al. 2023, https://arxiv.org/abs/2211.10438): channel j of the activations is
  divided by s_j, and column j of the weight multiplied by it. The product is the same, the division
  is folded into the norm before it, and the activations are easier to quantize
"""

import torch
from torch import nn

from chapter13.static import Statistics
from chapter13.tensors import check_finite, check_weight, grouped
from chapter13.whole_model.architectures import SMOOTHED, fold
from chapter13.whole_model.int8 import int8_matmul
from chapter13.whole_model.layers import linear_layers, replace_layers, weight_of


def quantize_rows(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """bitsandbytes' row-wise absmax of a float16 matrix: (int8 codes, float32 absmax (rows,)).

    A row of zeros has codes 0 and absmax 0.
    """
    absmax = matrix.abs().amax(1).float()
    factor = torch.where(absmax == 0, 0.0, 127.0 / absmax)
    return (matrix * factor[:, None]).round().to(torch.int8), absmax


def split_outliers(
    x: torch.Tensor, threshold: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Activations (rows, features) in float16 -> (int8 codes, absmax (rows,), outlier columns).

    A column with any |x| >= threshold is an outlier: its codes are 0. The absmax of a row ignores
    the elements that reach the threshold.
    """
    outliers = x.abs() >= threshold
    codes, absmax = quantize_rows(x.masked_fill(outliers, 0))
    columns = outliers.any(0).nonzero().view(-1)
    codes[:, columns] = 0
    return codes, absmax, columns


class MixedLinear(nn.Module):
    """y = x W^T + b as LLM.int8(): outlier columns in floating point, all others in int8.

    `weight`: (out_features, in_features); `threshold`: magnitude from which an activation is an
    outlier, 6 in the paper. Activations are rounded to float16 first, as bitsandbytes does.
    Raises as `quantize_absmax`, and ValueError for weights beyond float16, for a threshold that is
    not positive and for inputs of the wrong width.
    """

    def __init__(self, weight, bias=None, threshold=6.0):
        super().__init__()
        if not threshold > 0:
            raise ValueError(f"threshold must be positive, not {threshold!r}")
        weight = grouped(check_weight(weight), "channel")
        largest = weight.abs().amax()
        check_finite(weight, largest)
        half = weight.half()
        if half.isinf().any():
            raise ValueError(
                f"weights reach {largest.item():.3g}, and float16, which LLM.int8() starts from, "
                "ends at 65504"
            )
        self.out_features, self.in_features = weight.shape
        self.threshold = threshold
        codes, absmax = quantize_rows(half)
        self.register_buffer("codes", codes)
        self.register_buffer("absmax", absmax)
        self.register_buffer("bias", None if bias is None else bias.detach())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.shape[-1] != self.in_features:
            raise ValueError(f"expected (..., {self.in_features}) inputs, not {tuple(x.shape)}")
        flat = x.reshape(-1, self.in_features)
        codes, absmax, columns = split_outliers(flat.half(), self.threshold)
        product = int8_matmul(codes, self.codes).float()
        y = product * (absmax[:, None] * self.absmax) * (1 / 127**2)
        if self.bias is not None:
            y = y + self.bias.float()
        y = y.to(x.dtype)
        if len(columns):
            weight = self.codes[:, columns].float() * (self.absmax / 127)[:, None]
            y = y + flat[:, columns] @ weight.to(x.dtype).T
        return y.view(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, threshold={self.threshold}"


def quantize_llm_int8(model: nn.Module, threshold: float = 6.0, progress: bool = True) -> nn.Module:
    """Replaces every linear layer except the head with a MixedLinear; returns the model.

    After an error the model is unchanged. Raises ValueError for weights beyond float16.
    """
    return replace_layers(
        model,
        lambda _, layer: MixedLinear(weight_of(layer), layer.bias, threshold),
        progress,
        "LLM.int8()",
    )


def smoothing(
    activation_absmax: torch.Tensor, weights: list[torch.Tensor], alpha: float = 0.5
) -> torch.Tensor:
    """SmoothQuant's s of each input channel: absmax_x^alpha / absmax_w^(1 - alpha), (in_features,).

    `weights`: of all linear layers that read these activations. alpha = 1 shifts the whole range
    into the weights; alpha = 0 shifts the weights' range into the activations.
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha must lie between 0 and 1, not {alpha!r}")
    largest = torch.stack([weight.detach().float().abs().amax(0) for weight in weights]).amax(0)
    absmax = activation_absmax.to(largest.device).float()
    # a channel that is always 0 would give s = 0, and a division by 0
    return (absmax.clamp(min=1e-5) ** alpha / largest.clamp(min=1e-5) ** (1 - alpha)).clamp(
        min=1e-5
    )


@torch.no_grad()
def smooth(model: nn.Module, calibration: dict[str, Statistics], alpha: float = 0.5) -> nn.Module:
    """Moves outliers from activations into weights, in place, without changing the function.

    For each norm that feeds linear layers, its gain and bias are divided by s, and the columns of
    those layers are multiplied by s. `calibration`: the result of `static.calibrate`. Returns the
    model.
    Raises ValueError, before any change, for a model whose blocks are not Llama's or GPT-2's.
    """
    blocks = {
        name: SMOOTHED[type(module).__name__]
        for name, module in model.named_modules()
        if type(module).__name__ in SMOOTHED
    }
    if not blocks:
        raise ValueError(
            f"SmoothQuant needs to know which norm feeds which layers; of {type(model).__name__} "
            f"it does not. Known blocks: {', '.join(SMOOTHED)}"
        )
    layers = linear_layers(model)
    plan = []
    for block, norms in blocks.items():
        for norm, names in norms.items():
            readers = [f"{block}.{name}" for name in names]
            missing = [name for name in readers if name not in layers or name not in calibration]
            if missing:
                raise ValueError(f"{missing[0]} was not calibrated, or is quantized already")
            weights = [weight_of(layers[name]) for name in readers]
            absmax = calibration[readers[0]].channel_absmax
            scale = smoothing(absmax, weights, alpha)
            plan.append((model.get_submodule(f"{block}.{norm}"), readers, scale))
    for norm, readers, scale in plan:
        fold(norm, [layers[name] for name in readers], scale)
    return model
