"""What a bundle would run is listed and judged from its text, whatever it is hidden in."""

import json
from pathlib import Path
from typing import Any

import pytest
from monai.bundle import ConfigParser

from seg3d_monai.sharing.danger import expression_marks, target_marks
from seg3d_monai.sharing.expressions import Finding, list_code, list_logging
from seg3d_monai.sharing.files import read_config
from seg3d_monai.sharing.ids import merge, missing_references

ROOT = Path(__file__).parents[2]
BUNDLES = sorted(path.parent for path in (ROOT / "bundles").glob("*/configs"))
TOUCH = "$__import__('os').system('touch X')"


def found(config: Any, **others: Any) -> list[Finding]:
    return list_code({"configs/a.json": config, **others})


def marked(config: Any, **others: Any) -> list[str]:
    return [finding.key for finding in found(config, **others) if finding.marks]


@pytest.mark.parametrize(
    "text",
    [
        "__import__('os').system('touch X')",
        "__import__('torch.os').os",
        "__import__(name='os')",
        "__import__('to' + 'rch')",
        "[m for m in [__import__]][0]('os')",
        "eval('1')",
        "(lambda f: f('touch X'))(exec)",
        "open('X', 'w').close()",
        "subprocess.run(['touch', 'X'])",
        "torch.os.system('touch X')",
        "torch.serialization.os.remove('X')",
        "().__class__.__base__.__subclasses__()",
        "getattr(torch, 'o' + 's')",
        "torch.hub.load('evil/repo', 'net')",
        "torch.load('X', weights_only=False)",
        "torch.load('X', None, my_pickle)",
        "torch.load('X', **@kwargs)",
        "np.load('X', allow_pickle=True)",
        "monai.utils.optional_import('os')[0]",
        "monai.utils.run_cmd(['touch', 'X'])",
        "monai.bundle.ConfigParser(@evil).get_parsed_content('x')",
        "torch._C._jit_init()",
        "f'{__import__(\"os\")}'",
        "@a[__import__('os').system('touch X')]",
        "'@or, @in' + str(eval('1'))",
        "breakpoint()",
        "(x for x in [1]).gi_frame.f_builtins['eval']('1')",
        "torch.utils.model_zoo.load_url('https://nowhere.invalid/x')",
        "monai.bundle.run(config_file='other.json')",
        "1 +",
        "(" * 500 + ")" * 500,
        "'" + "a" * 30_000 + "'",
    ],
)
def test_a_dangerous_expression_is_marked(text: str) -> None:
    assert expression_marks(text)


@pytest.mark.parametrize(
    "text",
    [
        "'cuda' if __import__('torch').cuda.is_available() else 'cpu'",
        "engine.load_weights(@network_def, @checkpoint)",
        "@train#dataset.spacing_um",
        "@a::b::0 + @c#d",
        "[x * 2 for x in @sizes]",
        "@network.eval()",
        "torch.compile(@network)",
        "@seam_report.removesuffix('.json') + '.png'",
        "'eval'",
        "__import__('seg3d_monai.engine')",
        "@count % 3",
        "monai.__version__",
    ],
)
def test_an_ordinary_expression_is_not_marked(text: str) -> None:
    assert expression_marks(text) == ()


@pytest.mark.parametrize(
    "name",
    [
        *("os.system", "builtins.eval", "eval", "exec", "scripts.net.Net", "torch.os.system", "torch.hub.load"),
        *("monai.utils.run_cmd", "torch.utils.cpp_extension.load", "$'os.' + 'system'", "@nowhere", "%x.json::y"),
        *("list_data_collate", {"_target_": "x"}, None),
    ],
)
def test_a_component_that_is_not_known_is_marked(name: object) -> None:
    assert target_marks(name)


@pytest.mark.parametrize("name", ["torch.nn.Conv3d", "monai.inferers.SimpleInferer", "UNet", "seg3d_monai.data.x"])
def test_a_component_of_the_known_packages_is_not(name: str) -> None:
    assert target_marks(name) == ()
    assert found({"a": {"_target_": name}}) == []


def test_a_component_of_numpy_is_listed_and_not_marked() -> None:
    assert found({"a": {"_target_": "numpy.zeros"}}) == [
        Finding(file="configs/a.json", key="a#_target_", kind="component", text="numpy.zeros")
    ]


@pytest.mark.parametrize(
    ("config", "key"),
    [
        ({"a": TOUCH}, "a"),
        ({"a": {"b": [[1, [TOUCH]]]}}, "a#b#0#1#0"),
        ({"a": {"_target_": "os.system", "command": "touch X"}}, "a#_target_"),
        ({"a": [[{"b": [{"_target_": "os.system"}]}]]}, "a#0#0#b#0#_target_"),
        ({"imports": ["$import torch", "$import os"]}, "imports#1"),
        ({"imports": ["$from torch import os"]}, "imports#0"),
        ({"x": "$from subprocess import run as harmless"}, "x"),
        ({"x": "$import torch; import os"}, "x"),
        ({"a": {"_target_": "@name"}, "name": "os.system"}, "a#_target_"),
        ({"a": {"_target_": "%name"}, "name": "@other", "other": "os.system"}, "a#_target_"),
        ({"a": {"_target_": "@#name", "name": "os.system"}}, "a#_target_"),
        ({"network_def#_target_": "os.system"}, "network_def#_target_"),
        ({"+a": {"b": {"_target_": "os.system"}}}, "a#b#_target_"),
        ({"a": {"_target_": "torch.load", "f": "X", "weights_only": False}}, "a#weights_only"),
        ({"a#weights_only": "$1 == 2"}, "a#weights_only"),
        ({"a": {"_target_": "numpy.load", "allow_pickle": True}}, "a#allow_pickle"),
        ({"a": "%/etc/other.json::key"}, "a"),
        ({"a": "%../other.json::key"}, "a"),
        ({"a": "%configs/../../other.yaml"}, "a"),
        ({"a": "%C:/other.json#key"}, "a"),
        ({"a": "%missing.json#key"}, "a"),
        ({"a": {"_requires_": [TOUCH]}}, "a#_requires_#0"),
    ],
)
def test_it_is_found_wherever_it_hides(config: Any, key: str) -> None:
    assert key in marked(config)


def test_what_another_file_sets_a_component_to_is_judged_as_one() -> None:
    train = {"paradigm": "seg3d_monai.engine.InstanceTrainer", "trainer": {"_target_": "@paradigm"}}
    assert found(train) == []
    overlay = {"paradigm": "os.system"}
    (finding,) = list_code({"configs/train.json": train, "configs/overlays/x.json": overlay})
    assert (finding.file, finding.key, bool(finding.marks)) == ("configs/overlays/x.json", "paradigm", True)


def test_a_macro_within_the_bundle_is_listed_and_not_marked() -> None:
    (finding,) = found({"a": "%configs/b.json::key"}, **{"configs/b.json": {"key": 1}})
    assert (finding.kind, finding.text, finding.marks) == ("macro", "%configs/b.json::key", ())


def test_every_import_is_listed_in_order() -> None:
    config = {"imports": ["$import torch", "$from numpy import linalg", "plain"], "a": "$@b + 1"}
    assert [(one.kind, one.key, one.text) for one in found(config)] == [
        ("import", "imports#0", "$import torch"),
        ("import", "imports#1", "$from numpy import linalg"),
        ("import", "imports#2", "plain"),
        ("expression", "a", "$@b + 1"),
    ]
    assert marked(config) == []


def test_a_yaml_file_is_read_without_making_objects(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(f'a:\n  - [1, ["{TOUCH}"]]\nb: {{_target_: os.system}}\n')
    assert marked(read_config(tmp_path / "a.yaml")) == ["a#0#1#0", "b#_target_"]
    (tmp_path / "b.yaml").write_text("a: !!python/object/apply:os.system ['touch X']\n")
    with pytest.raises(ValueError, match="python/object/apply"):
        read_config(tmp_path / "b.yaml")
    assert not Path("X").exists()


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.json", '{"a": 1, "a": 2}', "'a' is given twice"),
        ("a.json", "[" * 5000, "nested|recursion"),
        ("a.json", "[" * 200 + "]" * 200, "nested deeper"),
        ("a.yaml", "a: &a [*a]\n", "nested deeper"),
        (
            "a.yaml",
            "a0: &a0 [x]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 9)),
            "more than 1,000,000",
        ),
    ],
)
def test_a_file_that_would_take_all_memory_or_hides_a_key_is_refused(
    tmp_path: Path, name: str, text: str, message: str
) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises((ValueError, RecursionError), match=message):
        read_config(tmp_path / name)


@pytest.mark.parametrize(
    ("line", "is_marked"),
    [
        ("args=(sys.stderr,)", False),
        ("args=('log.txt', 'a', -1)", False),
        ("args=(__import__('os').system('touch X'),)", True),
        ("args=(sys.modules,)", True),
        ("kwargs={'a': open('X', 'w')}", True),
        ("class=StreamHandler", False),
        ("class=handlers.RotatingFileHandler", False),
        ("class=__import__('os').system('touch X')", True),
        ("class=os.system", True),
    ],
)
def test_what_a_logging_file_evaluates_is_marked(line: str, is_marked: bool) -> None:
    assert bool(list_logging("configs/logging.conf", f"[handler_a]\n{line}\n")) == is_marked


@pytest.mark.parametrize("folder", BUNDLES, ids=lambda folder: folder.name)
def test_nothing_is_marked_in_the_projects_own_bundles(folder: Path) -> None:
    configs = {file.name: json.loads(file.read_text()) for file in sorted(folder.rglob("configs/**/*.json"))}
    listed = list_code(configs)
    assert any(finding.text.startswith("$import") for finding in listed)
    assert [finding for finding in listed if finding.marks] == []


@pytest.mark.parametrize("folder", BUNDLES, ids=lambda folder: folder.name)
def test_files_are_merged_as_monai_merges_them(folder: Path, tmp_path: Path) -> None:
    train = folder / "configs" / "train.json"
    adding = tmp_path / "adding.json"
    adding.write_text(json.dumps({"+train#handlers": [1], "+optimizer": {"lr": 2}, "train::x": 3}))
    for overlay in [*sorted((folder / "configs" / "overlays").glob("*.json")), adding]:
        merged = merge(json.loads(train.read_text()), json.loads(overlay.read_text()))
        assert merged == ConfigParser.load_config_files([str(train), str(overlay)]), overlay.name


@pytest.mark.parametrize(
    ("config", "faults"),
    [
        ({"a": "@b", "b": 1}, []),
        ({"a": "@b#0#c", "b": [{"c": 1}]}, []),
        ({"a": "$@b + @c#d", "c": {"d": 1}}, ["a: @b does not exist"]),
        ({"a": "@b#c", "b": {}}, ["a: @b#c does not exist"]),
        ({"a": "%b", "b": [1]}, []),
        ({"a": "%b#0", "b": []}, ["a: %b#0 does not exist"]),
        ({"a": "%b", "b": {"c": 1}, "d": "@a#c"}, []),
        ({"a": {"b": "@#c", "c": 1, "d": {"e": "@##c"}}}, []),
        ({"a": {"b": "@#d"}, "d": 1}, ["a#b: @a#d does not exist"]),
        ({"a": "me@home.org"}, []),
        ({"a": "%x.json::k"}, ["a: %x.json::k does not exist"]),
    ],
)
def test_references_that_lead_nowhere_are_named(config: Any, faults: list[str]) -> None:
    assert missing_references(config) == faults
