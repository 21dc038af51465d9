"""The command `seg3d tune`: a door to train.json with tune.json; overlays by path."""

import json
from pathlib import Path

import pytest

from seg3d_monai import cli


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    """A bundle that writes what it was given to `<output_dir>/seen.json`."""
    configs = tmp_path / "toy3d" / "configs"
    configs.mkdir(parents=True)
    train = {"imports": ["$import json"], "dataset_dir": "", "output_dir": "", "depth": 18, "flips": [], "halo": None}
    keys = (
        "dataset_dir",
        "depth",
        "flips",
        "halo",
        "checkpoint",
        "tune_split",
        "tune_where",
        "metric",
        "out",
        "restart",
    )
    tune = {
        "checkpoint": "$@output_dir + '/model.pt'",
        "tune_split": "val",
        "tune_where": None,
        "metric": "seg",
        "out": "",
        "restart": False,
        "initialize": [],
        "tuning": [
            f"$json.dump({{{', '.join(f'{key!r}: @{key}' for key in keys)}}}, open(@output_dir + '/seen.json', 'w'))"
        ],
        "run": "%tuning",
    }
    for name, content in {"train": train, "tune": tune}.items():
        (configs / f"{name}.json").write_text(json.dumps(content))
    return configs.parent


def seen(folder: Path) -> dict[str, object]:
    content: dict[str, object] = json.loads((folder / "seen.json").read_text())
    return content


def test_only_what_was_given_is_changed(bundle: Path, tmp_path: Path) -> None:
    run = tmp_path / "2024"
    run.mkdir()
    assert cli.main(["tune", str(bundle), "--output_dir", str(run)]) == 0
    unchanged = {"depth": 18, "flips": [], "halo": None, "tune_split": "val", "tune_where": None, "metric": "seg"}
    assert seen(run) == unchanged | {
        "dataset_dir": "",
        "checkpoint": f"{run}/model.pt",
        "out": "",
        "restart": False,
    }


def test_options_overrides_and_overlays_by_path(bundle: Path, tmp_path: Path) -> None:
    overlay = tmp_path / "tuned.json"
    overlay.write_text(json.dumps({"depth": 50}))
    words = ["--dataset_dir", "2025", "--tune_where", 'specimen == "Emb09"', "--metric", "f1_50 + seg", "--restart"]
    words += [
        "--out",
        "x.json",
        "--flips",
        "[y,x]",
        "--halo",
        "[1,2,3]",
        "--checkpoint",
        "m.pt",
        "--tune_split",
        "test",
    ]
    for written in (str(overlay), str(overlay.with_suffix(""))):
        assert cli.main(["tune", str(bundle), "--output_dir", str(tmp_path), "--overlay", written, *words]) == 0
        assert seen(tmp_path) == {
            "dataset_dir": "2025",
            "depth": 50,
            "flips": ["y", "x"],
            "halo": [1, 2, 3],
            "checkpoint": "m.pt",
            "tune_split": "test",
            "tune_where": 'specimen == "Emb09"',
            "metric": "f1_50 + seg",
            "out": "x.json",
            "restart": True,
        }
    assert cli.main(["tune", str(bundle), "--output_dir", str(tmp_path), "--depth", "7"]) == 0
    assert seen(tmp_path)["depth"] == 7


def test_mistakes_are_one_line(bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def refused(*words: str) -> str:
        assert cli.main(["tune", *words]) == 2
        text = capsys.readouterr().err
        assert text.count("\n") == 1
        return text

    assert "missing --output_dir" in refused(str(bundle))
    run = ["--output_dir", str(tmp_path)]
    assert "unknown flag --metrc; did you mean --metric?" in refused(str(bundle), *run, "--metrc", "seg")
    assert "overlay 'no/tuned.json' does not exist" in refused(str(bundle), *run, "--overlay", "no/tuned.json")
    (bundle / "configs" / "tune.json").unlink()
    assert "config file 'tune.json' does not exist" in refused(str(bundle), *run)
    assert not (tmp_path / "seen.json").exists()
