"""Converts Wikipedia's markup to plain text: sentences, lists and headings.

Tables, references, pictures, categories and most templates are dropped with their content. Links
and bold or italic text keep their words. A line with a formula is dropped as a whole. The parser is
mwparserfromhell; this file decides what to keep.
"""

import bz2
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from pathlib import Path

import mwparserfromhell
from mwparserfromhell import nodes

XML = "{http://www.mediawiki.org/xml/export-0.10/}"

# The content of these tags is not prose.
DROPPED_TAGS = {"ref", "references", "table", "gallery", "source", "timeline", "imagemap", "hr"}
FORMULA_TAGS = {"math", "code", "chem"}
# Links into these namespaces are pictures and categories.
DROPPED_LINKS = {"file", "image", "category", "media"}
# Sections that list other texts.
DROPPED_SECTIONS = {
    "references", "notes", "footnotes", "bibliography", "further reading", "external links",
    "see also", "sources", "citations", "notes and references", "references and notes",
    "works cited", "literature", "gallery",
}  # fmt: skip
# Templates inside a sentence, and the index of the argument that the reader sees; -1 is the last.
TEMPLATE_WORDS = {
    "lang": 1, "transl": -1, "nihongo": 0, "nowrap": 0, "nobr": 0, "small": 0, "smaller": 0,
    "angbr": 0, "quote": 0, "cquote": 0, "vanchor": 0, "sc": 0, "ipa": 0, "val": 0, "nts": 0,
    "dts": 0, "unicode": 0, "tooltip": 0, "abbr": 0, "keypress": 0,
}  # fmt: skip
TEMPLATE_SIGNS = {"'s": "'s", "nbsp": " ", "spaces": " ", "·": "·", "pipe": "|", "ndash": "–"}
TEMPLATE_SIGNS |= {"spaced ndash": " – ", "snd": " – ", "mdash": "—", "'": "'", "!": " "}

# Comments, switches, references: removed first, because authors often nest them wrongly.
UNSEEN = re.compile(
    r"<!--.*?-->|__[A-Z]+__|<ref\b[^>]*/>|<ref\b[^>]*>.*?</ref\s*>", re.DOTALL | re.IGNORECASE
)
# A line with a formula in it, or with markup that its author did not close.
UNREADABLE = re.compile(r"\0|\[\[|\]\]|\{\{|\}\}|\{\||\|\}|</?[a-z]+[^<>]*>|^[|!]")

FORMULA = "\0"  # marks a line to drop
HEADING = "\1"  # marks a heading, once per level


def articles(dump: Path) -> Iterator[dict]:
    """The articles of a bz2 dump, in order, without redirects and project pages.

    Yields {"title", "page", "revision", "text"}; page and revision are Wikipedia's own numbers.
    """
    with bz2.open(dump) as file:
        for _, element in ElementTree.iterparse(file):
            if element.tag != f"{XML}page":
                continue
            if element.findtext(f"{XML}ns") == "0" and element.find(f"{XML}redirect") is None:
                yield {
                    "title": element.findtext(f"{XML}title"),
                    "page": int(element.findtext(f"{XML}id")),
                    "revision": int(element.findtext(f"{XML}revision/{XML}id")),
                    "text": plain(element.findtext(f"{XML}revision/{XML}text")),
                }
            element.clear()


def plain(markup: str) -> str:
    """The readable text of an article: paragraphs and headings, a blank line between them."""
    markup = UNSEEN.sub("", markup)
    lines = [tidy(line) for line in words(mwparserfromhell.parse(markup)).split("\n")]
    lines = [line for line in lines if not UNREADABLE.search(line)]
    lines = [line for line in lines if line == "" or re.search(r"\w", line)]
    text = "\n".join(without_empty_sections(lines))
    return re.sub(r"\n{3,}", "\n\n", text.replace(HEADING, "")).strip()


def words(code: mwparserfromhell.wikicode.Wikicode | None) -> str:
    """The visible text of parsed markup, before tidying."""
    return "".join(map(node_words, code.nodes)) if code is not None else ""


def node_words(node: nodes.Node) -> str:
    match node:
        case nodes.Text():
            return str(node)
        case nodes.HTMLEntity():
            return node.normalize()
        case nodes.Heading():
            return f"\n\n{HEADING * node.level}{words(node.title).strip()}\n\n"
        case nodes.ExternalLink():
            return words(node.title) if node.brackets else ""
        case nodes.Wikilink():
            namespace = str(node.title).partition(":")[0].strip().lower()
            if namespace in DROPPED_LINKS:
                return ""
            return words(node.title if node.text is None else node.text)
        case nodes.Template():
            return template_words(node)
        case nodes.Tag():
            return tag_words(node)
    return ""  # comments and template arguments


def tag_words(node: nodes.Tag) -> str:
    name = str(node.tag).strip().lower()
    if name in DROPPED_TAGS:
        return ""
    if name in FORMULA_TAGS:
        return FORMULA
    if name == "br":
        return "\n"
    if name == "li" and node.wiki_markup:  # "*" or "#"; its words follow as plain text
        return "- "
    inside = words(node.contents)
    if name == "sup" and re.fullmatch(r"[-−+]?\d+", inside):
        return f"^{inside}"
    return f"\n{inside}\n" if name in {"blockquote", "div", "poem", "center", "p"} else inside


def template_words(node: nodes.Template) -> str:
    name = str(node.name).strip().lower()
    arguments = [words(p.value).strip() for p in node.params if not p.showkey]
    if name in TEMPLATE_SIGNS:
        return TEMPLATE_SIGNS[name]
    if name.startswith("lang-") and arguments:
        return arguments[0]
    if name == "convert" and len(arguments) >= 2:  # {{convert|5|to|7|km|mi}}
        ranged = len(arguments) >= 4 and arguments[1] in {"to", "-", "–", "and", "or", "by", "x"}
        return " ".join(arguments[: 4 if ranged else 2])
    if name == "as of" and arguments:
        return "As of " + " ".join(arguments[::-1])
    if name == "chem":
        return "".join(arguments)
    if name in {"frac", "fraction"} and arguments:
        return "/".join(arguments)
    if name in TEMPLATE_WORDS and arguments:
        return arguments[min(TEMPLATE_WORDS[name], len(arguments) - 1)]
    return ""


def tidy(line: str) -> str:
    """Close the gaps that dropped references and templates leave in a line."""
    line = re.sub(r"'{2,}", "", line)  # marks of bold and italics that were never closed
    line = re.sub(r"\s+", " ", line)
    line = re.sub(r"([(\[])[\s,;:]+", r"\1", line)
    line = re.sub(r"[\s,;:]+([)\]])", r"\1", line)
    line = re.sub(r"\s*(\(\)|\[\])", "", line)
    return re.sub(r" +([,.;:!?])(?=\s|$)", r"\1", line).strip()


def without_empty_sections(lines: list[str]) -> list[str]:
    """Drop the sections of DROPPED_SECTIONS, and headings that have no text below them."""
    kept, skipping = [], 0
    for line in lines:
        level = len(line) - len(line.lstrip(HEADING))
        if level:
            if skipping and level > skipping:
                continue
            skipping = level if line[level:].strip().lower() in DROPPED_SECTIONS else 0
        if not skipping:
            kept.append(line)
    result, below = [], 1  # backwards; `below`: level of the heading just seen, 0 after text
    for line in reversed(kept):
        level = len(line) - len(line.lstrip(HEADING))
        if level and below and level >= below:
            continue
        if line:
            below = level
        result.append(line)
    return result[::-1]
