"""The trainings of a comparison: each a command that users run, gone on with where it was stopped."""

import json
from pathlib import Path
from typing import Any

from monai.bundle import ConfigParser

from peers import ours
from peers.exchange import Request
from peers.processes import run as run_process
from peers.race import Row, answer_of
from seg3d_monai.cli_bundle import find_bundle, overlay_files
from starts.options import Options

SAMPLES_PER_EPOCH, QUICK_SAMPLES = 200, 4
UNLIMITED = 10**6
"""Minutes: steps end these trainings."""
PRETRAINING = "pretrain3d"


class Trainings:
    """The trainings in the folder of a comparison.

    Args:
        options: how to compare.
    """

    def __init__(self, options: Options) -> None:
        self.options = options
        bundle = find_bundle(options.bundle)
        parser = ConfigParser()
        parser.read_config([str(bundle / "configs" / "train.json"), *overlay_files(bundle, ",".join(options.overlays))])
        self.config = parser
        self.crop_size = ours.QUICK["crop_size"] if options.is_quick else parser["crop_size"]

    def start(self, name: str) -> dict[str, str]:
        """What a training on labels is given to start from; it is trained where it is not there yet."""
        if name == "scratch":
            return {}
        if name == "masked":
            return {"backbone_weights": str(self._masked() / "model.pt")}
        backbone = self.start("masked") if name == "both" else {}
        return {"initial_weights": str(self._synthetic(f"before_{name}", backbone) / "model.pt")}

    def tuned(self, name: str, seed: int) -> Row:
        """A training on labels from that start, judged state by state."""
        options, folder = self.options, self.options.folder / "runs" / f"{name}_{seed}"
        folder.mkdir(parents=True, exist_ok=True)
        manifest = options.folder / "labelled.json"
        settings = {"bundle": options.bundle, "overlays": list(options.overlays), "tune": False}
        request = Request(
            folder=str(folder),
            volumes=str(options.folder / "volumes"),
            train=[],
            tune=[],
            val=[path.stem for path in sorted((options.folder / "volumes").glob("*.npz"))],
            minutes=0,
            seed=seed,
            threads=options.threads,
            is_quick=options.is_quick,
            settings=settings | {"manifest": str(manifest)},
        )
        request.write()
        keys = {**ours.changes(request), **self.start(name), "seed": seed, "snapshot_steps": options.curve_steps}
        keys[ours.keep_of_snapshots(options.bundle)] = ours.ALL_SNAPSHOTS
        self._train(options.bundle, options.overlays, manifest, folder / "run", options.steps, keys)
        run_process(["-m", "peers.ours", str(request.path)], threads=options.threads, log=folder / "log.txt")
        return {"start": name, "seed": seed, **answer_of(request)}

    def _masked(self) -> Path:
        keys: dict[str, Any] = {"crop_size": self.crop_size, "backbone": self.config["backbone"]}
        if "image_power" in self.config["network_def"]:
            keys["network_def#image_power"] = self.config["network_def#image_power"]
        if self.options.is_quick:
            keys["backbone#width"] = ours.QUICK["backbone#width"]
        manifest = self.options.folder / "unlabelled.json"
        return self._train(PRETRAINING, (), manifest, self.options.folder / "masked", self.options.pretrain_steps, keys)

    def _synthetic(self, folder: str, start: dict[str, str]) -> Path:
        options = self.options
        overlays = [name for name in options.overlays if not Path(name).name.startswith("data_")]
        quick = ours.QUICK if options.is_quick else {}
        keys = {**quick, **start, "crop_size": self.crop_size, "train#dataset#recipe": options.recipe}
        manifest = options.folder / "labelled.json"  # to be judged on; nothing of it is learned
        return self._train(
            options.bundle,
            (*overlays, "data_synthetic"),
            manifest,
            options.folder / folder,
            options.pretrain_steps,
            keys,
        )

    def _train(
        self, bundle: str, overlays: tuple[str, ...], manifest: Path, run: Path, steps: int, keys: dict[str, Any]
    ) -> Path:
        """`seg3d train`, unless this very training has come to its end."""
        samples = QUICK_SAMPLES if self.options.is_quick else SAMPLES_PER_EPOCH
        epochs = max(1, round(steps * self.config["batch_size"] / samples))
        limits = {"max_minutes": UNLIMITED, "train#trainer#max_epochs": epochs, "val_interval": UNLIMITED}
        words = [bundle, "--dataset_dir", str(manifest), "--output_dir", str(run)]
        words += ["--overlay", ",".join(overlays)] if overlays else []
        keys = {"device": "cpu", "seed": self.options.seeds[0], "train#dataset#num_samples": samples} | limits | keys
        words += ours.flags(keys)
        done = run.with_name(f"{run.name}.done.json")
        if done.exists() and json.loads(done.read_text(encoding="utf-8")) == words:
            return run
        run.parent.mkdir(parents=True, exist_ok=True)
        log = run.with_name(f"{run.name}.log")
        words_of_run = ["-m", "seg3d_monai", "train", *words, "--resume", "true"]
        run_process(words_of_run, threads=self.options.threads, log=log)
        done.write_text(json.dumps(words), encoding="utf-8")
        return run
