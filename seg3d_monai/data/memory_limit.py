"""Amounts of memory: as users write them, of the machine, of this process. Must not know what the memory is for."""

from __future__ import annotations

import os
import re
import sys

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


def read_memory_limit(value: str | float | None) -> int | None:
    """Bytes of a number, or of text such as "8GB" or "512 MB".

    Raises:
        ValueError: if it is neither.
    """
    if value is None:
        return None
    found = re.fullmatch(r"\s*([0-9.]+)\s*([KMGT]?B?)\s*", str(value).upper().replace("IB", "B"))
    try:
        number = (
            float(found[1]) * _UNITS[found[2] if found[2].endswith("B") or not found[2] else found[2] + "B"]
            if found
            else 0
        )
    except ValueError:
        number = 0
    if number <= 0:
        raise ValueError(f'max_memory is {value!r}; pass bytes, or text such as "8GB"')
    return round(number)


def machine_memory() -> int | None:
    """Bytes of memory of this machine, None where the system does not tell."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return None


def peak_memory() -> int | None:
    """The most bytes that this process has had, None where the system does not tell."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
