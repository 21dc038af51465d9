"""Rules of a plan for what a network is shown: voxel size, which objects count, crops, batches, normalisation.

A rule is a pure function of measurements. It returns a value and the reason in words.
Must not know: bundles, files, torch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from seg3d_monai.data.volume import NEAR_SPACING
from seg3d_monai.planning.fingerprint import Fingerprint
from seg3d_monai.planning.wording import by, names, number, two_digits

Floats = NDArray[np.float64]
Triple = tuple[int, int, int]

COARSE = 3.0
"""Times that one axis' voxels are longer than all others', from which on its planes are thick."""
DEBRIS, MOST_DEBRIS = 0.1, 0.1
"""Share of the median object's voxels below which an object may be debris (it is less than half as wide), and the share
of the objects up to which it is; more of them are a kind of cell."""
CONTEXT, MARGIN = 3.5, 1.5
"""Median and large objects that a crop holds along an axis, at least."""
LEAST_OBJECTS, MOST_CROPS = 8, 8
"""Objects that a step sees at least, and crops of a step at most."""
TAIL = 0.25
"""Share of the foreground that may be brighter than what the normalisation maps to 1."""


def target_spacing(fingerprint: Fingerprint) -> tuple[list[float] | None, str]:
    """The voxel size that crops are resampled to, None where nothing is."""
    unknown = fingerprint.without_spacing
    if unknown:
        known = len(fingerprint.volumes) - len(unknown)
        others = f", {known} do" if known else ""
        return None, (
            f"{names(unknown)} do not say their voxel size{others}: everything is planned in voxels and nothing is "
            "resampled; the manifest's columns spacing_z_um … tell it"
        )
    sizes = np.array([volume.spacing_um for volume in fingerprint.volumes])
    middle = np.median(sizes, axis=0)
    if (np.abs(sizes / middle - 1) <= NEAR_SPACING).all():
        return None, f"all volumes agree within {NEAR_SPACING:.0%}, and training zooms objects by as much"
    axis = int(middle.argmax())
    second = float(np.sort(middle)[1])
    reason = "the median of the volumes, which differ; each is resampled to it"
    if middle[axis] > COARSE * second:
        middle[axis] = max(second, float(np.percentile(sizes[:, axis], 10)))
        reason += f". Planes along {'zyx'[axis]} are thick, so the tenth percentile there: the finer ones keep theirs"
    return [float(f"{size:.4g}") for size in middle], reason


def smallest_object(sizes: Floats) -> tuple[int | None, str]:
    """Voxels below which objects are ignored in training, None where all count.

    Args:
        sizes: [n] voxels of whole objects.
    """
    limit = DEBRIS * float(np.median(sizes))
    share = float((sizes < limit).mean())
    if share == 0:
        return None, f"no object is smaller than a tenth of the median of {number(np.median(sizes))} voxels"
    if share > MOST_DEBRIS:
        return None, f"{share:.0%} of the objects are smaller than a tenth of the median: too many for debris"
    return two_digits(limit), (
        f"{share:.1%} of the objects are smaller than a tenth of the median of {number(np.median(sizes))} voxels: "
        "debris and slips, which teach a network to find noise"
    )


def smallest_mask(sizes: Floats) -> tuple[int, str]:
    """Voxels below which a predicted mask is dropped.

    Args:
        sizes: [n] voxels of whole objects that count.
    """
    limit = min(DEBRIS / 2 * float(np.median(sizes)), float(np.percentile(sizes, 1)) / 2)
    return max(1, two_digits(limit)), "a half of what the smallest objects have, and a twentieth of the median at most"


def crop_size(
    median: Sequence[float], large: Sequence[float], volume: Sequence[float], strides: Sequence[int], is_square: bool
) -> tuple[Triple, str]:
    """The crop that a network needs to see objects in their surroundings.

    Args:
        median: (z, y, x) extent of the median object, voxels.
        large: of the large ones.
        volume: of the median volume.
        strides: of the coarsest level.
        is_square: whether voxels are as long along y as along x: turns need square planes.
    """
    wanted = np.maximum(CONTEXT * np.array(median), MARGIN * np.array(large))
    if is_square:
        wanted[1:] = wanted[1:].max()
    size = [nearest_multiple(n, s) for n, s in zip(wanted, strides, strict=True)]
    clipped = [fit_into(n, whole, s) for n, whole, s in zip(size, volume, strides, strict=True)]
    if is_square:
        clipped[1:] = [min(clipped[1:])] * 2
    reason = (
        f"{number(CONTEXT)} median objects ({by(median)}) along each axis, or {number(MARGIN)} large ones "
        f"({by(large)}): enough that many are seen whole and with their neighbours. More would cost steps, whatever "
        "the memory"
    )
    if clipped != size:
        reason += f"; not more than the median volume ({by(volume)}) has"
    return (clipped[0], clipped[1], clipped[2]), f"{reason}; multiples of the coarsest stride ({by(strides)})"


def smaller_crop(crop: Triple, median: Sequence[float], least: Triple, strides: Sequence[int]) -> Triple | None:
    """The next smaller crop: a stride less along the axis that holds most median objects; None below `least`."""
    axes = [axis for axis in range(3) if crop[axis] - strides[axis] >= least[axis]]
    if not axes:
        return None
    axis = max(axes, key=lambda a: crop[a] / median[a])
    size = [n - strides[axis] if a == axis else n for a, n in enumerate(crop)]
    return size[0], size[1], size[2]


def batch_size(default: int, objects: float) -> tuple[int, str]:
    """Crops of a step.

    Args:
        default: the bundle's.
        objects: mean number that a crop holds.
    """
    wanted = min(MOST_CROPS, max(default, -(-LEAST_OBJECTS // max(1, round(objects)))))
    if wanted > default:
        return wanted, f"a crop holds {number(objects)} objects; a step should see {LEAST_OBJECTS}"
    return (
        default,
        f"a crop holds {number(objects)} objects, so a step sees {number(default * objects)}: no need of more",
    )


def upper_percentile(foreground: Floats, default: Sequence[float]) -> tuple[list[float], str]:
    """Percentiles of the grey values that become 0 and 1.

    Args:
        foreground: [v] share of each volume's voxels that belong to an object.
        default: the bundle's (low, high).
    """
    low, high = (float(p) for p in default)
    occupied = foreground[foreground > 0]
    tail = 100 * TAIL * float(np.percentile(occupied, 10))
    if 100 - high <= tail:
        return [low, high], (
            f"the brightest {number(100 - high)} % of a volume's voxels lie within objects, which are "
            f"{number(100 * float(np.percentile(occupied, 10)))} % of it and more"
        )
    digit = 10.0 ** math.floor(math.log10(tail))
    above = max(0.001, digit * math.floor(tail / digit))
    return [low, round(100 - above, 4)], (
        f"objects are {number(4 * tail)} % of a sparse volume; its {number(high)}th percentile would be background"
    )


def nearest_multiple(length: float, step: int) -> int:
    """Of a step, one step at least; halves go up."""
    return step * max(1, int(length / step + 0.5))


def fit_into(length: int, whole: float, step: int) -> int:
    """A length that is no longer than the whole, still a multiple of the step, or of a power of two below it."""
    while step > 1 and step > whole:
        step //= 2
    return min(length, max(1, step * int(whole // step)))
