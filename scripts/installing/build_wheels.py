"""Builds the wheels from a copy of the sources, so that nothing that lies about in the work tree comes along."""

import argparse
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from installing.platform_tag import needed_versions, platform_tag

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE", "seg3d_monai", "bundles")


def main(words: list[str] | None = None) -> int:
    """Build the wheels and say what they are; the exit code."""
    parser = argparse.ArgumentParser(prog="scripts/build_wheels", description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "dist", metavar="DIR", help="folder for them, default dist")
    parser.add_argument("--pure", action="store_true", help="only the one without a library, which needs no compiler")
    options = parser.parse_args(words)
    options.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="seg3d_wheels_") as folder:
        try:
            copy = copy_sources(Path(folder) / "sources")
            wheels = [build_wheel(copy, options.out)]
            if not options.pure:
                wheels.append(build_wheel(copy, options.out, tag=compile_operators(copy)))
        except (subprocess.CalledProcessError, ValueError) as error:
            print(f"build_wheels: error: {error}", file=sys.stderr)
            return 1
    for wheel in wheels:
        print(f"{wheel}  {wheel.stat().st_size / 1e6:.1f} MB")
    return 0


def copy_sources(target: Path) -> Path:
    """Copy what a wheel is made of, without caches and compiled libraries.

    Args:
        target: folder to make.
    """
    target.mkdir(parents=True)
    ignore = shutil.ignore_patterns("__pycache__", "_lib", "_bundles", "*.so", ".*")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, target / name, symlinks=True, ignore=ignore)
        else:
            shutil.copy2(ROOT / name, target / name)
    return target


def compile_operators(copy: Path) -> str | None:
    """Compile the CPU's operators into a copy of the sources; for x86-64 also those that take AVX-512.

    Returns:
        The tag of a wheel that carries them; None leaves it to setuptools, where this is not Linux.
    """
    avx512 = ["--avx512"] if platform.machine().lower() in ("x86_64", "amd64") else []
    print(f"compiling the operators{' twice, the second time for AVX-512' if avx512 else ''}; minutes each", flush=True)
    environment = {**os.environ, "PYTHONPATH": str(copy), "SEG3D_OPS": "reference"}
    command = [sys.executable, "-P", "-m", "seg3d_monai.ops.prebuild", *avx512]
    subprocess.run(command, cwd=copy, env=environment, check=True, stdout=subprocess.DEVNULL)
    libraries = sorted((copy / "seg3d_monai" / "_lib").glob("*.so"))
    if sys.platform != "linux":
        return None
    for library in libraries:
        subprocess.run(["strip", "--strip-unneeded", str(library)], check=True)
        needs = [f"{family}_{'.'.join(map(str, last))}" for family, last in sorted(needed_versions(library).items())]
        print(f"{library.name} needs {', '.join(needs)}", flush=True)
    return platform_tag(libraries)


def build_wheel(copy: Path, out: Path, tag: str | None = None) -> Path:
    """Build a wheel from a copy of the sources.

    Args:
        copy: the sources.
        out: folder for it; a wheel of the same name is replaced.
        tag: its platform; None leaves it to setuptools.
    """
    shutil.rmtree(copy / "build", ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix="wheel_", dir=out) as folder:
        command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", folder, str(copy)]
        if has_setuptools():  # so that it needs no network
            command.append("--no-build-isolation")
        if tag is not None:
            command.append(f"--config-settings=--build-option=--plat-name={tag}")
        subprocess.run(command, check=True)
        (made,) = Path(folder).glob("*.whl")
        return made.replace(out / made.name)


def has_setuptools() -> bool:
    """Whether this environment's setuptools is as pyproject.toml wants it."""
    try:
        return int(version("setuptools").partition(".")[0]) >= 77
    except PackageNotFoundError:
        return False


if __name__ == "__main__":
    sys.exit(main())
