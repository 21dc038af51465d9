"""`open_volume` against numpy slicing of the arrays that other libraries wrote, and proof that reads are lazy."""

import json
import multiprocessing
import os
import pickle
import shutil
from types import SimpleNamespace

import nibabel
import numpy as np
import pytest
import tifffile
import zarr

from seg3d_monai.data.tiff import TiffArray, _full
from seg3d_monai.data.volume import ArrayVolume, Volume, open_volume, sample_rois, storage_rois

TIFF_LAYOUTS = {
    "pages": {},
    "bigtiff": {"bigtiff": True},
    "big_endian": {"byteorder": ">"},
    "no_metadata": {"metadata": None},
    "one_header": {"truncate": True},
    "strips": {"rowsperstrip": 8},
    "zlib": {"compression": "zlib"},
    "zlib_big_endian": {"compression": "zlib", "byteorder": ">"},
    "zstd_predictor_strips": {"compression": "zstd", "predictor": True, "rowsperstrip": 5},
    "lzw_strips": {"compression": "lzw", "rowsperstrip": 16},
    "tiles": {"tile": (16, 32)},
    "zstd_tiles": {"tile": (16, 16), "compression": "zstd", "bigtiff": True},
    "volumetric_tiles": {"tile": (16, 16, 16), "volumetric": True, "compression": "zlib"},
}

ZARR_LAYOUTS = {
    "v2_dot": {"zarr_format": 2, "chunk_key_encoding": {"name": "v2", "separator": "."}},
    "v2_slash": {"zarr_format": 2, "chunk_key_encoding": {"name": "v2", "separator": "/"}},
    "v2_f_order": {"zarr_format": 2, "order": "F"},
    "v3": {"zarr_format": 3},
    "v3_zstd": {"zarr_format": 3, "compressors": [zarr.codecs.ZstdCodec(level=3)]},
    "v3_sharded": {"zarr_format": 3, "shards": (8, 32, 32)},
    "v3_uncompressed": {"zarr_format": 3, "compressors": None},
}


def expect(volume: Volume, array: np.ndarray, random_rois) -> None:
    """Compare a volume with a [C, Z, Y, X] array, voxel by voxel over many regions."""
    assert volume.shape == array.shape
    assert volume.dtype == array.dtype
    for roi in random_rois(array.shape[1:]):
        z1, y1, x1, z2, y2, x2 = roi
        block = volume.read(roi)
        assert block.dtype == array.dtype
        assert block.dtype.isnative
        assert block.flags.writeable
        np.testing.assert_array_equal(block, array[:, z1:z2, y1:y2, x1:x2])


@pytest.mark.parametrize("layout", TIFF_LAYOUTS)
def test_tiff_layouts(tmp_path, stack, random_rois, layout):
    path = tmp_path / "stack.tif"
    tifffile.imwrite(path, stack, photometric="minisblack", **TIFF_LAYOUTS[layout])
    volume = open_volume(path)
    expect(volume, stack[None], random_rois)
    assert volume.spacing_um is None
    assert volume.path == str(path)


@pytest.mark.parametrize("dtype", ["bool", "uint8", "int16", "uint32", "int64", "float16", "float32", "float64", ">i4"])
@pytest.mark.parametrize("kind", ["raw", "zlib", "zarr2", "zarr3"])
def test_dtypes_come_back_native(tmp_path, stack, random_rois, dtype, kind):
    array = stack % 2 == 0 if dtype == "bool" else stack.astype(dtype)
    path = tmp_path / kind
    if kind.startswith("zarr"):
        zarr.save_array(path, array, zarr_format=int(kind[-1]))
    else:
        compression = None if kind == "raw" else kind
        tifffile.imwrite(path, array, photometric="minisblack", compression=compression)
    expect(open_volume(path), array[None].astype(array.dtype.newbyteorder("=")), random_rois)


def test_ome_tiff_with_two_channels_spacing_and_pyramid(tmp_path, channels, random_rois):
    path = tmp_path / "two.ome.tif"
    metadata = {
        "axes": "CZYX",
        "PhysicalSizeX": 400.0,
        "PhysicalSizeXUnit": "nm",
        "PhysicalSizeY": 0.5,
        "PhysicalSizeZ": 0.002,
        "PhysicalSizeZUnit": "mm",
    }
    with tifffile.TiffWriter(path, ome=True) as writer:
        writer.write(channels, subifds=1, metadata=metadata, photometric="minisblack", compression="zlib")
        writer.write(channels[..., ::2, ::2], subfiletype=1, photometric="minisblack", compression="zlib")
    volume = open_volume(path)
    expect(volume, channels, random_rois)
    assert volume.spacing_um == pytest.approx((2.0, 0.5, 0.4))
    expect(open_volume(path, channels=[1]), channels[1:], random_rois)
    expect(open_volume(path, channels=[1, 0, 1]), channels[[1, 0, 1]], random_rois)
    coarse = open_volume(path, level=1)
    expect(coarse, channels[..., ::2, ::2], random_rois)
    assert coarse.spacing_um == pytest.approx((2.0, 1.0, 0.4 * 47 / 24))


def test_ome_tiff_over_several_files(tmp_path, channels, random_rois):
    # Two files, one per channel, described by the metadata of the first.
    names = ["c0.ome.tif", "c1.ome.tif"]
    uuids = [f"urn:uuid:00000000-0000-0000-0000-00000000000{i}" for i in range(2)]
    places = "".join(
        f'<TiffData FirstC="{c}" FirstZ="{z}" IFD="{z}" PlaneCount="1"><UUID FileName="{names[c]}">{uuids[c]}</UUID>'
        "</TiffData>"
        for c in range(2)
        for z in range(9)
    )
    for c in range(2):
        xml = (
            f'<OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06" UUID="{uuids[c]}"><Image ID="Image:0">'
            '<Pixels ID="Pixels:0" DimensionOrder="XYZCT" Type="uint16" SizeX="47" SizeY="34" SizeZ="9" SizeC="2" '
            f'SizeT="1"><Channel ID="Channel:0:0"/><Channel ID="Channel:0:1"/>{places}</Pixels></Image></OME>'
        )
        with tifffile.TiffWriter(tmp_path / names[c]) as writer:
            for z in range(9):
                description = xml if z == 0 else None
                writer.write(channels[c, z], description=description, metadata=None, contiguous=False)
    expect(open_volume(tmp_path / names[0]), channels, random_rois)
    (tmp_path / names[1]).unlink()
    with pytest.raises(ValueError, match=r"plane 9 of 18 is missing"):
        open_volume(tmp_path / names[0])


@pytest.mark.parametrize("is_big", [False, True])
def test_imagej_hyperstack(tmp_path, channels, random_rois, is_big):
    path = tmp_path / "hyper.tif"
    # With truncate the file has a single header, as ImageJ writes stacks of more than 4 GB.
    metadata = {"axes": "ZCYX", "spacing": 3.5, "unit": "um"}
    tifffile.imwrite(
        path,
        channels.transpose(1, 0, 2, 3),
        imagej=True,
        metadata=metadata,
        resolution=(1 / 0.25, 1 / 0.5),
        truncate=is_big,
    )
    volume = open_volume(path)
    expect(volume, channels, random_rois)
    assert volume.spacing_um == pytest.approx((3.5, 0.5, 0.25))


def test_imagej_with_time_points(tmp_path, channels, random_rois):
    path = tmp_path / "time.tif"
    tifffile.imwrite(
        path, channels[:, :, None], imagej=True, metadata={"axes": "TZCYX", "unit": "pixel", "spacing": 2.0}
    )
    expect(open_volume(path, time=1), channels[1:], random_rois)
    assert open_volume(path).spacing_um is None
    with pytest.raises(ValueError, match="time=2 is not there; choose 0 to 1"):
        open_volume(path, time=2)


def test_spacing_of_plain_tiff_needs_all_three_with_units(tmp_path, stack):
    full, flat = tmp_path / "full.tif", tmp_path / "flat.tif"
    metadata = {"axes": "ZYX", "spacing": 4.0, "unit": "µm"}
    tifffile.imwrite(full, stack, metadata=metadata, resolution=(20000, 10000), resolutionunit="CENTIMETER")
    tifffile.imwrite(flat, stack, metadata={"axes": "ZYX"}, resolution=(20000, 10000), resolutionunit="CENTIMETER")
    assert open_volume(full).spacing_um == pytest.approx((4.0, 1.0, 0.5))
    assert open_volume(flat).spacing_um is None
    assert open_volume(full, spacing=[1, 2, 3]).spacing_um == (1.0, 2.0, 3.0)


@pytest.mark.parametrize("planar", ["contig", "separate"])
@pytest.mark.parametrize("compression", [None, "zlib"])
def test_colours_are_channels(tmp_path, stack, random_rois, planar, compression):
    colours = np.stack([stack, stack // 2, stack + 1])
    last = np.moveaxis(colours, 0, -1) if planar == "contig" else colours.transpose(1, 0, 2, 3)
    path = tmp_path / "rgb.tif"
    tifffile.imwrite(path, last, photometric="rgb", planarconfig=planar, compression=compression, rowsperstrip=7)
    expect(open_volume(path), colours, random_rois)


@pytest.mark.parametrize("axes", ["CZYX", "ZCYX", "ZYXC"])
@pytest.mark.parametrize("kind", ["tiff", "zarr"])
def test_four_axes_by_name(tmp_path, channels, random_rois, axes, kind):
    array = channels.transpose(["CZYX".index(a) for a in axes])
    path = tmp_path / "four"
    if kind == "zarr":
        zarr.create_array(path, data=array, chunks=tuple(min(n, 8) for n in array.shape))
    else:
        tifffile.imwrite(path, array, photometric="minisblack")
    for spelling in (axes, axes.lower()):
        expect(open_volume(path, axes=spelling), channels, random_rois)


def test_axes_in_any_order_and_five_of_them(tmp_path, channels, random_rois):
    path = tmp_path / "five.zarr"
    five = np.stack([channels, channels[::-1]])  # TCZYX
    zarr.create_array(path, data=five.transpose(0, 4, 2, 3, 1), chunks=(1, 16, 4, 16, 1))
    expect(open_volume(path, axes="TXZYC", time=1), five[1], random_rois)


def test_single_plane_as_depth_one(tmp_path, stack, random_rois):
    path = tmp_path / "plane.tif"
    tifffile.imwrite(path, stack[0])
    expect(open_volume(path, axes="YX"), stack[None, :1], random_rois)
    tifffile.imwrite(path, stack[:1], photometric="minisblack")
    expect(open_volume(path), stack[None, :1], random_rois)


def test_frames_that_are_planes(tmp_path, stack, random_rois):
    path = tmp_path / "frames.tif"
    tifffile.imwrite(path, stack, imagej=True, metadata={"axes": "TYX"})
    with pytest.raises(ValueError, match=r"axes TYX of shape \(9, 34, 47\) have no Z.*axes='ZYX'"):
        open_volume(path)
    expect(open_volume(path, axes="ZYX"), stack[None], random_rois)


@pytest.mark.parametrize("layout", ZARR_LAYOUTS)
def test_zarr_layouts(tmp_path, stack, random_rois, layout):
    path = tmp_path / "stack.zarr"
    zarr.create_array(path, data=stack, chunks=(4, 16, 16), **ZARR_LAYOUTS[layout])
    volume = open_volume(path)
    expect(volume, stack[None], random_rois)
    assert volume.chunk_shape == (4, 16, 16)


@pytest.mark.parametrize("version", ["0.4", "0.5"])
def test_ome_zarr(tmp_path, channels, random_rois, ome_zarr, version):
    path = ome_zarr(tmp_path / "image.zarr", channels[None], version=version, axes="tczyx", scale=[1, 1, 2.0, 0.5, 0.4])
    volume = open_volume(path)
    expect(volume, channels, random_rois)
    assert volume.spacing_um == (2.0, 0.5, 0.4)
    coarse = open_volume(path, level=1, channels=1)
    expect(coarse, channels[1:, ::2, ::2, ::2], random_rois)
    assert coarse.spacing_um == (4.0, 1.0, 0.8)
    with pytest.raises(ValueError, match="level=2 is not there; it has 2 level"):
        open_volume(path, level=2)
    # The array of a level, opened by its own path, has neither names nor voxel size unless it says so itself.
    expect(open_volume(path / "0", axes="TCZYX"), channels, random_rois)


def test_another_level_of_the_same_channels_and_time(tmp_path, channels, random_rois, ome_zarr):
    series = np.stack([channels[::-1], channels])
    path = ome_zarr(tmp_path / "image.zarr", series, version="0.5", axes="tczyx", scale=[1, 1, 2.0, 0.5, 0.4])
    volume = open_volume(path, channels=[1, 0], time=1, spacing=(9, 9, 9))
    coarse = volume.at_level(1)
    expect(coarse, channels[::-1, ::2, ::2, ::2], random_rois)
    assert (volume.level, coarse.level) == (0, 1)
    assert coarse.spacing_um == (4.0, 1.0, 0.8)
    expect(coarse.at_level(0), channels[::-1], random_rois)
    for missing in (2, -1):
        with pytest.raises(ValueError, match=f"level={missing}"):
            volume.at_level(missing)
    expect(open_volume(path / "0", axes="TCZYX", channels=0, time=1).at_level(0), channels[:1], random_rois)


def test_ome_zarr_units(tmp_path, stack, ome_zarr):
    for unit, expected in ((None, None), ("millimeter", (2000.0, 500.0, 250.0)), ("second", None)):
        path = ome_zarr(tmp_path / f"{unit}.zarr", stack, version="0.5", axes="zyx", scale=[2, 0.5, 0.25], unit=unit)
        assert open_volume(path).spacing_um == expected


@pytest.mark.parametrize("version", ["0.4", "0.5"])
def test_labels_only_group_opens_its_instances(tmp_path, stack, random_rois, ome_zarr, version):
    output = tmp_path / "out.zarr"
    zarr_format = 2 if version == "0.4" else 3
    zarr.open_group(output, mode="w", zarr_format=zarr_format).create_group("labels")
    label = stack.astype(np.uint32)
    ome_zarr(output / "labels" / "instances", label, version=version, axes="zyx", scale=[2, 1, 1])
    for path in (output, output / "labels", output / "labels" / "instances"):
        volume = open_volume(path)
        expect(volume, label[None], random_rois)
        assert volume.spacing_um == (2.0, 1.0, 1.0)
    ome_zarr(output / "labels" / "nuclei", label + 1, version=version, axes="zyx", scale=[2, 1, 1])
    expect(open_volume(output), label[None], random_rois)


def test_image_beside_labels_is_the_image(tmp_path, stack, random_rois, ome_zarr):
    path = ome_zarr(tmp_path / "image.zarr", stack, version="0.4", axes="zyx", scale=[1, 1, 1])
    ome_zarr(path / "labels" / "instances", stack * 0, version="0.4", axes="zyx", scale=[1, 1, 1])
    expect(open_volume(path), stack[None], random_rois)


def test_group_with_one_array_and_dimension_names(tmp_path, channels, random_rois):
    group = zarr.open_group(tmp_path / "group.zarr", mode="w")
    group.create_array("raw", data=channels.transpose(1, 2, 3, 0), dimension_names=["z", "y", "x", "c"])
    expect(open_volume(tmp_path / "group.zarr"), channels, random_rois)
    group.create_array("other", data=channels)
    with pytest.raises(ValueError, match=r"several images; name one of them: .*other.*raw"):
        open_volume(tmp_path / "group.zarr")


def test_missing_chunk_is_the_fill_value(tmp_path, stack):
    path = tmp_path / "holes.zarr"
    zarr.create_array(path, data=stack, chunks=(4, 16, 16), fill_value=77)
    (path / "c" / "1" / "0" / "2").unlink()
    expected = stack.copy()
    expected[4:8, :16, 32:] = 77
    np.testing.assert_array_equal(open_volume(path).read((0, 0, 0, *stack.shape))[0], expected)


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
def test_nifti_is_reversed_and_in_micrometres(tmp_path, stack, random_rois, suffix):
    image = nibabel.Nifti1Image(stack.T.astype(np.int16), np.diag([0.0004, 0.0005, 0.002, 1]))
    image.header.set_xyzt_units("mm")
    path = tmp_path / f"image{suffix}"
    nibabel.save(image, path)
    volume = open_volume(path)
    expect(volume, stack[None].astype(np.int16), random_rois)
    assert volume.spacing_um == pytest.approx((2.0, 0.5, 0.4))
    image.header.set_xyzt_units("unknown")
    image.header.set_slope_inter(0.5, 10)
    nibabel.save(image, path)
    scaled = open_volume(path)
    assert scaled.spacing_um is None
    np.testing.assert_allclose(
        scaled.read((1, 2, 3, 5, 9, 11))[0], nibabel.load(path).get_fdata().T[1:5, 2:9, 3:11], rtol=1e-6
    )


def test_nifti_with_a_fourth_axis(tmp_path, channels, random_rois):
    path = tmp_path / "four.nii"
    nibabel.save(nibabel.Nifti1Image(channels.T, np.eye(4)), path)
    with pytest.raises(ValueError, match="4-D"):
        open_volume(path)
    expect(open_volume(path, axes="CZYX"), channels, random_rois)


def test_array_volume(channels, random_rois):
    expect(ArrayVolume(channels), channels, random_rois)
    single = ArrayVolume(channels[0].astype(">u2"), spacing_um=(2, 1, 1))
    expect(single, channels[:1], random_rois)
    assert (single.spacing_um, single.path) == ((2.0, 1.0, 1.0), None)
    block = single.read((0, 0, 0, 2, 2, 2))
    block[...] = 0
    assert single.read((0, 0, 0, 2, 2, 2)).any()
    with pytest.raises(ValueError, match=r"not of shape \(3, 4\)"):
        ArrayVolume(np.zeros((3, 4)))


@pytest.mark.parametrize("layout", ["zlib", "zstd_predictor_strips", "zstd_tiles", "volumetric_tiles"])
def test_tiff_read_decodes_only_the_pieces_it_needs(tmp_path, stack, monkeypatch, layout):
    path = tmp_path / "lazy.tif"
    tifffile.imwrite(path, stack, photometric="minisblack", **TIFF_LAYOUTS[layout])
    decoded = []
    original = TiffArray._decode
    monkeypatch.setattr(
        TiffArray,
        "_decode",
        lambda self, data, page, index: decoded.append((page, index)) or original(self, data, page, index),
    )
    volume = open_volume(path)
    assert decoded == []
    np.testing.assert_array_equal(volume.read((3, 17, 0, 5, 20, 15))[0], stack[3:5, 17:20, :15])
    expected = {
        "zlib": [(3, 0), (4, 0)],
        "zstd_predictor_strips": [(3, 3), (4, 3)],
        "zstd_tiles": [(3, 3), (4, 3)],  # tiles of 16 x 16, three to a row: row 1, column 0
        "volumetric_tiles": [(0, 3)],
    }
    assert decoded == expected[layout]


def test_tiff_read_does_not_touch_other_pages(tmp_path, stack):
    # Independent of how the reader is written: every page but two is turned into noise.
    path = tmp_path / "noise.tif"
    tifffile.imwrite(path, stack, photometric="minisblack", compression="zlib")
    with tifffile.TiffFile(path) as tif:
        spans = [(page.dataoffsets[0], page.databytecounts[0]) for i, page in enumerate(tif.pages) if i not in (3, 4)]
    with open(path, "r+b") as file:
        for offset, count in spans:
            file.seek(offset)
            file.write(b"\xa5" * count)
    np.testing.assert_array_equal(open_volume(path).read((3, 0, 0, 5, 34, 47))[0], stack[3:5])


@pytest.mark.parametrize("shards", [None, (8, 32, 32)])
def test_zarr_read_loads_only_the_chunks_it_needs(tmp_path, stack, monkeypatch, shards):
    path = tmp_path / "lazy.zarr"
    zarr.create_array(path, data=stack, chunks=(4, 16, 16), shards=shards)
    loaded = []
    original = zarr.storage.LocalStore.get

    async def count(self, key, prototype, byte_range=None):
        loaded.append((key, byte_range))
        return await original(self, key, prototype, byte_range)

    monkeypatch.setattr(zarr.storage.LocalStore, "get", count)
    volume = open_volume(path)
    assert not [key for key, _ in loaded if "c/" in key]
    loaded.clear()
    volume.read((5, 15, 17, 7, 18, 20))
    chunks = [(key, part) for key, part in loaded if "c/" in key]
    if shards is None:
        assert sorted(key for key, _ in chunks) == ["c/1/0/1", "c/1/1/1"]
    else:
        assert {key for key, _ in chunks} == {"c/0/0/0"}
        assert all(part is not None for _, part in chunks)  # parts of the shard, never all of it


def test_no_descriptor_stays_open(tmp_path, stack):
    tifffile.imwrite(tmp_path / "a.tif", stack, photometric="minisblack", compression="zlib")
    zarr.save_array(tmp_path / "a.zarr", stack)
    before = len(os.listdir("/dev/fd"))
    volumes = [open_volume(tmp_path / name) for name in ("a.tif", "a.zarr") * 20]
    for volume in volumes:
        volume.read((1, 1, 1, 4, 4, 4))
    assert len(os.listdir("/dev/fd")) - before < 20  # zarr keeps one thread pool with its event loop


@pytest.mark.parametrize("name", ["a.tif", "a.zarr", "a.nii"])
def test_pickles_and_survives_fork(tmp_path, stack, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    if name == "a.tif":
        tifffile.imwrite(name, stack, photometric="minisblack", compression="zlib")
    elif name == "a.zarr":
        zarr.save_array(name, stack)
    else:
        nibabel.save(nibabel.Nifti1Image(stack.T, np.eye(4)), name)
    volume = open_volume(name, spacing=(3, 2, 1))
    roi = (2, 3, 4, 8, 20, 30)
    expected = volume.read(roi)
    with multiprocessing.get_context("fork").Pool(1) as pool:
        forked = pool.apply_async(volume.read, (roi,)).get(timeout=30)
    np.testing.assert_array_equal(forked, expected)
    (tmp_path / "elsewhere").mkdir()
    os.chdir("elsewhere")  # workers may run in another directory
    copy = pickle.loads(pickle.dumps(volume))
    np.testing.assert_array_equal(copy.read(roi), expected)
    assert (copy.shape, copy.dtype, copy.spacing_um) == (volume.shape, volume.dtype, volume.spacing_um)
    assert len(pickle.dumps(volume)) < 2000


def test_axes_of_length_1_are_kept_whatever_the_version_of_tifffile():
    old = SimpleNamespace(get_axes=lambda squeeze: "ZYX" if squeeze else "ZCYX", axes="ZYX")
    old.get_shape = lambda squeeze: (3, 4, 5) if squeeze else (3, 1, 4, 5)
    new = SimpleNamespace(axes="ZCYX", shape=(3, 1, np.int64(4), 5))
    assert _full(old) == _full(new) == ("ZCYX", (3, 1, 4, 5))


def _read_in_forked_child(volume, roi, queue):
    queue.put(volume.read(roi))


def test_volume_read_before_the_fork_reads_in_the_child(tmp_path, stack):
    # Without pickling: the child inherits the very objects that the parent has used.
    for name in ("b.tif", "b.zarr"):
        path = tmp_path / name
        if name == "b.tif":
            tifffile.imwrite(path, stack, photometric="minisblack", compression="zlib")
        else:
            zarr.create_array(path, data=stack, chunks=(4, 16, 16))
        volume = open_volume(path)
        expected = volume.read((0, 0, 0, 9, 34, 47))
        context = multiprocessing.get_context("fork")
        queue = context.SimpleQueue()
        child = context.Process(target=_read_in_forked_child, args=(volume, (0, 0, 0, 9, 34, 47), queue))
        child.start()
        np.testing.assert_array_equal(queue.get(), expected)
        child.join(timeout=30)
        assert child.exitcode == 0


def test_reopening_a_file_that_changed_shape(tmp_path, stack):
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, stack, photometric="minisblack")
    state = pickle.dumps(open_volume(path))
    tifffile.imwrite(path, stack[:4], photometric="minisblack")
    with pytest.raises(ValueError, match=r"was of shape \(9, 34, 47\) and uint16, is now \(4, 34, 47\)"):
        pickle.loads(state).read((0, 0, 0, 1, 1, 1))


@pytest.mark.parametrize("name", ["a.tif", "a.zarr"])
def test_identity_follows_the_data_and_nothing_else(tmp_path, stack, name):
    def write(path, array):
        if name == "a.tif":
            tifffile.imwrite(path, array, photometric="minisblack")
        else:
            zarr.create_array(path, data=array, chunks=(4, 16, 16), overwrite=True)

    write(tmp_path / name, stack)
    first = open_volume(tmp_path / name).identity()
    assert json.loads(json.dumps(first)) == first
    assert str(tmp_path) not in json.dumps(first)
    moved = tmp_path / "moved" / "other_name"
    (shutil.copytree if name == "a.zarr" else shutil.copyfile)(tmp_path / name, moved.parent.mkdir() or moved)
    assert open_volume(moved).identity() == first
    assert open_volume(moved, spacing=(1, 1, 1)).identity() != first
    changed = stack.copy()
    changed[4, 17, 30] += 1
    write(tmp_path / name, changed)
    assert open_volume(tmp_path / name).identity() != first


def test_identity_of_arrays_and_of_large_volumes(stack, monkeypatch):
    assert ArrayVolume(stack).identity() == ArrayVolume(stack.copy()).identity()
    assert ArrayVolume(stack).identity() != ArrayVolume(stack[:, ::-1]).identity()
    assert ArrayVolume(stack).identity() != ArrayVolume(stack.transpose(1, 0, 2)).identity()
    monkeypatch.setattr("seg3d_monai.data.volume.IDENTITY_VOXELS", 4000)
    assert ArrayVolume(stack).identity() != ArrayVolume(stack + 1).identity()


@pytest.mark.parametrize("max_voxels", [1, 500, 4000, 10**9])
def test_storage_rois_tile_the_volume_along_chunks(tmp_path, channels, max_voxels):
    path = tmp_path / "tiled.zarr"
    zarr.create_array(path, data=channels, chunks=(1, 4, 16, 16))
    volume = open_volume(path, axes="CZYX")
    seen = np.zeros(volume.shape[1:], dtype=int)
    for roi in storage_rois(volume, max_voxels=max_voxels):
        z1, y1, x1, z2, y2, x2 = roi
        seen[z1:z2, y1:y2, x1:x2] += 1
        assert (z1 % 4, y1 % 16, x1 % 16) == (0, 0, 0)
        extent = (z2 - z1) * (y2 - y1) * (x2 - x1)
        assert 2 * extent <= max_voxels or (z2 - z1 <= 4 and y2 - y1 <= 16 and x2 - x1 <= 16)
    assert (seen == 1).all()


@pytest.mark.parametrize("extents", [(200, 300, 1000), (1000, 64, 65), (3, 4000, 4000), (1, 1, 100000)])
@pytest.mark.parametrize("max_voxels", [1, 10000, 2**20])
def test_sample_rois_are_disjoint_inside_and_within_budget(extents, max_voxels):
    rois = sample_rois(extents, max_voxels)
    seen = np.zeros(extents, dtype=np.uint8)
    for z1, y1, x1, z2, y2, x2 in rois:
        assert 0 <= z1 < z2 <= extents[0]
        assert 0 <= y1 < y2 <= extents[1]
        assert 0 <= x1 < x2 <= extents[2]
        seen[z1:z2, y1:y2, x1:x2] += 1
    assert seen.max() == 1
    assert max_voxels // 8 <= seen.sum() <= max_voxels or len(rois) == 1
    assert rois == sample_rois(extents, max_voxels)


@pytest.mark.parametrize("options", [{}, {"rowsperstrip": 5}, {"tile": (16, 16)}, {"tile": (64, 64)}])
def test_identity_of_compressed_pages_decodes_each_once(tmp_path, monkeypatch, options):
    stack = np.random.default_rng(0).integers(0, 999, (40, 100, 120)).astype(np.uint16)
    monkeypatch.setattr("seg3d_monai.data.volume.IDENTITY_VOXELS", 60000)
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, stack, photometric="minisblack", compression="zlib", **options)
    decoded = []
    original = TiffArray._decode
    monkeypatch.setattr(
        TiffArray,
        "_decode",
        lambda self, data, page, index: decoded.append((page, index)) or original(self, data, page, index),
    )
    volume = open_volume(path)
    assert volume.identity()["digest"] == ArrayVolume(stack).identity()["digest"]
    rois = sample_rois(stack.shape, 60000)
    assert len(rois) > 30
    needed = {z for roi in rois for z in range(roi[0], roi[3])}
    assert {page for page, _ in decoded} == needed
    if options.get("tile") != (16, 16):  # pieces that are smaller than a block may be cut by several
        assert len(decoded) <= 1.5 * len(set(decoded))
    # One damaged piece spoils the blocks in it and no others.
    monkeypatch.undo()
    monkeypatch.setattr("seg3d_monai.data.volume.IDENTITY_VOXELS", 60000)
    with tifffile.TiffFile(path) as tif:
        page, index = decoded[0]
        offset, count = tif.pages[page].dataoffsets[index], tif.pages[page].databytecounts[index]
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(b"\x5a" * count)
    spoilt = open_volume(path)
    assert spoilt.identity()["digest"] != ArrayVolume(stack).identity()["digest"]
    expected = [None if voxels is None else voxels.tolist() for voxels in Volume._read_each(spoilt, rois)]
    found = [None if voxels is None else voxels.tolist() for voxels in spoilt._read_each(rois)]
    assert found == expected
    assert None in found
