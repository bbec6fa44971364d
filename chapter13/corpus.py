"""Tokens for calibration and for evaluation, from texts that have nothing in common.

Evaluation uses encyclopedia articles, calibration uses news. Sequences are drawn with a fixed seed:
the same call gives the same tokens on every machine, and a call for more sequences returns the same
ones first.
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
# The protocol of the summary table: sequences, length. Other measurements use the first sequences.
EVALUATION = 33, 512
CALIBRATION = 16, 256


def articles(split: str) -> list[dict]:
    """The Wikipedia articles of one split: "evaluation", "validation" or "calibration".

    Each has "title", "text", "page" and "revision" (Wikipedia's numbers). No article is in two
    splits. An article's split depends only on its page number, so articles that are added later do
    not change the split of others. Use "validation" to choose between options; never tune anything
    on "evaluation".

    Raises ValueError for another split, FileNotFoundError if the texts were not fetched yet.
    """
    if split not in SPLITS:
        raise ValueError(f"there is no split {split!r}; choose from {', '.join(SPLITS)}")
    return [article for article in _read("wikipedia") if _split_of(article["page"]) == split]


def news() -> list[str]:
    """The news documents, about 200 words each."""
    return [document["text"] for document in _read("news")]


def evaluation_tokens(
    tokenizer, sequences: int = EVALUATION[0], length: int = EVALUATION[1]
) -> torch.Tensor:
    """Tokens of encyclopedia articles for measuring a model: int64 (sequences, length).

    With the default length, a smaller number gives the first sequences of the summary table, so
    their losses can be compared with the recorded ones, sequence by sequence.

    `tokenizer`: of transformers, as `models.load` returns it. Each sequence lies within one
    article, sequences do not overlap, and no special tokens are added.

    Raises ValueError if the text has fewer sequences of that length.
    """
    return encyclopedia_tokens(tokenizer, sequences, length, "evaluation")


def encyclopedia_tokens(tokenizer, sequences: int, length: int, split: str) -> torch.Tensor:
    """Tokens of one split of encyclopedia articles, drawn as in `evaluation_tokens`.

    Use split "calibration" to compare calibration on such text with calibration on news, and
    "validation" to choose between options. Raises as `articles` and `evaluation_tokens`.
    """
    texts = [article["text"] for article in articles(split)]
    return _draw(_encode(tokenizer, texts), sequences, length, split)


def calibration_tokens(
    tokenizer, sequences: int = CALIBRATION[0], length: int = CALIBRATION[1]
) -> torch.Tensor:
    """Tokens of news for calibrating a method: int64 (sequences, length).

    The documents are short, so they are joined in a random order, with a blank line between them,
    and cut into sequences that do not overlap. No special tokens are added.

    Raises ValueError if the text has fewer sequences of that length.
    """
    documents = news()
    return text_tokens(tokenizer, "\n\n".join(_shuffled(documents)), sequences, length)


def text_tokens(tokenizer, text: str, sequences: int, length: int) -> torch.Tensor:
    """Tokens of your own text for calibration, cut and drawn as in `calibration_tokens`.

    Raises ValueError if the text has fewer sequences of that length.
    """
    return _draw(_encode(tokenizer, [text]), sequences, length, "calibration")


def read_text(path: str | Path) -> str:
    """The text of your own UTF-8 file, for `text_tokens`.

    A byte order mark is removed, and the line ends CRLF and CR become LF.

    Raises FileNotFoundError, IsADirectoryError, and ValueError for an empty file and for bytes that
    are not UTF-8 text; the message names the likely encoding and says how to convert it.
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
    """UTF-16 or UTF-32, if the byte order mark or the positions of NUL bytes indicate it."""
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
        raise ValueError(
            f"{what} go up to {int(tokens.max())}, but this model has 0 to {vocabulary - 1}"
        )


SPLITS = {"evaluation": 0.6, "validation": 0.8, "calibration": 1.0}  # upper end of each range


def _split_of(page: int) -> str:
    digest = hashlib.sha256(f"{SEED}:{page}".encode()).digest()
    share = int.from_bytes(digest[:8], "big") / 2**64
    return next(split for split, end in SPLITS.items() if share < end)


def _read(name: str) -> list[dict]:
    with (require("texts") / f"{name}.jsonl").open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def _encode(tokenizer, texts: list[str]) -> list[list[int]]:
    # verbose=False: no warning that a text is longer than the model's context; it is cut later
    return tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]


def _draw(texts: list[list[int]], sequences: int, length: int, use: str) -> torch.Tensor:
    """Cuts texts into windows side by side; the first `sequences` of them in a random order."""
    if sequences < 1 or length < 2:
        raise ValueError(
            f"asked for {sequences} sequences of {length} tokens; it must be at least 1 of 2 tokens"
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
