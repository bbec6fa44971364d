"""Perplexity and KL against transformers' own loss and against float64; intervals; the cache."""

import math

import pytest
import torch
from tiny import TOKENS, generator, says, tiny_gpt2, tiny_llama

from chapter13 import evaluate, quantize_model
from chapter13.evaluate import (
    Score,
    cache_logits,
    deviation,
    difference,
    kl_divergence,
    perplexity,
    perplexity_and_kl,
)


def damaged():
    return quantize_model(tiny_llama(), "absmax", 3, 32, progress=False)


def log_probabilities(model):
    with torch.no_grad():
        return torch.log_softmax(model(TOKENS).logits[:, :-1].double(), -1)


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2, damaged])
def test_perplexity_is_that_of_transformers(make):
    model = make()
    with torch.no_grad():
        loss = model(TOKENS, labels=TOKENS).loss.item()
    score = perplexity(model, TOKENS, progress=False)
    assert math.log(score.value) == pytest.approx(loss, abs=1e-6)
    assert float(score) == score.value


@pytest.mark.parametrize("batch_size", [1, 4, 6, 100])
def test_batches_change_nothing(batch_size):
    model, reference = damaged(), tiny_llama()
    assert len(perplexity(model, TOKENS, batch_size, progress=False).losses) == 6
    for measure in (
        lambda size: perplexity(model, TOKENS, size, progress=False),
        lambda size: kl_divergence(model, reference, TOKENS, size, progress=False),
    ):
        # float32 logits of 100 tokens, in another order of sums
        assert torch.allclose(measure(batch_size).losses, measure(2).losses, rtol=0, atol=1e-6)


def test_both_from_one_pass(tmp_path):
    model, reference = damaged(), tiny_llama()
    cache = cache_logits(reference, TOKENS, tmp_path / "cache", progress=False)
    for source in (reference, cache):
        both = perplexity_and_kl(model, source, TOKENS, progress=False)
        alone = (
            perplexity(model, TOKENS, progress=False),
            kl_divergence(model, source, TOKENS, progress=False),
        )
        for one, other in zip(both, alone, strict=True):
            assert torch.equal(one.losses, other.losses)
            assert one.exponential == other.exponential
    with pytest.raises(ValueError, match=says(cache, "tokens")):
        perplexity_and_kl(model, cache, TOKENS[:2], progress=False)


def test_kl_by_the_formula():
    model, reference = damaged(), tiny_llama()
    log_p, log_q = log_probabilities(reference), log_probabilities(model)
    expected = (log_p.exp() * (log_p - log_q)).sum(-1).mean(1)
    score = kl_divergence(model, reference, TOKENS, progress=False)
    assert torch.allclose(score.losses, expected, rtol=0, atol=1e-6)
    assert score.value > 1e-4


def test_kl_of_a_model_to_itself(tmp_path):
    model = tiny_llama()
    assert kl_divergence(model, model, TOKENS, progress=False).value == 0
    path = cache_logits(model, TOKENS, tmp_path / "logits", progress=False)
    # levels are (high - low) / 65535 apart, here below 1e-4: half of that squared
    assert abs(kl_divergence(model, path, TOKENS, progress=False).value) < 1e-8


def test_kl_through_the_cache(tmp_path):
    model, reference = damaged(), tiny_llama()
    path = cache_logits(reference, TOKENS, tmp_path / "logits", progress=False)
    direct = kl_divergence(model, reference, TOKENS, progress=False)
    cached = kl_divergence(model, path, TOKENS, batch_size=5, progress=False)
    assert torch.allclose(direct.losses, cached.losses, rtol=1e-4, atol=1e-7)
    assert path.stat().st_size == 40 + 6 * 11 * (8 + 2 * 100)


def test_a_cache_of_other_tokens_or_cut_short(tmp_path):
    model = tiny_llama()
    path = cache_logits(model, TOKENS, tmp_path / "logits", progress=False)
    for other in (TOKENS[:5], TOKENS[:, :8], TOKENS.flip(0)):
        with pytest.raises(ValueError, match=says(path, "tokens")):
            kl_divergence(model, path, other, progress=False)
    raw = path.read_bytes()
    for length in (0, 39, 40, len(raw) - 1):
        path.write_bytes(raw[:length])
        with pytest.raises(ValueError, match=says(path)):
            kl_divergence(model, path, TOKENS, progress=False)
    with pytest.raises(FileNotFoundError):
        kl_divergence(model, tmp_path / "none", TOKENS, progress=False)


def test_an_interrupted_cache_leaves_nothing(tmp_path, monkeypatch):
    model = tiny_llama()
    calls = []

    def interrupt(*_):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt

    model.register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        cache_logits(model, TOKENS, tmp_path / "logits", progress=False)
    assert not list(tmp_path.iterdir())


def test_the_quantile_of_students_t():
    published = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 7: 2.365, 15: 2.131, 32: 2.037, 120: 1.98}
    for degrees, value in published.items():
        assert evaluate.t_quantile(degrees) == pytest.approx(value, abs=0.0005)
    # as many draws as one likes: the normal distribution's, 1.95996, and (z**3 + z) / (4 degrees)
    assert evaluate.t_quantile(10**5) == pytest.approx(1.9599640 + 2.372e-5, abs=1e-7)


def test_the_interval_is_students():
    losses = torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64)
    # mean 7/3, standard deviation sqrt(7/3): 4.302653 * sqrt(7/3 / 3) to either side
    half = 4.302652729749 * (7 / 9) ** 0.5
    low, high = Score(losses).interval
    assert (low, high) == pytest.approx((7 / 3 - half, 7 / 3 + half))
    assert Score(losses, exponential=True).interval == (math.exp(low), math.exp(high))
    assert all(math.isnan(end) for end in Score(losses[:1]).interval)
    assert "3 sequences" in repr(Score(losses))
    assert f"{Score(losses):.2f}" == "2.33"


@pytest.mark.parametrize("count", [4, 33])
def test_the_interval_covers_95_percent(count):
    """Of normal losses exactly; 4000 trials have a standard deviation of 0.35%."""
    draws = torch.randn(4000, count, dtype=torch.float64, generator=generator(1))
    covered = sum(low <= 0 <= high for low, high in (Score(row).interval for row in draws))
    assert abs(covered / 4000 - 0.95) < 4 * 0.0035


def test_the_first_sequences_are_compared_one_by_one():
    recorded = Score(torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64), exponential=True)
    first = recorded.first(2)
    assert first.losses.tolist() == [1, 2]
    assert first.exponential
    measured = Score(torch.tensor([1.01, 1.9], dtype=torch.float64))
    assert deviation(measured, recorded) == pytest.approx(0.05)
    for count in (0, 4):
        with pytest.raises(ValueError, match=f"3 .*{count}"):
            recorded.first(count)
    with pytest.raises(ValueError, match="3 .*4"):
        deviation(Score(torch.ones(4, dtype=torch.float64)), recorded)


def test_paired_differences_are_narrower():
    hard = torch.linspace(1, 9, 40, dtype=torch.float64)
    one, two = Score(hard + 0.1), Score(hard + 0.01 * torch.cos(hard))
    low, high = difference(one, two).interval
    assert 0 < low < high < 0.12
    assert one.interval[0] < two.interval[1]  # unpaired, one could not tell
    with pytest.raises(ValueError, match=says(40, 39)):
        difference(one, Score(hard[1:]))


@pytest.mark.parametrize(
    ("tokens", "error", "message"),
    [
        ([[1, 2]], TypeError, says("integer", "torch.Tensor")),
        (TOKENS.float(), TypeError, says("integer", "torch.Tensor")),
        (TOKENS[0], ValueError, says("(12,)")),
        (TOKENS[:, :1], ValueError, says(2, "(6, 1)")),
        (TOKENS[:0], ValueError, says("(0, 12)")),
        (TOKENS + 100, ValueError, says("0 to 99")),
        (TOKENS - 100, ValueError, says("0 to 99")),
    ],
)
def test_wrong_tokens(tokens, error, message):
    with pytest.raises(error, match=message):
        perplexity(tiny_llama(), tokens, progress=False)


def test_logits_that_are_not_finite():
    model = tiny_llama().train()
    model.lm_head.weight.data[5, 5] = torch.nan
    with pytest.raises(ValueError, match=says("logits", "finite")):
        perplexity(model, TOKENS, progress=False)
    assert model.training


def test_modes_and_precisions():
    model = tiny_llama().train()
    perplexity(model, TOKENS, progress=False)
    assert model.training
    half = tiny_llama().bfloat16()
    score = kl_divergence(half, tiny_llama(), TOKENS, progress=False)
    assert 0 < score.value < 1e-3


def test_other_vocabularies():
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        vocab_size=120,
    )  # fmt: skip
    with pytest.raises(ValueError, match=says("vocabulary", 120, 100)):
        kl_divergence(tiny_llama(), LlamaForCausalLM(config), TOKENS, progress=False)
