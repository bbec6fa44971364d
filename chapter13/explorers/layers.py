"""What the explorers of a layer's weights share.

Choosing a layer, taking some rows of a large one, making its largest weight larger, quantizing it
by any method, and the words for how many weights share a scale.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache, partial

import ipywidgets as widgets
import torch
from traitlets import observe

from chapter13.codebook import quantize_codebook
from chapter13.explorers.base import Explorer
from chapter13.integer import quantize_absmax, quantize_affine
from chapter13.plots.picture import METHOD_LOOK
from chapter13.tables import CODE_BOOKS
from chapter13.tensors import QuantizedTensor, check_finite, check_weight

MOST = 1 << 20  # weights; some rows of a larger matrix are measured in its place
DRAWN = 100_000  # weights that make a picture; the numbers of a readout are of all
METHOD_LABELS = {name: METHOD_LOOK[name].label for name in ("absmax", "affine", "nf4", "fp4")}


# --- how many weights share a scale -----------------------------------------------------------


def group_words(group_size: int | str | None) -> str:
    """A group size as readers see it.

    >>> group_words(None), group_words("channel"), group_words(64)
    ('per tensor', 'per channel', 'groups of 64')
    """
    return {None: "per tensor", "channel": "per channel"}.get(group_size, f"groups of {group_size}")


class GroupSizeSlider(widgets.SelectionSlider):
    """Chooses one of some group sizes, as the package takes them: None, "channel" or an int."""

    worded = True  # for Explorer.snapshots

    def __init__(self, sizes, value, **options):
        place = list(sizes).index(value)
        pairs = [(group_words(size), size) for size in sizes]
        selected = {"index": place, "label": pairs[place][0], "value": value}
        super().__init__(options=pairs, description="group size", **selected, **options)

    @observe("value")
    def _propagate_value(self, change):
        """Replaces ipywidgets' own handler, which treats the value None as "nothing selected"."""
        self.index = self._options_values.index(change.new)


# --- a weight and its largest element ---------------------------------------------------------


def outlier_slider() -> widgets.FloatLogSlider:
    """The control that makes the largest weight up to 1024 times larger, 4 steps to a doubling.

    In powers of two: the browser rounds a logarithmic slider's value to its steps and sends it
    back, and powers of two come back as they were.
    """
    return widgets.FloatLogSlider(
        1,
        base=2,
        min=0,
        max=10,
        step=0.25,
        description="outlier: largest weight ×",
        readout_format=".4r",
    )


def with_outlier(weight: torch.Tensor, position: int, times: float) -> torch.Tensor:
    """The weight; if `times` is not 1, a copy whose element at the flat `position` is larger."""
    if times == 1:
        return weight
    weight = weight.clone()
    weight.view(-1)[position] *= times
    return weight


def checked(weight: torch.Tensor) -> torch.Tensor:
    """The weight as float32 on the CPU. Raises as `check_weight` and `check_finite`."""
    weight = check_weight(weight).float().cpu().contiguous()
    check_finite(weight, weight.abs().amax())
    return weight


def checked_matrix(weight: torch.Tensor) -> torch.Tensor:
    """As `checked`. Raises ValueError if the weight is not a matrix."""
    weight = checked(weight)
    if weight.dim() != 2:
        raise ValueError(
            f"this takes a matrix (out_features, in_features), not shape {tuple(weight.shape)}"
        )
    return weight


def sample_rows(weight: torch.Tensor) -> torch.Tensor:
    """The matrix itself or, above MOST weights, evenly spaced rows with about that many.

    The rows with the largest and the smallest weight are among them: a scale for the whole tensor
    is the same.
    """
    step = -(-weight.numel() // MOST)
    if step == 1:
        return weight
    ends = torch.stack([weight.argmax(), weight.argmin()]) // weight.shape[1]
    return weight[torch.cat([torch.arange(0, len(weight), step), ends]).unique()]


@lru_cache(maxsize=2)
def drawn(count: int) -> torch.Tensor:
    """Which of `count` weights make a picture: int64, at most DRAWN, ascending; a seeded choice."""
    if count <= DRAWN:
        return torch.arange(count)
    chosen = torch.randint(count, (DRAWN,), generator=torch.Generator().manual_seed(0))
    return chosen.sort().values  # in the order of memory: faster


@dataclass(frozen=True)
class Layer:
    """A matrix, or some of its rows, with what is needed of it at every move; see `take`."""

    weight: torch.Tensor
    """float32 (rows taken, in_features)."""
    rows: int
    """The rows of the whole matrix."""
    largest: int
    """Where the largest element is, in the flattened weight."""
    rms: float
    """The weight's root mean square."""

    def rows_measured(self) -> list[tuple[str, str]]:
        """What a readout says of it: one row where some rows were taken, else none."""
        count = len(self.weight)
        return [("rows measured", f"{count} of {self.rows}")] if count < self.rows else []


def take(weight: torch.Tensor) -> Layer:
    """A Layer of a weight (out_features, in_features). Raises as `checked_matrix`."""
    weight = checked_matrix(weight)
    taken = sample_rows(weight)
    return Layer(taken, len(weight), int(taken.abs().argmax()), rms(taken))


def rms(weight: torch.Tensor) -> float:
    """Root mean square, summed in float64."""
    norm = torch.linalg.vector_norm(weight, dtype=torch.float64).item()
    return norm / math.sqrt(weight.numel())


def relative_and_db(error: float, signal: float) -> tuple[float, float]:
    """(relative RMSE, SQNR in dB) of a mean squared error, against a signal of this RMS.

    As `measures.relative_rmse` and `sqnr_db`, but of a signal of one's own choice: an outlier's
    own energy would hide what happens to all other weights.
    """
    relative = math.sqrt(error) / signal if signal else 0.0
    return relative, -20 * math.log10(relative) if relative else math.inf


# --- quantizing -------------------------------------------------------------------------------


def quantize(
    weight: torch.Tensor,
    method: str,
    bits: int,
    group_size: int | str | None,
    double_quant: bool = False,
) -> QuantizedTensor:
    """The weight by one of METHOD_LABELS. A code book takes its groups from the flattened weight.

    Raises ValueError where the settings do not fit each other, saying which control to move.
    """
    if method in CODE_BOOKS:
        if bits != 4:
            raise ValueError(
                f"{METHOD_LABELS[method]} is a table of 16 values: it takes 4 bits, not {bits}. "
                "Set bits to 4, or choose absmax or affine"
            )
        sizes = {None: weight.numel(), "channel": weight.shape[-1]}
        return quantize_codebook(weight, method, sizes.get(group_size, group_size), double_quant)
    if double_quant:
        raise ValueError(
            "double quantization packs the float32 absmax values of NF4 and FP4; "
            f"{method} holds float16 scales. Switch it off, or choose NF4 or FP4"
        )
    quantizer = {"absmax": quantize_absmax, "affine": quantize_affine}[method]
    try:
        return quantizer(weight, bits, group_size)
    except ValueError as error:
        said = str(error).replace(
            "use scale_dtype=torch.float32, or method nf4 or fp4, whose scales are float32",
            "choose NF4 or FP4, whose scales are float32, or give the panel the weights times a "
            "power of two, which changes no code",
        )
        raise ValueError(said) from None


# --- choosing a layer -------------------------------------------------------------------------


def explore(weights, controls, prepare, view, figure, description="layer", **options) -> Explorer:
    """An Explorer of one weight, or of several to choose from.

    weights: a tensor, or a dict of name -> tensor. controls: name -> control, for keywords of
    `view`. prepare: weight -> what none of these changes, which is the first argument of `view`.
    description: what the choice of a weight is called. options: as `choose`.
    Raises as `prepare` for a single weight; for one of several the panel shows its error.
    """
    if not isinstance(weights, Mapping):
        return Explorer(controls, partial(view, prepare(weights)), figure)
    choices = {"layer": widgets.Dropdown(options=list(weights), description=description)}
    load = lambda layer: prepare(weights[layer])  # noqa: E731
    return choose(choices, load, controls, view, figure, **options)


def choose(choices, load, controls, view, figure, kept=2, loading="") -> Explorer:
    """An Explorer of what the controls `choices` choose, at the settings of the other `controls`.

    load: the choices' values -> what is then the first argument of `view`. The last `kept` of them
    stay in memory. loading: what the panel says meanwhile, if that takes seconds.
    """
    loaded = {}

    def busy(**settings):
        return "" if tuple(settings[name] for name in choices) in loaded else loading

    def compute(**settings):
        chosen = {name: settings.pop(name) for name in choices}
        key = tuple(chosen.values())
        if key not in loaded:
            if len(loaded) >= kept:
                del loaded[next(iter(loaded))]
            loaded[key] = load(**chosen)
        return view(loaded[key], **settings)

    return Explorer({**choices, **controls}, compute, figure, busy)
