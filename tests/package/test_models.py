"""Loading: what comes back, that it is mapped, and what happens without a network."""

import json
import os
import re
import socket
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path

import httpx
import pytest
import torch
import transformers
from huggingface_hub import HfApi
from huggingface_hub.errors import OfflineModeIsEnabled
from tiny import says, sharded, tiny_gpt2, tiny_llama
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

from chapter13 import models
from chapter13.fetch.download import CHECKOUT, require

LINUX = sys.platform == "linux"


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError(f"the network was asked for: {args}")

    for name in ("getaddrinfo", "create_connection"):
        monkeypatch.setattr(socket, name, refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.fixture(scope="module")
def embedded():
    return models.load(device="cpu")


@pytest.mark.slow
def test_embedded_model_needs_no_network(no_network, embedded):
    start = time.process_time()
    model, tokenizer = models.load(device="cpu")
    assert time.process_time() - start < 3  # transformers is imported already
    assert not model.training
    assert {weight.dtype for weight in model.parameters()} == {torch.float32}
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    prompt = tokenizer("The capital of France is", return_tensors="pt")
    answer = model.generate(**prompt, max_new_tokens=1, do_sample=False)
    assert tokenizer.decode(answer[0]) == "The capital of France is Paris"


def test_tokenizer_splits_numbers_into_digits(embedded):
    _, tokenizer = embedded
    assert tokenizer.convert_ids_to_tokens(tokenizer("in  2001").input_ids) == [
        "in", "ĠĠ", "2", "0", "0", "1"
    ]  # fmt: skip
    text = "Größe: 12 µm – “a\tb”\n\n  c"
    assert tokenizer.decode(tokenizer(text).input_ids) == text


@pytest.mark.parametrize("gpu", [False, True])
def test_device_is_the_gpu_when_there_is_one(monkeypatch, gpu):
    monkeypatch.delenv("CHAPTER13_DEVICE", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    assert models.find_device() == torch.device("cuda" if gpu else "cpu")


@pytest.mark.parametrize("named", ["cpu", "cuda:1"])
def test_the_environment_names_the_device(monkeypatch, named):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("CHAPTER13_DEVICE", named)
    assert models.find_device() == torch.device(named)
    assert models.find_device("cuda") == torch.device("cuda")  # an argument counts more


def test_models_go_where_the_environment_says(monkeypatch):
    monkeypatch.setenv("CHAPTER13_DEVICE", "meta")
    assert models.load()[0].device.type == "meta"


def test_what_is_no_device_is_refused(monkeypatch):
    monkeypatch.setenv("CHAPTER13_DEVICE", "gpu")
    with pytest.raises(ValueError, match=says("cpu", "cuda", "cuda:1", "'gpu'")):
        models.load()


@pytest.mark.parametrize(
    ("built_for", "why"),
    [(None, "CPUs"), ("13.0", "CUDA 13.0")],
)
def test_a_gpu_that_is_not_found_is_explained(monkeypatch, built_for, why):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", built_for)
    with pytest.raises(ValueError, match=says("PyTorch", "GPU", why)):
        models.find_device("cuda")


@pytest.mark.slow
def test_make_test_gpu_asks_for_a_gpu_first():
    run = [sys.executable, "-m", "tools.gpu"]
    asked = subprocess.run(run, cwd=CHECKOUT, capture_output=True, text=True)
    if torch.cuda.is_available():
        assert asked.returncode == 0
    else:
        assert asked.returncode == 1
        assert re.fullmatch(r"PyTorch .* finds no GPU: .*\. Nothing was run\.\n", asked.stderr)


def test_linear_weights_are_the_model_s(embedded, weights):
    model, _ = embedded
    linears = {
        f"{name}.weight": module.weight
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and name != "lm_head"
    }
    assert list(weights) == list(linears), "same layers, same order"
    for name, weight in linears.items():
        assert weights[name].dtype == torch.float32
        assert weights[name].is_contiguous()
        assert torch.equal(weights[name], weight)


def test_linear_weights_of_another_file(tmp_path):
    from safetensors.torch import save_file

    name = "model.layers.0.self_attn.q_proj.weight"
    save_file({name: torch.ones(2, 3), "model.norm.weight": torch.ones(3)}, tmp_path / "x")
    assert {k: v.tolist() for k, v in models.linear_weights(tmp_path / "x").items()} == {
        name: [[1, 1, 1], [1, 1, 1]]
    }


LAZY = """
import json, sys, time
import torch
from chapter13 import models
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096
before, start = resident(), time.process_time()
weights = models.linear_weights()
seconds, after = time.process_time() - start, resident()
print(json.dumps([seconds, after - before, "transformers" in sys.modules]))
"""


@pytest.mark.skipif(not LINUX, reason="reads /proc")
@pytest.mark.slow
def test_linear_weights_are_read_only_when_looked_at():
    run = subprocess.run(
        [sys.executable, "-c", LAZY], cwd=CHECKOUT, capture_output=True, text=True, check=True
    )
    seconds, grown, heavy = json.loads(run.stdout)
    assert seconds < 0.2
    assert grown < 60e6, "bytes; the file has 538 million"
    assert not heavy


def test_writing_to_a_weight_stays_here():
    first, name = models.linear_weights(), "model.layers.0.self_attn.q_proj.weight"
    kept = first[name][0, 0].item()
    first[name][0, 0] = kept + 1
    assert models.linear_weights()[name][0, 0].item() == kept


KERNEL = """
import json, re, sys
from chapter13 import models
model, _ = models.load(device="cpu")
total = sum(float(weight.sum()) for weight in model.parameters())  # looks at every value
print("ready", flush=True)
sys.stdin.readline()
maps = []
for block in re.split(r"(?m)^(?=[0-9a-f]+-[0-9a-f]+ )", open("/proc/self/smaps").read()):
    if "model.safetensors" in block:
        start, end = (int(x, 16) for x in block.split(" ")[0].split("-"))
        sizes = dict(re.findall(r"(?m)^(\\w+): +(\\d+) kB", block))
        maps.append((start, end, {key: int(value) for key, value in sizes.items()}))
inside = all(any(a <= w.data_ptr() < b for a, b, _ in maps) for w in model.parameters())
print(json.dumps([inside, [sizes for _, _, sizes in maps]]), flush=True)
sys.stdin.readline()  # stays until the other has measured too
"""


@pytest.mark.skipif(not LINUX, reason="reads /proc")
@pytest.mark.slow
def test_two_kernels_share_the_weights():
    size = (require(models.EMBEDDED) / "model.safetensors").stat().st_size / 1024
    with ExitStack() as running:
        kernels = [
            running.enter_context(
                subprocess.Popen(
                    [sys.executable, "-c", KERNEL],
                    cwd=CHECKOUT,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.DEVNULL,
                    text=True,
                )
            )
            for _ in range(2)
        ]
        assert [kernel.stdout.readline() for kernel in kernels] == ["ready\n"] * 2
        for kernel in kernels:  # both hold the model now
            print("measure", file=kernel.stdin, flush=True)
            inside, maps = json.loads(kernel.stdout.readline())
            assert inside, "every weight is a view of the mapped file"
            total = {key: sum(sizes[key] for sizes in maps) for key in maps[0]}
            assert total["Rss"] > 0.99 * size
            assert total["Private_Clean"] + total["Private_Dirty"] < 0.01 * size
            assert total["Anonymous"] == 0


@pytest.fixture(params=["gpt2", "llama"])
def tiny(request, tmp_path):
    """A folder with a random float16 model and a tokenizer of 20 words; and the model."""
    torch.manual_seed(0)
    if request.param == "gpt2":
        config = transformers.GPT2Config(vocab_size=20, n_embd=8, n_layer=2, n_head=2)
        model = transformers.GPT2LMHeadModel(config)
    else:
        config = transformers.LlamaConfig(
            vocab_size=20, hidden_size=8, intermediate_size=12, num_hidden_layers=2,
            num_attention_heads=2,
        )  # fmt: skip
        model = transformers.LlamaForCausalLM(config)
    model = model.half().eval()
    model.save_pretrained(tmp_path)
    words = Tokenizer(WordLevel({f"w{i}": i for i in range(20)}, unk_token="w0"))
    words.pre_tokenizer = Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(tmp_path)
    return tmp_path, model


def test_another_model(tiny, no_network):
    folder, expected = tiny
    model, tokenizer = models.load(str(folder), device="cpu")
    assert type(model) is type(expected)
    assert not model.training
    assert {weight.dtype for weight in model.parameters()} == {torch.float32}
    assert tokenizer("w3 w1").input_ids == [3, 1]
    for name, weight in expected.state_dict().items():
        assert torch.equal(model.state_dict()[name], weight.float())


def test_pickles_are_refused(tiny):
    folder, model = tiny
    (folder / "model.safetensors").unlink()
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    with pytest.raises(OSError, match=r"model\.safetensors"):
        models.load(str(folder))


def test_code_that_comes_with_a_model_is_not_run(tiny, monkeypatch):
    folder, _ = tiny
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "evil", "auto_map": {"AutoConfig": "evil.Evil"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "evil.py").write_text(f"open({str(folder / 'ran')!r}, 'w')\nclass Evil: pass\n")
    with pytest.raises(ValueError, match="trust_remote_code"):
        models.load(str(folder))
    assert not (folder / "ran").exists()


def hub(monkeypatch, error):
    def model_info(self, name, timeout=None):
        assert timeout <= 5
        if error:
            raise error

    monkeypatch.setattr(HfApi, "model_info", model_info)


@pytest.mark.parametrize(
    "error",
    [
        OfflineModeIsEnabled("offline"),
        httpx.ConnectError("no name service"),
        httpx.ConnectTimeout("no answer"),
        OSError("network is unreachable"),
    ],
)
def test_offline_fails_at_once_and_names_the_embedded_model(monkeypatch, no_network, error):
    hub(monkeypatch, error)
    start = time.perf_counter()
    with pytest.raises(ConnectionError, match=says("'nobody/no-such-model'", "'smollm2-135m'")):
        models.load("nobody/no-such-model")
    assert time.perf_counter() - start < 10, "retries take 23 seconds"


@pytest.mark.parametrize("reachable", [True, False])
def test_hub_models_are_loaded_safely(monkeypatch, reachable):
    asked = {}

    config = transformers.LlamaConfig()
    info = {"missing_keys": set(), "mismatched_keys": set(), "unexpected_keys": set()}

    def answers(kind, answer):
        def from_pretrained(name, **options):
            assert name == "someone/something"
            asked[kind] = options
            return answer

        monkeypatch.setattr(getattr(transformers, kind), "from_pretrained", from_pretrained)

    hub(monkeypatch, None if reachable else OSError("unreachable"))
    answers("AutoConfig", config)
    answers("AutoTokenizer", None)
    answers("AutoModelForCausalLM", (torch.nn.Linear(1, 1), info))
    models.load("someone/something", device="cpu")
    safe = {
        "trust_remote_code": False,
        "local_files_only": not reachable,  # what was fetched before still loads
    }
    assert asked["AutoConfig"] == asked["AutoTokenizer"] == safe
    expected = safe | {"use_safetensors": True, "dtype": torch.float32, "config": config}
    assert asked["AutoModelForCausalLM"].items() >= expected.items()


def test_a_name_that_no_model_can_have():
    with pytest.raises(ValueError, match="Repo id"):
        models.load("no/such/folder")


def test_progress_bars_are_as_they_were(tiny):
    folder, _ = tiny
    from transformers.utils import logging

    assert logging.is_progress_bar_enabled() or os.environ.get("HF_HUB_DISABLE_PROGRESS_BARS")
    before = logging.is_progress_bar_enabled()
    models.load(str(folder))
    assert logging.is_progress_bar_enabled() == before


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
def test_a_mapped_model_compute_in_float32_as_it_lies_on_disk(tmp_path, make, dtype, no_network):
    sharded(tmp_path, make, dtype)
    expected, _ = models.load(str(tmp_path), device="cpu")
    model, _ = models.load(str(tmp_path), device="cpu", mapped=True)
    before = dict(model.named_parameters())
    tokens = torch.randint(100, (2, 12), generator=torch.Generator().manual_seed(13))
    for mode in torch.no_grad, torch.inference_mode:
        with mode():
            logits = model(tokens).logits
            assert logits.dtype == torch.float32
            assert torch.equal(logits, expected(tokens).logits)
    for name, parameter in model.named_parameters():
        assert parameter is before[name]
        assert parameter.dtype == dtype
    assert model.get_input_embeddings().weight.dtype == dtype
    if LINUX:
        maps = Path("/proc/self/maps").read_text().splitlines()
        ranges = [
            [int(end, 16) for end in line.split()[0].split("-")]
            for line in maps
            if line.endswith(".safetensors") and str(tmp_path) in line
        ]
        for name, parameter in before.items():
            assert any(a <= parameter.data_ptr() < b for a, b in ranges), name


def test_a_failing_layer_gets_its_weight_back():
    layer = torch.nn.Linear(4, 4).bfloat16()
    weight = layer.weight
    models.compute_in_float32(layer)
    with pytest.raises(RuntimeError):
        layer(torch.zeros(2, 3))
    assert layer.weight is weight


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
def test_a_skeleton_has_the_shapes_and_no_memory(tmp_path, make, no_network):
    make().save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    hollow = models.skeleton(tmp_path)
    assert {parameter.device.type for parameter in hollow.parameters()} == {"meta"}
    shapes = {name: p.shape for name, p in make().named_parameters()}
    assert {name: p.shape for name, p in hollow.named_parameters()} == shapes
    assert not hollow.training
