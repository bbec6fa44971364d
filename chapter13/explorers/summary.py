"""The explorer of notebook 08: what to use, for a model, a memory, a machine and a wish."""

from dataclasses import dataclass
from functools import partial

import ipywidgets as widgets

from chapter13.explorers.base import Explorer, lines
from chapter13.memory import SHAPES
from chapter13.plots.summary import ChoiceFigure
from chapter13.summary import RUNS_ON, Choice, Row, choose, needed_gb

# nats per token on the embedded model, which loses more than a larger one
WISHES = {"whatever fits": 30.0, "close": 0.3, "very close": 0.05, "hardly different": 0.005}


@dataclass(frozen=True)
class ChoiceView:
    """What `explore_choice` shows."""

    choice: Choice
    most_kl: float
    """The wish, in nats per token."""
    readout: str
    alt: str


def choice(
    rows: dict[str, Row], model: str, memory_gb: float, hardware: str, wish: str, context: int
) -> ChoiceView:
    """What `summary.choose` says, in words."""
    shape, most_kl = SHAPES[model], WISHES[wish]
    made = choose(rows, shape, memory_gb, hardware, context, most_kl)
    best = made.best
    said = [("runs here and fits", f"{len(made.fitting)} of {len(rows)} rows")]
    if best is None:
        why = "nothing fits" if not made.fitting else "what fits is not that good"
        said.append(("use", f"none: {why} with {memory_gb:g} GB"))
        alt = f"{model} in {memory_gb:g} GB on {hardware}: {why}."
    else:
        takes = needed_gb(shape, best.bits_per_weight, context)
        said += [
            ("use", f"{best.name}: {best.bits_per_weight:.2f} bits per weight"),
            ("takes", f"{takes:.1f} of {memory_gb:g} GB, the cache of {context} tokens included"),
            ("lost on the embedded model", f"{best.kl:.4f} nats per token"),
        ]
        alt = (
            f"{model} in {memory_gb:g} GB on {hardware}: {best.name} at "
            f"{best.bits_per_weight:.2f} bits per weight takes {takes:.1f} GB."
        )
    return ChoiceView(made, most_kl, lines(*said), alt)


def explore_choice(rows: dict[str, Row]):
    """A panel: model, memory, hardware, context and wish, and the row to use.

    rows: what `summary.rows` returns.
    """
    controls = {
        "model": widgets.Dropdown(options=list(SHAPES), value="Llama-2-7B", description="model"),
        "hardware": widgets.Dropdown(options=list(RUNS_ON), description="runs on"),
        "memory_gb": widgets.SelectionSlider(
            options=[1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 80, 141],
            value=8,
            description="memory (GB)",
        ),
        "context": widgets.SelectionSlider(
            options=[1024, 2048, 4096, 8192, 16384, 32768], value=4096, description="context"
        ),
        "wish": widgets.SelectionSlider(options=list(WISHES), description="quality"),
    }
    return Explorer(controls, partial(choice, rows), ChoiceFigure(rows))
