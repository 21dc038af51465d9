"""Compile the CUDA sources and read ptxas' report on each kernel; scripts/check_cuda runs this.

Exit code: 0 all kernels compile and none spills or has a stack frame; 1 some do not; 2 nvcc or torch is missing (0 with
--if-available).
"""

import argparse
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

CSRC = Path(__file__).resolve().parent.parent / "seg3d_monai" / "csrc"
ARCHITECTURES = ("80", "90", "100")
FLAGS = (
    "-std=c++20",
    "-DUSE_CUDA",
    "-DTORCH_TARGET_VERSION=0x020a000000000000",
    "--expt-relaxed-constexpr",
    "-Xptxas",
    "-v",
)
ENTRY = re.compile(r"Compiling entry function '(\S+)' for 'sm_(\d+)\w*'")
STACK = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
USED = re.compile(r"Used (\d+) registers(?:.*?(\d+) bytes smem)?")


@dataclass(frozen=True)
class Kernel:
    """What ptxas says of one kernel for one architecture; sizes in bytes a thread, shared memory a block."""

    name: str
    architecture: str
    registers: int
    spill: int
    stack: int
    shared: int


def main() -> int:
    """Compile, print the table, and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--if-available", action="store_true", help="succeed where nvcc or torch is missing")
    parser.add_argument("files", nargs="*", type=Path, metavar="FILE.cu", help="sources; by default all of the package")
    options = parser.parse_args()
    nvcc = shutil.which(os.environ.get("NVCC", "nvcc"))
    torch = importlib.util.find_spec("torch")
    if nvcc is None or torch is None or torch.origin is None:
        missing = "nvcc (the CUDA toolkit; $NVCC or the PATH)" if nvcc is None else "torch (its headers)"
        print(f"check_cuda: not checked, {missing} was not found", file=sys.stderr)
        return 0 if options.if_available else 2
    files = options.files or sorted((CSRC / "cuda").glob("*.cu"))
    include = Path(torch.origin).parent / "include"
    jobs = [(file, architecture) for architecture in ARCHITECTURES for file in files]
    with ThreadPoolExecutor(max_workers=os.cpu_count() or 1) as pool:
        outputs = list(pool.map(lambda job: compile_one(nvcc, include, *job), jobs))
    failed = [(job, output) for job, (is_compiled, output) in zip(jobs, outputs, strict=True) if not is_compiled]
    for (file, architecture), output in failed:
        print(f"check_cuda: {file.name} does not compile for sm_{architecture}:\n{output}", file=sys.stderr)
    kernels = [kernel for _, output in outputs for kernel in read_report(output)]
    names = readable_names(nvcc, [kernel.name for kernel in kernels])
    print_table(kernels, names)
    bad = [kernel for kernel in kernels if kernel.spill > 0 or kernel.stack > 0]
    for kernel in bad:
        print(f"check_cuda: {names[kernel.name]} spills or needs a stack on sm_{kernel.architecture}", file=sys.stderr)
    if not failed and not bad:
        print(f"check_cuda: {len(kernels)} kernels, none spills, none needs a stack")
    return 1 if failed or bad or not kernels else 0


def compile_one(nvcc: str, include: Path, file: Path, architecture: str) -> tuple[bool, str]:
    """Whether a source compiles for an architecture, and all that the compiler said.

    The host's half is the same for all architectures, so it is compiled with the first only.
    """
    target = ["-c"] if architecture == ARCHITECTURES[0] else ["-cubin"]
    code = f"arch=compute_{architecture},code=sm_{architecture}"
    with tempfile.TemporaryDirectory() as scratch:
        command = [nvcc, *FLAGS, f"-I{CSRC}", f"-I{include}", "-gencode", code, *target, str(file)]
        result = subprocess.run([*command, "-o", f"{scratch}/made"], capture_output=True, text=True, errors="replace")
    return result.returncode == 0, result.stdout + result.stderr


def read_report(output: str) -> list[Kernel]:
    """The kernels that ptxas reported, in its order."""
    kernels = []
    name, architecture, spill, stack = "", "", 0, 0
    for line in output.splitlines():
        if entry := ENTRY.search(line):
            name, architecture = entry.groups()
        elif sizes := STACK.search(line):
            stack, spill = int(sizes[1]), int(sizes[2]) + int(sizes[3])
        elif (used := USED.search(line)) and name:
            kernels.append(Kernel(name, architecture, int(used[1]), spill, stack, int(used[2] or 0)))
            name = ""
    return kernels


def readable_names(nvcc: str, mangled: list[str]) -> dict[str, str]:
    """Names as in the source, without namespaces and arguments, where a demangler is at hand."""
    beside = Path(nvcc).resolve().parent / "cu++filt"
    demangler = str(beside) if beside.exists() else shutil.which("c++filt")
    if demangler is None or not mangled:
        return {name: name for name in mangled}
    result = subprocess.run([demangler], input="\n".join(mangled), capture_output=True, text=True, check=True)
    plain = [re.sub(r"\(.*|^void |seg3d::|c10::", "", name) for name in result.stdout.splitlines()]
    return dict(zip(mangled, (re.sub(r"\((?:int|bool)\)", "", name) for name in plain), strict=True))


def print_table(kernels: list[Kernel], names: dict[str, str]) -> None:
    """One line a kernel and architecture."""
    rows = [("kernel", "arch", "registers", "spill", "stack", "shared")]
    for kernel in sorted(kernels, key=lambda k: (names[k.name], int(k.architecture))):
        numbers = (kernel.registers, kernel.spill, kernel.stack, kernel.shared)
        rows.append((names[kernel.name], f"sm_{kernel.architecture}", *map(str, numbers)))
    width = max(len(row[0]) for row in rows)
    for row in rows:
        print(f"{row[0]:<{width}}  {row[1]:<6}  {row[2]:>9}  {row[3]:>5}  {row[4]:>5}  {row[5]:>6}")


if __name__ == "__main__":
    sys.exit(main())
