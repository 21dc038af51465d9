"""The command `seg3d` as a section runs it: in a process of its own."""

import os
import subprocess
import sys


def command_line(words: list[str], threads: int) -> None:
    """Run `seg3d`; what it says goes to stderr where it fails."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(
        [sys.executable, "-m", "seg3d_monai", *words], env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        sys.stderr.write(done.stdout[-2000:] + done.stderr[-4000:])
        done.check_returncode()
