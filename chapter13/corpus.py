"""Tokens to calibrate and to evaluate with, from texts that have nothing in common.

Evaluation reads encyclopedia articles, calibration reads news. All is drawn with a fixed seed:
the same call gives the same tokens on every machine, and asking for more sequences adds to those
one had.
"""

import codecs
import hashlib
import json
import random
from pathlib import Path

import torch
from torch import nn

from chapter13.fetch.download import require
from chapter13.seeded import permutation

SEED = 13
# The protocol of the summary table: sequences, length. What is measured elsewhere is a prefix.
EVALUATION = 33, 512
CALIBRATION = 16, 256


def articles(split: str) -> list[dict]:
    """The Wikipedia articles of one split: "evaluation", "validation" or "calibration".

    Each has "title", "text", "page" and "revision" (Wikipedia's numbers). No article is in two
    splits. An article's split depends on its page number alone, so whatever else is added later,
    evaluation stays what it is. Validation serves to choose between options; nothing may be tuned
    on evaluation.

    Raises ValueError for another split, FileNotFoundError when the texts were not fetched yet.
    """
    if split not in SPLITS:
        raise ValueError(f"there is no split {split!r}; choose from {', '.join(SPLITS)}")
    return [article for article in _read("wikipedia") if _split_of(article["page"]) == split]


def news() -> list[str]:
    """The news documents, some 200 words each."""
    return [document["text"] for document in _read("news")]


def evaluation_tokens(
    tokenizer, sequences: int = EVALUATION[0], length: int = EVALUATION[1]
) -> torch.Tensor:
    """Tokens of encyclopedia articles, to measure a model with: int64 (sequences, length).

    Fewer sequences of the default length are the first ones of the summary table, so their losses
    can be compared with the recorded ones, sequence by sequence.

    `tokenizer`: from transformers, as `models.load` gives it. Each sequence lies within one
    article, none overlaps another, no special tokens are added.

    Raises ValueError when the text has fewer sequences of that length.
    """
    return encyclopedia_tokens(tokenizer, sequences, length, "evaluation")


def encyclopedia_tokens(tokenizer, sequences: int, length: int, split: str) -> torch.Tensor:
    """Tokens of one split of encyclopedia articles, drawn as `evaluation_tokens` draws them.

    Split "calibration" compares calibrating on such text with calibrating on news; "validation"
    serves to choose between options. Raises as `articles` and `evaluation_tokens`.
    """
    texts = [article["text"] for article in articles(split)]
    return _draw(_encode(tokenizer, texts), sequences, length, split)


def calibration_tokens(
    tokenizer, sequences: int = CALIBRATION[0], length: int = CALIBRATION[1]
) -> torch.Tensor:
    """Tokens of news, to calibrate a method with: int64 (sequences, length).

    The documents are short, so they are put one after another in a random order, a blank line
    between them, and cut into sequences, which do not overlap. No special tokens are added.

    Raises ValueError when the text has fewer sequences of that length.
    """
    documents = news()
    return text_tokens(tokenizer, "\n\n".join(_shuffled(documents)), sequences, length)


def text_tokens(tokenizer, text: str, sequences: int, length: int) -> torch.Tensor:
    """Tokens of a text of your own to calibrate with, cut and drawn like `calibration_tokens`.

    Raises ValueError when the text has fewer sequences of that length.
    """
    return _draw(_encode(tokenizer, [text]), sequences, length, "calibration")


def read_text(path: str | Path) -> str:
    """The text of a UTF-8 file of your own, for `text_tokens`.

    A byte order mark is left out, and lines that end in CRLF or CR end in LF.

    Raises FileNotFoundError, IsADirectoryError, and ValueError for an empty file and for bytes that
    are not UTF-8 text; the message says what they seem to be and how to convert them.
    """
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder: name a text file")
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist: name a text file")
    data = path.read_bytes()
    encoding = _wide_encoding(data)
    if encoding:
        raise ValueError(f"{path} seems to be {encoding}, not UTF-8: {_convert(path, encoding)}")
    if b"\0" in data:
        raise ValueError(f"{path} holds NUL bytes, so it is not text: name a text file in UTF-8")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not UTF-8 (byte {error.start} is 0x{data[error.start]:02x}). It may be "
            f"WINDOWS-1252 or latin-1: {_convert(path, 'WINDOWS-1252')}"
        ) from error
    if not text.strip():
        raise ValueError(f"{path} is empty: name a file with some text")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _wide_encoding(data: bytes) -> str | None:
    """UTF-16 or UTF-32, if the byte order mark or the places of the NUL bytes say so."""
    if data.startswith((codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)):
        return "UTF-32"
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "UTF-16"
    start = data[:2000]
    even, odd = start[::2].count(0), start[1::2].count(0)
    if odd > 0.4 * len(start) / 2 and even < 0.01 * len(start):
        return "UTF-16LE"
    if even > 0.4 * len(start) / 2 and odd < 0.01 * len(start):
        return "UTF-16BE"
    return None


def _convert(path: Path, encoding: str) -> str:
    return f"convert it with `iconv -f {encoding} -t UTF-8 {path.name} > utf8.txt`"


def check_tokens(model: nn.Module, tokens: torch.Tensor, what: str = "tokens") -> None:
    """Raises TypeError or ValueError unless these are tokens of a model, (sequences, length)."""
    if not isinstance(tokens, torch.Tensor) or tokens.is_floating_point():
        raise TypeError(f"{what} must be an integer torch.Tensor")
    if tokens.dim() != 2 or tokens.shape[0] < 1 or tokens.shape[1] < 2:
        raise ValueError(
            f"{what} must have shape (sequences, length), length 2 at least, "
            f"not {tuple(tokens.shape)}"
        )
    vocabulary = model.get_input_embeddings().num_embeddings
    if tokens.min() < 0 or tokens.max() >= vocabulary:
        raise ValueError(f"{what} reach {int(tokens.max())}, the model knows 0 to {vocabulary - 1}")


SPLITS = {"evaluation": 0.6, "validation": 0.8, "calibration": 1.0}  # upper ends of their shares


def _split_of(page: int) -> str:
    digest = hashlib.sha256(f"{SEED}:{page}".encode()).digest()
    share = int.from_bytes(digest[:8], "big") / 2**64
    return next(split for split, end in SPLITS.items() if share < end)


def _read(name: str) -> list[dict]:
    with (require("texts") / f"{name}.jsonl").open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def _encode(tokenizer, texts: list[str]) -> list[list[int]]:
    # verbose: that a text is longer than the model's context is no news, it is cut later
    return tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]


def _draw(texts: list[list[int]], sequences: int, length: int, use: str) -> torch.Tensor:
    """The first `sequences` of all windows that fit side by side, in a random order."""
    if sequences < 1 or length < 2:
        raise ValueError(
            f"asked for {sequences} sequences of {length} tokens; at least 1 of 2 is needed"
        )
    windows = [
        text[start : start + length]
        for text in texts
        for start in range(0, len(text) - length + 1, length)
    ]
    if sequences > len(windows):
        raise ValueError(
            f"asked for {sequences} sequences of {length} tokens; the {use} text has {len(windows)}"
        )
    return torch.tensor(_shuffled(windows)[:sequences], dtype=torch.int64)


def _shuffled(items: list) -> list:
    return [items[i] for i in permutation(len(items), random.Random(SEED))]
