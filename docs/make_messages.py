"""All one-line errors of the code as a page of the site; the build makes the page from the code.

A row has the message, with … for what differs, and the `Raises:` of the function that raises it.
"""

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from benchmarks.house import PACKAGES
from docs.make_figures import ROOT, purpose

NAME = "UserError"
HEAD = """---
search:
  boost: 5
---

# All messages

Every line that starts with `error:`, by the sub-package that prints it. `…` is what differs each time. The
message names the thing and the way out; next to it is what the code's documentation says about the error or,
where it says nothing, about the function that finds it. The common ones are explained in
[Troubleshooting](troubleshooting.md).
"""


class Message(NamedTuple):
    """A one-line error, and what the code says about it."""

    text: str
    about: str


def messages(path: Path) -> Iterator[Message]:
    """Yield the messages of a file of Python, in its order."""
    text = path.read_text()
    if NAME not in text:
        return
    tree = ast.parse(text)
    docstrings: dict[ast.AST, str] = {tree: ast.get_docstring(tree) or ""}

    # breadth first, so that a parent's text is there before its children ask for it
    for node in ast.walk(tree):
        for child in ast.iter_child_nodes(node):
            own = ast.get_docstring(child) if isinstance(child, ast.FunctionDef | ast.ClassDef) else None
            docstrings[child] = own or docstrings[node]
    calls = [node for node in docstrings if isinstance(node, ast.Call) and is_name(node.func, NAME)]
    for call in sorted(calls, key=lambda call: call.lineno):
        text = " ".join(literal(call.args[0]).split())
        # a message that another library or a caller words is no row
        if re.search(r"\w", text):
            yield Message(text, meaning(docstrings[call]))


def is_name(node: ast.expr, name: str) -> bool:
    """True if an expression is a plain name."""
    return isinstance(node, ast.Name) and node.id == name


def literal(node: ast.expr) -> str:
    """Return the text of an expression, with … for what is known only when it runs."""
    match node:
        case ast.Constant(value=str(text)):
            return text
        case ast.JoinedStr(values=values):
            return "".join(literal(value) for value in values)
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            return literal(left) + literal(right)
        case ast.IfExp(body=body):
            return literal(body)
    return "…"


def meaning(docstring: str) -> str:
    """Return what a docstring says about the error, or its first sentence."""
    raises = re.search(rf"^\s*{NAME}: (.*?)(?=\n\s*\n|\n\s*\w+(?:Error|Exit): |\Z)", docstring, re.S | re.M)
    text = raises[1] if raises else docstring.split("\n\n")[0]
    return " ".join(text.split())


def rooms() -> Iterator[tuple[str, list[Path]]]:
    """Yield each package and sub-package by its dotted name, with its files."""
    for package in PACKAGES:
        files = sorted((ROOT / package).rglob("*.py"))
        for folder in sorted({file.parent for file in files}):
            yield ".".join(folder.relative_to(ROOT).parts), [file for file in files if file.parent == folder]


def script_messages() -> list[str]:
    """Return the messages of the cluster's scripts, with … for variables."""
    found: list[str] = []
    for path in sorted((ROOT / "cluster").glob("*.sh")):
        for text in re.findall(r'\bfail "((?:[^"\\]|\\.)*)"', path.read_text()):
            found.append(re.sub(r"\$\{[^}]*\}|\$\([^)]*\)|\$\w+|\$\*", "…", text).replace("\\`", "`"))
    return found


def row(*cells: str) -> str:
    """Return a row of a table, the message in the first cell as code."""
    message, *others = (text.replace("|", "\\|") for text in cells)
    return " | ".join(["| `" + message.replace("`", "") + "`", *others]) + " |"


def page() -> str:
    """Return the page as Markdown."""
    lines = [HEAD]
    for room, files in rooms():
        # in the order of the code; a message that is raised twice is one row
        rows: dict[str, None] = {}
        for file in files:
            rows |= dict.fromkeys(row(*message) for message in messages(file))
        if rows:
            lines += [f"## {room}", purpose(ROOT, room), ""]
            lines += ["| message | from the code |", "|---|---|", *rows, ""]

    lines += ["## cluster", "", "| message |", "|---|", *map(row, script_messages())]
    return "\n".join(lines) + "\n"
