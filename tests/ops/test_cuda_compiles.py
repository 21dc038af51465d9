"""Every CUDA source compiles for the architectures we name, and no kernel spills or needs a stack."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from seg3d_monai.ops.build import CSRC

CHECK = Path(__file__).resolve().parents[2] / "scripts" / "check_cuda"


def check(*arguments, **environment):
    return subprocess.run(
        [CHECK, *map(str, arguments)], capture_output=True, text=True, env={**os.environ, **environment}
    )


needs_nvcc = pytest.mark.skipif(shutil.which(os.environ.get("NVCC", "nvcc")) is None, reason="no nvcc on this machine")


@needs_nvcc
def test_all_sources_compile_without_spill_or_stack():
    result = check()
    assert result.returncode == 0, result.stdout + result.stderr
    kernels = set(re.findall(r"^__global__.*?\b(\w+)\(", "\n".join(all_kernels()), re.MULTILINE))
    reported = set(re.findall(r"^(\w+)", result.stdout, re.MULTILINE))
    assert kernels
    assert kernels <= reported
    assert {row.split()[-5] for row in result.stdout.splitlines() if " sm_" in row} == {"sm_80", "sm_90", "sm_100"}


def all_kernels():
    """Each kernel's declaration on one line."""
    for file in sorted((CSRC / "cuda").glob("*.cuh")):
        for words in re.findall(r"__global__\s[^{]*", file.read_text()):
            yield re.sub(r"__launch_bounds__\([^)]*\)", "", " ".join(words.split()))


@needs_nvcc
def test_a_stack_frame_fails_the_check(tmp_path):
    source = tmp_path / "stack.cu"
    source.write_text(
        "__global__ void stack(const int* at, int* out) {\n"
        "  int values[64];\n"
        "  for (int i = 0; i < 64; ++i) values[at[i]] = i;\n"
        "  out[0] = values[at[64]];\n"
        "}\n"
    )
    result = check(source)
    assert result.returncode == 1
    assert "stack spills or needs a stack on sm_80" in result.stderr


def test_without_nvcc_the_check_says_so():
    for arguments, code in ((), 2), (("--if-available",), 0):
        result = check(*arguments, NVCC="no-such-compiler")
        assert result.returncode == code
        assert "not checked, nvcc" in result.stderr
