"""Stacks in many TIFF files: what their names say, and what is refused before a voxel is shifted."""

import os
import pickle

import numpy as np
import pytest
import tifffile

from seg3d_monai.data.convert import convert_volume
from seg3d_monai.data.tiff_series import sort_files
from seg3d_monai.data.volume import open_volume

ROI = (2, 3, 5, 7, 30, 40)


def write_planes(folder, stack, name="img_{:04d}.tif", **options):
    """One file a plane of [Z, Y, X]."""
    folder.mkdir(exist_ok=True)
    for z, plane in enumerate(stack):
        tifffile.imwrite(folder / name.format(z), plane, **options)
    return folder


def inside(array):
    z1, y1, x1, z2, y2, x2 = ROI
    return array[..., z1:z2, y1:y2, x1:x2]


@pytest.mark.parametrize("options", [{}, {"compression": "zlib"}, {"tile": (16, 32)}, {"byteorder": ">"}])
def test_folder_pattern_and_list_are_the_stack(tmp_path, stack, random_rois, options):
    # Without leading zeros, so that sorting by letters would be wrong: 10 before 2.
    folder = write_planes(tmp_path / "planes", np.concatenate([stack, stack[:3]]), "img_{}.tif", **options)
    whole = np.concatenate([stack, stack[:3]])
    files = [folder / f"img_{z}.tif" for z in range(12)]
    for path in (folder, folder / "img_*.tif", files, [str(f) for f in files]):
        volume = open_volume(path)
        assert volume.shape == (1, 12, 34, 47)
        assert volume.path == str(folder)
        for z1, y1, x1, z2, y2, x2 in random_rois(whole.shape, count=10):
            np.testing.assert_array_equal(volume.read((z1, y1, x1, z2, y2, x2))[0], whole[z1:z2, y1:y2, x1:x2])
    np.testing.assert_array_equal(open_volume(files[::-1]).read((0, 0, 0, 12, 34, 47))[0], whole[::-1])


def test_a_pattern_chooses_and_other_files_do_not_disturb(tmp_path, stack):
    folder = write_planes(tmp_path / "a", stack, "green_{}.tif")
    write_planes(folder, stack + 1, "red_{}.tif")
    (folder / "notes.txt").write_text("no TIFF")
    (folder / ".img_3.tif").write_bytes(b"what a Mac leaves behind")
    with pytest.raises(ValueError, match=r"green_0\.tif and red_0\.tif differ in more than numbers"):
        open_volume(folder)
    np.testing.assert_array_equal(open_volume(folder / "red_*.tif").read(ROI)[0], inside(stack + 1))


@pytest.mark.parametrize(
    "name",
    [
        "x_t{t}_c{c}_z{z:03d}.tif",
        "img_channel{c:03d}_position000_time{t:09d}_z{z:03d}.tif",  # Micro-Manager
        "Scan C{c:02d} T{t:02d} Z{z:04d}.ome.tif",
        "c={c},time={t},slice={z}.tif",
    ],
)
def test_channels_time_points_and_planes_by_name(tmp_path, name):
    array = np.random.default_rng(0).integers(0, 999, (2, 3, 4, 6, 7)).astype(np.uint16)  # T, C, Z, Y, X
    for t, c, z in np.ndindex(2, 3, 4):
        options = {"metadata": None} if ".ome" in name else {}
        tifffile.imwrite(tmp_path / name.format(t=t + 5, c=c, z=10 * z), array[t, c, z], **options)
    for time in (0, 1):
        volume = open_volume(tmp_path, time=time, channels=[2, 0])
        np.testing.assert_array_equal(volume.read((1, 0, 2, 4, 6, 7)), array[time][[2, 0], 1:4, :, 2:7])


def test_one_unnamed_number_beside_named_ones_counts_planes(tmp_path, channels):
    for c, z in np.ndindex(2, 9):
        tifffile.imwrite(tmp_path / f"brain_C{c}_{z:05d}.tif", channels[c, z])
    np.testing.assert_array_equal(open_volume(tmp_path).read(ROI), inside(channels))


def test_a_stack_a_channel(tmp_path, channels):
    for c in range(2):
        tifffile.imwrite(tmp_path / f"ch{c}.tif", channels[c], photometric="minisblack")
    np.testing.assert_array_equal(open_volume(tmp_path).read(ROI), inside(channels))
    files = [tmp_path / "ch1.tif", tmp_path / "ch0.tif"]
    # A list says the order of its files, not what they are.
    with pytest.raises(ValueError, match=r"\(2, 9, 34, 47\).*pass axes, for example axes='CZYX'"):
        open_volume(files)
    np.testing.assert_array_equal(open_volume(files, axes="CZYX").read(ROI), inside(channels[::-1]))
    np.testing.assert_array_equal(open_volume(files, axes="TZYX", time=1).read(ROI), inside(channels[:1]))


def test_colour_planes(tmp_path, stack):
    colours = np.stack([stack, stack // 2, stack + 1], axis=-1)
    folder = write_planes(tmp_path / "rgb", colours, photometric="rgb")
    np.testing.assert_array_equal(open_volume(folder).read(ROI), inside(np.moveaxis(colours, -1, 0)))


def test_voxel_size_of_ome_planes(tmp_path, stack):
    metadata = {"axes": "YX", "PhysicalSizeX": 0.4, "PhysicalSizeY": 0.5, "PhysicalSizeZ": 2.0}
    folder = write_planes(tmp_path / "ome", stack[:3], "p{}.ome.tif", ome=True, metadata=metadata)
    assert open_volume(folder).spacing_um == (2.0, 0.5, 0.4)
    assert open_volume(write_planes(tmp_path / "plain", stack[:3])).spacing_um is None


def test_independent_stacks_in_a_folder_are_no_volume(tmp_path, stack):
    for i in range(3):
        tifffile.imwrite(tmp_path / f"embryo{i}.tif", stack, photometric="minisblack")
    with pytest.raises(ValueError, match=r"nothing says which axis is which.*\(3, 9, 34, 47\)"):
        open_volume(tmp_path)


def test_a_lost_plane_is_named(tmp_path, stack):
    folder = write_planes(tmp_path / "lost", stack)
    (folder / "img_0004.tif").unlink()
    with pytest.raises(ValueError, match="axis Z jump from 3 to 5, the others are 1 apart"):
        open_volume(folder)
    files = sorted(folder.iterdir())
    np.testing.assert_array_equal(open_volume(files).read((0, 0, 0, 8, 34, 47))[0], np.delete(stack, 4, axis=0))


@pytest.mark.parametrize(
    ("names", "fragment"),
    [
        (["a_1_1.tif", "a_1_2.tif", "a_2_1.tif", "a_2_2.tif"], "do not say which number counts"),
        (["c0_z0.tif", "c0_z1.tif", "c1_z0.tif"], "no file for C=1, Z=1"),
        (["z1.tif", "z01.tif", "z2.tif"], "have the same numbers"),
        (["z1_z1.tif", "z2_z2.tif"], "do not say which number counts"),
        (["a.tif", "b.tif"], "differ in more than numbers"),
    ],
)
def test_names_that_say_too_little(names, fragment):
    with pytest.raises(ValueError, match=fragment):
        sort_files([f"/x/{name}" for name in names], "/x")


def test_unlike_missing_and_damaged_files(tmp_path, stack):
    folder = write_planes(tmp_path / "odd", stack)
    tifffile.imwrite(folder / "img_0006.tif", np.zeros((34, 48), np.uint16))
    volume = open_volume(folder)
    assert volume.read((0, 0, 0, 6, 3, 3)).shape == (1, 6, 3, 3)
    with pytest.raises(ValueError, match=r"img_0006\.tif: has shape \(34, 48\).*must be alike"):
        volume.read((5, 0, 0, 8, 3, 3))
    whole = (folder / "img_0002.tif").read_bytes()
    (folder / "img_0006.tif").write_bytes(whole[:1000])
    with pytest.raises(ValueError, match=r"img_0006\.tif: truncated, it has 1000 bytes"):
        open_volume(folder)
    with pytest.raises(FileNotFoundError, match=r"gone\.tif: no such file"):
        open_volume([folder / "img_0000.tif", folder / "gone.tif"])
    with pytest.raises(FileNotFoundError, match="no file has such a name"):
        open_volume(folder / "nothing_*.tif")
    with pytest.raises(ValueError, match="empty list"):
        open_volume([])
    with pytest.raises(TypeError, match="a path, a pattern, a URL, or a list"):
        open_volume(3)
    (folder / "notes.txt").write_text("text")
    with pytest.raises(ValueError, match="only if all are TIFF"):
        open_volume([folder / "img_0000.tif", folder / "notes.txt"])


def test_only_the_files_that_are_needed_are_opened(tmp_path, stack, monkeypatch):
    folder = write_planes(tmp_path / "lazy", stack)
    opened = []
    original = tifffile.TiffFile.__init__
    monkeypatch.setattr(
        tifffile.TiffFile, "__init__", lambda self, file, *a, **k: opened.append(file) or original(self, file, *a, **k)
    )
    volume = open_volume(folder)
    assert [os.path.basename(file) for file in opened] == ["img_0000.tif"]
    volume.read((4, 0, 0, 6, 5, 5))
    volume.read((4, 5, 0, 6, 9, 5))
    assert [os.path.basename(file) for file in opened[1:]] == ["img_0004.tif", "img_0005.tif"]


def test_pickles_in_another_folder(tmp_path, stack, monkeypatch):
    write_planes(tmp_path / "p", stack)
    monkeypatch.chdir(tmp_path)
    volumes = [open_volume("p"), open_volume("p/*.tif"), open_volume([f"p/img_{z:04d}.tif" for z in range(9)])]
    states = [pickle.dumps(volume) for volume in volumes]
    monkeypatch.chdir("/")
    for state in states:
        np.testing.assert_array_equal(pickle.loads(state).read(ROI)[0], inside(stack))
    assert volumes[0].identity() == volumes[1].identity() == volumes[2].identity()


def test_a_multi_file_ome_tiff_is_read_as_it_says(tmp_path, channels):
    # The files are named so that reading the names alone would exchange the channels.
    names = ["z1.ome.tif", "z0.ome.tif"]
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
                writer.write(channels[c, z], description=xml if z == 0 else None, metadata=None, contiguous=False)
    np.testing.assert_array_equal(open_volume(tmp_path).read(ROI), inside(channels))


def test_conversion_by_threads(tmp_path, channels):
    for c, z in np.ndindex(2, 9):
        tifffile.imwrite(tmp_path / f"brain_C{c}_{z:05d}.tif", channels[c, z], compression="zlib")
    convert_volume(tmp_path / "brain_*.tif", tmp_path / "o.zarr", num_workers=3, chunk_size=8, shard_size=16)
    np.testing.assert_array_equal(open_volume(tmp_path / "o.zarr").read((0, 0, 0, 9, 34, 47)), channels)
    assert open_volume(tmp_path / "o.zarr").spacing_um is None
    files = [tmp_path / f"brain_C1_{z:05d}.tif" for z in (3, 1)]
    convert_volume(files, tmp_path / "two.zarr", spacing=(2, 1, 1))
    np.testing.assert_array_equal(open_volume(tmp_path / "two.zarr").read((0, 0, 0, 2, 34, 47))[0], channels[1, [3, 1]])
