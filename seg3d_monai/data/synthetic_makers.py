"""What the volumes of a synthetic specimen are made by: one microscope and its nuclei, or scenes of a recipe.

It must not know files.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Protocol

import numpy as np

from seg3d_monai.data.synthesis import Recipe, Scene, SyntheticStack
from seg3d_monai.data.synthesis.contrast import visible_scene
from seg3d_monai.data.synthesis.scene import Voxels
from seg3d_monai.data.synthesis.stack import IGNORED
from seg3d_monai.data.synthetic_imaging import ImagingModel
from seg3d_monai.data.synthetic_nuclei import NucleiModel
from seg3d_monai.data.synthetic_slabs import SlabStack
from seg3d_monai.data.synthetic_volume import make_volume_with_classes
from seg3d_monai.data.volume import Roi, Spacing, Volume

Array = np.ndarray
Shape = tuple[int, int, int]


class Maker(Protocol):
    """Makes volumes; each is a function of its seed, its shape and its depth."""

    def described(self) -> dict[str, Any]:
        """What the volumes follow from beside that, as JSON takes it."""

    def spacing_um(self, seed: Sequence[int]) -> Spacing:
        """(z, y, x) micrometres per voxel of a volume."""

    def volume(self, shape: Shape, seed: Sequence[int], depth_um: float) -> tuple[Array, Array, Array]:
        """Image uint16 [Z, Y, X] or [2, Z, Y, X], labels uint32 [Z, Y, X], and the class of each id from 1."""

    def stack(self, shape: Shape, seed: Sequence[int], depth_um: float) -> tuple[Volume, Volume, Array]:
        """The same some planes or tiles at a time; other voxels."""


@dataclass(frozen=True)
class Microscope:
    """One microscope and one kind of nuclei, as `make_volume` takes them."""

    spacing: Spacing
    channels: int
    num_classes: int
    nuclei: NucleiModel
    imaging: ImagingModel

    def described(self) -> dict[str, Any]:
        """See `Maker`."""
        models = {"nuclei": asdict(self.nuclei), "imaging": asdict(self.imaging)}
        return {"spacing_um": list(self.spacing), **models}

    def spacing_um(self, seed: Sequence[int]) -> Spacing:
        """See `Maker`."""
        return self.spacing

    def volume(self, shape: Shape, seed: Sequence[int], depth_um: float) -> tuple[Array, Array, Array]:
        """See `Maker`."""
        return make_volume_with_classes(shape, seed=seed, depth_um=depth_um, **self._looks())

    def stack(self, shape: Shape, seed: Sequence[int], depth_um: float) -> tuple[Volume, Volume, Array]:
        """See `Maker`."""
        stack = SlabStack(shape, seed=seed, depth_um=depth_um, **self._looks())
        return stack.image, stack.labels, stack.classes

    def _looks(self) -> dict[str, Any]:
        return {
            "spacing_um": self.spacing,
            "channels": self.channels,
            "num_classes": self.num_classes,
            "nuclei": self.nuclei,
            "imaging": self.imaging,
        }


@dataclass(frozen=True)
class Scenes:
    """A scene of a recipe for each volume.

    A density that is given as a number must be reached; of one that is a range a volume gets as much as has room.

    Args:
        recipe: where scenes are drawn from; it says how deep they lie.
        spacing: voxel size of all volumes; None leaves it to the recipe.
        channels: 1 or 2.
    """

    recipe: Recipe
    spacing: Spacing | None
    channels: int

    def described(self) -> dict[str, Any]:
        """See `Maker`."""
        return {"recipe": self.recipe.described(), "spacing_um": self.spacing and list(self.spacing)}

    def spacing_um(self, seed: Sequence[int]) -> Spacing:
        """See `Maker`."""
        return self._scene(seed).voxels.spacing_um

    def volume(self, shape: Shape, seed: Sequence[int], depth_um: float) -> tuple[Array, Array, Array]:
        """See `Maker`."""
        image, labels = self._stack(shape, seed).whole()
        num_ids = int(labels.max(where=labels != IGNORED, initial=0))
        return image[0] if self.channels == 1 else image, labels, np.zeros(num_ids, np.int64)

    def stack(self, shape: Shape, seed: Sequence[int], depth_um: float) -> tuple[Volume, Volume, Array]:
        """See `Maker`."""
        image, labels = self._stack(shape, seed).volumes()
        return image, labels, np.zeros(labels.num_ids, np.int64)

    def _scene(self, seed: Sequence[int]) -> Scene:
        scene = visible_scene(self.recipe, seed)
        if self.spacing is None:
            return scene
        z, y, _ = self.spacing
        return replace(scene, voxels=Voxels(plane_um=y, anisotropy=z / y))

    def _stack(self, shape: Shape, seed: Sequence[int]) -> SyntheticStack:
        is_range = isinstance(self.recipe.ranges["objects"]["fill"], tuple)
        return SyntheticStack(self._scene(seed), shape, channels=self.channels, any_density=is_range)


def middle_of(volume: Volume) -> Roi:
    """The chunk in the middle of a volume, a region that is cheap to make."""
    low, high = [], []
    for size, chunk in zip(volume.shape[1:], volume.chunk_shape, strict=True):
        number = -(-size // chunk) // 2
        low.append(number * chunk)
        high.append(min((number + 1) * chunk, size))
    return (low[0], low[1], low[2], high[0], high[1], high[2])
