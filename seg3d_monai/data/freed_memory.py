"""What the C library does with memory that is freed: rules of glibc, and nothing where the C library is another.

glibc takes a large array from the system, which gets it back when it is freed, and a smaller one from the heap of the
thread that asks. What is freed there stays with that thread, up to 64 MB of it, and as arrays come and go "smaller"
soon means up to 32 MB. A loader's worker wants more given back, a training step and a whole-stack run less: the system
clears every page that it gives out, and where it is a guest, its host may have taken the page away.
"""

import ctypes
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -3, -4, -8
"""Numbers of glibc's malloc.h."""
SMALL, LARGEST = 4 * 2**20, 32 * 2**20
"""Bytes: what is small beside a block of voxels; the highest limit that glibc takes on 64 bits."""
MOST_ARRAYS = 65536
"""Arrays from the system at a time, glibc's own limit."""
MOST_HEAPS = 64
"""Threads to begin in search of the main heap; glibc makes eight heaps a processor at most."""


def give_back_at_once() -> bool:
    """Give arrays of more than 4 MB back as soon as they are freed, in this process from now on.

    For a loader's workers: the heap of each would keep more than a crop takes.

    Returns:
        Whether the C library could be told.
    """
    return _set_limits(SMALL, SMALL, MOST_ARRAYS)


def keep_freed_memory() -> bool:
    """Keep freed arrays of up to 32 MB, in this process from now on; the peak of memory stays what it is.

    For training: a step on the CPU frees and asks for the same gigabytes again and again, and the system clears every
    page of them anew. And for the steps of a whole-stack run that follow the network: what is larger is of many sizes
    there, and would leave gaps in the one heap.

    Returns:
        Whether the C library could be told.
    """
    return _set_limits(LARGEST, 2**31 - 1, MOST_ARRAYS)


def share_one_heap() -> bool:
    """Keep all that is freed, in one heap for all threads that begin from now on; in this process.

    For whole stacks: several threads read, predict and pack, block after block. With a heap each they would keep as
    much as several blocks of voxels, and a network's largest arrays, which no such heap holds, would come from the
    system at every call: a quarter of the time of a forward pass, and most of how it varies.

    Returns:
        Whether the C library could be told.
    """
    libc = _glibc()
    options = ((M_ARENA_MAX, 1), (M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, 2**31 - 1))
    return libc is not None and all(libc.mallopt(option, value) for option, value in options)


def main_heap_thread(name: str, begin: Callable[..., Any], *args: Any) -> ThreadPoolExecutor:
    """A thread that takes its memory from the main heap, which alone may be of any size; after `share_one_heap`.

    Threads that begin get one of the heaps that there are by turns, so they are begun until one has the main heap.
    Where the C library is another it is any thread.

    Args:
        name: of the thread.
        begin: called in it first, with `args`.
    """
    libc = _glibc()
    others: list[ThreadPoolExecutor] = []
    while True:
        thread = ThreadPoolExecutor(1, name, begin, args)
        if libc is None or thread.submit(_uses_main_heap, libc).result() or len(others) == MOST_HEAPS:
            break
        others.append(thread)  # as long as it lives, its heap is not the next one's
    for other in others:
        other.shutdown()
    return thread


def _uses_main_heap(libc: ctypes.CDLL) -> bool:
    """Whether this thread does: that heap alone lies below the end of the process's data segment."""
    libc.malloc.argtypes, libc.malloc.restype = [ctypes.c_size_t], ctypes.c_void_p
    libc.sbrk.argtypes, libc.sbrk.restype = [ctypes.c_ssize_t], ctypes.c_void_p
    libc.free.argtypes, libc.free.restype = [ctypes.c_void_p], None
    place, end = libc.malloc(4096), libc.sbrk(0)
    libc.free(place)
    return bool(place) and bool(end) and place < end


def give_back() -> None:
    """Give back what is free, between the steps of a run: the next step would add its own to it."""
    libc = _glibc()
    if libc is not None:
        libc.malloc_trim(0)


def _set_limits(from_heap: int, kept: int, most_arrays: int) -> bool:
    """From which size arrays come from the system and how much a heap keeps, bytes; and how many such arrays."""
    libc = _glibc()
    options = ((M_MMAP_THRESHOLD, from_heap), (M_TRIM_THRESHOLD, kept), (M_MMAP_MAX, most_arrays))
    return libc is not None and all(libc.mallopt(option, value) for option, value in options)


def _glibc() -> ctypes.CDLL | None:
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "gnu_get_libc_version"):
        return libc
    return None
