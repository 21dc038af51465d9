"""A toy training of several processes for the launcher: it adds up ranks, saves each step, and dies when told."""

import json
import os
import signal
import time
from pathlib import Path

import torch
import torch.distributed as dist


def agreed(number, how=dist.ReduceOp.MAX):
    """A number all processes agree on."""
    total = torch.tensor([float(number)])
    if dist.is_initialized():
        dist.all_reduce(total, how)
    return total.item()


class ToyTrainer:
    """Each step adds (rank + 1) over all ranks to a total, so that n steps of two workers give 3 n.

    `accident` is {"rank", "step", "what"}: "kill" ends the process, once for a run folder; others raise.
    """

    def __init__(self, *, output_dir, steps, seconds=0.0, resume=False, accident=None):
        self.folder, self.steps, self.seconds = Path(output_dir), steps, seconds
        self.resume, self.accident = resume, accident
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        self.signal = 0
        self.is_running = False

    def stop(self, number):
        self.signal = number
        return self.is_running

    def run(self):
        self.is_running = True
        step, total = json.loads((self.folder / "last.pt").read_text()) if self.resume else (0, 0.0)
        self.note("start", step)
        if self.rank == 0:
            print(f"started at {step}", flush=True)
        while step < self.steps:
            time.sleep(self.seconds)
            step += 1
            self.have_accident(step)
            total += agreed(self.rank + 1, dist.ReduceOp.SUM)
            if self.rank == 0:
                new = self.folder / "last.new.pt"
                new.write_text(json.dumps([step, total]))
                os.replace(new, self.folder / "last.pt")
            self.note("step", step)
            if number := agreed(self.signal):
                self.note("stop", step)
                raise SystemExit(128 + int(number))
        self.is_running = False
        if self.rank == 0:
            print(f"total = {total:g}", flush=True)

    def note(self, *words):
        with (self.folder / f"notes_{self.rank}").open("a") as file:
            print(*words, os.getpid(), torch.get_num_threads(), os.environ.get("TOY_NODE"), time.time(), file=file)

    def have_accident(self, step):
        accident = self.accident or {}
        if (accident.get("rank"), accident.get("step")) != (self.rank, step):
            return
        if accident["what"] == "kill":
            if accident.get("always") or not (self.folder / "killed").exists():
                (self.folder / "killed").touch()
                os.kill(os.getpid(), signal.SIGKILL)
        elif accident["what"] == "mistake":
            raise FileNotFoundError(2, "No such file or directory", "crops.tif")
        elif accident["what"] == "defect":
            raise KeyError("boxes")


def build(output_dir):
    """What a bundle builds once: the first process writes it, the others find it."""
    path = Path(output_dir) / "built"
    if path.exists():
        return path.read_text()
    time.sleep(0.5)
    path.write_text(f"by {dist.get_rank() if dist.is_initialized() else 0}")
    return path.read_text()


CONFIG = {
    "imports": ["$import launch_toys", "$import os", "$from seg3d_monai.engine import check_config"],
    "bundle_root": ".",
    "dataset_dir": "",
    "output_dir": "run",
    "resume": False,
    "train_workers": 1,
    "gpus_per_worker": 0,
    "cpus_per_worker": 1,
    "address": "",
    "max_failures": 1,
    "resource_timeout_s": 60,
    "steps": 3,
    "seconds": 0.0,
    "accident": None,
    "built": "$launch_toys.build(@output_dir)",
    "network_def": "$launch_toys.build(@output_dir)",
    "launcher": {
        "_target_": "seg3d_monai.engine.launch.Launcher",
        "output_dir": "@output_dir",
        "train_workers": "@train_workers",
        "gpus_per_worker": "@gpus_per_worker",
        "cpus_per_worker": "@cpus_per_worker",
        "address": "@address",
        "max_failures": "@max_failures",
        "resource_timeout_s": "@resource_timeout_s",
    },
    "train": {
        "trainer": {
            "_target_": "launch_toys.ToyTrainer",
            "output_dir": "@output_dir",
            "steps": "@steps",
            "seconds": "@seconds",
            "resume": "@resume",
            "accident": "@accident",
        }
    },
    "setup": ["$os.makedirs(@output_dir, exist_ok=True)", "@built"],
    "fit": ["$@train#trainer.run()"],
    "initialize": ["$@launcher.setup('setup')"],
    "training": ["$@launcher.run('fit')"],
    "run": "%training",
}
