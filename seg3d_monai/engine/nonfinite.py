"""Losses and gradients that are not finite, written out so that their crops can be looked at.

The trainer decides whether they end the training; this file only writes.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from seg3d_monai.engine.checkpoint import replace_file
from seg3d_monai.engine.replicas import rank
from seg3d_monai.engine.trainer import OTHERS_LOSS, InstanceTrainer, TrainerEvents

__all__ = ["NonFiniteLog"]

BATCH_KEYS = ("crop_id", "volume", "roi")
"""What is written of a batch: lists with an entry for each of its crops."""


class NonFiniteLog:
    """Write `nonfinite.json` under output_dir: how often it happened, and the crops and losses of the first times.

    {"count": 3, "first": [{"epoch", "iteration", "reason", "losses", "crop_id": [..], "volume": [..], "roi": [..]}]}.
    The crops are those of the batch at hand; a gradient also comes from the other batches of its step. A resumed run
    goes on in the file. Of several processes each writes of its own crops, `nonfinite.1.json` and so on.

    Args:
        output_dir: folder of the run; made if missing.
        most: times that are described, > 0; later ones are only counted.

    Raises:
        ValueError: if `most` is not positive.
    """

    def __init__(self, *, output_dir: str | Path, most: int = 100) -> None:
        if most < 1:
            raise ValueError(f"most={most} is not positive; give the number of times to describe")
        self.folder = Path(output_dir)
        self.most = most
        self._log: dict[str, Any] | None = None

    def attach(self, engine: InstanceTrainer) -> None:
        """Listen for what is not finite."""
        engine.add_event_handler(TrainerEvents.NOT_FINITE, self._write)

    def _write(self, engine: InstanceTrainer) -> None:
        state = engine.state
        if state.fault["reason"] == OTHERS_LOSS:
            return
        path = self.folder / (f"nonfinite.{rank()}.json" if rank() else "nonfinite.json")
        if self._log is None:
            self._log = _read(path, before=state.iteration)
        self._log["count"] += 1
        if len(self._log["first"]) < self.most:
            record = {"epoch": state.epoch, "iteration": state.iteration, "reason": state.fault["reason"]}
            record["losses"] = {name: _json_number(value) for name, value in state.fault["losses"].items()}
            self._log["first"].append(record | {key: state.batch[key] for key in BATCH_KEYS if key in state.batch})
        text = json.dumps(self._log, indent=2, default=str)
        self.folder.mkdir(parents=True, exist_ok=True)
        replace_file(path, lambda file: file.write(text.encode()))


def _read(path: Path, before: int) -> dict[str, Any]:
    """What an earlier run wrote up to the checkpoint that this one went on from."""
    if not path.exists():
        return {"count": 0, "first": []}
    log = json.loads(path.read_text(encoding="utf-8"))
    first = [record for record in log["first"] if record["iteration"] < before]
    return {"count": log["count"] - len(log["first"]) + len(first), "first": first}


def _json_number(value: float) -> float | str:
    """JSON has no NaN and no infinity."""
    return value if math.isfinite(value) else str(value)
