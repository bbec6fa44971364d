"""The explorers and pictures of notebook 00: each number shown, against one computed otherwise."""

import math
import re
import struct
from itertools import product

import numpy as np
import pytest

from chapter13 import memory
from chapter13.explorers import formats
from chapter13.memory import CARDS, FORMATS, SHAPES
from chapter13.plots import formats as pictures

# --- a number's bits --------------------------------------------------------------------------


def reference_bits(value):
    """fp32, fp16 and bf16 bits by the standard library; bf16 by rounding fp32's to even."""
    try:
        half = struct.unpack(">H", struct.pack(">e", value))[0]
    except OverflowError:
        half = 0x7C00 if value > 0 else 0xFC00
    single = struct.unpack(">I", struct.pack(">f", value))[0]
    low, brain = single & 0xFFFF, single >> 16
    brain += low > 0x8000 or (low == 0x8000 and brain & 1)
    return {"fp32": f"{single:032b}", "fp16": f"{half:016b}", "bf16": f"{brain:016b}"}


def decode(bits, exponent_bits):
    """The value of sign, exponent and mantissa bits, by the definition."""
    sign = -1.0 if bits[0] == "1" else 1.0
    exponent = int(bits[1 : 1 + exponent_bits], 2)
    mantissa = int(bits[1 + exponent_bits :], 2) / 2 ** (len(bits) - 1 - exponent_bits)
    bias = 2 ** (exponent_bits - 1) - 1
    if exponent == 2**exponent_bits - 1:
        return sign * float("inf")
    if exponent == 0:
        return sign * mantissa * 2.0 ** (1 - bias)
    return sign * (1 + mantissa) * 2.0 ** (exponent - bias)


NUMBERS = [0.0, 0.15625, 0.1, 1 + 1 / 1024, 65504.0, 65519.0, 65520.0, 2.0**-24, 2.0**-25, 70000.0]
NUMBERS += [1e6, 1 / 3, *np.random.default_rng(0).normal(size=20)]


@pytest.mark.parametrize("sign", [1, -1])
def test_every_number_has_the_bits_of_the_standard(sign):
    for number, power in product(NUMBERS, range(-30, 21)):  # every place of the slider
        view = formats.number(sign * number, power)
        value = sign * number * 2.0**power
        expected = reference_bits(value)
        for stored in view.stored:
            assert stored.bits == expected[stored.format]
            held = decode(stored.bits, 5 if stored.format == "fp16" else 8)
            assert stored.value == held
            if held == value:
                assert stored.loss == "exact"
            elif np.isinf(held):
                assert stored.loss.startswith("overflow")
            elif held == 0:
                assert stored.loss.startswith("underflow")
            else:
                error = abs((held - value) / value)
                assert stored.loss == f"relative error {error:.1e}"
            line = next(line for line in view.readout.splitlines() if stored.format in line)
            assert line.split()[1] == f"{held:.9g}"
            assert line.endswith(f"({stored.loss})")


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_no_number_is_explained(value):
    with pytest.raises(ValueError, match=f"the number must be finite, not {value}"):
        formats.number(value)


def test_numbers_beyond_the_formats_are_told():
    """Whoever types them sees where each format ends."""
    panel = formats.explore_number()
    panel.set(value=1e39)
    assert [stored.loss[:8] for stored in panel.view.stored] == ["overflow"] * 3
    panel.set(value=3.39e38)
    assert [math.isinf(stored.value) for stored in panel.view.stored] == [False, True, False]
    assert "must be finite" in panel.set(value=1e308, power=20)
    panel.close()


def test_the_picture_shows_the_bits():
    figure = pictures.BitsFigure()
    for value in (0.1, 1e-8, 70_000.0):
        view = formats.number(value)
        figure.update(view)
        shown = {}
        for digit, marks in enumerate(figure._digits):
            shown |= {place: str(digit) for place in zip(*marks.get_data(), strict=True)}
        rows = sorted({y for _, y in shown}, reverse=True)
        for y, stored in zip(rows, view.stored, strict=True):
            assert "".join(shown[x, y] for x, _ in sorted(p for p in shown if p[1] == y)) == (
                stored.bits
            )


# --- the memory calculator --------------------------------------------------------------------


def bits_per_weight(format, group_size, in_features):
    """As the papers give it; double quantization without the few bytes a tensor."""
    if format in ("fp32", "fp16"):
        return FORMATS[format]
    if format == "nf4":
        return 4 + 32 / group_size
    if format == "nf4+dq":
        return 4 + 8 / group_size + 32 / (256 * group_size)
    return FORMATS[format] + 16 / (in_features if group_size == "channel" else group_size)


@pytest.fixture
def panel():
    panel = formats.explore_memory()
    yield panel
    panel.close()


def options(panel, name):
    return [o[1] if isinstance(o, tuple) else o for o in panel.controls[name].options]


def expected_weights(shape, format, group_size):
    """Bytes of the layers and of the rest; None where the group size does not apply."""
    linear = 0
    for out_features, in_features in shape.linears():
        if format.startswith("int") and group_size != "channel" and in_features % group_size:
            return None
        if format.startswith("nf4") and group_size == "channel":
            return None
        bits = bits_per_weight(format, group_size, in_features)
        linear += shape.layers * out_features * in_features * bits / 8
    count = sum(memory.parameters(shape).values())
    layers = shape.layers * sum(a * b for a, b in shape.linears())
    return linear, (count - layers) * (4 if format == "fp32" else 2)


def expected_cache(shape, context, batch, kv_bits):
    vector = shape.head_dim * kv_bits / 8 + (2 if kv_bits < 16 else 0)
    return 2 * shape.layers * shape.kv_heads * context * batch * vector


def test_every_setting_of_the_calculator(panel):
    shapes = SHAPES | {formats.CUSTOM: memory.similar_shape(3e9, 28)}
    weights = [options(panel, name) for name in ("model", "format", "group_size")]
    caches = [options(panel, name) for name in ("context", "batch", "kv_bits")]
    applied = explained = 0
    for model, format, group_size in product(*weights):
        shape = shapes[model]
        expected = expected_weights(shape, format, group_size)
        for cache in product(*caches):
            settings = (model, format, group_size, *cache, 3.0, 28)
            if expected is None:
                with pytest.raises(ValueError, match=r"does not divide|choose a number"):
                    formats.memory(*settings)
                explained += 1
                continue
            view = formats.memory(*settings)
            shown = view.gigabytes
            # double quantization: in each tensor a mean of 4 bytes, a short last block of scales
            slack = 16 * 7 * shape.layers if format == "nf4+dq" else 0.5
            assert abs((shown["codes"] + shown["scales"]) * 1e9 - expected[0]) <= slack
            assert math.isclose(shown["kept"] * 1e9, expected[1], rel_tol=1e-12)
            assert math.isclose(shown["KV cache"] * 1e9, expected_cache(shape, *cache))
            assert math.isclose(view.total, sum(shown.values()), rel_tol=1e-12)
            assert view.holds == [card for card, most in CARDS.items() if most >= view.total]
            read = expected[0] + expected[1] + expected_cache(shape, *cache)
            if not shape.tied:
                read -= shape.vocabulary * shape.hidden * (4 if format == "fp32" else 2)
            assert view.read == pytest.approx(read / 1e9, abs=2 * slack / 1e9)
            assert view.limit >= 1.15 * view.total
            applied += 1
    assert applied > 10 * explained > 0


def test_the_readout_says_what_the_view_holds(panel):
    for model, format in product(options(panel, "model"), options(panel, "format")):
        panel.set(model=model, format=format, group_size=64, kv_bits=8, batch=2)
        view, one_line = panel.view, re.sub(r"\n {9,}", " ", panel.readout)  # undo line breaks
        lines = dict(re.split(r"  +", line.strip(), maxsplit=1) for line in one_line.splitlines())
        assert lines["total"].startswith(
            f"{view.total:.3g} GB = {view.total * 1e9 / 2**30:.3g} GiB"
        )
        codes, scales, bits = re.fullmatch(
            r"(\S+) GB \+ scales (\S+) GB: (\S+) bits per weight", lines["layers"]
        ).groups()
        assert codes == f"{view.gigabytes['codes']:.3g}"
        assert scales == f"{view.gigabytes['scales']:.3g}"
        assert float(bits) == pytest.approx(bits_per_weight(format, 64, None), rel=5e-4)
        assert lines["KV cache"] == f"{view.gigabytes['KV cache']:.3g} GB for 2 x 4,096 tokens"
        assert lines["embeddings, head, norms"].startswith(f"{view.gigabytes['kept']:.3g} GB")
        assert max(map(len, panel.readout.splitlines())) <= 88
        assert lines["fits"] == ("; ".join(view.holds) or "none of these cards alone")
        read, _, speeds = lines["read for each token"].partition(" GB")
        assert read == f"{view.read:.3g}"
        assert bool(speeds) == bool(view.holds)
        if view.holds:
            ends = re.fullmatch(
                r", at most (\S+)(?: \(slowest\) to (\S+) \(fastest\))? tokens/s", speeds
            ).groups()
            ends = [float(end.replace(",", "")) for end in ends if end]
            assert ends[0] == pytest.approx(min(view.ceilings.values()), rel=5e-3)
            assert ends[-1] == pytest.approx(max(view.ceilings.values()), rel=5e-3)


def test_what_no_card_holds(panel):
    panel.set(model="Llama-3-70B", format="fp32")
    assert panel.view.holds == []
    assert panel.readout.endswith("none of these cards alone")


def test_each_card_that_holds_the_model_has_its_ceiling(panel):
    assert list(formats.BANDWIDTH) == list(CARDS)
    panel.set(model="Llama-2-7B", format="int4", context=4096)
    per_token = 32 * (4 * 4096**2 + 3 * 4096 * 11_008) * 4.25 / 8  # codes and scales
    per_token += 2 * (32_000 + 65) * 4096  # the head and the norms; of the embeddings one row
    per_token += 2 * 32 * 32 * 128 * 2 * 4096  # keys and values
    ceilings = panel.view.ceilings
    assert list(ceilings) == panel.view.holds
    assert ceilings["RTX 5090"] == pytest.approx(1792e9 / per_token)
    assert ceilings["H200"] == pytest.approx(4800e9 / per_token)

    one = panel.view.read
    panel.set(batch=2)  # one reading of the weights, two caches, two tokens
    assert panel.view.read - one == pytest.approx(panel.view.gigabytes["KV cache"] / 2)


def test_the_ceilings_stand_beside_the_cards(panel):
    for model in ("Llama-2-7B", "Llama-3-70B"):
        panel.set(model=model, format="int4")
        words = [text.get_text() for text in reversed(panel.figure._ceilings)]
        most = [panel.view.ceilings.get(card) for card in CARDS]
        assert words == ["" if speed is None else f"{speed:.3g}" for speed in most]


def test_the_axis_stays_while_the_format_moves(panel):
    limits = set()
    for format in FORMATS:
        panel.set(format=format)
        limits.add(panel.view.limit)
        assert panel.figure.axes.get_xlim() == (0, panel.view.limit)
    assert len(limits) == 1


def test_the_picture_stacks_the_parts(panel):
    panel.set(model="Llama-3-8B", format="int4", context=131_072)
    bars = list(panel.figure._parts.values())
    widths = [panel.view.gigabytes[part] for part in panel.figure._parts]
    assert [bar.get_width() for bar in bars] == widths
    for left, right in zip(bars[:-1], bars[1:], strict=True):
        assert right.get_x() == pytest.approx(left.get_x() + left.get_width())
    end = bars[-1].get_x() + bars[-1].get_width()
    assert end == pytest.approx(panel.view.total)
    holding = [bar.get_facecolor() != (1, 1, 1, 1) for bar in panel.figure._memory]
    assert holding == [card in panel.view.holds for card in reversed(CARDS)]


def test_controls_without_effect_are_gray(panel):
    def gray():
        return {name for name, control in panel.controls.items() if control.disabled}

    assert gray() == {"group_size", "billions", "layers"}  # Llama-2-7B in fp32
    panel.set(format="int4")
    assert gray() == {"billions", "layers"}
    panel.set(model=formats.CUSTOM)
    assert gray() == set()
    panel.set(format="fp16")
    assert gray() == {"group_size"}
