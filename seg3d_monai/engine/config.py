"""Strict checks of a MONAI bundle's merged config, and the live parser that holds it.

MONAI accepts any override: a misspelt top-level id is stored and never read. `check_config`, called first in a bundle's
`initialize` list, refuses it before anything is built. No config syntax hands the merged config to a component, so
`live_parser` finds the parser on the call stack: every expression and component is evaluated inside one of its methods.

This module knows MONAI's config language only; it must not know models, data or engines.
"""

from __future__ import annotations

import inspect
import pkgutil
import pydoc
import sys
from collections.abc import Iterable, Iterator, Mapping
from difflib import get_close_matches
from typing import Any, TypeVar

import torch
from monai.bundle import ConfigParser, ConfigWorkflow
from monai.bundle.config_item import ConfigComponent, ConfigExpression
from monai.bundle.properties import InferProperties, TrainProperties
from monai.bundle.reference_resolver import ReferenceResolver
from monai.bundle.utils import ID_SEP_KEY
from monai.utils import BundleProperty, BundlePropertyConfig

from seg3d_monai.user_errors import print_user_error

__all__ = ["ENTRY_POINTS", "check_config", "live_parser", "live_workflow"]

ENTRY_POINTS = (
    *("imports", "initialize", "run", "training", "evaluating", "finalize", "save_execute_config"),
    *("setup", "fit"),  # lists that a Launcher evaluates by name
    "dense_net_def",  # for MONAI's verify_net_in_out and ckpt_export
)

Path = tuple[str, ...]
_T = TypeVar("_T")


def live_parser() -> ConfigParser:
    """Find the ConfigParser that is evaluating the config from which this function is called.

    Works from `python -m monai.bundle run` and from `ConfigWorkflow` in Python alike, with every file and override
    merged and macros resolved (`live_parser().get()` is the whole config).

    Returns:
        The parser itself: what is changed in it holds for the run.

    Raises:
        RuntimeError: if it is not called, directly or deeper, from a config's expression or component.
    """
    parser = _on_stack(ConfigParser)
    if parser is None:
        raise RuntimeError("live_parser() found no ConfigParser on the call stack; call it from a bundle's config")
    return parser


def live_workflow() -> ConfigWorkflow | None:
    """Find the ConfigWorkflow that is running the config from which this function is called; None without one."""
    return _on_stack(ConfigWorkflow)


def check_config(entry_points: Iterable[str] = (), *, parser: ConfigParser | None = None) -> None:
    """Refuse a merged config with a key that nothing reads.

    Checked: every `_target_` can be imported; every argument is in its target's signature; every `@id` exists; every
    id is reached from what MONAI looks up (the required bundle properties, `ENTRY_POINTS`, the workflow's run ids).
    `device` and `seed`, where they are written out, are ones that can be used.
    A plain value that is used through a macro (`%id`) only looks unused, since macros become copies: use `@id`.
    Under `python -m monai.bundle` the message is printed without MONAI's traceback and the exit code is 2; a later
    mistake of the user's, a missing file for instance, is then one line too (SEG3D_TRACEBACK=1 shows all).

    Args:
        entry_points: further ids that are read from outside the config.
        parser: the config to check; by default the live one.

    Raises:
        ValueError: one line for each fault: the id, what is wrong, and the nearest valid key.
    """
    parser = parser or live_parser()
    from_shell = getattr(getattr(sys.modules["__main__"], "__spec__", None), "name", None) == "monai.bundle.__main__"
    if from_shell:
        sys.excepthook = print_user_error
    if not parser.ref_resolver.items:
        parser.parse()
    config = {key: value for key, value in parser.get().items() if not key.startswith("_")}
    ids = {*ENTRY_POINTS, *entry_points, *_looked_up_by_monai("train" in config)}
    if (workflow := live_workflow()) is not None:
        ids |= {workflow.run_id, workflow.init_id, workflow.final_id}
    faults = [*_target_faults(parser, config), *_reference_faults(parser, config), *_unused_faults(parser, config, ids)]
    faults += [*_device_faults(config), *_seed_faults(config)]
    if not faults:
        return
    if from_shell:
        print("\n".join(f"ValueError: {fault}" for fault in faults), file=sys.stderr, flush=True)
        raise SystemExit(2)
    raise ValueError("\n".join(faults))


def _on_stack(kind: type[_T]) -> _T | None:
    """The innermost `self` of this type among the callers."""
    frame = sys._getframe(1)
    while frame is not None:
        if isinstance(owner := frame.f_locals.get("self"), kind):
            return owner
        frame = frame.f_back  # type: ignore[assignment]
    return None


def _looked_up_by_monai(training: bool) -> set[str]:
    properties = TrainProperties if training else InferProperties
    return {str(p[BundlePropertyConfig.ID]) for p in properties.values() if p[BundleProperty.REQUIRED]}


def _walk(config: Any, path: Path = ()) -> Iterator[tuple[Path, Any]]:
    """Every (id path, value) below a config, parents first."""
    items = config.items() if isinstance(config, dict) else enumerate(config) if isinstance(config, list) else ()
    for key, value in items:
        here = (*path, str(key))
        yield here, value
        yield from _walk(value, here)


def _shown(path: Iterable[str]) -> str:
    return "#".join(path)


def _hint(key: str, valid: Iterable[str]) -> str:
    """Name the nearest of the valid keys, or list them all."""
    valid = sorted(valid)
    nearest = get_close_matches(key, valid, n=1, cutoff=0.5)
    return f"the nearest valid key is {nearest[0]!r}" if nearest else f"valid keys: {', '.join(valid) or 'none'}"


def _target_faults(parser: ConfigParser, config: dict[str, Any]) -> Iterator[str]:
    for path, value in _walk(config):
        if not ConfigComponent.is_instantiable(value):
            continue
        named = value["_target_"]
        if isinstance(named, str) and named.startswith("@"):  # another id may hold the name
            named = parser.get(named[1:])
        if not isinstance(named, str) or named.startswith(("$", "@")):
            continue
        component = ConfigComponent(config={**value, "_target_": named}, locator=parser.locator)
        name = component.resolve_module_name()
        try:
            target = pydoc.locate(name)
        except pydoc.ErrorDuringImport as error:
            yield f"{_shown(path)}#_target_: importing {name!r} failed: {error.value}"
            continue
        if target is None:
            yield f"{_shown(path)}#_target_: {name!r} cannot be imported; {_target_hint(parser, name)}"
            continue
        valid = _argument_names(target)
        for key in value:
            if valid is not None and key not in valid | ConfigComponent.non_arg_keys | {"_debug_"}:
                yield f"{_shown((*path, key))}: {name} has no argument {key!r}; {_hint(key, valid)}"


def _seed_faults(config: dict[str, Any]) -> Iterator[str]:
    seed = config.get("seed", 0)
    is_computed = isinstance(seed, str) and seed.startswith(("$", "@", "%"))
    if not is_computed and (isinstance(seed, bool) or not isinstance(seed, int) or seed < 0):
        yield f"seed: {seed!r} is no seed; give an integer >= 0"


def _device_faults(config: dict[str, Any]) -> Iterator[str]:
    """What torch says only when the network is moved there, and then not as the user's mistake."""
    named = config.get("device")
    if not isinstance(named, str) or named.startswith(("$", "@", "%")):
        return
    try:
        device = torch.device(named)
    except RuntimeError:
        yield f"device: {named!r} is no device; give cpu, cuda or cuda:1"
        return
    runs_elsewhere = config.get("address") or config.get("train_workers") not in (None, 1)
    if device.type == "cuda" and not runs_elsewhere:
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if count == 0:
            yield f"device: {named!r} is asked for, and torch finds no GPU; give cpu, or see seg3d doctor"
        elif device.index is not None and device.index >= count:
            yield f"device: {named!r} is not there; the last one is cuda:{count - 1}"


def _target_hint(parser: ConfigParser, name: str) -> str:
    parts = name.split(".")
    for depth in range(len(parts) - 1, 0, -1):
        if (holder := pydoc.locate(".".join(parts[:depth]))) is not None:
            names = {n for n in dir(holder) if not n.startswith("_")}
            names |= {module.name for module in pkgutil.iter_modules(getattr(holder, "__path__", ()))}
            near = get_close_matches(parts[depth], names, n=1, cutoff=0.5)
            return f"the nearest valid name is {'.'.join(parts[:depth] + near)!r}"
    near = get_close_matches(name, parser.locator._components_table or (), n=1)
    return f"the nearest valid name is {near[0]!r}" if near else "write the full dotted name of a class or function"


def _argument_names(target: Any) -> set[str] | None:
    """Keyword arguments that a target takes; None if it takes any or cannot be inspected.

    `**kwargs` of a constructor is taken to reach the next constructor of the class's bases (MONAI's DataLoader).
    """
    names: set[str] = set()
    bases = inspect.getmro(target) if inspect.isclass(target) else ()
    for call in [target, *(vars(base)["__init__"] for base in bases if "__init__" in vars(base))]:
        try:
            parameters = inspect.signature(call).parameters.values()
        except (TypeError, ValueError):
            return None
        names |= {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
        if all(p.kind is not p.VAR_KEYWORD for p in parameters):
            return names - {"self"}
    return None


def _references(value: Any) -> list[Path]:
    return [tuple(r.split(ID_SEP_KEY)) for r in ReferenceResolver.match_refs_pattern(value)] if _is_text(value) else []


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and not ConfigExpression.is_import_statement(value)


def _reference_faults(parser: ConfigParser, config: dict[str, Any]) -> Iterator[str]:
    ids = {_shown(path) for path, _ in _walk(config)}
    for path, value in _walk(config):
        for reference in _references(value):
            if ID_SEP_KEY.join(reference) not in parser:
                yield f"{_shown(path)}: @{_shown(reference)} does not exist; {_hint(_shown(reference), ids)}"


def _unused_faults(parser: ConfigParser, config: dict[str, Any], entry_points: set[str]) -> Iterator[str]:
    used: set[Path] = set()
    todo = [tuple(ReferenceResolver.split_id(id)) for id in entry_points if id in parser]
    while todo:
        if (path := todo.pop()) in used:
            continue
        used.add(path)
        value = parser.get(ID_SEP_KEY.join(path))
        for text in (value, *(below for _, below in _walk(value))):
            todo += _references(text)
    paths = [path for path, _ in _walk(config)]
    for path in _unused(config, used, config):
        siblings = [p for p in paths if p[:-1] == path[:-1] and p != path]
        near = get_close_matches(path[-1], [p[-1] for p in siblings], n=1)
        options = [(*path[:-1], *near)] if near else [p for p in paths if p[-1] == path[-1] and p != path]
        if not options and (near := get_close_matches(path[-1], [p[-1] for p in paths if p != path], n=1)):
            options = [p for p in paths if p[-1] == near[0]]
        mend = f"the nearest valid key is {_shown(options[0])!r}" if options else "remove it, or use it as @id"
        yield f"{_shown(path)}: nothing in the config refers to this id; {mend}"


def _unused(config: Mapping[str, Any], used: set[Path], root: dict[str, Any], path: Path = ()) -> Iterator[Path]:
    """Ids outside components that are neither used themselves nor part of, or around, something used."""
    for key, value in config.items():
        here = (*path, key)
        if key.startswith("_") or any(here[: len(u)] == u for u in used):
            continue
        if any(u[: len(here)] == here for u in used):
            if isinstance(value, dict) and "_target_" not in value:
                yield from _unused(value, used, root, here)
        elif not _was_macro(value, here, root):
            yield here


def _was_macro(value: Any, path: Path, root: dict[str, Any]) -> bool:
    """Whether a copy of this section stands elsewhere, as a resolved macro leaves it (with "#" or "::" in its ids)."""
    text = repr(value).replace("#", ID_SEP_KEY)
    others = (other for here, other in _walk(root) if here != path and type(other) is type(value))
    return (
        bool(value)
        and isinstance(value, (dict, list))
        and any(repr(o).replace("#", ID_SEP_KEY) == text for o in others)
    )
