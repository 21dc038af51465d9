"""What the C library does with freed memory, counted in page faults of a fresh process."""

import platform
import subprocess
import sys

import pytest

from seg3d_monai.engine import allocator

COUNT_FAULTS = """
import resource, sys
import torch
from seg3d_monai.engine.allocator import keep_freed_memory

if sys.argv[1] == "keep":
    assert keep_freed_memory()
page, size = resource.getpagesize(), 20 * 2**20

def allocate_and_free():
    return [torch.zeros(size, dtype=torch.uint8) for _ in range(3)]

for _ in range(3):
    allocate_and_free()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    allocate_and_free()
print((resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) * page / (30 * size))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library keeps its own rules")
def test_freed_memory_is_used_again():
    shares = {}
    for how in ("keep", "leave"):
        done = subprocess.run([sys.executable, "-c", COUNT_FAULTS, how], capture_output=True, text=True, check=True)
        shares[how] = float(done.stdout)
    assert shares["keep"] < 0.05
    assert shares["keep"] <= shares["leave"]


def test_other_systems_are_left_alone(monkeypatch):
    monkeypatch.setattr(sys, "platform", "win32")
    assert not allocator.keep_freed_memory()
