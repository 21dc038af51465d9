"""Rules of a plan for prediction by blocks: how far a block looks beyond what it owns, and how large it is.

A rule is a pure function of measurements. It returns a value and the reason in words.
Must not know: bundles, files, torch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import ceil, prod

from seg3d_monai.planning.wording import by, number

Triple = tuple[int, int, int]

HALO_STEP = 4
"""What a halo is a multiple of: no more exact than the objects' extents are."""


def halo(large: Sequence[float]) -> tuple[Triple, str]:
    """Voxels that a block reads beyond what it owns, (z, y, x).

    Args:
        large: (z, y, x) extent of the large objects, voxels.
    """
    z, y, x = (HALO_STEP * max(1, ceil(extent / HALO_STEP)) for extent in large)
    return (z, y, x), (
        f"a large object ({by(large)}), so that each block that owns a part of one sees all of it; those up to twice "
        "as long are seen whole by one block"
    )


def block_size(
    crop: Triple,
    halo: Sequence[int],
    strides: Sequence[int],
    fits: Callable[[Triple], bool],
    limit: str,
    large: Sequence[int] | None = None,
) -> tuple[Triple, str]:
    """Voxels that a block owns, (z, y, x).

    Args:
        crop: of the training.
        halo: of the blocks.
        strides: of the coarsest level.
        fits: whether a block may read so many voxels along each axis.
        limit: in words, what is full where it does not fit.
        large: a block that is good where what a network finds does not depend on how much it sees; None where it does.
    """
    z, y, x = crop if large is None else map(max, crop, large)
    wanted = owned = (z, y, x)
    while not fits(read_size(owned, halo)) and any(n > s for n, s in zip(owned, strides, strict=True)):
        axis = max(range(3), key=lambda a: owned[a] / strides[a])
        shorter = [max(1, n - strides[a]) if a == axis else n for a, n in enumerate(owned)]
        owned = (shorter[0], shorter[1], shorter[2])
    if large is None:
        size = "as much as a crop holds" if owned == wanted else f"less than a crop holds, since {limit}"
        reason = (
            f"{size}: with its halo a block shows about what was trained on, and norms over a whole image depend on "
            "how much there is to see"
        )
        end = "; larger blocks are faster"
    else:
        size = "large" if owned == wanted else f"as large as possible, since {limit}"
        reason, end = f"{size}: the network's norms do not depend on how much there is to see", ""
    return owned, f"{reason}. It reads {number(overhead(owned, halo))} voxels for each that it owns{end}"


def read_size(owned: Sequence[int], halo: Sequence[int]) -> Triple:
    """Voxels that a block reads along (z, y, x)."""
    z, y, x = (n + 2 * h for n, h in zip(owned, halo, strict=True))
    return z, y, x


def overhead(owned: Sequence[int], halo: Sequence[int]) -> float:
    """Voxels that a block reads for each that it owns."""
    return prod(read_size(owned, halo)) / prod(owned)
