"""Everything that a bundle's configurations would run, listed from their parsed text: nothing is evaluated.

Listed are expressions (`$...`), components (`_target_`) outside of seg3d_monai, monai and torch, imports, macros that
copy from files, and what Python's logging evaluates in a logging.conf. It must not know how files are read.
"""

from __future__ import annotations

import configparser
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from seg3d_monai.sharing import danger
from seg3d_monai.sharing.ids import SEPARATOR, Path, absolute, lookup, macro, normalise, references, shown, walk

EXPRESSION, TARGET, IMPORT = "expression", "component", "import"
MACRO, ARGUMENT, LOGGING = "macro", "argument", "logging"
_TARGET_KEY, _IMPORTS_KEY = "_target_", "imports"
_LOGGING_CLASS = re.compile(r"(?:logging\.)?(?:handlers\.)?[A-Z][A-Za-z]*")


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One place of a bundle that runs something.

    file: relative to the bundle.
    key: path in the file, `train#handlers#0`.
    kind: one of the constants of this module.
    text: as it stands there.
    marks: why it should be read before the bundle is run; empty where nothing was found.
    """

    file: str
    key: str
    kind: str
    text: str
    marks: tuple[str, ...] = ()


def list_code(configs: Mapping[str, Any]) -> list[Finding]:
    """List what a bundle's configurations would run.

    Args:
        configs: Parsed JSON and YAML files by their name relative to the bundle.

    Returns:
        In the order of the files and of the keys in them.

    Raises:
        ValueError: If a file has too many values to be looked at.
    """
    named = _ids_of_targets(configs)
    return [finding for file, config in configs.items() for finding in _of_file(file, config, named, configs)]


def list_logging(file: str, text: str) -> list[Finding]:
    """List what a logging.conf would run: Python evaluates its classes and arguments.

    Args:
        file: Its name, for the findings.
        text: Its content; one that cannot be parsed gives nothing, as nothing can read it.
    """
    parser = configparser.RawConfigParser()
    try:
        parser.read_string(text)
    except configparser.Error:
        return []
    found = []
    for section in parser.sections():
        for key, value in parser.items(section):
            marks: tuple[str, ...] = ()
            if key == "class" and not _LOGGING_CLASS.fullmatch(value.strip()):
                marks = ("is evaluated when logging is set up",)
            elif key in ("args", "kwargs"):
                marks = danger.literal_marks(value)
            if marks:
                found.append(Finding(file=file, key=f"{section}#{key}", kind=LOGGING, text=value, marks=marks))
    return found


def _of_file(file: str, config: Any, named: set[str], configs: Mapping[str, Any]) -> Iterator[Finding]:
    for path, value in walk(config):
        key = shown(path)
        if path[-1] == _TARGET_KEY:
            target = _followed(value, path, config)
            if danger.is_listed(target):
                yield Finding(
                    file=file, key=key, kind=TARGET, text=_told(value, target), marks=danger.target_marks(target)
                )
        elif SEPARATOR.join(path) in named and isinstance(value, str) and danger.is_listed(value):
            yield Finding(file=file, key=key, kind=TARGET, text=value, marks=danger.target_marks(value))
        if marks := danger.argument_marks(path[-1], value):
            yield Finding(file=file, key=key, kind=ARGUMENT, text=str(value), marks=marks)
        if not isinstance(value, str):
            continue
        in_imports = path[0] == _IMPORTS_KEY
        if value.startswith("$") and (modules := danger.imports(value[1:])) is not None:
            marks = tuple(mark for module in modules for mark in danger.import_marks(module))
            yield Finding(file=file, key=key, kind=IMPORT, text=value, marks=marks)
        elif value.startswith("$"):
            yield Finding(file=file, key=key, kind=EXPRESSION, text=value, marks=_expression(path, value))
        elif in_imports:
            yield Finding(file=file, key=key, kind=IMPORT, text=value)
        elif value.startswith("%"):
            yield from _of_macro(file, path, value, configs)


def _of_macro(file: str, path: Path, value: str, configs: Mapping[str, Any]) -> Iterator[Finding]:
    try:
        found = macro(absolute(path, value))
    except ValueError:
        return  # it leads nowhere; the check of references says so
    if found is None or not found[0]:
        return
    source = PurePosixPath(found[0])
    inside = not (source.is_absolute() or ".." in source.parts or set("\\:~") & set(found[0]))
    inside = inside and any(name == str(source) or name.endswith(f"/{source}") for name in configs)
    marks = () if inside else ("copies from a file outside of the bundle",)
    yield Finding(file=file, key=shown(path), kind=MACRO, text=value, marks=marks)


def _expression(path: Path, value: str) -> tuple[str, ...]:
    try:
        return danger.expression_marks(absolute(path, value)[1:])
    except ValueError as error:
        return (str(error),)


def _told(value: object, target: object) -> str:
    return str(value) if value == target else f"{value} = {target}"


def _followed(value: Any, path: Path, config: Any) -> Any:
    """A component's name where another key holds it, `"_target_": "@paradigm"`; the value itself where it cannot be."""
    for _ in range(10):
        id = _points_to(value, path)
        if id is None:
            return value
        try:
            value, path = lookup(config, id), tuple(id.split(SEPARATOR))
        except KeyError:
            return value
    return value


def _points_to(value: Any, path: Path) -> str | None:
    """The id that a whole value refers to or copies, of the same configuration."""
    if not isinstance(value, str) or not value.startswith(("@", "%")):
        return None
    try:
        full = absolute(path, value)
    except ValueError:
        return None
    if (found := macro(full)) is not None:
        return None if found[0] else found[1]
    return next(iter(references(full)), None)


def _ids_of_targets(configs: Mapping[str, Any]) -> set[str]:
    """Ids that some `_target_` refers to: their values name components, in whatever file they are set."""
    found: set[str] = set()
    todo = [
        id
        for config in configs.values()
        for path, value in walk(config)
        if path[-1] == _TARGET_KEY and (id := _points_to(value, path)) is not None
    ]
    while todo:
        id = normalise(todo.pop())
        if id in found:
            continue
        found.add(id)
        for config in configs.values():
            for path, value in walk(config):
                if SEPARATOR.join(path) == id and (further := _points_to(value, path)) is not None:
                    todo.append(further)
    return found
