"""Accidents of a bundle's training in several processes, as a handler that its config names."""

import faulthandler
import json
import os
import signal
import sys
import time
from pathlib import Path

from ignite.engine import Events

from seg3d_monai.engine import InstanceTrainer, rank

PATIENCE_S = 60  # an iteration that takes longer is one in which processes wait for each other for ever


class Accidents:
    """Note each iteration of a process, and have an accident at the beginning of some, each once in a run.

    Args:
        output_dir: folder of the run, where `notes_RANK` has a line an iteration.
        accidents: what happens, as {"rank", "iteration", "what"}. "kill" ends the process by SIGKILL; "hang" waits for
            something to end it; "stop" sends SIGTERM to the process "pid" and waits until the trainer is told.
    """

    def __init__(self, *, output_dir: str, accidents: list[dict[str, object]]) -> None:
        self.folder = Path(output_dir)
        self.accidents = accidents

    def attach(self, engine: InstanceTrainer) -> None:
        """Listen for iterations."""
        engine.add_event_handler(Events.ITERATION_STARTED, self._iteration_started)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._iteration_completed)

    def _iteration_started(self, engine: InstanceTrainer) -> None:
        faulthandler.dump_traceback_later(PATIENCE_S, exit=True, file=sys.__stderr__)
        for number, accident in enumerate(self.accidents):
            mark = self.folder / f"accident_{number}"
            if (accident["rank"], accident["iteration"]) == (rank(), engine.state.iteration) and not mark.exists():
                mark.touch()
                self._have(accident, engine)

    def _have(self, accident: dict[str, object], engine: InstanceTrainer) -> None:
        if accident["what"] == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        elif accident["what"] == "stop":
            os.kill(accident["pid"], signal.SIGTERM)
            while not engine._signalled:
                time.sleep(0.02)
        while accident["what"] == "hang":
            time.sleep(1)

    def _iteration_completed(self, engine: InstanceTrainer) -> None:
        faulthandler.cancel_dump_traceback_later()
        note = {"iteration": engine.state.iteration, "pid": os.getpid(), "node": os.environ.get("TOY_NODE")}
        with (self.folder / f"notes_{rank()}").open("a") as file:
            file.write(json.dumps(note | {"time": time.time()}) + "\n")


def notes(folder: Path, rank: int) -> list[dict[str, object]]:
    """What one process noted, its lives one after the other."""
    return [json.loads(line) for line in (folder / f"notes_{rank}").read_text().splitlines()]
