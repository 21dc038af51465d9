"""The stress of one ratio: data, plan, training, predictions and scores, each by the command that users run.

What is done is kept in the folder and not done again: volumes, plan, a training that ended or its last checkpoint,
predictions, and at last the rows.
"""

import json
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from bench.models.training import QUICK, QUICK_NETWORK
from bench.stress.bars import Row, caps_in
from bench.stress.options import Options, claimed, description, write_json
from bench.stress.volumes import StressVolume, spacing_of, write_tests, write_training
from peers.ours import NO_VALIDATION, flags, trained_steps
from peers.processes import run as run_process
from seg3d_monai.cli_bundle import find_bundle
from seg3d_monai.data import read_manifest
from seg3d_monai.inference.blocks import BlockPlan
from seg3d_monai.planning.bundle_config import INFERENCE, OF_TRAINING, BundleConfig

WAYS = ("whole", "blocks")
NO_CLOCK = 10**6
"""Minutes of a training whose end is its last step."""
PLANNED = ("crop_size", "batch_size", "block_size", "halo", "network_def#max_detections", "num_queries")
METHOD = (
    "For each ratio of a voxel's depth to its width (0.7 um): `seg3d index`, `plan`, and `train` with the plan for as "
    "many steps as is said, on sparse, crowded and packed synthetic nuclei together; then `predict` and `evaluate` on "
    "others, each volume as one block (whole) and in blocks, of the plan or of a crop. Nothing is tuned. labelled: "
    "share of the voxels; touching: objects that have a face in common with another one; cut: those that reach the "
    "volume's border; planes: z extent of the median object; caps: what a log says to raise."
)


def stress(options: Options) -> Iterator[Row]:
    """For each ratio {"training": row, "volumes": rows}; a training that fails has an "error", and no volumes.

    Raises:
        ValueError: the folder holds a stress of other settings.
    """
    for ratio in options.ratios:
        file = options.folder / f"ratio_{ratio:g}" / "stress.json"
        settings = description(options, ratio)
        result = claimed(file, settings, options.restart)
        if result is None:
            try:
                result = measure(options, ratio, file.parent)
            except RuntimeError as error:
                print(f"{ratio:g}:1: {error}", file=sys.stderr, flush=True)
                yield {"training": {"ratio": ratio, "error": str(error)}, "volumes": []}
                continue
            write_json(file, {"settings": settings, "result": result})
        yield result


def measure(options: Options, ratio: float, folder: Path) -> Row:
    """Train and predict in a folder.

    Raises:
        RuntimeError: a command failed; with the end of what it said.
    """
    (folder / "logs").mkdir(exist_ok=True)
    manifest = write_training(folder / "training", ratio, options.seed, options.is_quick)
    tests = list(write_tests(folder / "tests", ratio, options.seed, options.is_quick))
    config = planned(options, folder, manifest)
    training = {"ratio": ratio, "spacing_um": list(spacing_of(ratio)), **trained(options, folder, manifest, config)}
    overlays = inference_overlays(options, folder, config)
    rows = []
    for volume in tests:
        truth = volume.described()
        for way in WAYS:
            found = predicted(options, folder, volume, way, overlays, config)
            rows.append({"ratio": ratio, "volume": volume.name, "way": way, **truth, **found})
    return {"training": training, "volumes": rows}


def planned(options: Options, folder: Path, manifest: Path) -> BundleConfig:
    """Index and plan; the bundle's configurations with overlays and plan over them."""
    config = BundleConfig(find_bundle(options.bundle), options.overlay_paths)
    overlay = folder / "plan" / f"{config.name}_train.json"
    if not overlay.with_name(f"{config.name}_inference.json").exists():  # the last that is written
        crops = str(folder / "crops.sqlite")
        command(options, folder, "index", [str(manifest), crops, "--num_workers", "1"])
        words = [crops, "--bundle", options.bundle, "--output", str(overlay.parent), "--restart"]
        words += ["--overlay", ",".join(options.overlay_paths)] if options.overlays else []
        words += flags(QUICK | QUICK_NETWORK.get(config.name, {})) if options.is_quick else []
        command(options, folder, "plan", words)
    return BundleConfig(find_bundle(options.bundle), [*options.overlay_paths, str(overlay)])


def trained(options: Options, folder: Path, manifest: Path, config: BundleConfig) -> Row:
    """Train, or go on with it, to the last step."""
    run = folder / "run"
    num_samples = options.steps * config.get("batch_size") * config.get("train#trainer#accumulation_steps")
    if not (run / "metrics.json").exists():  # the last that is written
        overlays = [*options.overlay_paths, str(folder / "plan" / f"{config.name}_train.json")]
        keys = {"dataset_dir": str(manifest), "output_dir": str(run), "device": "cpu", "seed": options.seed}
        keys |= {"train#trainer#max_epochs": 1, "train#dataset#num_samples": num_samples, "max_minutes": NO_CLOCK}
        keys |= {"val_interval": NO_VALIDATION, "resume": "True"}
        command(options, folder, "train", [options.bundle, "--overlay", ",".join(overlays), *flags(keys)])
    train_s = trained_steps(run)["train_s"]
    objects = [row.attributes["nuclei"] for row in read_manifest(manifest).rows if row.split == "train"]
    return {
        "num_volumes": len(objects),
        "num_objects": sum(map(int, objects)),
        "steps": options.steps,
        "step_s": None if train_s is None else train_s / options.steps,
        "settings": {key: config.get(key) for key in PLANNED if config.takes(key)},
        "caps": caps_in(log_of(folder, "train").read_text(encoding="utf-8", errors="replace")),
    }


def inference_overlays(options: Options, folder: Path, config: BundleConfig) -> list[str]:
    """Overlays of the prediction: of the training's the keys that it has, then the plan's."""
    keys: Row = {}
    for path in options.overlay_paths:
        keys |= json.loads(Path(path).read_text(encoding="utf-8"))
    kept = {key: value for key, value in keys.items() if config.takes(key, INFERENCE) and key not in OF_TRAINING}
    write_json(folder / "inference.json", kept)
    return [str(folder / "inference.json"), str(folder / "plan" / f"{config.name}_inference.json")]


def predicted(
    options: Options, folder: Path, volume: StressVolume, way: str, overlays: Sequence[str], config: BundleConfig
) -> Row:
    """Predict a volume, in one block or in those of the plan, and compare it with its truth."""
    name = f"{volume.name}_{way}"
    output, scores = folder / "predicted" / f"{name}.zarr", folder / "predicted" / f"{name}.json"
    output.parent.mkdir(exist_ok=True)
    block = [max(volume.shape)] * 3 if way == "whole" else config.get("block_size")
    if way == "blocks" and all(own >= size for own, size in zip(block, volume.shape, strict=True)):
        block = config.get("crop_size")  # else nothing would be divided
    if not scores.exists():
        words = [str(volume.image), str(output), "--bundle", options.bundle, "--overlay", ",".join(overlays)]
        words += ["--checkpoint", str(folder / "run" / "model.pt"), *flags({"block_size": block, "device": "cpu"})]
        command(options, folder, "predict", [*words, "--restart"], name)
        command(options, folder, "evaluate", [str(volume.label), str(output), "--json", str(scores)], name)
    found = json.loads(scores.read_text(encoding="utf-8"))
    at_half = found["thresholds"]["0.5"]
    return {
        "num_blocks": len(BlockPlan.make(shape=volume.shape, block_size=block, halo=config.get("halo"))),
        "num_predicted": found["num_predicted"],
        "f1_50": at_half["f1"],
        "f1_70": found["thresholds"]["0.7"]["f1"],
        **{score: at_half[score] for score in ("precision", "recall", "tp", "fp", "fn")},
        **{score: found[score] for score in ("seg", "map")},
        "caps": caps_in(log_of(folder, f"predict_{name}").read_text(encoding="utf-8", errors="replace")),
    }


def command(options: Options, folder: Path, name: str, words: Sequence[str], of: str = "") -> None:
    """Run a command of `seg3d`; what it says is added to its log."""
    start = time.perf_counter()
    log = log_of(folder, f"{name}_{of}" if of else name)
    run_process(["-m", "seg3d_monai", name, *words], threads=options.threads, log=log)
    # What goes on is said on stderr; stdout holds the report alone.
    took = f"{time.perf_counter() - start:.1f} s"
    print(f"{folder.name}: {log.stem} took {took}", file=sys.stderr, flush=True)


def log_of(folder: Path, name: str) -> Path:
    """Where a command's output is."""
    return folder / "logs" / f"{name}.txt"
