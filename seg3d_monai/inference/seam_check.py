"""Does stitching leave seams? One region is predicted under two grids of blocks, and the two answers are compared.

The second grid is the first one moved by half a block, so a face of one runs through the middle of the other's blocks.
A model that sees other surroundings answers a little differently anywhere; what stitching adds shows as a higher rate
of disagreement next to faces than away from them. No annotation is needed. The words of the report are defined in
seam_cells.py.

This file knows grids; it takes the model as a callable.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from seg3d_monai.inference.blocks import BlockPlan, Roi
from seg3d_monai.inference.inputs import open_input
from seg3d_monai.inference.predict import DEFAULT_BLOCK_SIZE, DEFAULT_HALO, plan_blocks, predict_plan
from seg3d_monai.inference.seam_cells import DEFAULT_MIN_IOU, KINDS, SAME, Faces, check_limits, compare_labels
from seg3d_monai.inference.seam_report import SeamReport, Tally
from seg3d_monai.inference.workers import Predictor
from seg3d_monai.user_errors import write_whole

REGION_BLOCKS = 3


def seam_check(
    image: Any,
    predictor: Predictor,
    *,
    block_size: int | Sequence[int] = DEFAULT_BLOCK_SIZE,
    halo: int | Sequence[int] = DEFAULT_HALO,
    roi: Sequence[int] | None = None,
    offset: int | Sequence[int] = 0,
    axes: str | None = None,
    spacing: Sequence[float] | None = None,
    channels: Sequence[int] | int | None = None,
    min_iou: float = DEFAULT_MIN_IOU,
    max_shift: float | None = None,
    json_path: str | os.PathLike[str] | None = None,
    picture_path: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> SeamReport:
    """Predict a region under two grids of blocks and report where the two answers disagree.

    An axis along which one block holds the whole volume has no seam, and its grid is not moved.

    Args:
        image: path of a stack, a volume, or an array [Z, Y, X] or [C, Z, Y, X].
        predictor: as in `predict_volume`; it must give the same answer for the same block.
        block_size: int or (z, y, x) voxels, as it will be used on the whole stack.
        halo: int or (z, y, x) voxels, likewise.
        roi: (z1, y1, x1, z2, y2, x2) to predict, volume voxels; None for 3 x 3 x 3 blocks in the middle.
        offset: int or (z, y, x) voxels of a line of the first grid.
        axes: axes of the stored array, if its metadata do not say; for paths only.
        spacing: (z, y, x) micrometer per voxel; for paths and arrays only.
        channels: channels to read; for paths only.
        min_iou: a cell with a lower IoU counts as moved; from `LOST_IOU` to 1.
        max_shift: a cell whose centroid differs by more counts as moved, micrometer (voxels if the spacing is
            unknown), more than 0; None for half the radius of a ball of its volume.
        json_path: where to write the report as JSON; its folder must exist.
        picture_path: where to write a PNG of the place with the most disagreements; its folder must exist.
        progress: show progress bars.

    Returns:
        The report.

    Raises:
        FileNotFoundError: if the image or a folder to write to does not exist.
        ValueError: if an argument is out of its range, no face lies in the region, the volume holds NaN or the
            predictor returns invalid instances.
        TypeError: if an argument has the wrong type or the predictor does not return Instances.
    """
    for name, path in (("json_path", json_path), ("picture_path", picture_path)):
        if path is not None and not Path(path).parent.is_dir():
            raise FileNotFoundError(f"the folder of {name} {path} does not exist; make {Path(path).parent} first")
    check_limits(min_iou, max_shift)
    volume = open_input(image, axes=axes, spacing=spacing, channels=channels)
    whole = plan_blocks(volume, predictor, block_size, halo, offset=offset)
    region = _middle(whole) if roi is None else roi
    half = [size // 2 if size < extent else 0 for size, extent in zip(whole.block_size, whole.shape, strict=True)]
    plans = [
        BlockPlan.make(shape=whole.shape, block_size=whole.block_size, halo=whole.halo, roi=region, offset=lines)
        for lines in (whole.offset, tuple(o + h for o, h in zip(whole.offset, half, strict=True)))
    ]
    faces = [_faces(plan) for plan in plans]
    if not any(along for grid in faces for along in grid):
        raise ValueError(
            f"no face between two blocks lies in the region {list(plans[0].region)} with block_size "
            f"{list(whole.block_size)}, so there is no seam; pass a smaller block_size or a larger roi"
        )
    first, second = (predict_plan(plan, volume, predictor, progress)[0] for plan in plans)
    plan = plans[0]
    cells = compare_labels(
        first,
        second,
        faces=_joined(faces[0], faces[1]),
        origin=plan.region[:3],
        spacing=volume.spacing_um,
        goes_on=[r > 0 for r in plan.region[:3]] + [r < n for r, n in zip(plan.region[3:], plan.shape, strict=True)],
        min_iou=min_iou,
        max_shift=max_shift,
    )
    counted = [cell for cell in cells if not cell.is_cut]
    report = SeamReport(
        roi=plan.region,
        block_size=plan.block_size,
        halo=plan.halo,
        offsets=(plan.offset, plans[1].offset),
        spacing_um=volume.spacing_um,
        min_iou=min_iou,
        max_shift=max_shift,
        num_objects=(int(first.max()), int(second.max())),
        num_cut=len(cells) - len(counted),
        at_faces=Tally.of([cell for cell in counted if cell.at_face]),
        away=Tally.of([cell for cell in counted if not cell.at_face]),
        disagreements=tuple(
            sorted(
                (cell for cell in counted if cell.kind != SAME),
                key=lambda cell: (not cell.at_face, KINDS.index(cell.kind), cell.box),
            )
        ),
    )
    if json_path is not None:
        write_whole(Path(json_path), json.dumps(report.as_json(), indent=2) + "\n")
    if picture_path is not None:
        from seg3d_monai.inference.seam_picture import save_picture  # matplotlib takes long to import

        save_picture(Path(picture_path), volume, first, second, faces, report)
    return report


def _faces(plan: BlockPlan) -> Faces:
    """Along each axis, where a block begins behind another one."""
    z, y, x = (sorted({block.owned[axis] for block in plan} - {plan.region[axis]}) for axis in range(3))
    return z, y, x


def _joined(first: Faces, second: Faces) -> Faces:
    z, y, x = (sorted({*a, *b}) for a, b in zip(first, second, strict=True))
    return z, y, x


def _middle(plan: BlockPlan) -> Roi:
    """The blocks in the middle of the volume, `REGION_BLOCKS` along each axis that has so many."""
    lower, upper = [], []
    for extent, size, offset in zip(plan.shape, plan.block_size, plan.offset, strict=True):
        room = extent - REGION_BLOCKS * size
        line = offset + (room // 2 - offset) // size * size if room > 0 else 0
        lower.append(max(line, 0))
        upper.append(min(line + REGION_BLOCKS * size, extent))
    return lower[0], lower[1], lower[2], upper[0], upper[1], upper[2]
