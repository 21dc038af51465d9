"""An environment of StarDist's own: TensorFlow and this package's torch would quarrel over numpy and threads."""

import subprocess
import sys
from pathlib import Path

PACKAGES = ("stardist==0.9.2", "tensorflow-cpu==2.21.0")
FOLDER = Path(__file__).resolve().parents[2] / ".venv_stardist"


def interpreter(given: Path | None, *, may_make: bool) -> Path | None:
    """The interpreter that StarDist runs in.

    Args:
        given: by the user, None for FOLDER's.
        may_make: whether FOLDER is made where it is missing; it takes minutes and a network.

    Returns:
        The interpreter, None where there is none and none may be made.

    Raises:
        FileNotFoundError: there is no such file.
        RuntimeError: the packages cannot be installed.
    """
    if given is not None:
        if not given.is_file():
            raise FileNotFoundError(f"--stardist_python {given} is no file; give the interpreter of an environment")
        return given.absolute()
    python, finished = FOLDER / "bin" / "python", FOLDER / "finished"
    if not finished.exists():
        if not may_make:
            return None
        print(f"making {FOLDER.name} with {', '.join(PACKAGES)}", file=sys.stderr, flush=True)
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(FOLDER)], check=True)
        done = subprocess.run(
            [str(python), "-m", "pip", "install", "--quiet", *PACKAGES], capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise RuntimeError(f"pip cannot install {', '.join(PACKAGES)}:\n{done.stderr[-2000:]}")
        finished.touch()
    return python
