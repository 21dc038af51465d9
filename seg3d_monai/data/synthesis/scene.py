"""A scene: every number that a synthetic volume follows from, and recipes that draw scenes.

Lengths are micrometres, light is photons of one voxel at the middle of an average object at the surface.

It must not know arrays: placement, painting and light are other files.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np

from seg3d_monai.data.synthesis.ranges import Given, Group, number

FAMILIES = ("ellipsoid", "elongated", "lobed", "dividing")
"""Smoothly deformed ellipsoids, long ones, ones of two or three lobes, and pairs of daughters that touch."""
Seed = int | Sequence[int]


@dataclass(frozen=True, kw_only=True)
class Voxels(Group):
    """Voxel size: that of a plane, and how many times as far planes lie apart."""

    plane_um: float = number(0.8, is_scale=True)
    anisotropy: float = number(2.5, low=0.25, high=32, is_scale=True)

    @property
    def spacing_um(self) -> tuple[float, float, float]:
        """(z, y, x) micrometres."""
        return (self.plane_um * self.anisotropy, self.plane_um, self.plane_um)


@dataclass(frozen=True, kw_only=True)
class Objects(Group):
    """Where objects are, and how they are shaped.

    Args:
        diameter_um: mean diameter of an average object.
        spread: standard deviation of the log of the diameter, from object to object.
        fill: share of the volume that objects take, before neighbours press on each other.
        attach: share of the objects that are moved until they touch one that is there already.
        closeness: least distance of two objects, in sums of their radii; below 1 they press faces on each other.
        reach: how far an object spreads where none is in its way, in radii; above 1 tissue closes up.
        axis_ratio: longest over shortest axis of an ellipsoid, at most.
        deformation: height of smooth bumps, in radii.
        ellipsoid, elongated, lobed, dividing: weights of the families; see `FAMILIES`.
        elongation: longest over shortest axis of the elongated, at most.
        outline: how far labels go beyond surfaces into the blur: variances of the point spread that are added to
            squared radii. 0 is the surface; 3 about where an object's own light is a quarter of its brightest, as
            people outline what they see, longer along z than it is.
        margin: voxels by which labels are larger on every side: people draw outlines around objects, and a voxel that
            an outline touches counts.
    """

    diameter_um: float = number(12.0, is_scale=True)
    spread: float = number(0.12, high=0.6)
    fill: float = number(0.15, high=1.2)
    attach: float = number(0.5, high=1.0)
    closeness: float = number(0.9, low=0.5, high=2.0)
    reach: float = number(1.0, low=1.0, high=2.5)
    axis_ratio: float = number(1.5, low=1.0, high=3.0)
    deformation: float = number(0.08, high=0.25)
    ellipsoid: float = number(1.0)
    elongated: float = number(0.0)
    lobed: float = number(0.0)
    dividing: float = number(0.0)
    elongation: float = number(2.5, low=1.0, high=5.0)
    outline: float = number(0.0, high=10.0, is_late=True)
    margin: float = number(0.0, high=3.0, is_late=True)


@dataclass(frozen=True, kw_only=True)
class Stain(Group):
    """What of an object fluoresces.

    Args:
        nucleus: brightness of the objects' insides.
        membrane: brightness of their surfaces.
        membrane_um: thickness of these.
        brightness_spread: standard deviation of the log of the brightness, from object to object.
        hollow: how much darker the middle is than the rim; -1 to 0 make the rim darker.
        texture: standard deviation of the chromatin's texture, in brightness.
        texture_um: its coarser length.
        nucleoli: share of an object that is dark.
        seam: brightness left where two objects meet.
        seam_share: how far from a neighbour that begins, in radii.
        cytoplasm: brightness around the objects.
    """

    nucleus: float = number(1.0)
    membrane: float = number(0.0)
    membrane_um: float = number(1.0, is_scale=True)
    brightness_spread: float = number(0.3, high=1.5)
    hollow: float = number(-0.35, low=-1.0, high=1.0)
    texture: float = number(0.25, high=1.0)
    texture_um: float = number(2.2, is_scale=True)
    nucleoli: float = number(0.0, high=0.5)
    seam: float = number(0.35, high=1.0)
    seam_share: float = number(0.22, low=0.01, high=1.0)
    cytoplasm: float = number(0.0, high=1.0)


@dataclass(frozen=True, kw_only=True)
class Background(Group):
    """What is there beside objects.

    Args:
        glow: brightness of the specimen itself.
        glow_spread: how unevenly it glows, in itself.
        glow_um: over which length.
        specks: bright specks, debris, for each object.
        speck_um: their diameter, at most.
        speck_brightness: at most.
        fibres: tubes, vessels, through a cube of ten diameters.
        fibre_um: their diameter, at most.
        fibre_brightness: at most.
    """

    glow: float = number(0.05)
    glow_spread: float = number(0.3, high=1.0)
    glow_um: float = number(25.0, is_scale=True)
    specks: float = number(0.0, high=20.0)
    speck_um: float = number(2.0, is_scale=True)
    speck_brightness: float = number(2.0)
    fibres: float = number(0.0, high=20.0)
    fibre_um: float = number(4.0, is_scale=True)
    fibre_brightness: float = number(0.7)


@dataclass(frozen=True, kw_only=True)
class Optics(Group):
    """The way of the light.

    Args:
        psf_um: standard deviation of the point spread within a plane.
        psf_ratio: that along z over it.
        scatter: how many times as wide the point spread gets, deep in the specimen and at the sheet's ends.
        attenuation_um: depth over which light falls to 1/e.
        haze: share of the signal that is scattered far.
        haze_um: how far.
        sheet_end: how far the point spread is widened at the sheet's ends along x, 0 to 1.
        tilt_degrees: of the sheet against the planes, about y.
        vignetting: loss of light at the sheet's ends.
        stripes: standard deviation of the shadows along the sheet's way.
        stripe_um: their width.
        wings: share of a point's light that the sheet's tails spread far along z, as a Lorentzian: bright objects then
            trail streaks along z.
        wings_ratio: half-width of that over the point spread's along z.
    """

    psf_um: float = number(0.55, is_scale=True)
    psf_ratio: float = number(3.0, low=0.5, high=10.0, is_scale=True)
    scatter: float = number(1.6, low=1.0, high=5.0)
    attenuation_um: float = number(110.0, is_scale=True)
    haze: float = number(0.25, high=3.0)
    haze_um: float = number(9.0, is_scale=True)
    sheet_end: float = number(0.3, high=1.0)
    tilt_degrees: float = number(0.0, low=-30.0, high=30.0)
    vignetting: float = number(0.3, high=0.95)
    stripes: float = number(0.1, high=0.6)
    stripe_um: float = number(4.0, is_scale=True)
    wings: float = number(0.0, high=1.0, is_late=True)
    wings_ratio: float = number(2.0, low=1.0, high=6.0, is_scale=True, is_late=True)


@dataclass(frozen=True, kw_only=True)
class Camera(Group):
    """From photons to counts.

    Args:
        photons: of an average object.
        gain: counts a photon.
        offset: counts without light.
        read_noise: standard deviation, counts.
        white_level: counts at which the camera saturates, in brightnesses of an average object.
        bits: whole numbers that the camera knows, as a power of 2.
        grain: how far its noise is correlated within planes, as the standard deviation of a filter in voxels: images
            that were resampled.
        grain_axial: that along z.
        least_contrast: contrast of an object against a voxel's noise below which nobody can see it: it becomes ignore,
            and scenes whose average object has less are not drawn. 0 keeps all.
    """

    photons: float = number(240.0, is_scale=True)
    gain: float = number(2.2, is_scale=True)
    offset: float = number(100.0, high=20000.0)
    read_noise: float = number(4.0)
    white_level: float = number(20.0, is_scale=True)
    bits: float = number(16.0, low=6.0, high=16.0)
    grain: float = number(0.0, high=3.0, is_late=True)
    grain_axial: float = number(0.0, high=3.0, is_late=True)
    least_contrast: float = number(0.0, high=20.0, is_late=True)

    @property
    def white_count(self) -> float:
        """Counts at which it saturates."""
        return min(self.offset + self.gain * self.photons * self.white_level, 65535.0)

    @property
    def counts_a_level(self) -> float:
        """Counts from one of its whole numbers to the next, before they are scaled to them."""
        return self.white_count / (2.0 ** round(self.bits) - 1)


@dataclass(frozen=True, kw_only=True)
class Scene:
    """What one volume, or one crop, follows from.

    Args:
        seed: integers >= 0, of all draws but those of the numbers below.
        depth_um: depth of the first plane in the specimen; deeper is dimmer and more blurred.
        voxels, objects, stain, background, optics, camera: see there.

    Raises:
        ValueError: no family has a weight, or objects that no voxel would show.
    """

    seed: tuple[int, ...] = (0,)
    depth_um: float = 0.0
    voxels: Voxels = field(default_factory=Voxels)
    objects: Objects = field(default_factory=Objects)
    stain: Stain = field(default_factory=Stain)
    background: Background = field(default_factory=Background)
    optics: Optics = field(default_factory=Optics)
    camera: Camera = field(default_factory=Camera)

    def __post_init__(self) -> None:
        if not any(self.weights):
            raise ValueError(f"objects: the weights of {', '.join(FAMILIES)} are all 0; give one of them")
        if not (self.stain.nucleus or self.stain.membrane):
            raise ValueError("stain: nucleus and membrane are both 0, so nothing would be seen; raise one of them")
        diameter, voxel = self.objects.diameter_um, self.voxels.plane_um
        if diameter < 2 * voxel:
            raise ValueError(
                f"objects.diameter_um is {diameter:.3g} and voxels.plane_um {voxel:.3g}: objects are less than two "
                "voxels across; raise the one or lower the other"
            )

    @property
    def weights(self) -> tuple[float, ...]:
        """Of the families, in the order of `FAMILIES`."""
        return tuple(getattr(self.objects, name) for name in FAMILIES)

    def described(self) -> dict[str, Any]:
        """All numbers, as JSON takes them."""
        return {**asdict(self), "seed": list(self.seed)}


GROUPS: dict[str, type[Group]] = {
    "voxels": Voxels,
    "objects": Objects,
    "stain": Stain,
    "background": Background,
    "optics": Optics,
    "camera": Camera,
}


class Recipe:
    """Ranges that scenes are drawn from.

    Args:
        ranges: for some of the groups of a `Scene` some of its numbers: each a number, or [smallest, largest].
        depth_um: of the first plane, a number or [smallest, largest].

    Raises:
        ValueError: an unknown name, a range upside down, a number outside its limits, or ranges of which a scene could
            be drawn that `Scene` refuses; the message names them.
    """

    def __init__(self, ranges: Mapping[str, Mapping[str, Any]], depth_um: Given | Sequence[float] = 0.0) -> None:
        unknown = sorted(set(ranges) - set(GROUPS))
        if unknown:
            raise ValueError(f"a recipe has no {', '.join(unknown)}; its groups are {', '.join(GROUPS)}, and depth_um")
        self.ranges = {name: group.ranges(ranges.get(name, {}), name) for name, group in GROUPS.items()}
        self.depth_um = _Depth.ranges({"depth_um": depth_um}, "recipe")["depth_um"]
        self._check()

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> Recipe:
        """The recipe of a JSON file: groups, and `depth_um` if wanted.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is not JSON, or no recipe.
        """
        try:
            found = json.loads(Path(path).read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path} is not JSON: {error}") from None
        if not isinstance(found, dict) or not all(isinstance(v, dict) for k, v in found.items() if k != "depth_um"):
            raise ValueError(f"{path} is no recipe; give an object of groups: {', '.join(GROUPS)}")
        return cls({k: v for k, v in found.items() if k != "depth_um"}, found.get("depth_um", 0.0))

    def scene(self, seed: Seed) -> Scene:
        """The scene of a seed; the same seed gives the same numbers."""
        numbers = (int(seed),) if isinstance(seed, int | np.integer) else tuple(int(n) for n in seed)
        rng, late = (np.random.default_rng((*numbers, stream)) for stream in (_DRAWS, _LATE_DRAWS))
        depth = _Depth.drawn({"depth_um": self.depth_um}, rng, late).depth_um
        groups = {name: group.drawn(self.ranges[name], rng, late) for name, group in GROUPS.items()}
        return Scene(seed=numbers, depth_um=depth, **groups)  # type: ignore[arg-type]

    def described(self) -> dict[str, Any]:
        """What a file of this recipe holds; numbers at their defaults are left out."""
        found: dict[str, Any] = {} if self.depth_um == 0 else {"depth_um": _plain(self.depth_um)}
        for name, group in GROUPS.items():
            own = {f.name: _plain(self.ranges[name][f.name]) for f in fields(group)}
            changed = {f.name: own[f.name] for f in fields(group) if own[f.name] != f.default}
            if changed:
                found[name] = changed
        return found

    def _check(self) -> None:
        """Refuse ranges that contradict, before a scene does."""
        objects, voxels, stain = (self.ranges[name] for name in ("objects", "voxels", "stain"))
        smallest = _end(objects["diameter_um"], 0)
        widest = _end(voxels["plane_um"], 1)
        if smallest < 2 * widest:
            raise ValueError(
                f"objects.diameter_um goes down to {smallest:g} and voxels.plane_um up to {widest:g}: objects would be "
                "less than two voxels across; raise the one or lower the other"
            )
        if not any(_end(objects[name], 0) for name in FAMILIES):
            raise ValueError(
                f"objects: the weights of {', '.join(FAMILIES)} may all be 0; give one of them a smallest above 0"
            )
        if not (_end(stain["nucleus"], 0) or _end(stain["membrane"], 0)):
            raise ValueError("stain: nucleus and membrane may both be 0; give one of them a smallest above 0")


@dataclass(frozen=True, kw_only=True)
class _Depth(Group):
    depth_um: float = number(0.0)


_DRAWS, _LATE_DRAWS = 7, 18
"""Streams of the numbers, after the seed."""


def _end(value: Given, which: int) -> float:
    return value[which] if isinstance(value, tuple) else value


def _plain(value: Given) -> float | list[float]:
    return list(value) if isinstance(value, tuple) else value
