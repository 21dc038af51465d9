"""A display to draw on: the user's, or for a picture a virtual one where there is none.

It must not know napari or layers.
"""

from __future__ import annotations

import atexit
import os
import select
import shutil
import subprocess
import sys

_SECONDS = 60.0


def need_display(for_picture: bool) -> None:
    """See that Qt can draw; where it cannot, and a picture is wanted, start Xvfb for the rest of this process.

    Linux only: other systems always have a display. Qt's platform `offscreen` has no OpenGL without one.

    Args:
        for_picture: whether nothing is to be seen but a picture in a file.

    Raises:
        ValueError: there is no display and nothing to make one.
    """
    if not sys.platform.startswith("linux") or os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"):
        return
    if not for_picture:
        raise ValueError(
            "there is no display (neither DISPLAY nor WAYLAND_DISPLAY is set); work at a desktop or log in with "
            "ssh -X, or write a picture with --screenshot FILE.png"
        )
    program = shutil.which("Xvfb")
    if program is None:
        raise ValueError("there is no display, and --screenshot then needs the program Xvfb: apt-get install xvfb")
    os.environ["DISPLAY"] = _start(program)


def _start(program: str) -> str:
    """Start Xvfb on a free display; it ends with this process, or when its last window closes."""
    answer, asked = os.pipe()
    command = [program, "-displayfd", str(asked), "-screen", "0", "1920x1440x24", "-nolisten", "tcp", "-terminate"]
    server = subprocess.Popen(command, pass_fds=[asked], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    os.close(asked)
    atexit.register(server.terminate)
    with os.fdopen(answer) as reader:
        ready, _, _ = select.select([reader], [], [], _SECONDS)
        number = reader.readline().strip() if ready else ""
    if not number:
        raise ValueError("there is no display, and Xvfb did not start; set DISPLAY")
    return f":{number}"
