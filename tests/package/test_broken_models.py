"""Models that cannot be loaded as they are: each error names the file and what to do, in a line."""

import json
import logging
import re
import shutil

import pytest
import torch
import transformers
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tiny import says
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

from chapter13 import model_files, models

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 123456\n"
SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}


def tiny(folder, config=None, **saving):
    torch.manual_seed(13)
    config = config or transformers.LlamaConfig(**SIZES)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    model.save_pretrained(folder, **saving)
    words = Tokenizer(WordLevel({f"w{i}": i for i in range(20)}, unk_token="w0"))
    words.pre_tokenizer = Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(folder)
    return model


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with a model in one file, and one with the same model in several."""
    one, several = tmp_path_factory.mktemp("one"), tmp_path_factory.mktemp("several")
    tiny(one)
    tiny(several, max_shard_size="20KB")
    assert len(list(several.glob("*.safetensors"))) > 2
    return one, several


@pytest.fixture
def one(made, tmp_path):
    return shutil.copytree(made[0], tmp_path / "one")


@pytest.fixture
def several(made, tmp_path):
    return shutil.copytree(made[1], tmp_path / "several")


def refused(folder, error, words, calls=(models.load, models.skeleton)):
    """Checks that the calls raise such an error, in one line of fewer than 300 characters."""
    for call in calls:
        with pytest.raises(error, match=words) as caught:
            call(folder)
        said = str(caught.value)
        assert str(folder) in said
        assert "\n" not in said
        assert len(said) - len(str(folder)) < 250


def edit_config(folder, **values):
    """Changes the values in config.json; None takes one out."""
    config = json.loads((folder / "config.json").read_text()) | values
    config = {name: value for name, value in config.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(config))


def edit_tensors(folder, edit):
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


# --- tensors --------------------------------------------------------------------------------------


@pytest.mark.parametrize("mapped", [False, True])
def test_missing_tensors_are_refused(one, mapped):
    def edit(tensors):
        for name in [name for name in tensors if name.startswith("model.layers.1.mlp")]:
            del tensors[name]

    edit_tensors(one, edit)
    words = says(3, "model.layers.1.mlp.down_proj.weight")
    refused(one, ValueError, words, [lambda folder: models.load(folder, mapped=mapped)])


@pytest.mark.parametrize("mapped", [False, True])
def test_tensors_of_another_shape_are_refused(one, mapped):
    edit_config(one, intermediate_size=48)
    words = says("layers.0.mlp.down_proj.weight", "(32, 64)", "(32, 48)", 6)
    refused(one, ValueError, words, [lambda folder: models.load(folder, mapped=mapped)])


def test_tensors_missing_from_one_of_several_files_are_refused(several):
    index = several / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    gone = content["weight_map"].pop("model.norm.weight")
    tensors = load_file(several / gone)
    del tensors["model.norm.weight"]
    save_file(tensors, several / gone, metadata={"format": "pt"})
    index.write_text(json.dumps(content))
    refused(several, ValueError, says(1, "model.norm.weight"), [models.load])


def test_quantized_weights_are_not_loaded_as_others(one):
    name = "model.layers.0.mlp.up_proj"

    def edit(tensors):
        del tensors[f"{name}.weight"]
        tensors[f"{name}.qweight"] = torch.zeros(4, 64, dtype=torch.int32)

    edit_tensors(one, edit)
    refused(one, ValueError, says("quantized", f"{name}.qweight", "open_model"), [models.load])
    edit_config(one, quantization_config={"quant_method": "gptq", "bits": 4})
    refused(one, ValueError, says("quantized", "quantization_config"), [models.load])
    assert models.skeleton(one)


@pytest.mark.parametrize(
    ("dtype", "scale"),
    [(torch.int8, None), (torch.uint8, ".absmax"), (torch.float8_e4m3fn, "_scale_inv")],
)
def test_weights_are_not_loaded_without_their_scales(one, dtype, scale):
    """transformers would cast the codes to floats and ignore the scales."""
    name = "model.layers.0.mlp.up_proj.weight"

    def edit(tensors):
        tensors[name] = tensors[name].to(dtype)
        if scale:
            tensors[name + scale] = torch.ones(1)

    edit_tensors(one, edit)
    refused(one, ValueError, rf"(?=.*{re.escape(name)}).*quantized", [models.load])
    assert models.skeleton(one)


def test_scales_beside_float_weights_are_refused(one):
    name = "model.layers.0.mlp.up_proj.weight_scale"
    edit_tensors(one, lambda tensors: tensors.update({name: torch.ones(1)}))
    refused(one, ValueError, says("quantized", name, "F32"), [models.load])


def mixture(folder):
    config = transformers.MixtralConfig(**SIZES, num_key_value_heads=2, num_local_experts=4)
    return tiny(folder, config)


def test_experts_that_are_merged_on_loading_are_not_missing(tmp_path):
    expected = mixture(tmp_path).state_dict()
    assert len(load_file(tmp_path / "model.safetensors")) > len(expected)
    model, _ = models.load(tmp_path, device="cpu")
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, expected[name]), name


@pytest.mark.parametrize(
    ("gone", "words"),
    [
        ("experts.2.w3", says("lacks", "transformers")),
        ("experts.2.w2", says("experts.down_proj", "(3, 32, 64)")),
        ("experts.2.", says("experts.down_proj", "(3, 32, 64)")),
    ],
)
def test_an_expert_that_lacks_tensors_is_refused(tmp_path, gone, words):
    mixture(tmp_path)

    def edit(tensors):
        for name in [name for name in tensors if f"layers.1.block_sparse_moe.{gone}" in name]:
            del tensors[name]

    edit_tensors(tmp_path, edit)
    refused(tmp_path, ValueError, words, [models.load])


@pytest.mark.parametrize("prefix", ["model.", ""])
def test_a_bias_that_the_configuration_leaves_out_is_refused(one, prefix):
    name = f"{prefix}layers.0.self_attn.q_proj.bias"

    def edit(tensors):
        for old in list(tensors):
            tensors[old.replace("model.", prefix)] = tensors.pop(old)
        tensors[name] = torch.ones(32)

    edit_tensors(one, edit)
    words = says("q_proj.bias", "config.json")
    refused(one, ValueError, words, [models.load])


def test_tensors_that_are_not_used_are_told_of(one):
    edit_config(one, num_hidden_layers=1)
    words = r"(?=.*\b9 tensors)(?=.*LlamaForCausalLM).*model\.layers\.1\."
    with pytest.warns(UserWarning, match=words):
        models.load(one)


def test_what_a_model_computes_itself_is_not_told_of(one, tmp_path):
    """Buffers that older programs stored: a warning would be an error here."""
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    edit_tensors(one, lambda tensors: tensors.update({name: torch.ones(8)}))
    models.load(one)
    tiny(tmp_path / "gpt2", transformers.GPT2Config(vocab_size=64, n_embd=32, n_layer=1, n_head=2))
    mask = {"transformer.h.0.attn.bias": torch.ones(1, 1, 8, 8)}
    edit_tensors(tmp_path / "gpt2", lambda tensors: tensors.update(mask))
    models.load(tmp_path / "gpt2")


def test_a_head_that_is_missing(one):
    edit_tensors(one, lambda tensors: tensors.pop("lm_head.weight"))
    words = 'lacks 1 .*first lm_head.weight.*"tie_word_embeddings": true'
    refused(one, ValueError, words, [models.load])
    edit_config(one, tie_word_embeddings=True)
    model, _ = models.load(one, device="cpu")
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_transformers_prints_no_table(one, caplog):
    edit_tensors(one, lambda tensors: tensors.pop("model.norm.weight"))
    refused(one, ValueError, "lacks 1 ", [models.load])
    assert not [record for record in caplog.records if "REPORT" in record.getMessage()]
    assert logging.getLogger("transformers.modeling_utils").level == logging.NOTSET


def test_tied_weights_are_not_missing(tmp_path):
    tiny(tmp_path, transformers.LlamaConfig(**SIZES, tie_word_embeddings=True))
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    for model in models.load(tmp_path)[0], models.skeleton(tmp_path):
        assert model.config.tie_word_embeddings
        assert model.lm_head.weight is model.model.embed_tokens.weight


# --- a head of its own ----------------------------------------------------------------------------


@pytest.mark.parametrize("mapped", [False, True])
@pytest.mark.parametrize("files", ["one", "several"])
def test_a_head_that_differs_from_the_embeddings_is_kept(request, tmp_path, files, mapped):
    """Even where config.json says that they are tied; and it says so no longer when saved."""
    folder = request.getfixturevalue(files)
    expected, _ = models.load(folder, device="cpu")
    edit_config(folder, tie_word_embeddings=True)
    model, _ = models.load(folder, device="cpu", mapped=mapped)
    assert torch.equal(model.lm_head.weight, expected.lm_head.weight)
    assert not model.config.tie_word_embeddings
    model.tie_weights()
    assert torch.equal(model.lm_head.weight, expected.lm_head.weight)
    hollow = models.skeleton(folder)
    assert hollow.lm_head.weight is not hollow.model.embed_tokens.weight
    assert not hollow.config.tie_word_embeddings
    model.save_pretrained(tmp_path / "again")
    assert "lm_head.weight" in load_file(tmp_path / "again" / "model.safetensors")


@pytest.mark.parametrize("same", [False, True])
@pytest.mark.parametrize("prefix", ["transformer.", ""])
def test_where_the_class_ties_by_default_the_weights_decide(tmp_path, prefix, same):
    """GPT-2, whose files name the embeddings with or without a prefix."""
    config = transformers.GPT2Config(vocab_size=64, n_embd=32, n_layer=1, n_head=2)
    tiny(tmp_path, config)
    edit_config(tmp_path, tie_word_embeddings=None)
    head = torch.randn(64, 32, generator=torch.Generator().manual_seed(13))

    def edit(tensors):
        for name in list(tensors):
            tensors[prefix + name.removeprefix("transformer.")] = tensors.pop(name)
        tensors["lm_head.weight"] = tensors[f"{prefix}wte.weight"].clone() if same else head

    edit_tensors(tmp_path, edit)
    model, hollow = models.load(tmp_path, device="cpu")[0], models.skeleton(tmp_path)
    assert same or torch.equal(model.lm_head.weight, head)
    for each in model, hollow:
        assert each.config.tie_word_embeddings == same
        assert (each.lm_head.weight is each.transformer.wte.weight) == same


# --- files ----------------------------------------------------------------------------------------

CHECKS = (model_files.check_files, models.load, models.skeleton)


def test_whole_files_pass(one, several, tmp_path):
    for folder in one, several, tmp_path:
        assert model_files.check_files(folder) is None
    (one / "consolidated.safetensors").write_bytes(POINTER)  # load does not read it
    model_files.check_files(str(one))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda data: POINTER, "is a Git LFS pointer.*git lfs pull"),
        (lambda data: data[: len(data) // 2], "truncated or corrupt.*fetch it again"),
        (lambda data: data[:-1], "truncated or corrupt.*fetch it again"),
        (lambda data: b"", "truncated or corrupt.*fetch it again"),
        (lambda data: b"\xff" * 4000, "truncated or corrupt.*fetch it again"),
        (lambda data: b"<!DOCTYPE html><html>not found</html>", "truncated or corrupt.*fetch it"),
    ],
)
@pytest.mark.parametrize("files", ["one", "several"])
def test_damaged_files_are_named(request, files, damage, words):
    folder = request.getfixturevalue(files)
    file = sorted(folder.glob("*.safetensors"))[-1]
    file.write_bytes(damage(file.read_bytes()))
    refused(folder, ValueError, f"{re.escape(str(file))} is .*{words.removeprefix('is ')}", CHECKS)


def test_a_file_that_the_index_names_and_that_is_missing(several):
    names = sorted(file.name for file in several.glob("*.safetensors"))
    (several / names[1]).unlink()
    words = rf"lacks {names[1]}, .*1 of {len(names)} files .*fetch it again"
    refused(several, FileNotFoundError, words, CHECKS)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (POINTER, "Git LFS"),
        (b"{", "not an index"),
        (b"[]", "not an index"),
        (b"{}", "not an index"),
    ],
)
def test_a_damaged_index(several, content, words):
    (several / "model.safetensors.index.json").write_bytes(content)
    refused(several, ValueError, words, CHECKS)


# --- config.json ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"{nope", "config.json is not JSON"),
        (b"\xff\xfe", "config.json is not JSON"),
        (b"[1]", "config.json has no model_type"),
        (b"{}", "config.json has no model_type"),
        (POINTER, "Git LFS pointer"),
    ],
)
def test_a_config_that_says_nothing(one, content, words):
    (one / "config.json").write_bytes(content)
    refused(one, ValueError, words)


def test_no_config(one):
    (one / "config.json").unlink()
    refused(one, FileNotFoundError, "no config.json")


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"model_type": "nobody_s"}, "does not know the model_type 'nobody_s'"),
        (
            {"model_type": "nobody_s", "auto_map": {"AutoConfig": "own.Config"}},
            "code of its own .*config.json.*trust_remote_code",
        ),
        ({"hidden_size": "many"}, "config.json is refused"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "is a LlamaForSequence.*'llama'"),
    ],
)
def test_configurations_that_are_refused(one, values, words):
    edit_config(one, **values)
    refused(one, ValueError, words)


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("t5", "an encoder-decoder .*'t5'.*decoder-only"),
        ("bart", "an encoder-decoder .*'bart'"),
        ("whisper", "an encoder-decoder .*'whisper'"),
        ("llava", "a vision-language model .*'llava'"),
        ("gemma3", "a vision-language model .*'gemma3'"),
        ("clip", "a vision-language model .*'clip'"),
        ("vit", "another architecture .*'vit'"),
        ("bert", "an encoder .*'bert'"),
    ],
)
def test_models_that_are_not_decoders_alone(tmp_path, kind, words):
    transformers.AutoConfig.for_model(kind).save_pretrained(tmp_path)
    refused(tmp_path, ValueError, words)


# --- tokenizers -----------------------------------------------------------------------------------

PIECES = b"\n\x0e\n\x05<unk>\x15\x00\x00\x00\x00\x18\x02" * 3  # as SentencePiece writes them
RANKS = b"IQ== 0\nIg== 1\n"  # as tiktoken does


def without_tokenizer(folder):
    for file in folder.glob("tokenizer*"):
        file.unlink()


def test_no_tokenizer(one):
    without_tokenizer(one)
    refused(one, FileNotFoundError, "has no tokenizer: it needs tokenizer.json, ", [models.load])


@pytest.mark.parametrize(
    ("kind", "data", "packages"),
    [
        ("LlamaTokenizer", PIECES, "sentencepiece protobuf"),
        (None, PIECES, "sentencepiece protobuf"),
        ("PreTrainedTokenizerFast", RANKS, "tiktoken"),
    ],
)
def test_a_tokenizer_that_needs_a_package(one, monkeypatch, kind, data, packages):
    real = model_files.find_spec
    hidden = ("sentencepiece", "tiktoken", "google.protobuf")
    monkeypatch.setattr(
        model_files, "find_spec", lambda name: None if name in hidden else real(name)
    )
    if any(map(real, ("sentencepiece", "tiktoken"))):
        pytest.skip("the packages are installed, so transformers takes the tokenizer")
    without_tokenizer(one)
    (one / "tokenizer.model").write_bytes(data)
    if kind:
        (one / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": kind}))
    refused(one, ImportError, f"pip install {packages}$", [models.load])


def test_a_tokenizer_with_code_of_its_own(one):
    own = {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", None]}}
    (one / "tokenizer_config.json").write_text(json.dumps(own))
    words = "code of its own .*tokenizer_config.json.*trust_remote_code"
    refused(one, ValueError, words, [models.load])


@pytest.mark.parametrize("content", ["{", "{}", '{"model": 1}'])
def test_a_damaged_tokenizer(one, content):
    (one / "tokenizer.json").write_text(content)
    refused(one, ValueError, "the tokenizer of .* is refused", [models.load])


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "tokenizer.model"])
def test_a_pointer_in_the_place_of_a_tokenizer_file(one, name):
    (one / name).write_bytes(POINTER)
    refused(
        one, ValueError, rf"{re.escape(name)} is a Git LFS pointer.*git lfs pull", [models.load]
    )


# --- names ----------------------------------------------------------------------------------------


def test_a_file_is_not_a_folder(one):
    refused(one / "model.safetensors", ValueError, "is a file: name the folder")


def test_a_folder_that_does_not_exist(tmp_path):
    refused(tmp_path / "typed" / "wrong", ValueError, says("folder", "id"))


@pytest.mark.parametrize("call", [models.load, models.skeleton])
def test_what_the_hub_says_is_one_line(monkeypatch, call):
    def from_pretrained(name, **_):
        raise OSError("nobody/x is no model.\n" + "If it is private, log in. " * 30)

    monkeypatch.setattr(models, "_hub_answers", lambda name: True)
    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", from_pretrained)
    with pytest.raises(OSError, match=r"^nobody/x is no model\. If it is [^\n]+\.\.\.$") as caught:
        call("nobody/x")
    assert len(str(caught.value)) <= 300


def test_a_damaged_file_in_the_hub_s_cache(one, monkeypatch):
    def from_pretrained(name, **_):
        raise SafetensorError("header too small")

    config = transformers.AutoConfig.from_pretrained(one)
    monkeypatch.setattr(models, "_hub_answers", lambda name: True)
    monkeypatch.setattr(models, "load_config", lambda source, safe: config)
    monkeypatch.setattr(models, "load_tokenizer", lambda source, safe: None)
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", from_pretrained)
    with pytest.raises(ValueError, match=says("some/one", "cache", "header too small")):
        models.load("some/one")


@pytest.mark.slow
def test_loading_a_sound_model_says_nothing(capfd, caplog):
    models.load(device="cpu")
    models.load(device="cpu", mapped=True)
    said = capfd.readouterr()
    assert (said.out, said.err, caplog.text) == ("", "", "")
