"""Whole models as GGUF files: names, row order, metadata; and that llama.cpp means the same.

llama.cpp itself takes minutes to build, so `make llama` runs it and keeps its log-probabilities in
tests/llamacpp.json; here our file is held against them.
"""

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from chapter13 import corpus, gguf_file, models, results
from chapter13.gguf_blocks import plain, quantize, read
from chapter13.gguf_model import FILE_TYPES, gguf_name, interleave, write_model
from tools import llamacpp, readme

REFERENCE = json.loads((Path(__file__).parent / "llamacpp.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def embedded():
    return models.load(device="cpu")


@pytest.fixture(scope="module")
def written(embedded, tmp_path_factory):
    path = tmp_path_factory.mktemp("gguf") / "Q4_0.gguf"
    return write_model(embedded[0], "Q4_0", path, models.gguf_path())


@pytest.fixture(scope="module")
def loaded(written):
    """The file as transformers reads it."""
    return llamacpp.load(written)


@pytest.fixture(scope="module")
def tokens(embedded):
    return corpus.evaluation_tokens(embedded[1], REFERENCE["sequences"], REFERENCE["length"])


@pytest.fixture(scope="module")
def ours(loaded, tokens):
    with torch.inference_mode():
        return llamacpp.log_probabilities(loaded(tokens).logits, tokens)


def deinterleave(rows: torch.Tensor, heads: int) -> torch.Tensor:
    """What llama.cpp's order undoes to, head by head, written with plain loops."""
    half = len(rows) // heads // 2
    order = [
        head * 2 * half + 2 * (channel % half) + channel // half
        for head in range(heads)
        for channel in range(2 * half)
    ]
    return rows[order]


def test_every_weight_under_its_name(embedded, written):
    model, _ = embedded
    stored = read(written).tensors
    weights = model.state_dict()
    del weights["lm_head.weight"]  # tied
    assert sorted(stored) == sorted(gguf_name(name) for name in weights)
    assert sorted(stored) == sorted(read(models.gguf_path()).tensors)
    for name, weight in weights.items():
        found = stored[gguf_name(name)]
        kind = "F32" if weight.dim() == 1 else "Q8_0" if "embed" in name else "Q4_0"
        expected = plain(weight) if kind == "F32" else quantize(weight, kind)
        assert (found.kind, found.shape) == (kind, weight.shape)
        values, heads = found.dequantize(), {"q_proj": 9, "k_proj": 3}.get(name.split(".")[-2])
        if heads:
            values = deinterleave(values, heads)
        assert torch.equal(values, expected.dequantize()), name


def test_metadata_is_that_of_the_other_file(written):
    ours, theirs = read(written).metadata, read(models.gguf_path()).metadata
    changed = {name for name in theirs if not np.array_equal(ours[name], theirs[name])}
    assert list(ours) == list(theirs)
    assert changed == {"general.file_type"}
    assert ours["general.file_type"] == 2


def test_transformers_reads_the_very_weights(embedded, loaded):
    """By way of the gguf library, which knows nothing of ours: names and row order included."""
    original = embedded[0].state_dict()
    original.pop("lm_head.weight")  # the embeddings once more
    for name in original:
        weight, kind = loaded.state_dict()[name], "Q8_0" if "embed" in name else "Q4_0"
        expected = original[name]
        if expected.dim() == 2:
            expected = quantize(expected, kind).dequantize()
        assert torch.equal(weight, expected), name


def test_rotary_rows_by_hand():
    rows = torch.arange(12.0).view(12, 1)
    assert interleave(rows, 2).flatten().tolist() == [0, 3, 1, 4, 2, 5, 6, 9, 7, 10, 8, 11]
    assert torch.equal(deinterleave(interleave(rows, 3), 3), rows)


def test_llamacpp_predicts_the_same(loaded, ours, tokens):
    """Its log-probabilities are off ours by what rounding the inputs to Q8_0 does, no more.

    That effect is measured here, in torch. The two roundings part after a few layers, because a
    code turns on the last bit of a sum, and are then noise of one size: so the typical difference
    must be within a factor of 2 of it, and the mean of all within 4 of its standard errors.
    """
    with torch.inference_mode(), llamacpp.quantized_inputs(loaded):
        rounded = llamacpp.log_probabilities(loaded(tokens).logits, tokens)
    noise = (rounded - ours).abs().median()
    difference = torch.tensor(REFERENCE["Q4_0"], dtype=torch.float64) - ours
    assert 0.5 * noise < difference.abs().median() < 2 * noise
    error = difference.std() / difference.numel() ** 0.5
    assert difference.mean().abs() < 4 * error


def test_a_wrong_row_order_would_be_noticed(loaded, ours, tokens):
    """The same comparison with the rows of q and k interleaved once too often: far outside."""
    wrong = copy.deepcopy(loaded)
    with torch.inference_mode():
        for layer in wrong.model.layers:
            for module, heads in ((layer.self_attn.q_proj, 9), (layer.self_attn.k_proj, 3)):
                module.weight.copy_(interleave(module.weight, heads))
        found = llamacpp.log_probabilities(wrong(tokens[:1]).logits, tokens[:1])
    theirs = torch.tensor(REFERENCE["Q4_0"][:1], dtype=torch.float64)
    assert (found - theirs).abs().median() > 10 * (ours[:1] - theirs).abs().median()


def test_what_make_llama_recorded():
    for kind in FILE_TYPES:
        found = results.load()[f"llama.cpp {kind}"]
        assert abs(found["perplexity llama.cpp"] / found["perplexity"] - 1) < 0.02
        assert found["same likeliest token"] > 0.9
        recorded = torch.tensor(REFERENCE[kind], dtype=torch.float64)
        # the log-probabilities are rounded to three digits, so their mean by at most half of one
        assert found["perplexity llama.cpp"] == pytest.approx(
            (-recorded.mean()).exp().item(), rel=5.1e-4
        )


def test_readme_is_not_stale():
    assert readme.read(llamacpp.SECTION) == llamacpp.readme_section(results.load()), (
        "stale: run `make llama`"
    )


def tiny(**changes) -> LlamaForCausalLM:
    sizes = {
        "vocab_size": 64, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": False,
    }  # fmt: skip
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**(sizes | changes)))


def description(model) -> dict:
    config = model.config
    counts = {
        "block_count": config.num_hidden_layers,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "vocab_size": config.vocab_size,
    }
    return {
        "general.architecture": "llama",
        **{f"llama.{name}": np.uint32(count) for name, count in counts.items()},
        "llama.attention.layer_norm_rms_epsilon": np.float32(config.rms_norm_eps),
        "llama.rope.freq_base": np.float32(config.rope_parameters["rope_theta"]),
    }


def test_a_head_of_its_own_goes_out_too(tmp_path):
    model = tiny()
    like = gguf_file.write(tmp_path / "like.gguf", description(model), {})
    for source in (model, copy.deepcopy(model).bfloat16()):
        stored = read(write_model(source, "Q8_0", tmp_path / "new.gguf", like)).tensors
        assert len(stored) == 2 * 9 + 3
        head = source.lm_head.weight
        assert torch.equal(stored["output.weight"].blocks, quantize(head, "Q8_0").blocks)


@pytest.mark.parametrize("key", sorted(description(tiny())))
def test_a_file_of_another_model_is_refused(tmp_path, key):
    model = tiny()
    metadata = description(model)
    metadata[key] = (
        "gpt2" if key == "general.architecture" else metadata[key] + metadata[key].dtype.type(1)
    )
    like = gguf_file.write(tmp_path / "like.gguf", metadata, {})
    with pytest.raises(ValueError, match=f"describes another model: {key} is "):
        write_model(model, "Q8_0", tmp_path / "new.gguf", like)
    del metadata[key]
    like = gguf_file.write(tmp_path / "like.gguf", metadata, {})
    with pytest.raises(ValueError, match=f"{key} is None"):
        write_model(model, "Q8_0", tmp_path / "new.gguf", like)
    assert not (tmp_path / "new.gguf").exists()


def test_other_kinds_and_other_weights_are_refused(tmp_path):
    model = tiny(attention_bias=True)
    like = gguf_file.write(tmp_path / "like.gguf", description(model), {})
    with pytest.raises(ValueError, match="kind must be one of Q4_0, Q4_1, Q8_0, not 'Q4_K'"):
        write_model(model, "Q4_K", tmp_path / "new.gguf", like)
    with pytest.raises(ValueError, match=r"q_proj\.bias' is no weight of a Llama"):
        write_model(model, "Q8_0", tmp_path / "new.gguf", like)
    assert not (tmp_path / "new.gguf").exists()
