"""The command line: strict before anything runs, one line and exit code 2 for a mistake, doors to the bundles."""

import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from warm_processes import run_module

from seg3d_monai import __version__, cli, cli_annotate, cli_bundle
from seg3d_monai.cli_arguments import UsageError, bind, help_text, nearest


def sample(
    source: str,
    target: str = "out",
    *,
    size: list[int] | None = None,
    spacing: list[float] | None = None,
    width: int | list[int] | None = None,
    count: int = 1,
    share: float = 0.5,
    again: bool = False,
) -> None:
    """Do something.

    Args:
        source: Where from.
        target: Where to.
        size: How large.
        spacing: How far apart.
        width: How wide.
        count: How many.
        share: How much.
        again: Once more.
    """


def open_ended(name: str, *, level: int = 0, **overrides: str) -> None:
    """Take anything."""


def bound(function: Callable[..., object], *words: str) -> dict[str, Any]:
    return dict(bind(function, words).arguments)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["a"], {"source": "a"}),
        (["2024"], {"source": "2024"}),
        (["True", "1e3"], {"source": "True", "target": "1e3"}),
        (["--source", "a"], {"source": "a"}),
        (["--target=b", "a"], {"source": "a", "target": "b"}),
        (["--target", "b", "a"], {"source": "a", "target": "b"}),
        (["a", "--size", "[16, 64,32]"], {"source": "a", "size": [16, 64, 32]}),
        (["a", "--size=16,64,32"], {"source": "a", "size": [16, 64, 32]}),
        (["a", "--spacing", "[2,0.5,0.5]"], {"source": "a", "spacing": [2, 0.5, 0.5]}),
        (["a", "--width", "8"], {"source": "a", "width": 8}),
        (["a", "--width", "(8,4,2)"], {"source": "a", "width": [8, 4, 2]}),
        (["a", "--width", "None"], {"source": "a", "width": None}),
        (["a", "--count", "-3"], {"source": "a", "count": -3}),
        (["a", "--share", "1"], {"source": "a", "share": 1}),
        (["--again", "a"], {"source": "a", "again": True}),
        (["a", "--again", "false"], {"source": "a", "again": False}),
        (["a", "--again=True"], {"source": "a", "again": True}),
        (["a", "--again", "--count", "2"], {"source": "a", "again": True, "count": 2}),
    ],
)
def test_words_are_bound(words: list[str], expected: dict[str, Any]) -> None:
    assert bound(sample, *words) == expected


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "missing SOURCE; see --help"),
        (["a", "b", "c"], "unexpected argument 'c'; this command takes SOURCE TARGET"),
        (["a", "--cuont", "3"], "unknown flag --cuont; did you mean --count?"),
        (["a", "--cuont=3"], "unknown flag --cuont; did you mean --count?"),
        (["a", "-c", "3"], "unknown flag -c; "),
        (["a", "--zzzzzz", "3"], "unknown flag --zzzzzz; choose from: --again, --count, "),
        (["a", "--count", "3", "--count", "4"], "--count is given twice"),
        (["a", "--count"], "--count needs a value (an integer)"),
        (["a", "--count", "--again"], "--count needs a value (an integer)"),
        (["a", "--count", "2.5"], "--count = '2.5' is not an integer"),
        (["a", "--count", "True"], "--count = 'True' is not an integer"),
        (["a", "--share", "half"], "--share = 'half' is not a number"),
        (["a", "--size", "16"], "--size = '16' is not a list of integers"),
        (["a", "--size", "[16,a,3]"], "--size = '[16,a,3]' is not a list of integers"),
        (["a", "--width", "[1.5]"], "--width = '[1.5]' is not an integer or a list of integers"),
        (["a", "--again=2"], "--again = '2' is not true or false"),
    ],
)
def test_words_that_do_not_fit_are_refused(words: list[str], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        bind(sample, words)
    assert message in str(caught.value)


def test_overrides_are_kept_as_they_were_written() -> None:
    words = ["b", "--level", "2", "--network#depth", "3", "--data-dir=2024", "--a#b-c", "x", "--amp"]
    overrides = {"network#depth": "3", "data_dir": "2024", "a#b-c": "x", "amp": "True"}
    assert bound(open_ended, *words) == {"name": "b", "level": 2, "overrides": overrides}


def test_a_misspelt_required_flag_is_named_where_overrides_are_open() -> None:
    with pytest.raises(UsageError, match="unknown flag --chekpoint; did you mean --checkpoint"):
        bind(cli_annotate.suggest, ["pool.sqlite", "--output", "out", "--chekpoint", "x"])


def test_nearest_names_the_closest_or_all() -> None:
    assert nearest("evalaute", ["train", "evaluate"]) == "did you mean evaluate?"
    assert nearest("xyz", ["train", "evaluate"]) == "choose from: evaluate, train"
    assert nearest("xyz", []) == "choose from: (none)"


def test_help_shows_every_argument_with_its_type() -> None:
    text = help_text(sample, "seg3d sample")
    for word in ("seg3d sample SOURCE <flags>", "--size=SIZE", "How large.", "a list of integers", "Default: 0.5"):
        assert word in text
    assert " -c, " not in text
    assert "None" not in text


def seg3d(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the command as a user does."""
    return subprocess.run(
        [sys.executable, "-m", "seg3d_monai", *words], capture_output=True, text=True, env=os.environ | environment
    )


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """Run in this process; check exit code 2 and a single line on stderr, and return it."""
    assert cli.main(list(words)) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("seg3d: error: ")
    assert captured.err.endswith("\n")
    assert captured.err.count("\n") == 1
    return captured.err


def test_version_and_help_in_a_process() -> None:
    shown = seg3d("--version")
    assert (shown.returncode, shown.stdout) == (0, f"seg3d_monai {__version__}\n")
    for words in ([], ["--help"]):
        shown = seg3d(*words)
        assert shown.returncode == 0
        assert all(command in shown.stdout for command in cli.COMMANDS)


def test_help_imports_nothing_heavy() -> None:
    program = (
        "import sys; from seg3d_monai.cli import main; main(['predict', '--help']); "
        "heavy = {'torch', 'monai', 'numpy', 'zarr', 'pandas'} & set(sys.modules); sys.exit(sorted(heavy) or 0)"
    )
    shown = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert shown.returncode == 0, shown.stderr
    assert "--block_size" in shown.stdout


def test_a_mistake_is_one_line_and_exit_code_2_in_a_process() -> None:
    shown = seg3d("evaluate", "true.tif", "out.zarr", "--jsn", "x")
    assert (shown.returncode, shown.stdout) == (2, "")
    assert shown.stderr == "seg3d: error: evaluate: unknown flag --jsn; did you mean --json?\n"


def test_traceback_on_request() -> None:
    shown = seg3d("evaluat", SEG3D_TRACEBACK="1")
    assert shown.returncode == 1
    assert "Traceback" in shown.stderr
    assert "did you mean evaluate?" in shown.stderr


@pytest.mark.parametrize("command", sorted(cli.COMMANDS))
def test_every_command_has_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([command, "--help"]) == 0
    assert f"seg3d {command}" in capsys.readouterr().out


def test_unknown_command_and_flag(capsys: pytest.CaptureFixture[str]) -> None:
    assert "unknown command evalute; did you mean evaluate?" in refused(capsys, "evalute")
    assert "unknown flag --versoin; did you mean --version?" in refused(capsys, "--versoin")


@pytest.mark.parametrize(
    "words",
    [
        ["index", "no/manifest.csv", "x.sqlite"],
        ["evaluate", "no/truth.tif", "no/prediction.zarr"],
        ["evaluate", "no/truth.tif", "no/prediction.zarr", "--json", "no/folder/x.json"],
        ["predict", "no/image.tif", "out.zarr", "--bundle", "maskrcnn3d"],
        ["train", "no/bundle"],
    ],
)
def test_missing_files_are_named(
    words: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert "no/" in refused(capsys, *words)
    assert list(tmp_path.iterdir()) == []


def test_doctor_reports(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor"]) == 0
    lines = dict(
        line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines() if not line.startswith("extra")
    )
    assert lines["seg3d_monai"].startswith(__version__)
    assert {"torch", "monai", "threads", "gpu", "ops", "free"} <= lines.keys()


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (FileNotFoundError(2, "No such file", "a.tif"), "No such file: a.tif; check the path"),
        (PermissionError(13, "Denied", "b"), "Denied: b; check its permissions, or choose another"),
        (ValueError("first\n  second.\nthird"), "first; second. third"),
        (ValueError(""), "ValueError"),
    ],
)
def test_an_error_is_shown_on_one_line(error: Exception, line: str) -> None:
    assert cli.one_line(error) == line


def chained(*errors: Exception) -> Exception:
    """Each error raised from the one before; the last one."""
    for cause, error in itertools.pairwise(errors):
        error.__cause__ = cause
    return errors[-1]


def test_the_mistake_is_found_behind_wrappers() -> None:
    cause, mistake = OSError("disk"), ValueError("axes")
    assert cli.user_error(chained(cause, mistake, RuntimeError("evaluate"), RuntimeError("component"))) is mistake
    assert cli.user_error(RuntimeError("defect")) is None
    assert cli.user_error(ModuleNotFoundError("no", name="seg3d_monai.gone")) is None
    extra = ImportError("needs napari; pip install seg3d_monai[view]", name="napari")
    assert cli.user_error(extra) is extra


def test_a_defect_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> None:
        raise RuntimeError("defect")

    monkeypatch.setitem(cli.COMMANDS, "doctor", broken)
    with pytest.raises(RuntimeError, match="defect"):
        cli.main(["doctor"])


@pytest.fixture
def toy_bundle(tmp_path: Path) -> Path:
    """A bundle whose run writes what it was given to `<output_dir>/seen.json`, or fails as a component would."""
    configs = tmp_path / "bundles" / "toy3d" / "configs"
    (configs / "overlays").mkdir(parents=True)
    values = "{'data': @dataset_dir, 'epochs': @epochs, 'depth': @network['depth']}"
    seen = f"$json.dump({values}, open(@output_dir + '/seen.json', 'w'))"
    train = {
        "imports": ["$import json"],
        "dataset_dir": "data",
        "output_dir": str(tmp_path),
        "epochs": 1,
        "network": {"depth": 18},
        "initialize": [],
        "run": [seen],
        "training": "%run",
    }
    settings = ("spacing", "block_size", "restart", "score_threshold")
    inference = {"imports": ["$import json"], "input": None, "output": None} | dict.fromkeys(settings)
    keys = ", ".join(f"'{key}': @{key}" for key in ("input", *settings))
    inference["run"] = [f"$json.dump({{{keys}}}, open(@output, 'w'))"]
    failing = {"run": ["$int('seven')"], "training": "%run"}
    for name, content in {
        "train": train,
        "inference": inference,
        "overlays/backbone_deep": {"network": {"depth": 50}},
        "failing": failing,
        "list": [],
    }.items():
        (configs / f"{name}.json").write_text(json.dumps(content))
    return configs.parent


def test_train_runs_the_bundle_with_overlays_and_overrides(toy_bundle: Path, tmp_path: Path) -> None:
    words = ["--overlay", "backbone_deep", "--dataset_dir", "2024", "--epochs", "3"]
    assert cli.main(["train", str(toy_bundle), *words]) == 0
    assert json.loads((tmp_path / "seen.json").read_text()) == {"data": "2024", "epochs": 3, "depth": 50}
    assert cli.main(["train", str(toy_bundle), "--network#depth", "7"]) == 0
    assert json.loads((tmp_path / "seen.json").read_text()) == {"data": "data", "epochs": 1, "depth": 7}


@pytest.mark.parametrize(("word", "value"), [("true", True), ("false", False), ("null", None), ("True", True)])
def test_words_of_json_are_no_text_where_the_configuration_has_none(
    toy_bundle: Path, tmp_path: Path, word: str, value: object
) -> None:
    assert cli.main(["train", str(toy_bundle), "--epochs", word, "--network#depth", word]) == 0
    seen = json.loads((tmp_path / "seen.json").read_text())
    assert (seen["epochs"], seen["depth"]) == (value, value)
    assert cli.main(["train", str(toy_bundle), "--dataset_dir", "null"]) == 0  # a folder may be called so
    assert json.loads((tmp_path / "seen.json").read_text())["data"] == "null"


def test_train_is_the_same_as_monai_bundle(toy_bundle: Path, tmp_path: Path) -> None:
    config = toy_bundle / "configs" / "train.json"
    words = ["monai.bundle", "run", "training", "--config_file", str(config), "--epochs", "4"]
    run_module(*words, cwd=tmp_path).check_returncode()
    expected = (tmp_path / "seen.json").read_text()
    (tmp_path / "seen.json").unlink()
    assert cli.main(["train", str(toy_bundle), "--epochs", "4"]) == 0
    assert (tmp_path / "seen.json").read_text() == expected


def test_a_file_where_the_user_stands_is_not_taken_for_the_bundles(
    toy_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "train.json").write_text('{"network": {"depth": 1}}')
    monkeypatch.chdir(elsewhere)
    assert cli.main(["train", str(toy_bundle), "--epochs", "4"]) == 0
    assert json.loads((tmp_path / "seen.json").read_text())["depth"] == 18


def test_a_bundle_is_found_by_name(toy_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli_bundle.find_bundle("toy3d").resolve() == toy_bundle
    assert cli_bundle.find_bundle("bundles/toy3d").resolve() == toy_bundle
    with pytest.raises(FileNotFoundError, match="did you mean toy3d"):
        cli_bundle.find_bundle("toy3")
    with pytest.raises(FileNotFoundError, match="no folder configs"):
        cli_bundle.find_bundle("bundles")


def test_predict_passes_only_what_was_given(toy_bundle: Path, tmp_path: Path) -> None:
    image, output = tmp_path / "stack.tif", tmp_path / "out.json"
    image.touch()
    words = ["--spacing", "[2,0.5,0.5]", "--block_size", "[16,64,32]", "--restart"]
    assert cli.main(["predict", str(image), str(output), "--bundle", str(toy_bundle), *words]) == 0
    expected = {"spacing": [2, 0.5, 0.5], "block_size": [16, 64, 32], "restart": True, "score_threshold": None}
    assert json.loads(output.read_text()) == {"input": str(image)} | expected


def test_misspelt_overrides_and_overlays_are_refused(
    toy_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = str(toy_bundle)
    assert "unknown flag --epoch; did you mean --epochs?" in refused(capsys, "train", folder, "--epoch", "3")
    assert "did you mean --network?" in refused(capsys, "train", folder, "--newtork#depth", "3")
    assert "did you mean backbone_deep.json?" in refused(capsys, "train", folder, "--overlay", "backbone_dep")
    assert "config file 'trian.json'" in refused(capsys, "train", folder, "--config_file", "trian.json")
    assert "holds no JSON object" in refused(capsys, "train", folder, "--config_file", "list.json")
    image = tmp_path / "stack.tif"
    image.touch()
    words = ["predict", str(image), str(tmp_path / "out"), "--bundle", folder, "--halo", "8"]
    assert "unknown flag --halo" in refused(capsys, *words)
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "seen.json").exists()


def test_a_mistake_inside_the_bundle_is_one_line(toy_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = refused(capsys, "train", str(toy_bundle), "--config_file", "failing.json")
    assert line == "seg3d: error: invalid literal for int() with base 10: 'seven'\n"


def result_of(f1: float) -> dict[str, Any]:
    row = {"tp": 3, "fp": 1, "fn": 0, "precision": 0.75, "recall": 1.0, "f1": f1, "ap_dsb": 0.75, "pq": None}
    return {"thresholds": {"0.5": row}, "map": 0.5, "seg": None}


def test_evaluate_ends_with_f1_and_writes_json_whole(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from seg3d_monai.report import evaluate

    monkeypatch.setattr(evaluate, "evaluate_paths", lambda truth, prediction, progress: result_of(0.8571428))
    target = tmp_path / "numbers.json"
    assert cli.main(["evaluate", "truth", "prediction", "--json", str(target)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "F1@0.5 = 0.857"
    assert lines[1].split() == ["0.5", "3", "1", "0", "0.7500", "1.0000", "0.8571", "0.7500", "n/a"]
    assert json.loads(target.read_text()) == result_of(0.8571428)
    assert [path.name for path in tmp_path.iterdir()] == ["numbers.json"]


def test_synth_index_and_evaluate_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "2024"
    shapes = ["--train_shape", "[12,40,36]", "--test_shape", "[12,40,36]", "--val_volumes", "0", "--train_volumes", "1"]
    kinds = ["--unlabelled_volumes", "1", "--unlabelled_shape", "[4,20,18]", "--annotated_fraction", "0.5", "--stream"]
    assert cli.main(["synth", str(out), "--seed", "3", *shapes, *kinds]) == 0
    assert (out / "manifest.csv").is_file()
    database = tmp_path / "crops.sqlite"
    assert cli.main(["index", str(out / "manifest.csv"), str(database), "--crop_size", "[8,24,24]"]) == 0
    assert database.is_file()
    table = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["train", "1", "1"] in [row[:3] for row in table]
    truth = str(out / "test_0" / "labels.zarr")
    assert cli.main(["evaluate", truth, truth]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "F1@0.5 = 1.000"
