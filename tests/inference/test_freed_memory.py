"""What the C library does with freed memory, seen in fresh processes."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

import seg3d_monai
from seg3d_monai.data import freed_memory

MEASURE = """
import sys, threading
import numpy as np
from inference_toys import Perfect, blank
from seg3d_monai.inference import predict_volume

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096

def kept():
    "How many arrays' memory is left when twelve threads have freed one each."
    size = 20 * 2**20
    np.ones(3 * size // 2, np.uint8)  # by default, glibc takes arrays of up to this size from heaps afterwards
    before, done = resident(), threading.Event()

    def work(is_free):
        np.ones(size, np.uint8)
        is_free.set()
        done.wait()

    for _ in range(12):  # one after the other
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


needs_glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library keeps its own rules")


@needs_glibc
@pytest.mark.parametrize(("num_workers", "least", "most"), [(0, 6, 13), (1, -1, 4), (2, -1, 4)])
def test_threads_of_a_run_share_what_they_free(tmp_path, num_workers, least, most):
    """Without a run each thread keeps its own: else nothing would have to be done."""
    (tmp_path / "measure.py").write_text(MEASURE)
    places = [Path(__file__).parent, Path(seg3d_monai.__file__).parents[1]]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, places)), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "measure.py", str(num_workers)]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    kept = float((tmp_path / "kept").read_text())
    assert least < kept < most, kept


COUNT_FAULTS = """
import resource, sys
import torch
from seg3d_monai.data import freed_memory

if sys.argv[1] != "nothing":
    assert getattr(freed_memory, sys.argv[1])()
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


@needs_glibc
def test_a_training_uses_freed_memory_again():
    shares = {}
    for rule in ("keep_freed_memory", "give_back_at_once", "nothing"):
        done = subprocess.run([sys.executable, "-c", COUNT_FAULTS, rule], capture_output=True, text=True, check=True)
        shares[rule] = float(done.stdout)
    assert shares["keep_freed_memory"] < 0.05
    # The C library keeps some or nothing by itself; a few faults more or less are its threads'.
    assert shares["keep_freed_memory"] <= shares["nothing"] <= shares["give_back_at_once"] + 0.01


KEPT_OF_A_LARGE_ARRAY = """
import numpy as np
from seg3d_monai.data.freed_memory import keep_freed_memory, share_one_heap

def resident():
    return 1024 * next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmRSS"))

def kept():
    before = resident()
    large, small = np.ones(100 * 2**20, np.uint8), np.ones(2**16, np.uint8)  # the small one keeps the heap's end
    del large
    return (resident() - before) / 2**20, small

share_one_heap()
in_a_run, first = kept()
keep_freed_memory()
print(in_a_run, kept()[0])
"""


@needs_glibc
def test_large_arrays_go_back_at_once_after_the_network_of_a_run():
    done = subprocess.run([sys.executable, "-c", KEPT_OF_A_LARGE_ARRAY], capture_output=True, text=True, check=True)
    in_a_run, afterwards = map(float, done.stdout.split())
    assert in_a_run > 90
    assert afterwards < 5


FAULTS_OF_A_NETWORK = """
import resource, sys, threading
import numpy as np
from seg3d_monai.data.freed_memory import main_heap_thread, share_one_heap

threads = [threading.Thread(target=lambda: (np.ones(2**20), done.wait())) for _ in range(5)]
done = threading.Event()
[thread.start() for thread in threads]  # with heaps of their own
share_one_heap()
begun = []
thread = main_heap_thread("network", begun.append, 7)
page, size = resource.getpagesize(), 200 * 2**20

def run():
    return [np.ones(size, np.uint8) for _ in range(3)]

def count():
    for _ in range(2):
        run()
    before = resource.getrusage(resource.RUSAGE_THREAD).ru_minflt
    for _ in range(5):
        run()
    return (resource.getrusage(resource.RUSAGE_THREAD).ru_minflt - before) * page / (15 * size)

print(thread.submit(count).result(), threading.active_count(), begun[-1])
done.set()
"""


@needs_glibc
def test_the_thread_of_a_network_uses_its_memory_again_whatever_the_size_of_its_tensors():
    done = subprocess.run([sys.executable, "-c", FAULTS_OF_A_NETWORK], capture_output=True, text=True, check=True)
    share, num_threads, argument = done.stdout.split()
    assert float(share) < 0.01
    assert int(num_threads) == 7, "the main one, five, and no other that was begun in search of the main heap"
    assert argument == "7"


def test_other_systems_are_left_alone(monkeypatch):
    monkeypatch.setattr(sys, "platform", "win32")
    assert not freed_memory.give_back_at_once()
    assert not freed_memory.keep_freed_memory()
    assert not freed_memory.share_one_heap()
    begun = []
    with freed_memory.main_heap_thread("network", begun.append, 7) as thread:
        assert thread.submit(abs, -3).result() == 3
    assert begun == [7]
    freed_memory.give_back()
