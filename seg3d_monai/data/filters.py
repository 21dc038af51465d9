"""Filter expressions over the crop index: ``quality_image >= 2 and stain == "H2B"`` to SQL with bound parameters.

The expression is parsed with Python's own `ast`, and only a handful of node types is accepted. Constants never enter
the SQL text; they are bound. Names are looked up in a table of columns, so nothing a user types is ever pasted into a
statement.

Missing values follow SQL: a comparison with a missing value is neither true nor false, so the row is left out, also
under ``not``; ``stain == None`` and ``stain != None`` ask for missing and present values.

Must not know: the schema of the index, SQLite connections.
"""

import ast
import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Value = str | int | float
Kind = Literal["number", "text", "any"]

_COMPARISONS: dict[type[ast.cmpop], str] = {
    ast.Eq: "=",
    ast.NotEq: "<>",
    ast.Lt: "<",
    ast.LtE: "<=",
    ast.Gt: ">",
    ast.GtE: ">=",
}
_GRAMMAR = "a filter may hold column names, numbers, strings, comparisons, `in`, `and`, `or`, `not` and parentheses"


@dataclass(frozen=True)
class Column:
    """What a name in a filter stands for.

    Args:
        sql: SQL expression written by the index, never by a user.
        kind: type of its values; comparisons of text with numbers are refused, "any" is not checked.
        parameters: values bound to the question marks within `sql`.
    """

    sql: str
    kind: Kind = "any"
    parameters: tuple[Value, ...] = ()


@dataclass(frozen=True)
class _Term:
    sql: str
    parameters: tuple[Value, ...]
    kind: Kind | Literal["none"]


def compile_filter(expression: str, columns: Mapping[str, Column]) -> tuple[str, tuple[Value, ...]]:
    """Translate a filter expression into an SQL condition and its bound parameters.

    Args:
        expression: for example ``num_instances >= 2 and stain in ("H2B", "DAPI")``.
        columns: the names that may occur.

    Returns:
        The condition, in parentheses, and the parameters in the order of its question marks.

    Raises:
        ValueError: for anything outside the grammar, for an unknown column (with the nearest names and all of them),
            and for a comparison of text with numbers.
    """
    if not isinstance(expression, str):
        raise TypeError(f"where={expression!r} is a {type(expression).__name__}; give a filter expression as a string")
    try:
        tree = ast.parse(expression.strip(), mode="eval")
    except (SyntaxError, ValueError) as error:
        raise ValueError(f"where={expression!r} is not a filter expression: {error}; {_GRAMMAR}") from None
    return _Compiler(expression, columns).condition(tree.body)


class _Compiler:
    def __init__(self, expression: str, columns: Mapping[str, Column]) -> None:
        self._expression = expression
        self._columns = columns

    def condition(self, node: ast.expr) -> tuple[str, tuple[Value, ...]]:
        if isinstance(node, ast.BoolOp):
            parts = [self.condition(value) for value in node.values]
            joint = " AND " if isinstance(node.op, ast.And) else " OR "
            return f"({joint.join(sql for sql, _ in parts)})", tuple(p for _, values in parts for p in values)
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
            sql, parameters = self.condition(node.operand)
            return f"(NOT {sql})", parameters
        if isinstance(node, ast.Compare):
            return self._compare(node)
        if isinstance(node, ast.Constant) and isinstance(node.value, bool):
            return ("(1)" if node.value else "(0)"), ()
        if isinstance(node, ast.Name):
            term = self._term(node)
            if term.kind == "text":
                raise self._error(f"{node.id!r} holds text and is not a condition by itself; compare it with something")
            return f"({term.sql} <> 0)", term.parameters
        raise self._unsupported(node)

    def _compare(self, node: ast.Compare) -> tuple[str, tuple[Value, ...]]:
        parts: list[str] = []
        parameters: list[Value] = []
        left = node.left
        for operator, right in zip(node.ops, node.comparators, strict=True):
            if isinstance(operator, ast.In | ast.NotIn):
                sql, values = self._membership(left, operator, right)
            else:
                sql, values = self._comparison(left, operator, right)
            parts.append(sql)
            parameters.extend(values)
            left = right
        return f"({' AND '.join(parts)})", tuple(parameters)

    def _comparison(self, left: ast.expr, operator: ast.cmpop, right: ast.expr) -> tuple[str, tuple[Value, ...]]:
        a, b = self._term(left), self._term(right)
        if isinstance(operator, ast.Is | ast.IsNot):
            if b.kind != "none":
                raise self._error("`is` is for None only; use == or !=")
            operator = ast.Eq() if isinstance(operator, ast.Is) else ast.NotEq()
        if a.kind == "none":
            a, b = b, a
        if b.kind == "none":
            if a.kind == "none" or not isinstance(operator, ast.Eq | ast.NotEq):
                raise self._error("None can only be compared with a column, by == or !=")
            return f"({a.sql} IS {'NOT ' if isinstance(operator, ast.NotEq) else ''}NULL)", a.parameters
        # The terms may only have been swapped for None, so the direction of < and > is untouched here.
        self._check_kinds(left, a, right, b)
        return f"({a.sql} {_COMPARISONS[type(operator)]} {b.sql})", a.parameters + b.parameters

    def _membership(self, left: ast.expr, operator: ast.cmpop, right: ast.expr) -> tuple[str, tuple[Value, ...]]:
        if not isinstance(right, ast.Tuple | ast.List | ast.Set):
            raise self._error(f"`in` needs a list such as (1, 2), not {ast.unparse(right)!r}")
        a = self._term(left)
        items = [self._term(item) for item in right.elts]
        for item, item_node in zip(items, right.elts, strict=True):
            if a.kind == "none" or item.kind == "none":
                raise self._error("None cannot be used with `in`; use == None")
            self._check_kinds(left, a, item_node, item)
        keyword = "NOT IN" if isinstance(operator, ast.NotIn) else "IN"
        listing = ", ".join(item.sql for item in items)
        return f"({a.sql} {keyword} ({listing}))", a.parameters + tuple(p for item in items for p in item.parameters)

    def _term(self, node: ast.expr) -> _Term:
        if isinstance(node, ast.Name):
            column = self._columns.get(node.id)
            if column is None:
                raise self._unknown(node.id)
            return _Term(column.sql, column.parameters, column.kind)
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub | ast.UAdd):
            inner = self._term(node.operand)
            if isinstance(node.operand, ast.Constant) and inner.kind == "number":
                value = inner.parameters[0]
                assert not isinstance(value, str)
                return _Term("?", (-value if isinstance(node.op, ast.USub) else value,), "number")
        if isinstance(node, ast.Constant):
            if node.value is None:
                return _Term("NULL", (), "none")
            if isinstance(node.value, bool | int):
                if abs(int(node.value)) >= 2**63:
                    raise self._error(f"{node.value} does not fit 64 bits")
                return _Term("?", (int(node.value),), "number")
            if isinstance(node.value, float):
                return _Term("?", (node.value,), "number")
            if isinstance(node.value, str):
                return _Term("?", (node.value,), "text")
        raise self._unsupported(node)

    def _check_kinds(self, left: ast.expr, a: _Term, right: ast.expr, b: _Term) -> None:
        if {a.kind, b.kind} == {"number", "text"}:
            text, number = (left, right) if a.kind == "text" else (right, left)
            raise self._error(
                f"{ast.unparse(text)} is text and {ast.unparse(number)} is a number; they are never equal, "
                "quote both or neither"
            )

    def _unknown(self, name: str) -> ValueError:
        near = difflib.get_close_matches(name, self._columns, n=3, cutoff=0.5)
        guess = f", the nearest is {' or '.join(repr(n) for n in near)}" if near else ""
        return self._error(f"there is no column {name!r}{guess}; columns are {', '.join(sorted(self._columns))}")

    def _unsupported(self, node: ast.expr) -> ValueError:
        return self._error(f"{ast.unparse(node)!r} is not allowed here; {_GRAMMAR}")

    def _error(self, what: str) -> ValueError:
        return ValueError(f"where={self._expression!r}: {what}")
