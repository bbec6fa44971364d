"""Error measures against numpy in float64, and sizes against saved files."""

import math

import numpy as np
import pytest
import torch
from tiny import says, tiny_gpt2

from chapter13 import model_size_mb, quantize_absmax, quantize_model
from chapter13.measures import max_abs_error, mse, relative_rmse, sqnr_db
from chapter13.memory import memory_breakdown

MEASURES = [mse, max_abs_error, relative_rmse, sqnr_db]


@pytest.fixture
def pair():
    weight = torch.randn(50, 64, generator=torch.Generator().manual_seed(0))
    return weight, quantize_absmax(weight, 4, 16).dequantize()


def test_against_numpy(pair):
    a, b = (x.double().numpy() for x in pair)
    # our difference is rounded to float32: 2**-24 of each difference
    near = {"rel": 1e-6}
    assert mse(*pair) == pytest.approx(np.mean((a - b) ** 2), **near)
    assert max_abs_error(*pair) == pytest.approx(np.abs(a - b).max(), **near)
    ratio = np.linalg.norm(a - b) / np.linalg.norm(a)
    assert relative_rmse(*pair) == pytest.approx(ratio, **near)
    assert sqnr_db(*pair) == pytest.approx(-20 * np.log10(ratio), **near)
    assert all(type(measure(*pair)) is float for measure in MEASURES)


def test_values_known_by_heart():
    reference, approximation = torch.tensor([3.0, 4.0]), torch.tensor([3.0, 3.0])
    assert mse(reference, approximation) == 0.5
    assert max_abs_error(reference, approximation) == 1.0
    assert max_abs_error(approximation, reference) == 1.0
    assert relative_rmse(reference, approximation) == pytest.approx(0.2, rel=1e-15)
    assert sqnr_db(reference, approximation) == pytest.approx(13.9794, abs=1e-4)
    assert mse(reference[:, None], approximation[:, None]) == 0.5


def test_no_error_and_no_signal():
    weight, zero = torch.ones(3), torch.zeros(3)
    assert (mse(weight, weight), max_abs_error(weight, weight)) == (0.0, 0.0)
    assert relative_rmse(weight, weight) == relative_rmse(zero, zero) == 0.0
    assert sqnr_db(weight, weight) == sqnr_db(zero, zero) == math.inf
    assert relative_rmse(zero, weight) == math.inf
    assert sqnr_db(zero, weight) == -math.inf


def test_huge_and_half_precision_values_do_not_overflow():
    for dtype, large in ((torch.float32, 1e30), (torch.float16, 60000.0)):
        a, b = torch.full((4,), large, dtype=dtype), torch.full((4,), -large, dtype=dtype)
        exact = 2 * a[0].double().item()
        assert max_abs_error(a, b) == pytest.approx(exact, rel=1e-7)
        assert mse(a, b) == pytest.approx(exact**2, rel=1e-6)
        assert relative_rmse(a, b) == pytest.approx(2.0, rel=1e-6)


@pytest.mark.parametrize("measure", MEASURES)
def test_shapes_must_agree(measure):
    with pytest.raises(ValueError, match=says("(4, 1)", "(4,)")):
        measure(torch.ones(4, 1), torch.ones(4))
    with pytest.raises(ValueError, match=says("empty")):
        measure(torch.ones(0), torch.ones(0))


def saved_bytes(model, tmp_path):
    """Bytes of the saved weights, without the zip file's frame."""
    torch.save(model.state_dict(), tmp_path / "model.pt")
    empty = torch.nn.Module()
    torch.save(empty.state_dict(), tmp_path / "empty.pt")
    return (tmp_path / "model.pt").stat().st_size - (tmp_path / "empty.pt").stat().st_size


def chapter_model():
    nn = torch.nn
    return nn.Sequential(
        nn.Linear(512, 2048),
        nn.ReLU(),
        nn.Linear(2048, 2048),
        nn.ReLU(),
        nn.Linear(2048, 512),
    )


def test_size_of_the_chapters_model(tmp_path):
    model = chapter_model()
    parameters = 512 * 2048 + 2048 + 2048 * 2048 + 2048 + 2048 * 512 + 512
    assert model_size_mb(model) == parameters * 4 / 1e6
    assert model_size_mb(model.bfloat16()) == parameters * 2 / 1e6
    assert model_size_mb(model) * 1e6 == pytest.approx(saved_bytes(model, tmp_path), rel=0.01)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_size_of_a_dynamically_quantized_model(tmp_path):
    model = torch.ao.quantization.quantize_dynamic(chapter_model(), {torch.nn.Linear})
    assert sum(p.numel() for p in model.parameters()) == 0  # what the chapter's sum sees
    size = model_size_mb(model)
    weights, biases = 512 * 2048 * 2 + 2048 * 2048, 2048 * 2 + 512
    # a byte for each weight, float32 biases, and the scales and zero points of the activations
    assert weights + 4 * biases <= size * 1e6 <= weights + 4 * biases + 3 * 32
    assert size * 1e6 == pytest.approx(saved_bytes(model, tmp_path), rel=0.01)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_size_counts_a_scale_and_zero_point_for_each_channel(tmp_path):
    per_channel = torch.ao.quantization.per_channel_dynamic_qconfig
    model = torch.nn.Sequential(torch.nn.Linear(512, 2048, bias=False))
    quantized = torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear: per_channel})
    # a byte for each weight, a float64 scale and an int64 zero point for each channel
    exact = 512 * 2048 + 2048 * 16
    assert exact <= model_size_mb(quantized) * 1e6 <= exact + 32
    assert model_size_mb(quantized) * 1e6 == pytest.approx(
        saved_bytes(quantized, tmp_path), rel=0.01
    )


def test_size_counts_tied_memory_once_and_buffers():
    model = torch.nn.Module()
    model.embedding = torch.nn.Embedding(100, 16)
    model.head = torch.nn.Linear(16, 100, bias=False)
    assert model_size_mb(model) == 2 * 100 * 16 * 4 / 1e6
    model.head.weight = model.embedding.weight
    assert model_size_mb(model) == 100 * 16 * 4 / 1e6
    model.register_buffer("codes", torch.zeros(1000, dtype=torch.uint8))
    assert model_size_mb(model) == (100 * 16 * 4 + 1000) / 1e6


def test_size_of_a_tensor_made_of_tensors():
    torchao = pytest.importorskip("torchao.quantization", reason="needs torchao")
    model = torch.nn.Sequential(torch.nn.Linear(256, 128, bias=False))
    torchao.quantize_(model, torchao.Int8WeightOnlyConfig())
    size = model_size_mb(model) * 1e6
    # a byte for each weight and a float32 scale for each row; zero points may come on top
    assert 256 * 128 + 128 * 4 <= size <= 256 * 128 + 128 * 4 * 3


def test_breakdown_by_part():

    model = tiny_gpt2()
    linears = 2 * (64 * 192 + 64 * 64 + 2 * 64 * 256) * 4
    embeddings = (100 + 32) * 64 * 4  # the head is the token embeddings once more
    rest = (2 * (192 + 64 + 256 + 64) + 5 * 2 * 64) * 4
    expected = {"linears": linears, "scales": 0, "embeddings": embeddings, "rest": rest}
    assert memory_breakdown(model) == expected
    assert model_size_mb(model) == sum(expected.values()) / 1e6
    assert memory_breakdown(model.bfloat16()) == {key: n // 2 for key, n in expected.items()}

    quantize_model(model, "nf4", progress=False)
    quantized = memory_breakdown(model)
    assert quantized["linears"] == linears // 8
    assert quantized["scales"] == linears // 4 // 64 * 4
    assert quantized["embeddings"] == embeddings // 2


@pytest.mark.filterwarnings("ignore:.*torch.ao.quantization is deprecated.*")
def test_breakdown_of_other_libraries():
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    def model():
        return torch.nn.Sequential(torch.nn.Embedding(10, 64), torch.nn.Linear(64, 32))

    dynamic = torch.ao.quantization.quantize_dynamic(model(), {torch.nn.Linear})
    # codes; a scale and a zero point beside; torch.ao keeps the bias with the codes
    breakdown = memory_breakdown(dynamic)
    assert breakdown["linears"] == 64 * 32
    assert breakdown["embeddings"] == 10 * 64 * 4
    assert breakdown["scales"] + breakdown["rest"] <= 32 * 4 + 16
    ao = model()
    quantize_(ao, Int8DynamicActivationInt8WeightConfig())
    breakdown = memory_breakdown(ao)
    assert breakdown["linears"] == 64 * 32
    assert 32 * 4 <= breakdown["scales"] <= 32 * 4 + 32 * 4  # zero points may come on top
    assert breakdown["rest"] == 32 * 4
