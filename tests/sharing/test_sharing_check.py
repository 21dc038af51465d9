"""Every defect of a bundle is named by the check; nothing of a marked bundle is run."""

import json
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from sharing_toys import CONV, INFERENCE, METADATA, change, conv, everything_in, put, write_bundle

from seg3d_monai.cli import main
from seg3d_monai.sharing import metadata as metadata_module
from seg3d_monai.sharing.check import FAILED, NOT_CHECKED, PASSED, WARNING, check_format, read_content
from seg3d_monai.sharing.check_run import check_run

ROOT = Path(__file__).parents[2]
SCHEMAS = sorted((ROOT.parent / "shared" / "schemas").glob("meta_schema_*.json"))
BUNDLES = sorted(path.parent for path in (ROOT / "bundles").glob("*/configs"))


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return write_bundle(tmp_path / "toy")


def results(folder: Path, schema: Path | None = None, run: bool = False) -> dict[str, tuple[str, str]]:
    content = read_content(folder)
    checks = check_format(content, schema) + (check_run(content) if run else [])
    return {check.name: (check.result, check.why) for check in checks}


def test_a_whole_bundle_passes_every_check(bundle: Path) -> None:
    found = results(bundle, run=True)
    assert {result for result, _ in found.values()} == {PASSED}, found
    assert found["verify_net_in_out"][1] == "dense_net_def gives what the metadata says"
    assert "dense_net_def is scripted" in found["ckpt_export"][1]
    assert "weights: the bundle's" in found["ckpt_export"][1]


@pytest.mark.parametrize(
    "name",
    [
        *("LICENSE", "docs/README.md", "docs/data_license.txt", "configs/metadata.json", "configs/train.json"),
        *("configs/evaluate.json", "configs/inference.json", "configs/multi_gpu_train.json"),
    ],
)
def test_a_missing_file_fails(bundle: Path, name: str) -> None:
    (bundle / name).unlink()
    assert results(bundle)[f"file {name}"] == (FAILED, "is missing")


def test_a_configuration_may_be_yaml(bundle: Path) -> None:
    (bundle / "configs/evaluate.json").unlink()
    put(bundle, "configs/evaluate.yaml", "wide: '@width'\n")
    found = results(bundle)
    assert found["file configs/evaluate.json"][0] == PASSED
    assert found["references of configs/evaluate.yaml"][0] == PASSED


def test_missing_weights_are_a_warning_unless_they_are_named(bundle: Path) -> None:
    (bundle / "models/model.pt").unlink()
    assert results(bundle)["file models/model.pt"][0] == WARNING
    assert results(bundle)["weights are weights alone"][0] == NOT_CHECKED
    put(
        bundle,
        "large_files.yml",
        "large_files:\n  - path: models/model.pt\n    url: https://nowhere.invalid/model.pt\n",
    )
    assert results(bundle)["file models/model.pt"][0] == PASSED


def set_metadata(**values: Any) -> Callable[[Path], None]:
    return lambda folder: change(folder, "configs/metadata.json", **values)


def set_file(name: str, content: Any) -> Callable[[Path], None]:
    return lambda folder: put(folder, name, content)


def save_weights(weights: Any) -> Callable[[Path], None]:
    return lambda folder: torch.save(weights, folder / "models" / "model.pt")


@pytest.mark.parametrize(
    ("break_it", "name", "result", "why"),
    [
        (set_file("configs/train.json", "{"), "configurations parse", FAILED, "configs/train.json: Expecting"),
        (set_file("configs/x.json", "[]"), "configurations parse", FAILED, "configs/x.json: it holds no keys"),
        (set_file("configs/x.yml", "a: ["), "configurations parse", FAILED, "configs/x.yml: while parsing"),
        (set_file("configs/logging.conf", "no section"), "configs/logging.conf", FAILED, "no section headers"),
        (set_file("configs/logging.conf", "[loggers]\n"), "configs/logging.conf", FAILED, "no section handlers"),
        (
            set_file("configs/train.json", {"a": "@lost", "b": "%lost#c"}),
            "references of configs/train.json",
            FAILED,
            "b: %lost#c does not exist; a: @lost does not exist",
        ),
        (
            set_file("configs/evaluate.json", {"a": "@widht"}),
            "references of configs/evaluate.json",
            FAILED,
            "a: @widht does not exist",
        ),
        (
            set_file("configs/multi_gpu_train.json", {"network_dfe#kernel_size": 3}),
            "references of configs/multi_gpu_train.json",
            FAILED,
            "'network_dfe#kernel_size' does not fit",
        ),
        (set_metadata(task=None), "metadata schema", FAILED, "'task' is a required property"),
        (set_metadata(task=3), "metadata schema", FAILED, "task: 3 is not of type 'string'"),
        (set_metadata(version="1.0"), "version and changelog", FAILED, "'1.0' is no semantic version"),
        (set_metadata(version="01.0.0"), "version and changelog", FAILED, "no semantic version"),
        (set_metadata(version="0.3.0"), "version and changelog", FAILED, "does not name the current version 0.3.0"),
        (set_metadata(version="0.1.0"), "version and changelog", FAILED, "a version after the current 0.1.0"),
        (set_metadata(changelog=None), "version and changelog", FAILED, "there is no changelog"),
        (set_metadata(required_packages_version=None), "required packages", FAILED, "is missing"),
        (
            set_metadata(required_packages_version={"no_such_package_x": "1.0"}),
            "required packages",
            WARNING,
            "no_such_package_x 1.0 is not installed",
        ),
        (set_metadata(required_packages_version={"fire": "99.0"}), "required packages", WARNING, "is older than 99.0"),
        (save_weights([1]), "weights are weights alone", FAILED, "holds a list, not weights by name"),
        (save_weights({"a": "text"}), "weights are weights alone", FAILED, "holds a str at 'a'"),
        (save_weights({"a": [torch.zeros(1)]}), "weights are weights alone", FAILED, "holds a list at 'a'"),
        (set_file("models/model.pt", "text"), "weights are weights alone", FAILED, "or is damaged"),
    ],
)
def test_a_defect_is_named(bundle: Path, break_it: Callable[[Path], None], name: str, result: str, why: str) -> None:
    break_it(bundle)
    found = results(bundle)
    assert found[name][0] == result
    assert why in found[name][1]
    others = {key for key, (got, _) in found.items() if got == FAILED and not key.startswith("references")}
    assert others - {name} == set()  # nothing else is blamed


def test_a_schema_that_cannot_be_had_is_not_passed(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(url: str, timeout: float) -> None:
        raise OSError("no network")

    (bundle / "eval/schema.json").unlink()
    monkeypatch.setattr(metadata_module, "urlopen", fail)
    result, why = results(bundle)["metadata schema"]
    assert result == NOT_CHECKED
    assert "names no schema of https://github.com/Project-MONAI/" in why  # a stranger's URL is not called
    change(bundle, "configs/metadata.json", schema="https://github.com/Project-MONAI/x/schema.json")
    result, why = results(bundle)["metadata schema"]
    assert result == NOT_CHECKED
    assert "could not be reached (no network)" in why


@pytest.mark.skipif(not SCHEMAS, reason="the model zoo's published schema is not beside the project")
@pytest.mark.parametrize("folder", BUNDLES, ids=lambda folder: folder.name)
def test_the_projects_own_bundles_satisfy_the_published_schema(folder: Path) -> None:
    found = results(folder, SCHEMAS[0])
    assert found["metadata schema"] == (PASSED, f"valid by {SCHEMAS[0]}")


@pytest.mark.parametrize("folder", BUNDLES, ids=lambda folder: folder.name)
def test_the_projects_own_bundles_have_what_belongs_to_them(folder: Path) -> None:
    failed = {name for name, (result, _) in results(folder).items() if result == FAILED}
    assert failed == set()


def test_weights_that_do_not_fit_are_named(bundle: Path) -> None:
    weights = conv().state_dict()
    save_weights({"weight": weights["weight"][:, :, :1], "extra": torch.zeros(1)})(bundle)
    assert results(bundle, run=True)["weights fit the network"] == (
        FAILED,
        "bias is missing; extra is not the network's; weight has the shape (1, 1, 1, 3, 3) instead of (1, 1, 3, 3, 3)",
    )


def test_a_network_that_is_not_what_the_metadata_says_fails(bundle: Path) -> None:
    change(bundle, "configs/inference.json", dense_net_def={**CONV, "out_channels": 2})
    result, why = results(bundle, run=True)["verify_net_in_out"]
    assert result == FAILED
    assert "output channel number `2` doesn't match: `1`" in why


def test_a_network_that_cannot_be_scripted_is_traced(bundle: Path) -> None:
    change(
        bundle, "configs/inference.json", dense_net_def={"_target_": "sharing_toys.Unscriptable", "of": "@network_def"}
    )
    result, why = results(bundle, run=True)["ckpt_export"]
    assert (result, "is traced" in why, "its own, as keys differ" in why) == (PASSED, True, True), why


def test_without_a_dense_network_monais_tools_are_left_out(bundle: Path) -> None:
    change(bundle, "configs/inference.json", dense_net_def=None)
    found = results(bundle, run=True)
    assert found["weights fit the network"][0] == PASSED
    for name in ("verify_net_in_out", "ckpt_export"):
        assert found[name] == (NOT_CHECKED, "configs/inference.json has no dense_net_def")


class Touches:
    """A pickle that makes a file when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return (Path.touch, (self.path,))


@pytest.mark.parametrize("plain_pickle", [False, True])
def test_weights_that_are_a_program_are_refused(bundle: Path, tmp_path: Path, plain_pickle: bool) -> None:
    evil = {"weight": Touches(tmp_path / "X")}
    if plain_pickle:
        (bundle / "models/model.pt").write_bytes(pickle.dumps(evil))
    else:
        torch.save(evil, bundle / "models/model.pt")
    result, why = results(bundle, run=True)["weights are weights alone"]
    assert result == FAILED
    assert "holds more than weights" in why
    assert not (tmp_path / "X").exists()
    if plain_pickle:
        pickle.loads((bundle / "models/model.pt").read_bytes())
    else:
        torch.load(bundle / "models/model.pt", weights_only=False)
    assert (tmp_path / "X").exists()  # loaded in the usual way it does


def malicious(text: str) -> list[tuple[str, Any]]:
    """Files in which a text that touches X stands, each in a place of its own."""
    component = {"_target_": "os.system", "command": "touch X"}
    return [
        ("configs/inference.json", INFERENCE | {"note": text}),
        ("configs/inference.json", INFERENCE | {"network_def": component}),
        ("configs/inference.json", INFERENCE | {"network_def": {**CONV, "bias": [[text]]}}),
        ("configs/inference.json", INFERENCE | {"imports": ["$import os"]}),
        ("configs/inference.json", INFERENCE | {"name": "os.system", "network_def": component | {"_target_": "@name"}}),
        ("configs/overlays/x.json", {"network_def#_target_": "os.system"}),
        ("configs/extra.yaml", f'a: [1, {{b: "{text}"}}]\n'),
        ("configs/logging.conf", f"[loggers]\n[handlers]\n[formatters]\n[handler_a]\nargs=({text[1:]},)\n"),
    ]


@pytest.mark.parametrize("number", range(8))
def test_a_malicious_bundle_is_stopped_before_it_runs(
    bundle: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    number: int,
) -> None:
    monkeypatch.chdir(tmp_path)
    put(bundle, *malicious("$__import__('os').system('touch X')")[number])
    before = everything_in(tmp_path)
    assert main(["bundle", "check", str(bundle)]) == 2
    shown = capsys.readouterr()
    assert shown.err.count("\n") == 1
    assert "nothing is marked" in shown.err
    assert "--trust runs the rest" in shown.out
    assert sum(line.startswith("! ") for line in shown.out.splitlines()) >= 1
    assert everything_in(tmp_path) == before  # X was never made


def test_trust_runs_what_was_marked(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other side of the test above: it is the listing that stops it, not an accident."""
    monkeypatch.chdir(tmp_path)
    evil = {**CONV, "bias": "$__import__('os').system('touch X') == 0"}
    change(bundle, "configs/inference.json", network_def=evil)
    assert main(["bundle", "check", str(bundle)]) == 2
    assert not (tmp_path / "X").exists()
    assert main(["bundle", "check", str(bundle), "--trust"]) == 0
    assert (tmp_path / "X").exists()


def test_text_of_a_bundle_does_not_steer_the_terminal(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    change(bundle, "configs/train.json", run=["$print('\x1b[2J\u202e')"])
    assert main(["bundle", "check", str(bundle)]) == 0
    shown = capsys.readouterr().out
    assert "\x1b" not in shown
    assert "\u202e" not in shown
    assert "\\x1b[2J\\u202e" in shown


def test_a_zip_is_checked_and_all_is_written_as_json(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with zipfile.ZipFile(tmp_path / "toy.zip", "w") as archive:
        for path in sorted(bundle.rglob("*")):
            archive.write(path, path.relative_to(tmp_path))
    assert main(["bundle", "check", str(tmp_path / "toy.zip"), "--json", str(tmp_path / "out.json")]) == 0
    assert "failed" not in capsys.readouterr().out
    found = json.loads((tmp_path / "out.json").read_text())
    assert {check["result"] for check in found["checks"]} == {PASSED}
    expressions = [(one["file"], one["key"], one["text"]) for one in found["findings"]]
    assert expressions == [
        ("configs/inference.json", "run#0", "$print(@threshold)"),
        ("configs/train.json", "run#0", "$print(@width)"),
    ]


def test_json_is_written_where_a_check_fails(bundle: Path, tmp_path: Path) -> None:
    put(bundle, "configs/metadata.json", METADATA | {"version": "x"})
    assert main(["bundle", "check", str(bundle), "--json", str(tmp_path / "out.json")]) == 2
    checks = {one["name"]: one["result"] for one in json.loads((tmp_path / "out.json").read_text())["checks"]}
    assert checks["version and changelog"] == FAILED
    assert checks["weights fit the network"] == PASSED


def test_a_zip_that_leads_elsewhere_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with zipfile.ZipFile(tmp_path / "bad.zip", "w") as archive:
        archive.writestr("../evil.txt", "x")
    assert main(["bundle", "check", str(tmp_path / "bad.zip")]) == 2
    shown = capsys.readouterr().err
    assert shown.count("\n") == 1
    assert "leads out of the folder" in shown
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad.zip"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nowhere"], "bundle 'nowhere' does not exist"),
        (["{toy}", "--shema", "x"], "did you mean --schema?"),
        (["{toy}", "--schema", "nowhere.json"], "--schema 'nowhere.json' does not exist"),
        (["{toy}", "--json", "nowhere/x.json"], "its folder does not exist"),
        ([], "missing BUNDLE"),
    ],
)
def test_a_mistake_is_one_line(
    bundle: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    before = everything_in(bundle)
    assert main(["bundle", "check", *(word.format(toy=bundle) for word in words)]) == 2
    shown = capsys.readouterr().err
    assert shown.startswith("seg3d: error: ")
    assert shown.count("\n") == 1
    assert message in shown
    assert everything_in(bundle) == before
