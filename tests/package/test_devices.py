"""Models on a GPU, or on what stands in for one: the methods leave nothing behind on the CPU.

On the stand-in (see stand_in.py) the numbers have to be the CPU's, bit for bit, since they are
computed there. On a GPU sums come in another order, so there the numbers are held by the notebooks,
each within its tolerance; here every tensor has to be in its place, and the codes of the methods
that only round have to be the same.
"""

import re
import warnings

import pytest
import stand_in
import torch
from tiny import says, sharded, tiny_gpt2, tiny_llama, toy_model, weight

from chapter13 import __main__ as main
from chapter13 import checkpoint, evaluate, models, quantize_model
from chapter13.dynamic import quantize_dynamic
from chapter13.explorers.activations import explore_activations
from chapter13.explorers.awq import explore_awq
from chapter13.explorers.gptq import collect
from chapter13.explorers.text import explore_text
from chapter13.outliers import quantize_llm_int8, smooth
from chapter13.static import calibrate, quantize_static
from chapter13.whole_model import storage
from chapter13.whole_model.fused import fuse

TRUE_GPU = torch.cuda.is_available()
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        stand_in.missing and not TRUE_GPU, reason="neither a GPU nor a stand-in for this PyTorch"
    ),
]


@pytest.fixture
def device():
    if TRUE_GPU:
        yield torch.device("cuda")
        return
    with stand_in.card() as card:
        yield card


def llama():
    return tiny_llama(intermediate_size=128).requires_grad_(False)


def gpt2():
    return tiny_gpt2().requires_grad_(False)


TOKENS = torch.randint(100, (4, 16), generator=torch.Generator().manual_seed(0))


def rounded(method, bits=4, size=32, **options):
    return lambda model: quantize_model(model, method, bits, size, progress=False, **options)


def learned(method, **options):
    def change(model):
        with warnings.catch_warnings():  # so few tokens span few dimensions
            warnings.simplefilter("ignore")
            return rounded(method, calibration=TOKENS, **options)(model)

    return change


def static(observer):
    def change(model):
        return quantize_static(model, calibrate(model, TOKENS, progress=False), observer)

    return change


CHANGES = {
    "absmax": rounded("absmax"),
    "affine": rounded("affine"),
    "NF4": rounded("nf4", double_quant=True),
    "FP4": rounded("fp4"),
    "INT8 weights": rounded("absmax", 8, "channel"),
    "GPTQ": learned("gptq", clip_search=True),
    "AWQ": learned("awq"),
    "dynamic per tensor": lambda model: quantize_dynamic(model, "per_tensor", progress=False),
    "dynamic per token": lambda model: quantize_dynamic(model, "per_token", progress=False),
    "static": static("mse"),
    "LLM.int8()": lambda model: quantize_llm_int8(model, threshold=1.0, progress=False),
    "SmoothQuant": lambda model: smooth(model, calibrate(model, TOKENS, progress=False)),
}
ROUNDING = ("absmax", "affine", "NF4", "FP4", "INT8 weights")


MODELS = [(llama, name) for name in CHANGES]
MODELS += [(gpt2, name) for name in ("absmax", "GPTQ", "AWQ", "static", "SmoothQuant")]  # Conv1D


@pytest.mark.parametrize(("make", "name"), MODELS)
def test_a_changed_model_is_all_there(device, make, name):
    ours, expected = CHANGES[name](make().to(device)), CHANGES[name](make())
    logits = ours(TOKENS.to(device)).logits
    assert logits.device.type == device.type
    for part, tensor in ours.state_dict().items():
        assert tensor.device.type == device.type, part
    if name in ROUNDING or not TRUE_GPU:
        pairs = zip(ours.state_dict().values(), expected.state_dict().values(), strict=True)
        assert all(torch.equal(a.cpu(), b) for a, b in pairs)
    if not TRUE_GPU:
        assert torch.equal(logits.cpu(), expected(TOKENS).logits)


def test_measuring(device, tmp_path):
    """KL against a model there, one on the CPU, and the cache of each."""
    there, here = (CHANGES["NF4"](llama().to(place)) for place in (device, "cpu"))
    expected = evaluate.kl_divergence(here, llama(), TOKENS, progress=False)
    references = [llama().to(device), llama()]
    references += [
        evaluate.cache_logits(model, TOKENS, tmp_path / str(number), progress=False)
        for number, model in enumerate(references)
    ]
    for reference in references:
        perplexity, kl = evaluate.perplexity_and_kl(there, reference, TOKENS, progress=False)
        # a cached logit is off by half a step of 65536 between the extremes
        assert kl.value == pytest.approx(expected.value, abs=1e-4)
        assert perplexity.value == pytest.approx(
            evaluate.perplexity(here, TOKENS, progress=False).value, rel=1e-4
        )


def test_files(device, tmp_path):
    """What is written there is read anywhere, and back."""
    model, prompt = CHANGES["affine"](llama().to(device)), TOKENS.to(device)
    logits = model(prompt).logits
    storage.save_quantized(model, tmp_path / "own.safetensors")
    checkpoint.save_gptq(model, tmp_path / "gptq", checkpoint_format="gptq_v2")
    again = [
        storage.load_quantized(llama().to(device), tmp_path / "own.safetensors"),
        checkpoint.load_gptq(tmp_path / "gptq").to(device),
        checkpoint.load_gptq(tmp_path / "gptq", llama().to(device)),
    ]
    for other in again:
        assert torch.equal(other(prompt).logits, logits)


@pytest.mark.filterwarnings("ignore:.* calibration tokens span")
@pytest.mark.parametrize("method", ["affine", "nf4", "gptq"])
def test_the_command_line(device, method, tmp_path, capsys):
    """The same files as on the CPU; GPTQ, whose sums decide near ties, as good a model."""
    folder, text = tmp_path / "model", tmp_path / "text.txt"
    sharded(folder, llama, torch.bfloat16)
    text.write_text(" ".join(f"w{i * i % 19}" for i in range(400)), encoding="utf-8")
    few = ["--calibration-file", text, "--calibration-sequences", 6, "--calibration-length", 32]
    losses = []
    for place in (device, "cpu"):
        out = tmp_path / torch.device(place).type
        options = ["--method", method, "--group-size", 32, *(few if method == "gptq" else [])]
        commands = (
            ["quantize", folder, out, *options],
            ["evaluate", out, "--reference", folder, "--sequences", 2, "--length", 32],
        )
        for command in commands:
            words = [str(word) for word in (*command, "--device", place)]
            assert main.main(words) == 0
        losses.append(float(re.search(r"KL.*: (\S+) ", capsys.readouterr().out)[1]))
    if method != "gptq" or not TRUE_GPU:
        for file in (tmp_path / "cpu").iterdir():
            assert (tmp_path / device.type / file.name).read_bytes() == file.read_bytes(), file.name
    assert losses[0] == pytest.approx(losses[1], rel=0.05)


def test_kernels_of_the_cpu_are_refused(device):
    with pytest.raises(ValueError, match=says("CPU", device.type)):
        fuse(CHANGES["absmax"](llama().to(device)))


def test_explorers_show_the_same(device):
    """They take what they are given to the CPU, but for the model that writes."""

    def panels(move):
        layer = {"a": (move(50 * weight()), move(weight()))}
        model, letters = toy_model()
        return [
            explore_activations(layer),
            explore_awq(layer),
            explore_text(move(model), letters, ["The"]),
        ]

    for there, here in zip(
        panels(lambda each: each.to(device)), panels(lambda each: each), strict=True
    ):
        if not TRUE_GPU or there.controls.keys() != {"prompt", "method", "bits", "group_size"}:
            assert there.readout == here.readout
            assert there.alt == here.alt


def test_inputs_are_collected_on_the_cpu(device):
    there, here = (collect(llama().to(place), TOKENS, block=1) for place in (device, "cpu"))
    for name, inputs in here.items():
        assert there[name].device.type == "cpu"
        torch.testing.assert_close(there[name], inputs)


@pytest.mark.skipif(TRUE_GPU, reason="the stand-in is for those without")
def test_the_stand_in_is_strict(device):
    there, here = torch.ones(2, 3, device=device), torch.ones(2, 3)
    for mix in (lambda: there + here, lambda: there @ here.T, lambda: here[there.long()]):
        with pytest.raises(RuntimeError, match="mixes"):
            mix()
    with pytest.raises(RuntimeError, match="numpy"):
        there.numpy()
    assert torch.equal((there + there)[here[:, 0].long() - 1].cpu(), here + here)
    assert models.find_device("card") == torch.device("card")
