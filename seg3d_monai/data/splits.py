"""Splits by specimen, never by crop or time point, and the one call by which a bundle config gets its index.

Must not know: SQLite, torch.
"""

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from seg3d_monai.data.crop_index import CropIndex
from seg3d_monai.data.crop_index_build import build_index
from seg3d_monai.data.manifest import ManifestRow, read_manifest


def index_for(
    dataset_dir: str | os.PathLike[str],
    db: str | os.PathLike[str],
    *,
    crop_size: Sequence[int],
    stride: Sequence[int] | None = None,
    min_voxels: int = 20,
    percentiles: tuple[float, float] = (1.0, 99.8),
    specimen_pattern: str | None = None,
    val_specimens: Sequence[str] = (),
    test_specimens: Sequence[str] = (),
    val_fraction: float = 0.0,
    seed: int = 0,
    progress: bool = True,
) -> CropIndex:
    """Read a manifest, split it by specimen unless it brings a split, and build or reuse its index.

    Args:
        dataset_dir: a manifest, or a folder that holds one or can be discovered.
        db: path of the index file.
        crop_size: as for `build_index`.
        stride: as for `build_index`.
        min_voxels: as for `build_index`.
        percentiles: as for `build_index`.
        specimen_pattern: as for `read_manifest`.
        val_specimens: specimens for validation.
        test_specimens: specimens that are kept back.
        val_fraction: where neither the manifest nor `val_specimens` says, the fraction of volumes to take for
            validation, in whole specimens drawn by `seed`.
        seed: of that draw.
        progress: whether to show a progress bar.

    Returns:
        The index, opened.

    Raises:
        ValueError: for a specimen that does not exist (with those that do) or is named twice, and for a split asked of
            a manifest that has its own.
    """
    manifest = read_manifest(Path(dataset_dir), specimen_pattern=specimen_pattern)
    rows = split_by_specimen(
        manifest.rows,
        val_specimens=val_specimens,
        test_specimens=test_specimens,
        val_fraction=val_fraction,
        seed=seed,
    )
    return build_index(
        replace(manifest, rows=rows),
        db,
        crop_size=crop_size,
        stride=stride,
        min_voxels=min_voxels,
        percentiles=percentiles,
        progress=progress,
    )


def split_by_specimen(
    rows: Sequence[ManifestRow],
    *,
    val_specimens: Sequence[str] = (),
    test_specimens: Sequence[str] = (),
    val_fraction: float = 0.0,
    seed: int = 0,
) -> tuple[ManifestRow, ...]:
    """Give every row a split, whole specimens at a time, unless the rows bring one; arguments as for `index_for`."""
    for name, value in (("val_specimens", val_specimens), ("test_specimens", test_specimens)):
        if isinstance(value, str):
            raise TypeError(f"{name}={value!r} is a string; give a list of specimens")
    if not 0.0 <= val_fraction < 1.0:
        raise ValueError(f"val_fraction={val_fraction} is outside [0, 1); give the fraction of volumes for validation")
    asked = bool(val_specimens or test_specimens)
    if any(row.split is not None for row in rows):
        without = [row.name for row in rows if row.split is None]
        if without:
            raise ValueError(f"rows {', '.join(without[:10])} have no split while others do; fill the column 'split'")
        if asked:
            raise ValueError("the manifest has a column 'split'; remove it, or give no specimens")
        return tuple(rows)
    specimens = sorted({row.specimen for row in rows})
    for name, value in (("val_specimens", val_specimens), ("test_specimens", test_specimens)):
        unknown = sorted(set(value) - set(specimens))
        if unknown:
            raise ValueError(f"{name} names {', '.join(unknown)}; the specimens are {', '.join(specimens)}")
    both = sorted(set(val_specimens) & set(test_specimens))
    if both:
        raise ValueError(f"specimens {', '.join(both)} are in val_specimens and test_specimens; keep each in one")
    chosen = set(val_specimens)
    if val_fraction and not val_specimens:
        rest = [specimen for specimen in specimens if specimen not in set(test_specimens)]
        if len(rest) < 2:
            raise ValueError(f"val_fraction={val_fraction} needs two specimens or more; there is {', '.join(rest)}")
        counts = {specimen: sum(row.specimen == specimen for row in rows) for specimen in rest}
        goal = val_fraction * sum(counts.values())
        for position in np.random.default_rng(seed).permutation(len(rest))[:-1]:
            if sum(counts[specimen] for specimen in chosen) >= goal:
                break
            chosen.add(rest[position])
    split_of = {s: "val" if s in chosen else "test" if s in set(test_specimens) else "train" for s in specimens}
    return tuple(replace(row, split=split_of[row.specimen]) for row in rows)
