"""What a folder holds, opening it, and folders that appear whole: also in odd places."""

import json
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch
from tiny import TOKENS, says, sharded, tiny_gpt2, tiny_llama

from chapter13 import checkpoint, folders, models, quantize_model

needs_links = pytest.mark.skipif(sys.platform == "win32", reason="links need a privilege there")


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch):
    monkeypatch.setenv("CHAPTER13_DEVICE", "cpu")


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plain")
    sharded(folder, tiny_llama, torch.bfloat16)
    return folder


@pytest.fixture(scope="module")
def gptq(plain, tmp_path_factory):
    folder = tmp_path_factory.mktemp("gptq") / "out"
    model, tokenizer = models.load(str(plain), "cpu")
    checkpoint.save_gptq(
        quantize_model(model, "absmax", group_size=32, progress=False), folder, tokenizer
    )
    return folder


def change(folder, **settings):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings), encoding="utf-8")


def logits(model):
    with torch.inference_mode():
        return model(TOKENS).logits


@pytest.mark.parametrize("method", ["absmax", "nf4"])
@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
def test_save_own_and_open_model(make, method, tmp_path):
    sharded(tmp_path / "model", make, torch.bfloat16)
    model, tokenizer = models.load(str(tmp_path / "model"), "cpu", mapped=True)
    quantize_model(model, method, group_size=32, progress=False)
    folders.save_own(model, tokenizer, tmp_path / "new" / "out")
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["out"]
    assert folders.kind(tmp_path / "new" / "out") == "own"
    back, words = folders.open_model(tmp_path / "new" / "out")
    assert torch.equal(logits(back), logits(model))
    assert not back.training
    assert words("w3 w1").input_ids == [3, 1]


def test_save_own_takes_an_empty_folder_and_no_other(plain, tmp_path, monkeypatch):
    model, tokenizer = models.load(str(plain), "cpu")
    with pytest.raises(ValueError, match=says("LlamaForCausalLM", "quantize_model")):
        folders.save_own(model, tokenizer, tmp_path / "out")
    assert not list(tmp_path.iterdir())
    quantize_model(model, "fp4", progress=False, group_size=32)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    folders.save_own(model, tokenizer, ".")
    there = sorted(os.listdir("."))
    assert {"config.json", folders.OWN} < {*there}
    assert not [name for name in there if name.startswith(".")]
    with pytest.raises(FileExistsError, match=says("not empty")):
        folders.save_own(model, tokenizer, ".")
    assert sorted(os.listdir(".")) == there


def test_open_model_takes_plain_folders(plain):
    assert folders.kind(plain) == "plain"
    assert folders.kind(models.EMBEDDED) == "plain"
    model, _ = folders.open_model(plain, "cpu")
    assert torch.equal(logits(model), logits(models.load(str(plain), "cpu")[0]))
    with pytest.raises(ValueError, match=says("cpu", "cuda", "'gpu'")):
        folders.open_model(plain, "gpu")


def test_settings_in_either_file(gptq, tmp_path):
    """The first AutoGPTQ wrote quantize_config.json alone."""
    old = shutil.copytree(gptq, tmp_path / "old")
    change(old, quantization_config=None)
    assert (old / "quantize_config.json").is_file()
    new = shutil.copytree(gptq, tmp_path / "new")
    (new / "quantize_config.json").unlink()
    assert folders.kind(old) == folders.kind(new) == "gptq"
    expected = logits(folders.open_model(gptq)[0])
    for folder in old, new:
        assert torch.equal(logits(folders.open_model(folder)[0]), expected)


OTHERS = [
    ({"quantization_config": {"quant_method": "bitsandbytes"}}, "bitsandbytes"),
    ({"quantization_config": {"load_in_8bit": True}}, "bitsandbytes"),
    ({"quantization_config": {"quant_method": "awq", "bits": 4}}, "awq"),
    ({"quantization_config": {"quant_method": "fp8"}}, "fp8"),
    ({"quantization_config": {"quant_method": "compressed-tensors"}}, "compressed-tensors"),
    ({"compression_config": {"quant_method": "compressed-tensors"}}, "compressed-tensors"),
    ({"text_config": {"quantization_config": {"quant_method": "mxfp4"}}}, "mxfp4"),
    ({"quantization": {"bits": 4}, "quantization_config": {"bits": 4}}, "MLX"),
    ({"quantization_config": "yes"}, "an unknown program"),
]


@pytest.mark.parametrize(("settings", "program"), OTHERS, ids=[str(each) for each, _ in OTHERS])
def test_other_programs_are_named(plain, settings, program, tmp_path):
    folder = shutil.copytree(plain, tmp_path / "model")
    change(folder, **settings)
    for function in folders.kind, folders.open_model:
        with pytest.raises(ValueError, match=says("quantized", program)):
            function(folder)


def test_settings_of_others_in_files_of_their_own(plain, tmp_path):
    for file, program in ("quant_config.json", "awq"), ("hf_quant_config.json", "modelopt"):
        folder = shutil.copytree(plain, tmp_path / program)
        (folder / file).write_text("{}")
        with pytest.raises(ValueError, match=says("quantized", program)):
            folders.kind(folder)


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({}, says("config.json")),
        ({"adapter_config.json": '{"base_model_name_or_path": "a/b"}'},
         says("config.json", "LoRA", "a/b")),
        ({"config.json": "{}", "adapter_config.json": "{}", "adapter_model.safetensors": ""},
         says("weights", "LoRA")),
        ({"model.gguf": ""}, says("config.json", "GGUF")),
        ({"config.json": "{}", "model.gguf": ""}, says("GGUF", "safetensors")),
        ({"config.json": "{}", "pytorch_model.bin": ""}, says("bin", "safetensors")),
        ({"config.json": "{}"}, says("weights", "safetensors")),
        ({"config.json": "{"}, says("config.json", "read")),
        ({"config.json": "[]"}, says("config.json", "JSON object")),
        ({".unfinished/run": ""}, says("`quantize`", "same command")),
    ],
    ids=lambda value: None if isinstance(value, str) else " ".join(value) or "empty",
)  # fmt: skip
def test_folders_that_hold_no_model(files, words, tmp_path):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text, encoding="utf-8")
    for function in folders.kind, folders.open_model:
        with pytest.raises((ValueError, FileNotFoundError), match=words):
            function(tmp_path)


def test_paths_that_are_no_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(models, "_hub_answers", lambda name: pytest.fail("the hub was asked"))
    (tmp_path / "model.gguf").touch()
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(ValueError, match=says("model.gguf", "file", "GGUF")):
        folders.kind(tmp_path / "model.gguf")
    with pytest.raises(ValueError, match=says("model.safetensors", "file", "folder")):
        folders.kind(tmp_path / "model.safetensors")
    for name in "a b", "a//b", "x" * 300, "":
        with pytest.raises((ValueError, FileNotFoundError), match="folder|model"):
            folders.kind(name)
    (tmp_path / "out.unfinished").mkdir()
    with pytest.raises(FileNotFoundError, match=says(tmp_path / "out", "`quantize`")):
        folders.kind(tmp_path / "out")
    for name in tmp_path / "nothing", "./nothing", "~/nothing", "nothing/", "a/b/c":
        with pytest.raises(FileNotFoundError, match=says("no folder", name)):
            folders.kind(name)


def test_models_on_the_hub(gptq, plain, tmp_path, monkeypatch):
    """No network here: the functions that fetch are replaced by ones that read a folder."""
    import huggingface_hub
    from transformers import PretrainedConfig

    source, asked = gptq, []
    read = PretrainedConfig.get_config_dict
    monkeypatch.setattr(models, "_hub_answers", lambda name: True)
    monkeypatch.setattr(PretrainedConfig, "get_config_dict", lambda name, **_: read(source))
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", lambda name, **_: (asked.append(name), str(gptq))[1]
    )
    assert folders.kind("some/model") == "gptq"
    source = plain
    assert folders.kind("some/model") == "plain"
    source = shutil.copytree(plain, tmp_path / "fp8")
    change(source, quantization_config={"quant_method": "fp8"})
    with pytest.raises(ValueError, match=says("some/model", "quantized", "fp8")):
        folders.kind("some/model")
    assert not asked
    monkeypatch.setattr(folders, "kind", lambda name: "gptq")
    monkeypatch.setattr(PretrainedConfig, "get_config_dict", read)
    model, _ = folders.open_model("some/model")
    assert asked == ["some/model"]
    assert torch.equal(logits(model), logits(checkpoint.load_gptq(gptq)))


def made(folder):
    folder.mkdir()
    for name in "a", "config.json", "z":
        (folder / name).write_text(name)
    (folder / "b").mkdir()  # a tokenizer with several chat templates has a folder of them
    (folder / "b" / "c").touch()
    return folder


def test_a_folder_that_exists_gets_config_json_last(tmp_path, monkeypatch):
    out = tmp_path / "out"
    (out / "lost+found").mkdir(parents=True)  # as on a new ext4 disk
    run = folders.run_folder(out)
    assert run == out / ".unfinished"
    run.mkdir()
    result, rename = made(run / "result"), Path.rename

    def killed(self, target):
        if self.name == "z":
            raise KeyboardInterrupt
        rename(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", killed)
        with pytest.raises(KeyboardInterrupt):
            folders.move_in(result, out, but=[".unfinished"])
    assert sorted(os.listdir(out)) == [".unfinished", "a", "b", "lost+found"]
    assert folders.run_folder(out) == run  # which may go on there
    folders.clear_half_moved(run, out)
    assert sorted(os.listdir(out)) == [".unfinished", "lost+found"]
    shutil.rmtree(result)
    folders.move_in(made(result), out, but=[".unfinished"])
    everything = [".unfinished", "a", "b", "config.json", "lost+found", "z"]
    assert sorted(os.listdir(out)) == everything
    assert not os.listdir(result)
    with pytest.raises(
        FileExistsError, match=says("not empty")
    ):  # killed before it was cleared away
        folders.run_folder(out)
    folders.clear_half_moved(run, out)
    assert sorted(os.listdir(out)) == everything


def test_a_disk_that_is_full_at_the_end(tmp_path, monkeypatch):
    """What says which files are moved is never half written: a later run has to read it."""
    out = tmp_path / "out"
    run = out / ".unfinished"
    run.mkdir(parents=True)

    def full(self, *_, **__):
        self.touch()
        raise OSError("No space left on device")

    made(run / "result")
    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="No space"):
        folders.move_in(run / "result", out, but=[".unfinished"])
    assert os.listdir(run) == ["result"]
    assert folders.run_folder(out) == run


def test_where_a_run_keeps_its_work(tmp_path):
    out = tmp_path / "out"
    assert folders.run_folder(out) == tmp_path / "out.unfinished"
    (tmp_path / "out.unfinished").mkdir()
    out.mkdir()  # by hand, after a run began
    assert folders.run_folder(out) == tmp_path / "out.unfinished"
    with pytest.raises(FileExistsError, match=says("not empty")):
        folders.run_folder(Path(tmp_path.anchor))
    (out / "mine").touch()
    with pytest.raises(FileExistsError, match=says("not empty")):
        folders.run_folder(out)
    with pytest.raises(NotADirectoryError, match=says(out / "mine", "file")):
        folders.run_folder(out / "mine" / "deep" / "out")


@needs_links
def test_links(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk")
    assert folders.run_folder(tmp_path / "link") == tmp_path / "link" / ".unfinished"
    assert folders.run_folder(tmp_path / "link" / "a") == tmp_path / "link" / "a.unfinished"
    (tmp_path / "dangling").symlink_to(tmp_path / "nothing")
    with pytest.raises(FileNotFoundError, match=says(tmp_path / "nothing")):
        folders.run_folder(tmp_path / "dangling")
    (tmp_path / "file").touch()
    (tmp_path / "to file").symlink_to(tmp_path / "file")
    with pytest.raises(NotADirectoryError, match=says(tmp_path / "to file", "file")):
        folders.run_folder(tmp_path / "to file" / "out")
    with pytest.raises(NotADirectoryError, match=says(tmp_path / "dangling", "link")):
        folders.run_folder(tmp_path / "dangling" / "out")
    with pytest.raises(FileNotFoundError, match=says("no folder", tmp_path / "dangling")):
        folders.kind(tmp_path / "dangling")


def test_a_run_folder_that_cannot_be_leaves_nothing(tmp_path):
    long = tmp_path / "new" / "deep" / ("x" * 250 + ".unfinished")
    with pytest.raises(OSError, match=says(long, "too long", "OUT")):
        folders.make_run_folder(long)
    assert not list(tmp_path.iterdir())
    (tmp_path / ("y" * 250)).mkdir()  # beside it there is no room for a longer name
    assert folders.run_folder(tmp_path / ("y" * 250)).name == ".unfinished"
    (tmp_path / ("y" * 250)).rmdir()
    new = folders.make_run_folder(tmp_path / "a" / "b")
    assert new == [tmp_path / "a" / "b", tmp_path / "a"]
    assert not list((tmp_path / "a" / "b").iterdir())
    (tmp_path / "a" / "mine").touch()
    folders.remove_empty(new)
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["mine"]
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=says(tmp_path / "file")):
        folders.make_run_folder(tmp_path / "file")


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="a place where no user can write")
def test_a_place_that_cannot_be_written_to():
    with pytest.raises(OSError, match=says("/proc/out.unfinished")):
        folders.make_run_folder(folders.run_folder(Path("/proc/out")))
