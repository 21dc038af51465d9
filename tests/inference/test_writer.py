"""The OME-Zarr that is written: metadata, pyramid, and validity by independent readers."""

from concurrent.futures import ThreadPoolExecutor
from itertools import product

import numpy as np
import ome_zarr_models.v04
import ome_zarr_models.v05
import pytest
import zarr
from inference_toys import blank, tree_digest
from napari_ome_zarr import napari_get_reader
from ome_zarr.io import parse_url
from ome_zarr.reader import Reader

from seg3d_monai.data.volume import ArrayVolume, open_volume
from seg3d_monai.inference import writer as writer_module
from seg3d_monai.inference.blocks import BlockPlan, roi_slices
from seg3d_monai.inference.writer import LabelWriter, downsample_image, downsample_labels, is_own_output

SHAPE = (5, 300, 270)
BLOCK = (3, 128, 100)
SMALL_CHUNK = (2, 70, 50)
"""The largest chunk where a block is to hold several: they are (1, 64, 50)."""


def write(
    folder,
    *,
    version="0.5",
    spacing_um=(2.0, 0.5, 0.5),
    dtype="uint32",
    image=None,
    shape=SHAPE,
    order=1,
    shards=False,
    num_threads=1,
):
    plan = BlockPlan.make(shape=shape, block_size=BLOCK, halo=(1, 4, 4))
    labels = np.arange(np.prod(shape)).reshape(shape) // 777
    writer = LabelWriter(
        folder,
        plan,
        dtype=dtype,
        spacing_um=spacing_um,
        version=version,
        facts={"provenance": {"bundle": "toy"}},
        shards=shards,
        image=None if image is None else (image.shape[0], image.dtype),
    )
    writer.create()

    def write_block(block):
        writer.write(block, labels[roi_slices(block.owned)])
        if image is not None:
            writer.copy(block, image.read(block.owned))

    with ThreadPoolExecutor(num_threads) as threads:
        list(threads.map(write_block, list(plan)[::order]))
        for name in writer.coarse_arrays():
            tiles = list(range(writer.num_tiles(name)))[::order]
            list(threads.map(writer.build_tile, [name] * len(tiles), tiles))
    assert not folder.exists()
    writer.publish()
    return labels


@pytest.mark.parametrize(("version", "shards"), [("0.4", False), ("0.5", False), ("0.5", True)])
@pytest.mark.parametrize("with_image", [False, True])
def test_valid_for_ome_zarr_models_and_the_ome_zarr_reader(tmp_path, monkeypatch, version, shards, with_image):
    if shards:
        monkeypatch.setattr(writer_module, "_MAX_CHUNK", SMALL_CHUNK)
    folder = tmp_path / "x.zarr"
    image = ArrayVolume(np.random.default_rng(0).integers(0, 99, (2, *SHAPE), np.uint16)) if with_image else None
    labels = write(folder, version=version, image=image, shards=shards)
    assert [p.name for p in tmp_path.iterdir()] == ["x.zarr"]
    models = ome_zarr_models.v05 if version == "0.5" else ome_zarr_models.v04
    models.Labels.from_zarr(zarr.open_group(folder / "labels", mode="r"))
    group = zarr.open_group(folder / "labels" / "instances", mode="r")
    model = models.ImageLabel.from_zarr(group)
    attributes = model.attributes.ome if version == "0.5" else model.attributes
    (multiscale,) = attributes.multiscales
    assert [(a.name, a.type, a.unit) for a in multiscale.axes] == [(n, "space", "micrometer") for n in "zyx"]
    transforms = [d.coordinateTransformations for d in multiscale.datasets]
    assert [t[0].scale for t in transforms] == [[2.0, 0.5, 0.5], [2.0, 1.0, 1.0]]
    assert [t[1].translation for t in transforms] == [[0, 0, 0], [0, 0.25, 0.25]]
    assert (group["0"][:] == labels).all()
    assert group["0"].dtype == np.uint32
    assert group["0"].shards == (BLOCK if shards else None)
    assert group["1"].shape == (5, 150, 135)
    assert group["1"].metadata.zarr_format == (3 if version == "0.5" else 2)
    nodes = list(Reader(parse_url(folder / "labels" / "instances"))())
    (node,) = [n for n in nodes if "Label" in {type(spec).__name__ for spec in n.specs}]
    assert [level.shape for level in node.data] == [SHAPE, (5, 150, 135)]
    read = napari_get_reader(str(folder / "labels" / "instances"))
    layers = {kind: (levels, options) for levels, options, kind in read(str(folder / "labels" / "instances"))}
    levels, options = layers["labels"]
    assert [level.shape for level in levels] == [SHAPE, (5, 150, 135)]
    assert (np.asarray(levels[0]) == labels).all()
    assert list(options["scale"]) == [2.0, 0.5, 0.5]
    assert ("image" in layers) == with_image
    found = {tuple(level.shape for level in n.data) for n in nodes if n.data}  # the label leads to its image
    assert (((2, *SHAPE), (2, 5, 150, 135)) in found) == with_image
    volume = open_volume(folder / "labels" / "instances")
    assert volume.spacing_um == (2.0, 0.5, 0.5)
    assert (volume.read((1, 2, 3, 5, 299, 269))[0] == labels[1:5, 2:299, 3:269]).all()
    if with_image:
        models.Image.from_zarr(zarr.open_group(folder, mode="r"))
        assert (zarr.open_group(folder, mode="r")["0"][:] == image.array).all()
        assert zarr.open_group(folder, mode="r")["1"].shape == (2, 5, 150, 135)
    else:
        assert open_volume(folder).shape == (1, *SHAPE)


def test_unknown_spacing_has_no_unit(tmp_path):
    write(tmp_path / "x.zarr", spacing_um=None)
    attributes = zarr.open_group(tmp_path / "x.zarr/labels/instances", mode="r").attrs["ome"]
    (multiscale,) = attributes["multiscales"]
    assert multiscale["axes"] == [{"name": n, "type": "space"} for n in "zyx"]
    assert multiscale["datasets"][0]["coordinateTransformations"][0]["scale"] == [1, 1, 1]
    # without a spacing all axes are halved
    assert zarr.open_array(tmp_path / "x.zarr/labels/instances/1", mode="r").shape == (3, 150, 135)


@pytest.mark.parametrize("shards", [False, True])
def test_same_bytes_in_another_order_and_place(tmp_path, monkeypatch, shards):
    monkeypatch.setattr(writer_module, "_MAX_CHUNK", SMALL_CHUNK)
    write(tmp_path / "a.zarr", shards=shards)
    (tmp_path / "deep" / "er").mkdir(parents=True)
    write(tmp_path / "deep" / "er" / "b.zarr", order=-1, num_threads=4, shards=shards)
    assert tree_digest(tmp_path / "a.zarr") == tree_digest(tmp_path / "deep" / "er" / "b.zarr")
    assert len(tree_digest(tmp_path / "a.zarr")) > 10


def test_a_shard_holds_the_chunks_of_a_block(tmp_path, monkeypatch):
    monkeypatch.setattr(writer_module, "_MAX_CHUNK", SMALL_CHUNK)
    image = ArrayVolume(np.random.default_rng(0).integers(1, 99, (2, *SHAPE), np.uint16))
    write(tmp_path / "chunks.zarr", image=image)
    write(tmp_path / "shards.zarr", image=image, shards=True)
    groups = [zarr.open_group(tmp_path / f"{name}.zarr", mode="r") for name in ("chunks", "shards")]
    # name, shard, files: blocks 2 x 3 x 3, then a level of (5, 150, 135), whose last shards are cut
    expected = [
        ("labels/instances/0", (3, 128, 100), 18),
        ("labels/instances/1", (3, 128, 100), 8),
        ("0", (1, 3, 128, 100), 36),
        ("1", (1, 3, 128, 100), 16),
    ]
    for name, shard, num_files in expected:
        chunked, sharded = (group[name] for group in groups)
        assert chunked.shards is None
        assert chunked.chunks == sharded.chunks
        assert sharded.chunks[-3:] == (1, 64, 50)
        assert sharded.shards == shard
        assert (chunked[:] == sharded[:]).all()
        files = [path for path in (tmp_path / "shards.zarr" / name / "c").rglob("*") if path.is_file()]
        assert len(files) == num_files


@pytest.mark.parametrize("roi", [None, (1, 30, 0, 9, 160, 77), (3, 0, 90, 6, 130, 110)])
def test_no_two_blocks_write_one_file(monkeypatch, tmp_path, roi):
    monkeypatch.setattr(writer_module, "_MAX_CHUNK", (2, 40, 40))
    plan = BlockPlan.make(shape=(10, 170, 300), block_size=(3, 64, 84), halo=1, roi=roi, times=2)
    for shards in (False, True):
        writer = LabelWriter(
            tmp_path / "x.zarr",
            plan,
            dtype="uint32",
            spacing_um=None,
            version="0.5",
            facts={},
            shards=shards,
            is_series=True,
        )
        writer.create()
        array = zarr.open_array(writer.partial, path="labels/instances/0", mode="r")
        extent = (array.shards or array.chunks)[1:]
        owner = {}
        for block in plan:
            low, high = block.owned[:3], block.owned[3:]
            ranges = (range(a // e, -(-b // e)) for a, b, e in zip(low, high, extent, strict=True))
            for file in product([block.time], *ranges):
                assert owner.setdefault(file, block.index) == block.index


def test_a_left_over_is_replaced_and_uint16_is_kept(tmp_path):
    (tmp_path / "x.zarr.partial" / "junk").mkdir(parents=True)
    write(tmp_path / "x.zarr", dtype="uint16")
    assert not (tmp_path / "x.zarr" / "junk").exists()
    assert zarr.open_array(tmp_path / "x.zarr/labels/instances/1", mode="r").dtype == np.uint16


def test_only_own_outputs_are_recognised(tmp_path):
    write(tmp_path / "x.zarr")
    zarr.open_group(tmp_path / "other.zarr", mode="w")
    (tmp_path / "folder").mkdir()
    assert is_own_output(tmp_path / "x.zarr")
    assert not is_own_output(tmp_path / "other.zarr")
    assert not is_own_output(tmp_path / "folder")


def test_a_tiny_volume_has_one_level(tmp_path):
    write(tmp_path / "x.zarr", shape=(1, 2, 3))
    assert sorted(zarr.open_group(tmp_path / "x.zarr/labels/instances", mode="r")) == ["0"]
    assert blank((1, 2, 3)).shape == (1, 1, 2, 3)


def test_labels_are_downsampled_by_majority():
    cell = np.array([[[5, 5], [7, 7]], [[5, 0], [0, 0]]])
    assert downsample_labels(cell, (2, 2, 2)).tolist() == [[[5]]]  # 5 and 0 three times each: an object before 0
    assert downsample_labels(cell, (1, 2, 2)).tolist() == [[[5]], [[0]]]  # 5 and 7 twice each: the lower; 0 three times
    assert downsample_labels(np.array([[[1, 2, 9]]]), (1, 1, 2)).tolist() == [[[1, 9]]]


def test_majority_matches_a_naive_count():
    labels = np.random.default_rng(0).integers(0, 4, (5, 6, 7)).astype(np.uint32)
    padded = np.pad(labels, [(0, 1), (0, 0), (0, 1)], mode="edge")
    coarse = downsample_labels(labels, (2, 2, 2))
    assert coarse.shape == (3, 3, 4)
    assert coarse.dtype == np.uint32
    for z, y, x in np.ndindex(coarse.shape):
        counts = np.bincount(padded[2 * z : 2 * z + 2, 2 * y : 2 * y + 2, 2 * x : 2 * x + 2].ravel(), minlength=4)
        expected = max(range(4), key=lambda i, c=counts: (c[i], i > 0, -i))
        assert coarse[z, y, x] == expected


def test_images_are_downsampled_by_mean():
    image = np.array([[[1, 2], [3, 5]]], np.uint16)
    assert downsample_image(image, (1, 2, 2)).tolist() == [[[3]]]
    assert downsample_image(image.astype(np.float32), (1, 2, 2)).tolist() == [[[2.75]]]
    assert downsample_image(image, (1, 2, 2)).dtype == np.uint16
