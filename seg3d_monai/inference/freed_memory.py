"""What the C library does with memory that is freed: rules of glibc, and nothing where the C library is another.

glibc takes a large array from the system, which gets it back when it is freed, and a smaller one from the heap of the
thread that asks. What is freed there stays with that thread, up to 64 MB of it, and as arrays come and go "smaller"
soon means up to 32 MB.
"""

import ctypes
import sys

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""Numbers of glibc's malloc.h."""
LARGEST_KEPT = 4 * 2**20
"""Bytes; small beside a block of voxels."""


def give_back_at_once() -> bool:
    """Give arrays of more than 4 MB back as soon as they are freed, in this process from now on.

    For whole stacks: several threads read, predict and pack, and their heaps would keep as much as several blocks of
    voxels, the more the longer the run.

    Returns:
        Whether the C library could be told.
    """
    libc = _glibc()
    if libc is None:
        return False
    return bool(libc.mallopt(M_MMAP_THRESHOLD, LARGEST_KEPT) and libc.mallopt(M_TRIM_THRESHOLD, LARGEST_KEPT))


def give_back() -> None:
    """Give back what is free, between the steps of a run: the next step would add its own to it."""
    libc = _glibc()
    if libc is not None:
        libc.malloc_trim(0)


def _glibc() -> ctypes.CDLL | None:
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "gnu_get_libc_version"):
        return libc
    return None
