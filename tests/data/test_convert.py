"""`convert_volume`: the voxels of the input, levels worked out anew by numpy, and the same bytes whatever happens."""

import json
import threading
import tracemalloc

import numpy as np
import ome_zarr_models.v04
import ome_zarr_models.v05
import pytest
import tifffile
import zarr
from convert_toys import SMALL, digest

from seg3d_monai.cli import main
from seg3d_monai.data import convert_files
from seg3d_monai.data.convert import convert_volume
from seg3d_monai.data.convert_plan import ConvertPlan, num_units, read_sizes, tile_box, times_decoded, unit_shape, units
from seg3d_monai.data.volume import ArrayVolume, Volume, open_volume

SHAPE = (11, 300, 270)


@pytest.fixture
def image():
    """[C, Z, Y, X] with a part that is zero, so that some files have nothing to hold."""
    array = np.random.default_rng(3).integers(1, 60000, (2, *SHAPE)).astype(np.uint16)
    array[:, :, :140, :200] = 0
    return array


@pytest.fixture
def source(tmp_path, image):
    """The image as a compressed OME-TIFF."""
    path = tmp_path / "in.ome.tif"
    sizes = {"PhysicalSizeX": 0.4, "PhysicalSizeY": 0.5, "PhysicalSizeZ": 2.0}
    tifffile.imwrite(
        path, image, ome=True, metadata={"axes": "CZYX", **sizes}, photometric="minisblack", compression="zlib"
    )
    return path


def naive_mean(array: np.ndarray, factors: tuple[int, int, int]) -> np.ndarray:
    """Means of cells by a loop over the cells; a last cell that is cut counts its last voxel twice."""
    shape = [-(-n // f) for n, f in zip(array.shape, factors, strict=True)]
    result = np.empty(shape, array.dtype)
    for index in np.ndindex(*shape):
        places = [
            [min(i * f + k, n - 1) for k in range(f)] for i, f, n in zip(index, factors, array.shape, strict=True)
        ]
        result[index] = np.rint(np.mean(array[np.ix_(*places)].astype(np.float64)))
    return result


@pytest.mark.parametrize("version", ["0.4", "0.5"])
def test_voxels_levels_and_metadata(tmp_path, image, source, version):
    output = tmp_path / "out.zarr"
    options = SMALL if version == "0.5" else {"chunk_size": [4, 64, 64]}
    done = convert_volume(source, output, ome_zarr_version=version, **options)
    assert (done.shape, done.num_channels, done.num_levels, done.is_new) == (SHAPE, 2, 2, True)
    volume = open_volume(output)
    assert volume.spacing_um == (2.0, 0.5, 0.4)
    assert volume.chunk_shape == (4, 64, 64)
    np.testing.assert_array_equal(volume.read((0, 0, 0, *SHAPE)), image)
    coarse = open_volume(output, level=1)
    assert coarse.spacing_um == (2.0, 1.0, 0.8)  # z waits
    part = image[1, :3, 140:161, 150:171]
    np.testing.assert_array_equal(coarse.read((0, 70, 75, 3, 80, 85))[1], naive_mean(part, (1, 2, 2))[:, :10, :10])
    end = image[0, 10:, 296:, 266:]
    np.testing.assert_array_equal(coarse.read((10, 148, 133, 11, 150, 135))[0], naive_mean(end, (1, 2, 2)))
    group = zarr.open_group(output, mode="r")
    assert group.metadata.zarr_format == (2 if version == "0.4" else 3)
    assert group["0"].shards == ((1, 8, 128, 192) if version == "0.5" else None)
    models = ome_zarr_models.v05 if version == "0.5" else ome_zarr_models.v04
    model = models.Image.from_zarr(group)
    attributes = model.attributes.ome if version == "0.5" else model.attributes
    axes = [(axis.name, axis.type, axis.unit) for axis in attributes.multiscales[0].axes]
    assert axes == [("c", "channel", None), *((name, "space", "micrometer") for name in "zyx")]
    transforms = attributes.multiscales[0].datasets[1].coordinateTransformations
    assert transforms[0].scale == [1.0, 2.0, 1.0, 0.8]
    assert transforms[1].translation == pytest.approx([0.0, 0.0, 0.25, 0.2])
    assert str(tmp_path) not in (output / ("zarr.json" if version == "0.5" else ".zattrs")).read_text()
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith("out")] == ["out.zarr"]
    empty = output / ("0/c/0/0/0/0" if version == "0.5" else "0/0/0/0/0")
    assert not empty.exists()


def test_labels_keep_their_ids(tmp_path):
    labels = np.zeros((5, 300, 290), np.uint32)
    labels[:, 1:200, 3:100] = 7
    labels[2:, 200:, 100:] = 2**31 + 5
    labels[0, 299, 289] = np.iinfo(np.uint32).max  # ignore
    zarr.save_array(tmp_path / "in.zarr", labels)
    output = tmp_path / "out.zarr"
    convert_volume(tmp_path / "in.zarr", output, labels=True, spacing=(2.0, 1.0, 1.0), **SMALL)
    volume = open_volume(output)
    assert volume.dtype == np.uint32
    np.testing.assert_array_equal(volume.read((0, 0, 0, 5, 300, 290))[0], labels)
    coarse = open_volume(output, level=1).read((0, 0, 0, 5, 150, 145))[0]
    assert set(np.unique(coarse)) <= {0, 7, 2**31 + 5, np.iinfo(np.uint32).max}
    assert coarse[0, 50, 1] == 7  # columns 2 and 3: background and 7 tie, the object wins
    assert coarse[0, 0, 30] == 7  # rows 0 and 1 tie too
    assert coarse[2, 100, 50] == 2**31 + 5
    assert coarse[2, 100, 49] == 0
    ome_zarr_models.v05.ImageLabel.from_zarr(zarr.open_group(output / "labels/instances", mode="r"))
    with pytest.raises(ValueError, match="labels are integers, and its voxels are float32"):
        convert_volume(ArrayVolume(labels.astype(np.float32)), tmp_path / "f.zarr", labels=True)
    with pytest.raises(ValueError, match="labels have one channel, and it has 2"):
        convert_volume(ArrayVolume(np.stack([labels, labels])), tmp_path / "f.zarr", labels=True)


def test_part_of_a_stack_says_where_it_lay(tmp_path, image, source):
    roi = (3, 130, 190, 9, 299, 270)
    convert_volume(source, tmp_path / "out.zarr", roi=roi, channels=[1], **SMALL)
    np.testing.assert_array_equal(
        open_volume(tmp_path / "out.zarr").read((0, 0, 0, 6, 169, 80)), image[1:, 3:9, 130:299, 190:]
    )
    ome = zarr.open_group(tmp_path / "out.zarr", mode="r").attrs["ome"]
    transforms = ome["multiscales"][0]["datasets"][0]["coordinateTransformations"]
    assert transforms[1]["translation"] == [0.0, 6.0, 65.0, 76.0]
    for wrong in ((0, 0, 0, 12, 1, 1), (0, 0, 0, 0, 5, 5)):
        with pytest.raises(ValueError, match="roi="):
            convert_volume(source, tmp_path / "other.zarr", roi=wrong)
    assert not list(tmp_path.glob("other*"))


def test_series_of_time_points(tmp_path, image):
    series = np.stack([image[0, :, :40, -50:] + t for t in range(4)])
    zarr.save_array(tmp_path / "in.zarr", series)
    options = {"axes": "TZYX", "spacing": (1, 1, 1), "chunk_size": 16, "shard_size": 32}
    convert_volume(tmp_path / "in.zarr", tmp_path / "all.zarr", time="all", **options)
    convert_volume(tmp_path / "in.zarr", tmp_path / "two.zarr", time=[3, 1], **options)
    convert_volume(tmp_path / "in.zarr", tmp_path / "one.zarr", time=2, **options)
    for name, times in (("all", [0, 1, 2, 3]), ("two", [3, 1]), ("one", [2])):
        for place, time in enumerate(times):
            volume = open_volume(tmp_path / f"{name}.zarr", time=place)
            np.testing.assert_array_equal(volume.read((0, 0, 0, 11, 40, 50))[0], series[time])
    assert zarr.open_group(tmp_path / "all.zarr", mode="r")["0"].shape == (4, 1, 11, 40, 50)
    with pytest.raises(ValueError, match="time is 'some'"):
        convert_volume(tmp_path / "in.zarr", tmp_path / "x.zarr", time="some", **options)


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 300, 3), (300, 1, 2), (2, 1, 513)])
@pytest.mark.parametrize("version", ["0.4", "0.5"])
def test_thin_volumes(tmp_path, shape, version):
    array = np.random.default_rng(0).integers(0, 255, shape).astype(np.uint8)
    convert_volume(ArrayVolume(array), tmp_path / "a.zarr", ome_zarr_version=version)
    volume = open_volume(tmp_path / "a.zarr")
    np.testing.assert_array_equal(volume.read((0, 0, 0, *shape))[0], array)
    coarsest = open_volume(tmp_path / "a.zarr", level=len(volume.levels) - 1)
    assert max(coarsest.shape[1:]) <= 256
    assert min(coarsest.shape) == 1


@pytest.mark.parametrize("dtype", ["bool", "int16", "float16", "float32", "float64", "uint64"])
def test_every_dtype_and_nan(tmp_path, dtype):
    array = (np.random.default_rng(0).integers(0, 2, (3, 270, 20)) * 3).astype(dtype)
    if array.dtype.kind == "f":
        array[1, 5, 5] = np.nan
    convert_volume(ArrayVolume(array), tmp_path / "a.zarr", **SMALL)
    found = open_volume(tmp_path / "a.zarr").read((0, 0, 0, 3, 270, 20))[0]
    assert found.dtype == array.dtype
    np.testing.assert_array_equal(found, array)


def test_workers_and_memory_do_not_show_in_the_bytes(tmp_path, source):
    outputs = []
    for name, options in (
        ("a", {}),
        ("b", {"num_workers": 3}),
        ("c", {"max_memory": 1000}),  # a file at a time, a channel at a time
        ("d", {"max_memory": "1MB", "num_workers": 2}),
    ):
        convert_volume(source, tmp_path / f"{name}.zarr", **SMALL, **options)
        outputs.append(digest(tmp_path / f"{name}.zarr"))
    assert outputs[0] == outputs[1] == outputs[2] == outputs[3]
    assert len(outputs[0]) > 15


def test_boxes_tile_the_output_with_whole_files():
    chunks, shards = read_sizes([4, 64, 64], [8, 128, 192], "0.5")
    plan = ConvertPlan(SHAPE, 2, (5, 6), "uint16", None, (0, 0, 0, *SHAPE), False, "0.5", chunks, shards)
    assert plan.tile == (8, 128, 192)
    # Planes that are compressed as a whole are read as a whole where memory allows, by rows of files where not.
    assert unit_shape(plan, (1, 300, 270), 2, 10**9) == (8, 384, 384)
    assert unit_shape(plan, (1, 300, 270), 2, 8 * 128 * 384 * 4) == (8, 128, 384)
    assert unit_shape(plan, (1, 300, 270), 2, 1) == (8, 128, 192)
    assert unit_shape(plan, (4, 64, 64), 2, 10**9) == (8, 128, 192)
    assert unit_shape(plan, (16, 64, 64), 2, 10**9) == (16, 128, 192)
    seen = np.zeros((2, *SHAPE), int)
    for size in ((8, 128, 192), (8, 384, 384)):
        made = list(units(plan, size))
        assert len(made) == num_units(plan, size)
        for unit in made:
            z1, y1, x1, z2, y2, x2 = unit.box
            seen[unit.time, z1:z2, y1:y2, x1:x2] += 1
            inside = [tile_box(plan, place) for place in unit.tiles]
            assert sum(np.prod(np.subtract(box[3:], box[:3])) for box in inside) == (z2 - z1) * (y2 - y1) * (x2 - x1)
    assert (seen == 2).all()
    # 300 rows in boxes of 128: pages are read for each of 3 x 2 boxes.
    assert times_decoded(plan, (1, 300, 270), (8, 128, 192)) == 6
    assert times_decoded(plan, (1, 300, 270), (8, 384, 384)) == 1
    # Pieces of 6 planes, boxes of 8: the pieces at 6 to 11 are read twice.
    assert times_decoded(plan, (6, 300, 270), (8, 384, 384)) == 1.5


def test_a_finished_output_is_left_alone_and_another_one_too(tmp_path, image, source):
    output = tmp_path / "out.zarr"
    convert_volume(source, output, **SMALL)
    before = {path: path.stat().st_mtime_ns for path in output.rglob("*")}
    again = convert_volume(source, output, **SMALL, num_workers=2)
    assert not again.is_new
    assert "already there" in again.describe()
    assert {path: path.stat().st_mtime_ns for path in output.rglob("*")} == before
    with pytest.raises(
        ValueError, match=r"out\.zarr: exists and was made otherwise \(chunk_size: \[4, 64, 64\] -> \[4, 32"
    ):
        convert_volume(source, output, chunk_size=[4, 32, 64], shard_size=SMALL["shard_size"])
    image[0, 5, 200, 200] += 1
    tifffile.imwrite(source, image, photometric="minisblack")
    with pytest.raises(ValueError, match=r"was made otherwise .*input"):
        convert_volume(source, output, axes="CZYX", spacing=(2.0, 0.5, 0.4), **SMALL)
    convert_volume(source, output, axes="CZYX", spacing=(2.0, 0.5, 0.4), restart=True, **SMALL)
    np.testing.assert_array_equal(open_volume(output).read((0, 0, 0, *SHAPE)), image)
    foreign = tmp_path / "foreign.zarr"
    zarr.save_array(foreign, image)
    for restart in (False, True):
        with pytest.raises(ValueError, match=r"foreign\.zarr: exists and was (made otherwise|not written by seg3d)"):
            convert_volume(source, foreign, axes="CZYX", restart=restart)
    np.testing.assert_array_equal(zarr.open_array(foreign, mode="r")[:], image)
    kept = tmp_path / "mine.zarr.partial" / "notes.txt"
    kept.parent.mkdir()
    kept.write_text("of another program")
    for restart in (False, True):
        with pytest.raises(ValueError, match=r"mine\.zarr\.partial: exists and was not written by seg3d"):
            convert_volume(source, tmp_path / "mine.zarr", axes="CZYX", restart=restart)
    assert kept.read_text() == "of another program"


def test_outputs_that_cannot_be(tmp_path, source):
    inside = tmp_path / "in.zarr"
    zarr.save_array(inside / "deep.zarr", np.ones((2, 3, 4), np.uint8))
    for output, image, fragment, kind in (
        ("out", source, "must end in .zarr", ValueError),
        ("s3://bucket/out.zarr", source, "on this machine only", ValueError),
        (tmp_path / "none" / "out.zarr", source, "its folder does not exist", FileNotFoundError),
        (inside, inside / "deep.zarr", "is the input or lies around it", ValueError),
        (inside / "deep.zarr", inside / "deep.zarr", "is the input or lies around it", ValueError),
    ):
        with pytest.raises(kind, match=fragment):
            convert_volume(image, output)
    for options, fragment in (
        ({"num_workers": 0}, "num_workers is 0"),
        ({"shard_size": [8, 100, 100], "chunk_size": 64}, "pass a multiple of chunk_size"),
        ({"shard_size": 64, "ome_zarr_version": "0.4"}, "0.4 has not"),
        ({"ome_zarr_version": "0.3"}, "choose one of 0.4, 0.5"),
        ({"chunk_size": [4, 4]}, "chunk_size has 2 values"),
        ({"chunk_size": 0}, "must be at least 1"),
        ({"max_memory": "much"}, "max_memory is 'much'"),
        ({"level": 3}, "level=3 is not there"),
    ):
        with pytest.raises(ValueError, match=fragment):
            convert_volume(source, tmp_path / "out.zarr", **options)
    with pytest.raises(ValueError, match="describe a file, and image is a volume"):
        convert_volume(ArrayVolume(np.ones((2, 3, 4))), tmp_path / "out.zarr", axes="ZYX")
    assert not list(tmp_path.glob("out*"))


def test_two_runs_on_one_output(tmp_path, source, monkeypatch):
    held, go = threading.Event(), threading.Event()
    original = convert_files.FileWriter.fill

    def slow(self, *args):
        held.set()
        go.wait(30)
        return original(self, *args)

    monkeypatch.setattr(convert_files.FileWriter, "fill", slow)
    thread = threading.Thread(target=convert_volume, args=(source, tmp_path / "out.zarr"), kwargs=SMALL)
    thread.start()
    assert held.wait(30)
    with pytest.raises(ValueError, match="another run is writing it"):
        convert_volume(source, tmp_path / "out.zarr", **SMALL)
    with pytest.raises(ValueError, match="unfinished"):
        open_volume(tmp_path / "out.zarr.partial")
    go.set()
    thread.join(60)
    assert not convert_volume(source, tmp_path / "out.zarr", **SMALL).is_new


def test_a_damaged_page_stops_or_becomes_a_hole(tmp_path, image, source):
    with tifffile.TiffFile(source) as tif:
        page = tif.pages[11 + 9]  # channel 1, plane 9: the second row of files along z
        offset, count = page.dataoffsets[0], page.databytecounts[0]  # the first strip
        rows = page.rowsperstrip
    good = source.read_bytes()
    with source.open("r+b") as file:
        file.seek(offset)
        file.write(b"\x5a" * count)
    output = tmp_path / "out.zarr"
    with pytest.raises(ValueError, match=r"in\.ome\.tif: page 20 is damaged.*read for roi="):
        convert_volume(source, output, **SMALL)
    assert not output.exists()
    done = convert_volume(source, output, skip_bad=True, num_workers=2, **SMALL)
    tops = [row for row in range(0, 300, 128) if row < rows]
    assert done.num_holes == 2 * len(tops)  # two files along x
    holes = zarr.open_group(output, mode="r").attrs["seg3d_monai"]["holes"]
    assert holes[0] == {"roi": [8, 0, 0, 11, 128, 192], "channel": 1}
    expected = image.copy()
    for hole in holes:
        z1, y1, x1, z2, y2, x2 = hole["roi"]
        expected[hole["channel"], z1:z2, y1:y2, x1:x2] = 0
    assert (expected != image).any()
    np.testing.assert_array_equal(open_volume(output).read((0, 0, 0, *SHAPE)), expected)
    assert convert_volume(source, output, skip_bad=True, **SMALL).num_holes == len(holes)
    source.write_bytes(good)
    convert_volume(source, output, restart=True, **SMALL)
    np.testing.assert_array_equal(open_volume(output).read((0, 0, 0, *SHAPE)), image)


def test_a_full_disk_is_told_and_mended(tmp_path, image, source, monkeypatch):
    original, left = zarr.storage._local._put, [5]

    def put(path, value, exclusive=False):
        left[0] -= 1
        if left[0] < 0 and "/c/" in str(path):
            raise OSError(28, "No space left on device", str(path))
        return original(path, value, exclusive)

    left[0] = 8
    monkeypatch.setattr(zarr.storage._local, "_put", put)
    with pytest.raises(OSError, match="No space left"):
        convert_volume(source, tmp_path / "out.zarr", num_workers=2, **SMALL)
    monkeypatch.setattr(zarr.storage._local, "_put", original)
    assert not (tmp_path / "out.zarr").exists()
    convert_volume(source, tmp_path / "out.zarr", **SMALL)
    convert_volume(source, tmp_path / "whole.zarr", **SMALL)
    assert digest(tmp_path / "out.zarr") == digest(tmp_path / "whole.zarr")


def test_memory_does_not_grow_with_the_stack(tmp_path, monkeypatch):
    """Bytes that Python and numpy hold at once, for stacks of 4 and of 32 MB in boxes of at most 1 MB."""
    # The identity of the input hashes 2^25 voxels, which is all of so small a stack.
    monkeypatch.setattr(Volume, "identity", lambda self: {"shape": list(self.shape)})
    options = {"chunk_size": [16, 64, 128], "shard_size": [16, 128, 128], "max_memory": "3MB"}
    peaks = []
    for planes in (8, 32, 256):  # the first only loads what is loaded once
        stack = np.random.default_rng(0).integers(0, 99, (planes, 256, 256)).astype(np.uint16)
        source, output = tmp_path / f"{planes}.tif", tmp_path / f"{planes}.zarr"
        tifffile.imwrite(source, stack, photometric="minisblack", compression="zlib")
        last = stack[-5:, 250:].copy()
        del stack
        tracemalloc.start()
        convert_volume(source, output, **options)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        np.testing.assert_array_equal(open_volume(output).read((planes - 5, 250, 0, planes, 256, 256))[0], last)
    assert peaks[2] < 1.2 * peaks[1] + 5e5
    assert peaks[2] < 10e6


def test_command(tmp_path, image, source, capsys):
    output = tmp_path / "out.zarr"
    words = [
        "convert",
        str(source),
        str(output),
        "--channels",
        "1",
        "--chunk_size",
        "[4,64,64]",
        "--shard_size",
        "[8,128,192]",
    ]
    assert main([*words, "--dry_run"]) == 0
    assert "nothing was written" in capsys.readouterr().out
    assert not output.exists()
    assert main(words) == 0
    text = capsys.readouterr().out
    assert f"written: {output}" in text
    assert "voxel size (2, 0.5, 0.4) um" in text
    np.testing.assert_array_equal(open_volume(output).read((0, 0, 0, *SHAPE)), image[1:])
    assert main(words) == 0
    assert "already there" in capsys.readouterr().out
    assert main([*words[:3], "--level", "5um"]) == 2
    assert "out.zarr: exists and was made otherwise" in capsys.readouterr().err
    assert main(["convert", str(tmp_path / "none.tif"), str(tmp_path / "x.zarr")]) == 2
    assert "none.tif: no such file" in capsys.readouterr().err
    facts = json.loads((output / "zarr.json").read_text())["attributes"]["seg3d_monai"]["convert"]
    assert facts["input"]["shape"] == [1, *SHAPE]
    assert "workers" not in json.dumps(facts)
