"""How a training or a prediction was made, as a report tells it: a short table, and the whole texts to unfold.

It must not know pictures, pages or models.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

OWN = "seg3d_monai"
TOLD_PACKAGES = (OWN, "torch", "monai")


def made_of_run(folder: Path) -> tuple[dict[str, str], dict[str, str]]:
    """Of a training.

    Args:
        folder: its `output_dir`, with config.json and model.pt.

    Returns:
        What is told at once, by name; and whole texts by name: the configuration and the environment.
    """
    texts = {
        name: (folder / name).read_text(encoding="utf-8")
        for name in ("config.json", "environment.json")
        if (folder / name).is_file()
    }
    config = json.loads(texts["config.json"])
    environment = json.loads(texts.get("environment.json", "{}"))
    metadata = config.get("_meta_") or {}
    packages = environment.get("packages") or {}
    revision = ((environment.get("git") or {}).get("package") or {}).get("revision")
    told = {
        "bundle": _joined(metadata.get("name"), metadata.get("version")),
        "data": str(config.get("dataset_dir") or "the built-in synthetic sample"),
        "seed": str(environment.get("seed", config.get("seed"))),
        "device": str(environment.get("cuda") or "processor"),
        "threads": str(environment.get("threads", "unknown")),
        "packages": ", ".join(f"{name} {packages[name]}" for name in TOLD_PACKAGES if packages.get(name)),
        "revision of the code": str(revision or "unknown"),
        "Python and system": _joined(environment.get("python"), environment.get("platform")),
        "weights, SHA-256": hashlib.sha256((folder / "model.pt").read_bytes()).hexdigest(),
    }
    return {name: text for name, text in told.items() if text}, texts


def made_of_prediction(output: Path, labels: Path) -> tuple[dict[str, str], dict[str, str]]:
    """Of a prediction.

    Args:
        output: its OME-Zarr, whose attributes say what made it.
        labels: its labels in there.

    Returns:
        As `made_of_run`; of an output that another program wrote there may be little.
    """
    own = _attributes(output).get(OWN) or {}
    made = own.get("provenance") or {}
    told = {
        "bundle": _joined(made.get("bundle"), made.get("bundle_version")),
        "package": _joined(made.get("package"), made.get("package_version")),
        "weights, SHA-256": str(made.get("checkpoint_sha256") or ""),
        "blocks (z, y, x)": _extent(own.get("block_size")),
        "halo (z, y, x)": _extent(own.get("halo")),
    }
    texts = {"how it was predicted": own, "attributes of the labels": _attributes(labels)}
    return (
        {name: text for name, text in told.items() if text},
        {name: json.dumps(content, indent=1) for name, content in texts.items() if content},
    )


def _attributes(group: Path) -> Mapping[str, Any]:
    """Attributes of a Zarr group of either format, {} where it has none."""
    for name, key in (("zarr.json", "attributes"), (".zattrs", None)):
        if (group / name).is_file():
            content = json.loads((group / name).read_text(encoding="utf-8"))
            found: Mapping[str, Any] = (content.get(key) or {}) if key else content
            return found
    return {}


def _joined(*parts: object) -> str:
    return ", ".join(str(part) for part in parts if part)


def _extent(size: object) -> str:
    return f"{' x '.join(str(n) for n in size)} voxels" if isinstance(size, list | tuple) else ""
