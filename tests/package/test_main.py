"""The command line: what it writes, takes up again, refuses, and leaves behind."""

import errno
import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from safetensors import safe_open
from tiny import TOKENS, says, sharded, tiny_gpt2, tiny_llama

from chapter13 import __main__ as command
from chapter13 import corpus, evaluate, folders, models, quantize_model, summary
from chapter13.fetch.download import CHECKOUT
from chapter13.whole_model import blockwise
from chapter13.whole_model.linear import QuantizedLinear
from tools import bench_large, markdown

# the few words of the test's tokenizer make poor calibration text, which is said
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:.*calibration tokens span")]
FEW = ["--calibration-sequences", "6", "--calibration-length", "32"]
MAKES = {"llama": tiny_llama, "gpt2": tiny_gpt2}


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch):
    """Runs are compared bit for bit; test_devices.py has the command line elsewhere."""
    monkeypatch.setenv("CHAPTER13_DEVICE", "cpu")


@pytest.fixture(scope="module", params=MAKES)
def model(request, tmp_path_factory):
    """A folder with a small model in bfloat16, in several files."""
    folder = tmp_path_factory.mktemp(request.param)
    sharded(folder, MAKES[request.param], torch.bfloat16)
    return folder


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    sharded(folder, tiny_llama, torch.bfloat16)
    return folder


def run(*arguments):
    return command.main([str(argument) for argument in arguments])


def quantize(model, out, method, *more):
    size = [] if "--group-size" in more else ["--group-size", 32]
    return run("quantize", model, out, "--method", method, *size, *more)


def content(folder):
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


def weights(model):
    """What each layer stands for, and all else, in float32 on the CPU."""
    layers = {n: m for n, m in model.named_modules() if isinstance(m, QuantizedLinear)}
    rest = {
        name: tensor.float().cpu()
        for name, tensor in model.state_dict().items()
        if name.rpartition(".")[0] not in layers
    }
    return rest | {name: layer.quantized.dequantize().cpu() for name, layer in layers.items()}


@pytest.mark.parametrize(
    ("method", "more", "options"),
    [
        ("gptq", FEW, {}),
        ("gptq", [*FEW, "--symmetric", "--no-act-order", "--damp", "0.1"],
         {"symmetric": True, "act_order": False, "damp": 0.1}),
        ("gptq", [*FEW, "--clip-search", "--bits", "3"], {"clip_search": True, "bits": 3}),
        ("awq", FEW, {}),
        ("absmax", ["--bits", "8", "--group-size", "channel"],
         {"bits": 8, "group_size": "channel"}),
        ("affine", [], {}),
        ("nf4", ["--double-quant"], {"double_quant": True}),
        ("fp4", [], {}),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)  # fmt: skip
def test_it_writes_what_the_package_computes(model, method, more, options, tmp_path, capsys):
    """From mapped bfloat16 files, block by block, the weights that float32 in memory gives.

    But for AWQ, which changes norms, and so has to round them to the data type they are kept in.
    """
    out = tmp_path / "new" / "out"
    assert quantize(model, out, method, *more) == 0
    assert [path.name for path in out.parent.iterdir()] == ["out"]
    words = capsys.readouterr().err
    assert "not quantized: Embedding in bfloat16" in words
    assert f"evaluate {out} --reference {model}" in words

    expected, tokenizer = models.load(str(model), mapped=method == "awq")
    options = {"group_size": 32} | options
    if "--calibration-length" in more:
        options["calibration"] = corpus.calibration_tokens(tokenizer, 6, 32)
    quantize_model(expected, method, progress=False, **options)
    back, words = command._open(str(out), torch.device("cpu"))
    assert words("w3 w1").input_ids == [3, 1]
    ours, theirs = weights(back), weights(expected)
    assert ours.keys() == theirs.keys()
    for name, weight in theirs.items():
        assert torch.equal(ours[name], weight), name
    with torch.inference_mode():
        assert back(TOKENS).logits.isfinite().all()


def test_the_format_is_what_todays_programs_read(llama, tmp_path):
    for method, more, expected in (
        ("absmax", [], "gptq"),
        ("affine", [], "gptq_v2"),
        ("gptq", [*FEW, "--symmetric"], "gptq"),
        ("affine", ["--format", "gptq"], "gptq"),
    ):
        out = tmp_path / f"{method}{len(more)}"
        assert quantize(llama, out, method, *more) == 0
        settings = json.loads((out / "config.json").read_text())["quantization_config"]
        assert settings["checkpoint_format"] == expected


def test_text_of_ones_own(llama, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text(" ".join(f"w{i * i % 19}" for i in range(400)), encoding="utf-8")
    out = tmp_path / "out"
    assert quantize(llama, out, "gptq", *FEW, "--calibration-file", text) == 0
    expected, tokenizer = models.load(str(llama))
    tokens = corpus.text_tokens(tokenizer, text.read_text(), 6, 32)
    quantize_model(expected, "gptq", group_size=32, progress=False, calibration=tokens)
    ours, theirs = weights(command._open(str(out), None)[0]), weights(expected)
    assert all(torch.equal(ours[name], weight) for name, weight in theirs.items())


@pytest.mark.parametrize("method", ["affine", "nf4"])
def test_evaluate(llama, method, tmp_path, capsys):
    assert quantize(llama, tmp_path / "out", method) == 0
    size = ["--sequences", "3", "--length", "16"]
    capsys.readouterr()
    assert run("evaluate", tmp_path / "out", "--reference", llama, *size) == 0
    printed = capsys.readouterr().out
    assert "14 linear layers" in printed
    numbers = re.findall(r"(?m)^(.+): (-?[\d.e-]+) \(95%: .* 3 sequences\)$", printed)
    assert [name for name, _ in numbers] == [
        "perplexity",
        "perplexity of the reference",
        "difference, nats per token",
        "KL divergence, nats per token",
    ]
    assert float(dict(numbers)["KL divergence, nats per token"]) > 0
    assert run("evaluate", llama, "--reference", llama, *size) == 0
    divergence = re.search(r"KL divergence, nats per token: (\S+)", capsys.readouterr().out)[1]
    assert abs(float(divergence)) < 1e-12  # the same logits: what is left is float64's own


@pytest.fixture
def recorded(monkeypatch):
    """A summary table with one row, of 33 sequences that each lose 3 nats, 0.5 of them as KL."""
    losses = torch.full((33,), 3.0, dtype=torch.float64)
    row = SimpleNamespace(
        name="NF4",
        perplexity=evaluate.Score(losses, exponential=True),
        kl=evaluate.Score(losses / 6),
    )
    monkeypatch.setattr(summary, "rows", lambda: {"NF4": row, "NF4, double quantization": row})
    monkeypatch.setattr(corpus, "EVALUATION", (33, 16))


def test_evaluate_beside_a_recorded_row(llama, recorded, capsys, monkeypatch):
    asked = ["--sequences", "3", "--length", "16", "--recorded", "NF4"]
    monkeypatch.setattr(command, "_embedded_tokens", lambda n: own_tokens(llama, n, 16))
    assert run("evaluate", llama, "--reference", llama, *asked) == 0
    printed = capsys.readouterr().out
    _, *lines = printed.partition("recorded, NF4")[2].splitlines()
    numbers = [float(line.partition(": ")[2].split()[0]) for line in lines]
    assert all("3 sequences" in line for line in lines)
    perplexity = float(re.search(r"perplexity: (\S+)", printed)[1])
    # printed to four digits
    assert numbers[0] == pytest.approx(math.exp(3), rel=1e-3)
    assert numbers[1] == pytest.approx(math.log(perplexity) - 3, abs=1e-3)
    assert numbers[2:] == pytest.approx([0.5, -0.5], rel=1e-3)  # its KL to itself is 0


def own_tokens(folder, sequences, length):
    tokenizer = models.load(str(folder), device="cpu")[1]
    return corpus.evaluation_tokens(tokenizer, sequences, length)


@pytest.mark.parametrize(
    ("asked", "facts"),
    [
        (["--recorded", "NF5"], ["'NF5'", "NF4"]),
        (["--recorded", "NF4", "--length", "8"], ["33", "16", "--length"]),
        (["--recorded", "NF4", "--sequences", "34"], ["33", "34"]),
    ],
)
def test_what_is_not_recorded_is_said_before_the_work(llama, recorded, asked, facts, capsys):
    line = refused(capsys, "evaluate", llama / "nothing", "--length", "16", *asked)
    assert all(fact in line for fact in facts)


def test_another_tokenizer_is_not_compared(llama, recorded, capsys, monkeypatch):
    monkeypatch.setattr(command, "_embedded_tokens", lambda n: torch.ones(n, 16).long())
    line = refused(capsys, "evaluate", llama, "--length", "16", "--recorded", "NF4")
    assert "tokenizer" in line
    assert "--recorded" in line


def test_the_embedded_tokens_are_the_tables():
    assert torch.equal(command._embedded_tokens(2), own_tokens(models.EMBEDDED, 2, 512))


NEVER = [  # (what is wrong, what the message names); told before the model is looked at
    (["--method", "gtpq"], "--method", "'gtpq'"),
    ([], "--method"),
    (["--method", "absmax", "--bits", "5"], 5, "2, 3, 4, 8"),
    (["--method", "absmax", "--bits", "four"], "--bits", "'four'"),
    (["--method", "nf4", "--bits", "3"], "nf4", 4, 3),
    (["--method", "nf4", "--group-size", "channel"], "nf4", "--group-size"),
    (["--method", "absmax", "--group-size", "0"], '"channel"', "'0'"),
    (["--method", "absmax", "--group-size", "-1"], '"channel"', "-1"),
    (["--method", "absmax", "--group-size=-1"], '"channel"', "-1"),
    (["--method", "absmax", "--double-quant"], "--double-quant", "nf4, fp4", "absmax"),
    (["--method", "nf4", "--no-act-order"], "--no-act-order", "gptq", "nf4"),
    (["--method", "fp4", "--format", "gptq"], "--format", "fp4"),
    (["--method", "affine", "--calibration-file", "x"], "--calibration-file", "gptq", "affine"),
    (["--method", "gptq", "--damp", "-1"], "--damp", "'-1'"),
    (["--method", "gptq", "--damp", "nan"], "--damp", "'nan'"),
    (["--method", "gptq", "--device", "gpu"], "cpu", "cuda", "'gpu'"),
]


@pytest.mark.parametrize("case", NEVER, ids=lambda case: " ".join(case[0]) or "nothing")
def test_wrong_options_are_named_at_once(case, tmp_path, capsys, monkeypatch):
    arguments, *facts = case
    for function in "load", "skeleton":
        monkeypatch.setattr(models, function, lambda *_, **__: pytest.fail("work was begun"))
    with pytest.raises(SystemExit) as ended:
        run("quantize", "someone/something", tmp_path / "out", *arguments)
    assert ended.value.code == 2
    said = capsys.readouterr().err.rpartition("error: ")[2]
    assert re.search(says(*facts), said), said
    assert not list(tmp_path.iterdir())


def refused(capsys, *arguments):
    """The one line of an expected error, in which `re.search` looks."""
    capsys.readouterr()
    assert run(*arguments) == 1
    line = capsys.readouterr().err
    assert re.fullmatch(r"error: [^\n]+\n", line), line
    return line


def test_what_does_not_fit_the_model_is_said_before_its_weights_are_read(
    llama, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(models, "load", lambda *_, **__: pytest.fail("weights were read"))
    start = "quantize", llama, tmp_path / "out", "--method"
    line = refused(capsys, *start, "absmax", "--group-size", "64")
    assert re.search(says(64, "2 layers", "2, 4, 8, 16, 32"), line)
    line = refused(capsys, *start, "gptq", "--group-size", "32", "--calibration-length", "9999")
    assert re.search(says(9999, 2048), line)
    line = refused(capsys, *start, "gptq", "--calibration-file", tmp_path / "nothing")
    assert "nothing" in line
    assert not list(tmp_path.iterdir())


def test_other_models_that_it_does_not_take(tmp_path, capsys):
    odd = tiny_llama(intermediate_size=80)
    odd.save_pretrained(tmp_path / "odd")
    config = transformers.OPTConfig(
        hidden_size=64, ffn_dim=96, num_hidden_layers=2, num_attention_heads=4, vocab_size=100,
        word_embed_proj_dim=32,
    )  # fmt: skip
    transformers.OPTForCausalLM(config).save_pretrained(tmp_path / "opt")
    (tmp_path / "empty").mkdir()
    before = sorted(tmp_path.iterdir())

    def line(model):
        start = "quantize", tmp_path / model, tmp_path / "out", "--method", "absmax"
        return refused(capsys, *start, "--group-size", "16")

    assert re.search(says("gate_proj", 80, 32), line("odd"))
    assert re.search(says(2, "model.decoder.project_out"), line("opt"))
    assert re.search(says(tmp_path / "empty", "config.json"), line("empty"))
    assert sorted(tmp_path.iterdir()) == before


def test_out_must_be_new_and_the_model_not_quantized(llama, tmp_path, capsys):
    out = tmp_path / "out"
    out.mkdir()  # an empty folder is as good as none
    assert quantize(llama, out, "absmax") == 0
    before = content(out)
    start = ("--method", "absmax", "--group-size", "32")
    assert re.search(says(out, "not empty"), refused(capsys, "quantize", llama, out, *start))
    again = refused(capsys, "quantize", out, tmp_path / "b", *start)
    assert re.search(says(out, "quantized"), again)
    file = tmp_path / "file"
    file.write_text("mine")
    assert re.search(says(file, "not empty"), refused(capsys, "quantize", llama, file, *start))
    assert file.read_text() == "mine"
    assert content(out) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "out"]


def test_odd_places_for_out(llama, tmp_path, monkeypatch, capsys):
    """An empty folder is filled, not replaced; the result is the same everywhere."""
    assert quantize(llama, tmp_path / "new", "nf4") == 0
    expected = content(tmp_path / "new")
    here = tmp_path / "a b"
    here.mkdir()
    places = [here / "inner" / ".." / "deep" / "er", shutil.copytree(llama, tmp_path / "m") / "out"]
    if sys.platform != "win32":
        (tmp_path / "disk").mkdir()
        (tmp_path / "link").symlink_to(tmp_path / "disk")
        places.append(tmp_path / "link")
    for out in places:
        model = out.parent if out.parent.name == "m" else llama
        assert quantize(model, out, "nf4") == 0
        assert content(Path(os.path.realpath(out))) == expected
    assert [path.name for path in here.iterdir()] == ["deep"]
    shutil.rmtree(here / "deep")
    monkeypatch.chdir(here)
    before = here.stat()
    capsys.readouterr()
    assert quantize(llama, ".", "nf4") == 0
    assert content(here) == expected
    assert here.stat().st_ino == before.st_ino
    assert quantize(llama, here, "nf4") == 1
    assert re.search(says(here, "not empty"), capsys.readouterr().err)
    assert not list(tmp_path.glob("*.unfinished"))


def test_names_of_out_that_no_file_can_have(llama, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for out, fact in ("", "OUT"), ("a\udcff", "UTF-8"):
        with pytest.raises(SystemExit) as ended:
            run("quantize", llama, out, "--method", "absmax")
        assert ended.value.code == 2
        assert re.search(says(fact), capsys.readouterr().err)
    assert not list(tmp_path.iterdir())


def test_a_folder_of_ones_own_that_is_named_like_a_runs(llama, tmp_path, capsys):
    mine = tmp_path / "out.unfinished" / "mine"
    for name in mine, mine.parent / "blocks" / "mine":
        name.parent.mkdir(parents=True)
        name.touch()
        line = refused(capsys, "quantize", llama, tmp_path / "out", "--method", "nf4")
        assert "mine, which `quantize` did not write: move it elsewhere" in line
        assert name.exists()
        shutil.rmtree(mine.parent)


@pytest.mark.parametrize("method", ["absmax", "nf4"])
def test_what_describes_other_files_is_not_copied(llama, method, tmp_path):
    model = shutil.copytree(llama, tmp_path / "model")
    extra = {
        "config.json": {
            "transformers_weights": "model.safetensors.index.json",
            "auto_map": {"AutoModelForCausalLM": "modeling_own.Own"},
        },
        "tokenizer_config.json": {"auto_map": {"AutoTokenizer": ["own.Own", None]}},
    }
    for name, settings in extra.items():
        there = json.loads((model / name).read_text(encoding="utf-8"))
        (model / name).write_text(json.dumps(there | settings), encoding="utf-8")
    assert quantize(model, tmp_path / "out", method) == 0
    for name in extra:
        written = json.loads((tmp_path / "out" / name).read_text(encoding="utf-8"))
        assert not {"auto_map", "transformers_weights", "local_files_only"} & {*written}
        assert {"model_type", "tokenizer_class"} & {*written}


def test_a_mount_point(llama, tmp_path):
    out = tmp_path / "volume"
    out.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "none", out], capture_output=True).returncode:
        pytest.skip("only root may mount")
    try:
        assert quantize(llama, out, "absmax") == 0
        assert folders.kind(out) == "gptq"
        assert not (out / ".unfinished").exists()
    finally:
        subprocess.run(["umount", out], check=True)


def test_killed_while_the_files_are_moved_into_a_folder(llama, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    assert quantize(llama, tmp_path / "whole", "absmax") == 0
    out.mkdir()
    rename = Path.rename

    def killed(self, target):
        if self.name == "config.json" and out in self.parents and self.parent.name == "result":
            raise KeyboardInterrupt
        return rename(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", killed)
        assert quantize(llama, out, "absmax") == 130
    assert "same command" in capsys.readouterr().err
    assert (out / "model.safetensors").exists()
    assert "did not finish" in refused(capsys, "evaluate", out)
    assert quantize(llama, out, "absmax") == 0
    assert content(out) == content(tmp_path / "whole")


def test_places_that_out_cannot_have(llama, tmp_path, capsys, monkeypatch):
    for function in "load", "skeleton":
        monkeypatch.setattr(models, function, lambda *_, **__: pytest.fail("work was begun"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    before = sorted(tmp_path.iterdir())
    for out, words in [
        (llama, "is the model's own folder"),
        (llama / ".." / llama.name, "is the model's own folder"),
        (models.EMBEDDED, "is the name of a model"),
        ("..", "is not empty"),
        (Path(tmp_path.anchor), "is not empty"),
        ("file", "file exists and is not empty"),
        ("file/out", "file is a file, so file"),
        ("y" * 300, "too long"),
        ("x" * 250, "too long"),
        ("new/" + "x" * 250, "too long"),
    ]:
        line = refused(capsys, "quantize", llama, out, "--method", "absmax")
        assert words in line, out
        assert "ther " in line  # another folder, other OUT
    assert sorted(tmp_path.iterdir()) == before
    if sys.platform != "win32":
        (tmp_path / "link").symlink_to("nothing")
        line = refused(capsys, "quantize", llama, "link", "--method", "absmax")
        assert "link is a link to nothing, which does not exist: make that folder" in line


@pytest.mark.parametrize(
    ("method", "more"),
    [("absmax", []), ("affine", ["--bits", "3"]), ("nf4", ["--double-quant"]), ("fp4", [])],
)
def test_a_disk_that_is_too_small(model, method, more, tmp_path, capsys, monkeypatch):
    """What it asks for is what the files have, but for zero points, headers and the tokenizer."""
    usage = shutil.disk_usage(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda folder: usage._replace(free=1000))
        patch.setattr(models, "load", lambda *_, **__: pytest.fail("work was begun"))
        start = "quantize", model, tmp_path / "out", "--group-size", "32", "--method", method
        line = refused(capsys, *start, *more)
        assert not list(tmp_path.iterdir())
    words = r"No space left for \S+out: .* need about ([\d.]+) MB, 0.0 MB are free"
    needed = 1e6 * float(re.search(words, line)[1])

    written, rmtree = [], shutil.rmtree

    def measured(folder, **more):
        written.extend(file.stat().st_size for file in Path(folder).glob("blocks/*.safetensors"))
        rmtree(folder, **more)

    monkeypatch.setattr(command.shutil, "rmtree", measured)
    assert run(*start, *more) == 0
    written.extend(file.stat().st_size for file in (tmp_path / "out").glob("*.safetensors"))
    assert 0.6 * sum(written) < needed < sum(written) + 5e4  # the message rounds to 0.1 MB


def test_room_for_what_is_not_finished_yet(llama, tmp_path, monkeypatch):
    """A run that goes on needs no more room for the blocks that it has."""
    args = command._parser().parse_args(
        ["quantize", str(llama), "out", "--method", "absmax", "--group-size", "32"]
    )
    hollow = models.skeleton(llama)
    free = 0
    monkeypatch.setattr(
        shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(10**9, 0, free)
    )

    def needed():
        nonlocal free
        low, high = 0, 10**7
        while low < high:
            free = (low + high) // 2
            try:
                command._check_room(hollow, args, tmp_path)
                high = free
            except OSError:
                low = free + 1
        return low

    before = needed()
    (tmp_path / "blocks").mkdir()
    (tmp_path / "blocks" / "block-0000.safetensors").write_bytes(bytes(5000))
    assert needed() == before - 5000
    args.format = "gptq_v2"
    tied = hollow.get_output_embeddings().weight is hollow.get_input_embeddings().weight
    assert (needed() < before - 5000) == tied


def test_evaluate_says_at_once_what_it_cannot_open(llama, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(models, "load", lambda *_, **__: pytest.fail("weights were read"))
    line = refused(capsys, "evaluate", llama, "--reference", tmp_path / "nothing")
    assert re.search(says(tmp_path / "nothing"), line)
    folder = shutil.copytree(llama, tmp_path / "awq")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "awq"}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    for arguments in ["evaluate", folder], ["quantize", folder, tmp_path / "o", "--method", "nf4"]:
        assert re.search(says(folder, "quantized", "awq"), refused(capsys, *arguments))
    assert [path.name for path in tmp_path.iterdir()] == ["awq"]


def test_the_command_that_it_names_can_be_given(llama, tmp_path, capsys):
    out = tmp_path / "it's new"
    assert quantize(llama, out, "fp4") == 0
    line = capsys.readouterr().err.rpartition("python -m chapter13 ")[2]
    args = command._parser().parse_args(shlex.split(line))
    assert (args.model, args.reference) == (str(out), str(llama))


def test_no_network(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(models, "_hub_answers", lambda name: False)
    start = "quantize", "nobody/no-such-model", tmp_path / "out", "--method", "absmax"
    assert "hub cannot be reached" in refused(capsys, *start)
    assert "hub cannot be reached" in refused(capsys, "evaluate", "nobody/no-such-model")
    assert not list(tmp_path.iterdir())


def test_too_little_text(llama, tmp_path, capsys):
    text = tmp_path / "text"
    text.write_text("w1 w2 w3", encoding="utf-8")
    start = "quantize", llama, tmp_path / "out", "--method", "gptq", "--group-size", "32"
    line = refused(capsys, *start, *FEW, "--calibration-file", text)
    assert "asked for 6 sequences of 32 tokens; the calibration text has 0" in line
    assert [path.name for path in tmp_path.iterdir()] == ["text"]
    line = refused(capsys, "evaluate", llama, "--sequences", "999999", "--length", "16")
    assert "the evaluation text has" in line


# ends itself, by a true signal, once the first block is in its file; Ctrl-C is heard also where the
# tests run in the background of a shell, which has its children ignore it
ENDING = """
import os, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
from chapter13 import __main__ as command
from chapter13.whole_model import blockwise
save = blockwise.save_quantized
def ending(block, file):
    save(block, file)
    os.kill(os.getpid(), int(sys.argv[1]))
blockwise.save_quantized = ending
sys.exit(command.main(sys.argv[2:]))
"""


@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGKILL])
@pytest.mark.parametrize("method", ["gptq", "nf4"])
def test_the_same_command_goes_on_after_an_interruption(llama, end, method, tmp_path, monkeypatch):
    more = FEW if method == "gptq" else []
    assert quantize(llama, tmp_path / "whole", method, *more) == 0
    out, folder = tmp_path / "out", tmp_path / "out.unfinished"
    arguments = ["quantize", llama, out, "--method", method, "--group-size", 32, *more]
    ended = subprocess.run(
        [sys.executable, "-c", ENDING, str(int(end)), *map(str, arguments)],
        cwd=CHECKOUT,
        capture_output=True,
        text=True,
    )
    assert ended.returncode == {signal.SIGINT: 130, signal.SIGKILL: -9}[end]
    if end == signal.SIGINT:
        assert "keeps the finished blocks: the same command resumes" in ended.stderr
        assert ended.stderr.endswith("Interrupted.\n")
        assert "Traceback" not in ended.stderr
    assert not out.exists()
    assert [path.name for path in folder.glob("blocks/*.safetensors")] == ["block-0000.safetensors"]

    # what a killed run may leave half written
    (folder / "blocks" / ".block-0001.safetensors.1.part").write_bytes(b"half")
    (folder / ".result.x").mkdir()
    (folder / "result").mkdir()
    saved, save = [], blockwise.save_quantized
    monkeypatch.setattr(blockwise, "save_quantized", lambda *a: (saved.append(a[1].name), save(*a)))
    assert run(*arguments) == 0
    assert saved == ["block-0001.safetensors"]
    assert content(out) == content(tmp_path / "whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "whole"]


def test_a_full_disk(llama, tmp_path, capsys, monkeypatch):
    import safetensors.torch

    save = safetensors.torch.save_file
    full = OSError(errno.ENOSPC, "No space left on device")

    def fails(tensors, file, metadata):
        if "result" in str(file):
            file.write_bytes(b"half")
            raise full
        save(tensors, file, metadata=metadata)

    start = "quantize", llama, tmp_path / "out", "--group-size", "32", "--method"
    monkeypatch.setattr(safetensors.torch, "save_file", fails)
    for method in "affine", "nf4":
        assert run(*start, method) == 1
        words = capsys.readouterr().err
        assert "out.unfinished" in words
        assert words.endswith("error: [Errno 28] No space left on device\n")
        assert [path.name for path in tmp_path.iterdir()] == ["out.unfinished"]
        monkeypatch.setattr(safetensors.torch, "save_file", save)
        assert run(*start, method) == 0
        assert [path.name for path in tmp_path.iterdir()] == ["out"]
        monkeypatch.setattr(safetensors.torch, "save_file", fails)
        (tmp_path / "out").rename(tmp_path.parent / f"{tmp_path.name}-{method}")


def test_other_errors_are_not_hidden(llama, tmp_path, monkeypatch, capsys):
    def fails(*_, **__):
        raise Exception(words)  # as the tokenizers library does

    start = "quantize", llama, tmp_path / "out", "--group-size", "32", "--method", "absmax"
    monkeypatch.setattr(command.checkpoint, "save_gptq", fails)
    words = "No space left on device (os error 28)"
    assert run(*start) == 1
    assert capsys.readouterr().err.endswith(f"error: {words}\n")
    words = "a slip of ours"
    with pytest.raises(Exception, match=words):
        run(*start)


def test_another_command_does_not_take_up_the_blocks(llama, tmp_path, capsys, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    start = "quantize", llama, tmp_path / "out", "--group-size", "32", "--method"
    with monkeypatch.context() as patch:
        patch.setattr(command.checkpoint, "save_gptq", interrupted)
        assert run(*start, "absmax") == 130
    capsys.readouterr()
    assert run(*start, "affine") == 1
    words = capsys.readouterr().err
    assert re.search(says("another run", "absmax, bits 4, group_size 32"), words)
    assert "same command" not in words
    assert run(*start, "absmax") == 0


def test_two_runs_at_once(llama, tmp_path, capsys):
    with command._unfinished(tmp_path / "out"):
        start = "quantize", llama, tmp_path / "out", "--method", "absmax"
        line = refused(capsys, *start, "--group-size", "32")
        assert re.search(says("another run", tmp_path / "out.unfinished"), line)


def test_help_and_no_command(capsys):
    for arguments in ["--help"], ["quantize", "--help"], ["evaluate", "--help"]:
        with pytest.raises(SystemExit) as ended:
            run(*arguments)
        assert ended.value.code == 0
        assert "MODEL" in capsys.readouterr().out
    with pytest.raises(SystemExit) as ended:
        run()
    assert ended.value.code == 2


@pytest.mark.parametrize("name", ["README.md", "docs/package.md"])
def test_documented_commands_are_commands(name):
    text = (markdown.ROOT / name).read_text(encoding="utf-8")
    lines = re.findall(r"(?m)^(?:\S*/)?python -m chapter13 (.+)$", text)
    assert len(lines) >= 2
    for line in lines:
        args = command._parser().parse_args(shlex.split(line))
        if args.run is command.quantize_command:
            command._check_options(command._parser(), args)


def test_a_checkpoint_is_made_of_what_the_index_says(tmp_path, monkeypatch):
    monkeypatch.setitem(bench_large.SHAPES, "1b", (4, 64, 96, 4, 2))
    count = bench_large.make_checkpoint(tmp_path, "1b")
    places = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    for name, file in places.items():
        with safe_open(tmp_path / file, framework="pt") as content:
            assert name in content.keys()
    model, _ = models.load(str(tmp_path), device="cpu", mapped=True)
    assert sum(parameter.numel() for parameter in model.parameters()) == count
