"""`task.json`: what a folder of suggested regions must remember until the corrected labels come back.

Must not know: networks, how regions were chosen, how labels are merged.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from seg3d_monai.data.volume import Roi

FILE = "task.json"
FORMAT, VERSION = "seg3d_monai.annotation", 1


@dataclass(frozen=True, kw_only=True)
class Region:
    """One region to annotate.

    Args:
        number: from 1; its folder is `folder`.
        volume: name of the volume.
        shape: (z, y, x) voxels of the volume.
        roi: (z1, y1, x1, z2, y2, x2) that counts, volume frame.
        window: the region that was exported, `roi` and its margin.
        labels_sha256: of the labels as they were exported, see `labels_digest`.
        known_ids: ids in the volume's labels of the objects that were annotated before; exported as 1, 2, …
        classes: class of each exported id, where there are several classes; else empty.
    """

    number: int
    volume: str
    shape: tuple[int, int, int]
    roi: Roi
    window: Roi
    labels_sha256: str
    known_ids: tuple[int, ...] = ()
    classes: dict[int, int] = field(default_factory=dict)

    @property
    def folder(self) -> str:
        """Name of the folder that holds its files."""
        return f"{self.number:03d}"


@dataclass(frozen=True, kw_only=True)
class AnnotationTask:
    """All regions of a folder.

    Args:
        index: path of the crop index.
        config: that of the index.
        split: split of the volumes; an unlabelled volume without one gets it with its first labels.
        splits: split of every volume of the index by name, None where it has none.
        specimens: specimen of every volume of the index by name.
        num_classes: classes of the index.
        regions: in the order in which they were chosen.
        training: what the command needs that goes on training: bundle, overlay, checkpoint, …
    """

    index: str
    config: dict[str, Any]
    split: str
    splits: dict[str, str | None]
    specimens: dict[str, str]
    num_classes: int
    regions: tuple[Region, ...]
    training: dict[str, Any] = field(default_factory=dict)


def write_task(folder: Path, task: AnnotationTask) -> None:
    """Write a folder's task.json."""
    content = {"format": FORMAT, "version": VERSION, **asdict(task)}
    (folder / FILE).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def read_task(folder: Path) -> AnnotationTask:
    """Read a folder's task.json.

    Raises:
        FileNotFoundError: it is not there.
        ValueError: it is no task, damaged, or one of a later version.
    """
    path = folder / FILE
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; give the folder that `seg3d annotate suggest` wrote")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content.get("format") != FORMAT:
            raise ValueError(f"its format is {content.get('format')!r}")
        if content["version"] > VERSION:
            raise ValueError(f"its version is {content['version']}, known is {VERSION}")
        values = {name.name: content[name.name] for name in fields(AnnotationTask)}
        regions = tuple(_region(entry) for entry in values.pop("regions"))
        return AnnotationTask(**values, regions=regions)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is no annotation task ({error}); suggest regions again") from error


def labels_digest(labels: NDArray[np.integer]) -> str:
    """Digest of shape and ids, whatever the integer type; voxels alone say whether labels were changed."""
    values = np.ascontiguousarray(labels, dtype="<i8")
    return hashlib.sha256(f"{values.shape}".encode() + values.tobytes()).hexdigest()


def _region(entry: Mapping[str, Any]) -> Region:
    values: dict[str, Any] = {k: tuple(value) if isinstance(value, list) else value for k, value in entry.items()}
    values["classes"] = {int(key): value for key, value in entry["classes"].items()}
    return Region(**values)
