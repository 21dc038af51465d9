"""Everything public says what it is; what a room offers also explains its parameters, results and errors."""

import ast
import importlib
import inspect
import pkgutil
import re
import textwrap
from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from typing import Any

import pytest

import seg3d_monai

PACKAGE = Path(seg3d_monai.__file__).parent
ROOMS = [module.name for module in pkgutil.iter_modules(seg3d_monai.__path__) if module.ispkg]
DELEGATES = re.compile(r"[Aa]rguments (as|for|are)|Args: as of|arguments these are")
"""Where the parameters are explained: another docstring that is named."""


def silent(tree: ast.AST, name: str) -> Iterator[str]:
    """Public classes, functions and methods below a node that have no docstring."""
    for node in ast.iter_child_nodes(tree):
        if not isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) or node.name.startswith("_"):
            continue
        is_overload = any(isinstance(each, ast.Name) and each.id == "overload" for each in node.decorator_list)
        if ast.get_docstring(node) is None and not is_overload:
            yield f"{name}:{node.lineno} {node.name}"
        if isinstance(node, ast.ClassDef):
            yield from silent(node, name)


def test_everything_public_has_a_docstring() -> None:
    found = []
    for file in sorted(PACKAGE.rglob("*.py")):
        tree = ast.parse(file.read_text(encoding="utf-8"))
        name = file.relative_to(PACKAGE).as_posix()
        found += [name] if ast.get_docstring(tree) is None else []
        found += silent(tree, name)
    assert found == []


def offered() -> list[tuple[str, Any]]:
    """What the rooms export, by dotted name."""
    found = []
    for room in ROOMS:
        module = importlib.import_module(f"seg3d_monai.{room}")
        things = [(name, getattr(module, name)) for name in getattr(module, "__all__", [])]
        found += [
            (f"{room}.{name}", thing) for name, thing in things if inspect.isroutine(thing) or inspect.isclass(thing)
        ]
    return found


def lacking(thing: Any) -> list[str]:
    """What a docstring leaves out."""
    text = inspect.getdoc(thing) or ""
    is_class = inspect.isclass(thing)
    if is_class and issubclass(thing, Exception | Enum | dict):
        return [] if text else ["docstring"]
    signature = inspect.signature(thing)
    parameters = [each.name for each in signature.parameters.values() if each.kind is not each.VAR_KEYWORD]
    found = []
    if not DELEGATES.search(text):
        found += [f"parameter {name}" for name in parameters if not re.search(rf"(?<!\w){name}(?!\w)", text)]
    has_result = signature.return_annotation not in (None, "None", inspect.Signature.empty)
    if not is_class and has_result and parameters and not re.search(r"^(Returns|Yields):", text, re.MULTILINE):
        found.append("Returns")
    if not is_class and raises(thing) and not re.search(r"^Raises:", text, re.MULTILINE):
        found.append("Raises")
    return found


def raises(function: Any) -> bool:
    """Whether a function raises an error itself, functions within left out."""
    try:
        (node,) = ast.parse(textwrap.dedent(inspect.getsource(function))).body
    except (OSError, TypeError):
        return False
    waiting, is_raised = list(ast.iter_child_nodes(node)), False
    while waiting:
        each = waiting.pop()
        is_raised |= isinstance(each, ast.Raise) and each.exc is not None
        if not isinstance(each, ast.FunctionDef | ast.Lambda | ast.ClassDef):
            waiting += ast.iter_child_nodes(each)
    return is_raised


@pytest.mark.filterwarnings("ignore")
def test_what_rooms_offer_is_explained() -> None:
    things = offered()
    assert len(things) > 100
    assert {name: missing for name, thing in things if (missing := lacking(thing))} == {}


def explained(first: int, second: int) -> int:
    """Add.

    Args:
        first, second: what is added.

    Returns:
        The sum.

    Raises:
        ValueError: no.
    """
    if first:
        raise ValueError("no")
    return first + second


def unexplained(first: int, second: int) -> int:
    """Add `first`."""
    if first:
        raise ValueError("no")
    return first + second


def test_the_test_sees_what_is_left_out() -> None:
    assert lacking(explained) == []
    assert lacking(unexplained) == ["parameter second", "Returns", "Raises"]
    tree = ast.parse("class A:\n    def b(self): ...\n    def _c(self): ...\ndef d():\n    'says'\n")
    assert list(silent(tree, "f")) == ["f:1 A", "f:2 b"]
