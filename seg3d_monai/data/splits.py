"""Splits by specimen or another column, never by crop, and the one call by which a bundle config gets its index.

Must not know: SQLite, torch.
"""

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from seg3d_monai.data.crop_index import CropIndex
from seg3d_monai.data.crop_index_build import build_index
from seg3d_monai.data.data_config import DataConfig
from seg3d_monai.data.manifest import ManifestRow, leaks, read_manifest


def index_for(
    dataset_dir: str | os.PathLike[str],
    db: str | os.PathLike[str],
    *,
    crop_size: Sequence[int],
    stride: Sequence[int] | None = None,
    overlap: Sequence[int] | None = None,
    min_voxels: int = 20,
    min_object_voxels: int = 0,
    percentiles: tuple[float, float] = (1.0, 99.8),
    where: str | None = None,
    specimen_pattern: str | None = None,
    split_by: str = "specimen",
    val_specimens: Sequence[str] = (),
    test_specimens: Sequence[str] = (),
    val_fraction: float = 0.0,
    seed: int = 0,
    num_workers: int = 1,
    skip_bad: bool = False,
    needs_labels: bool = True,
    progress: bool = True,
) -> CropIndex:
    """Read a manifest, split it by specimen unless it brings a split, and build or reuse its index.

    Args:
        dataset_dir: a manifest, or a folder that holds one or can be discovered.
        db: path of the index file.
        crop_size: as for `DataConfig`.
        stride: as for `DataConfig`.
        overlap: as for `DataConfig`.
        min_voxels: as for `DataConfig`.
        min_object_voxels: as for `DataConfig`.
        percentiles: as for `DataConfig`.
        where: as for `DataConfig`.
        specimen_pattern: as for `read_manifest`.
        split_by: column whose values are kept whole, "specimen" or any other of the manifest.
        val_specimens: its values for validation.
        test_specimens: its values that are kept back.
        val_fraction: where neither the manifest nor `val_specimens` says, the fraction of labelled volumes to take for
            validation, in whole specimens drawn by `seed`.
        seed: of that draw.
        num_workers: as for `build_index`.
        skip_bad: as for `build_index`.
        needs_labels: as for `build_index`; without, volumes for validation are drawn among all of them.
        progress: whether to show a progress bar.

    Returns:
        The index, opened.

    Raises:
        ValueError: for a specimen that does not exist (with those that do) or is named twice, for a split asked of
            a manifest that has its own, and for a specimen that would be in two splits (with its volumes).
    """
    config = DataConfig(
        crop_size=crop_size,  # type: ignore[arg-type]  # which checks that they are three
        stride=None if stride is None else tuple(stride),  # type: ignore[arg-type]
        overlap=None if overlap is None else tuple(overlap),  # type: ignore[arg-type]
        min_voxels=min_voxels,
        min_object_voxels=min_object_voxels,
        percentiles=(percentiles[0], percentiles[1]),
        where=where,
    )
    manifest = read_manifest(Path(dataset_dir), specimen_pattern=specimen_pattern)
    rows = split_by_specimen(
        manifest.rows,
        split_by=split_by,
        val_specimens=val_specimens,
        test_specimens=test_specimens,
        val_fraction=val_fraction,
        seed=seed,
        needs_labels=needs_labels,
    )
    manifest = replace(manifest, rows=rows)
    return build_index(
        manifest, db, config, num_workers=num_workers, skip_bad=skip_bad, needs_labels=needs_labels, progress=progress
    )


def split_by_specimen(
    rows: Sequence[ManifestRow],
    *,
    split_by: str = "specimen",
    val_specimens: Sequence[str] = (),
    test_specimens: Sequence[str] = (),
    val_fraction: float = 0.0,
    seed: int = 0,
    needs_labels: bool = True,
) -> tuple[ManifestRow, ...]:
    """Give every row a split, whole specimens at a time, unless the rows bring one; arguments as for `index_for`.

    Unlabelled volumes without a split of their own are left without where the others bring one.

    Returns:
        The rows in the same order.

    Raises:
        TypeError, ValueError: as `index_for`.
    """
    for name, value in (("val_specimens", val_specimens), ("test_specimens", test_specimens)):
        if isinstance(value, str):
            raise TypeError(f"{name}={value!r} is a string; give a list of specimens")
    if not 0.0 <= val_fraction < 1.0:
        raise ValueError(f"val_fraction={val_fraction} is outside [0, 1); give the fraction of volumes for validation")
    asked = bool(val_specimens or test_specimens)
    if any(row.split is not None for row in rows):
        without = [row.name for row in rows if row.split is None and row.label is not None]
        if without:
            raise ValueError(f"rows {', '.join(without[:10])} have no split while others do; fill the column 'split'")
        if asked:
            raise ValueError("the manifest has a column 'split'; remove it, or give no specimens")
        return tuple(rows)
    groups = [_group(row, split_by) for row in rows]
    values = sorted(set(groups))
    for name, value in (("val_specimens", val_specimens), ("test_specimens", test_specimens)):
        unknown = sorted({str(v) for v in value} - set(values))
        if unknown:
            raise ValueError(f"{name} names {', '.join(unknown)}; the {split_by}s are {', '.join(values)}")
    chosen, kept_back = {str(v) for v in val_specimens}, {str(v) for v in test_specimens}
    both = sorted(chosen & kept_back)
    if both:
        raise ValueError(f"{split_by}s {', '.join(both)} are in val_specimens and test_specimens; keep each in one")
    if val_fraction and not chosen:
        drawn = [not needs_labels or row.label is not None for row in rows]
        chosen = _draw(
            [group for group, is_drawn in zip(groups, drawn, strict=True) if is_drawn], kept_back, val_fraction, seed
        )
    split = tuple(
        replace(row, split="val" if group in chosen else "test" if group in kept_back else "train")
        for row, group in zip(rows, groups, strict=True)
    )
    leaking = leaks(split)
    if leaking:
        raise ValueError(f"split_by={split_by!r} cuts specimens: {'; '.join(leaking)}")
    return split


def _draw(groups: Sequence[str], kept_back: set[str], val_fraction: float, seed: int) -> set[str]:
    """Values of the column for validation, until they hold the fraction of the volumes, whose values are `groups`."""
    counts = Counter(group for group in groups if group not in kept_back)
    rest = sorted(counts)
    if len(rest) < 2:
        raise ValueError(f"val_fraction={val_fraction} needs two specimens or more; there is {', '.join(rest)}")
    goal = val_fraction * sum(counts.values())
    chosen: set[str] = set()
    for position in np.random.default_rng(seed).permutation(len(rest))[:-1]:
        if sum(counts[group] for group in chosen) >= goal:
            break
        chosen.add(rest[position])
    return chosen


def _group(row: ManifestRow, split_by: str) -> str:
    """A row's value of a column."""
    if split_by in ("specimen", "name"):
        return str(getattr(row, split_by))
    if split_by not in row.attributes:
        columns = ", ".join(["specimen", "name", *sorted(row.attributes)])
        raise ValueError(f"{row.name}: has no value in the column split_by={split_by!r}; columns are {columns}")
    return str(row.attributes[split_by])
