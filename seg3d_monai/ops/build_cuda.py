"""How the library of CUDA kernels is built: with nvcc, for the GPUs of this machine or for those named."""

import os
import shutil
from pathlib import Path

import torch

from seg3d_monai.ops import build
from seg3d_monai.ops.build import BuildError, Recipe

FLAGS = (
    "-std=c++20",
    "-O3",
    "-DUSE_CUDA",
    "-DTORCH_TARGET_VERSION=0x020a000000000000",
    "--expt-relaxed-constexpr",
    "-Xcompiler=-fPIC,-fvisibility=hidden",
)


def cuda_sources() -> tuple[Path, ...]:
    """The CUDA files, sorted."""
    return tuple(sorted(build.CSRC.glob("cuda/*.cu")))


def find_nvcc() -> Path:
    """The CUDA compiler: $CUDACXX, $CUDA_HOME/bin/nvcc, the PATH's, or /usr/local/cuda/bin/nvcc.

    Raises:
        BuildError: there is none.
    """
    wanted = os.environ.get("CUDACXX")
    home = os.environ.get("CUDA_HOME")
    places = [wanted] if wanted else [f"{home}/bin/nvcc"] if home else ["nvcc", "/usr/local/cuda/bin/nvcc"]
    for place in places:
        found = shutil.which(place)
        if found:
            return Path(found)
    raise BuildError(f"no CUDA compiler was found (looked for {' and '.join(places)}; $CUDACXX names another)")


def cuda_recipe(capabilities: list[tuple[int, int]]) -> Recipe:
    """How the CUDA library is built for GPUs of these compute capabilities; the highest one also as PTX for later GPUs.

    Raises:
        BuildError: there is no nvcc, it does not run, or its major version is not that of torch.
    """
    nvcc = find_nvcc()
    version = build.run([str(nvcc), "--version"])
    release = version.partition("release ")[2].partition(",")[0]
    if torch.version.cuda is not None and release.split(".")[0] != torch.version.cuda.split(".")[0]:
        raise BuildError(f"{nvcc} is of CUDA {release}, torch of CUDA {torch.version.cuda}; install a matching toolkit")
    names = sorted({f"{major}{minor}" for major, minor in capabilities}, key=int)
    codes = [f"-gencode=arch=compute_{name},code=sm_{name}" for name in names]
    codes.append(f"-gencode=arch=compute_{names[-1]},code=compute_{names[-1]}")
    libraries = ["-ltorch_cpu", *(["-ltorch_cuda"] if torch.version.cuda is not None else []), "-lcudart"]
    return Recipe(
        name="ops-cuda",
        sources=cuda_sources(),
        compiler=(str(nvcc), *FLAGS, *codes, f"-I{build.CSRC}", "-isystem", str(build.torch_folder() / "include")),
        linker=(str(nvcc), "-shared", "--cudart=shared"),
        libraries=(f"-L{build.torch_folder() / 'lib'}", *libraries),
        fingerprint=(version, torch.__version__),
    )
