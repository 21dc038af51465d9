"""Levels by number, name and voxel size; images of files with several; unfinished outputs; .nii.gz."""

import pickle
import warnings

import nibabel
import numpy as np
import pytest
import tifffile
import zarr

from seg3d_monai.data import nifti
from seg3d_monai.data.stored_array import StoredLevel, find_level, find_scene
from seg3d_monai.data.volume import open_volume

# Light sheet: z is coarse and waits until y and x have come near it.
LEVELS = [
    StoredLevel(name, dict(zip("ZYX", size, strict=True)))
    for name, size in (
        ("s0", (4.0, 0.5, 0.5)),
        ("s1", (4.0, 1.0, 1.0)),
        ("s2", (4.0, 2.0, 2.0)),
        ("s3", (8.0, 4.0, 4.0)),
    )
]


@pytest.mark.parametrize(
    ("level", "expected"),
    [
        (0, 0),
        (np.int64(3), 3),
        ("s2", 2),
        ("1", 1),
        ("0.5um", 0),
        ("1um", 1),
        ("1.1 um", 1),
        ("1000nm", 1),
        ("2 micrometer", 2),
        ("0.002mm", 2),
        ("100um", 3),
        ("4,1,1um", 1),
        ("(4, 2, 2) µm", 2),
        ("[8,4,4]um", 3),
        # Level 1 is off by a factor 1.414 along y and x, and so is level 2: the finer one.
        ("4,1.4142135623730951,1.4142135623730951um", 1),
    ],
)
def test_level_by_number_name_and_voxel_size(level, expected):
    assert find_level(level, LEVELS, "x") == expected


@pytest.mark.parametrize("level", [4, -1, "s4", "4", "-1", "2 parsecs", "", "um", "0um"])
def test_levels_that_are_not_there(level):
    with pytest.raises(ValueError, match=r"x: level=.* is not there; it has 4 level\(s\).*'s1' of \(4, 1, 1\) um"):
        find_level(level, LEVELS, "x")


def test_levels_of_another_type_or_without_voxel_size():
    with pytest.raises(TypeError, match=r"level=1\.5 must be a number, a name, or a voxel size"):
        find_level(1.5, LEVELS, "x")
    bare = [StoredLevel("0", {}), StoredLevel("1", {"Z": 1.0})]
    assert find_level("1", bare, "x") == 1
    with pytest.raises(
        ValueError, match="asks for a voxel size, and the file gives none; choose a level by number, 0 to 1"
    ):
        find_level("1um", bare, "x")
    # A name that looks like a number is a name first.
    assert find_level("1", [StoredLevel("1", {}), StoredLevel("0", {})], "x") == 0


def test_scenes():
    assert find_scene(None, ["only"], "x") == 0
    assert [find_scene(s, ["a", "b"], "x") for s in (0, 1, "a", "b", "1")] == [0, 1, 0, 1, 1]
    with pytest.raises(ValueError, match=r"several images; pass scene, one of: 0 \('a'\), 1 \('b'\)"):
        find_scene(None, ["a", "b"], "x")
    for wrong in (2, -1, "c"):
        with pytest.raises(ValueError, match=r"is not there; choose one of: 0 \('a'\)"):
            find_scene(wrong, ["a", "b"], "x")
    with pytest.raises(TypeError, match="must be a number or a name"):
        find_scene(1.5, ["a", "b"], "x")


@pytest.mark.parametrize("version", ["0.4", "0.5"])
def test_ome_zarr_level_by_voxel_size(tmp_path, stack, ome_zarr, version):
    path = ome_zarr(tmp_path / "image.zarr", stack, version=version, axes="zyx", scale=[2.0, 0.5, 0.5])
    for level, expected in (("0.5um", 0), ("1um", 1), ("4,1,1um", 1), ("0", 0), ("1", 1), (1, 1)):
        volume = open_volume(path, level=level)
        assert volume.level == expected
        assert volume.spacing_um == ((2.0, 0.5, 0.5), (4.0, 1.0, 1.0))[expected]
        whole = stack[:: expected + 1, :: expected + 1, :: expected + 1]
        np.testing.assert_array_equal(volume.read((0, 0, 0, *whole.shape))[0], whole)
        assert pickle.loads(pickle.dumps(volume)).level == expected
    assert [level.name for level in open_volume(path).levels] == ["0", "1"]


def test_tiff_level_by_voxel_size_and_series_by_name(tmp_path, stack):
    path = tmp_path / "pyramid.ome.tif"
    sizes = {"PhysicalSizeX": 0.5, "PhysicalSizeY": 0.5, "PhysicalSizeZ": 2.0}
    with tifffile.TiffWriter(path, ome=True) as writer:
        metadata = {"axes": "ZYX", "Name": "raw", **sizes}
        writer.write(stack, subifds=1, metadata=metadata, photometric="minisblack")
        writer.write(stack[:, ::2, ::2], subfiletype=1, photometric="minisblack")
        other = {"axes": "ZYX", "Name": "other", **sizes, "PhysicalSizeZ": 3.0}
        writer.write(stack[:4] + 1, metadata=other, photometric="minisblack")
    assert open_volume(path, level="1um").level == 1
    assert open_volume(path, level="1um").spacing_um == pytest.approx((2.0, 1.0, 0.5 * 47 / 24))
    second = open_volume(path, scene=1)
    assert second.spacing_um == (3.0, 0.5, 0.5)
    for scene in (1, "1", "other"):
        np.testing.assert_array_equal(open_volume(path, scene=scene).read((0, 0, 0, 4, 34, 47))[0], stack[:4] + 1)
    np.testing.assert_array_equal(
        pickle.loads(pickle.dumps(second)).read((3, 0, 0, 4, 2, 2))[0], stack[3:4, :2, :2] + 1
    )
    assert open_volume(path).shape == (1, 9, 34, 47)
    with pytest.raises(ValueError, match=r"scene='none' is not there; choose one of: 0 \('raw'\), 1 \('other'\)"):
        open_volume(path, scene="none")


def test_zarr_group_with_several_images(tmp_path, stack, ome_zarr):
    group = zarr.open_group(tmp_path / "many.zarr", mode="w")
    group.create_array("raw", data=stack)
    group.create_array("late", data=stack + 1)
    for scene, shift in (("raw", 0), ("late", 1), (0, 1)):
        np.testing.assert_array_equal(
            open_volume(tmp_path / "many.zarr", scene=scene).read((0, 0, 0, 9, 34, 47))[0], stack + shift
        )
    # bioformats2raw counts its series
    series = zarr.open_group(tmp_path / "b2r.zarr", mode="w", attributes={"ome": {"bioformats2raw.layout": 3}})
    assert series is not None
    for i in range(2):
        ome_zarr(tmp_path / "b2r.zarr" / str(i), stack + i, version="0.5", axes="zyx", scale=[1, 1, 1])
    np.testing.assert_array_equal(open_volume(tmp_path / "b2r.zarr", scene=1).read((0, 0, 0, 9, 34, 47))[0], stack + 1)
    with pytest.raises(ValueError, match="several images"):
        open_volume(tmp_path / "b2r.zarr")


def test_unfinished_outputs_are_refused(tmp_path, stack, ome_zarr):
    path = ome_zarr(tmp_path / "cells.zarr.partial", stack, version="0.5", axes="zyx", scale=[1, 1, 1])
    for place in (path, path / "0"):
        with pytest.raises(ValueError, match=r"unfinished, cells\.zarr\.partial was being written.*then open cells"):
            open_volume(place)


def test_nii_gz_is_decompressed_once_and_says_so(tmp_path, stack, monkeypatch):
    image = nibabel.Nifti1Image(stack.T.astype(np.int16), np.eye(4))
    for name in ("a.nii", "a.nii.gz"):
        image.header.set_slope_inter(0.5, 10)
        nibabel.save(image, tmp_path / name)
    plain, packed = open_volume(tmp_path / "a.nii"), open_volume(tmp_path / "a.nii.gz")
    roi = (2, 3, 4, 8, 20, 30)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a small one is not worth a word
        np.testing.assert_array_equal(packed.read(roi), plain.read(roi))
    assert packed.dtype == np.float32
    monkeypatch.setattr(nifti, "LARGE_BYTES", 1000)
    loads = []
    original = nibabel.load
    monkeypatch.setattr(nibabel, "load", lambda path: loads.append(path) or original(path))
    nibabel.save(image, tmp_path / "b.nii.gz")
    volume = open_volume(tmp_path / "b.nii.gz")
    with pytest.warns(UserWarning, match=r"b\.nii\.gz: a \.nii\.gz cannot be read by the region.*seg3d convert"):
        first = volume.read(roi)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        np.testing.assert_array_equal(volume.read(roi), first)
    assert len(loads) == 2  # opening and decompressing; not for each read
    assert volume.identity()["digest"] == plain.identity()["digest"]
