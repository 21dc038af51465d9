"""Says what this machine offers: versions, processor, GPU, the path the ops take, optional extras, disk.

It reports and changes nothing (asking for the ops may compile them once, as the first use would). A missing optional
part is a line with its mend, never a failure.
"""

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

from seg3d_monai import __version__

DEPENDENCIES = (
    "torch",
    "monai",
    "pytorch-ignite",
    "numpy",
    "scipy",
    "scikit-image",
    "zarr",
    "tifffile",
    "imagecodecs",
    "nibabel",
    "pyarrow",
    "pandas",
)

# extra of pyproject.toml -> modules that it brings
EXTRAS = {
    "cluster": ("ray", "deepspeed"),
    "view": ("napari", "napari_ome_zarr"),
    "formats": ("pylibCZIrw", "h5py", "hdf5plugin", "z5py", "aiohttp"),
    "tracking": ("tensorboard", "mlflow"),
    "export": ("onnx", "onnxruntime", "onnxscript"),
    "share": ("jsonschema", "safetensors", "yaml"),
    "dev": ("pytest", "ruff", "mypy"),
}


def print_report() -> None:
    """Print one line a fact to stdout."""
    for name, value in facts():
        print(f"{name:<16} {value}", flush=True)


def facts() -> Iterator[tuple[str, str]]:
    """Name and value of each fact, in the order of printing."""
    yield "seg3d_monai", f"{__version__} ({Path(__file__).resolve().parent})"
    yield "python", f"{platform.python_version()} ({sys.executable})"
    yield "system", platform.platform()
    for name in DEPENDENCIES:
        yield name, _version(name)
    yield "threads", _threads()
    yield "memory", _memory()
    yield "bfloat16", _bfloat16()
    yield "gpu", _gpu()
    yield "compiler", shutil.which(os.environ.get("CXX", "c++")) or "none; install a C++ compiler for compiled ops"
    yield "ops", _ops()
    for extra, modules in EXTRAS.items():
        missing = [module for module in modules if importlib.util.find_spec(module) is None]
        hint = f'without {", ".join(missing)}; pip install "seg3d_monai[{extra}]"'
        yield f"extra {extra}", hint if missing else "installed"
    free = shutil.disk_usage(Path.cwd()).free
    yield "free disk", f"{free / 2**30:.1f} GiB in the working directory"


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return f"missing; pip install {name}"


def _threads() -> str:
    import torch

    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    setting = os.environ.get("OMP_NUM_THREADS", "unset")
    return f"{torch.get_num_threads()} used by torch, {usable} usable cores, OMP_NUM_THREADS {setting}"


def _memory() -> str:
    if not hasattr(os, "sysconf") or "SC_PHYS_PAGES" not in os.sysconf_names:
        return "unknown on this system"
    return f"{os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') / 2**30:.1f} GiB"


def _bfloat16() -> str:
    """Whether the processor multiplies bfloat16 natively, where autocast then halves the time of convolutions."""
    from seg3d_monai.inference.precision import autocast_dtype

    has_bf16 = autocast_dtype("auto", "cpu") is not None
    return "native on this CPU (AVX512-BF16)" if has_bf16 else "no AVX512-BF16 on this CPU; autocast gains little"


def _gpu() -> str:
    import torch

    if not torch.cuda.is_available():
        built = f"torch is built for CUDA {torch.version.cuda}" if torch.version.cuda else "torch is a CPU build"
        return f"none ({built})"
    names = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
    return f"{', '.join(names)} (CUDA {torch.version.cuda})"


def _ops() -> str:
    """Which operators are compiled, from which file, and why others are not."""
    from seg3d_monai.ops import status

    paths: dict[str, list[str]] = {}
    for row in status():
        where = row["library"] or row["reason"]
        path = f"{row['path']} on {row['device']}" + (f" ({where})" if where else "")
        paths.setdefault(path, []).append(str(row["op"]))
    return "; ".join(f"{', '.join(names)}: {path}" for path, names in paths.items())
