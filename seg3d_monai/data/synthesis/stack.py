"""A scene as voxels: any region of a volume of any size, the same whatever regions are asked for.

Objects are placed for the whole volume, which takes some hundred bytes each; voxels are made by the tile, when they are
read.

It must not know files, training or metrics.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from functools import lru_cache
from itertools import product
from math import prod
from typing import Any

import numpy as np

from seg3d_monai.data.synthesis import light
from seg3d_monai.data.synthesis.cells import Cells, Painter, as_cells, grown
from seg3d_monai.data.synthesis.contrast import contrast_to_noise, point_spread_um
from seg3d_monai.data.synthesis.light import CHANNELS
from seg3d_monai.data.synthesis.placement import place_shapes, wanted_number
from seg3d_monai.data.synthesis.region import Region
from seg3d_monai.data.synthesis.scene import Scene
from seg3d_monai.data.synthesis.structures import add_structures, structures
from seg3d_monai.data.synthetic_nuclei import visible_ids
from seg3d_monai.data.volume import Volume, check_roi

TILE = (32, 128, 128)
CACHE_BYTES = 2**28
"""Of tiles that a volume keeps, at most."""
IGNORED = np.uint32(2**32 - 1)
"""Label of what nobody can see: neither an object nor background."""
LEAST_REACHED = 0.9
"""Share of the objects asked for that must find a place."""
_PLACES, _LOBES = 8, 9
Array = np.ndarray


class SyntheticStack:
    """Image and labels of a scene.

    Args:
        scene: every number that the voxels follow from.
        shape: voxels (z, y, x) of the volume.
        channels: 1 for all that fluoresces, 2 for nuclei and membranes apart.
        any_density: whether it is all right that fewer objects find a place than were asked for.

    Attributes:
        spacing_um: (z, y, x) micrometres per voxel.
        cells: the objects, in micrometres.
        can_be_seen: bool [G + 1], by number: whether the camera's `least_contrast` is reached; true of background.

    Raises:
        ValueError: a shape or channels that are none, a volume too small for its objects, or too little room for as
            many as the scene asks for; the message says how many found a place.
    """

    def __init__(self, scene: Scene, shape: Sequence[int], *, channels: int = 1, any_density: bool = False) -> None:
        if len(shape) != 3 or any(int(n) != n or n < 1 for n in shape):
            raise ValueError(f"shape is {tuple(shape)}; give three whole numbers of voxels (z, y, x) from 1")
        if channels not in (1, 2):
            raise ValueError(f"channels is {channels}; give 1, or 2 for nuclei and membranes apart")
        self.scene = scene
        self.shape = (int(shape[0]), int(shape[1]), int(shape[2]))
        self.spacing_um = scene.voxels.spacing_um
        self.names = CHANNELS[:1] if channels == 1 else CHANNELS[1:]
        self._spacing = np.array(self.spacing_um)
        self.extent_um = self._spacing * self.shape
        diameter = scene.objects.diameter_um
        if self.extent_um.min() < diameter:
            size = " x ".join(f"{extent:.3g}" for extent in self.extent_um)
            raise ValueError(
                f"the volume of {size} micrometres is too small for objects.diameter_um of {diameter:.3g}; make it "
                "larger"
            )
        placed = place_shapes(np.random.default_rng((*scene.seed, _PLACES)), self.extent_um, scene.objects)
        wanted = wanted_number(self.extent_um, scene.objects)
        if not any_density and len(placed) < LEAST_REACHED * wanted:
            raise ValueError(
                f"objects.fill is {scene.objects.fill:.3g}, {wanted} objects; {len(placed)} found a place, a fill of "
                f"{scene.objects.fill * len(placed) / wanted:.3g}. Lower it or objects.closeness"
            )
        self.cells: Cells = as_cells(np.random.default_rng((*scene.seed, _LOBES)), placed)
        self._painter = self._outliner = Painter(self.cells, self._spacing, *light.painted_range(scene))
        self._sizes_um3 = self.cells.volumes()
        if scene.objects.outline or scene.objects.margin:
            sigma = point_spread_um(scene, self.cells.shapes.centre, self.extent_um)[:, None]
            squares = scene.objects.outline * (sigma * (scene.optics.psf_ratio, 1, 1)) ** 2
            radius = np.abs(np.linalg.det(self.cells.shapes.axes))[:, None] ** (-1 / 3)
            outlined = grown(self.cells, squares + (radius + scene.objects.margin * self._spacing) ** 2 - radius**2)
            self._outliner = Painter(outlined, self._spacing, scene.objects.reach, 0.01)
            self._sizes_um3 = outlined.volumes()
        self._brightness = light.brightness(scene, self.cells)
        self._centres, self._masses = self.cells.centres(), self.cells.volumes() * self._brightness[1:]
        contrasts = contrast_to_noise(
            scene,
            centres_um=self._centres,
            radii_um=np.cbrt(3 / (4 * np.pi) * self.cells.volumes()),
            brightness=self._brightness[1:],
            extent_um=self.extent_um,
        )
        self.can_be_seen = np.append(True, contrasts >= scene.camera.least_contrast)
        self._structures = structures(scene, self.extent_um, self.cells.num_objects)
        self._halo = light.halo(scene.optics, self._spacing)

    @property
    def digest(self) -> str:
        """What the voxels follow from, as one word."""
        facts = json.dumps([self.scene.described(), self.shape, self.names])
        return hashlib.blake2b(facts.encode(), digest_size=16).hexdigest()

    def owners(self, region: Region) -> Array:
        """Numbers of the objects from 1 in the order of `cells`, 0 for background; int32 [d, h, w]."""
        return self._outliner.paint(region.start, region.stop).owner(self.scene.objects.reach)

    def image(self, region: Region) -> Array:
        """Camera counts, uint16 [C, d, h, w]."""
        return self.image_and_owners(region)[0]

    def image_and_owners(self, region: Region) -> tuple[Array, Array]:
        """Both of a region, in the time of one."""
        scene, spacing = self.scene, self._spacing
        wide_region = region.grown(self._halo)
        painted = self._painter.paint(wide_region.start, wide_region.stop)
        far = np.zeros(())
        if scene.optics.haze:
            far = light.haze(scene.optics.haze_um, self._centres, self._masses, region, spacing)
        inner = tuple(slice(h, h + n) for h, n in zip(self._halo.tolist(), region.shape, strict=True))
        channels = []
        for number, name in enumerate(self.names):
            stain = light.stained(scene, painted, self._brightness, wide_region, spacing, name)
            add_structures(stain, self._structures, wide_region, spacing)
            sharp, wide = (each[inner] for each in light.blurred(stain, scene.optics, spacing))
            photons = light.illuminated(scene, sharp, wide, far, region, spacing, self.shape[2], number)
            channels.append(light.recorded(scene, photons, region, number))
        has_outlines = self._outliner is not self._painter
        return np.stack(channels), self.owners(region) if has_outlines else painted.owner(scene.objects.reach)[inner]

    def whole(self) -> tuple[Array, Array]:
        """The volume at once: image uint16 [C, Z, Y, X], and labels uint32 [Z, Y, X]: compact ids, or `IGNORED`."""
        return self.whole_with_sizes()[:2]

    def whole_with_sizes(self) -> tuple[Array, Array, Array]:
        """As `whole`, and the voxels that each id would have if nothing cut or pressed it; float64 [num_ids]."""
        image, owners = self.image_and_owners(Region(start=np.zeros(3, np.int64), stop=np.array(self.shape)))
        ids = self.ids(np.bincount(owners.ravel(), minlength=self.cells.num_objects + 1))
        is_labelled = (ids > 0) & (ids != IGNORED)
        return image, ids[owners], self._sizes_um3[is_labelled[1:]] / self._spacing.prod()

    def ids(self, voxels: Array) -> Array:
        """Labels of the objects, by number.

        Args:
            voxels: [G + 1], of the background and of each object in the volume.

        Returns:
            uint32 [G + 1]: ids compact from 1, 0 for those of too few voxels, `IGNORED` for those that cannot be seen.
        """
        ids = visible_ids(np.where(self.can_be_seen, voxels, 0))
        ids[~self.can_be_seen] = IGNORED
        return ids

    def volumes(self) -> tuple[Volume, LabelTiles]:
        """Image and labels as volumes whose voxels are made when they are read."""
        return _Tiles(self, len(self.names), np.uint16), LabelTiles(self)


class _Tiles(Volume):
    """The image of a stack; the tiles that were read last are kept."""

    def __init__(self, stack: SyntheticStack, channels: int, dtype: type) -> None:
        self._stack = stack
        self.shape = (channels, *stack.shape)
        self.dtype = np.dtype(dtype)
        self.spacing_um = stack.spacing_um
        self.path = None
        self.chunk_shape = (min(TILE[0], stack.shape[0]), min(TILE[1], stack.shape[1]), min(TILE[2], stack.shape[2]))
        self.tiles = [range(-(-n // t)) for n, t in zip(stack.shape, TILE, strict=True)]
        tile_bytes = channels * prod(self.chunk_shape) * self.dtype.itemsize
        layers = 2 * len(self.tiles[1]) * len(self.tiles[2]) + 1
        self._tile = lru_cache(max(1, min(layers, CACHE_BYTES // tile_bytes)))(self._make_tile)

    def read(self, roi: Sequence[int]) -> Array:
        """Make a region; see `Volume.read`."""
        roi = check_roi(roi, self.shape)
        start, stop = np.array(roi[:3]), np.array(roi[3:])
        result = np.empty((self.shape[0], *(stop - start)), self.dtype)
        if result.size == 0:
            return result
        for tile in product(*(range(a // t, (b - 1) // t + 1) for a, b, t in zip(start, stop, TILE, strict=True))):
            region = self._region(tile)
            low, high = np.maximum(start, region.start), np.minimum(stop, region.stop)
            to = tuple(slice(a, b) for a, b in zip(low - start, high - start, strict=True))
            come = tuple(slice(a, b) for a, b in zip(low - region.start, high - region.start, strict=True))
            result[:, *to] = self._tile(tile)[:, *come]
        return result

    def identity(self) -> dict[str, Any]:
        """What the voxels follow from, in place of the voxels."""
        facts = {"shape": list(self.shape), "dtype": self.dtype.name, "spacing_um": list(self.spacing_um or ())}
        return {**facts, "num_bytes": None, "digest": self._stack.digest}

    def _region(self, tile: Sequence[int]) -> Region:
        start = np.array(tile) * TILE
        return Region(start=start, stop=np.minimum(start + TILE, self._stack.shape))

    def _make_tile(self, tile: tuple[int, int, int]) -> Array:
        return self._stack.image(self._region(tile))


class LabelTiles(_Tiles):
    """The labels of a stack, uint32, ids compact from 1, or `IGNORED`; to number them the stack is painted once.

    Attributes:
        num_ids: the largest id.
    """

    def __init__(self, stack: SyntheticStack) -> None:
        super().__init__(stack, 1, np.uint32)
        voxels = np.zeros(stack.cells.num_objects + 1, np.int64)
        for tile in product(*self.tiles):
            voxels += np.bincount(stack.owners(self._region(tile)).ravel(), minlength=len(voxels))
        self._ids = stack.ids(voxels)
        self.num_ids = int(self._ids[stack.can_be_seen].max())

    def _make_tile(self, tile: tuple[int, int, int]) -> Array:
        return self._ids[self._stack.owners(self._region(tile))][None]
