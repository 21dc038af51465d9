"""A finished OUTPUT painted again from its journal, with other thresholds.

The journal keeps every instance, so this takes neither the predictor nor the input, and must not know them.
"""

from __future__ import annotations

from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

from seg3d_monai.data.volume import open_volume
from seg3d_monai.inference.blocks import BlockPlan
from seg3d_monai.inference.journal import PREDICTING, Journal
from seg3d_monai.inference.predict import Prediction
from seg3d_monai.inference.publish import publish
from seg3d_monai.inference.resume import OutputPaths
from seg3d_monai.inference.run import Run
from seg3d_monai.inference.schedule import stop_on_sigterm
from seg3d_monai.inference.workers import BlockWorker, no_predictor, start_workers


def relabel_volume(
    output: str | Path,
    *,
    score_threshold: float | None = None,
    min_volume: int | None = None,
    num_workers: int = 1,
    progress: bool = True,
) -> Prediction:
    """Paint a finished OUTPUT again from its journal, with other thresholds and without predicting.

    The old OUTPUT stays until the new one is complete. A run that is killed goes on with the same call; the result is
    that of `predict_volume` with these thresholds.

    Args:
        output: the OME-Zarr that `predict_volume` wrote.
        score_threshold: ignore instances with a lower score; None keeps the threshold as it is.
        min_volume: leave out objects with fewer voxels; None keeps it as it is.
        num_workers: processes that paint.
        progress: show progress bars.

    Returns:
        As `predict_volume`.

    Raises:
        FileNotFoundError: if OUTPUT or the journal does not exist.
        ValueError: if an argument is out of its range, prediction is not finished, or instances below the threshold
            were never kept.
    """
    if score_threshold is not None and not 0 <= score_threshold <= 1:
        raise ValueError(f"score_threshold is {score_threshold}; give a score in 0 to 1")
    if min_volume is not None and min_volume < 0:
        raise ValueError(f"min_volume is {min_volume}; pass an integer of at least 0")
    paths = OutputPaths.of(Path(output), (), False)
    if not Path(output).exists() and not paths.journal.exists():
        raise FileNotFoundError(f"neither output {output} nor its journal exists; give what seg3d predict wrote")
    if not paths.journal.exists():
        raise FileNotFoundError(f"{paths.journal}: the journal of {output} is gone; predict again")
    with Journal(paths.journal) as journal, stop_on_sigterm() as is_stopping:
        facts = journal.fact("plan")
        if facts is None or journal.fact("state") == PREDICTING:
            raise ValueError(f"{output} is not predicted yet; run `seg3d predict` to the end first")
        new = dict(facts)
        if score_threshold is not None:
            kept = _kept_threshold(facts["predictor"])
            if kept is not None and score_threshold < kept:
                raise ValueError(
                    f"score_threshold is {score_threshold}, but instances below {kept} were not kept when {output} was "
                    f"predicted; give at least {kept}, or predict again with a lower one"
                )
            new["score_threshold"] = score_threshold
        if min_volume is not None:
            new["min_volume"] = min_volume
        paths = OutputPaths.of(Path(output), facts["output"]["table"], facts["output"]["label_tiff"])
        if new != facts:
            journal.change_thresholds(new)
        times = facts["times"] or [0]
        volumes: list[Any] = [None] * len(times)
        if facts["output"]["copy_image"]:
            volumes = [open_volume(paths.output, time=place) for place in range(len(times))]
        plan = BlockPlan.make(
            shape=facts["shape"][1:],
            block_size=facts["block_size"],
            halo=facts["halo"],
            roi=facts["roi"],
            times=len(times),
        )
        make_worker = partial(BlockWorker, plan, volumes, [no_predictor] * len(times), new["score_threshold"])
        with closing(start_workers(make_worker, num_workers, None, 0)) as workers:
            run = Run(
                plan=plan,
                journal=journal,
                workers=workers,
                min_score=new["score_threshold"],
                min_volume=new["min_volume"],
                progress=progress,
                is_stopping=is_stopping,
            )
            run.link()
            num_objects = publish(run, paths, new)
            holes = tuple(journal.unreadable().values())
    return Prediction(paths.output, paths.tables, paths.journal, len(plan), 0, num_objects, holes=holes)


def _kept_threshold(identity: dict[str, Any]) -> float | None:
    """The score below which a predictor, or one that it wraps, keeps nothing."""
    found = [identity.get("score_threshold")]
    found += [_kept_threshold(value) for value in identity.values() if isinstance(value, dict)]
    return max((float(value) for value in found if value is not None), default=None)
