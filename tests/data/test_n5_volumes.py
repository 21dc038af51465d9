"""N5 arrays, pyramids and BigDataViewer's layout, written by z5py and, for one array, by hand as the format says."""

import json
import multiprocessing
import pickle
import struct
import zlib

import numpy as np
import pytest
import z5py

from seg3d_monai.data.convert import convert_volume
from seg3d_monai.data.volume import open_volume


def write(container, name, array, attributes=None, **options):
    """One array in a container, and attributes beside z5py's own."""
    file = z5py.N5File(str(container), mode="a")
    dataset = file.create_dataset(
        name, data=array, chunks=(4, 16, 16)[-array.ndim :], **{"compression": "gzip", **options}
    )
    if attributes:
        dataset.attrs.update(attributes)
    return container / name


def test_an_array_written_by_hand(tmp_path, stack):
    """Blocks of (x, y, z) = (16, 16, 4), big-endian, x fastest, each with its extents before the voxels."""
    folder = tmp_path / "hand.n5" / "a"
    folder.mkdir(parents=True)
    (tmp_path / "hand.n5" / "attributes.json").write_text('{"n5": "2.5.1"}')
    described = {
        "dimensions": [47, 34, 9],
        "blockSize": [16, 16, 4],
        "dataType": "uint16",
        "compression": {"type": "gzip", "useZlib": False, "level": -1},
    }
    (folder / "attributes.json").write_text(json.dumps(described))
    for z, y, x in np.ndindex(3, 3, 3):
        block = stack[4 * z : 4 * z + 4, 16 * y : 16 * y + 16, 16 * x : 16 * x + 16]
        header = struct.pack(">HH3I", 0, 3, *block.shape[::-1])
        compressor = zlib.compressobj(wbits=31)
        place = folder / str(x) / str(y)
        place.mkdir(parents=True, exist_ok=True)
        (place / str(z)).write_bytes(header + compressor.compress(block.astype(">u2").tobytes()) + compressor.flush())
    for path in (folder, tmp_path / "hand.n5"):
        volume = open_volume(path)
        assert volume.chunk_shape == (4, 16, 16)
        np.testing.assert_array_equal(volume.read((0, 0, 0, 9, 34, 47))[0], stack)
        np.testing.assert_array_equal(volume.read((3, 15, 17, 8, 33, 46))[0], stack[3:8, 15:33, 17:46])


@pytest.mark.parametrize("compression", ["raw", "gzip", "blosc", "zstd", "lz4", "bzip2"])
def test_compression(tmp_path, stack, random_rois, compression):
    path = write(tmp_path / "a.n5", "raw", stack, compression=compression)
    volume = open_volume(path)
    assert volume.spacing_um is None
    for z1, y1, x1, z2, y2, x2 in random_rois(stack.shape, count=10):
        np.testing.assert_array_equal(volume.read((z1, y1, x1, z2, y2, x2))[0], stack[z1:z2, y1:y2, x1:x2])


@pytest.mark.parametrize(
    "where",
    [
        {"pixelResolution": {"unit": "um", "dimensions": [0.4, 0.5, 2.0]}},
        {"resolution": [400, 500, 2000], "units": ["nm", "nm", "nm"]},
        {"transform": {"axes": ["z", "y", "x"], "scale": [2000, 500, 400], "units": ["nm"] * 3}},
    ],
)
def test_pyramids_and_voxel_sizes(tmp_path, stack, where):
    container = tmp_path / "a.n5"
    write(container, "c0/s0", stack, where)
    write(container, "c0/s1", stack[:, ::2, ::2], {"downsamplingFactors": [2, 2, 1]})
    for path in (container, container / "c0"):
        volume = open_volume(path)
        assert volume.spacing_um == pytest.approx((2.0, 0.5, 0.4))
        np.testing.assert_array_equal(volume.read((0, 0, 0, 9, 34, 47))[0], stack)
        for level in (1, "s1", "2,1,0.8um"):
            coarse = pickle.loads(pickle.dumps(open_volume(path, level=level)))
            assert coarse.spacing_um == pytest.approx((2.0, 1.0, 0.8))
            np.testing.assert_array_equal(coarse.read((0, 0, 0, 9, 17, 24))[0], stack[:, ::2, ::2])
    np.testing.assert_array_equal(
        open_volume(container / "c0" / "s1").read((0, 0, 0, 9, 17, 24))[0], stack[:, ::2, ::2]
    )


def test_scales_of_the_group_and_several_images(tmp_path, stack):
    container = tmp_path / "a.n5"
    for name, shift in (("c0", 0), ("c1", 1)):
        write(container, f"{name}/s0", stack + shift)
        write(container, f"{name}/s1", stack[:, ::2, ::2] + shift)
        group = {"scales": [[1, 1, 1], [2, 2, 1]], "pixelResolution": {"unit": "um", "dimensions": [0.4, 0.5, 2.0]}}
        (container / name / "attributes.json").write_text(json.dumps(group))
    with pytest.raises(ValueError, match=r"several images; pass scene, one of: 0 \('c0'\), 1 \('c1'\)"):
        open_volume(container)
    volume = open_volume(container, scene="c1", level="1um")
    assert volume.spacing_um == (2.0, 1.0, 0.8)
    np.testing.assert_array_equal(volume.read((0, 0, 0, 9, 17, 24))[0], stack[:, ::2, ::2] + 1)


def test_more_axes(tmp_path, channels):
    file = z5py.N5File(str(tmp_path / "a.n5"), mode="a")
    file.create_dataset("a", data=channels, chunks=(1, 4, 16, 16), compression="gzip")
    with pytest.raises(ValueError, match="4-D"):
        open_volume(tmp_path / "a.n5" / "a")
    np.testing.assert_array_equal(
        open_volume(tmp_path / "a.n5" / "a", axes="CZYX").read((1, 2, 3, 9, 34, 47)), channels[:, 1:, 2:, 3:]
    )
    file["a"].attrs["transform"] = {
        "axes": ["c", "z", "y", "x"],
        "scale": [1, 2, 0.5, 0.4],
        "units": ["", "um", "um", "um"],
    }
    volume = open_volume(tmp_path / "a.n5" / "a")
    assert volume.spacing_um == (2.0, 0.5, 0.4)
    np.testing.assert_array_equal(volume.read((1, 2, 3, 9, 34, 47)), channels[:, 1:, 2:, 3:])


@pytest.mark.parametrize("name", ["data.n5", "data.xml"])
def test_bigdataviewer(tmp_path, channels, name):
    container = tmp_path / "data.n5"
    for setup, channel in ((0, 1), (3, 0)):
        for time in (0, 5):
            for level, data in enumerate((channels[channel] + time, channels[channel][:, ::2, ::2] + time)):
                write(container, f"setup{setup}/timepoint{time}/s{level}", data)
        attributes = {"downsamplingFactors": [[1, 1, 1], [2, 2, 1]], "dataType": "uint16"}
        (container / f"setup{setup}" / "attributes.json").write_text(json.dumps(attributes))
    setups = "".join(
        f"<ViewSetup><id>{setup}</id><voxelSize><unit>µm</unit><size>0.4 0.5 2.0</size></voxelSize><attributes>"
        f"<channel>{channel}</channel><tile>0</tile></attributes></ViewSetup>"
        for setup, channel in ((0, 1), (3, 0))
    )
    (tmp_path / "data.xml").write_text(
        '<SpimData><SequenceDescription><ImageLoader format="bdv.n5"><n5 type="relative">data.n5</n5></ImageLoader>'
        f"<ViewSetups>{setups}</ViewSetups></SequenceDescription></SpimData>",
        encoding="utf-8",
    )
    volume = open_volume(tmp_path / name, time=1)
    assert volume.spacing_um == (2.0, 0.5, 0.4)
    np.testing.assert_array_equal(volume.read((0, 0, 0, 9, 34, 47)), channels + 5)
    coarse = open_volume(tmp_path / name, level="1um", channels=1)
    np.testing.assert_array_equal(coarse.read((0, 0, 0, 9, 17, 24)), channels[1:, :, ::2, ::2])


def test_a_forked_child_reads_what_its_parent_opened(tmp_path, stack):
    volume = open_volume(write(tmp_path / "a.n5", "a", stack))
    volume.read((0, 0, 0, 9, 34, 47))
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    child = context.Process(target=lambda: queue.put(bool((volume.read((0, 0, 0, 9, 34, 47))[0] == stack).all())))
    child.start()
    child.join(timeout=60)
    assert child.exitcode == 0
    assert queue.get()


def test_missing_and_damaged_blocks(tmp_path, stack):
    path = write(tmp_path / "a.n5", "a", stack)
    block = path / "2" / "1" / "0"  # x, y, z
    volume = open_volume(path)
    content = block.read_bytes()
    block.unlink()
    expected = stack.copy()
    expected[:4, 16:32, 32:] = 0
    np.testing.assert_array_equal(volume.read((0, 0, 0, 9, 34, 47))[0], expected)
    for damage in (content[: len(content) // 2], b""):
        block.write_bytes(damage)
        np.testing.assert_array_equal(volume.read((0, 0, 0, 9, 34, 32))[0], stack[:, :, :32])
        with pytest.raises(ValueError, match=r"a\.n5/a: block 2/1/0 is damaged"):
            volume.read((0, 0, 0, 9, 34, 47))


def test_folders_that_are_no_image(tmp_path, stack):
    z5py.N5File(str(tmp_path / "empty.n5"), mode="a")
    with pytest.raises(ValueError, match=r"empty\.n5: an N5 group without an image"):
        open_volume(tmp_path / "empty.n5")
    path = write(tmp_path / "a.n5", "a", stack)
    (tmp_path / "a.n5" / "attributes.json").unlink()
    with pytest.raises(ValueError, match="lies in no N5 container"):
        open_volume(path).read((0, 0, 0, 1, 1, 1))
    (path / "attributes.json").write_text('{"dimensions": [3, 4, 5]}')
    with pytest.raises(ValueError, match=r"attributes\.json: lacks blockSize, dataType"):
        open_volume(path)
    (path / "attributes.json").write_text("{")
    with pytest.raises(ValueError, match=r"attributes\.json: cannot be read as JSON"):
        open_volume(path)


def test_conversion_by_threads(tmp_path, stack):
    path = write(tmp_path / "a.n5", "s0", stack, {"pixelResolution": {"unit": "um", "dimensions": [0.4, 0.5, 2.0]}})
    convert_volume(path, tmp_path / "a.zarr", num_workers=3, chunk_size=8, shard_size=16)
    assert open_volume(tmp_path / "a.zarr").spacing_um == (2.0, 0.5, 0.4)
    np.testing.assert_array_equal(open_volume(tmp_path / "a.zarr").read((0, 0, 0, 9, 34, 47))[0], stack)
