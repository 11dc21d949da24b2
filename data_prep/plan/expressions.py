"""Filter expressions over columns, such as `aesthetic >= 4.7 and punsafe < 0.5 and lang in ['en', 'zh']`.

The text is parsed into Python's syntax tree and translated node by node into a pyarrow expression; Python
itself evaluates nothing of it. A column's type follows from its use (compared with a number, a string, ...).
Values of another type count as missing, so foreign data cannot break the evaluation.
"""

import ast
import math
from collections.abc import Callable, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute
import pyarrow.dataset as ds

from model.common.errors import UserError

pc: Any = pyarrow.compute
"""Typed Any, because pyarrow creates its functions at import, where type checkers do not see them."""

NUMBER, TEXT, TRUTH = pa.float64(), pa.string(), pa.bool_()
ANYTHING = pa.null()
"""Type of a column that is only tested for being present."""

COMPARISONS: dict[type[ast.cmpop], Callable[[Any, Any], Any]] = {
    ast.Lt: lambda a, b: a < b,
    ast.LtE: lambda a, b: a <= b,
    ast.Gt: lambda a, b: a > b,
    ast.GtE: lambda a, b: a >= b,
    ast.Eq: lambda a, b: a == b,
    ast.NotEq: lambda a, b: a != b,
}
ARITHMETIC: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: pc.add,
    ast.Sub: pc.subtract,
    ast.Mult: pc.multiply,
    ast.Div: pc.divide,
}
FUNCTIONS: dict[str, tuple[pa.DataType, pa.DataType, Callable[[Any], Any]]] = {
    "len": (TEXT, NUMBER, pc.utf8_length),
    "lower": (TEXT, TEXT, pc.utf8_lower),
    "abs": (NUMBER, NUMBER, pc.abs),
}
"""Name -> type of the argument, type of the result, function."""
TEXT_TESTS: dict[str, Callable[..., Any]] = {
    "contains": pc.match_substring,
    "startswith": pc.starts_with,
    "endswith": pc.ends_with,
    "matches": pc.match_substring_regex,
}
"""Tests of a text column; the second argument is a literal string."""


class ColumnExpression:
    """A parsed expression; `columns` maps the names that it reads to their types."""

    def __init__(self, text: str) -> None:
        """Parse an expression.

        Raises:
            UserError: if the text is not in the supported language; the message names the part.
        """
        self.text = text
        self.columns: dict[str, pa.DataType] = {}
        try:
            self._expression = self._translate(ast.parse(text.strip(), mode="eval").body, TRUTH)
            self.evaluate([{}])  # so that type errors show up now and not at the first row
        # `ast.parse` raises RecursionError or MemoryError for text that is nested too deeply.
        except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError, pa.ArrowException) as error:
            hint = "write for instance `aesthetic >= 4.7 and lang in ['en']`"
            raise UserError(f"expression {text[:200]!r}: {error}: {hint}") from error

    def evaluate(self, rows: Sequence[dict[str, Any]]) -> list[bool | None]:
        """Return the value for each row; None if a column that decides is missing or of another type."""
        # The unnamed column keeps the number of rows when the expression reads no column.
        arrays: dict[str, pa.Array] = {"": pa.nulls(len(rows))}
        for name, kind in self.columns.items():
            arrays[name] = column([row.get(name) for row in rows], kind)

        # A dataset computes a column from an expression; a table can only filter by one.
        table = ds.dataset(pa.table(arrays)).to_table(columns={"keep": self._expression})
        return table.column("keep").to_pylist()

    def _translate(self, node: ast.expr, want: pa.DataType) -> Any:
        """Return the pyarrow expression of `node`, whose value is used as type `want`."""
        match node:
            case ast.Name(id=name):
                return self._field(name, want)
            case ast.Constant(value=value) if _literal_type(value) == want:
                return pc.scalar(finite(value) if want == NUMBER else value)
            case ast.BoolOp(op=op, values=values) if want == TRUTH:
                terms = [self._translate(value, TRUTH) for value in values]
                # `&` and `|` follow Kleene's logic: false and missing is false, true or missing is true.
                joined = terms[0]
                for term in terms[1:]:
                    joined = joined & term if isinstance(op, ast.And) else joined | term
                return joined
            case ast.UnaryOp(op=ast.Not(), operand=operand) if want == TRUTH:
                return ~self._translate(operand, TRUTH)
            case ast.UnaryOp(op=ast.USub(), operand=operand) if want == NUMBER:
                return pc.negate(self._translate(operand, NUMBER))
            case ast.BinOp(left=left, op=op, right=right) if type(op) in ARITHMETIC and want == NUMBER:
                return ARITHMETIC[type(op)](self._translate(left, NUMBER), self._translate(right, NUMBER))
            case ast.Compare(left=left, ops=ops, comparators=comparators) if want == TRUTH:
                return self._compare(left, ops, comparators)
            case ast.Call(func=ast.Name(id=name), args=[argument], keywords=[]) if name in FUNCTIONS:
                argument_type, result_type, function = FUNCTIONS[name]
                # A function of another type falls through to the error below.
                if result_type == want:
                    return function(self._translate(argument, argument_type))
            case ast.Call(
                func=ast.Name(id=name), args=[argument, ast.Constant(value=str() as pattern)], keywords=[]
            ) if name in TEXT_TESTS and want == TRUTH:
                return TEXT_TESTS[name](self._translate(argument, TEXT), pattern)

        part = ast.get_source_segment(self.text.strip(), node) or type(node).__name__
        functions = ", ".join([*FUNCTIONS, *TEXT_TESTS])
        raise UserError(
            f"expression {self.text!r}: {part!r} is not supported there: use columns, literals, comparisons, "
            f"in [..], is None, and/or/not, + - * /, {functions}"
        )

    def _field(self, name: str, want: pa.DataType) -> Any:
        # A column that is so far only tested for None takes the type of a later use.
        known = self.columns.get(name, ANYTHING)
        if ANYTHING not in (known, want) and known != want:
            raise UserError(
                f"expression {self.text!r}: column {name} is used as {known} and as {want}: use it one way"
            )
        self.columns[name] = want if known == ANYTHING else known
        return pc.field(name)

    def _compare(self, left: ast.expr, ops: Sequence[ast.cmpop], comparators: Sequence[ast.expr]) -> Any:
        # a < b < c means a < b and b < c, as in Python.
        joined = None
        for op, right in zip(ops, comparators, strict=True):
            match op, right:
                case ((ast.Is() | ast.IsNot()), ast.Constant(value=None)):
                    term = pc.is_null(self._translate(left, _static_type(left) or ANYTHING))
                    term = ~term if isinstance(op, ast.IsNot) else term
                case ((ast.In() | ast.NotIn()), (ast.List(elts=items) | ast.Tuple(elts=items))):
                    term = self._isin(left, items)
                    term = ~term if isinstance(op, ast.NotIn) else term
                case _ if type(op) in COMPARISONS:
                    # Two bare columns are compared as numbers.
                    kind = _static_type(left) or _static_type(right) or NUMBER
                    term = COMPARISONS[type(op)](self._translate(left, kind), self._translate(right, kind))
                case _:
                    raise ValueError(f"{ast.unparse(right)!r} cannot follow {type(op).__name__.lower()}")
            joined = term if joined is None else joined & term
            left = right
        return joined

    def _isin(self, value: ast.expr, items: Sequence[ast.expr]) -> Any:
        literals = [ast.literal_eval(item) for item in items]
        kinds = {_literal_type(literal) for literal in literals}
        if len(kinds) != 1 or None in kinds:
            raise ValueError("a list needs literals of one type, at least one")
        (kind,) = kinds
        tested = self._translate(value, kind)
        # `isin` needs both sides of one type, and columns of numbers are fp64.
        listed = pa.array([float(literal) if kind == NUMBER else literal for literal in literals], kind)

        # `isin` returns false for a missing value; here it stays missing.
        return pc.if_else(pc.is_null(tested), pa.scalar(None, TRUTH), tested.isin(listed))


def _literal_type(value: Any) -> pa.DataType | None:
    # Before numbers, because Python's bool is an int.
    if isinstance(value, bool):
        return TRUTH
    if isinstance(value, int | float):
        return NUMBER
    return TEXT if isinstance(value, str) else None


def _static_type(node: ast.expr) -> pa.DataType | None:
    """Return the type that a node has regardless of its context; None for a bare column."""
    match node:
        case ast.Constant(value=value):
            return _literal_type(value)
        case ast.BinOp() | ast.UnaryOp(op=ast.USub()):
            return NUMBER
        case ast.Call(func=ast.Name(id=name)) if name in FUNCTIONS:
            return FUNCTIONS[name][1]
        case ast.Name():
            return None
    return TRUTH


def column(values: Sequence[Any], kind: pa.DataType) -> pa.Array:
    """Return foreign values of any type as one column; values of another type than `kind` are null."""
    if kind == ANYTHING:
        return pa.array([None if value is None else True for value in values], TRUTH)
    return pa.array([_typed(value, kind) for value in values], kind)


def _typed(value: Any, kind: pa.DataType) -> Any:
    if value is None or _literal_type(value) != kind:
        return None
    if kind == NUMBER:
        return finite(value)
    if kind == TEXT:
        return value.encode("utf-8", "replace").decode()  # without lone surrogates, which Arrow refuses
    return value


def finite(value: Any) -> float | None:
    """Return a foreign value as a number; None if it is not a number, or not finite."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        # Python's integers have no limit, so one may exceed the range of a float.
        return float(value) if math.isfinite(value) else None
    except OverflowError:
        return None
