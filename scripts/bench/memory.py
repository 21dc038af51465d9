"""Peak extra memory of one call: what it needs at its worst moment beyond its inputs and its results.

On the CPU a fresh process makes the call and asks the system for the process's own peak of resident memory (VmHWM,
reset just before through /proc/self/clear_refs), because torch's allocator does not see what C++ allocates for itself.
A smaller call comes first, so that threads and code are already there, and glibc gives back what is freed at once.
On CUDA it is the peak of torch's allocator, which the kernels take their scratch from.

    python -m bench.memory OP/NAME cpu|cuda THREADS quick|full    prints one JSON line; the parent calls this
"""

import ctypes
import gc
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import torch

from bench.problem import Problem, forward, forward_backward, num_bytes

METHOD = (
    "a fresh process: growth of VmHWM (reset through /proc/self/clear_refs) over the resident memory before the call, "
    "less the results; on CUDA the peak of torch's allocator"
)


def peak_extra_bytes(case: str, device: str, threads: int, is_quick: bool) -> dict[str, int]:
    """Extra bytes of our forward, and of forward + backward if there is one; empty where it cannot be measured."""
    if device == "cpu" and not Path("/proc/self/clear_refs").exists():
        return {}
    # A fixed threshold keeps glibc from holding back freed blocks, which a later call would take unseen.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    command = [sys.executable, "-P", "-m", "bench.memory", case, device, str(threads), "quick" if is_quick else "full"]
    child = subprocess.run(command, env=environment, capture_output=True, text=True)
    if child.returncode != 0:
        raise RuntimeError(f"measuring the memory of {case} failed:\n{child.stderr[-2000:]}")
    measured: dict[str, int] = json.loads(child.stdout.splitlines()[-1])
    return measured


def measure_here(problem: Problem, small: Problem) -> dict[str, int]:
    """Extra bytes of each pass of `problem` in this process, after the same of `small`."""
    passes = {"forward": lambda p, grad: forward(p.ours, p)}
    if problem.differentiable:
        passes["forward + backward"] = lambda p, grad: forward_backward(p.ours, p, grad)
    extra = {}
    for name, run in passes.items():
        grads = [p.gradient_of_output() if problem.differentiable else None for p in (small, problem)]
        run(small, grads[0])
        gc.collect()
        peak = CudaPeak() if problem.device.type == "cuda" else ResidentPeak()
        results = run(problem, grads[1])
        extra[name] = max(0, peak.growth() - num_bytes(*results))
        del results
    return extra


class ResidentPeak:
    """How far this process's resident memory has been above what it was when this object was made (Linux)."""

    def __init__(self) -> None:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from now
        self.before = _status_bytes("VmRSS")

    def growth(self) -> int:
        """Bytes."""
        return _status_bytes("VmHWM") - self.before


class CudaPeak:
    """How far torch's CUDA allocator has been above what it held when this object was made."""

    def __init__(self) -> None:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        self.before = torch.cuda.memory_allocated()

    def growth(self) -> int:
        """Bytes."""
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - self.before


def _status_bytes(field: str) -> int:
    match = re.search(rf"^{field}:\s*(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert match is not None
    return int(match[1]) * 1024


if __name__ == "__main__":
    from bench.cases import CASES

    wanted, device, threads, size = sys.argv[1:]
    torch.set_num_threads(int(threads))
    case = next(case for case in CASES if f"{case.op}/{case.name}" == wanted)
    small, problem = (case.problem(device, torch.float32, is_quick) for is_quick in (True, size == "quick"))
    print(json.dumps(measure_here(problem, small)))
