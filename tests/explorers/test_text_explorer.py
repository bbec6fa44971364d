"""The text explorer writes what the quantized model would, and shows where the texts part."""

import pytest
import torch
from tiny import Letters, toy_model

from chapter13 import quantize_model
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
    assert "NF4 is a table of 16 values: it takes 4 bits, not 8" in panel.set(method="nf4")
    panel.close()


def test_the_original_weights_stay():
    model, _ = toy_model()
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    damage = RoundedModel(model)
    damage.apply("absmax", 2, 64)
    for name, weight in damage.original.items():
        assert torch.equal(weight, before[f"{name}.weight"])
        assert not torch.equal(damage.layers[name].weight, weight)


def test_lines_keep_every_character_in_place():
    text = "a rose is a rose is a rose " * 9
    for same in (0, 30, 100, len(text)):
        lines = wrapped(text, same)
        together = "".join(one + other[len(one) :] for one, other in lines)
        assert together == text[: len(together)]
        assert sum(len(one) for one, _ in lines) == min(same, len(together))
        assert all(len(other) <= WIDTH for _, other in lines)
    assert len(wrapped("x" * 2000, 0)) == LINES
    assert printable("a\nb\tc码") == "a b c□"
