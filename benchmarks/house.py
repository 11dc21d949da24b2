"""Count the figures of the code's form: air, length, annotations, and imports between files and folders.

`python -m benchmarks.house [ROOT ...]` prints one column per checkout, so that a change can be compared with
the commit before it. It needs only the standard library and imports none of the code that it measures.
`tests/test_figures.py` holds the limits.
"""

import argparse
import ast
import io
import json
import statistics
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

PACKAGES = ("model", "data_prep", "pipeline")
MAX_LINE = 110

COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
DOCUMENTED = (ast.Module, ast.ClassDef, *FUNCTIONS)
# From Python 3.12 on, an f-string is several tokens.
STRING_TOKENS = (tokenize.STRING, getattr(tokenize, "FSTRING_MIDDLE", tokenize.STRING))


@dataclass
class Counts:
    """Counts over a set of files. They add up, so a package is the sum of its files."""

    files: int = 0
    lines: int = 0
    nodes: int = 0
    """Nodes of the syntax tree without docstrings: the amount of code, however it is formatted."""

    comment_lines: int = 0
    docstring_lines: int = 0
    long_lines: int = 0

    function_lines: int = 0
    function_blanks: int = 0
    code_blanks: int = 0
    function_lengths: list[int] = field(default_factory=list)
    annotated: int = 0

    comprehensions: int = 0
    nested_comprehensions: int = 0
    raises: int = 0
    asserts: int = 0

    def __add__(self, other: "Counts") -> "Counts":
        return Counts(*(getattr(self, name) + getattr(other, name) for name in Counts.__dataclass_fields__))

    def percent(self, part: str, whole: str = "lines") -> float:
        """Share of one count in another, in percent."""
        return 100 * getattr(self, part) / max(getattr(self, whole), 1)

    def per_thousand(self, name: str) -> float:
        """Occurrences per 1,000 lines."""
        return 1000 * getattr(self, name) / max(self.lines, 1)

    def function_percentile(self, percent: int) -> int:
        """Length of a function in lines at a percentile of all functions."""
        ordered = sorted(self.function_lengths) or [0]
        return ordered[min(len(ordered) * percent // 100, len(ordered) - 1)]


def source_files(root: Path, package: str) -> list[Path]:
    """Python files of one package, in the order of their paths."""
    return sorted((root / package).rglob("*.py"))


def count_file(path: Path) -> Counts:
    """Count one file."""
    text = path.read_text()
    lines = text.splitlines()
    tree = ast.parse(text)
    tokens = list(tokenize.generate_tokens(io.StringIO(text).readline))
    docstrings = list(_docstrings(tree))

    counts = Counts(files=1, lines=len(lines))
    counts.docstring_lines = sum(map(_length, docstrings))
    counts.long_lines = sum(len(line) > MAX_LINE for line in lines)
    counts.comment_lines = sum(
        token.type == tokenize.COMMENT and not token.line[: token.start[1]].strip() for token in tokens
    )

    _count_nodes(tree, counts)
    counts.nodes -= 2 * len(docstrings)  # A docstring is two nodes: an expression statement and its constant.
    _count_blanks(tree, lines, tokens, counts)
    return counts


def _length(node: ast.stmt) -> int:
    """Lines that a statement takes."""
    return (node.end_lineno or node.lineno) - node.lineno + 1


def _docstrings(tree: ast.Module) -> Iterator[ast.Expr]:
    """Docstrings, and strings below an attribute, which document it."""
    for node in ast.walk(tree):
        if not isinstance(node, DOCUMENTED):
            continue

        for statement in node.body:
            if not isinstance(statement, ast.Expr) or not isinstance(statement.value, ast.Constant):
                continue
            if isinstance(statement.value.value, str):
                yield statement


def _count_nodes(tree: ast.AST, counts: Counts, inside_comprehension: bool = False) -> None:
    """Count functions, comprehensions, raises and asserts below a node of the syntax tree."""
    for node in ast.iter_child_nodes(tree):
        counts.nodes += not isinstance(node, ast.expr_context)
        is_comprehension = isinstance(node, COMPREHENSIONS)
        counts.comprehensions += is_comprehension
        counts.nested_comprehensions += is_comprehension and (
            inside_comprehension or len(node.generators) > 1
        )
        counts.raises += isinstance(node, ast.Raise)
        counts.asserts += isinstance(node, ast.Assert)

        if isinstance(node, FUNCTIONS):
            counts.function_lengths.append(_length(node))
            counts.annotated += _is_annotated(node)

        _count_nodes(node, counts, inside_comprehension or is_comprehension)


def _is_annotated(function: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    """True if every parameter but `self` and `cls`, and the returned value, has a type."""
    spec = function.args
    parameters = [*spec.posonlyargs, *spec.args, *spec.kwonlyargs]
    parameters += [extra for extra in (spec.vararg, spec.kwarg) if extra]
    typed = [
        parameter.annotation is not None for parameter in parameters if parameter.arg not in ("self", "cls")
    ]
    return all(typed) and function.returns is not None


def _count_blanks(
    tree: ast.Module, lines: list[str], tokens: list[tokenize.TokenInfo], counts: Counts
) -> None:
    """Count blank lines inside functions: all of them, and those that are not inside a docstring."""
    inside_functions: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, FUNCTIONS):
            inside_functions |= set(range(node.lineno, node.lineno + _length(node)))

    inside_strings: set[int] = set()
    for token in tokens:
        if token.type in STRING_TOKENS:
            inside_strings |= set(range(token.start[0], token.end[0] + 1))

    blanks = {number for number in inside_functions if not lines[number - 1].strip()}
    counts.function_lines = len(inside_functions)
    counts.function_blanks = len(blanks)
    counts.code_blanks = len(blanks - inside_strings)


def count_package(root: Path, package: str) -> Counts:
    """Count all files of a package."""
    total = Counts()
    for path in source_files(root, package):
        total += count_file(path)
    return total


def module_name(root: Path, path: Path) -> str:
    """Dotted name of a file. That of an `__init__.py` is its folder's."""
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_between(root: Path) -> set[tuple[str, str]]:
    """Pairs (importing module, imported module) of the packages, imports inside functions included."""
    modules = {module_name(root, path): path for package in PACKAGES for path in source_files(root, package)}
    pairs: set[tuple[str, str]] = set()
    for module, path in modules.items():
        for node in ast.walk(ast.parse(path.read_text())):
            for target in _imported(node):
                # `from a.b import c` names a module where a file `a/b/c.py` exists, else a name in `a/b.py`.
                owner = target if target in modules else target.rpartition(".")[0]
                if owner in modules and owner != module:
                    pairs.add((module, owner))
    return pairs


def _imported(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom) and node.module:
        return [f"{node.module}.{alias.name}" for alias in node.names]
    return []


def room(module: str) -> str:
    """Entry of its package's folder that a module is in: a file at the top, or a whole sub-folder."""
    return ".".join(module.split(".")[:2])


def count_rooms(root: Path, package: str, imports: set[tuple[str, str]]) -> dict[str, int]:
    """Count the files and rooms of a package, and the distinct `imports` between each."""
    files = {module_name(root, path) for path in source_files(root, package) if path.name != "__init__.py"}
    arrows = {(source, target) for source, target in imports if {source, target} <= files}
    rooms = {room(module) for module in files}
    room_arrows = {(room(source), room(target)) for source, target in arrows if room(source) != room(target)}
    return {"files": len(files), "imports": len(arrows), "rooms": len(rooms), "arrows": len(room_arrows)}


def figures(root: Path) -> dict[str, float | int | str]:
    """All figures of a checkout: name -> value, in the order of the table."""
    packages = {package: count_package(root, package) for package in PACKAGES}
    total = sum(packages.values(), Counts())

    rows: dict[str, float | int | str] = {
        "comment lines %": round(total.percent("comment_lines"), 2),
        "blank lines inside functions %": round(total.percent("function_blanks", "function_lines"), 2),
        "of them outside docstrings %": round(total.percent("code_blanks", "function_lines"), 2),
        "comprehensions per 1,000 lines": round(total.per_thousand("comprehensions"), 1),
        "nested comprehensions per 1,000 lines": round(total.per_thousand("nested_comprehensions"), 2),
        f"lines over {MAX_LINE} characters %": round(total.percent("long_lines"), 2),
        "docstring lines %": round(total.percent("docstring_lines"), 1),
        "function length, median": round(statistics.median(total.function_lengths or [0])),
        "function length, p90": total.function_percentile(90),
        "function length, max": max(total.function_lengths, default=0),
        "annotated functions %": round(100 * total.annotated / max(len(total.function_lengths), 1), 1),
        "raises per 1,000 lines": round(total.per_thousand("raises"), 1),
        "asserts per 1,000 lines": round(total.per_thousand("asserts"), 1),
    }

    imports = imports_between(root)
    for package, counts in packages.items():
        rooms = count_rooms(root, package, imports)
        rows[f"{package}: files / imports between them"] = f"{rooms['files']} / {rooms['imports']}"
        rows[f"{package}: rooms / arrows between them"] = f"{rooms['rooms']} / {rooms['arrows']}"
        rows[f"{package}: lines"] = counts.lines
        rows[f"{package}: syntax nodes of code"] = counts.nodes

    rows["all packages: lines"] = total.lines
    rows["all packages: syntax nodes of code"] = total.nodes
    return rows


def table(columns: dict[str, dict[str, float | int | str]]) -> str:
    """Figures of several checkouts as Markdown, one column each."""
    names = list(next(iter(columns.values())))
    lines = ["| | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for name in names:
        cells = [_cell(column[name]) for column in columns.values()]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(value: float | int | str) -> str:
    return f"{value:,}" if isinstance(value, int) else str(value)


def main() -> None:
    """Print the table, and last one line of JSON."""
    parser = argparse.ArgumentParser(description="Count the figures of the code's form")
    here = Path(__file__).resolve().parent.parent
    parser.add_argument(
        "roots", nargs="*", type=Path, default=[here], metavar="ROOT", help="checkouts, one column each"
    )
    arguments = parser.parse_args()

    columns = {str(root): figures(root) for root in arguments.roots}
    print(table(columns))
    print(json.dumps({"benchmark": "house", "figures": columns}))


if __name__ == "__main__":
    main()
