"""Binds a command line to a function's signature before the function runs, and refuses what does not fit.

fire parses values and writes the help screens, but it calls the function first and complains about a misspelt flag
afterwards, which is too late for a training run. So words are bound here: an unknown flag, a missing argument or a
value of the wrong type is a `UsageError` of one line, raised before anything has happened.

The grammar is fire's without its one-letter flags: `--flag value`, `--flag=value`, `--flag` alone for true, hyphens
for underscores, positional arguments also as flags, values as Python literals and bare words as strings.
Arguments annotated `str` are never parsed (a folder may be called `2024`). This file knows no command.
"""

import difflib
import inspect
import json
import re
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Union, get_args, get_origin

from fire import helptext, parser, trace

_NOT_GIVEN = object()


class UsageError(ValueError):
    """A command line that does not fit the command; its text is one line that names the mend."""


def nearest(word: str, choices: Iterable[str], *, prefix: str = "") -> str:
    """The choice that `word` most probably meant, as a clause for an error message.

    Args:
        word: What was written.
        choices: What could have been written; any number.
        prefix: Set before each choice in the answer, for instance `--`.

    Returns:
        `did you mean X?` where something is close, else all choices.
    """
    known = sorted(set(choices))
    folded = {name.lower().replace("-", "_"): name for name in known}
    close = difflib.get_close_matches(word.lower().replace("-", "_"), folded, n=1, cutoff=0.6)
    if close:
        return f"did you mean {prefix}{folded[close[0]]}?"
    return "choose from: " + (", ".join(prefix + name for name in known) or "(none)")


def bind(function: Callable[..., object], words: Sequence[str]) -> inspect.BoundArguments:
    """Bind command-line words to the parameters of `function`.

    Args:
        function: Every parameter is annotated. A `**` parameter, annotated str, takes every unknown flag as it was
            written, `#` in its name included; a flag alone is "True".
        words: The command line after the command's name.

    Returns:
        The bound and type-checked arguments; `function(*bound.args, **bound.kwargs)` is the call.

    Raises:
        UsageError: If a flag is unknown or given twice, an argument is missing or too many, or a value has another
            type than the parameter says.
    """
    signature = inspect.signature(function)
    named = {name: item for name, item in signature.parameters.items() if item.kind is not item.VAR_KEYWORD}
    is_open = len(named) < len(signature.parameters)
    positional = [name for name, parameter in named.items() if parameter.kind is parameter.POSITIONAL_OR_KEYWORD]
    given: dict[str, Any] = {}
    free: list[str] = []
    index = 0
    while index < len(words):
        word = words[index]
        index += 1
        if not _is_flag(word):
            free.append(word)
            continue
        key, equals, text = word.lstrip("-").partition("=")
        shown, key = word.partition("=")[0], _name(key)
        if key not in named and (not is_open or not word.startswith("--")):
            raise UsageError(f"unknown flag {shown}; {nearest(key, named, prefix='--')}")
        if key in given:
            raise UsageError(f"{shown} is given twice; give it once")
        annotation = named[key].annotation if key in named else str
        value: Any = text if equals else _NOT_GIVEN
        if not equals and index < len(words) and not _is_flag(words[index]):
            follower = words[index]
            # A switch takes the next word only where that is a truth value, so that `--restart INPUT` keeps INPUT.
            if annotation is not bool or follower.lower() in ("true", "false"):
                value = follower
                index += 1
        if value is _NOT_GIVEN:
            if key in named and annotation is not bool:
                raise UsageError(f"{shown} needs a value ({_type_name(annotation)})")
            value = "True"
        given[key] = _convert(shown, value, annotation)
    for name in positional:
        if name not in given and free:
            given[name] = _convert(name.upper(), free.pop(0), named[name].annotation)
    if free:
        raise UsageError(f"unexpected argument {free[0]!r}; this command takes {_usage(positional)}")
    missing = [name for name, parameter in named.items() if parameter.default is parameter.empty and name not in given]
    if missing:
        for key in given.keys() - named.keys():
            if difflib.get_close_matches(key, missing, n=1):
                raise UsageError(f"unknown flag --{key}; {nearest(key, missing, prefix='--')}")
        shown_names = [name.upper() if name in positional else f"--{name}" for name in missing]
        raise UsageError(f"missing {' and '.join(shown_names)}; see --help")
    return signature.bind(**given)


def help_text(function: Callable[..., object], name: str) -> str:
    """The help screen of a command, written by fire from the signature and the docstring.

    Args:
        function: The command.
        name: How it is called, for instance `seg3d predict`.
    """
    lines = (
        str(helptext.HelpText(function, trace.FireTrace(function, name=name))).replace(f"'{name}'", name).split("\n")
    )
    named = {key.upper(): parameter for key, parameter in inspect.signature(function).parameters.items()}
    current = ""
    for number, line in enumerate(lines):
        header = re.match(r"    (?:-\w, )?(?:--\w+=)?([A-Z_]+)(?: \(required\))?$", line)
        if header:
            current = header[1]
            lines[number] = re.sub(r"^    -\w, ", "    ", line)
        elif re.match(r" +Type: ", line) and current in named:
            lines[number] = f"        Type: {_type_name(named[current].annotation)}"
        elif line.strip() == "Default: None":
            lines[number] = ""
    return re.sub(r"\n\n(?=        )", "\n", "\n".join(lines))


def _is_flag(word: str) -> bool:
    """True for `--name` and `-n`; false for `-1`, `-`, and words."""
    return re.match(r"--?[A-Za-z_]", word) is not None


def _name(key: str) -> str:
    """The parameter's name: hyphens before a `#` are underscores in it."""
    identifier, hash_sign, rest = key.partition("#")
    return identifier.replace("-", "_") + hash_sign + rest


def _usage(positional: Sequence[str]) -> str:
    return " ".join(name.upper() for name in positional) or "no positional argument"


def _alternatives(annotation: Any) -> tuple[Any, ...]:
    return get_args(annotation) if get_origin(annotation) in (Union, types.UnionType) else (annotation,)


def _convert(shown: str, text: str, annotation: Any) -> Any:
    """Parse a value as fire does and check it against the annotation; `str` stays as it was written."""
    kinds = _alternatives(annotation)
    if str in kinds:
        return text
    value = parser.DefaultParseValue(text)
    for kind in kinds:
        fits, converted = _fit(value, kind)
        if fits:
            return converted
    raise UsageError(f"{shown} = {text!r} is not {_type_name(annotation)}")


def _fit(value: Any, kind: Any) -> tuple[bool, Any]:
    if kind is type(None):
        return value is None, None
    if kind is bool:
        if isinstance(value, str) and value.lower() in ("true", "false"):
            return True, value.lower() == "true"
        return isinstance(value, bool), value
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool), value
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool), value
    item = get_args(kind)[0]  # a list of numbers or names
    if not isinstance(value, list | tuple):
        return False, value
    items = [_fit(entry, item) if item is not str else (True, str(entry)) for entry in value]
    return all(fits for fits, _ in items), [entry for _, entry in items]


def _type_name(annotation: Any) -> str:
    """The annotation in words."""
    words = {str: "text", int: "an integer", float: "a number", bool: "true or false"}
    plural = {int: "integers", float: "numbers", str: "names"}
    names = []
    for kind in _alternatives(annotation):
        if kind in words:
            names.append(words[kind])
        elif kind is not type(None):
            names.append(f"a list of {plural[get_args(kind)[0]]} such as " + _example(get_args(kind)[0]))
    return " or ".join(names)


def _example(item: Any) -> str:
    return {int: '"[16,64,64]"', float: '"[2.0,0.5,0.5]"', str: '"[a,b]"'}[item]


def given(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options that were given; the rest keep the default of whoever is called."""
    return {name: value for name, value in options.items() if value is not None}


def file_to_write(name: str, path: str, *suffixes: str) -> Path:
    """A file that a command will write over if it exists, seen to be one that the user can have meant.

    Args:
        name: Of the argument, as it is shown.
        path: Its value.
        suffixes: What the file's name may end in, so that no image is ever written over.

    Raises:
        UsageError: If it is a folder, or its name ends otherwise.
        FileNotFoundError: If its folder does not exist.
    """
    found = Path(path)
    if found.suffix.lower() not in suffixes:
        raise UsageError(f"{name} is {path!r}; give a name that ends in {' or '.join(suffixes)}")
    if not found.absolute().parent.is_dir():
        raise FileNotFoundError(f"{name} {path!r}: its folder does not exist; make it first")
    if found.is_dir():
        raise UsageError(f"{name} {path!r} is a folder; give the name of a file")
    return found


def numbers(name: str, text: str) -> int | list[int]:
    """An integer or a list of them, of a flag that also takes a word."""
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    found = value if isinstance(value, list) else [value]
    if not found or any(isinstance(n, bool) or not isinstance(n, int) for n in found):
        raise UsageError(f'--{name} is {text!r}; pass a number, a list "[0,2]" or "all"')
    return value
