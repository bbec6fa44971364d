"""AWQ: before rounding, scale up the weights that meet large activations.

Lin et al. 2023, https://arxiv.org/abs/2306.00978, with the paper's symbols. A linear layer computes
W x. Column j of W is multiplied by s_j and channel j of x divided by it, which changes nothing
until W is rounded:

    W x  ~  Q(W diag(s)) diag(s)^-1 x

The error of a rounded weight is about the same before and after, since it hangs on its group's
range; so the error that channel j leaves in the output shrinks by s_j. Of course the range grows
when a column is scaled up too far. Hence a search with one parameter:

    s = mean|x|^r         r = 0, .05, .. .95: the one with the least squared error of the output

The division of x is folded into the norm or linear layer before, so that it costs nothing. Then
each group's range is cut off where that lowers the error. Nothing is learned but s and the cut:
each weight is still rounded to the nearest point of its grid.

This follows the authors' code, and AutoAWQ's without its "duo scaling", but for two things. Their
later blocks learn from inputs of the unquantized model; ours from those of the quantized blocks
before, as our GPTQ does. Their grid spans each group's smallest to largest weight, also where both
have one sign; the zero point of such a grid lies outside of 0 to 2**bits - 1, they clamp it, and
the codes saturate. Ours spans zero as well, as `quantize_affine`; the two are the same wherever a
group has both signs. Theirs takes no range narrower than 1e-5 either.
"""

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import nn
from torch.func import functional_call

from chapter13.integer import affine_grid, nonzero, quantize_affine
from chapter13.outliers import SMOOTHED
from chapter13.packing import check_bits
from chapter13.tensors import QuantizedTensor, check_finite, grouped
from chapter13.whole_model.layers import linear_layers, put_weight, stored, weight_of
from chapter13.whole_model.walk import Walk

RATIOS = tuple(step / 20 for step in range(20))  # r
CUTS = tuple(1 - step / 20 for step in range(10))  # of a group's largest magnitude
CLIP_TOKENS = 512  # at most, when the cut is searched

# Which linear layers put out what the next ones read, channel by channel, up to a factor: values
# are averaged over tokens, a gate multiplies. Of `c_attn` only the last third, the values. GPT-2's
# `mlp.c_proj` stands behind a gelu, which no factor passes through: it is rounded unscaled.
CHAINED = {
    "LlamaDecoderLayer": {
        "self_attn.v_proj": ("self_attn.o_proj",),
        "mlp.up_proj": ("mlp.down_proj",),
    },
    "GPT2Block": {"attn.c_attn": ("attn.c_proj",)},
}
# Queries are multiplied with keys, and the error of each says little about that of the product.
UNCLIPPED = ("q_proj", "k_proj", "c_attn")


class ScaleSearch(NamedTuple):
    """What `search_scale` found."""

    s: torch.Tensor
    """float32 (in_features,): the best scales."""
    r: float
    """Their exponent."""
    losses: tuple[float, ...]
    """The mean squared error of the output for each r in RATIOS; inf where no grid can be held."""


def scales(activation: torch.Tensor, r: float) -> torch.Tensor:
    """s = activation^r, at least 1e-4, over sqrt(max s * min s): float32 (in_features,).

    `activation`: mean |x| of each input channel. The division leaves what counts, the ratios, and
    keeps s around 1. r = 0 gives ones.
    """
    s = activation.float().pow(r).clamp(min=1e-4)
    return s / (s.max() * s.min()).sqrt()


def search_scale(
    activation: torch.Tensor,
    weights: list[torch.Tensor],
    output: Callable[[list[torch.Tensor]], Iterable[torch.Tensor]],
    bits: int = 4,
    group_size: int | str = 64,
    scale_dtype: torch.dtype = torch.float16,
) -> ScaleSearch:
    """The r in RATIOS whose scales lose least of an output; of equal ones the first.

    `activation`: as `scales` takes it. `weights`: of all linear layers that read these channels,
    each (out_features, in_features). `output(weights)`: what should stay, with these weights in
    place; any number of tensors.

    Raises as `quantize_affine`, and ValueError where the output is not finite.
    """
    exact = list(output(weights))
    losses = []
    for r in RATIOS:
        s = scales(activation, r)
        try:
            tried = [_rounded(W * s, bits, group_size, scale_dtype) / s for W in weights]
        except ValueError:
            if r == 0:  # the weights as they are
                raise
            losses.append(torch.inf)  # scaled so far that float16 cannot hold the grid's step
            continue
        losses.append(_mse(exact, output(tried)))
    if not torch.tensor(losses[0]).isfinite():
        raise ValueError("the output holds NaN or Inf: the inputs do, or are too large")
    r = RATIOS[losses.index(min(losses))]
    return ScaleSearch(scales(activation, r), r, tuple(losses))


def search_clip(
    weight: torch.Tensor,
    inputs: torch.Tensor,
    bits: int = 4,
    group_size: int | str = 64,
    scale_dtype: torch.dtype = torch.float16,
) -> torch.Tensor:
    """The magnitude at which each group is best cut off: float32 (out_features, groups, 1).

    Of the fractions CUTS of the group's largest magnitude, the one with the least squared error of
    what the group adds to the output; of equal ones the largest. `weight`: (out_features,
    in_features), `inputs`: (tokens, in_features), of which CLIP_TOKENS are used at most, evenly
    spread. `weight.view(out, groups, -1).clamp(-limit, limit)` cuts. Raises as `quantize_affine`.
    """
    groups = grouped(weight.float(), group_size)
    W = groups.reshape(len(weight), -1, groups.shape[1])
    x = _spread(inputs).float()
    x = x.view(len(x), *W.shape[1:]).transpose(0, 1)
    # |x d|^2 summed over tokens is d^T (x^T x) d: a matrix as wide as a group in place of all x
    gram = x.transpose(1, 2) @ x
    largest = W.abs().amax(2, keepdim=True)
    limit, least = largest, torch.full_like(largest, torch.inf)
    for cut in CUTS:
        tried = W.clamp(-cut * largest, cut * largest).view_as(weight)
        try:
            d = _rounded(tried, bits, group_size, scale_dtype).view_as(W) - W
        except ValueError:
            if cut == 1:
                raise
            break  # float16 cannot hold a step as small as that
        d = d.transpose(0, 1)
        error = ((d @ gram) * d).sum(2).T.unsqueeze(2)
        better = error < least
        limit = torch.where(better, cut * largest, limit)
        least = torch.where(better, error, least)
    return limit


def fold(source: nn.Module, readers: list[nn.Module], s: torch.Tensor) -> None:
    """Divides what `source` puts out by s, and multiplies the columns of its `readers` by s.

    `source`: a norm with a gain (and bias) for each channel, or a linear layer, whose last len(s)
    outputs are meant. Together they compute what they did. Weights and biases become new
    parameters: the old ones may lie in a mapped file that others read.
    """
    if source.weight.dim() == 1:
        _put(source, "weight", source.weight / s)
        divisor = s
    else:
        divisor = torch.cat([s.new_ones(len(weight_of(source)) - len(s)), s])
        put_weight(source, weight_of(source) / divisor[:, None])
    if getattr(source, "bias", None) is not None:
        _put(source, "bias", source.bias / divisor)
    for layer in readers:
        put_weight(layer, weight_of(layer) * s)


def folds(block: nn.Module) -> dict[str, tuple[str, ...]]:
    """Source -> readers, by name, of a block's scales that can be folded.

    A linear source has to put out a channel for each one of its reader's. With grouped-query
    attention it does not: several heads share their values, and `o_proj` is rounded unscaled, as
    in the published code. Raises ValueError for a block that is not Llama's or GPT-2's.
    """
    kind = type(block).__name__
    if kind not in SMOOTHED:
        raise ValueError(
            f"AWQ needs to know which norm or layer feeds which layers; of {kind} it does not. "
            f"Known blocks: {', '.join(SMOOTHED)}"
        )

    def width(name):
        return weight_of(block.get_submodule(name)).shape

    chained = {
        source: readers
        for source, readers in CHAINED[kind].items()
        if width(source)[0] >= width(readers[0])[1]
    }
    return SMOOTHED[kind] | chained


@torch.no_grad()
def quantize_block(
    walk: Walk,
    index: int,
    done: Callable[[str, float], None],
    bits: int = 4,
    group_size: int | str = 64,
    scale_dtype: torch.dtype = torch.float16,
) -> dict[str, QuantizedTensor]:
    """Quantizes the next block of a walk, and sends the hidden states through it.

    Returns the weights of its linear layers by their names in the block, as `quantize_affine`
    makes them. In the block itself norms and biases take the scales in, in their data types, and
    the layers hold the dequantized weights in float32. All of these are new parameters: whoever
    kept `dict(block.named_parameters())` can put the old ones back, also after an error.

    The loss of scales that a norm takes in is that of the whole attention or MLP; of those that a
    linear layer takes in, that of the layer which reads them. All are searched in the block as it
    was, then folded, then each layer is cut off and rounded. `done(name, loss)` is told the squared
    error of each layer's output, as a share of the output's square.

    Raises as `folds`, `Walk.groups` and `quantize_affine`, naming the layer.
    """
    check_bits(bits)
    block = walk.blocks[index]
    plan, groups = folds(block), walk.groups(index)
    for name, layer in linear_layers(block).items():
        _check(name, weight_of(layer), group_size)
    dtypes = {name: parameter.dtype for name, parameter in block.named_parameters()}
    for name in dtypes:
        _cast(block, name, torch.float32)
    judges = {source: _judge(block, source, readers) for source, readers in plan.items()}
    seen = _calls(walk, index, {*judges.values(), *(names[0] for names in groups)})
    inputs = {name: _tokens(seen[names[0]]) for names in groups for name in names}

    found = {}
    for source, readers in plan.items():
        judge = judges[source]
        found[source] = search_scale(
            inputs[readers[0]].abs().mean(0),
            [weight_of(block.get_submodule(name)) for name in readers],
            _outputs(block, judge, readers, seen[judge]),
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
        W = cut = weight_of(layer)
        x = _spread(inputs[name])
        if name.rpartition(".")[2] not in UNCLIPPED:
            limit = search_clip(W, x, bits, group_size, scale_dtype)
            cut = W.reshape(len(W), limit.shape[1], -1).clamp(-limit, limit).view(W.shape)
        quantized[name] = quantize_affine(cut, bits, group_size, scale_dtype)
        restored = quantized[name].dequantize()
        put_weight(layer, restored)
        error = (x @ (restored - W).T).square().sum().item()
        done(name, error / (x @ W.T).square().sum().item() if error else 0.0)
    # norms and biases go out in their own data type; the weights, which stand for codes, do not
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


def _judge(block, source, readers):
    """The module whose output is the loss: behind a norm what the readers are part of."""
    after_norm = block.get_submodule(source).weight.dim() == 1
    return readers[0].rpartition(".")[0] if after_norm else readers[0]


def _calls(walk, index, names):
    """(args, kwargs) of each named module of a block, batch by batch."""
    seen = {name: [] for name in names}
    hooks = [
        walk.blocks[index]
        .get_submodule(name)
        .register_forward_pre_hook(
            lambda module, args, kwargs, name=name: seen[name].append((args, kwargs)),
            with_kwargs=True,
        )
        for name in names
    ]
    try:
        for batch in range(len(walk.hidden)):
            walk.through(index, batch)
    finally:
        for hook in hooks:
            hook.remove()
    return seen


def _tokens(calls):
    """What reached a linear layer: (tokens, in_features)."""
    return torch.cat([args[0].reshape(-1, args[0].shape[-1]) for args, _ in calls])


def _spread(inputs):
    """At most CLIP_TOKENS of all tokens, at equal distances."""
    return inputs[:: -(-len(inputs) // CLIP_TOKENS)]


def _outputs(block, judge, readers, calls):
    """The function from new weights of the readers to what the judging module then puts out."""
    module = block.get_submodule(judge)
    layers = {f"{name}.weight"[len(judge) + 1 :]: block.get_submodule(name) for name in readers}

    def run(weights):
        pairs = zip(layers.items(), weights, strict=True)
        changed = {key: stored(layer, weight) for (key, layer), weight in pairs}
        for args, kwargs in calls:
            out = functional_call(module, changed, args, kwargs)
            yield out[0] if isinstance(out, tuple) else out

    return run


def _rounded(weight, bits, group_size, scale_dtype):
    """quantize_affine(...).dequantize(), without packing the codes: a search asks only for this."""
    groups = grouped(weight, group_size)
    low = groups.amin(1, keepdim=True).clamp_(max=0)
    high = groups.amax(1, keepdim=True).clamp_(min=0)
    scale, zero_point = affine_grid(low, high, bits, scale_dtype)
    codes = torch.div(groups, nonzero(scale)).round_().add_(zero_point).clamp_(0, 2**bits - 1)
    return codes.sub_(zero_point).mul_(scale).view(weight.shape)


def _mse(exact, outputs):
    pairs = list(zip(exact, outputs, strict=True))
    total = sum((a - b).square_().sum(dtype=torch.float64) for a, b in pairs)
    return total.item() / sum(a.numel() for a, _ in pairs)


def _put(module, name, tensor):
    old = getattr(module, name)
    setattr(module, name, nn.Parameter(tensor, requires_grad=old.requires_grad))


def _cast(block, name, dtype):
    owner, _, own = name.rpartition(".")
    module = block.get_submodule(owner)
    _put(module, own, getattr(module, own).to(dtype))
