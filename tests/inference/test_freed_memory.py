"""What threads keep of freed memory, seen in fresh processes."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

import seg3d_monai
from seg3d_monai.inference import freed_memory

MEASURE = """
import sys, threading
import numpy as np
from inference_toys import Perfect, blank
from seg3d_monai.inference import predict_volume

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096

def kept():
    "How many arrays' memory is left when four threads have freed one each."
    size = 20 * 2**20
    np.ones(3 * size // 2, np.uint8)  # by default, glibc takes arrays of up to this size from heaps afterwards
    before, done = resident(), threading.Event()

    def work(is_free):
        np.ones(size, np.uint8)
        is_free.set()
        done.wait()

    for _ in range(4):  # one after the other
        is_free = threading.Event()
        threading.Thread(target=work, args=(is_free,)).start()
        is_free.wait()
    found = (resident() - before) / size
    done.set()
    return found

class Measuring(Perfect):
    def __call__(self, block, roi):
        with open("kept", "w") as file:
            file.write(str(kept()))
        return super().__call__(block, roi)

    def identity(self):
        return {}

if __name__ == "__main__":
    num_workers = int(sys.argv[1])
    if num_workers == 0:
        with open("kept", "w") as file:
            file.write(str(kept()))
    else:
        truth = np.ones((4, 5, 6), int)
        predict_volume(blank(truth.shape), Measuring(truth), "x.zarr", num_workers=num_workers, progress=False)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library keeps its own rules")
@pytest.mark.parametrize(("num_workers", "least", "most"), [(0, 3, 4.5), (1, -1, 0.5), (2, -1, 0.5)])
def test_no_thread_of_a_run_keeps_what_it_frees(tmp_path, num_workers, least, most):
    """Without a run each thread does: else nothing would have to be done."""
    (tmp_path / "measure.py").write_text(MEASURE)
    places = [Path(__file__).parent, Path(seg3d_monai.__file__).parents[1]]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, places)), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "measure.py", str(num_workers)]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert least < float((tmp_path / "kept").read_text()) < most


def test_other_systems_are_left_alone(monkeypatch):
    monkeypatch.setattr(sys, "platform", "win32")
    assert not freed_memory.give_back_at_once()
    freed_memory.give_back()
