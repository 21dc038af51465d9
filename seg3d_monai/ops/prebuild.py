"""Build the libraries ahead of time, into the package, for any machine of this kind; scripts/build_ops runs this."""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

from seg3d_monai.ops.build import AVX512_FLAGS, BuildError, Recipe, compile_library, cpu_recipe
from seg3d_monai.ops.build_cuda import cuda_recipe
from seg3d_monai.ops.loading import prebuilt_cuda_library, prebuilt_library

CAPABILITIES = [(8, 0), (9, 0), (10, 0)]
"""Compute capabilities that the CUDA kernels are prebuilt for; later ones take the PTX of the last."""


def main(arguments: list[str] | None = None) -> int:
    """Build the libraries without -march=native, drop those of older sources, print their paths; the exit code."""
    parser = argparse.ArgumentParser(prog="build_ops", description=__doc__)
    parser.add_argument("--cuda", action="store_true", help="also the CUDA kernels; needs nvcc, but no GPU")
    parser.add_argument("--avx512", action="store_true", help="also one for x86-64 with AVX-512, which is taken there")
    options = parser.parse_args(arguments)
    wanted: list[tuple[Path, Callable[[], Recipe]]] = [(prebuilt_library(), lambda: cpu_recipe(native=False))]
    if options.avx512:
        wanted.append((prebuilt_library("avx512"), lambda: cpu_recipe(native=False, flags=AVX512_FLAGS)))
    if options.cuda:
        wanted.append((prebuilt_cuda_library(), lambda: cuda_recipe(CAPABILITIES)))
    current = {prebuilt_library(), prebuilt_library("avx512"), prebuilt_cuda_library()}
    for target, recipe in wanted:
        try:
            compile_library(target, recipe())
        except BuildError as error:
            print(f"build_ops: {error}", file=sys.stderr)
            return 1
        print(target)
    for old in prebuilt_library().parent.glob("ops-*.so"):
        if old not in current:
            old.unlink()
    return 0


if __name__ == "__main__":
    sys.exit(main())
