"""What the stress is told, and what a folder holds of an earlier one with the same settings."""

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.stress.bars import Row
from seg3d_monai.cli_bundle import find_bundle, overlay_files
from seg3d_monai.engine.checkpoint import replace_file


@dataclass(frozen=True)
class Options:
    """How to stress.

    Attributes:
        folder: for data, runs and finished rows; an absolute path.
        ratios: depths of a voxel over its width.
        steps: optimizer steps of each training.
        threads: CPU threads of every process.
        bundle: name or folder of the bundle.
        overlays: of training, plan and prediction, names or files.
        seed: of data and training.
        is_quick: toy sizes, whose numbers mean nothing.
        restart: whether what the folder holds of these ratios is thrown away.
    """

    folder: Path
    ratios: tuple[float, ...]
    steps: int
    threads: int
    bundle: str
    overlays: tuple[str, ...]
    seed: int
    is_quick: bool
    restart: bool

    @property
    def overlay_paths(self) -> list[str]:
        """Files of the overlays."""
        return overlay_files(find_bundle(self.bundle), ",".join(self.overlays))


def description(options: Options, ratio: float) -> Row:
    """What a result depends on, as JSON gives it back."""
    overlays = [[Path(path).stem, json.loads(Path(path).read_text(encoding="utf-8"))] for path in options.overlay_paths]
    return {
        **{key: getattr(options, key) for key in ("steps", "threads", "bundle", "seed", "is_quick")},
        "ratio": ratio,
        "overlays": overlays,
    }


def claimed(file: Path, settings: Mapping[str, Any], restart: bool) -> Row | None:
    """What is finished in the folder of a ratio; where nothing is, the folder is now of these settings.

    Raises:
        ValueError: it is of others.
    """
    if restart:
        shutil.rmtree(file.parent, ignore_errors=True)
    if file.exists():
        found = json.loads(file.read_text(encoding="utf-8"))
        different = sorted(key for key in settings if found["settings"].get(key) != settings[key])
        if different:
            raise ValueError(
                f"{file.parent} was begun with other settings ({', '.join(different)} differ); give --restart, or "
                "another --folder"
            )
        result: Row | None = found.get("result")
        return result
    file.parent.mkdir(parents=True, exist_ok=True)
    write_json(file, {"settings": settings})
    return None


def write_json(file: Path, content: Mapping[str, Any]) -> None:
    """Write a file at once or not at all."""
    replace_file(file, lambda opened: opened.write((json.dumps(content, indent=1) + "\n").encode()))
