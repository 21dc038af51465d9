"""A bundle's metadata.json: the model zoo's schema, version and changelog, packages it needs."""

from __future__ import annotations

import importlib.metadata
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.request import urlopen

METADATA = "configs/metadata.json"
OWN_SCHEMA = "eval/schema.json"
SCHEMAS_OF = "https://github.com/Project-MONAI/"
"""A schema is fetched from there only: whoever wrote the metadata shall not choose what is called."""
MOST_BYTES = 2**20
PATIENCE_S = 5.0
SEMANTIC = re.compile(r"(0|[1-9]\d*)\.(0|[1-9]\d*)\.(0|[1-9]\d*)(-[0-9A-Za-z.-]+)?(\+[0-9A-Za-z.-]+)?")
_DIRECT = {"monai_version": "monai", "pytorch_version": "torch", "numpy_version": "numpy"}


def find_schema(folder: Path, metadata: Mapping[str, Any], given: Path | None) -> tuple[Any, str]:
    """The schema that metadata must satisfy, and where it came from.

    Args:
        folder: The bundle.
        metadata: Its metadata.
        given: A file to use; else `eval/schema.json` of the bundle, else what the metadata names, fetched.

    Returns:
        The parsed schema, None where it could not be had; and its place, or the reason.

    Raises:
        FileNotFoundError: If the given file does not exist.
        ValueError: If a file is no JSON.
    """
    for file, place in ((given, str(given)), (folder / OWN_SCHEMA, f"the bundle's own {OWN_SCHEMA}")):
        if file is not None and (file.is_file() or file == given):
            if not file.is_file():
                raise FileNotFoundError(f"--schema {str(file)!r} does not exist; check the path")
            try:
                return json.loads(file.read_text(encoding="utf-8")), place
            except ValueError as error:
                raise ValueError(f"schema {place} is no JSON: {error}") from error
    url = metadata.get("schema")
    if not isinstance(url, str) or not url.startswith(SCHEMAS_OF):
        return None, f"it names no schema of {SCHEMAS_OF}; give --schema FILE"
    try:
        with urlopen(url, timeout=PATIENCE_S) as response:
            return json.loads(response.read(MOST_BYTES)), url
    except (URLError, OSError, ValueError) as error:
        return None, f"{url} could not be reached ({error}); give --schema FILE"


def schema_faults(metadata: Any, schema: Any) -> list[str]:
    """What in metadata does not satisfy a JSON schema, one line each.

    Raises:
        ImportError: Naming the extra.
    """
    try:
        from jsonschema.exceptions import SchemaError
        from jsonschema.validators import validator_for
        from referencing import Registry
        from referencing.exceptions import Unresolvable
    except ImportError as error:
        raise ImportError("jsonschema is missing: pip install 'seg3d_monai[share]'") from error
    kind = validator_for(schema)
    try:
        kind.check_schema(schema)
        registry: Any = Registry()  # an empty one fetches nothing
        found = sorted(
            kind(schema, registry=registry).iter_errors(metadata), key=lambda fault: list(map(str, fault.path))
        )
    except (SchemaError, Unresolvable) as error:
        return [f"the schema cannot be used: {str(error).splitlines()[0]}"]
    return [f"{'#'.join(map(str, fault.path)) or 'metadata'}: {fault.message}" for fault in found]


def version_faults(metadata: Mapping[str, Any]) -> list[str]:
    """What is wrong with the version and the changelog, one line each."""
    version, changelog = metadata.get("version"), metadata.get("changelog")
    if not isinstance(version, str) or not SEMANTIC.fullmatch(version):
        return [f"version {version!r} is no semantic version such as 0.1.0"]
    if not isinstance(changelog, Mapping):
        return ["there is no changelog, {version: what changed}"]
    faults = [f"changelog names {key!r}, no semantic version" for key in changelog if not SEMANTIC.fullmatch(str(key))]
    if version not in changelog:
        faults.append(f"changelog does not name the current version {version}")
    elif not faults and _order(version) < max(_order(str(key)) for key in changelog):
        faults.append(f"changelog names a version after the current {version}")
    return faults


def with_version(metadata: Mapping[str, Any], version: str, changes: str) -> dict[str, Any]:
    """Metadata of a new version.

    Args:
        metadata: Of the version before.
        version: Semantic version, after all in the changelog.
        changes: What changed.

    Raises:
        ValueError: If the version is none, or does not come after the others.
    """
    if not SEMANTIC.fullmatch(version):
        raise ValueError(f"--version {version!r} is no semantic version; give three numbers such as 0.2.0")
    changelog = dict(metadata.get("changelog") or {})
    known = [str(key) for key in changelog if SEMANTIC.fullmatch(str(key))]
    if known and _order(version) <= max(_order(key) for key in known):
        last = max(known, key=_order)
        raise ValueError(f"--version {version!r} does not come after {last} of the changelog; give a later one")
    return {**metadata, "version": version, "changelog": {version: changes, **changelog}}


def packages(metadata: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """Packages that a bundle needs: what is installed, and what is missing or older.

    Raises:
        ValueError: If `required_packages_version` is not there.
    """
    required = metadata.get("required_packages_version")
    if not isinstance(required, Mapping):
        raise ValueError("required_packages_version is missing; name the packages, {name: version}")
    needed = {name: metadata[key] for key, name in _DIRECT.items() if key in metadata} | dict(required)
    told, lacking = [], []
    for name, version in needed.items():
        try:
            installed = importlib.metadata.version(str(name))
        except (importlib.metadata.PackageNotFoundError, ValueError):
            lacking.append(f"{name} {version} is not installed")
            continue
        told.append(f"{name} {installed}")
        if _numbers(installed) < _numbers(str(version)):
            lacking.append(f"{name} {installed} is older than {version}")
    return told, lacking


def _numbers(version: str) -> tuple[int, ...]:
    found = re.match(r"\d+(?:\.\d+)*", version)
    return tuple(int(part) for part in found[0].split(".")) if found else ()


def _order(version: str) -> tuple[tuple[int, ...], bool, str]:
    """A semantic version's place among others; one before a release comes before it."""
    found = SEMANTIC.fullmatch(version)
    assert found is not None
    return tuple(int(found[n]) for n in (1, 2, 3)), found[4] is None, found[4] or ""
