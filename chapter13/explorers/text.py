"""The explorer of notebook 05: what a model writes when its weights have fewer bits."""

from dataclasses import dataclass

import ipywidgets as widgets
import torch
from torch import nn

from chapter13.explorers.base import Explorer, lines
from chapter13.explorers.layers import METHOD_LABELS, GroupSizeSlider, group_words, quantize
from chapter13.plots.text import TextFigure, printable
from chapter13.whole_model.layers import is_conv1d, linear_layers, weight_of

# In full precision the embedded model continues each of these with a sensible text.
PROMPTS = (
    "Once upon a time, there was a little girl who",
    "Photosynthesis is the process by which",
    "The three primary colors are",
    "The sun rises in the",
)
METHODS = ("absmax", "affine", "nf4")
TOKENS = 40


@dataclass(frozen=True)
class View:
    """What the explorer shows at one position of its controls."""

    title: str
    reference: str
    """The prompt and what the full-precision model makes of it."""
    text: str
    """The prompt and what the quantized model makes of it."""
    same: int
    """How many characters the two have in common from the start."""
    agree: int
    """How many of the new tokens agree before the first that does not."""
    count: int
    """How many new tokens the full-precision model wrote."""
    margin: float
    """The least lead of a chosen token over the second best, in logits: how near a tie came."""
    bits_per_weight: float
    kl: float | None
    """To the full-precision model, in nats per token; None where there is no text to measure on."""
    readout: str
    alt: str


@torch.inference_mode()
def greedy(model: nn.Module, ids: list[int], count: int) -> tuple[list[int], float]:
    """The `count` most likely tokens after `ids`, one at a time, and the least lead in logits.

    Stops early where the model ends its text.
    """
    device = model.get_input_embeddings().weight.device
    stop = model.config.eos_token_id
    new, margin = [], float("inf")
    state = model(torch.tensor([ids], device=device), use_cache=True)
    while True:
        best = state.logits[0, -1].float().topk(2)
        token = int(best.indices[0])
        margin = min(margin, (best.values[0] - best.values[1]).item())
        if token == stop:
            return new, margin
        new.append(token)
        if len(new) == count:
            return new, margin
        step = torch.tensor([[token]], device=device)
        state = model(step, past_key_values=state.past_key_values, use_cache=True)


@torch.inference_mode()
def log_probabilities(model: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    """What the model predicts for all but the first of `tokens` (length,): (length - 1, vocab)."""
    logits = model(tokens[None].to(model.get_input_embeddings().weight.device)).logits
    return torch.log_softmax(logits[0, :-1].float(), -1)


def divergence(log_p: torch.Tensor, log_q: torch.Tensor) -> float:
    """KL(p || q) in nats per token, as `evaluate.kl_divergence` of one sequence."""
    return (log_p.exp() * (log_p - log_q)).sum(-1).mean().item()


class RoundedModel:
    """A model whose linear weights are replaced by their quantized ones, at any setting.

    The dequantized weights are kept in the model, so that text comes at the speed of full
    precision: this shows the damage, not the saving. The original weights are kept beside.
    """

    def __init__(self, model: nn.Module):
        self.model = model
        self.layers = linear_layers(model)
        self.original = {name: weight_of(layer) for name, layer in self.layers.items()}
        self.applied = None
        self.bits_per_weight = 32.0
        for layer in self.layers.values():  # memory of its own: the file stays as it is
            layer.weight = nn.Parameter(layer.weight.detach().clone(), requires_grad=False)

    def apply(self, method: str, bits: int, group_size) -> None:
        """Puts the weights of a setting in place; ValueError where it does not apply."""
        if (method, bits, group_size) == self.applied:
            return
        self.applied = None
        held = 0
        for name, layer in self.layers.items():
            quantized = quantize(self.original[name], method, bits, group_size)
            held += quantized.nbytes
            restored = quantized.dequantize()
            layer.weight.data.copy_(restored.T if is_conv1d(layer) else restored)
        self.bits_per_weight = 8 * held / sum(w.numel() for w in self.original.values())
        self.applied = method, bits, group_size


def explore_text(
    model: nn.Module,
    tokenizer,
    prompts=PROMPTS,
    group_sizes=("channel", 64, 32),
    tokens: torch.Tensor | None = None,
):
    """A panel: prompt, method, bits and group size; below it what the model writes, greedily.

    `model`: a causal language model in full precision, which the panel changes from then on: give
    it one of its own. `tokenizer`: its tokenizer. `group_sizes`: to choose from. `tokens`: int64
    (length,), a text on which each setting's KL divergence is measured and shown. The first look at
    a setting takes a few seconds, a second one none.
    """
    encoded = {
        prompt: tokenizer(prompt, add_special_tokens=False)["input_ids"] for prompt in prompts
    }
    reference = {prompt: greedy(model, encoded[prompt], TOKENS)[0] for prompt in prompts}
    exact = None if tokens is None else log_probabilities(model, tokens)
    damage = RoundedModel(model)
    written, measured = {}, {}

    def compute(prompt, method, bits, group_size):
        setting = method, bits, group_size
        if (prompt, *setting) not in written:
            damage.apply(*setting)
            written[prompt, *setting] = greedy(model, encoded[prompt], TOKENS)
            if setting not in measured:
                kl = None if exact is None else divergence(exact, log_probabilities(model, tokens))
                measured[setting] = damage.bits_per_weight, kl
        return view(
            tokenizer,
            prompt,
            setting,
            reference[prompt],
            written[prompt, *setting],
            measured[setting],
        )

    controls = {
        "prompt": widgets.Dropdown(options=list(prompts), description="prompt"),
        "method": widgets.Dropdown(
            options=[(METHOD_LABELS[name], name) for name in METHODS],
            value="affine",
            description="method",
        ),
        "bits": widgets.IntSlider(3, 2, 8, description="bits", continuous_update=False),
        "group_size": GroupSizeSlider(
            group_sizes, group_sizes[min(1, len(group_sizes) - 1)], continuous_update=False
        ),
    }

    def busy(**settings):
        return "" if tuple(settings.values()) in written else "the model writes …"

    return Explorer(controls, compute, TextFigure(), busy)


def view(tokenizer, prompt, setting, reference, written, measured) -> View:
    """What two continuations of a prompt have in common.

    setting: (method, bits, group size). reference: tokens. written: (tokens, margin). measured:
    (bits per weight, KL).
    """
    (method, bits, group_size), (new, margin), (bits_per_weight, kl) = setting, written, measured
    pairs = zip(reference, new, strict=False)
    agree = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(reference), len(new)))
    before, after = (prompt + tokenizer.decode(tokens) for tokens in (reference, new))
    same = len(prompt + tokenizer.decode(new[:agree]))
    title = f"{METHOD_LABELS[method]}, {bits} bits, {group_words(group_size)}"
    rows = [
        ("bits per weight, scales included", f"{bits_per_weight:.2f}"),
        ("tokens before the first difference", f"{agree} of {len(reference)}"),
        ("full precision", printable(before)),
        ("quantized", printable(after)),
    ]
    if kl is not None:
        rows.insert(1, ("KL divergence, nats per token", f"{kl:.3f}"))
    return View(
        title=title,
        reference=before,
        text=after,
        same=same,
        agree=agree,
        count=len(reference),
        margin=margin,
        bits_per_weight=bits_per_weight,
        kl=kl,
        readout=lines(*rows),
        alt=(
            f"Above, the full-precision text: {printable(before)} Below, {title}; {agree} of "
            f"{len(reference)} tokens come before the first difference: {printable(after)}"
        ),
    )
