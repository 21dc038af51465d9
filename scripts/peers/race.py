"""The race itself: every contestant in processes of its own, judged by the same metrics on the same volumes.

A finished result is kept in the folder and taken from there when the race is run again, and our own training goes on
where it was stopped, its clock included.
"""

import json
import shutil
import statistics
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from peers import ours
from peers.exchange import Request, read_volume
from peers.options import CONTESTANTS, UNTRAINED, Options
from peers.processes import run as run_process
from peers.volumes import Division, write_race
from seg3d_monai.metrics import InstanceMetrics

Row = dict[str, Any]
SCORES = ("f1_50", "f1_70", "seg", "mucov", "map", "precision", "recall")
METHOD = (
    "Every contestant trains on the same volumes for as many minutes of its training loop, on as many processors; its "
    "start, validation, tuning and prediction do not count. Thresholds are tuned on specimens that are held back from "
    "training unless it is said otherwise, and all is judged on others, which serve nothing else. "
    "ours: `seg3d train` with its overlays, then `seg3d tune`. unet: MONAI's DynUNet with foreground and distance, "
    "bf16 where the processor computes in it, averaged weights, a seeded watershed tuned by grid. stardist: its own 3D "
    "example, float32, `optimize_thresholds`. otsu: Otsu's threshold and a distance watershed, untuned. "
    "Counts are pooled over volumes; F1, precision and recall at IoU 0.5 (F1@0.7: at 0.7). Mvoxel/s: median over the "
    "volumes, from raw voxels to labels, warm."
)


def race(options: Options, division: Division, chosen: Sequence[str], stardist: Path | None) -> Iterator[Row]:
    """A row for each contestant and seed; one that fails has an "error" instead of scores.

    Args:
        options: how to race.
        division: who is for what.
        chosen: contestants.
        stardist: interpreter of StarDist's environment, where it is chosen.

    Raises:
        ValueError: a kept result is of another race.
    """
    runs = [(name, seed) for seed in options.seeds for name in CONTESTANTS if name in chosen and name not in UNTRAINED]
    runs += [(name, options.seeds[0]) for name in UNTRAINED if name in chosen]
    (options.folder / "results").mkdir(exist_ok=True)
    is_written = False
    for name, seed in runs:
        file = options.folder / "results" / f"{name}_{seed}.json"
        race_of = description(options, division, name)
        row = None if options.restart else kept(file, race_of)
        if row is None:
            if not is_written:
                write_race(division, options.folder)
                is_written = True
            row = result_of(request_for(options, division, name, seed), name, stardist)
            if "error" not in row:
                file.write_text(json.dumps({"race": race_of, "row": row}, indent=1) + "\n", encoding="utf-8")
        yield row


def description(options: Options, division: Division, name: str) -> dict[str, Any]:
    """What a result depends on beside its seed, as JSON gives it back."""
    own = {"bundle": options.bundle, "overlays": list(options.overlays), "tune": options.tune} if name == "ours" else {}
    return {
        "dataset": str(options.dataset_dir),
        **{part: [row.name for row in getattr(division, part)] for part in ("train", "tune", "val")},
        "minutes": None if name in UNTRAINED else options.minutes,
        "threads": options.threads,
        "is_quick": options.is_quick,
        **own,
    }


def kept(file: Path, race_of: Mapping[str, Any]) -> Row | None:
    """A finished result, None where there is none.

    Raises:
        ValueError: it is of another race.
    """
    if not file.exists():
        return None
    found = json.loads(file.read_text(encoding="utf-8"))
    different = sorted(key for key in race_of if found["race"].get(key) != race_of[key])
    if different:
        raise ValueError(
            f"{file} is of another race ({', '.join(different)} differ); give --restart, or another --folder"
        )
    return found["row"]


def request_for(options: Options, division: Division, name: str, seed: int) -> Request:
    """What a contestant is told, in a fresh folder, or in that of a training of ours that was stopped."""
    folder = options.folder / "runs" / f"{name}_{seed}"
    settings = {}
    if name == "ours":
        manifest = str(options.folder / "manifest.json")
        settings = {"bundle": options.bundle, "overlays": list(options.overlays), "tune": options.tune}
        settings |= {"manifest": manifest, "curve_steps": options.curve_steps}
    request = Request(
        folder=str(folder),
        volumes=str(options.folder / "volumes"),
        **{part: [row.name for row in getattr(division, part)] for part in ("train", "tune", "val")},
        minutes=options.minutes,
        seed=seed,
        threads=options.threads,
        is_quick=options.is_quick,
        settings=settings,
    )
    if options.restart or not (name == "ours" and ours.is_begun(request)):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    return request


def result_of(request: Request, name: str, stardist: Path | None) -> Row:
    """Run a contestant and judge it."""
    folder, begun = Path(request.folder), time.perf_counter()
    log, words = folder / "log.txt", [str(request.write())]
    seed = None if name in UNTRAINED else request.seed
    row: Row = {"contestant": name, "seed": seed, "minutes": None if name in UNTRAINED else request.minutes}
    tuning: Row = {}
    try:
        if name == "ours":
            tuning["tune_s"] = ours.train_and_tune(request, log)
        python = stardist if name == "stardist" else None
        module = "stardist_run" if name == "stardist" else name
        run_process(["-m", f"peers.{module}", *words], threads=request.threads, log=log, python=python)
    except RuntimeError as error:
        print(f"{name}, seed {request.seed}: {error}", file=sys.stderr, flush=True)
        return {**row, "error": str(error)}
    return {**row, **tuning, **answer_of(request), "whole_s": time.perf_counter() - begun}


def answer_of(request: Request) -> Row:
    """What a contestant answered, judged, with its speed; a curve is judged state by state."""
    answer: Row = json.loads((Path(request.folder) / "answer.json").read_text(encoding="utf-8"))
    speeds = [one["voxels"] / one["seconds"] / 1e6 for one in answer["predicted"]]
    row = {**answer, **judged(request), "mvoxel_per_s": statistics.median(speeds)}
    if "curve" in answer:
        states = [(state, Path(request.folder) / state.pop("labels")) for state in answer["curve"]]
        row["curve"] = [{**state, **judged(request, labels)} for state, labels in states]
    return row


def judged(request: Request, labels: Path | None = None) -> Row:
    """The scores of the labels that a contestant left, or of others in a folder, by the package's metrics."""
    labels = Path(request.folder) / "labels" if labels is None else labels
    metrics = InstanceMetrics()
    for name in request.val:
        truth = read_volume(Path(request.volumes), name).labels
        metrics.update(truth, np.load(labels / f"{name}.npy"))
    found = metrics.compute()
    at_half = found["thresholds"]["0.5"]
    return {
        "f1_50": at_half["f1"],
        "f1_70": found["thresholds"]["0.7"]["f1"],
        **{name: found[name] for name in ("seg", "mucov", "map", "num_volumes", "num_truth", "num_predicted")},
        **{name: at_half[name] for name in ("precision", "recall", "tp", "fp", "fn")},
    }


def summary(rows: Sequence[Row]) -> list[Row]:
    """Mean and standard deviation over seeds of each score, of the contestants with several results."""
    found = []
    for name in CONTESTANTS:
        own = [row for row in rows if row["contestant"] == name and "error" not in row]
        if len(own) > 1:
            values = {score: [row[score] for row in own] for score in SCORES}
            means = {score: {"mean": statistics.mean(v), "sd": statistics.stdev(v)} for score, v in values.items()}
            found.append({"contestant": name, "num_seeds": len(own), **means})
    return found
