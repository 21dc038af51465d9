"""Which crops match a filter, as bits: ten million crops take 2.5 MB, so every worker may have them.

Must not know: SQLite, filters, how crops are drawn.
"""

from collections.abc import Sequence

import numpy as np

_BITS = 4096  # crops between two entries of the running count


class BitSet:
    """A set of the integers below a size, that says which is the n-th.

    Args:
        members: bool [size].
    """

    def __init__(self, members: np.ndarray) -> None:
        padding = -len(members) % _BITS
        blocks = np.pad(members, (0, padding)).reshape(-1, _BITS)
        self._before = np.concatenate([[0], np.cumsum(np.count_nonzero(blocks, axis=1))])
        self._bits = np.packbits(blocks, axis=1)

    def __len__(self) -> int:
        return int(self._before[-1])

    def below(self, value: int) -> int:
        """How many members are less than a value."""
        block, rest = divmod(value, _BITS)
        if rest == 0:
            return int(self._before[block])
        return int(self._before[block]) + int(np.unpackbits(self._bits[block], count=rest).sum())

    def member(self, rank: int) -> int:
        """The member with as many below it as `rank` says."""
        block = int(np.searchsorted(self._before, rank, side="right")) - 1
        inside = np.flatnonzero(np.unpackbits(self._bits[block]))
        return block * _BITS + int(inside[rank - self._before[block]])


class CropSelection:
    """The crops of some volumes that match.

    Args:
        first_crops: id of the first crop of each volume.
        volume_crops: crops on the grid of each volume.
        matches: bool, the crops of all volumes one after the other; None where all match.
        occupied: bool, those of them that match and hold an instance.

    Attributes:
        num_crops: int64 [V], matching crops of each volume.
        num_occupied: int64 [V], those that hold an instance which is no fragment.
    """

    def __init__(
        self,
        *,
        first_crops: Sequence[int],
        volume_crops: Sequence[int],
        matches: np.ndarray | None,
        occupied: np.ndarray,
    ) -> None:
        self._first_crops = np.array(first_crops, np.int64)
        self._begin = np.concatenate([[0], np.cumsum(np.array(volume_crops, np.int64))])
        self._matches = None if matches is None else BitSet(matches)
        self._occupied = BitSet(occupied)
        self._matches_before = self._before(self._matches)
        self._occupied_before = self._before(self._occupied)
        self.num_crops = np.diff(self._matches_before)
        self.num_occupied = np.diff(self._occupied_before)

    def __len__(self) -> int:
        return int(self._matches_before[-1])

    def crop(self, volume: int, rank: int, *, occupied: bool = False) -> int:
        """Id of a matching crop.

        Args:
            volume: position of its volume.
            rank: from 0, below `num_crops` or, where only occupied crops are meant, `num_occupied` of the volume.
            occupied: whether only those that hold an instance are counted.
        """
        bits, before = self._matches, self._matches_before
        if occupied:
            bits, before = self._occupied, self._occupied_before
        if not 0 <= rank < before[volume + 1] - before[volume]:
            raise IndexError(f"rank {rank} is outside 0 … {before[volume + 1] - before[volume] - 1}")
        place = rank + int(before[volume])
        found = place if bits is None else bits.member(place)
        return int(self._first_crops[volume] + found - self._begin[volume])

    def _before(self, bits: BitSet | None) -> np.ndarray:
        if bits is None:
            return self._begin
        return np.array([bits.below(int(value)) for value in self._begin], np.int64)
