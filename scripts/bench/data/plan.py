"""`seg3d plan` on a data set: its time, and a training with its plan against one with settings made by hand.

Each is a fresh process of the command line, as users run it. Plan and training take the same split, that of the data's
overlay; the two trainings take turns of equal minutes and are judged on the volumes that are held back.
"""

import csv
import json
import time
from pathlib import Path
from typing import Any

from bench.data.bars import Row
from bench.data.command import command_line
from bench.data.options import Options
from seg3d_monai.data import CropIndex, dataset_or_sample, index_for
from seg3d_monai.data.synthetic import write_specimen

BUNDLES = Path(__file__).resolve().parents[3] / "bundles"
TRAINED, CROP_SIZE, VAL_FRACTION = "maskrcnn3d", (32, 96, 96), 0.2
METHOD = (
    "Plan: `seg3d plan` for all bundles in a fresh process, imports included, on an index that is there. Its plan "
    f"against settings by hand, where minutes are given: {TRAINED} trained for as long with either, F1 at IoU 0.5, SEG "
    "and mAP on the volumes held back."
)


def measure(options: Options) -> list[Row]:
    """One row: seconds of the plan, and metrics of each training where they are asked for."""
    folder = options.folder / "plan"
    folder.mkdir()
    dataset = data_of(options, folder)
    keys = overlay_keys(options.hand_overlays)
    split = {key: value for key, value in keys.items() if key.startswith("index#")}
    index = index_of(dataset, folder / "crops.sqlite", split)
    start = time.perf_counter()
    words = ["--bundle", TRAINED] if options.is_quick else []
    command_line(["plan", str(index.path), "--output", str(folder / "plan"), *words], options.threads)
    row: Row = {
        "data": "built-in specimen" if options.dataset_dir is None else options.dataset_dir.name,
        "num_volumes": len(index.volumes(split="train")),
        "num_objects": sum(volume.num_instances for volume in index.volumes(split="train")),
        "bundles": 1 if options.is_quick else len(list((folder / "plan").glob("*_train.json"))),
        "plan_s": time.perf_counter() - start,
        "plan": json.loads((folder / "plan" / f"{TRAINED}_train.json").read_text(encoding="utf-8")),
        "minutes": options.plan_minutes,
    }
    if options.plan_minutes:
        (folder / "split.json").write_text(json.dumps(split), encoding="utf-8")
        overlays = {
            "hand": list(options.hand_overlays),
            "planned": [str(folder / "split.json"), str(folder / "plan" / f"{TRAINED}_train.json")],
        }
        for name, chosen in overlays.items():
            row[name] = trained(dataset, folder / name, chosen, options)
        row["planned_over_hand"] = row["planned"]["f1"] / row["hand"]["f1"] if row["hand"]["f1"] else None
    return [row]


def data_of(options: Options, folder: Path) -> Path:
    """The user's data, or a specimen."""
    if options.dataset_dir is not None:
        return options.dataset_dir.absolute()
    if options.is_quick:
        shape = (16, 48, 48)
        return write_specimen(
            folder / "sample", train_volumes=2, train_shape=shape, val_shape=shape, test_volumes=0, test_shape=shape
        )
    return dataset_or_sample("", sample_dir=folder / "sample")


def overlay_keys(names: tuple[str, ...]) -> dict[str, Any]:
    """What overlays of the bundle set; later ones win."""
    keys: dict[str, Any] = {}
    for name in names:
        file = BUNDLES / TRAINED / "configs" / "overlays" / f"{name}.json"
        keys |= json.loads(file.read_text(encoding="utf-8"))
    return keys


def index_of(dataset: Path, db: Path, split: dict[str, Any]) -> CropIndex:
    """The index that a training would make."""
    arguments = {key.removeprefix("index#"): value for key, value in split.items()}
    fraction = {} if arguments.get("val_specimens") else {"val_fraction": VAL_FRACTION}
    return index_for(dataset, db, crop_size=CROP_SIZE, progress=False, **fraction, **arguments)


def trained(dataset: Path, run: Path, overlays: list[str], options: Options) -> Row:
    """Train, and say what came of it."""
    words = ["--dataset_dir", str(dataset), "--output_dir", str(run), "--max_minutes", str(options.plan_minutes)]
    overlay = ["--overlay", ",".join(overlays)] if overlays else []
    command_line(["train", TRAINED, *overlay, *words, "--val_interval", "1000"], options.threads)
    metrics = json.loads((run / "metrics.json").read_text(encoding="utf-8"))
    log = run / "train.csv"  # a line for every tenth step
    lines = list(csv.DictReader(log.read_text(encoding="utf-8").splitlines())) if log.exists() else []
    at_half = metrics["thresholds"]["0.5"]
    return {
        "steps": max((int(line["iteration"]) for line in lines), default=0),
        "f1": at_half["f1"],
        "precision": at_half["precision"],
        "recall": at_half["recall"],
        "seg": metrics["seg"],
        "map": metrics["map"],
    }
