"""Decide once per process whether the operators run compiled: a prebuilt library, else one built into the user's cache,
else plain PyTorch with one warning. `SEG3D_OPS=compiled|reference` forces one.

The CPU's library is loaded with the package, the CUDA kernels when they are first needed: before that, importing the
package must not start CUDA, which would break processes that fork. This file knows nothing of what the operators are;
ops/registration.py binds them.
"""

import ctypes
import functools
import logging
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from seg3d_monai.ops.build import (
    BuildError,
    Recipe,
    build_into_cache,
    cpu_recipe,
    cpu_sources,
    source_hash,
    torch_folder,
)
from seg3d_monai.ops.build_cuda import cuda_recipe, cuda_sources

PREBUILT = Path(__file__).resolve().parent.parent / "_lib"
MEND = (
    "run it under WSL"
    if sys.platform == "win32"
    else "install a C++ compiler (for example g++ >= 11), or a wheel that has them compiled (docs/install.md)"
)
MEND_CUDA = "install the CUDA toolkit that fits torch, or run scripts/build_ops --cuda where there is one"

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Loaded:
    """How the operators run: path 'compiled' or 'reference', why, and the library's file if there is one."""

    path: str
    reason: str
    library: str | None


def prebuilt_library(variant: str = "") -> Path:
    """Where scripts/build_ops puts the library. Its name holds the sources' hash, so a stale one is never taken.

    Args:
        variant: "" for any processor of this kind, "avx512" for those that have AVX-512.
    """
    return PREBUILT / f"ops-{source_hash(cpu_sources())}{variant and f'-{variant}'}.so"


def prebuilt_cuda_library() -> Path:
    """The same for the CUDA kernels."""
    return PREBUILT / f"ops-cuda-{source_hash(cuda_sources())}.so"


def load_operators() -> Loaded:
    """Load the compiled operators of the CPU if possible.

    Raises:
        ValueError: SEG3D_OPS is neither 'compiled' nor 'reference'.
        RuntimeError: SEG3D_OPS=compiled and there is no way to load or build the library.
    """
    # torch takes its own kernels by the same answer.
    variants = ("avx512", "") if torch.backends.cpu.get_cpu_capability() == "AVX512" else ("",)
    return _load_first([prebuilt_library(name) for name in variants], cpu_recipe, "its operators", MEND)


@functools.cache
def load_cuda_operators() -> Loaded:
    """Load the CUDA kernels if possible, once per process; needs a GPU. Raises as `load_operators`."""

    def recipe() -> Recipe:
        capabilities = [torch.cuda.get_device_capability(number) for number in range(torch.cuda.device_count())]
        return cuda_recipe(capabilities)

    share_cuda_symbols()
    return _load_first([prebuilt_cuda_library()], recipe, "its operators on CUDA", MEND_CUDA)


def share_cuda_symbols() -> None:
    """Let libraries that were linked without torch's CUDA libraries, for want of them, find their symbols."""
    for name in ("libc10_cuda.so", "libtorch_cuda.so"):
        library = torch_folder() / "lib" / name
        if library.exists():
            ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)


def _load_first(prebuilt: Sequence[Path], recipe: Callable[[], Recipe], what: str, mend: str) -> Loaded:
    wanted = os.environ.get("SEG3D_OPS", "")
    if wanted not in ("", "compiled", "reference"):
        raise ValueError(f"SEG3D_OPS={wanted!r} is not known; set it to 'compiled' or 'reference', or unset it")
    if wanted == "reference":
        return Loaded("reference", "SEG3D_OPS=reference", None)

    causes = []
    found = [library for library in prebuilt if library.exists()]
    for library in found:
        try:
            loaded = _load(library, "prebuilt with the package")
        except BuildError as error:
            causes.append(str(error))
            logger.warning("the prebuilt operators are left aside: %s", error)
        else:
            return loaded
    if not found and (others := _of_other_sources(prebuilt[0])):
        causes.append(f"{others[0]} was built from other sources")
        logger.warning("the prebuilt operators are left aside: %s", causes[-1])
    try:
        return _load_from_cache(recipe())
    except BuildError as error:
        causes.append(str(error))
    cause = "; ".join(causes)
    if wanted == "compiled":
        raise RuntimeError(f"SEG3D_OPS=compiled, but the operators cannot be compiled: {cause}; {mend}, or unset it")
    warnings.warn(
        f"seg3d_monai runs {what} in plain PyTorch, which is slower: {cause}. To mend it, {mend}; "
        "SEG3D_OPS=reference accepts it without this warning.",
        RuntimeWarning,
        stacklevel=3,
    )
    return Loaded("reference", cause, None)


def _of_other_sources(wanted: Path) -> list[Path]:
    """Prebuilt libraries of the same kind, CPU or CUDA, that do not fit this package's sources."""
    is_cuda = wanted.name.startswith("ops-cuda-")
    return [file for file in sorted(PREBUILT.glob("ops-*.so")) if file.name.startswith("ops-cuda-") == is_cuda]


def _load_from_cache(recipe: Recipe) -> Loaded:
    library, is_new = build_into_cache(recipe)
    if not is_new:
        try:
            return _load(library, "compiled earlier on this machine")
        except BuildError as error:
            # A damaged file in the cache is ours to replace.
            logger.warning("rebuilding the compiled operators: %s", error)
            try:
                library.unlink(missing_ok=True)
            except OSError:
                raise error from None
            library, _ = build_into_cache(recipe)
    return _load(library, "compiled on this machine")


def _load(library: Path, reason: str) -> Loaded:
    try:
        torch.ops.load_library(str(library))
    except OSError as error:
        raise BuildError(f"{library} does not load ({error})") from error
    return Loaded("compiled", reason, str(library))
