"""What a run leaves beside its checkpoints: the merged config, the package versions and the seed."""

from __future__ import annotations

import json
import platform
from importlib.metadata import version
from pathlib import Path

import torch

from seg3d_monai.engine.checkpoint import replace_file
from seg3d_monai.engine.config import live_parser
from seg3d_monai.engine.replicas import rank

__all__ = ["record_run"]

PACKAGES = ("seg3d_monai", "torch", "monai", "pytorch-ignite", "numpy", "scikit-image", "zarr", "tifffile")


def record_run(output_dir: str | Path, *, seed: int) -> None:
    """Write `config.json` (files and overrides merged, macros resolved) and `environment.json` under output_dir.

    Call it from a bundle's `initialize` list. It is the first write of a run, so it also finds a folder without
    permission before anything is computed. Of several processes that train together, the first one writes.

    Args:
        output_dir: folder of the run; made if missing.
        seed: seed of the run, recorded.

    Raises:
        ValueError: if output_dir cannot be written.
    """
    if rank() > 0:
        return
    folder = Path(output_dir)
    environment = {
        "seed": seed,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "threads": torch.get_num_threads(),
        "cuda": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "packages": {name: version(name) for name in PACKAGES},
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in (("config.json", live_parser().get()), ("environment.json", environment)):
            text = json.dumps(content, indent=2, default=str)
            replace_file(folder / name, lambda file, text=text: file.write(text.encode()))  # type: ignore[misc]
    except OSError as error:
        raise ValueError(f"output_dir={str(folder)!r} cannot be written ({error}); choose another folder") from error
