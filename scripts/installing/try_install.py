"""Tries wheels in fresh environments, one for each Python and torch, and prints one table. Standard library only."""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

from installing.self_test import Outcome, say, self_test

ROOT = Path(__file__).resolve().parents[2]
INSTALL_TIMEOUT_S = 3600
COLUMNS = ("wheel", "python", "torch", "extras", "ops", "help", "check", "train", "predict", "result")


class NotToBeHad(Exception):
    """An interpreter or a version that this machine does not get."""


@dataclass
class Row:
    """One line of the table."""

    wheel: str
    python: str
    torch: str
    extras: str = "-"
    ops: str = "-"
    seconds: dict[str, float] = field(default_factory=dict)
    result: str = "passed"
    is_fault: bool = False

    def cells(self) -> list[str]:
        """Texts of `COLUMNS`."""
        times = [f"{self.seconds[name]:.1f} s" if name in self.seconds else "-" for name in COLUMNS[5:9]]
        return [self.wheel, self.python, self.torch, self.extras, self.ops, *times, self.result]


def main(words: list[str] | None = None) -> int:
    """Try every combination and print the table; the exit code."""
    parser = argparse.ArgumentParser(prog="scripts/try_install", description=__doc__)
    parser.add_argument("--wheel", type=Path, action="append", metavar="FILE", help="default: all in dist")
    parser.add_argument("--python", nargs="+", default=[sys.executable], metavar="VERSION", help="or interpreters")
    parser.add_argument("--torch", nargs="+", default=[""], metavar="VERSION", help="default: pip's choice")
    parser.add_argument("--extras", default="share", metavar="NAMES", help="of the second part, default share")
    parser.add_argument("--compile", action="store_true", help="let the operators be compiled if none are prebuilt")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="make the environments there and keep them")
    options = parser.parse_args(words)
    wheels = [wheel.resolve() for wheel in options.wheel or sorted((ROOT / "dist").glob("*.whl"))]
    missing = [str(wheel) for wheel in wheels if not wheel.is_file()]
    if missing or not wheels:
        what = f"no such file: {', '.join(missing)}" if missing else "no wheel in dist; scripts/build_wheels makes them"
        print(f"try_install: error: {what}", file=sys.stderr)
        return 2
    rows = []
    with tempfile.TemporaryDirectory(prefix="seg3d_try_") as scratch:
        place = options.keep.resolve() if options.keep else Path(scratch)
        place.mkdir(parents=True, exist_ok=True)
        place.chmod(0o755)
        for wheel in wheels:
            for python in options.python:
                for torch in options.torch:
                    rows += try_one(place, wheel, python, torch, options.extras, options.compile)
    print(table(rows))
    return 1 if any(row.is_fault for row in rows) else 0


def try_one(place: Path, wheel: Path, python: str, torch: str, extras: str, may_compile: bool) -> list[Row]:
    """Rows of one environment: without extras, and with them unless there are none.

    Args:
        place: folder for environments.
        wheel: the wheel.
        python: version, or path of an interpreter.
        torch: version, or "" for pip's choice.
        extras: names separated by commas.
        may_compile: whether the operators may be compiled.
    """
    kind = "pure" if wheel.stem.endswith("-any") else "prebuilt"
    row = Row(kind, Path(python).name, torch or "pip's")
    rows = [row]
    try:
        interpreter, row.python = find_python(python)
        folder = Path(tempfile.mkdtemp(prefix=f"{kind}_py{row.python}_torch{torch}_", dir=place))
        folder.chmod(0o755)
        environment = folder / "env"
        say(f"{wheel.name}, Python {row.python}, torch {row.torch}: installing")
        installed = install(interpreter, environment, str(wheel), torch)
        row.torch = installed["torch"]
        fill(row, self_test(environment, folder / "plain", may_compile), "")
        if extras and not row.is_fault:
            rows.append(Row(kind, row.python, row.torch, extras))
            pip(environment, [f"{wheel}[{extras}]"])
            fill(rows[-1], self_test(environment, folder / "extras", may_compile, with_training=False), extras)
    except NotToBeHad as error:
        rows[-1].result = f"not to be had: {error}"
    for done in rows:
        say(" | ".join(done.cells()))
    return rows


def fill(row: Row, outcome: Outcome, extras: str) -> None:
    """Write an outcome into a row.

    Args:
        row: the row.
        outcome: of the self-test.
        extras: which must be there.
    """
    row.seconds, row.ops = outcome.seconds, outcome.ops or "-"
    absent = [name for name in filter(None, extras.split(",")) if name not in outcome.extras]
    if outcome.fault or absent:
        row.is_fault, row.result = True, outcome.fault or f"failed: doctor misses extra {', '.join(absent)}"


def find_python(wanted: str) -> tuple[str, str]:
    """The interpreter of a version, and its version.

    Raises:
        NotToBeHad: there is none on the PATH, nor one that uv knows, that runs.
    """
    name = wanted if os.sep in wanted or not wanted[:1].isdigit() else f"python{wanted}"
    found = [shutil.which(name) or ""]
    if shutil.which("uv"):
        command = ["uv", "python", "find", "--no-python-downloads", wanted]
        found.append(subprocess.run(command, capture_output=True, text=True).stdout.strip())
    code = "import sys; print('.'.join(map(str, sys.version_info[:3])))"
    for interpreter in filter(None, found):
        answer = subprocess.run([interpreter, "-c", code], capture_output=True, text=True)
        if answer.returncode == 0:  # a shim of pyenv stands for versions that are not there, too
            return interpreter, answer.stdout.strip()
    raise NotToBeHad(f"no {name} that runs, neither on the PATH nor with uv")


def install(interpreter: str, environment: Path, wheel: str, torch: str) -> dict[str, str]:
    """Make an environment with a wheel in it; the versions of its packages.

    Raises:
        NotToBeHad: pip found no such version, or had no network.
    """
    made = subprocess.run([interpreter, "-m", "venv", str(environment)], capture_output=True, text=True)
    if made.returncode:
        raise NotToBeHad(f"a virtual environment: {last_line(made)}")
    if torch:  # alone, so that it is told from what the package needs
        pip(environment, [f"torch=={torch}"])
    pip(environment, [wheel, *([f"torch=={torch}"] if torch else [])])
    listed = subprocess.run(
        [environment_python(environment), "-m", "pip", "list", "--format", "json"],
        capture_output=True,
        text=True,
        check=True,
    )
    return {package["name"]: package["version"] for package in json.loads(listed.stdout)}


def pip(environment: Path, requirements: list[str]) -> None:
    """Install into an environment.

    Raises:
        NotToBeHad: pip failed.
    """
    command = [environment_python(environment), "-m", "pip", "install", "--quiet", *requirements]
    done = subprocess.run(command, capture_output=True, text=True, timeout=INSTALL_TIMEOUT_S)
    if done.returncode:
        raise NotToBeHad(f"pip install {' '.join(requirements)}: {last_line(done)}")


def environment_python(environment: Path) -> str:
    """The interpreter of a virtual environment."""
    return str(environment / ("Scripts/python.exe" if os.name == "nt" else "bin/python"))


def last_line(done: subprocess.CompletedProcess[str]) -> str:
    """What a program said last, the first error if it names one."""
    lines = [line.strip() for line in (done.stderr + done.stdout).splitlines() if line.strip()]
    return next((line for line in lines if line.startswith("ERROR")), lines[-1] if lines else "it said nothing")[:160]


def table(rows: list[Row]) -> str:
    """Rows as aligned text."""
    lines = [list(COLUMNS), *(row.cells() for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(COLUMNS))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )


if __name__ == "__main__":
    sys.exit(main())
