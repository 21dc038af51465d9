"""A packed bundle gives what it gave before, wherever it is unpacked; the same bundle gives the same bytes."""

import json
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
import torch
import zarr
from monai.bundle import ConfigParser, load
from sharing_toys import INFERENCE, METADATA, TRAIN, conv, everything_in, put, write_bundle
from small_networks import SMALL_NETWORK
from warm_processes import run_module

from seg3d_monai.cli import main
from seg3d_monai.engine import load_weights, read_spacing
from seg3d_monai.engine.checkpoint import write_weights
from seg3d_monai.sharing.pack import pack_bundle
from seg3d_monai.sharing.unpack import unpack
from seg3d_monai.sharing.weights import read_plain

ROOT = Path(__file__).parents[2]


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return write_bundle(tmp_path / "toy")


def packed(archive: Path) -> dict[str, Any]:
    with zipfile.ZipFile(archive) as opened:
        contents = {name: opened.read(name) for name in opened.namelist()}
    return {name: json.loads(text) if name.endswith(".json") else text for name, text in contents.items()}


def test_a_zip_holds_the_bundle_and_nothing_of_its_owner(bundle: Path, tmp_path: Path) -> None:
    for name in (".git/config", "configs/.train.json.swp", "configs/__pycache__/a.pyc", "runs/a/model.pt", "docs/.x"):
        put(bundle, name, "private")
    (tmp_path / "elsewhere.txt").write_text("shared licence")
    (bundle / "LICENSE").unlink()
    (bundle / "LICENSE").symlink_to("../elsewhere.txt")
    (bundle / "linked").symlink_to(tmp_path)
    done = pack_bundle(bundle, tmp_path / "out.zip")
    found = packed(tmp_path / "out.zip")
    assert sorted(found) == [
        *("toy/LICENSE", "toy/configs/evaluate.json", "toy/configs/inference.json", "toy/configs/logging.conf"),
        *("toy/configs/metadata.json", "toy/configs/multi_gpu_train.json", "toy/configs/train.json"),
        *("toy/docs/README.md", "toy/docs/data_license.txt", "toy/eval/schema.json", "toy/models/model.pt"),
    ]
    assert [f"toy/{name}" for name in done.names] == sorted(found)
    assert found["toy/LICENSE"] == b"shared licence"
    assert found["toy/models/model.pt"] == (bundle / "models/model.pt").read_bytes()
    assert found["toy/configs/train.json"] == TRAIN | {"bundle_root": "."}
    assert found["toy/configs/inference.json"] == INFERENCE | {
        "bundle_root": ".",
        "checkpoint": "$@bundle_root + '/models/model.pt'",
    }
    assert found["toy/configs/metadata.json"] == METADATA
    assert main(["bundle", "check", str(tmp_path / "out.zip")]) == 0


def test_packing_twice_gives_the_same_bytes(bundle: Path, tmp_path: Path) -> None:
    pack_bundle(bundle, tmp_path / "a.zip", safetensors=True)
    for path in bundle.rglob("*"):
        path.touch()  # other dates
        if path.is_file():
            path.chmod(0o600)
    pack_bundle(bundle, tmp_path / "b.zip", safetensors=True)
    assert (tmp_path / "a.zip").read_bytes() == (tmp_path / "b.zip").read_bytes()


def test_overlays_are_merged_where_their_keys_are(bundle: Path, tmp_path: Path) -> None:
    put(bundle, "configs/overlays/one.json", {"width": 7, "network_def#kernel_size": 5, "+run": ["$1"]})
    put(tmp_path, "two.json", {"threshold": 0.25, "network_def#padding": 2})
    words = ["--overlay", f"one,{tmp_path / 'two.json'}"]
    assert main(["bundle", "pack", str(bundle), str(tmp_path / "out.zip"), *words]) == 0
    found = packed(tmp_path / "out.zip")
    train, inference = (found[f"toy/configs/{name}.json"] for name in ("train", "inference"))
    network = {**TRAIN["network_def"], "kernel_size": 5, "padding": 2}
    assert train == {"bundle_root": ".", "width": 7, "network_def": network, "run": ["$print(@width)", "$1"]}
    assert inference["network_def"] == network
    assert inference["threshold"] == 0.25
    assert "width" not in inference


def test_every_overlay_of_the_projects_own_bundles_can_be_packed(tmp_path: Path) -> None:
    for folder in sorted(path.parent for path in (ROOT / "bundles").glob("*/configs")):
        train = folder / "configs" / "train.json"
        for overlay in sorted((folder / "configs" / "overlays").glob("*.json")):
            pack_bundle(folder, tmp_path / "out.zip", overlays=[overlay], overwrite=True)
            expected = ConfigParser.load_config_files([str(train), str(overlay)]) | {"bundle_root": "."}
            assert packed(tmp_path / "out.zip")[f"{folder.name}/configs/train.json"] == expected, overlay


def test_a_new_version_stands_before_the_old_ones(bundle: Path, tmp_path: Path) -> None:
    words = ["--version", "0.10.0", "--changelog", "trained longer"]
    assert main(["bundle", "pack", str(bundle), str(tmp_path / "out.zip"), *words]) == 0
    metadata = packed(tmp_path / "out.zip")["toy/configs/metadata.json"]
    assert metadata["version"] == "0.10.0"
    assert list(metadata["changelog"].items()) == [
        *(("0.10.0", "trained longer"), ("0.2.0", "second"), ("0.1.0", "first")),
    ]
    assert json.loads((bundle / "configs/metadata.json").read_text()) == METADATA  # the bundle itself is not changed


def test_a_checkpoint_goes_in_with_its_voxel_size_also_as_safetensors(bundle: Path, tmp_path: Path) -> None:
    weights = OrderedDict((key, value + 1) for key, value in conv().state_dict().items())
    weights["shared"] = weights["bias"]  # safetensors refuses shared memory
    write_weights(tmp_path / "trained.pt", weights, (2.0, 0.5, 0.5))
    put(bundle, "models/README.md", "none are shipped")
    pack_bundle(bundle, tmp_path / "out.zip", checkpoint=tmp_path / "trained.pt", safetensors=True)
    (tmp_path / "there").mkdir()
    names = unpack(tmp_path / "out.zip", tmp_path / "there")
    assert [name for name in names if "models" in name] == ["toy/models/model.pt", "toy/models/model.safetensors"]
    for suffix in ("pt", "safetensors"):
        file = tmp_path / "there/toy/models" / f"model.{suffix}"
        assert read_spacing(file) == (2.0, 0.5, 0.5)
        network = conv()
        network.register_buffer("shared", torch.zeros(1))
        found = load_weights(network, file).state_dict()
        assert found.keys() == weights.keys()
        for key, value in weights.items():
            assert torch.equal(found[key], value)


def test_half_of_the_bytes_for_kernels(bundle: Path, tmp_path: Path) -> None:
    weights = OrderedDict((key, value + 1 / 3) for key, value in conv().state_dict().items())
    write_weights(tmp_path / "trained.pt", weights, (2.0, 0.5, 0.5))
    pack_bundle(bundle, tmp_path / "out.zip", checkpoint=tmp_path / "trained.pt", safetensors=True, half=True)
    (tmp_path / "there").mkdir()
    unpack(tmp_path / "out.zip", tmp_path / "there")
    for name in ("model.pt", "model.safetensors"):
        file = tmp_path / "there/toy/models" / name
        assert read_spacing(file) == (2.0, 0.5, 0.5)
        kept = read_plain(file)
        assert {key: value.dtype for key, value in kept.items()} == {"weight": torch.float16, "bias": torch.float32}
        found = load_weights(conv(), file).state_dict()
        assert {value.dtype for value in found.values()} == {torch.float32}
        assert torch.equal(found["bias"], weights["bias"])
        torch.testing.assert_close(found["weight"], weights["weight"], rtol=2**-11, atol=0)
        assert not torch.equal(found["weight"], weights["weight"])
    write_weights(tmp_path / "large.pt", {"weight": torch.full((1, 2), 7e4)}, None)
    with pytest.raises(ValueError, match=r"--half: 'weight' of .*large.pt' has numbers too large"):
        pack_bundle(bundle, tmp_path / "large.zip", checkpoint=tmp_path / "large.pt", half=True)
    (bundle / "models/model.pt").unlink()
    with pytest.raises(ValueError, match="--half: there are no weights"):
        pack_bundle(bundle, tmp_path / "none.zip", half=True)


def test_damaged_safetensors_are_a_user_error(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"\xff" * 64)
    with pytest.raises(ValueError, match="is damaged"):
        load_weights(conv(), tmp_path / "model.safetensors")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"a": {"b": torch.zeros(1)}}, "holds a dict at 'a'"),
        ({"format": "seg3d_monai.checkpoint", "version": 1, "network": {}}, "holds a str at 'format'"),
        ({"a": torch.nn.Linear(1, 1)}, "holds more than weights"),
    ],
)
def test_what_is_more_than_weights_is_not_packed(bundle: Path, tmp_path: Path, content: Any, message: str) -> None:
    torch.save(content, tmp_path / "state.pt")
    with pytest.raises(ValueError, match=message):
        pack_bundle(bundle, tmp_path / "out.zip", checkpoint=tmp_path / "state.pt")
    assert not (tmp_path / "out.zip").exists()


def test_numbers_are_weights_and_cannot_be_safetensors(bundle: Path, tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(2), "steps": 3, "scale": 0.5}, tmp_path / "state.pt")
    pack_bundle(bundle, tmp_path / "out.zip", checkpoint=tmp_path / "state.pt")
    with pytest.raises(ValueError, match="'steps' is a number"):
        pack_bundle(bundle, tmp_path / "two.zip", checkpoint=tmp_path / "state.pt", safetensors=True)


def test_monai_loads_a_packed_bundle_anywhere(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pack_bundle(bundle, tmp_path / "out.zip")
    (tmp_path / "there").mkdir()
    unpack(tmp_path / "out.zip", tmp_path / "there")
    monkeypatch.chdir(tmp_path)
    loaded = load("toy", bundle_dir=str(tmp_path / "there"), workflow_type="inference", source="github", device="cpu")
    assert isinstance(loaded, torch.nn.Conv3d)
    torch.testing.assert_close(loaded.state_dict(), conv().state_dict(), rtol=0, atol=0)


def test_a_packed_bundle_predicts_the_same_labels_elsewhere(tmp_path: Path) -> None:
    source = ROOT / "bundles" / "maskrcnn3d"
    small = {"backbone#width": 8, "amp": "off", "score_threshold": 0.0, "block_size": [8, 36, 40], "halo": [4, 8, 8]}
    put(tmp_path, "small.json", small | SMALL_NETWORK["maskrcnn3d"])
    parser = ConfigParser()
    parser.read_config([str(source / "configs/inference.json"), str(tmp_path / "small.json")])
    torch.manual_seed(0)
    write_weights(tmp_path / "model.pt", parser.get_parsed_content("network_def").state_dict())
    image = np.random.default_rng(0).normal(100, 20, (14, 36, 40)).clip(0).astype(np.uint16)
    tifffile.imwrite(tmp_path / "image.tif", image)

    def labels(name: str, cwd: Path, *command: str) -> np.ndarray:
        output = str(tmp_path / f"{name}.zarr")
        places = [word.format(image=tmp_path / "image.tif", output=output) for word in command]
        done = run_module(*places, "--axes", "ZYX", "--spacing", "[2,1,1]", cwd=cwd)
        assert done.returncode == 0, done.stderr
        found: np.ndarray = zarr.open(Path(output) / "labels" / "instances" / "0")[:]
        return found

    both = f"['{source / 'configs/inference.json'}','{tmp_path / 'small.json'}']"
    by_monai = ("monai.bundle", "run", "--input", "{image}", "--output", "{output}", "--config_file")
    before = labels("before", ROOT, *by_monai, both, "--checkpoint", str(tmp_path / "model.pt"))
    assert before.shape == image.shape
    assert before.max() > 1

    words = ["--overlay", str(tmp_path / "small.json"), "--checkpoint", str(tmp_path / "model.pt")]
    assert main(["bundle", "pack", str(source), str(tmp_path / "out.zip"), *words]) == 0
    (tmp_path / "far" / "away").mkdir(parents=True)
    unpack(tmp_path / "out.zip", tmp_path / "far" / "away")
    there = tmp_path / "far" / "away" / "maskrcnn3d"
    inside = labels("inside", there, *by_monai, "configs/inference.json")
    np.testing.assert_array_equal(inside, before)
    by_seg3d = ("seg3d_monai", "predict", "{image}", "{output}", "--bundle", str(there))
    outside = labels("outside", tmp_path, *by_seg3d)
    np.testing.assert_array_equal(outside, before)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nowhere", "{out}"], "bundle 'nowhere' does not exist"),
        (["{toy}", "{out}", "--chekpoint", "x"], "did you mean --checkpoint?"),
        (["{toy}", "{old}"], "exists already; give --overwrite"),
        (["{toy}", "{tmp}/out.tar"], "end it in .zip"),
        (["{toy}", "{tmp}/nowhere/out.zip"], "its folder does not exist"),
        (["{toy}", "{toy}/out.zip"], "lies in the bundle itself"),
        (["{toy}", "{out}", "--checkpoint", "nowhere.pt"], "'nowhere.pt' does not exist"),
        (["{toy}", "{out}", "--overlay", "nowhere"], "overlay 'nowhere.json' does not exist"),
        (["{toy}", "{out}", "--overlay", "{tmp}/odd.json"], "no configuration has the key 'widht'"),
        (["{toy}", "{out}", "--overlay", "{tmp}/deep.json"], "'network_def#a#b' does not fit"),
        (["{toy}", "{out}", "--version", "0.3.0"], "belong together"),
        (["{toy}", "{out}", "--version", "3", "--changelog", "x"], "'3' is no semantic version"),
        (["{toy}", "{out}", "--version", "0.2.0", "--changelog", "x"], "does not come after 0.2.0"),
        (["{toy}", "{out}", "--version", "0.2.0-rc1", "--changelog", "x"], "does not come after 0.2.0"),
    ],
)
def test_a_mistake_is_one_line_and_nothing_is_written(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    (tmp_path / "old.zip").write_text("precious")
    put(tmp_path, "odd.json", {"widht": 3})
    put(tmp_path, "deep.json", {"network_def#a#b": 3})
    before = everything_in(tmp_path)
    places = {"toy": bundle, "tmp": tmp_path, "out": tmp_path / "out.zip", "old": tmp_path / "old.zip"}
    assert main(["bundle", "pack", *(word.format(**places) for word in words)]) == 2
    shown = capsys.readouterr().err
    assert shown.startswith("seg3d: error: ")
    assert shown.count("\n") == 1
    assert message in shown
    assert everything_in(tmp_path) == before


def test_an_old_zip_is_replaced_on_request(bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "old.zip").write_text("old")
    assert main(["bundle", "pack", str(bundle), str(tmp_path / "old.zip"), "--overwrite"]) == 0
    assert zipfile.is_zipfile(tmp_path / "old.zip")
