"""Freed memory goes back to the system between the steps of a run.

glibc keeps what blocks of voxels leave behind, in pieces; the next step would add its own to it.
"""

import ctypes
import sys


def give_back() -> None:
    """Give freed memory back where the C library is glibc; elsewhere do nothing."""
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)
