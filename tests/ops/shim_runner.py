"""Build the programs of cuda_shim/ under sanitizers and run them: the CUDA kernels' bodies, executed on the CPU."""

import functools
import os
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from seg3d_monai.ops.build import CSRC, find_compiler

SHIM = Path(__file__).parent / "cuda_shim"
FLAGS = [
    "-std=c++20",
    "-O1",
    "-g1",
    "-Wall",
    "-Wno-unknown-pragmas",
    "-ffp-contract=off",
    "-fsanitize=address,undefined",
    "-fno-sanitize-recover=all",
]


@dataclass
class Run:
    """What a run left: arrays by name, 32-byte sectors touched by all warps, and the fewest that would have done."""

    folder: Path
    sectors: int
    least: int

    def array(self, name, dtype):
        """All values of an array, in the order in which they lie in memory."""
        raw = np.fromfile(self.folder / f"{name}.bin", dtype=np.uint8)
        return torch.from_numpy(raw).view(dtype)


@functools.cache
def build_folder():
    return tempfile.TemporaryDirectory(prefix="cuda_shim")


@functools.cache
def build(program):
    """Path of a program, compiled once per test session."""
    made = Path(build_folder().name) / program
    torch_include = Path(torch.__file__).parent / "include"
    includes = [f"-I{CSRC}", f"-I{SHIM}", "-isystem", str(torch_include)]
    command = [*find_compiler(), *FLAGS, *includes, str(SHIM / f"{program}.cpp"), "-o", str(made)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return made


def start(program, folder, arrays, seed=0, **values):
    """Run a program in `folder`; its CompletedProcess, however it ended. A tensor's memory is passed as it lies."""
    for name, array in arrays.items():
        (folder / f"{name}.bin").write_bytes(array.detach().flatten().view(torch.uint8).numpy().tobytes())
    values = {name: int(value) if isinstance(value, bool | np.bool_) else value for name, value in values.items()}
    (folder / "call.txt").write_text("".join(f"{name} {value}\n" for name, value in {"seed": seed, **values}.items()))
    environment = {**os.environ, "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0"}
    return subprocess.run([build(program), folder], capture_output=True, text=True, env=environment, timeout=300)


def run(program, folder, arrays, seed=0, **values):
    """Run a program that must succeed; its results."""
    folder.mkdir(exist_ok=True)
    result = start(program, folder, arrays, seed, **values)
    assert result.returncode == 0, result.stderr[-4000:]
    sectors, least = (int(word) for word in (folder / "traffic.txt").read_text().split())
    return Run(folder, sectors, least)
