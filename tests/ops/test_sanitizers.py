"""The tests of the CPU kernels once more, on a library with AddressSanitizer and UndefinedBehaviorSanitizer."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest

from seg3d_monai.ops.build import BuildError, compile_library, cpu_recipe, find_compiler

FLAGS = ("-O1", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer")
HERE = Path(__file__).parent
TESTS = (
    "test_fuzz.py",
    "test_roi_align3d.py",
    "test_ms_deform_attn3d.py",
    "test_nms3d.py",
    "test_match_boxes3d.py",
    "test_mask_targets3d.py",
    "test_paste_masks3d.py",
    "test_labels.py",
    "test_layer_norm.py",
    "test_group_norm.py",
)
RUN = """
import sys, pytest
from seg3d_monai.ops import status
print(status()[0]["library"], flush=True)
sys.exit(pytest.main(sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """Environment of a process whose operators come from the sanitized library."""
    recipe = cpu_recipe()
    plain = tuple(flag for flag in recipe.compiler if flag != "-O3")
    sanitized = dataclasses.replace(recipe, compiler=(*plain, *FLAGS), linker=(*recipe.linker, *FLAGS))
    cache = tmp_path_factory.mktemp("sanitized")
    try:
        # Under the name of the usual library, so that the package takes it from the cache.
        library = cache / "seg3d_monai" / f"{recipe.key}.so"
        compile_library(library, sanitized)
    except BuildError as error:
        pytest.skip(f"this compiler has no sanitizers: {error}")
    runtimes = []
    for name in ("libasan.so", "libubsan.so"):
        command = [*find_compiler(), f"-print-file-name={name}"]
        runtimes.append(subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip())
    return {
        **os.environ,
        "XDG_CACHE_HOME": str(cache),
        "SEG3D_OPS": "compiled",
        "LD_PRELOAD": ":".join(runtimes),
        "ASAN_OPTIONS": "detect_leaks=0",  # Python itself leaks at exit
        "OMP_NUM_THREADS": "2",
        "EXPECTED_LIBRARY": str(library),
    }


def test_nothing_is_read_or_written_out_of_place(environment):
    # Compiling models and many threads say nothing about the kernels, and take minutes here.
    chosen = "not reference and not compiles and not exports and not own_checks and not 70000"
    command = [sys.executable, "-c", RUN, "-q", "-x", "-p", "no:cacheprovider", "-k", chosen]
    result = subprocess.run(
        [*command, *(str(HERE / name) for name in TESTS)],
        env=environment,
        capture_output=True,
        text=True,
        cwd=HERE.parent.parent,
    )
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    assert result.stdout.splitlines()[0] == environment["EXPECTED_LIBRARY"]
    assert " passed" in result.stdout
