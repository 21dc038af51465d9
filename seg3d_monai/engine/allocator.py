"""The C library's allocator, told to keep what a training step frees.

glibc gives large blocks back to the system as soon as they are free. A training step on the CPU frees and asks for the
same gigabytes again and again, and the system clears every page of them anew.
"""

import ctypes
import sys

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""Numbers of glibc's malloc.h."""
LARGEST_KEPT = 32 * 2**20
"""Bytes; glibc takes no larger threshold on 64 bits. Larger blocks are given back."""


def keep_freed_memory() -> bool:
    """Keep freed blocks of up to 32 MB in this process from now on; the peak of memory stays what it is.

    Returns:
        Whether the C library could be told: False without glibc.
    """
    if sys.platform != "linux" or not hasattr(libc := ctypes.CDLL(None), "gnu_get_libc_version"):
        return False
    return bool(libc.mallopt(M_MMAP_THRESHOLD, LARGEST_KEPT) and libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1))
