"""Where and with what a result was measured: hardware, versions, the operators' path. No name or place of a machine."""

import importlib.metadata
import os
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

import torch

import seg3d_monai
from seg3d_monai.ops import build, status


def hardware(device: str) -> dict[str, Any]:
    """Processor, cores that this process may use, memory, how busy the machine is, and the GPU if it is measured."""
    try:
        model = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        model = None
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    memory_gb = round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1)
    found = {
        "cpu": model[1] if model else platform.processor() or platform.machine(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cores": cores,
        "memory_gb": memory_gb,
        "load_average": round(os.getloadavg()[0], 2),
    }
    return {**found, "gpu": torch.cuda.get_device_name()} if device == "cuda" else found


def versions() -> dict[str, str]:
    """Python, torch, monai, this package and the C++ compiler that it finds."""
    try:
        compiler = subprocess.run([*build.find_compiler(), "--version"], capture_output=True, text=True).stdout
    except (build.BuildError, OSError) as error:
        compiler = str(error)
    found = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "monai": importlib.metadata.version("monai"),
        "seg3d_monai": seg3d_monai.__version__,
        "compiler": compiler.splitlines()[0],
    }
    return {**found, "cuda": torch.version.cuda or ""} if torch.cuda.is_available() else found


def operators() -> list[dict[str, str | None]]:
    """`seg3d_monai.ops.status()`, with the library's name in place of its path."""
    return [{**op, "library": op["library"] and Path(op["library"]).name} for op in status()]
