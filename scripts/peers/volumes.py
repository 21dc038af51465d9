"""The volumes of the race: one division into training, tuning and validation specimens, the same for all."""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from peers.exchange import IGNORE, RaceVolume, write_volume
from peers.options import Options
from seg3d_monai.data import ManifestRow, read_manifest, write_manifest
from seg3d_monai.data.synthetic import write_specimen
from seg3d_monai.data.targets import compact_labels

QUICK_SHAPE, SAMPLE_SHAPE = (24, 64, 64), (48, 128, 128)


@dataclass(frozen=True)
class Division:
    """Who is for what. A volume may be trained and tuned on; those for validation serve nothing else.

    Attributes:
        train: volumes to train on.
        tune: volumes to tune thresholds on.
        val: volumes to judge on.
    """

    train: tuple[ManifestRow, ...]
    tune: tuple[ManifestRow, ...]
    val: tuple[ManifestRow, ...]

    def __post_init__(self) -> None:
        seen = {row.specimen for row in (*self.train, *self.tune)}
        assert not seen & {row.specimen for row in self.val}
        for name in ("train", "tune", "val"):
            if not getattr(self, name):
                raise ValueError(f"no labelled volume is left for {name}; leave a specimen for each of the three")

    def rows(self) -> list[ManifestRow]:
        """Each volume once."""
        trained = {row.name for row in self.train}
        return [*self.train, *(row for row in self.tune if row.name not in trained), *self.val]

    def split_rows(self) -> list[ManifestRow]:
        """The volumes with the splits that they have in a training of ours.

        Its validation, which stands at the end and cannot choose anything, sees the tuning volumes: they are "val".
        What the race is judged on is "test".
        """
        trained = {row.name for row in self.train}
        held_back = [replace(row, split="val") for row in self.tune if row.name not in trained]
        return [
            *(replace(row, split="train") for row in self.train),
            *held_back,
            *(replace(row, split="test") for row in self.val),
        ]


def divided(options: Options) -> Division:
    """The labelled volumes of the data, divided by specimen.

    A manifest's own splits count: "train", "val" to tune on, "test" to judge on.

    Raises:
        ValueError: a specimen does not exist or is named for both, or nothing is left for one of the three.
    """
    dataset = options.dataset_dir if options.dataset_dir is not None else sample(options)
    pattern = options.specimen_pattern
    rows = [row for row in read_manifest(dataset, specimen_pattern=pattern).rows if row.label is not None]
    if any(row.split is not None for row in rows):
        parts = {split: tuple(row for row in rows if row.split == split) for split in ("train", "val", "test")}
        train, tune, val = parts["train"], parts["val"], parts["test"]
    else:
        known = {row.specimen for row in rows}
        for name in ("val_specimens", "tune_specimens"):
            unknown = sorted(set(getattr(options, name)) - known)
            if unknown:
                raise ValueError(f"--{name} {' '.join(unknown)}: choose among {', '.join(sorted(known))}")
        both = sorted(set(options.val_specimens) & set(options.tune_specimens))
        if both:
            raise ValueError(f"{' '.join(both)}: in --val_specimens and --tune_specimens; judge on other specimens")
        val = tuple(row for row in rows if row.specimen in options.val_specimens)
        tune = tuple(row for row in rows if row.specimen in options.tune_specimens)
        held_back = {row.name for row in (*val, *tune)}
        train = tuple(row for row in rows if row.name not in held_back)
    return Division(train=(*train, *tune) if options.train_on_tuned else train, tune=tune, val=val)


def sample(options: Options) -> Path:
    """A synthetic specimen, where the user gave no data."""
    shape = QUICK_SHAPE if options.is_quick else SAMPLE_SHAPE
    return write_specimen(options.folder / "sample", train_volumes=2, train_shape=shape, test_shape=shape)


def write_race(division: Division, folder: Path) -> None:
    """Write the volumes for all contestants as arrays, and the manifest that ours trains from.

    Raises:
        ValueError: a volume has several channels or no voxel size.
    """
    (folder / "volumes").mkdir(exist_ok=True)
    for row in division.rows():
        write_volume(folder / "volumes", in_memory(row))
    write_manifest(folder / "manifest.json", division.split_rows())


def in_memory(row: ManifestRow) -> RaceVolume:
    """A volume with its labels, read whole."""
    image, label = row.open_image(), row.open_label()
    if image.shape[0] != 1:
        raise ValueError(f"{row.name}: has {image.shape[0]} channels; the race is over images of one")
    if image.spacing_um is None:
        raise ValueError(f"{row.name}: has no voxel size; fill the columns spacing_z_um, spacing_y_um and spacing_x_um")
    whole = (0, 0, 0, *image.shape[1:])
    codes, ids = compact_labels(label.read(whole)[0], ignore=int(np.iinfo(label.dtype).max))
    mask = row.open_ignore()
    if mask is not None:
        codes[mask.read(whole)[0] != 0] = IGNORE
    labels = codes.astype(np.int16 if len(ids) < 2**15 else np.int32)
    return RaceVolume(name=row.name, image=image.read(whole)[0], labels=labels, spacing_um=image.spacing_um)
