"""MONAI's configuration language as text: ids, references `@a#b`, macros `%file.json::a`, several files merged.

Written from the behaviour of MONAI 1.6 (`monai.bundle.config_parser`, `reference_resolver`), which the tests hold it
against. Nothing is evaluated or imported, no file is opened. It must not know what is dangerous.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping
from typing import Any

SEPARATOR = "::"
MOST_VALUES = 1_000_000
"""Of one file; YAML's aliases can make a few lines into more than fit any memory."""
DEEPEST = 100
REFERENCE = re.compile(r"@\w*(?:::\w*)*")
_RELATIVE = re.compile(r"[@%](?:::)+")
_MACRO_FILE = re.compile(r"(.*\.(?:json|yaml|yml))(?:::(.*))?", re.IGNORECASE | re.DOTALL)

Path = tuple[str, ...]


def normalise(text: str) -> str:
    """An id or a value with MONAI's old separator `#` written as `::`, as MONAI itself does before it reads it."""
    return text.replace("#", SEPARATOR)


def shown(path: Path) -> str:
    """A key path as configurations are overridden by, `train#handlers#0`."""
    return "#".join(path).replace(SEPARATOR, "#")


def walk(config: Any) -> Iterator[tuple[Path, Any]]:
    """Every (key path, value) of a parsed file, parents first; an overlay's key `a#b` is the path (a, b).

    Raises:
        ValueError: if it is nested more than `DEEPEST` deep or has more than `MOST_VALUES` values.
    """
    todo: list[tuple[Path, Any]] = [((), config)]
    count = 0
    while todo:
        path, value = todo.pop()
        count += 1
        if count > MOST_VALUES or len(path) > DEEPEST:
            raise ValueError(f"it has more than {MOST_VALUES:,} values or is nested deeper than {DEEPEST}")
        if path:
            yield path, value
        items: list[tuple[Any, Any]] = []
        if isinstance(value, dict):
            items = list(value.items())
        elif isinstance(value, list | tuple):
            items = list(enumerate(value))
        for key, below in reversed(items):
            todo.append(((*path, *normalise(str(key)).removeprefix("+").split(SEPARATOR)), below))


def absolute(path: Path, value: str) -> str:
    """A value whose relative ids, `@#a` beside it or `%##a` one level up, are written in full.

    Args:
        path: where the value stands.
        value: a string of the configuration.

    Returns:
        The value with `::` as separator.

    Raises:
        ValueError: if it leads above the configuration.
    """
    value = normalise(value)
    for prefix in sorted(set(_RELATIVE.findall(value)), reverse=True):
        levels = prefix.count(SEPARATOR)
        if levels > len(path):
            raise ValueError(f"{value!r} leads above the configuration")
        value = value.replace(prefix, prefix[0] + "".join(part + SEPARATOR for part in path[: len(path) - levels]))
    return value


def references(value: str) -> list[str]:
    """Ids that a value refers to: of the whole value `@a::b`, or anywhere in an expression.

    Args:
        value: what `absolute` returns.
    """
    if value.startswith("$"):
        return [found[1:] for found in REFERENCE.findall(value)]
    return [value[1:]] if REFERENCE.fullmatch(value) else []


def macro(value: str) -> tuple[str, str] | None:
    """The file and the id that a macro copies from; the file is "" for the same configuration.

    Args:
        value: what `absolute` returns.

    Returns:
        None for a value that is no macro.
    """
    if not value.startswith("%"):
        return None
    found = _MACRO_FILE.fullmatch(value[1:])
    return (found[1], found[2] or "") if found else ("", value[1:])


def lookup(config: Any, id: str) -> Any:
    """What stands at an id.

    Raises:
        KeyError: if nothing does.
    """
    for part in id.split(SEPARATOR) if id else ():
        if isinstance(config, Mapping) and part in config:
            config = config[part]
        elif isinstance(config, list) and part.isdecimal() and int(part) < len(config):
            config = config[int(part)]
        else:
            raise KeyError(id)
    return config


def missing_references(config: Mapping[str, Any], files: Mapping[str, Any] | None = None) -> list[str]:
    """References and macros of a configuration that lead nowhere.

    Args:
        config: one file, or several that were merged.
        files: parsed files that macros may copy from, by name.

    Returns:
        One line each, `KEY: @ID does not exist`.
    """
    files = files or {}
    faults = []
    resolved = copy.deepcopy(dict(config))
    for path, value in list(walk(config)):
        if not isinstance(value, str):
            continue
        try:
            found = macro(absolute(path, value))
            if found is None:
                continue
            source = config if not found[0] else _file(files, found[0])
            copied = lookup(source, found[1])
            _put(resolved, path, copy.deepcopy(copied))
        except (KeyError, ValueError):
            faults.append(f"{shown(path)}: {value} does not exist")
    for path, value in walk(resolved):
        if not isinstance(value, str):
            continue
        try:
            lost = [id for id in references(absolute(path, value)) if not _exists(resolved, id)]
            faults += [f"{shown(path)}: @{id.replace(SEPARATOR, '#')} does not exist" for id in lost]
        except ValueError as error:
            faults.append(f"{shown(path)}: {error}")
    return faults


def _exists(config: Any, id: str) -> bool:
    try:
        lookup(config, id)
    except KeyError:
        return False
    return True


def _file(files: Mapping[str, Any], name: str) -> Any:
    """A parsed file by the end of its path."""
    for known, content in files.items():
        if known == name or known.endswith(f"/{name}"):
            return content
    raise KeyError(name)


def _put(config: dict[str, Any], path: Path, value: Any) -> None:
    place = lookup(config, SEPARATOR.join(path[:-1]))
    place[int(path[-1]) if isinstance(place, list) else path[-1]] = value


def merge(*configs: Mapping[str, Any]) -> dict[str, Any]:
    """Several files as one configuration: later ones win, `a#b` reaches inside, `+a` adds to a list or section.

    Args:
        configs: parsed files; they are not changed.

    Raises:
        ValueError: naming a key that reaches into a section that is not there, or adds to what cannot be added to.
    """
    merged: dict[str, Any] = {}
    for config in configs:
        if not isinstance(config, Mapping):
            raise ValueError("a configuration holds no keys; it is {key: value}")
        for key, value in copy.deepcopy(dict(config)).items():
            *sections, last = normalise(str(key)).removeprefix("+").split(SEPARATOR)
            try:
                place = lookup(merged, SEPARATOR.join(sections))
                index: Any = int(last) if isinstance(place, list) else last
                has = index in place if isinstance(place, dict) else 0 <= index < len(place)
                if str(key).startswith("+") and has:
                    _add(place[index], value)
                else:
                    place[index] = value
            except (KeyError, ValueError, TypeError, IndexError):
                raise ValueError(f"key {key!r} does not fit the files before it; check its sections") from None
    return merged


def _add(present: Any, value: Any) -> None:
    if isinstance(present, dict) and isinstance(value, dict):
        present.update(value)
    elif isinstance(present, list) and isinstance(value, list):
        present.extend(value)
    else:
        raise TypeError("only sections and lists can be added to")
