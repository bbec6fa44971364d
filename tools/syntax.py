"""What a Python file computes, apart from how it is laid out and explained."""

import ast


def code(path):
    """The file's syntax tree as a string: without comments, docstrings, layout, error messages.

    What an error says changes no result: where one is raised there is none.
    """
    tree = _tree(path)
    for node in ast.walk(tree):
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
            node.exc.args = []
    return ast.dump(tree)


def statements(path):
    """The syntax tree, error messages included, of each statement at the top of the file."""
    return [ast.dump(statement) for statement in _tree(path).body]


def _tree(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(getattr(node, "body", None), list):
            node.body = [statement for statement in node.body if not _is_text(statement)]
    return tree


def _is_text(statement):
    """Whether a statement is only a string: a docstring, of whatever."""
    value = getattr(statement, "value", None)
    text = isinstance(value, ast.Constant) and isinstance(value.value, str)
    return isinstance(statement, ast.Expr) and text
