"""The files that `seg3d export` writes: run by their own runtimes, they compute what the network does."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from seg3d_monai.cli import main
from seg3d_monai.engine.checkpoint import load_weights, write_weights
from seg3d_monai.export import DensePart, formats
from seg3d_monai.export.formats import FORMATS
from seg3d_monai.export.write import compare_outputs
from seg3d_monai.ops import nms3d

BUNDLES = ["maskrcnn3d", "maskdino3d", "mask2former3d"]
ROOT = Path(__file__).parents[2]
Trained = Callable[..., tuple[Path, Path]]
SHAPES = {".pt2": ("[16,48,32]", "1"), ".onnx": ("[16,32,48]", "2"), ".ts": ("[24,32,64]", "2")}
"""None is a cube; axes, batches and formats are crossed rather than combined, for an exporter takes seconds."""


@pytest.mark.parametrize("suffix", list(FORMATS))
@pytest.mark.parametrize("bundle", BUNDLES)
def test_a_file_computes_what_the_network_does(
    bundle: str,
    suffix: str,
    small: Callable[..., nn.Module],
    trained: Trained,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    weights, overlay = trained(bundle)
    out, (shape, batch) = tmp_path / f"net{suffix}", SHAPES[suffix]
    words = ["export", str(ROOT / "bundles" / bundle), str(out), "--overlay", str(overlay)]
    assert main([*words, "--checkpoint", str(weights), "--shape", shape, "--batch", batch]) == 0
    printed = capsys.readouterr().out
    assert str(out) in printed
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["model.pt", "small.json", out.name, "net.json"])

    described = json.loads((tmp_path / "net.json").read_text())
    size = [int(batch), 1, *json.loads(shape)]
    assert described["input"] == {"name": "images", "shape": size, "axes": "NCZYX", "dtype": "float32"}
    assert described["intensity"]["percentiles"] == [1.0, 99.8]
    assert described["intensity"]["clipped_to"] == [-1.0, 8.0]
    assert described["spacing_um"] == [2.0, 0.8, 0.8]
    assert described["halo"] == [8, 24, 24]
    dense = DensePart(load_weights(small(bundle, seed=5), weights))
    images = torch.randn(size, generator=torch.Generator().manual_seed(7))
    with torch.no_grad():
        expected = dense(images)
        found = FORMATS[suffix].read(out, list(described["outputs"]))(images)
    assert {name: entry["shape"] for name, entry in described["outputs"].items()} == {
        name: list(values.shape) for name, values in expected.items()
    }
    assert set(described["outputs"]) == set(printed_names(printed))
    for name, values in expected.items():
        torch.testing.assert_close(found[name], values, rtol=1e-4, atol=1e-4)
    if bundle == "maskrcnn3d":
        assert sum(described["anchors"].values()) == expected["objectness"].shape[1]
        assert list(described["anchors"]) == ["p2", "p3"]
    else:
        assert described["mask_stride"] == [1, 2, 2]
        assert described["has_no_object"] == (bundle == "mask2former3d")


def printed_names(text: str) -> list[str]:
    """Outputs that the command told the difference of."""
    return [line.split(":")[0].strip() for line in text.splitlines() if line.startswith("  ")]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["no_such_bundle", "net.pt2"], "bundle 'no_such_bundle' does not exist"),
        (["maskrcnn3d", "net.h5"], "ends in .h5; choose one of .pt2, .onnx, .ts"),
        (["maskrcnn3d", "net"], "ends in nothing"),
        (["maskrcnn3d", "no/folder/net.ts"], "its folder does not exist"),
        (["maskrcnn3d", "net.ts", "--overlay", "no_such"], "overlay 'no_such.json' does not exist"),
        (["maskrcnn3d", "net.ts", "--checkpoint", "no.pt"], "'no.pt' does not exist"),
        (["mask2former3d", "net.ts"], "runs/mask2former3d/model.pt' does not exist; train first or give --checkpoint"),
        (["maskrcnn3d", "net.ts", "--shape", "[16,32]"], "three positive numbers of voxels"),
        (
            ["maskrcnn3d", "net.ts", "--shape", "[16,40,48]"],
            "multiples of the coarsest stride [8, 16, 16], such as [16, 48, 48]",
        ),
        (["maskrcnn3d", "net.ts", "--shape", "[0,32,48]"], "three positive numbers"),
        (["maskrcnn3d", "net.ts", "--batch", "0"], "--batch is 0; give at least 1"),
        (["maskdino3d", "net.ts", "--checkpoint", "model.pt"], "does not fit the network"),
        (["pretrain3d", "net.ts"], "checkpoint 'runs/pretrain3d/model.pt' does not exist"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_mistake_is_one_line_and_leaves_nothing(
    words: list[str],
    message: str,
    trained: Trained,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    weights, overlay = trained("maskrcnn3d")
    monkeypatch.chdir(tmp_path)
    if ("--shape" in words or "--batch" in words) and "--checkpoint" not in words:
        words = [*words, "--checkpoint", str(weights), "--overlay", str(overlay)]
    assert main(["export", *words]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("seg3d: error: ")
    assert captured.err.count("\n") == 1
    assert message in captured.err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.pt", "small.json"]


@pytest.mark.parametrize("existing", ["net.ts", "net.json"])
def test_an_existing_file_is_kept_unless_asked(
    existing: str, trained: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights, overlay = trained("maskrcnn3d")
    (tmp_path / existing).write_text("mine")
    words = ["export", "maskrcnn3d", str(tmp_path / "net.ts"), "--overlay", str(overlay)]
    words += ["--checkpoint", str(weights), "--shape", "[8,16,32]"]
    assert main(words) == 2
    assert "exists; choose another name or give --overwrite" in capsys.readouterr().err
    assert (tmp_path / existing).read_text() == "mine"
    assert main([*words, "--overwrite"]) == 0
    assert json.loads((tmp_path / "net.json").read_text())["file"] == "net.ts"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.pt", "net.json", "net.ts", "small.json"]


def test_onnx_missing_names_the_extra(
    trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert main(["export", "maskrcnn3d", str(tmp_path / "net.onnx")]) == 2
    error = capsys.readouterr().err
    assert "onnxruntime is not installed" in error
    assert "pip install 'seg3d_monai[export]'" in error
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_computes_something_else_is_not_kept(
    trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    weights, overlay = trained("maskrcnn3d")

    def wrong(path: Path, names: list[str]) -> formats.Run:
        run = formats._read_ts(path, names)
        return lambda images: {name: values * 1.01 for name, values in run(images).items()}

    monkeypatch.setattr(formats, "FORMATS", FORMATS | {".ts": FORMATS[".ts"]._replace(read=wrong)})
    words = ["export", "maskrcnn3d", str(tmp_path / "net.ts"), "--overlay", str(overlay)]
    assert main([*words, "--checkpoint", str(weights), "--shape", "[8,16,32]"]) == 2
    error = capsys.readouterr().err
    assert "differs from the network's by" in error
    assert "where 0.001 is allowed, and is not kept" in error
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.pt", "small.json"]


def test_differences_are_counted() -> None:
    expected = {"a": torch.tensor([4.0, -8.0]), "b": torch.zeros(3)}
    found = compare_outputs(expected, {"a": torch.tensor([4.0, -8.004]), "b": torch.zeros(3)})
    assert found["a"].absolute == pytest.approx(0.004, rel=1e-3)
    assert found["a"].relative == pytest.approx(0.0005, rel=1e-3)
    assert (found["b"].absolute, found["b"].relative) == (0.0, 0.0)
    with pytest.raises(ValueError, match="differs"):
        compare_outputs(expected, {"a": torch.tensor([4.0, float("nan")]), "b": torch.zeros(3)})
    with pytest.raises(ValueError, match=r"a as torch.float32 \(1,\) instead of torch.float32 \(2,\)"):
        compare_outputs(expected, {"a": torch.zeros(1), "b": torch.zeros(3)})


class KeepsBoxes(nn.Module):
    """Suppression: the size of its result depends on the data."""

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        boxes = images.reshape(-1, 6)
        return {"kept": nms3d(boxes, boxes[:, 0], 0.5)}


class Decomposes(nn.Module):
    """An operator of torch that ONNX does not have."""

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        return {"values": torch.linalg.eigvalsh(images[0, 0])}


@pytest.mark.parametrize("suffix", list(FORMATS))
def test_an_operator_of_ours_without_a_plain_form_is_named(suffix: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"operator seg3d::(batched_)?nms3d is one of seg3d_monai\.ops"):
        FORMATS[suffix].write(KeepsBoxes(), torch.rand(1, 1, 2, 3, 6), tmp_path / f"net{suffix}")
    assert list(tmp_path.iterdir()) == []


def test_an_operator_that_onnx_does_not_have_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"cannot be written as ONNX: .*linalg_eigh"):
        FORMATS[".onnx"].write(Decomposes(), torch.rand(1, 1, 2, 3, 3), tmp_path / "net.onnx")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("bundle", BUNDLES)
@pytest.mark.parametrize("other", [(1, 1, 24, 32, 32), (2, 1, 16, 32, 48)])
def test_a_traced_file_fails_at_another_shape(
    bundle: str, other: tuple[int, ...], small: Callable[..., nn.Module], tmp_path: Path
) -> None:
    """Even one of as many voxels: a trace would clip boxes at the border of the image that it was made of."""
    FORMATS[".ts"].write(DensePart(small(bundle)), torch.rand(1, 1, 16, 32, 48), tmp_path / "net.ts")
    with torch.no_grad(), pytest.raises(RuntimeError, match="expanded size"):
        FORMATS[".ts"].read(tmp_path / "net.ts", [])(torch.rand(other))


def test_what_a_bundle_ships_is_written_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["export", "maskrcnn3d", "net.ts", "--shape", "[8,16,32]"]) == 0
    assert (tmp_path / "net.ts").is_file()


def test_weights_of_other_shapes_are_named(
    trained: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights, overlay = trained("maskrcnn3d")
    state = torch.load(weights, weights_only=True)
    state["rpn.objectness.weight"] = state["rpn.objectness.weight"][:1]
    write_weights(weights, state)
    words = ["export", "maskrcnn3d", str(tmp_path / "net.ts"), "--overlay", str(overlay)]
    assert main([*words, "--checkpoint", str(weights)]) == 2
    assert "rpn.objectness.weight (1, 8, 1, 1, 1) instead of (3, 8, 1, 1, 1)" in capsys.readouterr().err
