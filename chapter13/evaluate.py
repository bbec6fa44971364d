"""Perplexity and KL divergence of a language model, with confidence intervals.

Tokens are int64 (sequences, length). Every token but the first of each sequence is scored, given
all tokens before it in the sequence. Losses are in nats per token (natural logarithm):

    perplexity = exp(mean of -log p(token))
    KL = mean over positions of sum over the vocabulary of p (log p - log q)

with p of the full-precision model and q of the quantized one. KL also sees what perplexity
misses: probability that moves between tokens other than the true one.
"""

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import nn

from chapter13.atomic import replacing
from chapter13.corpus import check_tokens
from chapter13.whole_model.layers import evaluating

_STEPS = 65535  # levels of a cached log-probability


@dataclass(frozen=True)
class Score:
    """A mean over sequences with its 95% interval; `format(score, ".2f")` formats the value."""

    losses: torch.Tensor
    """float64 (sequences,): the mean over the scored tokens of each sequence, in nats."""
    exponential: bool = False
    """Whether the value is exp(mean), as a perplexity is."""

    @property
    def value(self) -> float:
        mean = self.losses.mean().item()
        return math.exp(mean) if self.exponential else mean

    @property
    def interval(self) -> tuple[float, float]:
        """The 95% confidence interval of the mean by Student's t (1908), sequence by sequence.

        It estimates how far the value may change with other texts of the same kind. It counts
        sequences, not tokens, because the tokens of one text are not independent. (nan, nan) for
        one sequence.
        """
        count = len(self.losses)
        if count < 2:
            return math.nan, math.nan
        mean = self.losses.mean().item()
        half = t_quantile(count - 1) * self.losses.std().item() / math.sqrt(count)
        ends = mean - half, mean + half
        return (math.exp(ends[0]), math.exp(ends[1])) if self.exponential else ends

    def first(self, sequences: int) -> "Score":
        """The score of the first sequences, to compare with a run that measured only these.

        Raises ValueError if there are fewer.
        """
        if not 1 <= sequences <= len(self.losses):
            raise ValueError(f"there are {len(self.losses)} sequences, not {sequences}")
        return Score(self.losses[:sequences], self.exponential)

    def __float__(self) -> float:
        return self.value

    def __format__(self, spec: str) -> str:
        return format(self.value, spec)

    def __repr__(self) -> str:
        low, high = self.interval
        return f"{self.value:.4g} (95%: {low:.4g} to {high:.4g}, {len(self.losses)} sequences)"


def difference(first: Score, second: Score) -> Score:
    """first - second in nats, paired: sequence by sequence, on the same tokens.

    A hard text raises both losses, so the difference usually has a much narrower interval than
    either; two methods differ if the interval excludes 0. Raises ValueError for scores of different
    lengths.
    """
    if len(first.losses) != len(second.losses):
        raise ValueError(f"{len(first.losses)} and {len(second.losses)} sequences cannot be paired")
    return Score(first.losses - second.losses)


def deviation(measured: Score, recorded: Score) -> float:
    """The largest |measured / recorded - 1| over the losses of the sequences.

    `measured` has the first sequences of `recorded`, on the same tokens: a run on another machine,
    or on fewer sequences. Raises ValueError if it has more.
    """
    recorded = recorded.first(len(measured.losses))
    return (measured.losses / recorded.losses - 1).abs().max().item()


def perplexity(
    model: nn.Module, tokens: torch.Tensor, batch_size: int = 2, progress: bool = True
) -> Score:
    """exp of the mean loss per token. `model`: a causal language model of transformers.

    Raises TypeError or ValueError for tokens of another data type or shape, or beyond the
    vocabulary, and ValueError if the model's logits are not finite.
    """
    losses = [
        _cross_entropy(logit, ids)
        for batch, logits in _logits(model, tokens, batch_size, progress, "perplexity")
        for logit, ids in zip(logits, batch, strict=True)
    ]
    return _score(losses, exponential=True)


def kl_divergence(
    model: nn.Module,
    reference: nn.Module | Path | str,
    tokens: torch.Tensor,
    batch_size: int = 2,
    progress: bool = True,
) -> Score:
    """KL(reference || model) in nats per token; 0 if both predict the same.

    `reference`: the full-precision model, or the file that `cache_logits` wrote for the same
    tokens. Raises as `perplexity`, and ValueError for a cache of other tokens.
    """
    log_p = _reference(reference, tokens, batch_size)
    losses = [
        _kl(next(log_p), logit)
        for _, logits in _logits(model, tokens, batch_size, progress, "KL")
        for logit in logits
    ]
    return _score(losses)


def perplexity_and_kl(
    model: nn.Module,
    reference: nn.Module | Path | str,
    tokens: torch.Tensor,
    batch_size: int = 2,
    progress: bool = True,
) -> tuple[Score, Score]:
    """The results of `perplexity` and `kl_divergence` from one pass; raises as they do."""
    log_p = _reference(reference, tokens, batch_size)
    losses = [
        (_cross_entropy(logit, ids), _kl(next(log_p), logit))
        for batch, logits in _logits(model, tokens, batch_size, progress, "perplexity, KL")
        for logit, ids in zip(logits, batch, strict=True)
    ]
    entropies, divergences = zip(*losses, strict=True)
    return _score(entropies, exponential=True), _score(divergences)


def cache_logits(
    model: nn.Module,
    tokens: torch.Tensor,
    path: Path | str,
    batch_size: int = 2,
    progress: bool = True,
) -> Path:
    """Writes a reference model's predictions to a file for `kl_divergence`, 2 bytes per logit.

    Each position's log-probabilities are rounded to 65536 levels between their smallest and
    largest, as in llama.cpp's perplexity tool. The file is written atomically.
    """
    with replacing(path) as part, part.open("wb") as file:
        for _, logits in _logits(model, tokens, batch_size, progress, "reference"):
            for logit in logits:
                log_p = torch.log_softmax(logit.cpu(), -1)
                if not file.tell():
                    header = np.array([*_digest(tokens), log_p.shape[-1]], dtype="<i8")
                    file.write(header.tobytes())
                low, high = log_p.aminmax(dim=-1, keepdim=True)
                scale = (high - low) / _STEPS
                levels = ((log_p - low) / scale).round_().nan_to_num_(0)
                file.write(torch.cat([low, scale], -1).numpy().astype("<f4").tobytes())
                file.write(levels.numpy().astype("<u2").tobytes())
    return Path(path)


def _reference(reference, tokens, batch_size) -> Iterator[torch.Tensor]:
    """The log-probabilities of each sequence, from a model or from its cached predictions."""
    if not isinstance(reference, nn.Module):
        return _cached(Path(reference), tokens)
    return (
        torch.log_softmax(logit, -1)
        for _, logits in _logits(reference, tokens, batch_size, False, "")
        for logit in logits
    )


def _cached(path: Path, tokens: torch.Tensor) -> Iterator[torch.Tensor]:
    """The log-probabilities of each sequence, from the mapped file: float32 (length - 1, vocab)."""
    sequences, positions = tokens.shape[0], tokens.shape[1] - 1
    size = path.stat().st_size
    header = np.fromfile(path, dtype="<i8", count=5)
    if size < 40 or tuple(header[:4]) != _digest(tokens):
        raise ValueError(
            f"{path} was not written for these tokens: write it again with cache_logits"
        )
    vocabulary = int(header[4])
    if size != 40 + sequences * positions * (8 + 2 * vocabulary):
        raise ValueError(f"{path} is damaged ({size} bytes): write it again with cache_logits")
    raw = np.memmap(path, dtype=np.uint8, mode="r", offset=40)
    step = positions * (8 + 2 * vocabulary)
    for start in range(0, sequences * step, step):
        ends = raw[start : start + 8 * positions].view("<f4").reshape(positions, 2)
        levels = raw[start + 8 * positions : start + step].view("<u2").reshape(positions, -1)
        low, scale = torch.from_numpy(ends.astype(np.float32)).split(1, dim=1)
        log_p = torch.from_numpy(levels.astype(np.float32)).mul_(scale).add_(low)
        yield log_p.sub_(log_p.logsumexp(-1, keepdim=True))  # levels are off by up to half a step


def _digest(tokens: torch.Tensor) -> tuple[int, ...]:
    """Four numbers that identify these tokens."""
    content = hashlib.sha256(repr(tokens.shape).encode() + tokens.cpu().numpy().tobytes())
    return tuple(np.frombuffer(content.digest(), dtype="<i8").tolist())


@torch.inference_mode()
def _cross_entropy(logit: torch.Tensor, ids: torch.Tensor) -> float:
    losses = nn.functional.cross_entropy(logit, ids[1:].to(logit.device), reduction="none")
    return losses.double().mean().item()


def _kl(log_p: torch.Tensor, logit: torch.Tensor) -> float:
    log_p = log_p.to(logit.device)
    if log_p.shape != logit.shape:
        raise ValueError(
            f"the vocabulary of the reference has {log_p.shape[-1]} tokens, that of the model has "
            f"{logit.shape[-1]}"
        )
    log_q = torch.log_softmax(logit, -1)
    total = nn.functional.kl_div(log_q, log_p, reduction="sum", log_target=True).double()
    # rounding leaves both sums slightly off 1; uncorrected, that adds about 1e-5 to KL
    total += log_q.exp().sum(dtype=torch.float64) - log_p.exp().sum(dtype=torch.float64)
    return total.item() / len(logit)


def _logits(model, tokens, batch_size, progress, description):
    """Yields (tokens of a batch, float32 logits (batch, length - 1, vocab) that predict them)."""
    check_tokens(model, tokens)
    from tqdm.auto import tqdm

    device = model.get_input_embeddings().weight.device
    bar = tqdm(total=len(tokens), desc=description, unit=" seq", disable=not progress)
    with evaluating(model), bar:
        for batch in tokens.split(batch_size):
            with torch.inference_mode():
                logits = model(batch.to(device), use_cache=False).logits[:, :-1].float()
            if not logits.isfinite().all():
                raise ValueError(
                    "the model's logits are not finite, so its loss cannot be measured"
                )
            yield batch, logits
            bar.update(len(batch))


def _score(losses: Sequence[float], exponential: bool = False) -> Score:
    return Score(torch.tensor(losses, dtype=torch.float64), exponential)


@cache
def t_quantile(degrees: int) -> float:
    """The 97.5% point of Student's t distribution, by bisection; `degrees` of freedom from 1.

    The probability within +-t is a finite sum for whole degrees of freedom: Abramowitz and Stegun
    1964, 26.7.3 and 26.7.4.
    """
    low, high = 0.0, math.pi / 2  # of atan(t / sqrt(degrees))
    while (angle := (low + high) / 2) not in (low, high):
        sine, cosine = math.sin(angle), math.cos(angle)
        term = total = 1.0 if degrees % 2 == 0 else cosine
        for n in range(2 + degrees % 2, degrees - 1, 2):
            term *= (n - 1) / n * cosine**2
            total += term
        if degrees % 2:
            share = (angle + sine * total * (degrees > 1)) * 2 / math.pi
        else:
            share = sine * total
        low, high = (angle, high) if share < 0.95 else (low, angle)
    return math.tan(low) * math.sqrt(degrees)
