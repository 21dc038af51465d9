"""What annotating suggested regions gains: `seg3d annotate` and a short training, against regions drawn at random.

Labels of most training volumes are hidden. A network is trained on the few that are left; regions of the others are
suggested, the annotator is simulated (the hidden labels, cut to the regions), they are imported, and training goes on
from the same weights for some minutes. The baselines go on as long with as many regions drawn at random, and with
nothing new. All are judged on specimens that are held back and never trained on, suggested or looked at.
"""

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import tifffile
from numpy.typing import NDArray

from bench.data.annotate_options import AnnotateOptions
from bench.data.bars import Row
from bench.data.command import command_line
from bench.data.options import Options
from seg3d_monai.annotation.corrected import IGNORE
from seg3d_monai.annotation.task import read_task
from seg3d_monai.data import ManifestRow, read_manifest, write_manifest
from seg3d_monai.data.synthetic import write_specimen
from seg3d_monai.data.targets import compact_labels
from seg3d_monai.inference.blocks import roi_slices

TRAINED = "maskrcnn3d"
ARMS = ("suggested", "random", "nothing new")
QUICK_SIZES = {
    "crop_size": [16, 32, 40],
    "backbone#width": 8,
    "network_def#fpn_channels": 8,
    "network_def#box_hidden": 16,
    "network_def#mask_channels": 8,
}
QUICK = {"start_minutes": 0.03, "annotate_minutes": 0.03, "num_regions": 2, "candidates": 8}
METHOD = (
    f"Annotate: {TRAINED} trained on the volumes of a few specimens, then as long as is said from these weights, with "
    "regions that `seg3d annotate suggest` chose among the others, with as many drawn at random, and with nothing new; "
    "the annotator is the hidden labels. F1 at IoU 0.5 and 0.7, SEG and mAP on the specimens held back."
)


def measure(options: Options) -> list[Row]:
    """A row for the start, and one for each way to go on and each seed."""
    folder = options.folder / "annotate"
    folder.mkdir()
    if options.is_quick:
        options = replace(options, annotate=replace(options.annotate, **QUICK))
    truth = {row.name: row for row in divided(options, folder)}
    start_rows = hidden(list(truth.values()), options.annotate)
    write_manifest(folder / "start.json", start_rows)
    common = {"manifest": folder / "start.json", "num_labelled": sum(is_seen(row) for row in start_rows)}
    begun = train(folder / "start.json", folder / "start", options.annotate.start_minutes, options)
    rows: list[Row] = [{"arm": "start", "seed": None, "minutes": options.annotate.start_minutes, **common, **begun}]
    for seed in range(options.annotate.seed, options.annotate.seed + options.annotate.repeats):
        for arm in ARMS:
            rows.append({"arm": arm, "seed": seed, **common, **go_on(arm, seed, folder, truth, options)})
            print(f"{arm}, seed {seed}: F1@0.5 {rows[-1]['f1_50']:.3f}", file=sys.stderr, flush=True)
    for row in rows:
        del row["manifest"]
    return rows


def go_on(arm: str, seed: int, folder: Path, truth: dict[str, ManifestRow], options: Options) -> Row:
    """Annotate as the arm says, train on, and say what came of it."""
    run = folder / f"{arm.replace(' ', '_')}_{seed}"
    manifest, facts = folder / "start.json", {"num_regions": 0, "num_objects": 0, "num_specimens": 0}
    if arm != "nothing new":
        regions = run.with_name(f"{run.name}_regions")
        strategy = "random" if arm == "random" else "model"
        start = time.perf_counter()
        suggest(folder / "start", regions, strategy, seed, options)
        facts["suggest_s"] = time.perf_counter() - start
        facts["num_objects"] = annotate(regions, truth)
        task = read_task(regions)
        facts["num_regions"] = len(task.regions)
        facts["num_specimens"] = len({task.specimens[region.volume] for region in task.regions})
        start = time.perf_counter()
        new = regions / "manifest.json"
        command_line(
            [
                "annotate",
                "import",
                str(regions),
                str(manifest),
                "--output",
                str(new),
                "--allow_empty",
                "--accept_unchanged",
            ],
            options.threads,
        )
        facts["import_s"] = time.perf_counter() - start
        manifest = new
    minutes = options.annotate.annotate_minutes
    return {"minutes": minutes, **facts, **train(manifest, run, minutes, options, seed, folder / "start" / "model.pt")}


def divided(options: Options, folder: Path) -> list[ManifestRow]:
    """The data's volumes with their splits: those of the manifest, else the named specimens are for validation."""
    if options.dataset_dir is None:
        shape = (24, 64, 64) if options.is_quick else (48, 128, 128)
        dataset = write_specimen(
            folder / "sample", train_volumes=6, train_shape=shape, val_volumes=2, val_shape=shape, test_volumes=0
        )
    else:
        dataset = options.dataset_dir.absolute()
    rows = read_manifest(dataset, specimen_pattern=options.annotate.specimen_pattern).rows
    if any(row.split is not None for row in rows):
        return [row for row in rows if row.label is not None]
    held_back = set(options.annotate.val_specimens)
    unknown = held_back - {row.specimen for row in rows}
    if unknown or not held_back:
        raise ValueError(f"--val_specimens {sorted(unknown)}: choose among {sorted({row.specimen for row in rows})}")
    return [
        replace(row, split="val" if row.specimen in held_back else "train") for row in rows if row.label is not None
    ]


def is_seen(row: ManifestRow) -> bool:
    """Whether a volume is trained on with its labels."""
    return row.split == "train" and row.label is not None


def hidden(rows: Sequence[ManifestRow], options: AnnotateOptions) -> list[ManifestRow]:
    """The rows without the labels of all training volumes but a few of a few specimens, which are drawn."""
    names: dict[str | None, list[str]] = {}
    for row in rows:
        if row.split == "train":
            names.setdefault(row.specimen, []).append(row.name)
    if not options.start_specimens < len(names):
        raise ValueError(f"--start_specimens {options.start_specimens}: choose 1 to {len(names) - 1} of {len(names)}")
    draw = np.random.default_rng([options.seed, 5])
    specimens = sorted(names, key=str)
    chosen = [specimens[i] for i in draw.permutation(len(specimens))[: options.start_specimens]]
    kept = {
        names[specimen][i]
        for specimen in chosen
        for i in draw.permutation(len(names[specimen]))[: options.start_volumes or None]
    }
    return [row if row.split != "train" or row.name in kept else replace(row, label=None, classes=0) for row in rows]


def suggest(start: Path, regions: Path, strategy: str, seed: int, options: Options) -> None:
    """`seg3d annotate suggest` with the weights that training started with."""
    words = ["annotate", "suggest", str(start / "crops.sqlite"), "--bundle", TRAINED]
    words += ["--checkpoint", str(start / "model.pt"), "--output", str(regions), "--strategy", strategy]
    words += ["--num", str(options.annotate.num_regions), "--candidates", str(options.annotate.candidates)]
    words += ["--seed", str(seed)]
    if options.annotate.predict_overlays:
        words += ["--overlay", ",".join(options.annotate.predict_overlays)]
    sizes = {key: value for key, value in QUICK_SIZES.items() if key != "crop_size"} if options.is_quick else {}
    command_line(words + flags(sizes), options.threads)


def annotate(regions: Path, truth: dict[str, ManifestRow]) -> int:
    """Save the true labels over those to correct; how many objects have a voxel in a region."""
    count = 0
    for region in read_task(regions).regions:
        label = truth[region.volume].open_label()
        codes, _ = compact_labels(label.read(region.window)[0], ignore=int(np.iinfo(label.dtype).max))
        labels: NDArray[np.uint32] = np.where(codes < 0, IGNORE, codes).astype(np.uint32)
        tifffile.imwrite(regions / region.folder / "labels.tif", labels, metadata={"axes": "ZYX"})
        inside = codes[roi_slices(region.roi, region.window[:3])]
        count += len(np.unique(inside[inside > 0]))
    return count


def train(
    manifest: Path, run: Path, minutes: float, options: Options, seed: int = 0, weights: Path | None = None
) -> Row:
    """Train for so many minutes, and say how good the weights are on what is held back."""
    keys: dict[str, Any] = {"max_minutes": minutes, "val_interval": 1000, "seed": seed}
    # The manifest has the splits; an overlay of the data may ask for them again.
    keys |= {"index#val_specimens": [], "index#test_specimens": []}
    keys |= QUICK_SIZES if options.is_quick else {}
    words = ["train", TRAINED, "--dataset_dir", str(manifest), "--output_dir", str(run)]
    if options.annotate.train_overlays:
        words += ["--overlay", ",".join(options.annotate.train_overlays)]
    if weights is not None:
        words += ["--initial_weights", str(weights)]
    command_line(words + flags(keys), options.threads)
    found = json.loads((run / "metrics.json").read_text(encoding="utf-8"))
    at_half = found["thresholds"]["0.5"]
    scores = {"f1_50": at_half["f1"], "f1_70": found["thresholds"]["0.7"]["f1"]}
    return {**scores, **{name: at_half[name] for name in ("tp", "fp", "fn")}, "seg": found["seg"], "map": found["map"]}


def flags(keys: dict[str, Any]) -> list[str]:
    """Keys of a configuration as words of the command line."""
    return [word for key, value in keys.items() for word in (f"--{key}", json.dumps(value))]
