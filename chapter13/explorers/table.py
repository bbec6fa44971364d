"""A small table for a stored notebook: HTML where it can be shown, aligned text elsewhere."""

import html
import re

_LEFT = 'style="text-align: left"'


class Table:
    """Values side by side: a column for each case, a row for each thing that is told of it.

    head: (label, values) rows that say what the cases are; body: those that say what came out. All
    have as many values, texts.

    >>> Table([("bits", ["8", "4"])], [("levels", ["255", "15"])])
    bits    8    4
    ------  ---  --
    levels  255  15
    """

    def __init__(self, head, body):
        self.head = list(head)
        self.body = list(body)

    def __repr__(self):
        rows = [[label, *values] for label, values in self.head + self.body]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        rows.insert(len(self.head), ["-" * width for width in widths])
        padded = (map(str.ljust, row, widths) for row in rows)
        return "\n".join("  ".join(cells).rstrip() for cells in padded)

    def _repr_html_(self):
        head = "".join(_html_row(label, values, "th") for label, values in self.head)
        body = "".join(_html_row(label, values, "td") for label, values in self.body)
        # 1em: as large as the text around it, also on a slide
        return f'<table style="font-size: 1em"><thead>{head}</thead><tbody>{body}</tbody></table>'


def _html_row(label, values, tag):
    cells = "".join(f"<{tag} {_LEFT}>{_breakable(escaped(value))}</{tag}>" for value in values)
    return f"<tr><th {_LEFT}>{escaped(label)}</th>{cells}</tr>"


def _breakable(text):
    """Lets a line break after the dots of a layer's name: model.layers.0.mlp.up_proj.weight."""
    return re.sub(r"\w+(\.\w+){2,}", lambda name: name[0].replace(".", ".<wbr>"), text)


def escaped(text):
    """Text as HTML; two spaces, which browsers would drop, indent it."""
    return html.escape(text).replace("  ", "&emsp;")
