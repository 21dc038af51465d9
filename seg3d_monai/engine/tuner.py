"""From annotated volumes to an overlay of settings: the step that chooses thresholds, so that no hand does.

`Tuner` is what a bundle's tune.json runs: load the weights, measure the settings that there are, search (tune_search.py
on the counts of tune_judge.py), measure what was found, and keep the better of the two. Must not import models.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

from torch import nn

from seg3d_monai.engine.checkpoint import load_weights, replace_file
from seg3d_monai.engine.evaluator import VolumeEvaluator
from seg3d_monai.engine.objective import Objective
from seg3d_monai.engine.replicas import rank
from seg3d_monai.engine.tune_judge import DetectionJudge, network_attributes
from seg3d_monai.engine.tune_report import Tuned, tuned_text
from seg3d_monai.engine.tune_search import SCORE, Settings, search_settings
from seg3d_monai.inference.detections import InstanceSettings

__all__ = ["Tuner", "check_tune_files"]

OF_INSTANCES = tuple(field.name for field in fields(InstanceSettings))
OF_NETWORK = "network_def#"
"""Where a bundle's configuration has the network's arguments."""


def check_tune_files(checkpoint: str | Path, out: str | Path, restart: bool) -> None:
    """See, before anything is computed, that there are weights and that no overlay is written over.

    Args:
        checkpoint: file of the weights.
        out: overlay that the tuning will write.
        restart: whether an overlay that is there may be lost.

    Raises:
        FileNotFoundError: there is no checkpoint.
        FileExistsError: there is an overlay, and `restart` is not set.
        ValueError: the overlay's name does not end in .json.
    """
    if not Path(checkpoint).is_file():
        raise FileNotFoundError(f"checkpoint={str(checkpoint)!r} does not exist; train first or give another one")
    if Path(out).suffix != ".json":
        raise ValueError(f"out={str(out)!r} does not end in .json, as the name of an overlay must; give another one")
    if Path(out).exists() and not restart:
        raise FileExistsError(f"{out} exists; choose another file with --out, or write over it with --restart")


class Tuner:
    """Choose score threshold, mask threshold and the like on volumes whose objects are known.

    Writes the overlay `out`, whose keys are those of the bundle's configurations, and its report with the suffix .txt.

    Args:
        dataset: of dicts {"volume": Volume, "label": Volume, "name": str, ...}; "split" says what was trained on.
        predictor: with `settings`, `with_settings` and `detect`, as `InstancePredictor` has them.
        network: of the predictor; receives the weights.
        checkpoint: file of the weights, as `load_weights` takes it.
        out: file of the overlay.
        block_size: voxels (z, y, x) a block owns; None predicts each volume in one block.
        halo: voxels (z, y, x) read around a block.
        metric: what is best, as `Objective` takes it.
        candidates: values to try of `mask_threshold`, `min_voxels` and `min_visible`; one without values stays.
        network_candidates: the same for attributes of the network; it looks at all volumes for each value.
        least_score: the least score threshold that is looked at. The network may have one of its own.
        flips: the predictor's, to be kept in the overlay.

    Raises:
        ValueError: an unknown metric or setting, or a value out of its range.
    """

    def __init__(
        self,
        *,
        dataset: Sequence[dict[str, Any]],
        predictor: Any,
        network: nn.Module,
        checkpoint: str | Path,
        out: str | Path,
        block_size: Sequence[int] | None = None,
        halo: Sequence[int] | None = None,
        metric: str = "f1_50 + seg",
        candidates: Mapping[str, Sequence[float]],
        network_candidates: Mapping[str, Sequence[float]] | None = None,
        least_score: float = 0.05,
        flips: Sequence[str] = (),
    ) -> None:
        self.dataset, self.predictor, self.network = dataset, predictor, network
        self.checkpoint, self.out = checkpoint, Path(out)
        self.block_size, self.halo = block_size, halo
        self.objective = Objective(metric)
        self.candidates, self.network_candidates = dict(candidates), dict(network_candidates or {})
        self.least_score = least_score
        self.flips = list(flips)
        if not 0 <= least_score <= 1:
            raise ValueError(f"least_score is {least_score}; give a score in 0 to 1")
        for name, values in self.candidates.items():
            if name not in OF_INSTANCES or name == SCORE:
                known = ", ".join(known for known in OF_INSTANCES if known != SCORE)
                raise ValueError(f"candidates={dict(candidates)!r} names {name!r}; choose from {known}")
            for value in values:
                replace(predictor.settings, **{name: value})
        for name in self.network_candidates:
            if name in OF_INSTANCES or not isinstance(getattr(network, name, None), int | float):
                raise ValueError(f"network_candidates names {name!r}, which is no such setting of the network; drop it")

    def run(self) -> None:
        """Search, write the overlay and the report, and print the report.

        Raises:
            FileNotFoundError, ValueError: as `load_weights`; or the volumes hold no object.
        """
        if rank() > 0:
            return
        load_weights(self.network, self.checkpoint).eval()
        before = asdict(self.predictor.settings)
        before |= {name: getattr(self.network, name) for name in self.network_candidates}
        judge = DetectionJudge(
            dataset=self.dataset,
            predictor=self.predictor,
            network=self.network,
            network_names=tuple(self.network_candidates),
            objective=self.objective,
            block_size=self.block_size,
            halo=self.halo,
            least_score=min(self.least_score, before[SCORE]),
        )
        report_before = self._measured(before)
        found = search_settings(
            judge,
            before,
            self.network_candidates | self.candidates,
            # What it changes of each metric, about, whether one object is found.
            tolerance=len(self.objective.names) / (judge.num_truth + 1),
        )
        report_after = report_before if found == before else self._measured(found)
        is_worse = self.objective.of(report_after) < self.objective.of(report_before)
        after = before if is_worse else found
        items = [self.dataset[place] for place in range(len(self.dataset))]
        tuned = Tuned(
            objective=self.objective,
            volumes=[item["name"] for item in items],
            trained=[item["name"] for item in items if item.get("split") == "train"],
            num_truth=judge.num_truth,
            num_blocks=judge.num_blocks,
            before=self._keys(before),
            after=self._keys(after),
            report_before=report_before,
            report_after=report_before if is_worse else report_after,
            rejected=self._keys(found) if is_worse else None,
            curve=judge.curve(after),
        )
        self._write(tuned)

    def _measured(self, settings: Settings) -> dict[str, Any]:
        """The metrics of a prediction with these settings, which stitches blocks and asks the network again."""
        of_instances = InstanceSettings(**{name: settings[name] for name in OF_INSTANCES})  # type: ignore[arg-type]
        evaluator = VolumeEvaluator(
            dataset=self.dataset,
            predictor=self.predictor.with_settings(of_instances),
            block_size=self.block_size,
            halo=self.halo,
        )
        with network_attributes(self.network, {name: settings[name] for name in self.network_candidates}):
            evaluator.run()
        report: dict[str, Any] = evaluator.state.report
        return report

    def _keys(self, settings: Settings) -> dict[str, float]:
        """Settings by key of the configuration."""
        return {
            (OF_NETWORK + name if name in self.network_candidates else name): value for name, value in settings.items()
        }

    def _write(self, tuned: Tuned) -> None:
        overlay = dict(tuned.after) | ({"flips": self.flips} if self.flips else {})
        text = tuned_text(tuned)
        self.out.parent.mkdir(parents=True, exist_ok=True)
        replace_file(self.out.with_suffix(".txt"), lambda file: file.write(text.encode()))
        replace_file(self.out, lambda file: file.write((json.dumps(overlay, indent=4) + "\n").encode()))
        print(text)
        print(f"overlay: {self.out}", flush=True)
