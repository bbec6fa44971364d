"""GPTQ of whole models: what reaches which layer, resumed, undone, and better than rounding."""

import re
import warnings
import weakref

import pytest
import torch
from tiny import MODELS, TOKENS, says, tiny, tiny_gpt2, tiny_llama

from chapter13 import (
    corpus,
    evaluate,
    gptq,
    models,
    quantize_affine,
    quantize_model,
)
from chapter13.quantize import report
from chapter13.whole_model import awq_block, blockwise
from chapter13.whole_model import walk as walking
from chapter13.whole_model.layers import linear_layers, weight_of
from chapter13.whole_model.linear import QuantizedLinear, quantized_layers

SMALL = {"bits": 4, "group_size": 16, "calibration": TOKENS, "progress": False}
# 72 tokens are too few for the 96 inputs of the widest layer, which is said, and no matter here
pytestmark = pytest.mark.filterwarnings("ignore:.*calibration tokens span")


def state(model):
    """What a model is made of: its modules' types, and its tensors, copied."""
    kinds = {name: type(module) for name, module in model.named_modules()}
    return kinds, {name: value.clone() for name, value in model.state_dict().items()}


def assert_same(model, before):
    kinds, tensors = state(model)
    assert kinds == before[0]
    assert tensors.keys() == before[1].keys()
    for name, value in tensors.items():
        assert torch.equal(value, before[1][name]), name


@pytest.mark.parametrize("name", MODELS)
def test_every_linear_layer_of_the_blocks(name):
    model, reference = MODELS[name](), MODELS[name]()
    place, found = walking.find_blocks(reference)
    assert quantize_model(model, "gptq", **SMALL) is model
    for layer, old in linear_layers(found).items():
        new = model.get_submodule(f"{place}.{layer}")
        assert isinstance(new, QuantizedLinear)
        assert new.quantized.shape == weight_of(old).shape
    assert not linear_layers(model.get_submodule(place))
    with torch.no_grad():
        before, after = reference(TOKENS).logits, model(TOKENS).logits
    assert 0 < (after - before).norm() < 0.5 * before.norm()


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
@pytest.mark.parametrize("at_once", [4096, 24])
def test_each_layer_learns_from_quantized_inputs(make, at_once, monkeypatch):
    """Layer by layer by hand: the Hessian of a model whose earlier layers are quantized already."""
    monkeypatch.setattr(walking, "TOKENS_AT_ONCE", at_once)
    solve, solved = gptq.quantize, []

    def recorded(weight, hessian, **options):
        solved.append((weight, hessian, solve(weight, hessian, **options)))
        return solved[-1][2]

    monkeypatch.setattr(gptq, "quantize", recorded)
    model = quantize_model(make(), "gptq", **SMALL)

    by_hand = make()
    place, found = walking.find_blocks(by_hand)
    groups = walking.Walk(make(), TOKENS).groups(0)
    for index, block in enumerate(found):
        for group in groups:
            seen = []
            hook = block.get_submodule(group[0]).register_forward_pre_hook(
                lambda _, args, seen=seen: seen.append(args[0])
            )
            with torch.no_grad():
                by_hand(TOKENS)
            hook.remove()
            x = seen[0].reshape(-1, seen[0].shape[-1])
            expected = gptq.hessian(x)
            # Sequences that pass in other batches take other kernels: x differs by 1e-4 of its
            # largest magnitude at the most (see test_blocks), each product of two by twice that.
            bound = 2 * 2e-4 * x.abs().max() ** 2
            weight, H, quantized = solved.pop(0)
            modules = [block.get_submodule(layer) for layer in group]
            assert torch.equal(weight, torch.cat([weight_of(module) for module in modules]))
            assert (H - expected).abs().max() <= bound
            # one after the other, the layers hold what the solver made of their common matrix
            found_rows = 0
            for layer, module in zip(group, modules, strict=True):
                ours = model.get_submodule(f"{place}.{index}.{layer}").quantized
                rows = slice(found_rows, found_rows + ours.shape[0])
                found_rows += ours.shape[0]
                assert torch.equal(ours.codes(), quantized.codes()[rows])
                assert torch.equal(ours.scale, quantized.scale[rows])
                assert torch.equal(ours.zero_point, quantized.zero_point[rows])
                blockwise.put_weight(module, ours.dequantize())
            assert found_rows == quantized.shape[0]
    assert not solved


def test_layers_outside_the_blocks_stay():
    model = tiny("OPT", ffn_dim=96, word_embed_proj_dim=32)
    outside = {name for name in linear_layers(model) if ".layers." not in name}
    assert outside == {"model.decoder.project_out", "model.decoder.project_in"}
    quantize_model(model, "gptq", **SMALL)
    assert set(linear_layers(model)) == outside
    assert "not quantized: Linear in float32, 2 tensors" in report(model)


class Interrupted(KeyboardInterrupt):
    pass


# called once for layers with the same input, and once a layer
SOLVERS = {"gptq": (gptq, "quantize"), "awq": (awq_block, "quantize_affine")}
CALLS = {("gptq", tiny_llama): 4, ("gptq", tiny_gpt2): 4, ("awq", tiny_llama): 7}  # of a block
CALLS["awq", tiny_gpt2] = 4


def interrupt_at(monkeypatch, method, call):
    """Makes the `call`-th call of a method's solver end like Ctrl-C."""
    module, name = SOLVERS[method]
    solve, calls = getattr(module, name), []

    def counted(*args, **kwargs):
        calls.append(1)
        if len(calls) == call:
            raise Interrupted
        return solve(*args, **kwargs)

    monkeypatch.setattr(module, name, counted)
    return calls


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
@pytest.mark.parametrize("resume", [False, True])
@pytest.mark.parametrize("call", [1, 4, 7])
@pytest.mark.parametrize("method", SOLVERS)
@pytest.mark.slow
def test_an_interrupted_model_is_as_it_was(method, make, resume, call, monkeypatch, tmp_path):
    model = make()
    before = state(model)
    parameters = dict(model.named_parameters())
    interrupt_at(monkeypatch, method, call)
    with pytest.raises(Interrupted):
        quantize_model(model, method, resume=tmp_path / "run" if resume else None, **SMALL)
    assert_same(model, before)
    for name, parameter in model.named_parameters():
        assert parameter is parameters[name]
    monkeypatch.undo()
    quantize_model(model, method, **SMALL)  # and it can be quantized after all


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", SOLVERS)
@pytest.mark.slow
def test_a_resumed_run_gives_what_an_unbroken_one_gives(method, make, dtype, monkeypatch, tmp_path):
    unbroken = quantize_model(make().to(dtype), method, **SMALL)
    run = tmp_path / "run"
    calls_of_a_block = CALLS[method, make]
    interrupt_at(monkeypatch, method, calls_of_a_block + 2)
    with pytest.raises(Interrupted):
        quantize_model(make().to(dtype), method, resume=run, **SMALL)
    monkeypatch.undo()
    assert sorted(path.name for path in run.iterdir()) == ["block-0000.safetensors", "run.json"]

    calls = interrupt_at(monkeypatch, method, 99)
    resumed = quantize_model(make().to(dtype), method, resume=run, **SMALL)
    assert len(calls) == calls_of_a_block  # the first block was not solved again
    assert_same(resumed, state(unbroken))

    calls.clear()
    again = quantize_model(make().to(dtype), method, resume=run, **SMALL)
    assert not calls
    assert_same(again, state(unbroken))


@pytest.mark.parametrize(
    "change",
    [
        {"bits": 3},
        {"group_size": 8},
        {"act_order": False},
        {"calibration": TOKENS.flip(0)},
        {"calibration": TOKENS[:3]},
    ],
    ids=str,
)
def test_another_run_does_not_take_up_these_blocks(change, tmp_path):
    quantize_model(tiny_llama(), "gptq", resume=tmp_path / "run", **SMALL)
    with pytest.raises(ValueError, match=says("run", "another run")):
        quantize_model(tiny_llama(), "gptq", resume=tmp_path / "run", **(SMALL | change))
    other = tiny_llama()
    other.model.layers[1].mlp.up_proj.weight.data[0, 0] += 1
    before = state(other)
    with pytest.raises(ValueError, match=says("run", "another run")):
        quantize_model(other, "gptq", resume=tmp_path / "run", **SMALL)
    assert_same(other, before)


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("all of it")
    with pytest.raises(ValueError, match=says("not empty", tmp_path)):
        quantize_model(tiny_llama(), "gptq", resume=tmp_path, **SMALL)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_damaged_block_is_named_and_nothing_is_changed(tmp_path):
    run = tmp_path / "run"
    quantize_model(tiny_llama(), "gptq", resume=run, **SMALL)
    file = run / "block-0001.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    model = tiny_llama()
    before = state(model)
    with pytest.raises(ValueError, match=says("block-0001.safetensors")):
        quantize_model(model, "gptq", resume=run, **SMALL)
    assert_same(model, before)


def test_training_mode_comes_back():
    model = tiny_gpt2().train()
    quantize_model(model, "gptq", **SMALL)
    assert model.training


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"calibration": None}, ValueError, says("gptq", "calibration")),
        ({"calibration": TOKENS.float()}, TypeError, says("calibration", "tokens", "integer")),
        ({"calibration": TOKENS + 50}, ValueError, says("calibration", 149, "0 to 99")),
        ({"group_size": 24}, ValueError, says(24, "does not divide", "in_features", 64)),
        ({"group_size": None}, ValueError, says("GPTQ", 'group_size="channel"')),
        ({"bits": 1}, ValueError, says("bits", "2 to 8", 1)),
        ({"damp": -1}, ValueError, says("damp", 0, "-1")),
        ({"grid": 3}, TypeError, says("'grid'")),
    ],
)
def test_bad_arguments_leave_the_model(arguments, error, message):
    model = tiny_llama()
    before = state(model)
    with pytest.raises(error, match=message):
        quantize_model(model, "gptq", **(SMALL | arguments))
    assert_same(model, before)


def test_nan_in_the_model_is_named_by_layer():
    model = tiny_llama()
    model.model.layers[1].self_attn.o_proj.weight.data[3, 4] = torch.nan
    with pytest.raises(ValueError, match=says("model.layers.1.self_attn.o_proj", "[3, 4]")):
        quantize_model(model, "gptq", **SMALL)


@pytest.mark.filterwarnings("default:.*calibration tokens span")
def test_too_few_tokens_are_said_once():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        quantize_model(tiny_llama(), "gptq", **(SMALL | {"calibration": TOKENS[:1]}))
    (warning,) = caught
    assert re.search(r"12 calibration tokens span \d+ of 64 dimensions", str(warning.message))
    assert warning.filename == __file__


# --- the real model --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cut():
    """Makes the embedded model's first four blocks, and its tokenizer."""
    _, tokenizer = models.load()

    def make():
        model, _ = models.load()
        del model.model.layers[4:]
        model.config.num_hidden_layers = 4
        return model

    return make, tokenizer


@pytest.mark.slow
def test_real_layers_lose_less_than_by_rounding(cut):
    make, tokenizer = cut
    tokens = corpus.calibration_tokens(tokenizer, 8, 256)
    ratios = []

    def compare(walk, index, done):
        """GPTQ as ever, and the loss of both ways on the inputs that GPTQ saw."""
        originals = {
            name: weight_of(layer) for name, layer in linear_layers(walk.blocks[index]).items()
        }
        hessians = []
        hessian = gptq.hessian
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(gptq, "hessian", lambda x: hessians.append(hessian(x)) or hessians[-1])
            quantized = blockwise.gptq_block(walk, index, done)
        for names, H in zip(walk.groups(index), hessians, strict=True):
            for name in names:
                weight = originals[name]
                nearest = quantize_affine(weight, 4, 64).dequantize()
                ours = gptq.layer_loss(weight, quantized[name].dequantize(), H)
                ratios.append(ours / gptq.layer_loss(weight, nearest, H))
        return quantized

    blockwise.quantize_blocks(make(), tokens, compare, {"method": "compare"}, progress=False)
    assert len(ratios) == 28
    assert max(ratios) < 1


@pytest.mark.slow
def test_the_real_model_is_nearer_to_full_precision(cut):
    make, tokenizer = cut
    calibration = corpus.calibration_tokens(tokenizer, 8, 256)
    tokens = corpus.evaluation_tokens(tokenizer, 24, 128)
    full = make()
    nearest = quantize_model(make(), "affine", progress=False)
    ours = quantize_model(make(), "gptq", calibration=calibration, progress=False)
    searched = quantize_model(
        make(), "gptq", calibration=calibration, clip_search=True, progress=False
    )
    kl = [
        evaluate.kl_divergence(model, full, tokens, progress=False)
        for model in (nearest, ours, searched)
    ]
    # the paired interval leaves out 0
    assert evaluate.difference(kl[0], kl[1]).interval[0] > 0
    assert evaluate.difference(kl[1], kl[2]).interval[0] > 0


def test_a_finished_block_leaves_no_full_weights(monkeypatch, tmp_path):
    """With 16 bits on disk, a dequantized copy kept for each block would be the whole memory."""
    put, written = blockwise.put_weight, []

    def watched(layer, weight):
        put(layer, weight)
        alive = [name for name, left in written if left() is not None]
        assert len(alive) < 7, alive  # at most those of this block
        written.append((len(written), weakref.ref(layer.weight)))

    monkeypatch.setattr(blockwise, "put_weight", watched)
    quantize_model(tiny_llama(), "gptq", resume=tmp_path / "run", **SMALL)
    assert len(written) == 14
    assert all(left() is None for _, left in written)


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
@pytest.mark.parametrize("method", ["absmax", "affine", "nf4", "fp4"])
def test_rounding_goes_block_by_block_too(make, method, monkeypatch, tmp_path):
    """With a folder the same tensors as without; interrupted, resumed; and no other run's."""
    options = {"bits": 4, "group_size": 16, "progress": False}
    expected = state(quantize_model(make().bfloat16(), method, **options))
    save, saved = blockwise.save_quantized, []

    def once(block, file):
        if saved:
            raise Interrupted
        saved.append(file)
        save(block, file)

    monkeypatch.setattr(blockwise, "save_quantized", once)
    model, run = make().bfloat16(), tmp_path / "run"
    before = state(model)
    with pytest.raises(Interrupted):
        quantize_model(model, method, resume=run, **options)
    assert_same(model, before)
    assert [file.name for file in saved] == ["block-0000.safetensors"]
    monkeypatch.setattr(blockwise, "save_quantized", save)
    stamp = saved[0].stat().st_mtime_ns
    assert_same(quantize_model(model, method, resume=run, **options), expected)
    assert saved[0].stat().st_mtime_ns == stamp
    for change in {"group_size": 8}, {"method": "affine" if method == "absmax" else "absmax"}:
        with pytest.raises(ValueError, match=says("run", "another run")):
            quantize_model(make(), **({"method": method, "resume": run} | options | change))


def test_rounding_block_by_block_leaves_nothing_out(tmp_path):
    model = tiny("OPT", ffn_dim=96, word_embed_proj_dim=32)
    with pytest.raises(ValueError, match=says("2 linear layers", "model.decoder.project_out")):
        quantize_model(model, "absmax", group_size=16, progress=False, resume=tmp_path / "run")
    assert not (tmp_path / "run").exists()


# ---------------------------------------------------------------- other architectures


SHAPE = {"vocab_size": 100, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}


def falcon():
    """Its linear layers are a subclass of its own; attention and MLP compute side by side."""
    from transformers import FalconConfig, FalconForCausalLM

    torch.manual_seed(13)
    return FalconForCausalLM(FalconConfig(**SHAPE, multi_query=True, alibi=False)).eval()


def bamba():
    """A hybrid: its blocks of state space and of attention have one class and other masks."""
    from transformers import BambaConfig, BambaForCausalLM

    sizes = {"mamba_n_heads": 32, "mamba_d_head": 4, "mamba_d_state": 16, "mamba_n_groups": 1}
    config = BambaConfig(
        **SHAPE, **sizes, intermediate_size=96, num_key_value_heads=2, attn_layer_indices=[1]
    )
    torch.manual_seed(13)
    return BambaForCausalLM(config).eval()


def mamba():
    """Its code reads `dt_proj.weight` instead of calling the layer."""
    from transformers import MambaConfig, MambaForCausalLM

    config = MambaConfig(
        vocab_size=100, hidden_size=64, num_hidden_layers=2, time_step_rank=16, state_size=8
    )
    torch.manual_seed(13)
    return MambaForCausalLM(config).eval()


@pytest.mark.parametrize(
    ("make", "method", "resume"),
    [(make, "affine", resume) for make in (falcon, bamba, mamba) for resume in (False, True)]
    + [(falcon, "gptq", True), (bamba, "gptq", True)],
)
def test_other_architectures_compute_with_their_quantized_layers(make, method, resume, tmp_path):
    model, reference = make(), make()
    options = {"calibration": TOKENS} if method == "gptq" else {}
    folder = tmp_path / "run" if resume else None
    quantize_model(model, method, 8, 16, progress=False, resume=folder, **options)
    quantized = linear_layers(model), quantized_layers(model)
    assert (len(quantized[0]), len(quantized[1])) == (0, len(linear_layers(reference)))
    for name, layer in linear_layers(reference).items():
        blockwise.put_weight(layer, model.get_submodule(name).weight)
    ours, expected = (each(TOKENS).logits for each in (model, reference))
    # the same weights; products of a few rows are summed in another order
    assert (ours - expected).abs().max() <= 1e-4 * expected.abs().max()


def test_layers_that_are_never_called_cannot_learn():
    model = mamba()
    before = state(model)
    with pytest.raises(ValueError, match=says("mixer.dt_proj", "affine", "nf4")):
        quantize_model(model, "gptq", 4, 16, calibration=TOKENS, progress=False)
    assert_same(model, before)


@pytest.mark.parametrize("method", ["gptq", "affine"])
@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (
            AttributeError("no such thing"),
            says("model.layers.0", "LlamaDecoderLayer", "no such thing"),
        ),
        (None, says("model.layers.0", "NaN", "Inf")),
    ],
)
def test_a_block_that_does_not_compute_is_found_at_once(
    fault, message, method, monkeypatch, tmp_path
):
    def broken(self, x):
        if fault:
            raise fault
        return x.new_full((*x.shape[:-1], self.out_features), torch.nan)

    model = tiny_llama()
    before = state(model)
    monkeypatch.setattr(QuantizedLinear, "forward", broken)
    options = {"calibration": TOKENS} if method == "gptq" else {}
    with pytest.raises(ValueError, match=message):
        quantize_model(model, method, 4, 16, progress=False, resume=tmp_path / "run", **options)
    assert not list((tmp_path / "run").glob("block-*"))
    assert_same(model, before)


def test_experts_in_one_tensor_are_refused_before_any_work(tmp_path):
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    config = Qwen3MoeConfig(
        **SHAPE, moe_intermediate_size=32, num_experts=4, num_key_value_heads=2, head_dim=16
    )
    model = Qwen3MoeForCausalLM(config)
    for folder in (None, tmp_path / "run"):
        with pytest.raises(ValueError, match=says("experts.gate_up_proj", "4 experts")):
            quantize_model(model, "absmax", 4, 16, progress=False, resume=folder)
    assert not list(tmp_path.iterdir())
