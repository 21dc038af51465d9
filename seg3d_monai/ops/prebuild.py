"""Build the library ahead of time, into the package, for any machine of this kind; scripts/build_ops runs this."""

import sys

from seg3d_monai.ops.build import BuildError, compile_library, find_compiler
from seg3d_monai.ops.loading import prebuilt_library


def main() -> int:
    """Build the library without -march=native, drop those of older sources, print its path; the exit code."""
    target = prebuilt_library()
    try:
        compile_library(target, find_compiler(), [])
    except BuildError as error:
        print(f"build_ops: {error}", file=sys.stderr)
        return 1
    for old in target.parent.glob("ops-*.so"):
        if old != target:
            old.unlink()
    print(target)
    return 0


if __name__ == "__main__":
    sys.exit(main())
