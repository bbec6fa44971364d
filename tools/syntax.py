"""The code of a Python file, without its layout and its explanations."""

import ast


def code(path):
    """The file's syntax tree as a string: without comments, docstrings, layout, error messages.

    The words of an error change no result, because a run that raises an error has none.
    """
    tree = _tree(path)
    for node in ast.walk(tree):
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
            node.exc.args = []
    return ast.dump(tree)


def statements(path):
    """The syntax tree of each top-level statement of the file, error messages included."""
    return [ast.dump(statement) for statement in _tree(path).body]


def _tree(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(getattr(node, "body", None), list):
            node.body = [statement for statement in node.body if not _is_text(statement)]
    return tree


def _is_text(statement):
    """Whether a statement is only a string: a docstring of any kind."""
    value = getattr(statement, "value", None)
    text = isinstance(value, ast.Constant) and isinstance(value.value, str)
    return isinstance(statement, ast.Expr) and text
