"""A bundle's files, read without running anything: its configurations parsed, and what is no plain file named."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from seg3d_monai.sharing.ids import walk

CONFIGS = (".json", ".yaml", ".yml")
CODE = (".py", ".pyc", ".so", ".pyd", ".dll", ".sh", ".ts", ".pkl", ".pickle", ".joblib")
"""Files that run, or that something else runs when it loads them."""
MOST_BYTES = 2**24
"""Of a configuration."""


def bundle_files(folder: Path) -> Iterator[str]:
    """Names of all files of a bundle relative to it, with `/`, sorted; folders that are links are not entered."""
    found = [
        (Path(place) / name).relative_to(folder).as_posix()
        for place, folders, names in os.walk(folder)
        for name in [*names, *(one for one in folders if (Path(place) / one).is_symlink())]
    ]
    return iter(sorted(found))


def read_configs(folder: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """Parse every JSON and YAML file of a bundle.

    Returns:
        Contents by name, and, for files that cannot be read, the reason by name.
    """
    contents: dict[str, Any] = {}
    faults: dict[str, str] = {}
    for name in bundle_files(folder):
        if name.lower().endswith(CONFIGS) and (folder / name).is_file():
            try:
                contents[name] = read_config(folder / name)
            except (ValueError, OSError, RecursionError) as error:
                faults[name] = (str(error) or "it is nested too deeply").splitlines()[0]
    return contents, faults


def read_config(file: Path) -> Any:
    """Parse a JSON or YAML file; YAML may make no objects.

    Raises:
        ValueError: if it is too large, cannot be parsed, says a key twice, or has too many values.
        ImportError: naming the extra, for YAML without its library.
    """
    if file.stat().st_size > MOST_BYTES:
        raise ValueError(f"it is larger than {MOST_BYTES:,} bytes")
    text = file.read_text(encoding="utf-8")
    content = json.loads(text, object_pairs_hook=_unique) if file.suffix.lower() == ".json" else _parse_yaml(text)
    for _ in walk(content):
        pass
    return content


def bundle_file(folder: Path, stem: str) -> str | None:
    """The name of a configuration whose suffix may be any, `configs/train`; None where there is none."""
    return next((stem + suffix for suffix in CONFIGS if (folder / (stem + suffix)).is_file()), None)


def links_outside(folder: Path) -> list[str]:
    """Names of links that lead out of a bundle: whoever copies it does not get what they show."""
    root = folder.resolve()
    links = [name for name in bundle_files(folder) if (folder / name).is_symlink()]
    return [name for name in links if not (folder / name).resolve().is_relative_to(root)]


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"key {next(key for key in keys if keys.count(key) > 1)!r} is given twice")
    return content


def _parse_yaml(text: str) -> Any:
    try:
        import yaml
    except ImportError as error:
        raise ImportError("YAML configurations need PyYAML: pip install 'seg3d_monai[share]'") from error
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from error
