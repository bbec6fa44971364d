"""What `make bench-gpu` measures, with a CPU in the GPU's place."""

import pytest
import torch
from tiny import says

from tools import bench_gpu
from tools.formats import FORMATS

CPU = torch.device("cpu")
SHAPE = bench_gpu.LLAMA_2_7B | {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "vocab_size": 300,
}


def test_it_stops_where_there_is_no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match=says("no GPU")):
        bench_gpu.main()


@pytest.mark.parametrize(
    "kind", ["BF16", "INT8 weights, per channel, in bfloat16", "NF4, in bfloat16"]
)
def test_a_large_model_is_measured(kind):
    measured = bench_gpu.measure_large(kind, CPU, SHAPE)
    assert measured["ms_per_token"] > 0
    model = bench_gpu.large_model(CPU, SHAPE)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    whole = sum(p.nbytes for p in model.parameters()) / 1e6
    assert measured["weights_mb"] <= whole + 0.1
    assert (measured["weights_mb"] < 0.8 * whole) == (kind != "BF16")


def test_the_model_that_rows_are_made_from_stays_as_it_was():
    source = bench_gpu.large_model(CPU, SHAPE).float()
    before = {name: tensor.clone() for name, tensor in source.state_dict().items()}
    assert set(bench_gpu.ON_GPU) <= set(FORMATS)
    assert set(bench_gpu.LARGE) <= set(FORMATS)
    tokens = torch.randint(100, (2, 32), generator=torch.Generator().manual_seed(0))
    name = "INT4 affine, groups of 64"
    measured = bench_gpu.measure_row(name, source, None, tokens, source)
    assert measured["kl"]["value"] > 0
    assert all(torch.equal(source.state_dict()[name], old) for name, old in before.items())


def test_what_fails_says_why_and_costs_its_row_alone(capsys):
    def fails():
        raise RuntimeError("no kernel\nfor this")

    assert bench_gpu.attempt("a row", fails) == {"failed": "RuntimeError: no kernel"}
    assert "a row" in capsys.readouterr().out


def test_what_failed_is_named_below_the_table():
    failed = {"rows": {"NF4": {"failed": "RuntimeError: no kernel"}}}
    failed["environment"] = {"machine": "a GPU", "date": "2026-01-01", "versions": {"torch": "2"}}
    text = bench_gpu.table_section({"gpu/table": failed})
    assert "NF4 (RuntimeError: no kernel)" in text
    assert "| NF4" not in text
