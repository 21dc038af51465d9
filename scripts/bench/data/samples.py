"""Training samples a second: read, augmented, with targets, against the same transforms over a dense mask an instance.

Both read the same files, normalise, augment image and labels by the same MONAI transforms and end with boxes and masks.
Ours keeps labels in one volume of ids all the way; the other makes one mask [D, H, W] of each instance first, as
detection code for planes does. Each sample takes the next random seed; the contenders take turns.
"""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import zarr
from numpy.typing import NDArray
from scipy import ndimage

from bench.data.bars import Row
from bench.data.options import Options
from bench.inference.stacks import THRESHOLD, blob_tile
from seg3d_monai.data import CropDataset, CropIndex, DataConfig, build_index, read_manifest
from seg3d_monai.data.transforms import train_transforms

CROP, MARGIN, SHAPE, PITCH = (64, 128, 128), (4, 20, 20), (140, 330, 330), (20, 33, 33)
QUICK_CROP, QUICK_MARGIN, QUICK_SHAPE, QUICK_PITCH = (16, 32, 32), (2, 4, 4), (48, 84, 84), (12, 21, 21)
NUM_SAMPLES, QUICK_NUM_SAMPLES = 12, 2
OVERLAY = Path(__file__).parents[3] / "bundles/maskrcnn3d/configs/overlays/augment_strong.json"
METHOD = (
    "Samples: one process of one thread makes crops of 64x128x128 out of Zarr volumes, with the bundles' augmentation "
    "and with the overlay augment_strong; dense makes the same with a mask an instance; sums of wall time, by turns."
)


def measure(options: Options) -> list[Row]:
    """One row for each strength of the augmentation."""
    crop, margin = (QUICK_CROP, QUICK_MARGIN) if options.is_quick else (CROP, MARGIN)
    folder = options.folder / "samples"
    folder.mkdir()
    index = write_data(folder, *((QUICK_SHAPE, QUICK_PITCH) if options.is_quick else (SHAPE, PITCH)), crop)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        rows = []
        for name, settings in {"default": {}, "augment_strong": strong_settings()}.items():
            transform = train_transforms(crop_size=crop, **settings)
            number = QUICK_NUM_SAMPLES if options.is_quick else NUM_SAMPLES
            rows.append({"augmentation": name, "crop": list(crop), **compare(index, crop, margin, transform, number)})
        return rows
    finally:
        torch.set_num_threads(threads)


def compare(index: CropIndex, crop: tuple[int, ...], margin: tuple[int, ...], transform: Any, num_samples: int) -> Row:
    """Seconds of both contenders over as many samples, the first of each not counted."""
    dataset = CropDataset(index, num_samples=num_samples + 1, crop_size=crop, margin=margin, transform=transform)
    dense = DenseSamples(index, crop, margin, transform)
    contenders: dict[str, Callable[[int], int]] = {
        "ours": lambda position: len(dataset[position]["targets"]["ids"]),
        "dense": dense,
    }
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    counts: dict[str, list[int]] = {name: [] for name in contenders}
    for position in range(num_samples + 1):
        for name, sample in contenders.items():
            start = time.perf_counter()
            counts[name].append(sample(position))
            seconds[name].append(time.perf_counter() - start)
    ours, slow = (sum(seconds[name][1:]) for name in ("ours", "dense"))
    return {
        "num_samples": num_samples,
        "ours_instances": float(np.mean(counts["ours"])),
        "dense_instances": float(np.mean(counts["dense"])),
        "ours_per_s": num_samples / ours,
        "dense_per_s": num_samples / slow,
        "ratio": slow / ours,
    }


class DenseSamples:
    """The baseline: a mask of each instance is augmented, and boxes are taken from the masks.

    Args:
        index: of one volume.
        crop: (z, y, x) voxels.
        margin: (z, y, x) voxels that are read beyond on every side.
        transform: on {"image", "label"}; the label is int8 [N, D, H, W].
    """

    def __init__(self, index: CropIndex, crop: tuple[int, ...], margin: tuple[int, ...], transform: Any) -> None:
        (self.record,) = index.volumes()
        self.image, self.label = index.open_image(self.record), index.open_label(self.record)
        self.size = np.array(crop) + 2 * np.array(margin)
        self.transform = transform

    def __call__(self, seed: int) -> int:
        """Make one sample; returns how many instances it holds."""
        rng = np.random.default_rng(seed)
        start = rng.integers(0, np.array(self.record.shape[1:]) - self.size + 1)
        roi = (*start.tolist(), *(start + self.size).tolist())
        image = self.record.intensity.normalise(self.image.read(roi))
        label = self.label.read(roi)[0]
        ids = np.unique(label)
        masks = (label == ids[ids > 0][:, None, None, None]).astype(np.int8)
        self.transform.set_random_state(seed=int(rng.integers(2**32)))
        data = self.transform({"image": torch.from_numpy(image), "label": torch.from_numpy(masks)})
        masks = np.asarray(data["label"]) == 1
        masks = masks[masks.reshape(len(masks), -1).any(axis=1)]
        boxes_of_masks(masks)
        return len(masks)


def boxes_of_masks(masks: NDArray[np.bool_]) -> NDArray[np.float32]:
    """(z1, y1, x1, z2, y2, x2) of dense masks [N, D, H, W], none of them empty."""
    boxes = np.zeros((len(masks), 6), np.float32)
    rows = masks.any(axis=3)
    for axis, lines in enumerate((rows.any(axis=2), rows.any(axis=1), masks.any(axis=1).any(axis=1))):
        boxes[:, axis] = lines.argmax(axis=1)
        boxes[:, axis + 3] = lines.shape[1] - lines[:, ::-1].argmax(axis=1)
    return boxes


def write_data(folder: Path, shape: tuple[int, ...], pitch: tuple[int, ...], crop: tuple[int, ...]) -> CropIndex:
    """A stack of blobs and its labels as Zarr, and their index."""
    image = blob_tile(shape, pitch)  # type: ignore[arg-type]
    label, _ = ndimage.label(image > THRESHOLD, structure=np.ones((3, 3, 3)))
    chunks = tuple(min(32, n) if axis == 0 else min(128, n) for axis, n in enumerate(shape))
    for name, array in (("image", image), ("label", label.astype(np.uint32))):
        zarr.create_array(folder / f"{name}.zarr", data=array, chunks=chunks, dimension_names=["z", "y", "x"])
    manifest = folder / "manifest.csv"
    manifest.write_text(
        "name,image,label,spacing_z_um,spacing_y_um,spacing_x_um\nstack,image.zarr,label.zarr,1.0,0.5,0.5\n"
    )
    return build_index(read_manifest(manifest), folder / "crops.sqlite", DataConfig(crop_size=crop), progress=False)


def strong_settings() -> dict[str, Any]:
    """What the bundles' overlay sets of the transforms."""
    prefix = "train#preprocessing#"
    settings = json.loads(OVERLAY.read_text(encoding="utf-8"))
    return {key.removeprefix(prefix): value for key, value in settings.items() if key.startswith(prefix)}
