"""Blocks that hold something, against a loop over all voxels of every block."""

import numpy as np
import pytest
import zarr

from seg3d_monai.data.volume import ArrayVolume, Volume, open_volume
from seg3d_monai.inference import foreground
from seg3d_monai.inference.blocks import BlockPlan, roi_slices
from seg3d_monai.inference.foreground import foreground_blocks

SHAPE = (14, 37, 52)
PLAN = BlockPlan.make(shape=SHAPE, block_size=(5, 12, 13), halo=(1, 3, 2))


class Counting(Volume):
    """A volume stored in chunks that knows how many voxels were read."""

    def __init__(self, array, chunk_shape):
        self.inner = ArrayVolume(array)
        self.shape, self.dtype, self.spacing_um, self.path = self.inner.shape, self.inner.dtype, None, None
        self.chunk_shape = chunk_shape
        self.rois = []

    def read(self, roi):
        self.rois.append(tuple(roi))
        return self.inner.read(roi)

    def num_read(self):
        return sum(int(np.prod(np.subtract(roi[3:], roi[:3]))) for roi in self.rois)


def naive(plan, array, mask=None, skip_below=None):
    """mask: of the stack's own shape."""
    array = array[None] if array.ndim == 3 else array
    answer = []
    for block in plan:
        voxels = [channel[roi_slices(block.read)].ravel().tolist() for channel in array]
        if skip_below is None:
            is_foreground = any(v != values[0] for values in voxels for v in values)
        else:
            limits = np.broadcast_to(skip_below, len(voxels))
            is_foreground = any(not v <= limit for values, limit in zip(voxels, limits, strict=True) for v in values)
        answer.append(is_foreground and (mask is None or bool((mask[roi_slices(block.read)] > 0).any())))
    return answer


def spots(shape, count, seed=0, background=0):
    """Dark, with a few small bright boxes."""
    rng = np.random.default_rng(seed)
    array = np.full(shape, background, np.uint16)
    for _ in range(count):
        corner = [int(rng.integers(0, n)) for n in shape[-3:]]
        array[(..., *(slice(c, c + 3) for c in corner))] = rng.integers(500, 900)
    return array


def pyramid(path, levels, version="0.5", axes="zyx"):
    group = zarr.open_group(path, mode="w", zarr_format=2 if version == "0.4" else 3)
    datasets = []
    for level, array in enumerate(levels):
        chunks = tuple(min(n, 8) for n in array.shape)
        group.create_array(str(level), data=array, chunks=chunks)
        scale = [1.0 if axis in "tc" else 2.0**level for axis in axes]
        datasets.append({"path": str(level), "coordinateTransformations": [{"type": "scale", "scale": scale}]})
    kinds = {"t": "time", "c": "channel"}
    multiscale = {"axes": [{"name": a, "type": kinds.get(a, "space")} for a in axes], "datasets": datasets}
    group.attrs.put({"multiscales": [multiscale]} if version == "0.4" else {"ome": {"multiscales": [multiscale]}})
    return path


def halved(array):
    """The mean of 2 x 2 x 2 voxels, the last ones repeated."""
    padded = np.pad(array, [(0, 0)] * (array.ndim - 3) + [(0, n % 2) for n in array.shape[-3:]], mode="edge")
    cells = [padded[..., i::2, j::2, k::2] for i in (0, 1) for j in (0, 1) for k in (0, 1)]
    return np.rint(np.mean(cells, axis=0)).astype(array.dtype)


@pytest.mark.parametrize("count", [0, 1, 3, 12])
@pytest.mark.parametrize("skip_below", [None, 99, 400.5, 899, float("-inf"), float("inf")])
def test_equals_a_loop_over_all_voxels(count, skip_below):
    array = spots(SHAPE, count, seed=count, background=100)
    for volume in (ArrayVolume(array), Counting(array, (4, 8, 8)), Counting(array, (1, 37, 52))):
        found = foreground_blocks(PLAN, volume, skip_below=skip_below)
        assert found.dtype == bool
        assert found.tolist() == naive(PLAN, array, skip_below=skip_below)


def test_an_empty_stack_has_no_foreground():
    for value in (0, 7):
        volume = ArrayVolume(np.full((2, *SHAPE), value, np.uint8))
        assert not foreground_blocks(PLAN, volume).any()
        assert not foreground_blocks(PLAN, volume, skip_below=7).any()
        assert foreground_blocks(PLAN, volume, skip_below=(7, -1)).all()


@pytest.mark.parametrize("corner", range(8))
def test_one_voxel_at_a_corner_of_what_a_block_reads(corner):
    read = PLAN[len(PLAN) // 2].read
    place = tuple(read[a + 3] - 1 if corner >> a & 1 else read[a] for a in range(3))
    array = np.zeros(SHAPE, np.uint8)
    array[place] = 1
    inside = [all(b.read[a] <= place[a] < b.read[a + 3] for a in range(3)) for b in PLAN]
    assert inside[len(PLAN) // 2]
    for volume in (ArrayVolume(array), Counting(array, (3, 5, 7))):
        assert foreground_blocks(PLAN, volume).tolist() == inside
        assert foreground_blocks(PLAN, volume, skip_below=0).tolist() == inside
    assert foreground_blocks(PLAN, ArrayVolume(np.ones(SHAPE, np.uint8)), mask=array, skip_below=0).tolist() == inside


@pytest.mark.parametrize("skip_below", [(150, 450), [899, 899], (0, 899), None])
def test_channels_have_thresholds_of_their_own(skip_below):
    array = np.stack([spots(SHAPE, 3, seed=1), spots(SHAPE, 3, seed=2, background=100)])
    assert foreground_blocks(PLAN, ArrayVolume(array), skip_below=skip_below).tolist() == naive(
        PLAN, array, skip_below=skip_below
    )


@pytest.mark.parametrize("skip_below", [None, 5.0])
def test_nan_is_foreground(skip_below):
    array = np.zeros(SHAPE, np.float32)
    array[6, 20, 30] = np.nan
    found = foreground_blocks(PLAN, ArrayVolume(array), skip_below=skip_below)
    assert 0 < found.sum() < len(PLAN)
    assert found.tolist() == naive(PLAN, array, skip_below=skip_below)
    assert foreground_blocks(PLAN, ArrayVolume(np.full(SHAPE, np.nan)), skip_below=skip_below).all()


def test_mask_of_the_same_grid():
    array, mask = spots(SHAPE, 10, seed=3), spots(SHAPE, 2, seed=4) > 0
    ones = np.arange(np.prod(SHAPE)).reshape(SHAPE)
    wanted = naive(PLAN, ones, mask)
    assert 0 < sum(wanted) < len(PLAN)
    assert foreground_blocks(PLAN, ArrayVolume(ones), mask=mask).tolist() == wanted
    assert foreground_blocks(PLAN, ArrayVolume(array), mask=ArrayVolume(mask), skip_below=0).tolist() == naive(
        PLAN, array, mask, skip_below=0
    )
    assert not foreground_blocks(PLAN, ArrayVolume(ones), mask=np.zeros((2, 3, 4), np.int16)).any()
    assert foreground_blocks(PLAN, ArrayVolume(ones), mask=np.ones((1, 1, 1), bool)).all()


@pytest.mark.parametrize("seed", range(4))
def test_mask_of_coarser_and_finer_voxels(tmp_path, seed):
    plan = BlockPlan.make(shape=(12, 30, 40), block_size=(4, 10, 8), halo=(1, 2, 3))
    ones = np.arange(12 * 30 * 40).reshape(plan.shape)
    coarse = (np.random.default_rng(seed).random((4, 6, 20)) < 0.01).astype(np.uint8)
    zarr.create_array(tmp_path / "mask.zarr", data=coarse, chunks=(2, 3, 4))
    wanted = naive(plan, ones, np.kron(coarse, np.ones((3, 5, 2))))
    for mask in (coarse, tmp_path / "mask.zarr", str(tmp_path / "mask.zarr")):
        assert foreground_blocks(plan, ArrayVolume(ones), mask=mask).tolist() == wanted
    fine = np.random.default_rng(seed).random((24, 30, 120)) < 0.0001
    reduced = fine.reshape(12, 2, 30, 1, 40, 3).any(axis=(1, 3, 5))
    assert foreground_blocks(plan, ArrayVolume(ones), mask=fine).tolist() == naive(plan, ones, reduced)


def test_a_coarse_mask_voxel_counts_where_a_part_of_it_lies():
    """Ten voxels, four of the mask: the second covers 2.5 to 5, the third 5 to 7.5."""
    plan = BlockPlan.make(shape=(1, 1, 10), block_size=(1, 1, 2), halo=(0, 0, 1))
    values = ArrayVolume(np.arange(10).reshape(1, 1, 10))
    for index, wanted in ((1, [1, 1, 1, 0, 0]), (2, [0, 0, 1, 1, 1])):
        mask = np.zeros((1, 1, 4), np.uint8)
        mask[..., index] = 1
        assert foreground_blocks(plan, values, mask=mask).tolist() == wanted


def test_a_large_mask_is_read_block_by_block(monkeypatch):
    mask, ones = spots(SHAPE, 2, seed=4), np.arange(np.prod(SHAPE)).reshape(SHAPE)
    wanted = foreground_blocks(PLAN, ArrayVolume(ones), mask=Counting(mask, (4, 8, 8))).tolist()
    monkeypatch.setattr(foreground, "LOOK_VOXELS", 100)
    counting = Counting(mask, (4, 8, 8))
    assert foreground_blocks(PLAN, ArrayVolume(ones), mask=counting).tolist() == wanted
    assert counting.rois == [block.read for block in PLAN]


@pytest.mark.parametrize("version", ["0.4", "0.5"])
@pytest.mark.parametrize(("count", "skip_below"), [(0, 100), (2, 100), (9, 100), (2, None), (9, 600)])
def test_multiscale_images_equal_the_loop(tmp_path, version, count, skip_below):
    array = spots(SHAPE, count, seed=count, background=100)
    volume = open_volume(pyramid(tmp_path / "x.zarr", [array, halved(array), halved(halved(array))], version))
    assert foreground_blocks(PLAN, volume, skip_below=skip_below).tolist() == naive(PLAN, array, skip_below=skip_below)


@pytest.mark.parametrize("last", ["kept", "dropped"])
def test_coarse_voxels_never_lend_a_block_what_lies_beside_it(tmp_path, last):
    """Every place of one bright voxel in a row whose levels round the last voxel up or down."""
    plan = BlockPlan.make(shape=(1, 1, 27), block_size=(1, 1, 9), halo=(0, 0, 2))
    for place in range(27):
        array = np.zeros(plan.shape, np.uint16)
        array[..., place] = 1000
        cells = np.pad(array, [(0, 0), (0, 0), (0, 1)]) if last == "kept" else array[..., :26]
        coarse = cells.reshape(1, 1, -1, 2).mean(-1).astype(np.uint16)
        volume = open_volume(pyramid(tmp_path / f"{place}.zarr", [array, coarse]))
        assert foreground_blocks(plan, volume, skip_below=0).tolist() == naive(plan, array, skip_below=0)


def test_the_level_below_the_one_that_was_opened_and_the_same_channels_and_time(tmp_path):
    first = np.stack([spots(SHAPE, 4, seed=c) for c in range(3)])
    array = np.stack([first[::-1], first])
    path = pyramid(tmp_path / "x.zarr", [array, halved(array), halved(halved(array))], axes="tczyx")
    volume = open_volume(path, channels=[2, 0], time=1)
    for skip_below in (None, (700, 200)):
        assert foreground_blocks(PLAN, volume, skip_below=skip_below).tolist() == naive(
            PLAN, first[[2, 0]], skip_below=skip_below
        )
    half = open_volume(path, level=1, time=1, channels=1)
    plan = BlockPlan.make(shape=half.shape[1:], block_size=(3, 8, 8), halo=1)
    assert foreground_blocks(plan, half, skip_below=20).tolist() == naive(plan, halved(first[1]), skip_below=20)


def test_where_a_coarse_level_shows_something_no_fine_voxel_is_read(tmp_path, monkeypatch):
    shape = (16, 64, 64)
    plan = BlockPlan.make(shape=shape, block_size=(16, 32, 32), halo=(0, 4, 4))
    array = np.zeros(shape, np.uint16)
    array[4:12, 8:24, 8:24] = 50  # well inside the first block
    volume = open_volume(pyramid(tmp_path / "x.zarr", [array, halved(array), halved(halved(array))]))
    rois = []
    read = type(volume).read
    monkeypatch.setattr(type(volume), "read", lambda self, roi: rois.append((self.shape, roi)) or read(self, roi))
    assert foreground_blocks(plan, volume, skip_below=0).tolist() == [True, False, False, False]
    assert ((1, 8, 32, 32), (0, 0, 0, 8, 32, 32)) in rois
    fine = [roi for shape_read, roi in rois if shape_read == (1, *shape)]
    assert not any(roi[4] <= 28 and roi[5] <= 28 for roi in fine)
    assert sum(np.prod(np.subtract(r[3:], r[:3])) for r in fine) == 3 * 16 * 36 * 36  # the dark blocks, whole
    rois.clear()
    monkeypatch.setattr(foreground, "LOOK_VOXELS", 4 * 16 * 16)  # the level after next
    assert foreground_blocks(plan, volume, skip_below=0).tolist() == [True, False, False, False]
    assert ((1, 4, 16, 16), (0, 0, 0, 4, 16, 16)) in rois
    monkeypatch.setattr(foreground, "LOOK_VOXELS", 10)  # none
    assert foreground_blocks(plan, volume, skip_below=0).tolist() == [True, False, False, False]


def test_a_block_is_read_until_one_piece_settles_it():
    shape, chunk = (64, 192, 192), (16, 64, 64)
    plan = BlockPlan.make(shape=shape, block_size=(32, 96, 96), halo=(8, 16, 16))
    noise = np.random.default_rng(0).integers(100, 110, shape).astype(np.uint16)
    volume = Counting(noise, chunk)
    assert foreground_blocks(plan, volume).all()
    assert len(volume.rois) == len(plan)  # one chunk each
    assert volume.num_read() < 0.15 * sum(np.prod(np.subtract(b.read[3:], b.read[:3])) for b in plan)
    dark = Counting(noise, chunk)
    assert not foreground_blocks(plan, dark, skip_below=110).any()
    assert dark.num_read() == sum(np.prod(np.subtract(b.read[3:], b.read[:3])) for b in plan)  # nothing twice
    masked = Counting(noise, chunk)
    corner = np.zeros((4, 4, 4), np.uint8)
    corner[0, 0, 0] = 1
    assert foreground_blocks(plan, masked, mask=corner).sum() == 1
    assert len(masked.rois) == 1


def test_small_chunks_are_read_together_and_pages_one_by_one(monkeypatch):
    monkeypatch.setattr(foreground, "PIECE_VOXELS", 2000)
    array = np.zeros((20, 40, 60), np.uint8)
    plan = BlockPlan.make(shape=array.shape, block_size=(10, 40, 30), halo=2)
    for chunk, most in (((2, 4, 4), 2000), ((1, 40, 60), 40 * 32), ((20, 40, 60), 12 * 40 * 32)):
        volume = Counting(array, chunk)
        assert not foreground_blocks(plan, volume).any()
        sizes = [int(np.prod(np.subtract(roi[3:], roi[:3]))) for roi in volume.rois]
        assert max(sizes) <= most
        assert np.mean(sizes) > most / 4
        assert sum(sizes) == sum(np.prod(np.subtract(b.read[3:], b.read[:3])) for b in plan)


def test_chunks_that_were_never_written(tmp_path):
    array = zarr.create_array(tmp_path / "x.zarr", shape=SHAPE, chunks=(4, 8, 8), dtype="uint16", fill_value=3)
    array[5:7, 9:12, 40:44] = 9
    volume = open_volume(tmp_path / "x.zarr")
    found = foreground_blocks(PLAN, volume)
    assert 0 < found.sum() < len(PLAN)
    assert found.tolist() == naive(PLAN, array[:])


@pytest.mark.parametrize(
    ("skip_below", "kind"),
    [((1, 2, 3), ValueError), (float("nan"), ValueError), ([[1, 2]], ValueError), ("dark", TypeError)],
)
def test_thresholds_that_do_not_fit_are_refused(skip_below, kind):
    with pytest.raises(kind, match="skip_below"):
        foreground_blocks(PLAN, ArrayVolume(np.zeros((2, *SHAPE))), skip_below=skip_below)


def test_a_plan_for_another_volume_and_a_missing_mask_are_refused(tmp_path):
    with pytest.raises(ValueError, match="plan is for a volume of shape"):
        foreground_blocks(PLAN, ArrayVolume(np.zeros((2, 3, 4))))
    with pytest.raises(FileNotFoundError, match=r"mask\.zarr"):
        foreground_blocks(PLAN, ArrayVolume(np.zeros(SHAPE)), mask=tmp_path / "mask.zarr")
