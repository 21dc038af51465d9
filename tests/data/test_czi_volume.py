"""CZI files that ZEISS' own library writes, against the arrays that went in."""

import multiprocessing
import pickle

import numpy as np
import pytest
from pylibCZIrw import czi

from seg3d_monai.data.convert import convert_volume
from seg3d_monai.data.volume import open_volume


def write(path, scenes, *, compression=None, origin=(7, -5), first=0, scale=True):
    """A CZI of [T, C, Z, Y, X] arrays, one a scene, each plane in four tiles of a mosaic."""
    with czi.create_czi(str(path), compression_options=compression) as document:
        for number, array in enumerate(scenes):
            for t, c, z in np.ndindex(array.shape[:3]):
                rows, columns = array.shape[3] // 2, array.shape[4] // 3
                for low, high in ((0, rows), (rows, array.shape[3])):
                    for left, right in ((0, columns), (columns, array.shape[4])):
                        tile = array[t, c, z, low:high, left:right]
                        document.write(
                            tile if tile.ndim == 3 else tile[..., None],
                            location=(left + origin[1] + 1000 * number, low + origin[0]),
                            plane={"T": t, "C": c, "Z": z + first},
                            scene=number,
                        )
        if scale:
            document.write_metadata(scale_x=4e-7, scale_y=5e-7, scale_z=2e-6)
    return path


@pytest.fixture
def array():
    """[T, C, Z, Y, X]."""
    return np.random.default_rng(2).integers(0, 60000, (2, 3, 4, 34, 47)).astype(np.uint16)


@pytest.mark.parametrize("compression", [None, "zstd1:ExplicitLevel=2"])
@pytest.mark.parametrize("first", [0, 3])
def test_planes_channels_times_and_mosaics(tmp_path, array, random_rois, compression, first):
    path = write(tmp_path / "a.czi", [array], compression=compression, first=first)
    volume = open_volume(path, time=1, channels=[2, 0])
    assert volume.shape == (2, 4, 34, 47)
    assert volume.dtype == np.uint16
    assert volume.spacing_um == pytest.approx((2.0, 0.5, 0.4))
    for z1, y1, x1, z2, y2, x2 in random_rois((4, 34, 47), count=10):
        np.testing.assert_array_equal(volume.read((z1, y1, x1, z2, y2, x2)), array[1, [2, 0], z1:z2, y1:y2, x1:x2])
    assert volume.identity() == open_volume(path, time=1, channels=[2, 0]).identity()


@pytest.mark.parametrize("dtype", ["uint8", "float32"])
def test_other_types_and_no_voxel_size(tmp_path, array, dtype):
    values = (array % 256).astype(dtype)
    volume = open_volume(write(tmp_path / "a.czi", [values], scale=False))
    assert volume.spacing_um is None
    np.testing.assert_array_equal(volume.read((0, 0, 0, 4, 34, 47)), values[0])
    assert volume.dtype == dtype


def test_colours_are_channels_red_first(tmp_path):
    bgr = np.random.default_rng(2).integers(0, 255, (1, 1, 3, 20, 30, 3)).astype(np.uint8)
    volume = open_volume(write(tmp_path / "a.czi", [bgr]))
    np.testing.assert_array_equal(volume.read((0, 0, 0, 3, 20, 30)), np.moveaxis(bgr[0, 0], -1, 0)[::-1])
    np.testing.assert_array_equal(
        open_volume(tmp_path / "a.czi", channels=1).read((1, 2, 3, 2, 9, 9))[0, 0], bgr[0, 0, 1, 2:9, 3:9, 1]
    )


def test_scenes(tmp_path, array):
    path = write(tmp_path / "a.czi", [array[:1], array[:1, :, :, :20, :30] // 2])
    with pytest.raises(ValueError, match="holds several images; pass scene, one of: 0, 1"):
        open_volume(path)
    volume = pickle.loads(pickle.dumps(open_volume(path, scene=1)))
    np.testing.assert_array_equal(volume.read((0, 0, 0, 4, 20, 30)), array[0, :, :, :20, :30] // 2)
    with pytest.raises(ValueError, match="level=1 is not there"):
        open_volume(path, scene=0, level=1)


def test_a_forked_child_reads_what_its_parent_opened(tmp_path, array):
    volume = open_volume(write(tmp_path / "a.czi", [array]))
    expected = volume.read((0, 0, 0, 4, 34, 47))
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    child = context.Process(target=lambda: queue.put(bool((volume.read((0, 0, 0, 4, 34, 47)) == expected).all())))
    child.start()
    child.join(timeout=60)
    assert child.exitcode == 0
    assert queue.get()


def test_damaged_files(tmp_path, array):
    path = write(tmp_path / "a.czi", [array])
    (tmp_path / "b.czi").write_bytes(b"something else")
    with pytest.raises(ValueError, match=r"b\.czi: is no CZI file"):
        open_volume(tmp_path / "b.czi")
    (tmp_path / "c.czi").write_bytes(path.read_bytes()[:3000])
    with pytest.raises(ValueError, match=r"c\.czi: cannot be read as CZI"):
        open_volume(tmp_path / "c.czi")


def test_conversion_by_threads(tmp_path, array):
    path = write(tmp_path / "a.czi", [array])
    convert_volume(path, tmp_path / "a.zarr", time=[1], num_workers=3, chunk_size=8, shard_size=16)
    assert open_volume(tmp_path / "a.zarr").spacing_um == pytest.approx((2.0, 0.5, 0.4))
    np.testing.assert_array_equal(open_volume(tmp_path / "a.zarr").read((0, 0, 0, 4, 34, 47)), array[1])
