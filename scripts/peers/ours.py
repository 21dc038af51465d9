"""This package in the race: `seg3d train`, `seg3d tune`, then prediction by the bundle's own predictor.

Training and tuning are the commands that users run. Run as `python -m peers.ours REQUEST`, it trains nothing: it
predicts with what they left.
"""

import csv
import json
import time
from pathlib import Path
from typing import Any

import torch
from monai.bundle import ConfigParser

from peers.exchange import Array, Request, Spacing, predict_all, write_answer
from peers.processes import run as run_process
from seg3d_monai.cli_bundle import find_bundle, overlay_files
from seg3d_monai.data import ArrayVolume
from seg3d_monai.engine import load_weights
from seg3d_monai.engine.checkpoint import read_checkpoint, read_last
from seg3d_monai.inference import predict_labels

# The manifest has the splits; an overlay of the data may ask for them again.
OWN_SPLITS: dict[str, Any] = {"index#val_specimens": [], "index#test_specimens": []}
NO_VALIDATION = 10**6
"""Epochs between validations: there is one, when the minutes are over."""
ALL_SNAPSHOTS = 10**6
QUICK: dict[str, Any] = {
    "crop_size": [16, 32, 40],
    "backbone#width": 8,
    "network_def#fpn_channels": 8,
    "network_def#box_hidden": 16,
    "network_def#mask_channels": 8,
    "train#dataset#num_samples": 4,
}


def train_and_tune(request: Request, log: Path) -> float | None:
    """Leave a trained run, and the overlay of its thresholds, in the request's folder.

    Returns:
        Seconds of the tuning, start included; None without.
    """
    settings, run = request.settings, Path(request.folder) / "run"
    common = [settings["bundle"], "--dataset_dir", settings["manifest"], "--output_dir", str(run)]
    if settings["overlays"]:
        common += ["--overlay", ",".join(settings["overlays"])]
    common += flags(changes(request))
    trained = {"max_minutes": request.minutes, "val_interval": NO_VALIDATION, "seed": request.seed, "resume": True}
    if settings["curve_steps"]:
        trained |= {"snapshot_steps": settings["curve_steps"], keep_of_snapshots(settings["bundle"]): ALL_SNAPSHOTS}
    run_process(["-m", "seg3d_monai", "train", *common, *flags(trained)], threads=request.threads, log=log)
    if not settings["tune"]:
        return None
    # Whatever their split: they may be trained on.
    where = ["--tune_where", f"name in {tuple(request.tune)!r}"]
    start = time.perf_counter()
    tuned_file(request).unlink(missing_ok=True)  # of a race that was stopped
    words = ["-m", "seg3d_monai", "tune", *common, *where, "--out", str(tuned_file(request))]
    run_process(words, threads=request.threads, log=log)
    return time.perf_counter() - start


def is_begun(request: Request) -> bool:
    """Whether the folder holds a training of this very request, which can go on."""
    is_same = request.path.exists() and request.path.read_text(encoding="utf-8") == request.text
    return is_same and (Path(request.folder) / "run" / "last.pt").exists()


def changes(request: Request) -> dict[str, Any]:
    """What the race sets in the bundle's configuration; it is over CPU threads, also where there is a GPU."""
    return {"device": "cpu", **OWN_SPLITS, **(QUICK if request.is_quick else {})}


def flags(keys: dict[str, Any]) -> list[str]:
    """Keys of a configuration as words of the command line."""
    return [
        word
        for key, value in keys.items()
        for word in (f"--{key}", value if isinstance(value, str) else json.dumps(value))
    ]


def keep_of_snapshots(bundle: str) -> str:
    """The key that says how many snapshots a training keeps."""
    train = json.loads((find_bundle(bundle) / "configs" / "train.json").read_text(encoding="utf-8"))
    kinds = [handler["_target_"].rpartition(".")[2] for handler in train["train"]["handlers"]]
    return f"train#handlers#{kinds.index('Checkpoints')}#keep"


def tuned_file(request: Request) -> Path:
    """The overlay that `seg3d tune` writes."""
    return Path(request.folder) / "tuned.json"


def trained_steps(run: Path) -> dict[str, Any]:
    """Steps of a run, and seconds of one; None where the log, a row for ten steps, has none.

    The time is the training loop's: the last row is older than validation and report.
    """
    state = read_last(run)
    if state is None:
        raise RuntimeError(f"{run.name} holds no checkpoint: the training ended before its first step")
    steps, log = int(state["iteration"]), run / "train.csv"
    rows = list(csv.DictReader(log.read_text(encoding="utf-8").splitlines())) if log.exists() else []
    step_s = float(rows[-1]["elapsed_seconds"]) / int(rows[-1]["iteration"]) if rows else None
    return {"steps": steps, "step_s": step_s, "train_s": None if step_s is None else step_s * steps}


def read_config(request: Request) -> ConfigParser:
    """The configuration of the training, with that of evaluation, the overlays and the tuned thresholds over it."""
    bundle = find_bundle(request.settings["bundle"])
    files = [str(bundle / "configs" / "train.json"), *overlay_files(bundle, ",".join(request.settings["overlays"]))]
    files.append(str(bundle / "configs" / "evaluate.json"))
    if request.settings["tune"]:
        files.append(str(tuned_file(request)))
    parser = ConfigParser()
    parser.read_config(files)
    run = str(Path(request.folder) / "run")
    places = {"dataset_dir": request.settings["manifest"], "output_dir": run, "seed": request.seed}
    for key, value in {**places, **changes(request)}.items():
        parser[key] = value
    parser.parse(True)
    return parser


def predict(request: Request) -> dict[str, Any]:
    """Predict with the weights and thresholds of the request's folder."""
    torch.set_num_threads(request.threads)
    parser, run = read_config(request), Path(request.folder) / "run"
    network = load_weights(parser.get_parsed_content("network"), run / "model.pt").eval()
    predictor = parser.get_parsed_content("predictor")
    block_size, halo = parser["block_size"], parser["halo"]

    def labels(image: Array, spacing_um: Spacing) -> Array:
        return predict_labels(ArrayVolume(image, spacing_um), predictor, block_size, halo)[0]

    tuned = json.loads(tuned_file(request).read_text(encoding="utf-8")) if request.settings["tune"] else {}
    predicted = predict_all(request, labels)
    curve = []
    for state in sorted(run.glob("step_*.pt")):
        load_weights(network, state)
        predict_all(request, labels, state.stem)
        minutes = read_checkpoint(state)["elapsed"] / 60
        curve.append({"steps": int(state.stem.removeprefix("step_")), "minutes": minutes, "labels": state.stem})
    shown = ("crop_size", "batch_size", "learning_rate", "score_threshold", "mask_threshold", "min_voxels", "amp")
    return {
        **trained_steps(run),
        "tuned": tuned,
        "predicted": predicted,
        **({"curve": curve} if curve else {}),
        "settings": {
            **{key: parser[key] for key in shown if key in parser},
            "parameters": sum(parameter.numel() for parameter in network.parameters()),
        },
        "versions": {},
    }


if __name__ == "__main__":
    request = Request.from_arguments()
    write_answer(request, **predict(request))
