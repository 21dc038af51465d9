"""Peak extra memory of one call: what it needs at its worst moment beyond its inputs and its results.

On the CPU a fresh process makes the call and asks the system for the process's own peak of resident memory (VmHWM,
reset just before through /proc/self/clear_refs), because torch's allocator does not see what C++ allocates for itself.
A smaller call comes first, so that threads and code are already there, and glibc gives back at once what is freed.
On CUDA it is the peak of torch's allocator, which the kernels take their scratch from.
"""

import ctypes
import gc
import multiprocessing
import re
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch

from bench.problem import Problem, forward, forward_backward, num_bytes

METHOD = (
    "a fresh process: growth of VmHWM (reset through /proc/self/clear_refs) over the resident memory before the call, "
    "less the results; on CUDA the peak of torch's allocator"
)


M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # mallopt's names for them, from malloc.h


def peak_extra_bytes(case: str, device: str, threads: int, is_quick: bool) -> dict[str, int]:
    """Extra bytes of our forward, and of forward + backward if there is one; empty where it cannot be measured."""
    if device == "cpu" and not Path("/proc/self/clear_refs").exists():
        return {}
    # The fork server imports once and computes nothing: each of its children begins without threads or scratch.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["bench.cases", "seg3d_monai.ops"])
    with ProcessPoolExecutor(1, mp_context=context, max_tasks_per_child=1) as fresh_process:
        return fresh_process.submit(_measure_case, case, device, threads, is_quick).result()


def _measure_case(wanted: str, device: str, threads: int, is_quick: bool) -> dict[str, int]:
    from bench.cases import CASES

    # Fixed thresholds keep glibc from holding back freed blocks, which a later call would take unseen.
    libc = ctypes.CDLL(None)
    libc.mallopt(M_MMAP_THRESHOLD, 65536)
    libc.mallopt(M_TRIM_THRESHOLD, 65536)
    torch.set_num_threads(threads)
    case = next(case for case in CASES if case.full_name == wanted)
    return measure_here(case.problem(device, torch.float32, is_quick), case.problem(device, torch.float32, True))


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
