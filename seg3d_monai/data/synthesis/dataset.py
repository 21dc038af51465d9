"""Synthetic training crops that are made when they are asked for: nothing is written, nothing is seen twice.

An item is a function of (seed, epoch, position), as of `CropDataset`, whose place this dataset takes.

It must not know models, losses or files but that of a recipe.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from seg3d_monai.data.crop_dataset import CropSample, Transform, check_crops, epoch_and_position
from seg3d_monai.data.intensity import measure_intensity
from seg3d_monai.data.synthesis.contrast import visible_scene
from seg3d_monai.data.synthesis.presets import preset
from seg3d_monai.data.synthesis.scene import Recipe
from seg3d_monai.data.synthesis.stack import SyntheticStack
from seg3d_monai.data.targets import derive_targets
from seg3d_monai.data.volume import ArrayVolume

MAX_DRAWS = 100
"""Scenes that are drawn for a crop; of those whose objects are larger than the crop none is taken."""


class SyntheticCropDataset(Dataset[CropSample]):
    """Crops of scenes, a new scene for each.

    Args:
        recipe: a recipe, the name of a preset, or a JSON file.
        num_samples: items per epoch.
        crop_size: (z, y, x) voxels.
        seed: of every draw.
        channels: 1, or 2 for nuclei and membranes apart.
        transform: as of `CropDataset`; a recipe varies geometry and intensity itself.
        percentiles: of a crop, that become 0 and 1.
        min_voxels: visible voxels below which a cut object becomes ignore.
        min_visible: share of an object, as large as it would be alone, below which it becomes ignore. Slivers at the
            borders of crops teach a network to find them at every border.

    Attributes:
        spacing_um: None; crops have many voxel sizes, and a network learns objects by their voxels.
        num_channels: as given.

    Raises:
        ValueError: arguments out of range, or a recipe that does not exist or contradicts itself.
        FileNotFoundError: there is no such file.
    """

    spacing_um = None

    def __init__(
        self,
        recipe: Recipe | str | os.PathLike[str],
        *,
        num_samples: int,
        crop_size: Sequence[int],
        seed: int = 0,
        channels: int = 1,
        transform: Transform | None = None,
        percentiles: tuple[float, float] = (1.0, 99.8),
        min_voxels: int = 20,
        min_visible: float = 0.3,
    ) -> None:
        size = tuple(int(n) for n in crop_size)
        check_crops(crop_size=size, num_samples=num_samples, seed=seed, min_visible=min_visible)
        self.recipe = recipe if isinstance(recipe, Recipe) else read_recipe(recipe)
        self.num_samples, self.crop_size, self.seed, self.num_channels = int(num_samples), size, int(seed), channels
        self.transform = transform
        self._percentiles = (float(percentiles[0]), float(percentiles[1]))
        self._min_voxels, self._min_visible = int(min_voxels), float(min_visible)

    def __len__(self) -> int:
        return self.num_samples

    def __getitem__(self, item: int | tuple[int, int]) -> CropSample:
        """Make one crop.

        Args:
            item: (epoch, position), or a position of epoch 0.

        Raises:
            IndexError: if the position is not below `num_samples`.
            ValueError: the recipe has no scene whose objects fit into a crop.
        """
        epoch, position = epoch_and_position(item, self.num_samples)
        stack = self._stack(epoch, position)
        image, labels, sizes = stack.whole_with_sizes()
        intensity = measure_intensity(ArrayVolume(image, stack.spacing_um), self._percentiles)
        data: dict[str, Any] = {
            "image": torch.from_numpy(intensity.normalise(image)),
            "label": torch.from_numpy(labels.view(np.int32)[None]),  # `IGNORED` becomes -1
        }
        if self.transform is not None:
            data["spacing_um"] = torch.tensor(stack.spacing_um, dtype=torch.float64)
            if hasattr(self.transform, "set_random_state"):
                self.transform.set_random_state(seed=int(np.random.default_rng(stack.scene.seed).integers(2**32)))
            data = dict(self.transform(data))
        targets = derive_targets(
            data["label"][0],
            full_voxels=dict(enumerate(sizes.astype(int).tolist(), start=1)),
            min_voxels=self._min_voxels,
            min_visible=self._min_visible,
        )
        z, y, x = self.crop_size
        return CropSample(
            image=data["image"], targets=targets, crop_id=position, volume="synthetic", roi=(0, 0, 0, z, y, x)
        )

    def _stack(self, epoch: int, position: int) -> SyntheticStack:
        refused = ""
        for draw in range(MAX_DRAWS):
            scene = visible_scene(self.recipe, (self.seed, epoch, position, draw))
            if scene.objects.diameter_um > min(
                n * s for n, s in zip(self.crop_size, scene.voxels.spacing_um, strict=True)
            ):
                refused = f"objects of {scene.objects.diameter_um:.3g} micrometres do not fit into a crop of "
                refused += f"{self.crop_size} voxels of {scene.voxels.spacing_um} micrometres"
                continue
            return SyntheticStack(scene, self.crop_size, channels=self.num_channels, any_density=True)
        raise ValueError(f"no scene of {MAX_DRAWS} fits: {refused}; make crops larger, or objects smaller")


def read_recipe(name: str | os.PathLike[str]) -> Recipe:
    """The recipe of a preset's name, or of a JSON file.

    Raises:
        ValueError: there is no such preset, or the file is no recipe.
        FileNotFoundError: there is no such file.
    """
    words = os.fspath(name)
    return Recipe.read(words) if words.endswith(".json") else preset(words)
