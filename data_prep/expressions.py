"""Filter expressions over columns, such as `aesthetic >= 4.7 and punsafe < 0.5 and lang in ['en', 'zh']`.

The text is parsed into Python's syntax tree and translated node by node into a pyarrow expression; nothing is evaluated by Python.
"""

import ast
from collections.abc import Callable, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds

from model.errors import UserError

COMPARISONS: dict[type[ast.cmpop], Callable[[Any, Any], Any]] = {
    ast.Lt: lambda a, b: a < b,
    ast.LtE: lambda a, b: a <= b,
    ast.Gt: lambda a, b: a > b,
    ast.GtE: lambda a, b: a >= b,
    ast.Eq: lambda a, b: a == b,
    ast.NotEq: lambda a, b: a != b,
}
ARITHMETIC: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: lambda a, b: a + b,
    ast.Sub: lambda a, b: a - b,
    ast.Mult: lambda a, b: a * b,
    ast.Div: lambda a, b: pc.divide(a.cast(pa.float64()), b.cast(pa.float64())),
}
FUNCTIONS: dict[str, tuple[int, Callable[..., Any]]] = {
    "len": (1, pc.utf8_length),
    "lower": (1, pc.utf8_lower),
    "abs": (1, pc.abs),
}
TEXT_TESTS: dict[str, Callable[..., Any]] = {
    "contains": pc.match_substring,
    "startswith": pc.starts_with,
    "endswith": pc.ends_with,
    "matches": pc.match_substring_regex,
}
"""Their second argument is a literal string."""


class ColumnExpression:
    """A parsed expression. `columns` are the names it reads.

    Raises:
        UserError: the text is not of the supported language; the message names the part.
    """

    def __init__(self, text: str) -> None:
        self.text = text
        self.columns: list[str] = []
        try:
            tree = ast.parse(text, mode="eval")
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
            raise UserError(f"expression {text!r}: {error}: write for instance `aesthetic >= 4.7 and lang in ['en']`") from error
        try:
            self._expression = self._translate(tree.body)
        except RecursionError as error:
            raise UserError(f"expression {text[:80]!r}: nested too deeply") from error

    def evaluate(self, rows: Sequence[dict[str, Any]]) -> list[bool | None]:
        """The value for each row; None where a column that decides is missing or has another type than most rows.

        Raises:
            UserError: the expression does not fit the columns' types.
        """
        table = pa.table({"": pa.nulls(len(rows)), **{name: column([row.get(name) for row in rows]) for name in self.columns}})
        try:
            values = ds.dataset(table).to_table(columns={"keep": self._expression}).column("keep").to_pylist()
        except (pa.ArrowException, NotImplementedError) as error:
            if all(table.column(name).null_count == len(rows) for name in self.columns):
                return [None] * len(rows)
            types = ", ".join(f"{name}: {table.schema.field(name).type}" for name in self.columns)
            raise UserError(f"expression {self.text!r} does not fit its columns ({types}): {error}") from error
        return [value if value is None else bool(value) for value in values]

    def _translate(self, node: ast.expr) -> Any:
        match node:
            case ast.Name(id=name):
                if name not in self.columns:
                    self.columns.append(name)
                return pc.field(name)
            case ast.Constant(value=bool() | int() | float() | str() as value):
                return pc.scalar(value)
            case ast.BoolOp(op=op, values=values):
                terms = [self._translate(value) for value in values]
                joined = terms[0]
                for term in terms[1:]:
                    joined = joined & term if isinstance(op, ast.And) else joined | term
                return joined
            case ast.UnaryOp(op=ast.Not(), operand=operand):
                return ~self._translate(operand)
            case ast.UnaryOp(op=ast.USub(), operand=operand):
                return pc.negate(self._translate(operand))
            case ast.BinOp(left=left, op=op, right=right) if type(op) in ARITHMETIC:
                return ARITHMETIC[type(op)](self._translate(left), self._translate(right))
            case ast.Compare(left=left, ops=ops, comparators=comparators):
                return self._compare(left, ops, comparators)
            case ast.Call(func=ast.Name(id=name), args=arguments, keywords=[]):
                return self._call(name, arguments)
        raise self._unsupported(node)

    def _compare(self, left: ast.expr, ops: Sequence[ast.cmpop], comparators: Sequence[ast.expr]) -> Any:
        joined = None
        for op, right in zip(ops, comparators, strict=True):
            match op, right:
                case (ast.Is() | ast.IsNot()), ast.Constant(value=None):
                    term = self._translate(left).is_null()
                    term = ~term if isinstance(op, ast.IsNot) else term
                case (ast.In() | ast.NotIn()), (ast.List(elts=items) | ast.Tuple(elts=items)):
                    term = self._isin(left, items)
                    term = ~term if isinstance(op, ast.NotIn) else term
                case _ if type(op) in COMPARISONS:
                    term = COMPARISONS[type(op)](self._translate(left), self._translate(right))
                case _:
                    raise self._unsupported(right)
            joined = term if joined is None else joined & term
            left = right
        return joined

    def _isin(self, value: ast.expr, items: Sequence[ast.expr]) -> Any:
        literals = []
        for item in items:
            if not isinstance(item, ast.Constant):
                raise self._unsupported(item)
            literals.append(item.value)
        tested = self._translate(value)
        # isin calls a missing value false; here it stays missing.
        return pc.if_else(tested.is_null(), pa.scalar(None, pa.bool_()), tested.isin(literals))

    def _call(self, name: str, arguments: Sequence[ast.expr]) -> Any:
        if name in FUNCTIONS and len(arguments) == FUNCTIONS[name][0]:
            return FUNCTIONS[name][1](*map(self._translate, arguments))
        if name in TEXT_TESTS and len(arguments) == 2:
            match arguments[1]:
                case ast.Constant(value=str() as pattern):
                    return TEXT_TESTS[name](self._translate(arguments[0]), pattern)
        raise UserError(
            f"expression {self.text!r}: no function {name} with {len(arguments)} arguments; there are "
            f"{', '.join([*FUNCTIONS, *TEXT_TESTS])}"
        )

    def _unsupported(self, node: ast.AST) -> UserError:
        part = ast.get_source_segment(self.text, node) or type(node).__name__
        return UserError(
            f"expression {self.text!r}: {part!r} is not supported: use columns, literals, comparisons, in [..], is None, "
            "and/or/not, + - * /, and " + ", ".join([*FUNCTIONS, *TEXT_TESTS])
        )


def column(values: list[Any]) -> pa.Array:
    """A column of loosely typed values: numbers, strings or booleans; whatever is not of the first value's type is null."""
    first = next((value for value in values if value is not None), None)
    kinds: tuple[type, ...] = (bool,) if isinstance(first, bool) else (int, float) if isinstance(first, int | float) else (str,)
    arrow = {(bool,): pa.bool_(), (int, float): pa.float64(), (str,): pa.string()}[kinds]
    return pa.array([_typed(value, kinds) for value in values], arrow)


def _typed(value: Any, kinds: tuple[type, ...]) -> Any:
    if isinstance(value, bool) != (kinds == (bool,)) or not isinstance(value, kinds):
        return None
    if isinstance(value, str):
        return value if value.isascii() else value.encode("utf-8", "replace").decode()
    return value if isinstance(value, bool) else float(value)
