"""The texts are clean, the splits apart, the tokens as asked for."""

import re
from array import array
from collections import Counter

import pytest
import torch
from tiny import says

from chapter13 import corpus, models
from chapter13.fetch import wiki


@pytest.fixture(scope="module")
def tokenizer():
    return models.load(device="cpu")[1]


@pytest.fixture(scope="module")
def encoded(tokenizer):
    """Tokens of every article, four bytes each, a split at a time: {split: [bytes]}."""
    texts = {
        split: [article["text"] for article in corpus.articles(split)] for split in corpus.SPLITS
    }
    return {
        split: [array("i", ids).tobytes() for ids in tokenizer(found, verbose=False)["input_ids"]]
        for split, found in texts.items()
    }


# --- markup ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("markup", "text"),
    [
        ("'''Bold''' and ''italic''", "Bold and italic"),
        ("a [[link]], a [[page|named]] one, [[wikt:word|a word]]", "a link, a named one, a word"),
        ("[http://x.org named] http://bare.org [http://y.org]", "named"),
        ("[[File:x.png|thumb|A [[nested]] caption]]After", "After"),
        ("[[Category:Things]][[image:y.jpg]]x", "x"),
        ("Fact.<ref>{{cite web|url=x}}</ref><ref name=a/> More.", "Fact. More."),
        ("Open.<ref name='a'>[[b]]</ref> x<!-- hidden <ref> --> y", "Open. x y"),
        ("{{Infobox|a={{b|c}}}}Text{{citation needed}}.", "Text."),
        ("before\n{| class=x\n|-\n| a || b\n|}\nafter", "before\n\nafter"),
        ("{| class=x\n| never closed\nafter", "after"),
        ("good\n\nbroken {{template\n\ngood too", "good\n\ngood too"),
        ("It is {{convert|5|km|mi}} to {{convert|2|to|3|ft|m}}.", "It is 5 km to 2 to 3 ft."),
        ("{{lang|grc|λόγος}} ({{lang-la|verbum}}) {{'s}}", "λόγος (verbum) 's"),
        ("''x''<sup>2</sup>, H<sub>2</sub>O, 4<sup>th</sup>", "x^2, H2O, 4th"),
        ("kept\n\nwhere <math>x</math> is\n\nkept too", "kept\n\nkept too"),
        ("A ({{IPAc-en|a}}) b (; c) d", "A b (c) d"),
        ("* one\n* two", "- one\n- two"),
        ("a&nbsp;b &amp; c", "a b & c"),
        ("x\n== Head ==\ny", "x\n\nHead\n\ny"),
        ("x\n==Empty==\n===Full===\ny\n==Last==\n", "x\n\nEmpty\n\nFull\n\ny"),
        ("x\n==See also==\n* a\n===More===\nb\n==Next==\ny", "x\n\nNext\n\ny"),
        ("__NOTOC__x", "x"),
    ],
)
def test_plain(markup, text):
    assert wiki.plain(markup) == text


def test_no_markup_is_left():
    texts = [a["text"] for split in corpus.SPLITS for a in corpus.articles(split)]
    assert len(texts) == 106
    markup = re.compile(
        r"\[\[|\]\]|\{\{|\}\}|\{\||\|\}|==|''|</?[a-z]+|&[a-z]+;|https?:|[\x00\x01]"
    )
    for text in texts:
        assert not (found := markup.search(text)), text[found.start() - 50 : found.end() + 50]
        assert text == text.strip()
        assert "\n\n\n" not in text
    words = sum(len(text.split()) for text in texts)
    assert words > 400_000, "the prose is still there"


def test_headings_and_prose_of_one_article():
    text = next(a["text"] for a in corpus.articles("evaluation") if a["title"] == "Albedo")
    assert text.startswith("Albedo or reflection coefficient, derived from Latin albedo")
    assert "\n\nTerrestrial albedo\n\n" in text
    assert not re.search(r"\n(References|External links|See also)\n", text)
    assert "Conifer forest" not in text, "that is in a table"


# --- splits --------------------------------------------------------------------------------------


def test_lots_have_nothing_in_common():
    pages = {split: {a["page"] for a in corpus.articles(split)} for split in corpus.SPLITS}
    assert {split: len(found) for split, found in pages.items()} == {
        "evaluation": 55, "validation": 22, "calibration": 29
    }  # fmt: skip
    assert len(set.union(*pages.values())) == 106
    # Nor does a paragraph of one stand in another, or in the news.
    where = {}
    for split in corpus.SPLITS:
        for article in corpus.articles(split):
            for paragraph in article["text"].split("\n"):
                if len(paragraph) > 200:
                    where.setdefault(paragraph, set()).add(split)
    assert len(where) > 3000
    assert all(len(splits) == 1 for splits in where.values())
    assert not set(corpus.news()) & set(where)


def test_lots_stay_what_they_are():
    """Each result ever measured rests on this."""
    titles = {a["title"]: split for split in corpus.SPLITS for a in corpus.articles(split)}
    assert titles["Anarchism"] == titles["Albert Einstein"] == titles["Apollo 11"] == "evaluation"
    assert titles["Autism"] == titles["Algorithm"] == "validation"
    assert titles["Aristotle"] == titles["Apollo 8"] == "calibration"


def test_unknown_lot():
    with pytest.raises(ValueError, match=says("'test'", "evaluation", "validation", "calibration")):
        corpus.articles("test")


def test_news():
    documents = corpus.news()
    assert len(documents) == len(set(documents)) == 293
    assert min(map(len, documents)) > 100


# --- tokens ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("draw", [corpus.evaluation_tokens, corpus.calibration_tokens])
@pytest.mark.slow
def test_tokens_are_as_asked_for(tokenizer, draw):
    tokens = draw(tokenizer, 6, 128)
    assert tokens.shape == (6, 128)
    assert tokens.dtype == torch.int64
    assert torch.equal(draw(tokenizer, 4, 128), tokens[:4]), "more sequences add to those before"
    assert tokens.min() > 16, "no special tokens"


def places(text: bytes, sequence: list[int]) -> list[int]:
    """Where a sequence stands in a text of `encoded`."""
    wanted, found, start = array("i", sequence).tobytes(), [], -1
    while (start := text.find(wanted, start + 1)) >= 0:
        if start % 4 == 0:
            found.append(start // 4)
    return found


@pytest.mark.parametrize("length", [100, 512])
@pytest.mark.slow
def test_evaluation_sequences_lie_within_one_article_each(tokenizer, encoded, length):
    tokens = corpus.evaluation_tokens(tokenizer, 40, length).tolist()
    found = []
    for sequence in tokens:
        hits = [(n, i) for n, a in enumerate(encoded["evaluation"]) for i in places(a, sequence)]
        assert len(hits) == 1
        found += hits
        for split in ("validation", "calibration"):
            assert not any(places(article, sequence) for article in encoded[split])
    taken = Counter((n, i + k) for n, i in found for k in range(length))
    assert max(taken.values()) == 1, "no overlap"
    assert len({n for n, _ in found}) > 15, "from many articles"


@pytest.mark.parametrize("split", corpus.SPLITS)
@pytest.mark.slow
def test_encyclopedia_tokens_are_of_their_lot(tokenizer, encoded, split):
    tokens = corpus.encyclopedia_tokens(tokenizer, 12, 256, split)
    assert torch.equal(corpus.encyclopedia_tokens(tokenizer, 5, 256, split), tokens[:5])
    for sequence in tokens.tolist():
        found = [each for each in encoded if any(places(text, sequence) for text in encoded[each])]
        assert found == [split]
    if split == "evaluation":
        assert torch.equal(corpus.evaluation_tokens(tokenizer, 12, 256), tokens)


def test_encyclopedia_tokens_of_no_lot(tokenizer):
    with pytest.raises(ValueError, match=says("'news'")):
        corpus.encyclopedia_tokens(tokenizer, 1, 256, "news")


def test_calibration_sequences_do_not_overlap(tokenizer):
    """All sequences together are the news, each document once."""
    tokens = corpus.calibration_tokens(tokenizer, 289, 256)
    text = "".join(tokenizer.batch_decode(tokens))
    documents = corpus.news()
    sentences = Counter(text.replace("\n\n", ". ").split(". "))
    whole = Counter(". ".join(documents).split(". "))
    long = [sentence for sentence in whole if len(sentence) > 60]
    assert sum(sentences[s] <= whole[s] for s in long) == len(long), "nothing stands there twice"
    # Sequences are shuffled, so those sentences are missing that a boundary cuts.
    assert sum(sentences[s] >= 1 for s in long) > len(long) - 2 * 289


@pytest.mark.parametrize(
    ("draw", "count"), [(corpus.evaluation_tokens, 592), (corpus.calibration_tokens, 144)]
)
@pytest.mark.slow
def test_more_than_there_is(tokenizer, draw, count):
    assert draw(tokenizer, count, 512).unique(dim=0).shape == (count, 512)
    with pytest.raises(ValueError, match=says(count + 1, 512, count)):
        draw(tokenizer, count + 1, 512)


@pytest.mark.parametrize(("sequences", "length"), [(0, 10), (-1, 10), (1, 1), (1, 0)])
def test_less_than_one(tokenizer, sequences, length):
    with pytest.raises(ValueError, match=says(f"{sequences} sequences", f"{length} tokens")):
        corpus.calibration_tokens(tokenizer, sequences, length)


# --- a text of your own ---------------------------------------------------------------------------

LINES = "Größe: 12 µm\nand a second line\n"


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_utf8_is_read_without_byte_order_mark_and_carriage_returns(tmp_path, encoding, end):
    file = tmp_path / "own.txt"
    file.write_bytes(LINES.replace("\n", end).encode(encoding))
    assert corpus.read_text(file) == corpus.read_text(str(file)) == LINES


@pytest.mark.parametrize(
    ("data", "seen", "advice"),
    [
        (LINES.encode("utf-16"), "UTF-16", "iconv -f UTF-16"),
        (LINES.encode("utf-16-le"), "UTF-16LE", "iconv -f UTF-16LE"),
        (LINES.encode("utf-16-be"), "UTF-16BE", "iconv -f UTF-16BE"),
        (LINES.encode("utf-32"), "UTF-32", "iconv -f UTF-32"),
        (LINES.encode("latin-1"), "byte 2", "iconv -f WINDOWS-1252"),
        (b"text\0text, and no more", "NUL", "text file"),
        (b"", "empty", "file"),
        (b"\xef\xbb\xbf \r\n", "empty", "file"),
    ],
)
def test_what_is_not_utf8_text_is_refused_in_one_line(tmp_path, data, seen, advice):
    file = tmp_path / "own.txt"
    file.write_bytes(data)
    with pytest.raises(ValueError, match=says(file, seen, advice)) as caught:
        corpus.read_text(file)
    assert len(str(caught.value)) - len(str(file)) < 200


@pytest.mark.parametrize("name", [".", "missing.txt"])
def test_a_folder_or_a_missing_file_is_no_text(tmp_path, name):
    with pytest.raises(OSError, match=says(tmp_path / name, "text file")):
        corpus.read_text(tmp_path / name)
