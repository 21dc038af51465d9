"""Compile csrc into a shared library: find the compiler, name the library by what went into it, write it atomically.

A `Recipe` says what is built and how: `cpu_recipe` here, `cuda_recipe` in ops/build_cuda.py. This file knows nothing of
operators, of when to build, or of what to do if that fails; ops/loading.py decides that.
"""

import contextlib
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

CSRC = Path(__file__).resolve().parent.parent / "csrc"
# Contraction off: a * b + c rounds the same on every machine and in the reference. 0x020a...: the ABI of torch 2.10.
FLAGS = (
    "-std=c++20",
    "-O3",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-fPIC",
    "-fvisibility=hidden",
    "-Wall",
    "-Wno-psabi",
    "-DTORCH_TARGET_VERSION=0x020a000000000000",
)
AVX512_FLAGS = ("-mavx512f", "-mavx512vl", "-mavx512bw", "-mavx512dq", "-mfma", "-mf16c")
"""For a prebuilt library that is taken where torch takes its own AVX-512 kernels: vectors of csrc have 64 bytes."""
TIMEOUT_S = 900

logger = logging.getLogger(__name__)


class BuildError(RuntimeError):
    """The library cannot be built here; the message is the cause."""


@dataclass(frozen=True)
class Recipe:
    """One library: `name`-HASH.so, where HASH covers all that it depends on.

    Attributes:
        name: the beginning of the library's name.
        sources: its source files.
        compiler: the command that takes `-c SOURCE -o OBJECT`.
        linker: the command that takes OBJECTS `-o LIBRARY` and `libraries`.
        libraries: what it is linked with.
        fingerprint: versions and machine, beyond sources and commands, that a locally built library depends on.
    """

    name: str
    sources: tuple[Path, ...]
    compiler: tuple[str, ...]
    linker: tuple[str, ...]
    libraries: tuple[str, ...]
    fingerprint: tuple[str, ...]

    @property
    def key(self) -> str:
        """Name of a locally built library: 12 hex digits for the sources, 16 for everything else."""
        rest = chr(0).join((*self.fingerprint, *self.compiler, *self.linker, *self.libraries))
        return f"{self.name}-{source_hash(self.sources)}-{hashlib.sha256(rest.encode()).hexdigest()[:16]}"


def cpu_sources() -> tuple[Path, ...]:
    """The C++ files of the CPU's library, sorted."""
    return (*sorted(CSRC.glob("*.cpp")), *sorted(CSRC.glob("cpu/*.cpp")))


def source_hash(sources: tuple[Path, ...]) -> str:
    """Hash of the sources and of every header, 12 hex digits; it does not depend on where the package lies."""
    digest = hashlib.sha256()
    for file in (*sources, *sorted(CSRC.rglob("*.h")), *sorted(CSRC.rglob("*.cuh"))):
        digest.update(file.relative_to(CSRC).as_posix().encode() + b"\0" + file.read_bytes() + b"\0")
    return digest.hexdigest()[:12]


def cpu_recipe(*, native: bool = True, flags: tuple[str, ...] = ()) -> Recipe:
    """How the CPU's library is built with the C++ compiler of this machine.

    Args:
        native: for this machine's own processor, which is faster; False for a library that is given away.
        flags: further ones of the compiler.

    Raises:
        BuildError: there is no compiler, or it does not run.
    """
    compiler = find_compiler()
    return Recipe(
        name="ops",
        sources=cpu_sources(),
        compiler=(*compiler, *FLAGS, *(native_flags() if native else ()), *flags, *include_flags()),
        linker=(*compiler, "-shared"),
        libraries=(f"-L{torch_folder() / 'lib'}", "-ltorch_cpu"),
        fingerprint=(run([*compiler, "--version"]), torch.__version__, _processor()),
    )


def torch_folder() -> Path:
    """Where torch is installed."""
    return Path(torch.__file__).resolve().parent


def include_flags() -> tuple[str, ...]:
    """Where the headers are. The prefix maps keep this machine's paths out of the library's error messages."""
    prefixes = (f"-ffile-prefix-map={CSRC}=csrc", f"-ffile-prefix-map={torch_folder()}=torch")
    return (*prefixes, f"-I{CSRC}", "-isystem", str(torch_folder() / "include"))


def find_compiler() -> list[str]:
    """The C++ compiler's command: $CXX, else the first of c++, g++ and clang++ on the PATH.

    Raises:
        BuildError: there is none, or this is Windows, whose compilers take other flags and libraries.
    """
    if sys.platform == "win32":
        raise BuildError("the operators are not compiled on Windows")
    if os.environ.get("CXX"):
        command = shlex.split(os.environ["CXX"])
        if shutil.which(command[0]) is None:
            raise BuildError(f"the compiler CXX={os.environ['CXX']} was not found")
        return command
    for name in ("c++", "g++", "clang++"):
        if shutil.which(name):
            return [name]
    raise BuildError("no C++ compiler was found (looked for $CXX, c++, g++, clang++)")


def native_flags() -> list[str]:
    """Flags for this machine's own processor, for a library that stays on it."""
    machine = platform.machine().lower()
    return ["-march=native"] if sys.platform == "linux" and machine in ("x86_64", "aarch64") else []


def cache_folder() -> Path:
    """`$XDG_CACHE_HOME/seg3d_monai`, else `~/.cache/seg3d_monai`.

    Raises:
        BuildError: there is no home folder.
    """
    base = os.environ.get("XDG_CACHE_HOME")
    if base:
        return Path(base) / "seg3d_monai"
    try:
        return Path.home() / ".cache" / "seg3d_monai"
    except RuntimeError as error:
        raise BuildError(f"no folder for the cache ({error})") from error


def compile_library(target: Path, recipe: Recipe) -> None:
    """Compile all sources and link them to `target`, which appears whole or not at all.

    Args:
        target: path of the library; its folder is made if needed.
        recipe: what to build and how.

    Raises:
        BuildError: a step failed; the message holds the compiler's own last words.
    """
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f"{target.stem}.build-", dir=target.parent) as scratch_name:
            scratch = Path(scratch_name)
            objects = [scratch / f"{index}.o" for index in range(len(recipe.sources))]
            commands = [
                [*recipe.compiler, "-c", str(source), "-o", str(made)]
                for source, made in zip(recipe.sources, objects, strict=True)
            ]
            with ThreadPoolExecutor(max_workers=min(len(commands), os.cpu_count() or 1)) as pool:
                list(pool.map(run, commands))
            made = scratch / target.name
            run([*recipe.linker, *map(str, objects), "-o", str(made), *recipe.libraries])
            with made.open("rb") as file:
                os.fsync(file.fileno())
            made.replace(target)
    except OSError as error:
        raise BuildError(f"cannot write {target.parent} ({error})") from error


def build_into_cache(recipe: Recipe) -> tuple[Path, bool]:
    """Path of this machine's own library, and whether it had to be compiled now.

    Processes that want the same library wait for each other; one builds it. What a killed build left is removed.

    Raises:
        BuildError: the compiler failed, or the cache cannot be written.
    """
    target = cache_folder() / f"{recipe.key}.so"
    try:
        if target.exists():  # itself an error in the home folder of somebody else
            return target, False
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BuildError(f"cannot write {target.parent} ({error}); XDG_CACHE_HOME names another place") from error
    with _locked(target.with_suffix(".lock")) as is_locked:
        if target.exists():
            return target, False
        if is_locked:
            for left_over in target.parent.glob(f"{target.stem}.build-*"):
                shutil.rmtree(left_over, ignore_errors=True)
        logger.warning("compiling the operators of seg3d_monai into %s; this happens once", target)
        compile_library(target, recipe)
    return target, True


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[bool]:
    """Hold a lock on `path` that the system drops if the process dies; False where the file system has no locks."""
    try:
        file = path.open("a")
    except OSError as error:
        raise BuildError(f"cannot write {path.parent} ({error}); XDG_CACHE_HOME names another place") from error
    with file:
        try:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX)
            is_locked = True
        except (ImportError, OSError):
            # Two builds at once cost time, not correctness: the library is moved into place whole.
            is_locked = False
        yield is_locked


def run(command: list[str]) -> str:
    """Output of a command; BuildError with its last words if it fails."""
    try:
        result = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=TIMEOUT_S)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildError(f"{shlex.join(command[:1])} did not run ({error})") from error
    if result.returncode != 0:
        words = [line for line in (result.stderr or result.stdout).strip().splitlines() if line.strip()]
        errors = [line for line in words if "error" in line] or words[-1:] or ["no message"]
        raise BuildError(f"{shlex.join(command[:1])} failed with status {result.returncode}: {errors[0].strip()}")
    return result.stdout


def _processor() -> str:
    """What -march=native depends on: the model and the abilities of the processor."""
    wanted = ("vendor_id", "model name", "flags", "Features", "CPU implementer", "CPU part")
    try:
        lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
    except OSError:
        return platform.processor()
    return "\n".join(line for line in lines if line.partition(":")[0].strip() in wanted)
