"""Filter expressions over volumes and crops: ``quality_image >= 2 and stain == "H2B"``.

The expression is parsed with Python's own `ast`, and only a handful of node types is accepted; it is evaluated on
columns, never as Python and never as SQL. Columns of volumes are lists of values, columns of crops are arrays; a part
of an expression that speaks of volumes alone is decided once a volume, so that ten million crops take a fraction of a
second.

Missing values are as in SQL: a comparison with a missing value is neither true nor false, so the row is left out, also
under ``not``; ``stain == None`` and ``stain != None`` ask for missing and present values. Text and numbers in one
column are unequal and in no order.

Must not know: the index, SQLite, manifests.
"""

import ast
import difflib
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

Value = str | int | float
Kind = Literal["number", "text", "any"]
Level = Literal["volume", "crop"]

_COMPARISONS: dict[type[ast.cmpop], Callable[[Any, Any], Any]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
}
_GRAMMAR = "a filter may hold column names, numbers, strings, comparisons, `in`, `and`, `or`, `not` and parentheses"


@dataclass(frozen=True)
class Column:
    """What a name in a filter stands for.

    Args:
        kind: type of its values; comparisons of text with numbers are refused, "any" is not checked.
        level: whether there is a value a volume, which may be missing, or a number a crop.
    """

    kind: Kind = "any"
    level: Level = "volume"


@dataclass(frozen=True)
class Table:
    """Columns to evaluate a filter on.

    Args:
        volumes: name -> a value a volume, None where it is missing.
        crops: name -> a number a crop, the crops of the first volume first.
        num_crops: crops of each volume.
    """

    volumes: Mapping[str, Sequence[Value | None]]
    crops: Mapping[str, np.ndarray]
    num_crops: Sequence[int]


@dataclass(frozen=True)
class _Truth:
    """Where a condition is true and where it is false; elsewhere a value is missing."""

    true: np.ndarray
    false: np.ndarray
    level: Level

    def at(self, level: Level, table: Table) -> "_Truth":
        if self.level == level:
            return self
        return _Truth(np.repeat(self.true, table.num_crops), np.repeat(self.false, table.num_crops), "crop")


@dataclass(frozen=True)
class _Term:
    """A column or a constant."""

    kind: Kind | Literal["none"]
    column: str | None = None
    level: Level = "volume"
    value: Value | None = None


_Condition = Callable[[Table], _Truth]


class Filter:
    """A parsed filter expression.

    Args:
        expression: for example ``num_instances >= 2 and stain in ("H2B", "DAPI")``.
        columns: the names that may occur.

    Attributes:
        names: the columns that do occur.
        level: whether it can be decided by the volume.

    Raises:
        ValueError: for anything outside the grammar, for an unknown column (with the nearest names and all of them),
            and for a comparison of text with numbers.
        TypeError: if the expression is no string.
    """

    def __init__(self, expression: str, columns: Mapping[str, Column]) -> None:
        if not isinstance(expression, str):
            found = type(expression).__name__
            raise TypeError(f"where={expression!r} is a {found}; give a filter expression as a string")
        compiler = _Compiler(expression, columns)
        try:
            if "\0" in expression:  # which ast.parse refuses with another error in each Python
                raise SyntaxError("it holds a null byte")
            self._condition = compiler.condition(ast.parse(expression.strip(), mode="eval").body)
        except (SyntaxError, RecursionError, MemoryError) as error:
            raise ValueError(f"where={expression!r} is not a filter expression: {error}; {_GRAMMAR}") from None
        self.names = frozenset(compiler.names)
        self.level: Level = "crop" if any(columns[name].level == "crop" for name in self.names) else "volume"

    def __call__(self, table: Table) -> np.ndarray:
        """Where the expression is true: bool, a volume each or a crop each as `level` says."""
        return self._condition(table).at(self.level, table).true


class _Compiler:
    def __init__(self, expression: str, columns: Mapping[str, Column]) -> None:
        self._expression = expression
        self._columns = columns
        self.names: set[str] = set()

    def condition(self, node: ast.expr) -> _Condition:
        if isinstance(node, ast.BoolOp):
            parts = [self.condition(value) for value in node.values]
            return _joined(parts, isinstance(node.op, ast.And))
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
            return _negated(self.condition(node.operand))
        if isinstance(node, ast.Compare):
            return self._compare(node)
        if isinstance(node, ast.Constant) and isinstance(node.value, bool):
            return _constant(node.value)
        if isinstance(node, ast.Name):
            term = self._term(node)
            if term.kind == "text":
                raise self._error(f"{node.id!r} holds text and is not a condition by itself; compare it with something")
            return _comparison(term, operator.ne, _Term("number", value=0))
        raise self._unsupported(node)

    def _compare(self, node: ast.Compare) -> _Condition:
        parts: list[_Condition] = []
        left = node.left
        for op, right in zip(node.ops, node.comparators, strict=True):
            if isinstance(op, ast.In | ast.NotIn):
                parts.append(self._membership(left, op, right))
            else:
                parts.append(self._comparison(left, op, right))
            left = right
        return _joined(parts, True)

    def _comparison(self, left: ast.expr, op: ast.cmpop, right: ast.expr) -> _Condition:
        a, b = self._term(left), self._term(right)
        if isinstance(op, ast.Is | ast.IsNot):
            if b.kind != "none":
                raise self._error("`is` is for None only; use == or !=")
            op = ast.Eq() if isinstance(op, ast.Is) else ast.NotEq()
        if a.kind == "none":
            a, b = b, a
        if b.kind == "none":
            if a.column is None or not isinstance(op, ast.Eq | ast.NotEq):
                raise self._error("None can only be compared with a column, by == or !=")
            return _is_missing(a, isinstance(op, ast.Eq))
        self._check_kinds(left, a, right, b)
        return _comparison(a, _COMPARISONS[type(op)], b)

    def _membership(self, left: ast.expr, op: ast.cmpop, right: ast.expr) -> _Condition:
        if not isinstance(right, ast.Tuple | ast.List | ast.Set):
            raise self._error(f"`in` needs a list such as (1, 2), not {ast.unparse(right)!r}")
        a = self._term(left)
        items = [self._term(item) for item in right.elts]
        for item, item_node in zip(items, right.elts, strict=True):
            if a.kind == "none" or item.kind == "none":
                raise self._error("None cannot be used with `in`; use == None")
            self._check_kinds(left, a, item_node, item)
        found = _joined([_comparison(a, operator.eq, item) for item in items], False)
        return _negated(found) if isinstance(op, ast.NotIn) else found

    def _term(self, node: ast.expr) -> _Term:
        if isinstance(node, ast.Name):
            column = self._columns.get(node.id)
            if column is None:
                raise self._unknown(node.id)
            self.names.add(node.id)
            return _Term(column.kind, node.id, column.level)
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub | ast.UAdd):
            inner = self._term(node.operand)
            if isinstance(node.operand, ast.Constant) and inner.kind == "number":
                assert isinstance(inner.value, int | float)
                return _Term("number", value=-inner.value if isinstance(node.op, ast.USub) else inner.value)
        if isinstance(node, ast.Constant):
            if node.value is None:
                return _Term("none")
            if isinstance(node.value, bool | int):
                if abs(int(node.value)) >= 2**63:
                    raise self._error(f"{node.value} does not fit 64 bits")
                return _Term("number", value=int(node.value))
            if isinstance(node.value, float):
                return _Term("number", value=node.value)
            if isinstance(node.value, str):
                return _Term("text", value=node.value)
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


def _constant(is_true: bool) -> _Condition:
    def evaluate(table: Table) -> _Truth:
        true = np.full(len(table.num_crops), is_true)
        return _Truth(true, ~true, "volume")

    return evaluate


def _negated(part: _Condition) -> _Condition:
    def evaluate(table: Table) -> _Truth:
        truth = part(table)
        return _Truth(truth.false, truth.true, truth.level)

    return evaluate


def _joined(parts: Sequence[_Condition], is_all: bool) -> _Condition:
    def evaluate(table: Table) -> _Truth:
        truth = _constant(is_all)(table)
        for part in parts:
            other = part(table)
            level: Level = "crop" if "crop" in (truth.level, other.level) else "volume"
            a, b = truth.at(level, table), other.at(level, table)
            if is_all:
                truth = _Truth(a.true & b.true, a.false | b.false, level)
            else:
                truth = _Truth(a.true | b.true, a.false & b.false, level)
        return truth

    return evaluate


def _is_missing(term: _Term, is_wanted: bool) -> _Condition:
    def evaluate(table: Table) -> _Truth:
        assert term.column is not None
        if term.level == "crop":
            return _constant(not is_wanted)(table)
        true = np.array([(value is None) == is_wanted for value in table.volumes[term.column]], bool)
        return _Truth(true, ~true, "volume")

    return evaluate


def _comparison(a: _Term, compare: Callable[[Any, Any], Any], b: _Term) -> _Condition:
    def evaluate(table: Table) -> _Truth:
        if "crop" not in (a.level, b.level):
            count = len(table.num_crops)
            pairs = zip(_of_volumes(a, table, count), _of_volumes(b, table, count), strict=True)
            found = [_compare(compare, left, right) for left, right in pairs]
            return _Truth(
                np.array([f is True for f in found], bool), np.array([f is False for f in found], bool), "volume"
            )
        (left, left_known), (right, right_known) = _of_crops(a, table), _of_crops(b, table)
        true = np.asarray(compare(left, right), bool)
        known = np.logical_and(left_known, right_known)
        return _Truth(true & known, ~true & known, "crop")

    return evaluate


def _compare(compare: Callable[[Any, Any], Any], a: Value | None, b: Value | None) -> bool | None:
    if a is None or b is None:
        return None
    if isinstance(a, str) != isinstance(b, str) and compare not in (operator.eq, operator.ne):
        return None
    return bool(compare(a, b))


def _of_volumes(term: _Term, table: Table, count: int) -> Sequence[Value | None]:
    return [term.value] * count if term.column is None else table.volumes[term.column]


def _of_crops(term: _Term, table: Table) -> tuple[Any, Any]:
    """The numbers of a term for every crop, and where they are known."""
    if term.column is None:
        return term.value, True
    if term.level == "crop":
        return table.crops[term.column], True
    values = table.volumes[term.column]
    known = np.array([isinstance(value, int | float) for value in values], bool)
    numbers = np.array([value if isinstance(value, int | float) else 0 for value in values], np.float64)
    return np.repeat(numbers, table.num_crops), np.repeat(known, table.num_crops)
