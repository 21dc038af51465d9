"""Volumes behind URLs, against a server on this machine that counts what is asked for."""

import functools
import multiprocessing
import pickle
import threading
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import tifffile
import zarr

from seg3d_monai.data.convert import convert_volume
from seg3d_monai.data.volume import open_volume
from seg3d_monai.inference.inputs import open_times, volume_identity

ROI = (5, 15, 17, 7, 18, 20)


class RangeHandler(SimpleHTTPRequestHandler):
    """Serves files, parts of them where a range is asked for, and keeps (path, range) of each answer."""

    log: list[tuple[str, str | None]] = []  # noqa: RUF012  (one for the server, as handlers live for one request)

    def do_GET(self) -> None:
        wanted = self.headers.get("Range")
        path = Path(self.translate_path(self.path))
        self.log.append((self.path, wanted))
        if wanted is None or not path.is_file():
            super().do_GET()
            return
        content = path.read_bytes()
        first, _, last = wanted.removeprefix("bytes=").partition("-")
        start = int(first) if first else len(content) - int(last)
        stop = min(len(content), int(last) + 1 if first and last else len(content))
        self.send_response(206)
        self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{len(content)}")
        self.send_header("Content-Length", str(stop - start))
        self.end_headers()
        self.wfile.write(content[start:stop])

    def end_headers(self) -> None:
        self.send_header("Accept-Ranges", "bytes")
        super().end_headers()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server(tmp_path) -> Iterator[str]:
    """URL of a server of tmp_path."""
    RangeHandler.log.clear()
    handler = functools.partial(RangeHandler, directory=str(tmp_path))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as http:
        thread = threading.Thread(target=http.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{http.server_port}"
        http.shutdown()
        thread.join()


def part(array, roi=ROI):
    z1, y1, x1, z2, y2, x2 = roi
    return array[..., z1:z2, y1:y2, x1:x2]


@pytest.mark.parametrize("layout", ["v2", "v3", "sharded"])
def test_only_the_chunks_that_are_needed_are_fetched(tmp_path, stack, server, layout):
    options = {"zarr_format": 2} if layout == "v2" else {"shards": (8, 32, 32) if layout == "sharded" else None}
    zarr.create_array(tmp_path / "a.zarr", data=stack, chunks=(4, 16, 16), **options)
    volume = open_volume(f"{server}/a.zarr")
    assert volume.shape == (1, *stack.shape)
    assert volume.path == f"{server}/a.zarr"
    RangeHandler.log.clear()
    np.testing.assert_array_equal(volume.read(ROI)[0], part(stack))
    asked = {(path, wanted is not None) for path, wanted in RangeHandler.log}
    expected = {
        "v2": {("/a.zarr/1.0.1", False), ("/a.zarr/1.1.1", False)},
        "v3": {("/a.zarr/c/1/0/1", False), ("/a.zarr/c/1/1/1", False)},
        "sharded": {("/a.zarr/c/0/0/0", True)},
    }
    assert asked == expected[layout]


@pytest.mark.parametrize("version", ["0.4", "0.5"])
def test_ome_zarr(tmp_path, channels, server, ome_zarr, version):
    ome_zarr(tmp_path / "i.zarr", channels, version=version, axes="czyx", scale=[1, 2.0, 0.5, 0.4])
    volume = open_volume(f"{server}/i.zarr/", channels=1)
    assert volume.spacing_um == (2.0, 0.5, 0.4)
    np.testing.assert_array_equal(volume.read(ROI), part(channels[1:]))
    coarse = open_volume(f"{server}/i.zarr", level="1um")
    assert coarse.level == 1
    np.testing.assert_array_equal(coarse.read((0, 0, 0, 5, 17, 24)), channels[:, ::2, ::2, ::2])
    assert volume.identity()["digest"] == open_volume(tmp_path / "i.zarr", channels=1).identity()["digest"]
    assert volume_identity(volume)["modified"] is None
    (again,), times = open_times(f"{server}/i.zarr", 0, channels=1, level="1um")
    assert (again.level, times) == (1, None)


def test_labels_and_single_images_of_groups(tmp_path, stack, server, ome_zarr):
    zarr.open_group(tmp_path / "out.zarr", mode="w").create_group("labels").attrs["ome"] = {"labels": ["instances"]}
    ome_zarr(tmp_path / "out.zarr/labels/instances", stack, version="0.5", axes="zyx", scale=[1, 1, 1])
    zarr.open_group(tmp_path / "g.zarr", mode="w").create_array("raw", data=stack)
    for name in ("out.zarr", "g.zarr"):
        np.testing.assert_array_equal(open_volume(f"{server}/{name}").read(ROI)[0], part(stack))


@pytest.mark.parametrize("options", [{}, {"compression": "zlib", "tile": (16, 16)}, {"metadata": None}])
def test_tiff_by_the_piece(tmp_path, server, options):
    stack = np.random.default_rng(0).integers(0, 60000, (40, 200, 300)).astype(np.uint16)
    tifffile.imwrite(tmp_path / "a.tif", stack, photometric="minisblack", **options)
    volume = open_volume(f"{server}/a.tif")
    RangeHandler.log.clear()
    np.testing.assert_array_equal(volume.read(ROI)[0], part(stack))
    ranges = [wanted.removeprefix("bytes=").split("-") for _, wanted in RangeHandler.log if wanted]
    assert 0 < sum(int(last) - int(first) + 1 for first, last in ranges) < stack.nbytes / 100
    copy = pickle.loads(pickle.dumps(volume))
    np.testing.assert_array_equal(copy.read((0, 0, 0, 2, 200, 300))[0], stack[:2])


def test_a_forked_child_reads_what_its_parent_opened(tmp_path, stack, server):
    zarr.create_array(tmp_path / "a.zarr", data=stack, chunks=(4, 16, 16))
    volume = open_volume(f"{server}/a.zarr")
    expected = volume.read(ROI)
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    child = context.Process(target=lambda: queue.put(volume.read(ROI)))
    child.start()
    child.join(timeout=60)
    assert child.exitcode == 0
    np.testing.assert_array_equal(queue.get(), expected)


def test_what_is_not_there_or_not_read_from_afar(tmp_path, stack, server):
    for name in ("none.zarr", "none"):
        with pytest.raises(FileNotFoundError, match="no Zarr array or group is there"):
            open_volume(f"{server}/{name}")
    with pytest.raises(FileNotFoundError, match=r"none\.tif: no such file"):
        open_volume(f"{server}/none.tif")
    with pytest.raises(ValueError, match="download it first"):
        open_volume(f"{server}/a.ims")
    with pytest.raises(ValueError, match="must lie on this machine"):
        open_volume([f"{server}/a.tif", f"{server}/b.tif"])
    with pytest.raises(ValueError, match="use https"):
        open_volume("nosuch://host/a.zarr")


def test_a_server_that_does_not_answer(tmp_path, stack, server):
    zarr.create_array(tmp_path / "a.zarr", data=stack, chunks=(4, 16, 16))
    with pytest.raises(OSError, match=r"a\.zarr/zarr\.json: cannot be reached.*check the address and the connection"):
        open_volume("http://127.0.0.1:9/a.zarr")
    volume = open_volume(f"{server}/a.zarr")
    chunk = tmp_path / "a.zarr/c/1/0/1"
    chunk.write_bytes(chunk.read_bytes()[:20])
    with pytest.raises(ValueError, match=r"a\.zarr.*chunk \(1, 0, 1\) is damaged.*whether the server is still there"):
        volume.read(ROI)


def test_conversion_by_threads(tmp_path, channels, server, ome_zarr):
    ome_zarr(tmp_path / "i.zarr", channels, version="0.4", axes="czyx", scale=[1, 2.0, 0.5, 0.4])
    convert_volume(f"{server}/i.zarr", tmp_path / "o.zarr", num_workers=3, chunk_size=8, shard_size=16)
    assert open_volume(tmp_path / "o.zarr").spacing_um == (2.0, 0.5, 0.4)
    np.testing.assert_array_equal(open_volume(tmp_path / "o.zarr").read((0, 0, 0, 9, 34, 47)), channels)
