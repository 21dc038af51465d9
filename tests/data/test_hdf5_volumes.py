"""Imaris and BigDataViewer files, written here with h5py as their programs lay them out."""

import pickle

import h5py
import hdf5plugin
import numpy as np
import pytest

from seg3d_monai.data.bdv import ViewSetup, scenes_of
from seg3d_monai.data.convert import convert_volume
from seg3d_monai.data.volume import open_volume

SERIES_SHAPE = (2, 3, 9, 34, 47)  # T, C, Z, Y, X


@pytest.fixture
def series():
    """Two time points of three channels."""
    return np.random.default_rng(5).integers(0, 60000, SERIES_SHAPE).astype(np.uint16)


def text(value):
    """Imaris keeps numbers and words as arrays of characters."""
    return np.frombuffer(str(value).encode(), dtype="S1")


def write_imaris(path, series, *, extent=((0, 0, 0), (18.8, 17.0, 18.0)), unit="um", name="", filters=None):
    """An Imaris file of two levels, chunks padded to (8, 16, 16)."""
    levels = [series, series[..., ::2, ::2, ::2]]
    with h5py.File(path, "a") as file:
        info = file.create_group(f"DataSetInfo{name}/Image")
        for axis in range(3):
            info.attrs[f"ExtMin{axis}"], info.attrs[f"ExtMax{axis}"] = text(extent[0][axis]), text(extent[1][axis])
        for axis, n in zip("XYZ", series.shape[:1:-1], strict=True):
            info.attrs[axis] = text(n)
        if unit:
            info.attrs["Unit"] = text(unit)
        for r, level in enumerate(levels):
            padding = [(0, -n % c) for n, c in zip(level.shape[2:], (8, 16, 16), strict=True)]
            for t, c in np.ndindex(level.shape[:2]):
                group = file.create_group(f"DataSet{name}/ResolutionLevel {r}/TimePoint {t}/Channel {c}")
                for axis, n in zip("ZYX", level.shape[2:], strict=True):
                    group.attrs[f"ImageSize{axis}"] = text(n)
                group.create_dataset(
                    "Data",
                    data=np.pad(level[t, c], padding, constant_values=7),
                    chunks=(8, 16, 16),
                    **(filters or {"compression": "gzip"}),
                )
    return path


def test_imaris(tmp_path, series, random_rois):
    path = write_imaris(tmp_path / "a.ims", series)
    volume = open_volume(path, time=1)
    assert volume.shape == SERIES_SHAPE[1:]
    assert volume.dtype == np.uint16
    assert volume.spacing_um == pytest.approx((2.0, 0.5, 0.4))
    assert volume.chunk_shape == (8, 16, 16)
    for z1, y1, x1, z2, y2, x2 in random_rois(SERIES_SHAPE[2:]):
        np.testing.assert_array_equal(volume.read((z1, y1, x1, z2, y2, x2)), series[1, :, z1:z2, y1:y2, x1:x2])
    chosen = open_volume(path, channels=[2, 0])
    np.testing.assert_array_equal(chosen.read((1, 2, 3, 9, 34, 47)), series[0, [2, 0], 1:, 2:, 3:])
    coarse = pickle.loads(pickle.dumps(open_volume(path, level="2,0.5,0.4um", channels=0)))
    assert coarse.level == 0
    coarse = open_volume(path, level="4,1,1um", channels=0)
    assert coarse.spacing_um == pytest.approx((18 / 5, 1.0, 18.8 / 24))
    np.testing.assert_array_equal(coarse.read((0, 0, 0, 5, 17, 24)), series[0, :1, ::2, ::2, ::2])


def test_imaris_with_more_than_ten_channels_in_their_order(tmp_path, stack):
    series = np.stack([stack[:2, :5, :6] + c for c in range(12)])[None]
    volume = open_volume(write_imaris(tmp_path / "a.ims", series))
    np.testing.assert_array_equal(volume.read((0, 0, 0, 2, 5, 6)), series[0])


def test_imaris_with_other_compression_without_unit_and_with_two_datasets(tmp_path, series):
    path = write_imaris(tmp_path / "a.ims", series, filters=dict(hdf5plugin.LZ4()), unit="")
    assert open_volume(path).spacing_um is None
    np.testing.assert_array_equal(open_volume(path).read((0, 0, 0, 9, 34, 47)), series[0])
    write_imaris(path, series[:1] + 1, name="1")
    np.testing.assert_array_equal(open_volume(path, scene="DataSet1").read((0, 0, 0, 9, 34, 47)), series[0] + 1)
    np.testing.assert_array_equal(open_volume(path).read((0, 0, 0, 9, 34, 47)), series[0])


def bdv_xml(setups, *, loader="bdv.hdf5", place='<hdf5 type="relative">a.h5</hdf5>', unit="um", size="0.4 0.5 2.0"):
    """A dataset's XML; setups are (id, {attribute: id})."""
    described = "".join(
        f"<ViewSetup><id>{number}</id><size>47 34 9</size><voxelSize><unit>{unit}</unit><size>{size}</size></voxelSize>"
        f"<attributes>{''.join(f'<{k}>{v}</{k}>' for k, v in attributes.items())}</attributes></ViewSetup>"
        for number, attributes in setups
    )
    return (
        f'<SpimData version="0.2"><BasePath type="relative">.</BasePath><SequenceDescription><ImageLoader '
        f'format="{loader}">{place}</ImageLoader><ViewSetups>{described}</ViewSetups></SequenceDescription></SpimData>'
    )


def write_bdv(path, arrays, times=(0, 1)):
    """BigDataViewer HDF5 of two levels; arrays is setup -> [T, Z, Y, X]."""
    with h5py.File(path, "w") as file:
        for setup, array in arrays.items():
            file[f"s{setup:02d}/resolutions"] = np.array([[1, 1, 1], [2, 2, 1]], dtype=float)  # x, y, z
            file[f"s{setup:02d}/subdivisions"] = np.array([[16, 16, 8], [16, 16, 8]], dtype=np.int32)
            for time, voxels in zip(times, array, strict=True):
                for level, data in enumerate((voxels, voxels[:, ::2, ::2])):
                    file.create_dataset(
                        f"t{time:05d}/s{setup:02d}/{level}/cells",
                        data=data.view(np.int16),
                        chunks=(8, 16, 16),
                        compression="gzip",
                    )
    return path


@pytest.mark.parametrize("name", ["a.h5", "a.xml"])
def test_bdv_hdf5(tmp_path, series, random_rois, name):
    # Setups are out of the order of their channels, and a second angle has other voxels.
    other = series[:, 0] // 2
    path = write_bdv(tmp_path / "a.h5", {0: series[:, 2], 1: series[:, 0], 2: other, 11: series[:, 1]}, times=(3, 7))
    setups = [
        (0, {"angle": 0, "channel": 2}),
        (1, {"angle": 0, "channel": 0}),
        (2, {"angle": 1, "channel": 0}),
        (11, {"angle": 0, "channel": 1}),
    ]
    (tmp_path / "a.xml").write_text(bdv_xml(setups))
    with pytest.raises(ValueError, match=r"several images; pass scene, one of: 0 \('angle 0'\), 1 \('angle 1'\)"):
        open_volume(tmp_path / name)
    volume = open_volume(tmp_path / name, scene="angle 0", time=1)
    assert volume.shape == SERIES_SHAPE[1:]
    assert volume.dtype == np.uint16
    assert volume.spacing_um == (2.0, 0.5, 0.4)
    for z1, y1, x1, z2, y2, x2 in random_rois(SERIES_SHAPE[2:], count=10):
        np.testing.assert_array_equal(volume.read((z1, y1, x1, z2, y2, x2)), series[1, :, z1:z2, y1:y2, x1:x2])
    coarse = open_volume(path, scene=0, level="1um", channels=1)
    assert coarse.spacing_um == (2.0, 1.0, 0.8)
    np.testing.assert_array_equal(coarse.read((0, 0, 0, 9, 17, 24)), series[0, 1:2, :, ::2, ::2])
    np.testing.assert_array_equal(open_volume(path, scene=1).read((0, 0, 0, 9, 34, 47))[0], other[0])


def test_bdv_hdf5_without_xml_has_a_scene_a_setup(tmp_path, series):
    path = write_bdv(tmp_path / "a.h5", {0: series[:, 0], 1: series[:, 1]})
    with pytest.raises(ValueError, match=r"0 \('setup 0'\), 1 \('setup 1'\)"):
        open_volume(path)
    volume = open_volume(path, scene=1)
    assert volume.spacing_um is None
    np.testing.assert_array_equal(volume.read((0, 0, 0, 9, 34, 47))[0], series[0, 1])
    alone = write_bdv(tmp_path / "b.h5", {0: series[:, 0]})
    assert open_volume(alone).shape == (1, 9, 34, 47)


def test_setups_that_make_up_a_view():
    def setup(number, **attributes):
        return ViewSetup(number, {}, {k: str(v) for k, v in attributes.items()})

    views = scenes_of([setup(0, tile=0, channel=1), setup(1, tile=1, channel=0), setup(2, tile=0, channel=0)])
    assert [(name, [s.number for s in members]) for name, members in views] == [("tile 0", [2, 0]), ("tile 1", [1])]
    # The same channel twice: what tells them apart is not written.
    twice = scenes_of([setup(0, channel=0), setup(1, channel=0)])
    assert [name for name, _ in twice] == ["setup 0", "setup 1"]
    only = scenes_of([setup(4, channel=1), setup(5, channel=0)])
    assert [(name, [s.number for s in members]) for name, members in only] == [("setup 5", [5, 4])]


def test_damaged_and_foreign_files(tmp_path, series):
    path = write_imaris(tmp_path / "a.ims", series)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"a\.ims: cannot be read as HDF5 .*copy or write the file again"):
        open_volume(path)
    with h5py.File(tmp_path / "b.h5", "w") as file:
        file["volume"] = series
    with pytest.raises(ValueError, match=r"b\.h5: HDF5 that is neither Imaris nor BigDataViewer"):
        open_volume(tmp_path / "b.h5")
    with h5py.File(tmp_path / "c.ims", "w") as file:
        file.create_group("DataSet")
        file.create_group("DataSetInfo")
    with pytest.raises(ValueError, match=r"c\.ims: not laid out as Imaris files are"):
        open_volume(tmp_path / "c.ims")
    (tmp_path / "d.xml").write_text("<SpimData>")
    with pytest.raises(ValueError, match=r"d\.xml: cannot be read as XML"):
        open_volume(tmp_path / "d.xml")
    (tmp_path / "e.xml").write_text(bdv_xml([], loader="spimreconstruction.stack", place=""))
    with pytest.raises(ValueError, match=r"e\.xml: no BigDataViewer dataset .*'spimreconstruction\.stack'"):
        open_volume(tmp_path / "e.xml")
    (tmp_path / "f.xml").write_text(bdv_xml([], place='<hdf5 type="relative">gone.h5</hdf5>'))
    with pytest.raises(FileNotFoundError, match=r"gone\.h5"):
        open_volume(tmp_path / "f.xml")


def test_a_damaged_chunk_is_named(tmp_path, series):
    path = write_imaris(tmp_path / "a.ims", series)
    with h5py.File(path, "r") as file:
        chunk = file["DataSet/ResolutionLevel 0/TimePoint 0/Channel 1/Data"].id.get_chunk_info_by_coord((0, 16, 16))
    with path.open("r+b") as file:
        file.seek(chunk.byte_offset)
        file.write(b"\x5a" * chunk.size)
    volume = open_volume(path)
    assert volume.read((0, 0, 0, 8, 16, 16)).shape == (3, 8, 16, 16)
    with pytest.raises(
        ValueError, match=r"a\.ims: DataSet/ResolutionLevel 0/TimePoint 0/Channel 1/Data cannot be read"
    ):
        volume.read((0, 0, 0, 8, 17, 17))
    path = write_bdv(tmp_path / "a.h5", {0: series[:, 0]})
    with h5py.File(path, "r+") as file:
        del file["t00001/s00/0/cells"]
    with pytest.raises(ValueError, match="setup 0, time point 1, level 0 cannot be read"):
        open_volume(path, time=1).read((0, 0, 0, 1, 1, 1))


def test_conversion_by_threads(tmp_path, series):
    ims = write_imaris(tmp_path / "a.ims", series)
    h5 = write_bdv(tmp_path / "b.h5", {0: series[:, 1]})
    (tmp_path / "b.xml").write_text(bdv_xml([(0, {"channel": 0})], place='<hdf5 type="relative">b.h5</hdf5>'))
    options = {"time": "all", "num_workers": 3, "chunk_size": 8, "shard_size": 16}
    for path, expected in ((ims, series), (h5, series[:, 1:2])):
        convert_volume(path, tmp_path / f"{path.stem}.zarr", **options)
        for time in (0, 1):
            volume = open_volume(tmp_path / f"{path.stem}.zarr", time=time)
            assert volume.spacing_um == pytest.approx((2.0, 0.5, 0.4))
            np.testing.assert_array_equal(volume.read((0, 0, 0, 9, 34, 47)), expected[time])
