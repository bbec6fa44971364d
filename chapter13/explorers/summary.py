"""The explorer of notebook 08: which rows a program loads and a memory holds, and the least KL."""

from dataclasses import dataclass
from functools import partial

import ipywidgets as widgets

from chapter13.explorers.base import Explorer, lines
from chapter13.memory import SHAPES
from chapter13.plots.summary import ChoiceFigure
from chapter13.summary import RUNS_ON, Choice, Row, choose, comparable

# the largest KL to accept, in nats per token on the embedded model
WISHES = {"any": float("inf"), "0.3": 0.3, "0.05": 0.05, "0.005": 0.005}


@dataclass(frozen=True)
class ChoiceView:
    """What `explore_choice` shows."""

    choice: Choice
    most_kl: float
    """The largest KL to accept, in nats per token."""
    title: str
    """The question: model, memory and program."""
    readout: str
    alt: str


def choice(
    rows: dict[str, Row], model: str, memory_gb: float, hardware: str, wish: str, context: int
) -> ChoiceView:
    """What `summary.choose` answers, in words."""
    shape, most_kl = SHAPES[model], WISHES[wish]
    made = choose(rows, shape, memory_gb, hardware, context, most_kl)
    best = made.best
    title = f"{model}, {memory_gb:g} GB, {hardware}"
    said = [("loaded there and fits", f"{len(made.fitting)} of {len(rows)} rows")]
    if best is None:
        why = "none of these rows fits" if not made.fitting else f"none has a KL of {wish} or less"
        said.append(("least KL among them", f"none: {why}"))
        alt = f"{title}: {why}."
    else:
        said += [
            ("least KL among them", f"{best.name}: {best.kl:.4f} on the embedded model"),
            (
                "takes",
                f"{made.takes_gb:.1f} of {memory_gb:g} GB, at {best.bits_per_weight:.2f} bits per "
                f"weight and with the cache of {context} tokens",
            ),
        ]
        alt = (
            f"{title}: of {len(made.fitting)} rows that fit, {best.name} has the least KL on the "
            f"embedded model; at {best.bits_per_weight:.2f} bits per weight it takes "
            f"{made.takes_gb:.1f} GB."
        )
        if made.note:
            said.append(("note", made.note))
    return ChoiceView(made, most_kl, title, lines(*said), alt)


def explore_choice(rows: dict[str, Row]):
    """A panel: model, memory, program, context and largest KL; which of the rows fit.

    rows: what `summary.rows` returns.
    """
    rows = comparable(rows)
    controls = {
        "model": widgets.Dropdown(options=list(SHAPES), value="Llama-2-7B", description="model"),
        "hardware": widgets.Dropdown(options=list(RUNS_ON), description="program"),
        "memory_gb": widgets.SelectionSlider(
            options=[1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 80, 141],
            value=8,
            description="memory for the model (GB)",
        ),
        "context": widgets.SelectionSlider(
            options=[1024, 2048, 4096, 8192, 16384, 32768], value=4096, description="context"
        ),
        "wish": widgets.SelectionSlider(options=list(WISHES), description="largest KL"),
    }
    return Explorer(controls, partial(choice, rows), ChoiceFigure(rows))
