"""What a contestant is told and answers, in files: each has a process of its own, one of them another interpreter.

It must not know more than numpy: StarDist's environment has nothing of this package's.
"""

import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

IGNORE = -1
Array = np.ndarray
Spacing = tuple[float, float, float]
Predict = Callable[[Array, Spacing], Array]


@dataclass(frozen=True)
class Request:
    """What a contestant is told.

    Attributes:
        folder: where it works and answers.
        volumes: folder of the volumes, see `write_volume`.
        train: names of volumes to train on.
        tune: names of volumes to tune thresholds on.
        val: names of volumes to predict, which serve nothing else.
        minutes: of the training loop.
        seed: of every draw.
        threads: CPU threads.
        is_quick: toy sizes.
        settings: what concerns this contestant alone.
    """

    folder: str
    volumes: str
    train: Sequence[str]
    tune: Sequence[str]
    val: Sequence[str]
    minutes: float
    seed: int
    threads: int
    is_quick: bool
    settings: dict[str, Any]

    def write(self) -> Path:
        """Write it into its folder."""
        self.path.write_text(self.text, encoding="utf-8")
        return self.path

    @property
    def path(self) -> Path:
        """Its file."""
        return Path(self.folder) / "request.json"

    @property
    def text(self) -> str:
        """What stands there."""
        return json.dumps(asdict(self), indent=1) + "\n"

    @classmethod
    def from_arguments(cls) -> "Request":
        """The request whose file is the only argument of this process."""
        return cls(**json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))

    def read(self, names: Sequence[str]) -> "list[RaceVolume]":
        """Volumes by their names."""
        return [read_volume(Path(self.volumes), name) for name in names]


@dataclass(frozen=True)
class RaceVolume:
    """A volume in memory.

    Attributes:
        name: of the volume.
        image: raw voxels [Z, Y, X].
        labels: signed integers [Z, Y, X], 0 background, -1 ignore, ids compact from 1.
        spacing_um: micrometres per voxel (z, y, x).
    """

    name: str
    image: Array
    labels: Array
    spacing_um: Spacing


def write_volume(folder: Path, volume: RaceVolume) -> None:
    """Write a volume as NAME.npz."""
    np.savez(folder / f"{volume.name}.npz", image=volume.image, labels=volume.labels, spacing_um=volume.spacing_um)


def read_volume(folder: Path, name: str) -> RaceVolume:
    """Read what `write_volume` wrote."""
    with np.load(folder / f"{name}.npz") as arrays:
        z, y, x = arrays["spacing_um"].tolist()
        return RaceVolume(name=name, image=arrays["image"], labels=arrays["labels"], spacing_um=(z, y, x))


def predict_all(request: Request, predict: Predict, place: str = "labels") -> list[dict[str, Any]]:
    """Predict the validation volumes, keep the labels as PLACE/NAME.npy, and say how long each took.

    The first volume is predicted once before: caches, threads and compiled kernels are warm for all.

    Args:
        request: what to predict, and where to answer.
        predict: raw image [Z, Y, X] and voxel size -> labels [Z, Y, X], 0 background.
        place: folder for the labels, in that of the request.

    Returns:
        For each volume its name, voxels, and seconds from raw voxels to labels.
    """
    folder = Path(request.folder) / place
    folder.mkdir(exist_ok=True)
    rows = []
    for position, name in enumerate(request.val):
        volume = read_volume(Path(request.volumes), name)
        if position == 0:
            predict(volume.image, volume.spacing_um)
        start = time.perf_counter()
        labels = predict(volume.image, volume.spacing_um)
        seconds = time.perf_counter() - start
        np.save(folder / f"{name}.npy", np.asarray(labels).astype(np.uint32))
        rows.append({"name": name, "voxels": int(volume.image.size), "seconds": seconds})
    return rows


def write_answer(request: Request, **facts: Any) -> None:
    """Write what a contestant found, the last thing that it does."""
    path = Path(request.folder) / "answer.json"
    partial = path.with_suffix(".part")
    partial.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    os.replace(partial, path)
