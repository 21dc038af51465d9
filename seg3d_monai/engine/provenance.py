"""What made a prediction, to be kept in it: package, bundle, configuration, checkpoint.

Nothing in it depends on where or when it ran. This file knows MONAI's bundles, no model.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from seg3d_monai import __version__
from seg3d_monai.engine.config import ENTRY_POINTS, live_parser
from seg3d_monai.shipped import shipped_bundle

LOCAL_KEYS = frozenset(
    {
        *ENTRY_POINTS,
        "address",
        "bundle_root",
        "checkpoint",
        "dataset",
        "dataset_dir",
        "device",
        "dry_run",
        "foreground",
        "gpus_per_worker",
        "input",
        "max_memory",
        "num_workers",
        "output",
        "restart",
        "skip_bad",
    }
)
"""Keys of an inference configuration that say where and how it runs, not what it computes."""


def provenance(bundle_root: str, checkpoint: str) -> dict[str, Any]:
    """Describe the bundle that is being run; to be called from its configuration.

    Args:
        bundle_root: folder of the bundle.
        checkpoint: file of the weights.

    Returns:
        JSON-able: package and version, bundle and its version, SHA-256 of the checkpoint (None where there is none
        yet), and the configuration with all overrides but `LOCAL_KEYS`.
    """
    root = Path(bundle_root)
    if not root.is_dir():  # of the repository, run from elsewhere
        root = shipped_bundle(root)
    metadata = root / "configs" / "metadata.json"
    described = json.loads(metadata.read_text(encoding="utf-8")) if metadata.is_file() else {}
    config = {key: value for key, value in live_parser().get().items() if key not in LOCAL_KEYS}
    weights = Path(checkpoint)
    return {
        "package": "seg3d_monai",
        "package_version": __version__,
        "bundle": root.resolve().name,
        "bundle_version": described.get("version"),
        "checkpoint_sha256": hashlib.sha256(weights.read_bytes()).hexdigest() if weights.is_file() else None,
        "config": json.loads(json.dumps(config, sort_keys=True, default=str)),
    }
