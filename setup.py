"""What pyproject.toml cannot say: wheels hold the bundles, and one with compiled operators names its platform.

In the repository the bundles stay at the top level, where an editable installation finds them.
"""

import shutil
from pathlib import Path

from setuptools import Distribution, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
OF_A_BUNDLE = (".json", ".yaml", ".conf", ".md", ".txt")
"""Besides LICENSE and models/model.pt: other weights that somebody trained in place stay where they are."""


def _not_of_a_bundle(folder: str, names: list[str]) -> list[str]:
    """Names in a folder that do not belong into a wheel."""
    place = Path(folder)
    return [
        name
        for name in names
        if name.startswith(".")
        or name == "__pycache__"
        or not (
            (place / name).is_dir()
            or name.endswith(OF_A_BUNDLE)
            or name == "LICENSE"
            or (place.name, name) == ("models", "model.pt")
        )
    ]


class BuildWithBundles(build_py):
    """Copies bundles/ to seg3d_monai/_bundles, links as the files that they lead to."""

    def run(self) -> None:
        """Build into an empty folder: files that an earlier build left would come along."""
        if self.editable_mode:
            super().run()
            return
        package = Path(self.build_lib) / "seg3d_monai"
        shutil.rmtree(package, ignore_errors=True)
        super().run()
        shutil.copytree(ROOT / "bundles", package / "_bundles", ignore=_not_of_a_bundle)


class WheelOfItsPlatform(bdist_wheel):
    """py3-none-any, or py3-none-PLATFORM where seg3d_monai/_lib holds a library: no wheel depends on Python's ABI."""

    def get_tag(self) -> tuple[str, str, str]:
        """Tags of Python, ABI and platform."""
        return ("py3", "none", super().get_tag()[2])


class WithLibraries(Distribution):
    """Libraries that scripts/build_ops put there bind a wheel to the platform, as compiled modules would."""

    def has_ext_modules(self) -> bool:
        """Whether there are any."""
        return any((ROOT / "seg3d_monai" / "_lib").glob("*.so"))


setup(distclass=WithLibraries, cmdclass={"build_py": BuildWithBundles, "bdist_wheel": WheelOfItsPlatform})
