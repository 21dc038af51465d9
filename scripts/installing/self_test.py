"""Uses an installed seg3d as a stranger would: from another folder, without a home to write in, as nobody if root.

It knows nothing of how the environment was made.
"""

import os
import re
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

TIMEOUT_S = 1800
HELP_LIMIT_S = 1.0
NOBODY = 65534
SMALL = {
    "crop_size": "[16,32,40]",
    "backbone#width": "8",
    "train#dataset#num_samples": "4",
    "train#trainer#max_epochs": "1",
    "amp": "off",
}
"""Overrides that make a training of two steps."""


@dataclass
class Outcome:
    """What happened.

    Attributes:
        seconds: of each step.
        ops: path of the operators and where their library is from.
        extras: those that `seg3d doctor` calls installed.
        fault: the first thing that went wrong, "" if nothing did.
    """

    seconds: dict[str, float] = field(default_factory=dict)
    ops: str = ""
    extras: list[str] = field(default_factory=list)
    fault: str = ""


class Failed(Exception):
    """A step went wrong."""


def self_test(environment: Path, folder: Path, may_compile: bool = False, with_training: bool = True) -> Outcome:
    """Run the steps; the first that fails ends it.

    Args:
        environment: virtual environment that holds the package.
        folder: to make and work in.
        may_compile: whether the operators may be compiled where none are prebuilt.
        with_training: whether to train and predict too.
    """
    outcome = Outcome()
    run = _Runner(environment, folder, may_compile)
    try:
        run("--help")  # from now on the files are in memory, and Python's own caches are what they stay
        outcome.seconds["help"] = min(run.timed("--help")[0] for _ in range(3))
        if outcome.seconds["help"] > HELP_LIMIT_S:
            raise Failed(f"seg3d --help took {outcome.seconds['help']:.1f} s, more than {HELP_LIMIT_S} s")
        report = run("doctor")
        outcome.ops = operators(report)
        outcome.extras = re.findall(r"(?m)^extra (\w+) +installed$", report)
        outcome.seconds["check"] = run.timed("bundle", "check", "maskrcnn3d")[0]
        if with_training:
            overrides = [word for key, value in SMALL.items() for word in (f"--{key}", value)]
            outcome.seconds["train"] = run.timed("train", "maskrcnn3d", "--output_dir", "run", *overrides)[0]
            image = next((run.folder / "run" / "sample").rglob("image.*"))
            checkpoint = ("--checkpoint", "run/model.pt", "--backbone#width", "8", "--score_threshold", "0.1")
            words = ("predict", str(image), "out.zarr", "--bundle", "bundles/maskrcnn3d", *checkpoint)
            outcome.seconds["predict"] = run.timed(*words)[0]
            if not (run.folder / "out.instances.parquet").is_file():
                raise Failed("predict wrote no table")
    except (Failed, subprocess.TimeoutExpired, StopIteration) as error:
        outcome.fault = f"failed: {error}"
    return outcome


def operators(report: str) -> str:
    """The path of the CPU's operators as `seg3d doctor` tells it: prebuilt, compiled, reference."""
    line = next((line for line in report.splitlines() if line.startswith("ops ")), "")
    if "compiled on cpu" not in line:
        return "reference" if "reference on cpu" in line else "?"
    if "_lib" not in line:
        return "compiled"
    return "prebuilt AVX-512" if "-avx512.so" in line else "prebuilt"


def runs_as_nobody(program: str) -> bool:
    """Whether a user without rights may run a program: not if it, or its interpreter, lies in the home of root."""
    try:
        done = subprocess.run([program, "--version"], cwd="/", capture_output=True, user=NOBODY, group=NOBODY)
    except OSError:
        return False
    return done.returncode == 0


def say(text: str) -> None:
    """Tell on stderr what goes on: stdout is the table."""
    print(f"[try] {text}", file=sys.stderr, flush=True)


class _Runner:
    """Runs `seg3d` of an environment in a folder."""

    def __init__(self, environment: Path, folder: Path, may_compile: bool) -> None:
        self.folder = folder
        self._program = str(environment / ("Scripts/seg3d.exe" if os.name == "nt" else "bin/seg3d"))
        home = folder / "home"
        home.mkdir(parents=True)
        self._user: dict[str, int] = {}
        if hasattr(os, "geteuid") and os.geteuid() == 0:
            if runs_as_nobody(self._program):
                os.chown(folder, NOBODY, NOBODY)
                self._user = {"user": NOBODY, "group": NOBODY}
            else:
                say("  the user nobody cannot reach this Python, so it runs as root, who may write everywhere")
        if not may_compile:
            home.chmod(0o555)
        elif self._user:
            os.chown(home, NOBODY, NOBODY)
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("SEG3D_", "PYTHON", "XDG_"))}
        self._variables = kept | {"HOME": str(home), "USERPROFILE": str(home), "TMPDIR": str(folder)}
        if not may_compile:
            self._variables["CXX"] = "no-compiler"

    def __call__(self, *words: str) -> str:
        """What a command prints.

        Raises:
            Failed: it did not exit with 0.
        """
        done = subprocess.run(
            [self._program, *words],
            cwd=self.folder,
            env=self._variables,
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
            **self._user,  # type: ignore[call-overload]
        )
        shown = "_".join(word.strip("-") for word in words[:2] if "/" not in word)
        (self.folder.parent / f"{self.folder.name}_{shown}.log").write_text(done.stdout + done.stderr, encoding="utf-8")
        if done.returncode:
            lines = (done.stderr or done.stdout).strip().splitlines()
            raise Failed(f"seg3d {words[0]} exited with {done.returncode}: {lines[-1] if lines else ''}"[:300])
        return done.stdout

    def timed(self, *words: str) -> tuple[float, str]:
        """Seconds that a command took, and what it printed."""
        say(f"  seg3d {' '.join(words[:2])}")
        began = time.perf_counter()
        text = self(*words)
        return time.perf_counter() - began, text
