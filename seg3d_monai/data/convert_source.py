"""The input of a conversion: a volume for each time point that is written, all or some of its channels at a time.

Must not know what is written or where.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import numpy as np

from seg3d_monai.data.volume import StoredVolume, Volume

_NUM_OPEN = 8


class Source:
    """The volumes of all time points, opened when they are needed; the last few are kept.

    Args:
        image: whatever `open_volume` takes, or a volume.
        channels, time: as for `convert_volume`.
        options: axes, spacing, level and scene, as for `open_volume`.

    Raises:
        ValueError: `time` is no time of the image, or an option is given with a volume.
    """

    def __init__(self, image: Any, *, channels: Any, time: Any, **options: Any) -> None:
        self._lock = threading.Lock()
        self._open: dict[tuple[int, tuple[int, ...] | None], Volume] = {}
        self._image, self._options, self._channels = image, options, channels
        self.is_file = not isinstance(image, Volume)
        is_series = isinstance(time, str) or not hasattr(time, "__index__")
        if not self.is_file:
            described = [n for n, v in {**options, "channels": channels}.items() if v is not None and v != 0]
            if described or is_series or time != 0:
                raise ValueError(
                    "axes, spacing, channels, time, level and scene describe a file, and image is a volume"
                )
        self.times: tuple[int, ...] | None = None
        self._time = 0
        if not is_series:
            self._time = time.__index__()
        elif time == "all":
            self.times = tuple(range(StoredVolume(image, time=0, channels=channels, **options).num_times))
        elif isinstance(time, str) or not len(time):
            raise ValueError(f"time is {time!r}; pass a number, a list of numbers or 'all'")
        else:
            self.times = tuple(int(t) for t in time)

    def volume(self, place: int, group: tuple[int, ...] | None = None) -> Volume:
        """The volume of a time point, by its place in the output.

        Args:
            place: 0 where there is no series.
            group: channels of the output to open, None for all.
        """
        if not self.is_file:
            assert isinstance(self._image, Volume)
            return self._image
        with self._lock:
            if (place, group) not in self._open:
                channels = self._channels
                if group is not None and channels is not None:
                    chosen = [channels] if isinstance(channels, int) else list(channels)
                    channels = [chosen[i] for i in group]
                elif group is not None:
                    channels = list(group)
                time = self._time if self.times is None else self.times[place]
                while len(self._open) >= _NUM_OPEN:
                    del self._open[next(iter(self._open))]
                self._open[place, group] = StoredVolume(self._image, channels=channels, time=time, **self._options)
            return self._open[place, group]

    def read(self, place: int, group: range, num_channels: int, roi: Sequence[int]) -> np.ndarray:
        """Voxels [C, d, h, w] of some channels of the output."""
        if len(group) == num_channels:
            return self.volume(place).read(roi)
        if not self.is_file:
            return self.volume(place).read(roi)[group.start : group.stop]
        return self.volume(place, tuple(group)).read(roi)
