"""What the C library does with memory that is freed: rules of glibc, and nothing where the C library is another.

glibc takes a large array from the system, which gets it back when it is freed, and a smaller one from the heap of the
thread that asks. What is freed there stays with that thread, up to 64 MB of it, and as arrays come and go "smaller"
soon means up to 32 MB. A whole-stack run and a loader's worker want more given back, a training step less.
"""

import ctypes
import sys

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""Numbers of glibc's malloc.h."""
SMALL, LARGEST = 4 * 2**20, 32 * 2**20
"""Bytes: what is small beside a block of voxels; the highest limit that glibc takes on 64 bits."""


def give_back_at_once() -> bool:
    """Give arrays of more than 4 MB back as soon as they are freed, in this process from now on.

    For whole stacks: several threads read, predict and pack, and their heaps would keep as much as several blocks of
    voxels, the more the longer the run. For a loader's workers: the heap of each would keep more than a crop takes.

    Returns:
        Whether the C library could be told.
    """
    return _set_limits(SMALL, SMALL)


def keep_freed_memory() -> bool:
    """Keep freed arrays of up to 32 MB, in this process from now on; the peak of memory stays what it is.

    For training: a step on the CPU frees and asks for the same gigabytes again and again, and the system clears every
    page of them anew.

    Returns:
        Whether the C library could be told.
    """
    return _set_limits(LARGEST, 2**31 - 1)


def give_back() -> None:
    """Give back what is free, between the steps of a run: the next step would add its own to it."""
    libc = _glibc()
    if libc is not None:
        libc.malloc_trim(0)


def _set_limits(from_heap: int, kept: int) -> bool:
    """From which size arrays come from the system, and how much a heap keeps, bytes."""
    libc = _glibc()
    return libc is not None and bool(libc.mallopt(M_MMAP_THRESHOLD, from_heap) and libc.mallopt(M_TRIM_THRESHOLD, kept))


def _glibc() -> ctypes.CDLL | None:
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "gnu_get_libc_version"):
        return libc
    return None
