"""The text explorer writes what the quantized model would, and shows where the texts part."""

import pytest
import torch
from tiny import TOKENS as IDS_TO_MEASURE
from tiny import Letters, toy_model

from chapter13 import evaluate, quantize_model
from chapter13.explorers.text import PROMPTS, TOKENS, RoundedModel, explore_text, greedy
from chapter13.plots.text import LINES, WIDTH, printable, wrapped

PROMPT = PROMPTS[0]
IDS = Letters()(PROMPT, False)["input_ids"]


def generated(model, count=TOKENS):
    """By transformers."""
    ids = torch.tensor([IDS])
    written = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=count,
        do_sample=False,
        pad_token_id=0,
    )
    return written[0, len(IDS) :].tolist()


def test_greedy_as_transformers():
    model, _ = toy_model()
    new, margin = greedy(model, IDS, TOKENS)
    assert new == generated(model)
    assert len(new) == TOKENS
    with torch.no_grad():
        logits = model(torch.tensor([IDS + new])).logits[0, len(IDS) - 1 : -1]
    best = logits.topk(2).values
    assert margin == pytest.approx((best[:, 0] - best[:, 1]).min().item(), abs=1e-5)


def test_greedy_stops_where_the_text_ends():
    model, _ = toy_model()
    new, _ = greedy(model, IDS, TOKENS)
    model.config.eos_token_id = new[5]
    assert greedy(model, IDS, TOKENS)[0] == new[: new.index(new[5])]


@pytest.mark.parametrize(
    ("method", "bits", "group_size"),
    [("absmax", 4, 64), ("affine", 3, "channel"), ("nf4", 4, 32), ("absmax", 2, 32)],
)
def test_text_is_that_of_the_quantized_model(method, bits, group_size):
    panel = explore_text(*toy_model())
    reference = toy_model()[0]
    panel.set(method="affine", bits=2)  # what was there before leaves no trace
    panel.set(prompt=PROMPT, method=method, bits=bits, group_size=group_size)
    quantized = quantize_model(toy_model()[0], method, bits, group_size, progress=False)
    decode = Letters().decode
    assert panel.view.text == PROMPT + decode(generated(quantized))
    before = generated(reference)
    assert panel.view.reference == PROMPT + decode(before)
    held = [m.quantized for m in quantized.modules() if hasattr(m, "quantized")]
    bits_per_weight = 8 * sum(q.nbytes for q in held) / sum(q.shape.numel() for q in held)
    assert panel.view.bits_per_weight == bits_per_weight
    assert f"{bits_per_weight:.2f}" in panel.readout
    assert panel.view.text[: panel.view.same] == panel.view.reference[: panel.view.same]
    assert panel.view.same == len(PROMPT) + panel.view.agree
    panel.close()


def test_nf4_has_four_bits():
    panel = explore_text(*toy_model())
    assert "NF4 is a table of 16 values: it takes 4 bits, not 3" in panel.set(method="nf4")
    panel.close()


def test_the_original_weights_stay():
    model, _ = toy_model()
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    damage = RoundedModel(model)
    damage.apply("absmax", 2, 64)
    for name, weight in damage.original.items():
        assert torch.equal(weight, before[f"{name}.weight"])
        assert not torch.equal(damage.layers[name].weight, weight)


def test_kl_is_that_of_evaluate():
    tokens = IDS_TO_MEASURE[0]
    panel = explore_text(*toy_model(), tokens=tokens)
    for settings in ({"method": "absmax", "bits": 2}, {"method": "nf4", "bits": 4}):
        panel.set(**settings)
        other = quantize_model(toy_model()[0], *settings.values(), 64, progress=False)
        exact = evaluate.kl_divergence(other, toy_model()[0], tokens[None], progress=False)
        # float32 here, float64 there: some hundred terms of at most 1
        assert panel.view.kl == pytest.approx(exact.value, abs=1e-5)
        assert f"{panel.view.kl:.3f}" in panel.readout
    panel.close()
    panel = explore_text(*toy_model())
    assert panel.view.kl is None
    assert "KL" not in panel.readout
    panel.close()


def test_it_opens_on_damage():
    panel = explore_text(*toy_model())
    assert panel.settings == {"prompt": PROMPTS[0], "method": "affine", "bits": 3, "group_size": 64}
    assert "affine, 3 bits, groups of 64" in panel.figure._title.get_text()
    panel.close()


def test_lines_end_between_words():
    text = ("a rose is a rose is a rose " * 9).strip()
    for same in (0, 30, 100, len(text)):
        lines = wrapped(text, same)
        whole = [one + other[len(one) :] for one, other in lines]
        assert " ".join(whole) == text
        assert not any(line.startswith(" ") for line in whole)
        assert all(len(line) <= WIDTH for line in whole)
        start = 0
        for (one, _), line in zip(lines, whole, strict=True):
            assert len(one) == min(max(same - start, 0), len(line))
            start += len(line) + 1
    assert printable("a\nb\tc码") == "a b c□"


def test_long_words_are_cut_and_long_texts_end_in_an_ellipsis():
    word = "x" * (WIDTH + 10)
    assert [other for _, other in wrapped(f"a {word}", 0)] == ["a", word[:WIDTH], word[WIDTH:]]
    lines = wrapped("x" * 2000, 0)
    assert len(lines) == LINES
    assert lines[-1] == ("", "x" * (WIDTH - 1) + "…")
