"""AWQ against a plain float64 search, the published grid, and the function it must not change."""

import copy
from pathlib import Path

import pytest
import torch
from tiny import TOKENS, generator, says, tiny_gpt2, tiny_llama, uneven
from torch import nn

from chapter13 import awq, quantize_affine
from chapter13.whole_model.architectures import CHAINED, fold, folds
from chapter13.whole_model.awq_block import _loss_module, _outputs, awq_block
from chapter13.whole_model.layers import linear_layers, weight_of
from chapter13.whole_model.walk import Walk, tokens_of


def with_salient_channels(tokens, channels, seed=13):
    x = torch.randn(tokens, channels, generator=generator(seed))
    x[:, :: channels // 4] *= 12
    return x


def multi_head():
    """Each head has values of its own: o_proj's scales can be folded into v_proj."""
    return uneven(tiny_llama(num_key_value_heads=4, attention_bias=True, mlp_bias=True))


def uneven_gpt2():
    return uneven(tiny_gpt2())


MODELS = {"llama": tiny_llama, "multi-head": multi_head, "gpt2": uneven_gpt2}
every_model = pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)


# --- the grid --------------------------------------------------------------------------------


def published_grid(w, bits, group_size):
    """(codes, scale, zero point) a row for each group, as the AWQ authors' code computes them."""
    groups = w.view(-1, group_size)
    high, low = groups.amax(1, keepdim=True), groups.amin(1, keepdim=True)
    scale = (high - low).clamp(min=1e-5) / (2**bits - 1)
    zero = (-torch.round(low / scale)).clamp(0, 2**bits - 1)
    return (torch.round(groups / scale) + zero).clamp(0, 2**bits - 1), scale, zero


def both_signs(kind):
    w = torch.randn(16, 64, generator=generator()) * 0.02
    if kind == "outlier":
        w[3, 7] = 50.0
    if kind == "ties":
        w = torch.randint(-15, 16, (16, 64), generator=generator()) / 2
    if kind == "half":
        w = w.half().float()
    if kind == "bfloat16":
        w = w.bfloat16().float()
    if kind == "touching zero":
        w = w.abs()
    if kind == "one negative":
        w = w.abs()
        w[:, ::8] *= -1e-3
    if kind != "touching zero":
        w[:, ::8], w[:, 1::8] = w[:, ::8].abs() + 1e-5, -w[:, 1::8].abs() - 1e-5
    else:
        w[:, ::8] = 0
    return w


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize(
    "kind", ["plain", "outlier", "ties", "half", "bfloat16", "touching zero", "one negative"]
)
def test_the_grid_is_the_published_one_where_a_group_has_both_signs(kind, bits):
    w = both_signs(kind)
    codes, scale, zero = published_grid(w, bits, 8)
    ours = quantize_affine(w, bits, 8, torch.float32)
    assert torch.equal(ours.codes().view(-1, 8).float(), codes)
    assert torch.equal(ours.zero_point.view(-1, 1).float(), zero)
    assert torch.equal(ours.scale.view(-1, 1), scale)


@pytest.mark.parametrize("sign", [1, -1])
def test_the_published_grid_saturates_where_a_group_has_one_sign(sign):
    """Its zero point would have to lie outside of 0 to 15; ours spans zero instead."""
    w = sign * torch.linspace(1.0, 1.3, 8)[None]
    codes, scale, zero = published_grid(w, 4, 8)
    theirs = (codes - zero) * scale
    assert zero.item() == (0 if sign > 0 else 15)
    assert codes.unique().tolist() == [15 if sign > 0 else 0]
    assert (theirs - w).abs().min() > 0.65  # every weight becomes +-.3
    ours = quantize_affine(w, 4, 8, torch.float32).dequantize()
    # half a step of 1.3 / 15, and a rounding
    assert (ours - w).abs().max() <= 1.3 / 30 * (1 + 2**-20)


@pytest.mark.parametrize("scale_dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("group_size", [4, 64, "channel"])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_what_a_search_rounds_to_is_what_the_quantizer_stores(bits, group_size, scale_dtype):
    w = torch.randn(48, 64, generator=generator()) * 0.05
    w[0], w[1], w[2, 5], w[3] = 0, w[1].abs(), 30, -0.25
    stored = quantize_affine(w, bits, group_size, scale_dtype).dequantize()
    assert torch.equal(awq.round_affine(w, bits, group_size, scale_dtype), stored)


# --- the search of scales --------------------------------------------------------------------


def test_scales_are_the_formula():
    activation = torch.tensor([4.0, 1.0, 0.25, 0.0])
    assert torch.equal(awq.scales(activation, 0.0), torch.ones(4))
    # sqrt: 2, 1, .5 and 1e-4 in place of 0; then over sqrt(2 * 1e-4)
    expected = torch.tensor([2.0, 1.0, 0.5, 1e-4]) / (2e-4) ** 0.5
    # a power, a product, a root and a quotient: a few float32 roundings
    assert torch.allclose(awq.scales(activation, 0.5), expected, rtol=8 * 2**-24, atol=0)


def brute_force(x, weights, bits, group_size):
    """The loss of each r, all in float64 but for the stored scales."""
    activation = x.double().abs().mean(0)
    losses = []
    for step in range(20):
        s = (activation ** (step / 20)).clamp(min=1e-4)
        s = s / (s.max() * s.min()).sqrt()
        total = 0
        for w in weights:
            groups = (w.double() * s).view(-1, group_size)
            low = groups.amin(1, keepdim=True).clamp(max=0)
            high = groups.amax(1, keepdim=True).clamp(min=0)
            scale = ((high - low) / (2**bits - 1)).half().double()
            zero = (-low / scale).round()
            codes = ((groups / scale).round() + zero).clamp(0, 2**bits - 1)
            rounded = ((codes - zero) * scale).view(w.shape) / s
            total += (x.double() @ (rounded - w.double()).T).square().sum()
        losses.append(total.item() / (len(x) * sum(len(w) for w in weights)))
    return losses


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("bits", "group_size"), [(3, 8), (4, 16), (4, 64)])
def test_the_search_is_a_brute_force_one(bits, group_size, seed):
    x = with_salient_channels(96, 64, seed)
    weights = [torch.randn(rows, 64, generator=generator(seed)) * 0.05 for rows in (24, 8)]

    def output(tried):
        return [x @ w.T for w in tried]

    found = awq.search_scale(x.abs().mean(0), weights, output, bits, group_size)
    exact = brute_force(x, weights, bits, group_size)
    # The codes are the same: a weight within 2**-20 of the middle of two is not among these. An
    # output sums 64 products of up to 20 * .2, so float32 is off by less than 64 * 4 * 2**-24; an
    # error has a magnitude of .1, and the loss is its square.
    assert found.losses == pytest.approx(exact, rel=2 * 64 * 4 * 2**-24 / 0.1)
    assert exact[awq.RATIOS.index(found.r)] == min(exact)
    assert torch.equal(found.s, awq.scales(x.abs().mean(0), found.r))
    assert found.r > 0  # or this data tests nothing
    assert min(found.losses) == found.losses[awq.RATIOS.index(found.r)] < found.losses[0]


def test_r_of_zero_is_plain_rounding():
    x = with_salient_channels(50, 64)
    w = torch.randn(32, 64, generator=generator()) * 0.05
    found = awq.search_scale(x.abs().mean(0), [w], lambda tried: [x @ tried[0].T])
    plain = quantize_affine(w, 4, 64).dequantize()
    loss = (x @ w.T - x @ plain.T).square().double().mean().item()
    assert found.losses[0] == loss


def test_channels_that_are_all_alike_are_not_scaled():
    x = torch.randn(50, 64, generator=generator()).sign()
    w = torch.randn(32, 64, generator=generator())
    found = awq.search_scale(x.abs().mean(0), [w], lambda tried: [x @ tried[0].T])
    assert found.r == 0  # all losses are equal: the first one
    assert torch.equal(found.s, torch.ones(64))


def test_scales_that_float16_cannot_hold_are_passed_over():
    x = torch.ones(20, 64)
    x[:, 0] = 1e8
    x[:, 32:] = 0  # 1e-4 at least: the other groups grow until a step is beyond float16
    w = torch.randn(8, 64, generator=generator()) * 20
    found = awq.search_scale(x.abs().mean(0), [w], lambda tried: [x @ tried[0].T], 4, 32)
    assert torch.inf in found.losses
    assert min(found.losses) < torch.inf
    quantize_affine(w * found.s, 4, 32)
    with pytest.raises(ValueError, match=says("scale_dtype=torch.float32")):
        awq.search_scale(x.abs().mean(0), [w * 1e7], lambda tried: [x @ tried[0].T], 4, 32)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_activations_that_are_not_finite(bad):
    x = with_salient_channels(50, 64)
    x[3, 5] = bad
    w = torch.randn(32, 64, generator=generator())
    with pytest.raises(ValueError, match=says("output", "NaN", "Inf")):
        awq.search_scale(x.abs().mean(0), [w], lambda tried: [x @ tried[0].T])


# --- the search of cuts ----------------------------------------------------------------------


def brute_force_cuts(w, x, bits, group_size):
    """Each cut's error, (cuts, out, groups), in float64 but for the stored scales."""
    groups = w.double().view(len(w), -1, group_size)
    x = x.double().view(len(x), -1, group_size)
    largest = groups.abs().amax(2, keepdim=True)
    errors = []
    for step in range(10):
        tried = groups.clamp(-largest * (1 - step / 20), largest * (1 - step / 20))
        low = tried.amin(2, keepdim=True).clamp(max=0)
        high = tried.amax(2, keepdim=True).clamp(min=0)
        scale = ((high - low) / (2**bits - 1)).half().double()
        zero = (-low / scale).round()
        codes = ((tried / scale).round() + zero).clamp(0, 2**bits - 1)
        d = (codes - zero) * scale - groups
        errors.append(torch.einsum("tgk,ogk->tog", x, d).square().sum(0))
    return torch.stack(errors)


@pytest.mark.parametrize("tokens", [3, 512, 1000, 1536])
@pytest.mark.parametrize(("bits", "group_size"), [(3, 16), (4, 32)])
def test_the_cuts_are_a_brute_force_search_s(bits, group_size, tokens):
    w = torch.randn(24, 64, generator=generator()) ** 3 * 0.05
    x = with_salient_channels(tokens, 64)
    limit = awq.search_clip(w, x, bits, group_size)
    used = x[:: {3: 1, 512: 1, 1000: 2, 1536: 3}[tokens]]
    assert len(used) <= 512
    errors = brute_force_cuts(w, used, bits, group_size)
    largest = w.view(24, -1, group_size).abs().amax(2)
    step = ((1 - limit.squeeze(2) / largest) * 20).round().long()
    chosen = errors.gather(0, step[None])[0]
    # A weight in the middle of two codes may fall either way in float32: where it does, the cut
    # is as good as the best but for that one weight.
    exact = step == errors.argmin(0)
    assert exact.double().mean() >= 0.97
    assert (chosen[~exact] <= 1.2 * errors.min(0).values[~exact]).all()
    assert step.unique().numel() > 3  # or this data tests nothing
    cuts = torch.tensor(awq.CLIP_FRACTIONS)[step]
    assert torch.equal(limit.squeeze(2), cuts * largest)


def test_zeros_and_constants_are_not_cut():
    w = torch.zeros(3, 32)
    w[1], w[2] = 0.25, -0.25
    limit = awq.search_clip(w, torch.randn(20, 32, generator=generator()), 4, 16)
    # absmax 0, then a constant, which lies on the grid as it is and not once it is cut
    assert limit.squeeze(2).tolist() == [[0, 0], [0.25, 0.25], [0.25, 0.25]]


def test_clipping_near_the_ends_of_float16():
    w = torch.full((2, 32), 1.3e-5)  # a step of 8.7e-07 is subnormal in float16
    x = torch.randn(20, 32, generator=generator())
    assert (awq.search_clip(w, x, 4, 16) == 1.3e-5).all()
    with pytest.raises(ValueError, match=says("scale_dtype=torch.float32")):
        awq.search_clip(w * 1e11, x, 4, 16)


# --- AutoAWQ, whose searches were recorded by tools/awq_vectors.py ---------------------------


@pytest.fixture(scope="module")
def autoawq():
    from safetensors import safe_open

    with safe_open(Path(__file__).parents[1] / "awq_vectors" / "autoawq.safetensors", "pt") as file:
        assert file.metadata()["autoawq"] == "0.2.9"
        return {key: file.get_tensor(key) for key in file.keys()}


CASES = pytest.mark.parametrize(
    ("case", "bits", "group_size"), [("4-bit", 4, 16), ("3-bit", 3, 32), ("channel", 4, "channel")]
)


@CASES
def test_the_grid_is_autoawq_s(autoawq, case, bits, group_size):
    w = autoawq[f"{case} weight"]
    ours = quantize_affine(w, bits, group_size, torch.float32)
    scale, zero = autoawq[f"{case} scale"], autoawq[f"{case} zero"]
    groups = w.view(*scale.shape, -1)
    both = (groups.amin(2) <= 0) & (groups.amax(2) >= 0)
    assert (~both).sum() == {"4-bit": 1, "3-bit": 0, "channel": 0}[case]
    assert torch.equal(ours.scale.view_as(scale)[both], scale[both])
    assert torch.equal(ours.zero_point.view_as(zero)[both].float(), zero[both])
    theirs = autoawq[f"{case} rounded"].view_as(groups)
    assert torch.equal(ours.dequantize().view_as(groups)[both], theirs[both])


@CASES
def test_scales_are_autoawq_s(autoawq, case, bits, group_size):
    x, w = autoawq["x"], autoawq[f"{case} weight"]
    found = awq.search_scale(
        x.abs().mean(0), [w], lambda tried: [x @ tried[0].T], bits, group_size, torch.float32
    )
    # the same r, and a power that another version of torch may round otherwise
    assert torch.allclose(found.s, autoawq[f"{case} s"], rtol=8 * 2**-24, atol=0)
    assert found.r > 0  # or this data tests nothing


@CASES
def test_cuts_are_autoawq_s(autoawq, case, bits, group_size):
    w = autoawq[f"{case} weight"]
    limit = awq.search_clip(w, autoawq["x"], bits, group_size, torch.float32)
    assert torch.equal(limit, autoawq[f"{case} limit"])


# --- folding ---------------------------------------------------------------------------------


@every_model
def test_folding_leaves_the_function(make):
    model, reference = make().double(), make().double()
    before = dict(model.named_parameters())
    values = {name: parameter.clone() for name, parameter in before.items()}
    blocks = [module for module in model.modules() if type(module).__name__ in CHAINED]
    for block in blocks:
        for source, readers in folds(block).items():
            layers = [block.get_submodule(name) for name in readers]
            width = weight_of(layers[0]).shape[1]
            s = (2 * torch.randn(width, generator=generator())).exp().double()
            fold(block.get_submodule(source), layers, s)
    with torch.no_grad():
        error = (model(TOKENS).logits - reference(TOKENS).logits).abs().max()
    # the same function in exact numbers; in float64 two roundings a weight, 2**-53 each, pass
    # through some thirty operations of two blocks: a thousandfold margin is still 1e-10
    assert error < 1e-10
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, values[n])}
    assert len(changed) == {tiny_llama: 2 * 8, multi_head: 2 * 11, uneven_gpt2: 2 * 8}[make]
    assert all(torch.equal(before[name], values[name]) for name in values)  # none in place


@every_model
def test_what_is_folded_where(make):
    model = make()
    block = next(m for m in model.modules() if type(m).__name__ in CHAINED)
    chains = {
        tiny_llama: {"mlp.up_proj": ("mlp.down_proj",)},
        multi_head: {
            "self_attn.v_proj": ("self_attn.o_proj",),
            "mlp.up_proj": ("mlp.down_proj",),
        },
        uneven_gpt2: {"attn.c_attn": ("attn.c_proj",)},
    }
    linear = {
        source: readers
        for source, readers in folds(block).items()
        if block.get_submodule(source).weight.dim() == 2
    }
    assert linear == chains[make]


def test_only_the_values_of_c_attn_are_divided():
    from transformers.pytorch_utils import Conv1D

    source, reader = Conv1D(12, 4), Conv1D(6, 4)
    before = source.weight.clone()
    fold(source, [reader], torch.full((4,), 2.0))
    assert torch.equal(source.weight[:, :8], before[:, :8])
    assert torch.equal(source.weight[:, 8:], before[:, 8:] / 2)


def test_an_unknown_block():
    with pytest.raises(ValueError, match=says("Sequential", "LlamaDecoderLayer")):
        folds(nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8)))


# --- whole blocks ----------------------------------------------------------------------------


def ignore(name, loss):
    """What a caller might show."""


def quantize_all(model, done=ignore, **options):
    walk = Walk(model, TOKENS)
    return walk, [awq_block(walk, i, done, **options) for i in range(len(walk.blocks))]


@every_model
def test_a_whole_model(make):
    model, reference = make(), make()
    before = dict(model.named_parameters())
    values = {name: parameter.clone() for name, parameter in before.items()}
    told = []
    walk, quantized = quantize_all(model, lambda *each: told.append(each), bits=4, group_size=32)
    assert [name for name, _ in told] == [name for weights in quantized for name in weights]
    assert all(0 < loss < 0.1 for _, loss in told)
    for block, weights in zip(walk.blocks, quantized, strict=True):
        layers = linear_layers(block)
        assert set(weights) == set(layers)
        for name, layer in layers.items():
            assert weights[name].bits == 4
            assert weights[name].group_size == 32
            assert torch.equal(weight_of(layer), weights[name].dequantize())
    with torch.no_grad():
        hidden = model(TOKENS, output_hidden_states=True).hidden_states[1]
        again = Walk(model, TOKENS)
        again.advance(0)
        assert torch.equal(again.hidden[0], hidden)  # the walk's states are the model's
        again.advance(1)
        assert torch.equal(again.hidden[0], walk.hidden[0])
        error = (model(TOKENS).logits - reference(TOKENS).logits).norm()
        assert 0 < error < 0.3 * reference(TOKENS).logits.norm()
    # what was there can be put back
    assert all(torch.equal(before[name], values[name]) for name in values)
    for name, parameter in before.items():
        owner, _, own = name.rpartition(".")
        setattr(model.get_submodule(owner), own, parameter)
    with torch.no_grad():
        assert torch.equal(model(TOKENS).logits, reference(TOKENS).logits)


@every_model
def test_never_worse_than_plain_rounding_by_its_own_measure(make):
    """Scales alone: r = 0 is among the candidates, so no judged output loses more."""
    model = make()
    walk = Walk(model, TOKENS)
    block = walk.blocks[0]
    plan = folds(block)
    judges = {source: _loss_module(block, source, readers) for source, readers in plan.items()}
    seen = walk.calls(0, {*judges.values(), *(r for rs in plan.values() for r in rs)})
    for source, readers in plan.items():
        weights = [weight_of(block.get_submodule(name)) for name in readers]
        output = _outputs(block, judges[source], readers, seen[judges[source]])
        activation = tokens_of(seen[readers[0]]).abs().mean(0)
        with torch.no_grad():
            found = awq.search_scale(activation, weights, output, 3, 32)
            plain = [quantize_affine(w, 3, 32).dequantize() for w in weights]
            exact, rounded = list(output(weights)), list(output(plain))
        assert found.losses[0] == awq._mse(exact, rounded)
        assert min(found.losses) <= found.losses[0]


@every_model
def test_batches_make_no_difference_but_for_rounding(make, monkeypatch):
    """Three batches in place of one: the same r and cuts, as the sums differ by roundings alone."""
    _, whole = quantize_all(make(), group_size=32)
    monkeypatch.setattr("chapter13.whole_model.walk.TOKENS_AT_ONCE", 24)
    walk, parts = quantize_all(make(), group_size=32)
    assert len(walk.hidden) == 3
    for one, other in zip(whole, parts, strict=True):
        for name in one:
            same = (one[name].codes() == other[name].codes()).double().mean()
            assert same > 0.99, name


def test_bfloat16_blocks():
    """Searched in float32, stored in bfloat16: as a float32 copy of the model is quantized."""
    model = tiny_llama().bfloat16()
    wide = copy.deepcopy(model).float()
    walk = Walk(model, TOKENS)
    quantized = awq_block(walk, 0, ignore, 4, 32)
    other = Walk(wide, TOKENS)
    other.hidden = [hidden.clone() for hidden in Walk(copy.deepcopy(model), TOKENS).hidden]
    expected = awq_block(other, 0, ignore, 4, 32)
    for name, parameter in model.named_parameters():  # the weights stand for codes, to the bit
        block_weight = ".layers.0." in name and name.endswith("_proj.weight")
        assert parameter.dtype == (torch.float32 if block_weight else torch.bfloat16)
    for name in expected:
        same = (expected[name].codes() == quantized[name].codes()).double().mean()
        assert same > 0.99, name  # rotary angles may differ in their last bits


def test_errors_name_the_trouble():
    model = tiny_llama()
    walk = Walk(model, TOKENS)
    with pytest.raises(ValueError, match=says("q_proj", 40, 64)):
        awq_block(walk, 0, ignore, 4, 40)
    with pytest.raises(ValueError, match=says("bits", 9)):
        awq_block(walk, 0, ignore, 9, 32)
    with pytest.raises(ValueError, match=says("q_proj", "AWQ", "scale", "row")):
        awq_block(walk, 0, ignore, 4, None)
    model.model.layers[0].self_attn.q_proj.weight.data[3, 5] = torch.nan
    with pytest.raises(ValueError, match=says("q_proj", "1 NaN", "Inf", 4096, "[3, 5]")):
        awq_block(Walk(model, TOKENS), 0, ignore, 4, 32)


@pytest.mark.slow
def test_the_real_model_loses_less_than_by_rounding():
    """Six blocks of the embedded model, on text that the search has not seen."""
    from chapter13 import corpus, evaluate, models, quantize_model

    model, tokenizer = models.load()
    model.model.layers = model.model.layers[:6]
    held_out = corpus.evaluation_tokens(tokenizer, 4, 128)
    text = corpus.calibration_tokens(tokenizer, 2, 128)
    kl = {}
    for method, options in (("affine", {}), ("awq", {"calibration": text})):
        quantized = models.load()[0]
        quantized.model.layers = quantized.model.layers[:6]
        quantize_model(quantized, method, 4, 64, progress=False, **options)
        kl[method] = evaluate.kl_divergence(quantized, model, held_out, progress=False)
    # far enough for every other processor: the paired interval leaves out 0
    assert evaluate.difference(kl["affine"], kl["awq"]).interval[0] > 0
    assert kl["awq"].value < 0.8 * kl["affine"].value
