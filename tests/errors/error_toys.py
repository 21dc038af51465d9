"""A folder of small inputs that every command can be given, what of it is broken, and how a refusal is checked.

`write_place` takes some seconds once in a session; every test works in a copy.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
import zarr
from sharing.sharing_toys import write_bundle
from small_networks import SMALL_NETWORK
from torch import nn
from tune_toys import Bright, row_of_cells

from seg3d_monai import cli
from seg3d_monai.backbones import resnet_backbone

ROOT = Path(__file__).resolve().parents[2]
BUNDLE = str(ROOT / "bundles" / "maskrcnn3d")
"""By its path: names are looked up where the user stands, too."""
SHAPE = (6, 9, 66)
SPACING = "[2.0,0.5,0.5]"
TOY_NETWORK = {
    "network_def": {"_target_": "error_toys.Toy", "backbone": "@backbone", "num_classes": "@num_classes"},
    "backbone#width": 8,
    "inferer#percentiles": [0, 100],
    "device": "cpu",
    "amp": "off",
}
"""A network without training in place of the bundle's: brightness is its score."""


class Toy(Bright):
    """A detector whose answer stands in the image, with the arguments that the bundle gives its own."""

    def __init__(self, *, backbone: nn.Module, num_classes: int, detection_nms_threshold: float = 0.4) -> None:
        super().__init__(detection_nms_threshold=detection_nms_threshold)
        self.backbone = backbone

    def forward(self, images: torch.Tensor) -> list[dict[str, object]]:
        self.backbone(images)  # whoever asks how unlike a region is listens to it
        found: list[dict[str, object]] = super().forward(images)
        return found


def flags(values: Mapping[str, object]) -> list[str]:
    """Overrides as they are written on a command line."""
    texts = {key: value if isinstance(value, str) else json.dumps(value) for key, value in values.items()}
    return [word for key, text in texts.items() for word in (f"--{key}", text)]


TOY = flags(TOY_NETWORK)
PREDICT = ["--bundle", BUNDLE, "--checkpoint", "model.pt", *TOY]
GRID = ["--block_size", "[6,9,32]", "--halo", "[0,0,12]"]
SUGGEST = ["annotate", "suggest", "crops.sqlite", *PREDICT, "--pool", "all", "--num", "2", "--margin", "[0,0,0]"]
TRAIN = [
    *("train", BUNDLE, "--dataset_dir", "data", "--output_dir", "new"),
    *flags({"crop_size": [6, 9, 32], "backbone#width": 8, "device": "cpu", "amp": "off"}),
    *flags(SMALL_NETWORK["maskrcnn3d"]),
    *flags({"train#trainer#max_epochs": 1, "train#dataset#num_samples": 2}),
]
"""A training of one step."""
TUNE = ["tune", BUNDLE, "--dataset_dir", "data", "--output_dir", "run", "--checkpoint", "model.pt", *TOY]


def write_place(folder: Path) -> Path:
    """All inputs; relative paths of tests begin here."""
    folder.mkdir(parents=True)
    image, labels = row_of_cells([1000, 900, 950, 920, 980, 940, 970], [True] * 7)
    tifffile.imwrite(folder / "image.tif", image)
    tifffile.imwrite(folder / "labels.tif", labels)
    tifffile.imwrite(folder / "cube.tif", np.random.default_rng(0).poisson(100, (12, 24, 24)).astype(np.uint16))
    _write_broken(folder, image, labels)
    _write_dataset(folder / "data", image, labels)
    network = Toy(backbone=resnet_backbone(depth=10, in_channels=1, width=8, norm="batch"), num_classes=1)
    torch.save(network.state_dict(), folder / "model.pt")
    torch.save({"other": torch.zeros(3)}, folder / "other.pt")
    write_bundle(folder / "toy")
    (folder / "run").mkdir()
    (folder / "half.zarr.partial").mkdir()
    return folder


def _write_broken(folder: Path, image: np.ndarray, labels: np.ndarray) -> None:
    (folder / "text.tif").write_text("no picture but words\n")
    (folder / "cut.tif").write_bytes((folder / "image.tif").read_bytes()[:3000])
    (folder / "empty.tif").touch()
    (folder / "folder.tif").mkdir()
    (folder / "folder").mkdir()
    (folder / "folder" / "note.txt").write_text("mine\n")
    tifffile.imwrite(folder / "plane.tif", image[0])
    tifffile.imwrite(folder / "real.tif", labels.astype(np.float32))
    tifffile.imwrite(folder / "short.tif", labels[:5])
    tifffile.imwrite(folder / "colours.ome.tif", np.stack([image] * 2), metadata={"axes": "CZYX"}, ome=True)
    tifffile.imwrite(folder / "four.tif", np.stack([image] * 2))
    hole = image.astype(np.float32)
    hole[2, 4, 4] = np.nan
    tifffile.imwrite(folder / "nan.tif", hole)
    zarr.create_array(folder / "damaged.zarr", data=image + 1, chunks=(3, 9, 33))
    (folder / "damaged.zarr/c/1/0/1").write_bytes(b"damaged")
    zarr.create_array(folder / "lost.zarr", data=image)
    (folder / "lost.zarr/zarr.json").write_text('{"shape": [3')
    zarr.open_group(folder / "group.zarr", mode="w")
    (folder / "folder.json").mkdir()
    (folder / "list.json").write_text("[1, 2]\n")
    (folder / "cut.json").write_text('{"a": 1')
    (folder / "bytes.json").write_bytes(b"\xff\xfe\x00{}")
    (folder / "text.sqlite").write_text("no database but words\n" * 40)
    (folder / "text.pt").write_text("no weights but words\n")
    (folder / "cut.pt").write_bytes(b"PK\x03\x04" + bytes(200))


def _write_dataset(folder: Path, image: np.ndarray, labels: np.ndarray) -> None:
    lines = ["name,image,label,spacing_z_um,spacing_y_um,spacing_x_um,specimen,split,quality_image"]
    for number, split in enumerate(["train", "train", "val", "test"]):
        (folder / f"v{number}").mkdir(parents=True)
        own = image.copy()
        own[0, 0, 0] += number + 1  # the same image in two splits would be refused
        tifffile.imwrite(folder / f"v{number}" / "image.tif", own)
        tifffile.imwrite(folder / f"v{number}" / "labels.tif", labels)
        lines.append(f"v{number},v{number}/image.tif,v{number}/labels.tif,2.0,0.5,0.5,s{number},{split},{number}")
    (folder / "manifest.csv").write_text("\n".join(lines) + "\n")


def write_results(folder: Path) -> None:
    """What commands make of the inputs, by these commands: an index, a prediction, regions to annotate."""
    for words in (
        ["index", "data/manifest.csv", "crops.sqlite", "--crop_size", "[6,9,32]", "--num_workers", "1"],
        ["predict", "image.tif", "out.zarr", "--spacing", SPACING, *PREDICT, *GRID],
        [*SUGGEST, "--output", "regions"],
    ):
        assert cli.main(words) == 0, words


def listing(folder: Path) -> dict[str, tuple[int, str]]:
    """Size and hash of every file below a folder, and every folder, by their paths."""
    found = {}
    for path in sorted(folder.rglob("*")):
        content = path.read_bytes() if path.is_file() else b""
        found[str(path.relative_to(folder))] = (len(content), hashlib.sha256(content).hexdigest()[:16])
    return found


def changed(before: Mapping[str, tuple[int, str]], after: Mapping[str, tuple[int, str]]) -> set[str]:
    """Paths that were made, changed or removed."""
    return {path for path in {*before, *after} if before.get(path) != after.get(path)}


def refusal(capsys: pytest.CaptureFixture[str], words: Sequence[str], *fragments: str) -> str:
    """Run a command that is refused by one line with exit code 2; the line.

    Warnings may stand before it; a traceback may not.
    """
    capsys.readouterr()
    code = cli.main(list(words))
    shown = capsys.readouterr()
    assert code == 2, shown
    assert "Traceback" not in shown.err
    lines = shown.err.splitlines()
    assert [line.startswith("seg3d: error: ") for line in lines].count(True) == 1, shown.err
    assert lines[-1].startswith("seg3d: error: ")
    for fragment in fragments:
        assert fragment in lines[-1], lines[-1]
    return lines[-1]


def with_changes(words: Sequence[str], *changes: str) -> list[str]:
    """A command line in which flags `--name value` take the place of what it says of the same names."""
    names = [word for word in changes if word.startswith("--")]
    kept = [
        place
        for place, word in enumerate(words)
        if word not in names and not (place and words[place - 1] in names and words[place - 1].startswith("--"))
    ]
    return [*(words[place] for place in kept), *changes]


def refused_in(
    place: Path, capsys: pytest.CaptureFixture[str], words: Sequence[str], *fragments: str, left: Sequence[str] = ()
) -> str:
    """`refusal`, after which nothing in the folder is changed but what is `left`, exactly; the line."""
    before = listing(place)
    line = refusal(capsys, words, *fragments)
    assert changed(before, listing(place)) == set(left)
    return line
