"""From predicted blocks to a finished OUTPUT: stitch, paint, build levels, write TIFF and tables, rename.

Every step goes on where a killed run left it, and OUTPUT appears under its name only when all of it is there. Of a
finished run only what was lost is made again. This file must not know the predictor or where the input lies.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from seg3d_monai.inference.journal import FINISHED, PAINTING, PUBLISHING, STITCHING
from seg3d_monai.inference.label_tiff import write_label_tiff
from seg3d_monai.inference.paint import Stitched
from seg3d_monai.inference.resume import OutputPaths
from seg3d_monai.inference.run import Run
from seg3d_monai.inference.table import write_table
from seg3d_monai.inference.writer import LabelWriter


def publish(run: Run, paths: OutputPaths, facts: dict[str, Any]) -> int:
    """Make the finished OUTPUT from a journal whose blocks are all predicted.

    Args:
        run: the run; its journal is past the state "predicting".
        paths: where to write.
        facts: the plan as the journal keeps it.

    Returns:
        Number of objects.

    Raises:
        ValueError: if the ids do not fit the dtype of the labels.
    """
    journal, output = run.journal, facts["output"]
    stitched = run.stitch()
    _check_room_for_ids(stitched, output["dtype"])
    holes = [{"owned": list(run.plan[b].owned), "time": run.plan[b].time} for b in journal.unreadable()]
    writer = LabelWriter(
        paths.output,
        run.plan,
        dtype=output["dtype"],
        spacing_um=facts["spacing_um"],
        version=output["ome_zarr_version"],
        facts={"provenance": output["provenance"]} | ({"holes": holes} if holes else {}),
        shards=output["shards"],
        is_series=facts["times"] is not None,
        image=(facts["shape"][0], facts["dtype"]) if output["copy_image"] else None,
    )
    # OUTPUT takes its name last: in these states the other results are there too, if nobody has removed them.
    is_written = journal.fact("state") in (PUBLISHING, FINISHED)
    if writer.partial.exists() or not (is_written and paths.output.exists()):
        if journal.fact("state") == STITCHING or not writer.partial.exists():
            # A kill while it is made must not look like one after.
            journal.forget({"state": STITCHING}, "painted", "tiles")
            writer.create()
            journal.set_fact("state", PAINTING)
        else:
            writer.remove_remains()
        run.paint(stitched, writer)
        if output["copy_image"]:
            run.copy_image(writer)
        run.build_levels(writer)
    if paths.label_tiff is not None and not (is_written and paths.label_tiff.exists()):
        write_label_tiff(writer.path, paths.label_tiff, spacing_um=facts["spacing_um"], progress=run.progress)
    missing = [path for path in paths.tables if not (is_written and path.exists())]
    if missing:
        totals = run.count(stitched)
        for path in missing:
            tables = totals.tables(
                scores=stitched.scores,
                classes=stitched.classes,
                spacing_um=facts["spacing_um"],
                times=facts["times"],
            )
            write_table(tables, path)
    journal.set_fact("num_objects", stitched.num_objects)
    journal.set_fact("state", PUBLISHING)
    if writer.partial.exists():
        writer.publish()
    journal.begin({"state": FINISHED, "is_published": True})
    return stitched.num_objects


def _check_room_for_ids(stitched: Stitched, dtype: str) -> None:
    room = int(np.iinfo(dtype).max) - 1  # the maximum means "ignore" in label volumes
    if stitched.num_objects > room:
        raise ValueError(f"{stitched.num_objects} objects do not fit dtype {dtype} ({room} ids); pass dtype uint32")
