"""Decide once per process whether the operators run compiled: a prebuilt library, else one built into the user's cache,
else plain PyTorch with one warning. `SEG3D_OPS=compiled|reference` forces one.

It knows nothing of what the operators are; ops/registration.py binds them.
"""

import logging
import os
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch

from seg3d_monai.ops.build import BuildError, build_into_cache, source_hash

PREBUILT = Path(__file__).resolve().parent.parent / "_lib"
MEND = "install a C++ compiler (for example g++ >= 11), or run scripts/build_ops where there is one"

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Loaded:
    """How the operators run: path 'compiled' or 'reference', why, and the library's file if there is one."""

    path: str
    reason: str
    library: str | None


def prebuilt_library() -> Path:
    """Where scripts/build_ops puts the library. Its name holds the sources' hash, so a stale one is never taken."""
    return PREBUILT / f"ops-{source_hash()}.so"


def load_operators() -> Loaded:
    """Load the compiled operators if possible.

    Raises:
        ValueError: SEG3D_OPS is neither 'compiled' nor 'reference'.
        RuntimeError: SEG3D_OPS=compiled and there is no way to load or build the library.
    """
    wanted = os.environ.get("SEG3D_OPS", "")
    if wanted not in ("", "compiled", "reference"):
        raise ValueError(f"SEG3D_OPS={wanted!r} is not known; set it to 'compiled' or 'reference', or unset it")
    if wanted == "reference":
        return Loaded("reference", "SEG3D_OPS=reference", None)

    causes = []
    if prebuilt_library().exists():
        try:
            return _load(prebuilt_library(), "prebuilt with the package")
        except BuildError as error:
            logger.warning("the prebuilt operators are left aside: %s", error)
            causes.append(str(error))
    try:
        return _load_from_cache()
    except BuildError as error:
        causes.append(str(error))
    cause = "; ".join(causes)
    if wanted == "compiled":
        raise RuntimeError(f"SEG3D_OPS=compiled, but the operators cannot be compiled: {cause}; {MEND}, or unset it")
    warnings.warn(
        f"seg3d_monai runs its operators in plain PyTorch, which is slower: {cause}. To mend it, {MEND}; "
        "SEG3D_OPS=reference accepts it without this warning.",
        RuntimeWarning,
        stacklevel=2,
    )
    return Loaded("reference", cause, None)


def _load_from_cache() -> Loaded:
    library, is_new = build_into_cache()
    if not is_new:
        try:
            return _load(library, "compiled earlier on this machine")
        except BuildError as error:
            # A damaged file in the cache is ours to replace.
            logger.warning("rebuilding the compiled operators: %s", error)
            library.unlink(missing_ok=True)
            library, _ = build_into_cache()
    return _load(library, "compiled on this machine")


def _load(library: Path, reason: str) -> Loaded:
    try:
        torch.ops.load_library(str(library))
    except OSError as error:
        raise BuildError(f"{library} does not load ({error})") from error
    return Loaded("compiled", reason, str(library))
