"""The cache of decoded chunks: the same voxels as without it, a bound in bytes, and when it does without itself."""

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import pytest

from seg3d_monai.data import ArrayVolume, volume_cache
from seg3d_monai.data.volume_cache import VolumeCache

SHAPE = (9, 34, 47)


class ChunkedVolume(ArrayVolume):
    """A volume in memory that pretends to be stored in chunks and remembers what was read."""

    def __init__(self, array: np.ndarray, chunk_shape: tuple[int, int, int]) -> None:
        super().__init__(array)
        self.chunk_shape = chunk_shape
        self.reads: list[tuple[int, ...]] = []

    def read(self, roi: Sequence[int]) -> np.ndarray:
        self.reads.append(tuple(roi))
        return super().read(roi)


@pytest.fixture
def tiny_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks are kept as they are however small, so that toys have several."""
    monkeypatch.setattr(volume_cache, "_LEAST_VOXELS", 1)


def volume_of(shape: Sequence[int] = SHAPE, chunk: tuple[int, int, int] = (4, 16, 16), seed: int = 0) -> ChunkedVolume:
    return ChunkedVolume(np.random.default_rng(seed).integers(0, 60000, shape).astype(np.uint16), chunk)


@pytest.mark.usefixtures("tiny_chunks")
@pytest.mark.parametrize("max_bytes", [0, 9000, 40_000, 1 << 20])
@pytest.mark.parametrize("chunk", [(4, 16, 16), (1, 34, 47), (9, 34, 47), (2, 5, 47)])
def test_regions_are_those_of_the_volume(
    random_rois: Callable[..., Iterator[tuple[int, ...]]], max_bytes: int, chunk: tuple[int, int, int]
) -> None:
    cache = VolumeCache(max_bytes=max_bytes)
    volumes = {"one": volume_of((2, *SHAPE), chunk), "two": volume_of((1, *SHAPE), chunk, seed=1)}
    for roi in random_rois(SHAPE):
        for name, volume in volumes.items():
            z1, y1, x1, z2, y2, x2 = roi
            found = cache.read(name, lambda volume=volume: volume, roi)  # type: ignore[misc]
            assert np.array_equal(found, volume.array[:, z1:z2, y1:y2, x1:x2])
            assert cache.num_bytes == sum(kept.nbytes for kept in cache._chunks.values()) <= max_bytes
            found[...] = 0  # the caller's own


@pytest.mark.usefixtures("tiny_chunks")
def test_a_chunk_is_kept_whole_once_it_is_asked_for_again() -> None:
    cache, volume = VolumeCache(), volume_of()
    roi = (1, 17, 3, 3, 20, 18)
    cache.read("v", lambda: volume, roi)
    assert volume.reads == [roi]  # no more than was asked for
    assert cache.num_bytes == 0
    cache.read("v", lambda: volume, (1, 17, 3, 3, 20, 18))
    assert volume.reads[1:] == [(0, 16, 0, 4, 32, 32)]
    assert cache.num_bytes == cache.again_bytes == 2 * 2048
    cache.read("v", lambda: volume, (0, 16, 0, 4, 32, 32))
    assert len(volume.reads) == 2
    assert cache.hit_bytes == 2 * 2048
    # Of a larger region what is missing is read; at the border chunks are cut off.
    cache.read("v", lambda: volume, (3, 30, 30, 4, 34, 47))
    assert volume.reads[2:] == [(0, 16, 16, 4, 34, 47)]
    new = 2 * 4 * (16 * 15 + 2 * 16 + 2 * 15)
    assert cache.hit_bytes == 3 * 2048
    assert cache.miss_bytes == 4 * 2048 + new
    assert cache.num_bytes == 2 * 2048  # what is new waits to be asked for again
    cache.read("v", lambda: volume, (3, 30, 30, 4, 34, 47))
    assert cache.num_bytes == 2 * 2048 + new


@pytest.mark.usefixtures("tiny_chunks")
def test_what_was_used_longest_ago_is_dropped_and_its_name_forgotten() -> None:
    volume = volume_of((4, 4, 80), (4, 4, 8))
    cache = VolumeCache(max_bytes=4 * 256)  # of ten chunks of 256 bytes

    def ask(*numbers: int) -> list[int]:
        for number in numbers:
            cache.read("v", lambda: volume, (0, 0, 8 * number, 4, 4, 8 * number + 8))
        return [box[2] // 8 for _, box in cache._chunks]

    assert ask(0, 1, 2, 3) == []
    assert ask(0, 1, 2, 3) == [0, 1, 2, 3]
    assert ask(0, 4) == [1, 2, 3, 0]
    assert ask(4) == [2, 3, 0, 4]
    assert cache.num_bytes == 4 * 256
    # Four names of chunks that are not kept are remembered.
    assert ask(5, 6, 7, 8, 9) == [2, 3, 0, 4]
    assert ask(5) == [2, 3, 0, 4]
    assert ask(9) == [3, 0, 4, 9]


def test_small_chunks_are_kept_several_together() -> None:
    volume = volume_of((40, 120, 200), (1, 2, 200))  # strips of two rows
    cache = VolumeCache()
    for _ in range(2):
        cache.read("v", lambda: volume, (3, 50, 60, 4, 51, 61))
    ((_, box),) = cache._chunks
    low, high = np.array(box[:3]), np.array(box[3:])
    assert (low <= (3, 50, 60)).all()
    assert (high >= (4, 51, 61)).all()
    assert volume_cache._LEAST_VOXELS <= np.prod(high - low) < 4 * volume_cache._LEAST_VOXELS
    assert low[1] % 2 == high[1] % 2 == 0
    # A volume smaller than that is kept in one piece.
    small = volume_of()
    for _ in range(2):
        cache.read("small", lambda: small, (0, 0, 0, 1, 1, 1))
    assert small.reads[1:] == [(0, 0, 0, *SHAPE)]


@pytest.mark.usefixtures("tiny_chunks")
def test_regions_that_would_sweep_the_cache_are_read_straight() -> None:
    volume = volume_of((8, 64, 64), (1, 64, 64))  # planes of 8 kB
    cache = VolumeCache(max_bytes=4 * 3 * 8192)
    roi = (0, 10, 10, 4, 12, 12)
    assert cache.read("v", lambda: volume, roi).shape == (1, 4, 2, 2)
    assert volume.reads == [roi]
    assert cache.num_bytes == 0
    for _ in range(2):
        cache.read("v", lambda: volume, (0, 10, 10, 3, 12, 12))
    assert cache.num_bytes == 3 * 8192


@pytest.mark.usefixtures("tiny_chunks")
def test_a_cache_that_is_never_hit_gives_up_and_frees_its_memory() -> None:
    volume = volume_of((1, 8, 8 * 200), (1, 8, 8))
    cache = VolumeCache(max_bytes=10 * 128)
    rng = np.random.default_rng(0)
    order = [0, 0, *(1 + rng.permutation(199)).tolist()]
    for position, number in enumerate(order):
        start = 8 * number
        found = cache.read("v", lambda: volume, (0, 0, start + 1, 1, 8, start + 3))
        assert np.array_equal(found[0], volume.array[0, :, :, start + 1 : start + 3])
        assert cache.num_bytes == (128 if 1 <= position < 30 else 0)
    assert cache.miss_bytes == 31 * 128
    assert sum(roi[5] - roi[2] == 8 for roi in volume.reads) == 1  # else no more than was asked for

    kept = VolumeCache(max_bytes=10 * 128)
    for number in rng.integers(0, 20, 400).tolist():  # half of it fits
        kept.read("v", lambda: volume, (0, 0, 8 * number, 1, 8, 8 * number + 8))
    assert kept.num_bytes == 10 * 128
    assert 0.4 < kept.hit_bytes / (kept.hit_bytes + kept.miss_bytes) < 0.6


def test_opening_is_remembered_for_the_latest_volumes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(volume_cache, "_MAX_OPEN", 2)
    opened: list[str] = []

    def opener(name: str) -> ArrayVolume:
        opened.append(name)
        return ArrayVolume(np.zeros((2, 3, 5), np.uint8))

    cache = VolumeCache(max_bytes=0)
    for name in ("a", "b", "a", "c", "a", "b"):
        cache.read(name, lambda name=name: opener(name), (0, 0, 0, 1, 1, 1))  # type: ignore[misc]
    assert opened == ["a", "b", "c", "b"]
    with pytest.raises(ValueError, match="max_bytes=-1"):
        VolumeCache(max_bytes=-1)
