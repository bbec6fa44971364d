"""GPTQ checkpoints: the format to the bit, out and in, damage, and what AutoGPTQ, GPTQModel and
transformers compute from ours, and ours from theirs."""

import copy
import json
import os
from functools import partial

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import TOKENS, generator, says, tiny_gpt2, tiny_llama
from torch import nn

from chapter13 import checkpoint, quantize_model
from chapter13.checkpoint import load_gptq, save_gptq
from chapter13.gptq_words import BITS, FORMATS, from_gptq, from_words, to_gptq, to_words
from chapter13.integer import quantize_absmax, quantize_affine
from chapter13.whole_model.linear import QuantizedLinear
from tools import peers

UP = "model.layers.0.mlp.up_proj"


def run(model):
    with torch.no_grad():
        return model(TOKENS).logits


def compare(ours, theirs):
    """The same weights; float32 sums in another order: some 2**-24 a term, through two blocks of
    64 to 256 terms."""
    assert (ours - theirs).abs().max() <= 1e-4 * ours.abs().max()


def layers(model):
    named = model.named_modules()
    return {name: module for name, module in named if isinstance(module, QuantizedLinear)}


def quantized(make=tiny_llama, method="affine", bits=4, group_size=32):
    """A quantized model whose other tensors are float16 numbers, so that float16 holds them."""
    model = make().half().float()
    return quantize_model(model, method, bits=bits, group_size=group_size, progress=False)


def nasty(bits, group_size, low=True):
    """A weight of 64 rows with all that an affine grid can meet, quantized."""
    weight = torch.randn(64, 96, generator=generator())
    weight[0] = 0
    weight[1] = -weight[1].abs()  # zero point 2**bits - 1
    weight[2, 5] = 1000
    weight[3] = 0.25
    weight[4, :32] = 0
    weight[5] = 6e-5 * weight[5].sign()  # scales are subnormal float16 numbers
    if low:
        weight[6] = weight[6].abs()  # zero point 0
    else:
        weight[2:4] = -weight[2:4].abs()
    return quantize_affine(weight, bits, group_size)


def settings(bits, group_size, checkpoint_format):
    size = -1 if group_size == "channel" else group_size
    return {"bits": bits, "group_size": size, "checkpoint_format": checkpoint_format}


@pytest.fixture(scope="session")
def tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({str(i): i for i in range(100)}, unk_token="0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="0", eos_token="1")


# --- one weight -------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", BITS)
def test_words_are_a_stream_with_the_lowest_bit_first(bits):
    codes = torch.randint(2**bits, (5, 64), generator=generator(), dtype=torch.uint8)
    words = to_words(codes, bits)
    assert words.shape == (5, 2 * bits)
    for row, packed in zip(codes.tolist(), words.tolist(), strict=True):
        number = sum(code << bits * place for place, code in enumerate(row))
        assert number == sum((word % 2**32) << 32 * place for place, word in enumerate(packed))
    assert torch.equal(from_words(words, bits), codes)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("group_size", [32, 48, "channel"])
@pytest.mark.parametrize("checkpoint_format", FORMATS)
def test_one_weight_to_the_bit(bits, group_size, checkpoint_format):
    weight = nasty(bits, group_size, low=checkpoint_format == "gptq_v2")
    tensors = to_gptq(weight, checkpoint_format)
    groups = 1 if group_size == "channel" else 96 // group_size
    assert tensors["qweight"].shape == (96 * bits // 32, 64)
    assert tensors["qzeros"].shape == (groups, 64 * bits // 32)
    assert tensors["scales"].shape == (groups, 64)
    assert tensors["scales"].dtype == torch.float16
    assert tensors["g_idx"].tolist() == [i * groups // 96 for i in range(96)]
    stored = from_words(tensors["qzeros"], bits) + (checkpoint_format == "gptq")
    back = from_gptq(tensors, weight.shape, settings(bits, group_size, checkpoint_format))
    assert torch.equal(back.zero_point.view(64, -1), stored.T)
    assert torch.equal(back.scale, weight.scale)
    assert torch.equal(back.dequantize(), weight.dequantize())
    if checkpoint_format == "gptq_v2":
        assert torch.equal(back.codes(), weight.codes())
        assert torch.equal(back.zero_point, weight.zero_point)
        assert back.zero_point.min() == 0
        assert back.zero_point.max() == 2**bits - 1
    else:  # groups of zeros are moved up by one level, no other
        moved = (weight.zero_point == 0).int()
        assert 0 < moved.sum() < moved.numel()
        assert weight.scale[moved.bool()].abs().max() == 0
        assert torch.equal(back.zero_point.int(), weight.zero_point + moved)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("checkpoint_format", FORMATS)
def test_absmax_becomes_the_symmetric_grid(bits, checkpoint_format):
    weight = quantize_absmax(torch.randn(64, 96, generator=generator()), bits, 32)
    tensors = to_gptq(weight, checkpoint_format)
    back = from_gptq(tensors, weight.shape, settings(bits, 32, checkpoint_format))
    assert (back.zero_point == 2 ** (bits - 1)).all()
    assert torch.equal(back.codes().int(), weight.codes().int() + 2 ** (bits - 1))
    assert torch.equal(back.dequantize(), weight.dequantize())


def test_zero_point_0_needs_the_second_format():
    with pytest.raises(ValueError, match=says(192, "zero point 0", "gptq_v2")):
        to_gptq(nasty(4, 32), "gptq")


def test_scales_beyond_float16_are_not_rounded():
    weight = torch.randn(64, 96, generator=generator())
    with pytest.raises(ValueError, match=says(192, "scale_dtype=torch.float16")):
        to_gptq(quantize_affine(weight, 4, 32, torch.float32), "gptq_v2")
    exact = quantize_affine(torch.full((32, 32), 7.5), 4, 32, torch.float32)  # scale 1/2
    assert (to_gptq(exact, "gptq_v2")["scales"] == 0.5).all()


# --- whole models -----------------------------------------------------------------------------


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
@pytest.mark.parametrize(("method", "group_size"), [("absmax", "channel"), ("affine", 32)])
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("checkpoint_format", FORMATS)
def test_there_and_back(make, method, bits, group_size, checkpoint_format, tmp_path):
    model = quantized(make, method, bits, group_size)
    save_gptq(model, tmp_path / "out", checkpoint_format=checkpoint_format)
    back = load_gptq(tmp_path / "out")
    assert not back.training
    assert layers(back).keys() == layers(model).keys()
    for name, layer in layers(model).items():
        assert torch.equal(back.get_submodule(name).quantized.scale, layer.quantized.scale)
        restored = back.get_submodule(name).quantized.dequantize()
        assert torch.equal(restored, layer.quantized.dequantize())
    state = back.state_dict()
    for key, tensor in model.state_dict().items():
        if key.rpartition(".")[0] not in layers(model):
            assert torch.equal(state[key], tensor)
    compare(run(back), run(model))
    assert not hasattr(back.config, "quantization_config")
    # and once more: what was loaded is written as the same bytes
    save_gptq(back, tmp_path / "again", checkpoint_format=checkpoint_format)
    first, second = (tmp_path / each / "model.safetensors" for each in ("out", "again"))
    assert first.read_bytes() == second.read_bytes()


def test_what_stands_beside_the_weights(tmp_path, tokenizer):
    from transformers import AutoTokenizer

    model = quantized(method="absmax")
    model.config.rope_parameters = {"rope_type": "linear", "rope_theta": 500.0, "factor": 8.0}
    save_gptq(model, tmp_path / "a" / "v1", tokenizer)
    config = json.loads((tmp_path / "a" / "v1" / "config.json").read_text())
    own = config["quantization_config"]
    maker = own["meta"]["quantizer"][0]
    assert maker.startswith("chapter13:")
    assert own == {
        "quant_method": "gptq",
        "bits": 4,
        "group_size": 32,
        "desc_act": False,
        "sym": True,
        "true_sequential": True,
        "meta": {"quantizer": [maker]},
        "checkpoint_format": "gptq",
    }
    assert json.loads((tmp_path / "a" / "v1" / "quantize_config.json").read_text()) == own
    assert (config["architectures"], config["dtype"]) == (["LlamaForCausalLM"], "float32")
    assert config["rope_theta"] == 500.0  # for transformers 4
    assert config["rope_scaling"] == config["rope_parameters"]
    assert (tmp_path / "a" / "v1" / "generation_config.json").exists()
    assert AutoTokenizer.from_pretrained(tmp_path / "a" / "v1")("7 5")["input_ids"] == [7, 5]
    save_gptq(quantized(group_size="channel"), tmp_path / "v2", checkpoint_format="gptq_v2")
    own = json.loads((tmp_path / "v2" / "config.json").read_text())["quantization_config"]
    assert (own["group_size"], own["sym"], own["checkpoint_format"]) == (-1, False, "gptq_v2")
    assert not (tmp_path / "v2" / "quantize_config.json").exists()  # AutoGPTQ would misread it


@pytest.mark.parametrize("checkpoint_format", FORMATS)
@pytest.mark.parametrize("tied", [True, False])
def test_the_weights_say_whether_the_head_is_tied(tied, checkpoint_format, tmp_path):
    model = quantized()
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    head.weight = embeddings.weight if tied else torch.nn.Parameter(embeddings.weight + 1)
    model.config.tie_word_embeddings = not tied  # what nobody should believe
    expected = run(model)
    save_gptq(model, tmp_path / "out", checkpoint_format=checkpoint_format)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["tie_word_embeddings"] is tied
    again = load_gptq(tmp_path / "out")
    compare(run(again), expected)
    head = again.get_output_embeddings().weight
    assert torch.equal(head, model.get_output_embeddings().weight)
    assert (head is again.get_input_embeddings().weight) is tied


@pytest.mark.parametrize("checkpoint_format", FORMATS)
def test_saved_names_are_those_of_the_models_own_files(checkpoint_format, tmp_path):
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    sizes = {"vocab_size": 100, "hidden_size": 64, "intermediate_size": 96}
    torch.manual_seed(13)
    model = GPTNeoXForCausalLM(
        GPTNeoXConfig(**sizes, num_hidden_layers=1, num_attention_heads=4)
    ).eval()
    model.save_pretrained(tmp_path / "own")
    own = set(load_file(tmp_path / "own" / "model.safetensors"))
    quantize_model(model, "absmax", 4, 32, progress=False)
    expected = run(model)
    save_gptq(model, tmp_path / "out", checkpoint_format=checkpoint_format)
    saved = set(load_file(tmp_path / "out" / "model.safetensors"))
    assert "embed_out.weight" in own & saved
    assert {name.rpartition(".")[0] for name in saved} == {name.rpartition(".")[0] for name in own}
    compare(run(load_gptq(tmp_path / "out")), expected)


def test_a_model_whose_files_group_weights_differently_is_refused(tmp_path):
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    sizes = {"vocab_size": 96, "hidden_size": 64, "num_hidden_layers": 1, "head_dim": 16}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    model = Qwen3MoeForCausalLM(
        Qwen3MoeConfig(**sizes, **heads, moe_intermediate_size=32, num_experts=4)
    )
    with pytest.raises(ValueError, match=says("Qwen3MoeForCausalLM", "experts")):
        save_gptq(model, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_tied_head_is_stored_for_autogptq_alone(tmp_path):
    model = quantized(tiny_gpt2)
    for checkpoint_format, stored in (("gptq", True), ("gptq_v2", False)):
        save_gptq(model, tmp_path / checkpoint_format, checkpoint_format=checkpoint_format)
        tensors = load_file(tmp_path / checkpoint_format / "model.safetensors")
        assert ("lm_head.weight" in tensors) == stored
        back = load_gptq(tmp_path / checkpoint_format)
        assert back.lm_head.weight is back.transformer.wte.weight


def test_in_several_files(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "SHARD", 60_000)
    model = quantized()
    save_gptq(model, tmp_path / "out")
    files = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors*"))
    assert len(files) > 2
    back = load_gptq(tmp_path / "out")
    compare(run(back), run(model))
    (tmp_path / "out" / files[0]).unlink()
    with pytest.raises(FileNotFoundError):
        load_gptq(tmp_path / "out")


def test_into_a_model_that_is_there(tmp_path):
    model = quantized()
    save_gptq(model, tmp_path / "out")
    other = tiny_llama()
    for parameter in other.parameters():
        parameter.data = torch.zeros_like(parameter)
    assert load_gptq(tmp_path / "out", other) is other
    compare(run(other), run(model))
    with pytest.raises(ValueError, match=says("LlamaForCausalLM")):
        load_gptq(tmp_path / "out", other)


@pytest.mark.parametrize("make", [tiny_gpt2, partial(tiny_llama, intermediate_size=64)])
def test_into_another_model(make, tmp_path):
    save_gptq(quantized(), tmp_path / "out")
    other = make()
    before, expected = list(other.modules()), run(other)
    with pytest.raises(ValueError, match=r"model\.layers\.0\."):
        load_gptq(tmp_path / "out", other)
    assert list(other.modules()) == before
    assert torch.equal(run(other), expected)


def mixed():
    model = quantized()
    weight = torch.randn(64, 96, generator=generator())
    layer = QuantizedLinear(quantize_affine(weight, 4, 48))
    model.set_submodule("model.layers.1.mlp.down_proj", layer)
    return model


def partly():
    model = quantized()
    model.model.layers[1].mlp.down_proj = nn.Linear(96, 64, bias=False)
    return model


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (tiny_llama, ValueError, says("LlamaForCausalLM", "quantize_model")),
        (partly, ValueError, says(1, "model.layers.1.mlp.down_proj")),
        (mixed, ValueError, says("down_proj", "4 bits", 48, 32)),
        (partial(quantized, method="nf4"), ValueError, says("q_proj", "code book")),
        (partial(quantized, bits=5), ValueError, says("q_proj", "5 bits", "2, 3, 4")),
        (partial(quantized, group_size=None), ValueError, says('group_size="channel"')),
        (
            partial(quantized, partial(tiny_llama, intermediate_size=80), group_size=16),
            ValueError,
            says("gate_proj", "(80, 64)", 32),
        ),
        (lambda: nn.Sequential(nn.Linear(32, 32)), TypeError, says("transformers", "Sequential")),
    ],
)
def test_what_cannot_be_written(make, error, message, tmp_path):
    with pytest.raises(error, match=message):
        save_gptq(make(), tmp_path / "deep" / "out")
    assert not list(tmp_path.iterdir())


def test_a_layer_that_cannot_be_written_is_named(tmp_path):
    model = quantized()
    layer = QuantizedLinear(nasty(4, 32))
    model.set_submodule("model.layers.1.mlp.down_proj", layer)
    with pytest.raises(ValueError, match=says("layers.1.mlp.down_proj", "zero point 0")):
        save_gptq(model, tmp_path / "out")
    with pytest.raises(ValueError, match=says("gptq", "gptq_v2", "'gptq_v3'")):
        save_gptq(model, tmp_path / "out", checkpoint_format="gptq_v3")
    assert not list(tmp_path.iterdir())
    save_gptq(model, tmp_path / "out", checkpoint_format="gptq_v2")


@pytest.mark.parametrize("group_size", [32, "channel"])
@pytest.mark.parametrize("change", ["none", "zeros"])
def test_g_idx_is_optional_where_inputs_are_in_order(change, group_size, tmp_path):
    """Some programs leave it out, some make it and never fill it."""
    save_gptq(quantized(group_size=group_size), tmp_path / "out", checkpoint_format="gptq_v2")
    expected = run(load_gptq(tmp_path / "out"))
    file = tmp_path / "out" / "model.safetensors"
    tensors = load_file(file)
    for name in [name for name in tensors if name.endswith("g_idx")]:
        zeros = torch.zeros_like(tensors.pop(name))
        if change == "zeros":
            tensors[name] = zeros
    save_file(tensors, file, metadata={"format": "pt"})
    assert torch.equal(run(load_gptq(tmp_path / "out")), expected)


# --- the directory ----------------------------------------------------------------------------


def test_only_its_own_checkpoints_are_replaced(tmp_path):
    model = quantized()
    (tmp_path / "empty").mkdir()
    save_gptq(model, tmp_path / "empty")
    (tmp_path / "empty" / "old").write_text("goes")
    save_gptq(model, tmp_path / "empty", checkpoint_format="gptq_v2")
    names = {path.name for path in (tmp_path / "empty").iterdir()}
    assert names == {"config.json", "generation_config.json", "model.safetensors"}
    full = tmp_path / "full"
    full.mkdir()
    for name, text in (("thesis.txt", "text"), ("config.json", "{}"), ("config.json", "[1]")):
        (full / name).write_text(text)
        with pytest.raises(FileExistsError, match=says(full, "save_gptq")):
            save_gptq(model, full)
        assert (full / name).read_text() == text
    with pytest.raises(FileExistsError):
        save_gptq(model, full / "thesis.txt")
    assert {path.name for path in tmp_path.iterdir()} == {"empty", "full"}


def test_an_interrupted_write_leaves_what_was_there(tmp_path, monkeypatch):
    model = quantized()
    save_gptq(model, tmp_path / "out")
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}

    def interrupted(self, folder):
        raise KeyboardInterrupt

    monkeypatch.setattr("transformers.GenerationConfig.save_pretrained", interrupted)
    for name in ("out", "new"):
        with pytest.raises(KeyboardInterrupt):
            save_gptq(model, tmp_path / name, checkpoint_format="gptq_v2")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before


# --- damage -----------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path):
    model = quantized()
    save_gptq(model, tmp_path / "out")
    return model, tmp_path / "out"


def rewrite(folder, change):
    """The checkpoint with its tensors and its quantization_config changed."""
    tensors = load_file(folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    change(tensors, config["quantization_config"])
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))


def cut(part, *index):
    def change(tensors, own):
        tensors[f"{UP}.{part}"] = tensors[f"{UP}.{part}"][index].clone()

    return change


def cast(part, dtype):
    return lambda tensors, own: tensors.update({f"{UP}.{part}": tensors[f"{UP}.{part}"].to(dtype)})


def put(key, value, index=0):
    def change(tensors, own):
        tensors[key].view(-1)[index] = value

    return change


def missing(key):
    return lambda tensors, own: tensors.pop(key)


def own(**changes):
    return lambda tensors, settings: settings.update(changes)


DAMAGE = {
    "no qweight": (missing(f"{UP}.qweight"), says("up_proj.weight")),
    "no qzeros": (missing(f"{UP}.qzeros"), says("up_proj.qzeros")),
    "no scales": (missing(f"{UP}.scales"), says("up_proj.scales")),
    "no g_idx": (
        lambda *args: (own(desc_act=True)(*args), missing(f"{UP}.g_idx")(*args)),
        says("up_proj.g_idx", "desc_act"),
    ),
    "no norm": (missing("model.norm.weight"), says("model.norm.weight")),
    "rows": (cut("qweight", slice(0, 4)), says("up_proj.qweight", "[4, 96]", "[8, 96]")),
    "columns": (cut("qweight", slice(None), slice(0, 8)), says("up_proj.qweight", "[8, 8]")),
    "groups": (cut("qzeros", slice(0, 1)), says("up_proj.qzeros", "[1, 12]", "[2, 12]")),
    "scales": (cut("scales", slice(0, 1)), says("up_proj.scales", "[1, 96]")),
    "inputs": (cut("g_idx", slice(0, 8)), says("up_proj.g_idx", "[8]")),
    "one number": (cut("g_idx", 0), says("up_proj.g_idx", "[]")),
    "int64": (cast("qweight", torch.int64), says("up_proj.qweight", "int64", "int32")),
    "float zeros": (cast("qzeros", torch.float32), says("up_proj.qzeros", "float32")),
    "float64": (cast("scales", torch.float64), says("up_proj.scales", "float64")),
    "float g_idx": (cast("g_idx", torch.float16), says("up_proj.g_idx", "float16")),
    "NaN": (put(f"{UP}.scales", torch.nan), says("up_proj.scales", "NaN", "Inf")),
    "Inf": (put(f"{UP}.scales", -torch.inf, 7), says("up_proj.scales", "NaN", "Inf")),
    "order": (put(f"{UP}.g_idx", 1, 5), says("up_proj.g_idx", "static groups")),
    "zero": (put(f"{UP}.qzeros", 0x777777F7), says("up_proj.qzeros", 1, 0, 16)),
    "bits": (own(bits=8), says("qweight", "[12, 64]", "[24, 64]")),
    "5 bits": (own(bits=5), says("bits", 5, "2, 3, 4 or 8")),
    "bits in words": (own(bits="4"), says("bits", "'4'")),
    "groups of 16": (own(group_size=16), says("qzeros")),
    "groups of 40": (own(group_size=40), says("qweight", "(64, 96)", "4 bits", 40)),
    "groups of 0": (own(group_size=0), says("group_size", 0, "-1", "positive int")),
    "groups of True": (own(group_size=True), says("group_size", "True")),
    "groups of None": (own(group_size=None), says("group_size", "None")),
    "method": (own(quant_method="awq"), says("quant_method", "'awq'", "'gptq'")),
    "format": (own(checkpoint_format="marlin"), says("format", "'marlin'")),
    "Marlin": (own(is_marlin_format=True), says("format", "'gptq'", "Marlin")),
    "dynamic": (own(dynamic={"+:up_proj": {"bits": 8}}), says("'dynamic'")),
    "rotation": (own(rotation="hadamard"), says("'rotation'")),
    "vocabulary": (
        lambda tensors, own: tensors.update({"lm_head.weight": torch.zeros(99, 64)}),
        says("lm_head.weight", "[99, 64]", "[100, 64]"),
    ),
    "quantized head": (
        lambda tensors, own: tensors.update({"lm_head.qweight": torch.zeros(8, 100).int()}),
        says("lm_head", "linear layer"),
    ),
    "bias": (
        lambda tensors, own: tensors.update({f"{UP}.bias": torch.ones(96)}),
        says("up_proj.bias"),
    ),
    "foreign tensor": (
        lambda tensors, own: tensors.update({"model.lora": torch.ones(3)}),
        says("model.lora", "LlamaForCausalLM"),
    ),
    "foreign part": (
        lambda tensors, own: tensors.update({f"{UP}.weight": torch.ones(96, 64)}),
        says("up_proj.weight", "quantized"),
    ),
    "nothing quantized": (
        lambda tensors, own: [tensors.pop(key) for key in list(tensors) if "qweight" in key],
        says("no quantized layer"),
    ),
}


@pytest.mark.parametrize(("change", "message"), DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_checkpoint_is_refused_and_the_model_kept(change, message, saved):
    _, folder = saved
    rewrite(folder, change)
    with pytest.raises(ValueError, match=message):
        load_gptq(folder)
    other = tiny_llama()
    before, expected = list(other.modules()), run(other)
    with pytest.raises(ValueError, match=message):
        load_gptq(folder, other)
    assert list(other.modules()) == before
    assert torch.equal(run(other), expected)


def test_a_missing_or_wrong_bias(tmp_path):
    save_gptq(quantized(tiny_gpt2), tmp_path / "out")
    whole = load_file(tmp_path / "out" / "model.safetensors")
    for change, message in (
        (missing("transformer.h.0.mlp.c_fc.bias"), says("c_fc.bias")),
        (
            lambda tensors, own: tensors.update({"transformer.h.0.mlp.c_fc.bias": torch.ones(3)}),
            says("c_fc.bias", "[3]", "[256]"),
        ),
        (put("lm_head.weight", 5), says("lm_head.weight")),
    ):
        rewrite(tmp_path / "out", change)
        with pytest.raises(ValueError, match=message):
            load_gptq(tmp_path / "out", tiny_gpt2())
        save_file(whole, tmp_path / "out" / "model.safetensors", {"format": "pt"})
    load_gptq(tmp_path / "out")


def test_a_head_of_its_own_is_not_lost_to_a_config_that_ties_it(tmp_path):
    save_gptq(quantized(tiny_gpt2), tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"]
    rewrite(tmp_path / "out", put("lm_head.weight", 5))
    model = load_gptq(tmp_path / "out")
    head, embeddings = model.get_output_embeddings().weight, model.get_input_embeddings().weight
    assert head.view(-1)[0] == 5
    assert torch.equal(head.view(-1)[1:], embeddings.view(-1)[1:])


def test_truncated_files_and_other_folders(saved, tmp_path):
    _, folder = saved
    for name, message in (
        ("model.safetensors", says("model.safetensors")),
        ("config.json", says("config.json")),
    ):
        raw = (folder / name).read_bytes()
        for length in (0, 5, len(raw) // 2, len(raw) - 5):
            (folder / name).write_bytes(raw[:length])
            with pytest.raises(ValueError, match=message):
                load_gptq(folder)
        (folder / name).write_bytes(raw)
    with pytest.raises(FileNotFoundError):
        load_gptq(tmp_path / "nowhere")
    tiny_llama().save_pretrained(tmp_path / "plain")
    with pytest.raises(ValueError, match=says("quantization_config")):
        load_gptq(tmp_path / "plain")


def test_pickles_are_not_read(saved):
    _, folder = saved
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match=says("pytorch_model.bin")):
        load_gptq(folder)
    (folder / "pytorch_model.bin").unlink()
    with pytest.raises(ValueError, match=says(folder, ".safetensors", "none")):
        load_gptq(folder)


def test_an_index_that_is_damaged(saved):
    _, folder = saved
    index = folder / "model.safetensors.index.json"
    for content, error, message in (
        ({"weight_map": ["model.safetensors"]}, ValueError, says("weight_map")),
        ({"weight_map": {"a": 3}}, ValueError, says("weight_map")),
        ({}, ValueError, says("weight_map")),
        (
            {"weight_map": {"a": "model.safetensors"}},
            ValueError,
            says("a", "model.safetensors.index.json"),
        ),
        ({"weight_map": {"a": "../../etc/passwd"}}, FileNotFoundError, "passwd"),
    ):
        index.write_text(json.dumps(content))
        with pytest.raises(error, match=message):
            load_gptq(folder)


def test_foreign_code_is_not_run(saved):
    _, folder = saved
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "new", "auto_map": {"AutoConfig": "code.Config"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "code.py").write_text("raise SystemExit('foreign code')\n")
    with pytest.raises(ValueError, match="trust_remote_code"):
        load_gptq(folder)


# --- what other programs write ----------------------------------------------------------------


def test_as_autogptq_writes(saved):
    """A file for the settings, zeros for biases, float32 scales, buffers of old programs."""
    model, folder = saved

    def change(tensors, own):
        for name in layers(model):
            tensors[f"{name}.bias"] = torch.zeros(model.get_submodule(name).out_features)
            tensors[f"{name}.scales"] = tensors[f"{name}.scales"].float()
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
        del own["checkpoint_format"], own["meta"]

    rewrite(folder, change)
    (folder / "model.safetensors").rename(folder / "gptq_model-4bit-32g.safetensors")
    config = json.loads((folder / "config.json").read_text())
    own = config.pop("quantization_config")
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "quantize_config.json").write_text(json.dumps(own))
    back = load_gptq(folder)
    compare(run(back), run(model))
    assert all(layer.bias is None for layer in layers(back).values())


def test_bfloat16_scales(saved):
    model, folder = saved

    def change(tensors, own):
        for key in [key for key in tensors if key.endswith(".scales")]:
            tensors[key] = tensors[key].bfloat16()

    rewrite(folder, change)
    layer = load_gptq(folder).get_submodule(UP).quantized
    assert torch.equal(layer.scale, model.get_submodule(UP).quantized.scale.bfloat16().float())


@pytest.mark.parametrize("bits", BITS)
def test_gptqmodel_borrows_for_a_zero_point_of_0(bits):
    """It writes "gptq" by subtracting one from each code of a word at once (3 bits: code by code)
    and reads it by adding again, which is exact for every zero point."""
    weight = nasty(bits, 32)
    tensors = to_gptq(weight, "gptq_v2")
    if bits == 3:
        zero = from_words(tensors["qzeros"], bits) - 1 & 7
        tensors["qzeros"] = to_words(zero, bits)
    else:
        tensors["qzeros"] -= sum(1 << shift for shift in range(0, 32, bits))
    own = settings(bits, 32, "gptq") | {"meta": {"quantizer": ["gptqmodel:7.4.0"]}}
    assert torch.equal(from_gptq(tensors, weight.shape, own).zero_point, weight.zero_point)
    for maker in (["optimum:2.3.0"], None, "chapter13:0.1.0"):
        with pytest.raises(ValueError, match=says("zero points")):
            from_gptq(tensors, weight.shape, own | {"meta": {"quantizer": maker}})


# --- the peers --------------------------------------------------------------------------------


def slow(test):
    """Importing a peer and its compiling take minutes on a busy machine."""
    return pytest.mark.slow(pytest.mark.timeout(1200)(test))


def ask(peer, jobs):
    """The peer's answers; without its environment a loud skip, or a failure where CI wants it."""
    try:
        return peers.run_many(peer, jobs)["result"]
    except peers.NoPeer as missing:
        if os.environ.get("CHAPTER13_REQUIRE_PEERS") == "1":
            raise
        pytest.skip(f"NOT COMPARED WITH {peer.upper()}: {missing}")


@pytest.fixture(scope="module")
def base(tmp_path_factory, tokenizer):
    """A folder with the model that peers quantize, tokens to learn from and tokens to compute."""
    folder = tmp_path_factory.mktemp("peers")
    model = tiny_llama().half().float()
    with torch.no_grad():
        rows = model.get_submodule(UP).weight
        rows[::3] = rows[::3].abs()  # zero point 0
        model.model.layers[1].self_attn.q_proj.weight[5] = 0
    model.config.rope_parameters = {"rope_type": "default", "rope_theta": 500.0}
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    save_file({"tokens": TOKENS}, folder / "tokens")
    text = torch.randint(100, (32, 32), generator=generator())
    save_file({"tokens": text}, folder / "text")
    return folder


def compare_rounded(model, theirs, bits):
    """GPTQModel dequantizes to float16; with 4 bits its kernel for a CPU computes in bfloat16.

    No further off than the same model of ours that rounds all it computes to that data type.
    """
    ours = run(model)
    rounded = copy.deepcopy(model).to(torch.bfloat16 if bits == 4 else torch.float16)
    limit = (run(rounded).float() - ours).abs().max()
    assert 0 < limit < 0.02 * ours.abs().max()
    assert (theirs - ours).abs().max() <= limit


OURS_IN_AUTOGPTQ = [
    *[(tiny_llama, method, bits, 32) for method in ("absmax", "affine") for bits in BITS],
    (tiny_llama, "affine", 4, "channel"),
    (tiny_gpt2, "affine", 3, 32),
    (tiny_gpt2, "absmax", 4, 32),
]


@slow
def test_autogptq_computes_our_logits(base, tmp_path, monkeypatch):
    jobs, expected = [], []
    monkeypatch.setattr(checkpoint, "SHARD", 200_000)  # the larger ones in several files
    for number, (make, method, bits, group_size) in enumerate(OURS_IN_AUTOGPTQ):
        model = quantized(make, method, bits, group_size)
        save_gptq(model, tmp_path / f"{number}")
        # as read from config.json by their transformers: another base would show
        jobs.append(["logits", tmp_path / f"{number}", base / "tokens", tmp_path / f"{number}.out"])
        expected.append(run(model))
    ask("autogptq", jobs)
    for job, ours in zip(jobs, expected, strict=True):
        compare(ours, load_file(job[3])["logits"])


@slow
def test_autogptq_stops_at_the_second_format(base, tmp_path):
    save_gptq(quantized(), tmp_path / "v2", checkpoint_format="gptq_v2")
    with pytest.raises(RuntimeError, match=r"FileNotFoundError.*quantize_config\.json"):
        ask("autogptq", [["logits", tmp_path / "v2", base / "tokens", tmp_path / "logits"]])


@slow
def test_our_logits_of_autogptqs_checkpoints(base, tmp_path):
    options = {
        "symmetric": ["--bits", 4, "--symmetric"],
        "three": ["--bits", 3, "--symmetric"],
        "channel": ["--bits", 4, "--symmetric", "--group-size", -1],
        "static": ["--bits", 4, "--symmetric", "--act-order", "--static-groups"],
        "asymmetric": ["--bits", 4],
        "act-order": ["--bits", 4, "--symmetric", "--act-order"],
    }
    jobs = [
        ["quantize", base / "model", base / "text", tmp_path / name, "--group-size", 32, *more]
        for name, more in options.items()
    ]
    jobs += [
        ["logits", tmp_path / name, base / "tokens", tmp_path / f"{name}.out"]
        for name in list(options)[:4]
    ]
    ask("autogptq", jobs)
    for name in list(options)[:4]:
        compare(run(load_gptq(tmp_path / name)), load_file(tmp_path / f"{name}.out")["logits"])
    # rows without a negative weight: its own -1 spills over the zero points beside it
    with pytest.raises(ValueError, match=says("up_proj.qzeros", "zero points")):
        load_gptq(tmp_path / "asymmetric")
    with pytest.raises(ValueError, match=says("g_idx", "groups")):
        load_gptq(tmp_path / "act-order")


@slow
def test_gptqmodel_computes_our_logits(base, tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(checkpoint, "SHARD", 200_000)  # the larger ones in several files
    kinds = [
        (tiny_llama, "affine", 2, 32, "gptq_v2"),
        (tiny_llama, "affine", 3, 32, "gptq_v2"),
        (tiny_llama, "absmax", 8, "channel", "gptq"),
        (tiny_gpt2, "affine", 8, 32, "gptq_v2"),
        (tiny_llama, "affine", 4, 32, "gptq_v2"),
    ]
    jobs, models = [], []
    for number, (*kind, checkpoint_format) in enumerate(kinds):
        model = quantized(*kind)
        save_gptq(model, tmp_path / f"{number}", tokenizer, checkpoint_format)
        jobs.append(["logits", tmp_path / f"{number}", base / "tokens", tmp_path / f"{number}.out"])
        models.append(model)
    ask("gptqmodel", jobs)
    for job, (*_, bits, _, _), model in zip(jobs, kinds, models, strict=True):
        compare_rounded(model, load_file(job[3])["logits"], bits)


@slow
def test_gptqmodel_takes_asymmetric_version_1_from_itself_alone(base, tmp_path, tokenizer):
    save_gptq(quantized(), tmp_path / "v1", tokenizer)
    with pytest.raises(RuntimeError, match="sym=False model with format=.* is only supported"):
        ask("gptqmodel", [["logits", tmp_path / "v1", base / "tokens", tmp_path / "logits"]])


@slow
def test_transformers_computes_our_logits(base, tmp_path, tokenizer):
    """Through GPTQModel's environment, which holds optimum for it; asymmetric in version 1."""
    model = quantized(bits=3)
    save_gptq(model, tmp_path / "v1", tokenizer)
    job = ["logits", tmp_path / "v1", base / "tokens", tmp_path / "logits"]
    ask("gptqmodel", [[*job, "--through-transformers"]])
    compare_rounded(model, load_file(tmp_path / "logits")["logits"], 3)


@slow
def test_our_logits_of_gptqmodels_checkpoints(base, tmp_path):
    options = {"borrows": ["--bits", 2], "defaults": ["--bits", 4, "--defaults"]}
    common = [base / "model", base / "text"]
    jobs = [
        ["quantize", *common, tmp_path / name, "--group-size", 32, *more]
        for name, more in options.items()
    ]
    jobs += [
        ["logits", tmp_path / name, base / "tokens", tmp_path / f"{name}.out"] for name in options
    ]
    ask("gptqmodel", jobs)
    for name, bits in (("borrows", 2), ("defaults", 4)):
        model = load_gptq(tmp_path / name)
        compare_rounded(model, load_file(tmp_path / f"{name}.out")["logits"], bits)
    model = load_gptq(tmp_path / "borrows")
    assert (model.get_submodule(UP).quantized.zero_point == 0).any()
