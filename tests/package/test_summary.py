"""The rows of the summary: which no other beats, which fit; and the explorer around them."""

import itertools

import pytest
import torch
from tiny import says

from chapter13 import memory, summary
from chapter13.evaluate import Score
from chapter13.explorers.summary import WISHES, choice, explore_choice
from chapter13.plots.summary import ChoiceFigure

SHAPE = memory.SHAPES["Llama-2-7B"]


def row(name, bits, kl, family="affine"):
    losses = torch.tensor([kl, kl]).double()
    return summary.Row(
        name=name,
        family=family,
        bits_per_weight=bits,
        size_mb=100.0,
        quantize_s=1.0,
        quantize_peak_mb=500,
        tokens_per_s=None,
        run_peak_mb=None,
        perplexity=Score(torch.log(torch.tensor([20.0, 20.0])).double(), exponential=True),
        kl=Score(losses),
        machine="a machine",
        date="2026-01-01",
    )


def table(*rows):
    return {each.name: each for each in rows}


def record(kl):
    environment = {"machine": "a machine", "date": "2026-01-01"}
    score = {"losses": [kl, 2 * kl]}
    cost = dict.fromkeys(("bits_per_weight", "size_mb", "quantize_s", "quantize_peak_mb"), 4.5) | {
        "tokens_per_s": None,
        "run_peak_mb": None,
    }
    quality = {"perplexity": score, "kl": score, "environment": environment}
    return {"family": "affine", "cost": cost, "quality": quality}


def test_studies_are_no_rows(monkeypatch):
    records = {"table/a": record(0.1), "study/1 x news": record(0.4), "bench/int8": {}}
    assert {name: score.value for name, score in summary.studies(records).items()} == {
        "1 x news": pytest.approx(0.6)
    }
    assert list(summary.rows(records)) == ["a"]
    monkeypatch.setattr(summary.results, "load", lambda: records)
    assert summary.row("a").kl.value == pytest.approx(0.15)
    with pytest.raises(ValueError, match="'b'.*a"):
        summary.row("b")


def test_rows_of_records():
    halves = record(0.3)
    del halves["cost"]
    found = summary.rows({"table/a": record(0.1), "table/half": halves, "bench/int8": {}})
    assert list(found) == ["a"]
    assert found["a"].kl.value == pytest.approx(0.15)
    assert not found["a"].kl.exponential
    assert found["a"].perplexity.exponential
    with pytest.raises(ValueError, match=says("make results")):
        summary.rows({"bench/int8": {}})


def test_the_front():
    rows = table(
        row("small", 2, 1.0),
        row("larger and worse", 3, 1.5),
        row("larger and no better", 3.5, 1.0),
        row("same bits, worse", 4, 0.4),
        row("better", 4, 0.3),
        row("best", 8, 0.0),
        row("no better than the best", 16, 0.0),
    )
    assert [each.name for each in summary.front(rows)] == ["small", "better", "best"]


def test_no_row_beats_the_measured_front():
    rows = summary.rows()
    front = summary.front(rows)
    for each in rows.values():
        beaten = [
            other
            for other in rows.values()
            if other.bits_per_weight <= each.bits_per_weight and other.kl.value < each.kl.value
        ]
        assert not (beaten and each in front), each.name
        if each not in front:
            assert any(
                f.bits_per_weight <= each.bits_per_weight and f.kl.value <= each.kl.value
                for f in front
            ), each.name


def test_memory_needed_is_that_of_notebook_00():
    """The same formats as `memory.weight_bytes` counts, with its bits per weight."""
    sizes = memory.weight_bytes(SHAPE, "int4", 64)
    bits = (
        8
        * (sizes["codes"] + sizes["scales"])
        / sum(out * in_ * SHAPE.layers for out, in_ in SHAPE.linears())
    )
    expected = (sum(sizes.values()) + memory.kv_cache_bytes(SHAPE, 4096)) / 1e9
    assert summary.needed_gb(SHAPE, bits, 4096) == pytest.approx(expected, rel=1e-12)
    parts = memory.parameters(SHAPE)
    others = parts["embeddings"] + parts["norms"] + parts["head"]
    smaller = summary.needed_gb(SHAPE, bits, 4096, other_bits=8)
    assert expected - smaller == pytest.approx(others / 1e9, rel=1e-9)


def test_a_choice():
    rows = table(
        row("GGUF Q8_0", 8.5, 0.001),
        row("GGUF Q4_1", 5, 0.2),
        row("GGUF Q4_0", 4.5, 0.201),
        row("GGUF MXFP4", 4.25, 0.5),
        row("GGUF Q4_1, as it came", 5, 0.0),
        row("AWQ INT4, groups of 64", 4.3, 0.1),
    )
    hardware = summary.LLAMA_CPP
    roomy = summary.choose(rows, SHAPE, 24, hardware)
    assert roomy.best.name == "GGUF Q8_0"
    assert [each.name for each in roomy.fitting] == ["GGUF Q8_0", "GGUF Q4_1", "GGUF Q4_0"]
    # of two that lose nearly the same, the smaller; embeddings and head count as Q8_0
    chosen = summary.choose(rows, SHAPE, 7.5, hardware)
    assert chosen.best.name == "GGUF Q4_0"
    assert chosen.takes_gb == summary.needed_gb(SHAPE, 4.5, 4096, 8.5)
    assert chosen.note == ""
    assert summary.choose(rows, SHAPE, 7.5, hardware, most_kl=0.01).best is None
    tight = summary.choose(rows, SHAPE, 2, hardware)
    assert (tight.fitting, tight.best, tight.takes_gb, tight.note) == ([], None, None, "")
    assert tight.most_bits < 2
    assert summary.choose(rows, SHAPE, 24, summary.VLLM).best.name.startswith("AWQ")
    noted = summary.choose(table(row("GPTQ INT4, groups of 64", 4.3, 0.2)), SHAPE, 24, summary.VLLM)
    assert "symmetric only" in noted.note
    with pytest.raises(ValueError, match=says("hardware", summary.VLLM, "'toaster'")):
        summary.choose(rows, SHAPE, 24, "toaster")


def test_the_wall_stands_where_the_memory_is_full():
    rows = table(row("GGUF Q4_1", 5, 0.2))
    full = summary.needed_gb(SHAPE, 5, 4096, 8.5)
    made = summary.choose(rows, SHAPE, full, summary.LLAMA_CPP)
    assert made.most_bits == pytest.approx(5, rel=1e-12)
    assert made.fitting


def test_every_machine_runs_some_measured_rows():
    names = summary.rows()
    for starts in summary.RUNS_ON.values():
        for start in starts:
            assert any(name.startswith(start) for name in names), start
    for program, start in summary.NOTES:
        assert any(each.startswith(start) for each in summary.RUNS_ON[program]), start


def test_the_file_that_the_model_came_in_is_not_compared():
    rows = table(row("GGUF Q4_1", 5, 0.2), row(summary.AS_IT_CAME, 5, 0.0))
    assert list(summary.comparable(rows)) == ["GGUF Q4_1"]
    assert summary.AS_IT_CAME in summary.rows()


@pytest.mark.slow
def test_the_panel_over_its_whole_grid():
    rows = summary.comparable(summary.rows())
    panel = explore_choice(summary.rows())
    options = {
        name: [value[1] if isinstance(value, tuple) else value for value in control.options]
        for name, control in panel.controls.items()
    }
    figure = ChoiceFigure(rows)
    for settings in itertools.product(*options.values()):
        view = choice(rows, **dict(zip(options, settings, strict=True)))
        best = view.choice.best
        assert view.alt
        if best is None:
            assert "none: " in view.readout
        else:
            assert best in view.choice.fitting
            assert best.kl.value <= view.most_kl
            assert best.name in view.readout
            assert best.bits_per_weight <= view.choice.most_bits
            assert view.choice.note in view.readout.replace("\n", " ")
            assert view.choice.takes_gb <= settings[list(options).index("memory_gb")]
    figure.update(view)
    assert figure.pixels().std() > 0
    text = panel.set(memory_gb=1)
    assert "none of these rows fits" in text
    assert set(WISHES) == set(options["wish"])
    panel.close()
