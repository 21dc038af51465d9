"""What a user gets to read when a file, a region or an option is wrong: one line that names it."""

import numcodecs
import numpy as np
import pytest
import tifffile
import zarr

from seg3d_monai.data.volume import ArrayVolume, check_spacing, open_volume


def refusal(action, *fragments, kind=ValueError):
    """Run, expect a refusal of one line that holds every fragment, and return it."""
    with pytest.raises(kind) as caught:
        action()
    text = str(caught.value)
    assert "\n" not in text
    for fragment in fragments:
        assert fragment in text, text
    return text


@pytest.mark.parametrize("roi", [(0, 0, 0, 10, 34, 47), (-1, 0, 0, 3, 3, 3), (0, 0, 40, 1, 1, 48), (5, 3, 3, 4, 6, 6)])
def test_regions_outside_or_inverted(stack, tmp_path, roi):
    tifffile.imwrite(tmp_path / "a.tif", stack, photometric="minisblack")
    for volume in (ArrayVolume(stack), open_volume(tmp_path / "a.tif")):
        refusal(lambda volume=volume: volume.read(roi), str(roi), "(9, 34, 47)")


def test_region_of_wrong_length_or_type(stack):
    refusal(lambda: ArrayVolume(stack).read((0, 1, 2)), "(z1, y1, x1, z2, y2, x2)")
    with pytest.raises(TypeError):
        ArrayVolume(stack).read((0, 0, 0, 1.5, 2, 2))
    assert ArrayVolume(stack).read(np.array([1, 1, 1, 2, 3, 4])).shape == (1, 1, 2, 3)


def test_missing_file(tmp_path):
    for name in ("no.tif", "no.zarr", "no.nii"):
        refusal(lambda name=name: open_volume(tmp_path / name), name, kind=FileNotFoundError)


def test_unsupported_format_and_plain_folder(tmp_path):
    (tmp_path / "a.lif").write_bytes(bytes(100))
    refusal(lambda: open_volume(tmp_path / "a.lif"), "a.lif", "not supported", "OME-TIFF", "Zarr", "NIfTI", "CZI")
    (tmp_path / "folder").mkdir()
    refusal(lambda: open_volume(tmp_path / "folder"), "folder", "no Zarr")
    (tmp_path / "empty.tif").touch()
    refusal(lambda: open_volume(tmp_path / "empty.tif"), "empty.tif", "0 bytes")
    (tmp_path / "text.tif").write_text("this is text and nothing else")
    refusal(lambda: open_volume(tmp_path / "text.tif"), "text.tif", "not a TIFF")
    (tmp_path / "text.nii").write_text("this is text and nothing else")
    refusal(lambda: open_volume(tmp_path / "text.nii"), "text.nii", "NIfTI")


@pytest.mark.parametrize("fraction", [0.001, 0.05, 0.3, 0.7, 0.95, 0.999])
@pytest.mark.parametrize("kind", ["shaped", "plain", "zlib", "tiles", "imagej", "ome", "one_header", "headers_last"])
def test_truncated_tiff_is_refused_when_opened(tmp_path, stack, fraction, kind):
    path = tmp_path / "cut.tif"
    options = {
        "plain": {"metadata": None},
        "zlib": {"compression": "zlib"},
        "tiles": {"tile": (16, 16), "compression": "zlib"},
        "imagej": {"imagej": True, "metadata": {"axes": "ZYX"}},
        "ome": {"ome": True, "metadata": {"axes": "ZYX"}},
        "one_header": {"truncate": True},
    }.get(kind, {})
    if kind == "headers_last":
        with tifffile.TiffWriter(path) as writer:
            for plane in stack:
                writer.write(plane, metadata=None, contiguous=False, compression="zlib")
    else:
        tifffile.imwrite(path, stack, photometric="minisblack", **options)
    assert open_volume(path).shape == (1, *stack.shape)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * fraction)])
    text = refusal(lambda: open_volume(path), "cut.tif")
    assert "truncated" in text or "cut off" in text


def test_damaged_tiff_page_is_named_when_read(tmp_path, stack):
    path = tmp_path / "bad.tif"
    tifffile.imwrite(path, stack, photometric="minisblack", compression="zlib")
    with tifffile.TiffFile(path) as tif:
        offset, count = tif.pages[5].dataoffsets[0], tif.pages[5].databytecounts[0]
    with open(path, "r+b") as file:
        file.seek(offset)
        file.write(b"\x5a" * count)
    volume = open_volume(path)
    assert volume.read((0, 0, 0, 5, 34, 47)).shape == (1, 5, 34, 47)
    refusal(lambda: volume.read((4, 0, 0, 7, 3, 3)), "bad.tif", "page 5", "(4, 0, 0, 7, 3, 3)")


def test_tiff_with_garbage_for_headers(tmp_path, stack):
    path = tmp_path / "garbage.tif"
    tifffile.imwrite(path, stack, photometric="minisblack")
    raw = bytearray(path.read_bytes())
    raw[8:60] = b"\xff" * 52
    path.write_bytes(raw)
    refusal(lambda: open_volume(path), "garbage.tif")


@pytest.mark.parametrize("zarr_format", [2, 3])
@pytest.mark.parametrize("codec", ["zstd", "blosc", "gzip"])
def test_damaged_zarr_chunk_is_named_when_read(tmp_path, stack, zarr_format, codec):
    path = tmp_path / "bad.zarr"
    if zarr_format == 3:
        compressor = {
            "zstd": zarr.codecs.ZstdCodec(),
            "blosc": zarr.codecs.BloscCodec(),
            "gzip": zarr.codecs.GzipCodec(),
        }
    else:
        compressor = {"zstd": numcodecs.Zstd(), "blosc": numcodecs.Blosc(), "gzip": numcodecs.GZip()}
    group = zarr.open_group(path, mode="w", zarr_format=zarr_format)
    group.create_array("raw", data=stack, chunks=(4, 16, 16), compressors=[compressor[codec]])
    file = path / "raw" / ("c/1/0/2" if zarr_format == 3 else "1.0.2")
    file.write_bytes(b"\x00\x01" * (file.stat().st_size // 2))
    volume = open_volume(path)
    np.testing.assert_array_equal(volume.read((0, 0, 0, 9, 34, 32))[0], stack[:, :, :32])
    roi = (0, 0, 0, 9, 34, 40)
    refusal(lambda: volume.read(roi), "bad.zarr", "'raw'", "(1, 0, 2)", str(roi))


def test_damaged_shard_is_named_when_read(tmp_path, stack):
    path = tmp_path / "shards.zarr"
    zarr.create_array(path, data=stack, chunks=(4, 16, 16), shards=(8, 32, 32))
    shard = path / "c" / "0" / "1" / "0"
    raw = shard.read_bytes()
    shard.write_bytes(raw[: len(raw) // 2])
    volume = open_volume(path)
    volume.read((0, 0, 0, 9, 32, 47))
    refusal(lambda: volume.read((0, 0, 0, 1, 34, 47)), "shards.zarr", "(0, 2, 0)")


def test_damaged_zarr_metadata(tmp_path, stack):
    for name, zarr_format in (("zarr.json", 3), (".zarray", 2)):
        path = tmp_path / f"v{zarr_format}.zarr"
        zarr.create_array(path, data=stack, zarr_format=zarr_format)
        (path / name).write_text('{"shape": [3')
        refusal(lambda path=path: open_volume(path), path.name, name)


def test_ome_zarr_metadata_that_lie(tmp_path, stack, ome_zarr):
    path = ome_zarr(tmp_path / "lie.zarr", stack, version="0.5", axes="zyx", scale=[1, 1, 1])
    group = zarr.open_group(path, mode="r+")
    ome = dict(group.attrs["ome"])
    good = ome["multiscales"][0]
    for change, fragment in (
        ({"axes": [{"name": a} for a in "czyx"]}, "4 axes"),
        ({"datasets": [{"path": "5"}]}, "5"),
        ({"datasets": [{"coordinateTransformations": []}]}, "OME-Zarr 0.4 or 0.5"),
        ({"datasets": []}, "0 level(s)"),
        ({"datasets": [{"path": "0", "coordinateTransformations": [{"type": "scale", "scale": [1, 2]}]}]}, "3 axes"),
    ):
        group.attrs["ome"] = {**ome, "multiscales": [{**good, **change}]}
        refusal(lambda: open_volume(path), "lie.zarr", fragment, kind=(ValueError, FileNotFoundError))


def test_empty_group(tmp_path):
    zarr.open_group(tmp_path / "empty.zarr", mode="w")
    refusal(lambda: open_volume(tmp_path / "empty.zarr"), "empty.zarr", "neither an image nor labels")


@pytest.mark.parametrize(
    ("axes", "fragment"),
    [
        (None, "axes='CZYX' or axes='ZYXC'"),
        ("ZYX", "3 letters for 4 axes"),
        ("CYXC", "one of them twice"),
        ("ABCD", "letters other than"),
        ("TCYX", "must hold each of Z, Y, X once"),
        ("TCZYX", "5 letters for 4 axes"),
        ("", "must hold"),
    ],
)
def test_wrong_axes_name_shape_and_choices(tmp_path, channels, axes, fragment):
    zarr.save_array(tmp_path / "four.zarr", channels)
    refusal(lambda: open_volume(tmp_path / "four.zarr", axes=axes), "(2, 9, 34, 47)", "'CZYX'", "'ZYXC'", fragment)


def test_axes_of_another_type(tmp_path, channels):
    zarr.save_array(tmp_path / "four.zarr", channels)
    refusal(lambda: open_volume(tmp_path / "four.zarr", axes=["Z", "Y", "X"]), "axes", kind=TypeError)


@pytest.mark.parametrize("options", [{}, {"ome": True}, {"imagej": True}])
def test_a_single_plane_says_what_is_needed(tmp_path, stack, options):
    path = tmp_path / "plane.tif"
    tifffile.imwrite(path, stack[0], **options)
    refusal(lambda: open_volume(path), "plane.tif", "no Z", "axes='YX'")


def test_complex_and_structured_voxels(tmp_path, stack):
    zarr.save_array(tmp_path / "complex.zarr", stack.astype(np.complex64))
    refusal(lambda: open_volume(tmp_path / "complex.zarr"), "complex64", "not supported")
    tifffile.imwrite(tmp_path / "complex.tif", stack.astype(np.complex64), photometric="minisblack")
    refusal(lambda: open_volume(tmp_path / "complex.tif"), "complex64", "not supported")
    refusal(lambda: ArrayVolume(stack.astype(complex)), "complex128")


@pytest.mark.parametrize("channels_option", [[2], [-1], [], 5])
def test_channels_that_are_not_there(tmp_path, channels, channels_option):
    zarr.save_array(tmp_path / "four.zarr", channels)
    refusal(
        lambda: open_volume(tmp_path / "four.zarr", axes="CZYX", channels=channels_option),
        f"channels={channels_option}",
        "0 to 1",
    )
    refusal(lambda: open_volume(tmp_path / "four.zarr", axes="CZYX", channels=["0"]), "channels", kind=TypeError)


@pytest.mark.parametrize("spacing", [(1, 2), (0, 1, 1), (1, -1, 1), (1, 1, float("nan")), "abc", 2.0])
def test_spacing_must_be_three_positive_numbers(spacing):
    refusal(lambda: check_spacing(spacing), "spacing", "three positive")


def test_level_and_time_out_of_range(tmp_path, stack):
    zarr.save_array(tmp_path / "a.zarr", stack)
    tifffile.imwrite(tmp_path / "a.tif", stack, photometric="minisblack")
    for name in ("a.zarr", "a.tif"):
        refusal(lambda name=name: open_volume(tmp_path / name, level=1), "level=1")
        refusal(lambda name=name: open_volume(tmp_path / name, level=-1), "level=-1")
        refusal(lambda name=name: open_volume(tmp_path / name, time=1), "time=1")
