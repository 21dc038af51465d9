"""Imports point one way: every import of the package is walked and held against the rooms of the design."""

import ast
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "seg3d_monai"

# room -> rooms whose modules it may import, beside its own
ARROWS: dict[str, set[str]] = {
    "ops": set(),
    "layers": {"ops"},
    "backbones": {"ops", "layers"},
    "heads": {"ops", "layers"},
    "decoders": {"ops", "layers"},
    "matching": {"ops"},
    "losses": {"ops", "matching"},
    "models": {"ops", "layers", "backbones", "heads", "decoders", "matching", "losses"},
    "data": {"ops"},
    "metrics": {"ops"},
    "inference": {"ops", "data"},
    "engine": {"ops", "data", "metrics", "inference"},
    "planning": {"data", "inference", "engine"},
    "report": {"data", "metrics", "inference"},
    "annotation": {"ops", "data", "inference"},
    "export": {"ops", "layers", "models", "data", "engine"},
    "viewing": {"data"},
    "sharing": {"engine"},
}
# Modules beside the rooms: nothing but the command line's own files may import them.
COMMAND_LINE = {
    "__main__",
    "cli",
    "cli_annotate",
    "cli_arguments",
    "cli_bundle",
    "cli_data",
    "cli_export",
    "cli_report",
    "cli_share",
    "cli_synth",
    "cli_tune",
    "cli_view",
    "doctor",
}


class Import(NamedTuple):
    """One imported module or name, as `package.module.name`, and whether a function does it when it is called."""

    name: str
    is_lazy: bool
    line: int


def imports(source: str, module: str) -> Iterator[Import]:
    """Every import in a source text.

    Args:
        source: Python text.
        module: Its dotted name, a package's ending in `.__init__`, for relative imports.
    """

    def walk(node: ast.AST, is_lazy: bool) -> Iterator[Import]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                for alias in child.names:
                    yield Import(alias.name, is_lazy, child.lineno)
            elif isinstance(child, ast.ImportFrom):
                above = module.split(".")[: -child.level] if child.level else []
                base = ".".join(above + ([child.module] if child.module else []))
                for alias in child.names:
                    yield Import(f"{base}.{alias.name}", is_lazy, child.lineno)
            inside = is_lazy or isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            yield from walk(child, inside)

    yield from walk(ast.parse(source), False)


def modules() -> list[tuple[str, Path]]:
    """Dotted name and file of every module of the package."""
    return [
        (".".join(("seg3d_monai", *path.relative_to(PACKAGE).with_suffix("").parts)), path)
        for path in sorted(PACKAGE.rglob("*.py"))
    ]


def all_imports() -> list[tuple[str, Import]]:
    return [(name, item) for name, path in modules() for item in imports(path.read_text(encoding="utf-8"), name)]


def faults(module: str, source: str) -> list[str]:
    """The imports of a module that go against the arrows."""
    room = module.split(".")[1]
    found = []
    for item in imports(source, module):
        parts = item.name.split(".")
        if parts[0] != "seg3d_monai" or len(parts) < 2:
            continue
        target = parts[1]
        if target in COMMAND_LINE:
            allowed = room in COMMAND_LINE
        elif target in ARROWS:
            allowed = room in COMMAND_LINE or target == room or target in ARROWS[room]
        else:
            allowed = True  # a name of the package itself, such as __version__
        if not allowed:
            found.append(f"{module}:{item.line} imports {item.name}")
    return found


def test_the_walk_sees_every_kind_of_import() -> None:
    source = "import a.b\nfrom c import d\nfrom .e import f\nfrom ..g import h\ndef k():\n    from .. import m\n"
    assert list(imports(source, "seg3d_monai.data.volume")) == [
        Import("a.b", False, 1),
        Import("c.d", False, 2),
        Import("seg3d_monai.data.e.f", False, 3),
        Import("seg3d_monai.g.h", False, 4),
        Import("seg3d_monai.m", True, 6),
    ]


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("seg3d_monai.ops.nms3d", "import seg3d_monai.layers.conv"),
        ("seg3d_monai.inference.predictor", "from seg3d_monai.models import MaskRCNN3d"),
        ("seg3d_monai.engine.trainer", "def build():\n    from seg3d_monai import models"),
        ("seg3d_monai.data.targets", "from ..cli import main"),
        ("seg3d_monai.heads.__init__", "from ..losses import boxes"),
    ],
)
def test_a_forbidden_import_is_found(module: str, source: str) -> None:
    assert len(faults(module, source)) == 1


def test_imports_follow_the_arrows() -> None:
    found = [fault for module, path in modules() for fault in faults(module, path.read_text(encoding="utf-8"))]
    assert not found, "\n".join(found)


def test_every_folder_is_a_room_of_the_design() -> None:
    folders = {path.name for path in PACKAGE.iterdir() if path.is_dir() and any(path.rglob("*.py"))}
    assert folders <= set(ARROWS)


def test_arrows_have_no_cycle() -> None:
    left = {room: set(targets) for room, targets in ARROWS.items()}
    while left:
        ends = {room for room, targets in left.items() if not targets & left.keys()}
        assert ends, f"cycle among {sorted(left)}"
        left = {room: targets for room, targets in left.items() if room not in ends}


@pytest.mark.parametrize("library", ["ray", "deepspeed"])
def test_cluster_libraries_are_imported_lazily_in_one_file_a_room(library: str) -> None:
    users = [(module, item) for module, item in all_imports() if item.name.split(".")[0] == library]
    rooms = Counter(module.split(".")[1] for module in {module for module, _ in users})
    assert all(count == 1 for count in rooms.values()), rooms
    assert all(item.is_lazy for _, item in users)


def test_only_the_crop_index_uses_sqlite_among_the_data() -> None:
    users = {module for module, item in all_imports() if item.name.split(".")[0] == "sqlite3"}
    data = {module for module in users if module.startswith("seg3d_monai.data.")}
    assert all(module.split(".")[-1].startswith("crop_index") for module in data)


def test_nothing_but_the_network_finds_objects_in_the_prediction_path() -> None:
    classical = {"watershed", "threshold_otsu", "cc3d"}
    labellers = {"scipy.ndimage.label", "skimage.measure.label", "skimage.morphology.label"}
    rooms = ("inference", "models", "heads", "engine")
    for module, item in all_imports():
        if module.split(".")[1] in rooms:
            assert not classical & set(item.name.split(".")), f"{module}:{item.line} imports {item.name}"
            assert item.name not in labellers, f"{module}:{item.line} imports {item.name}"


def test_a_process_that_predicts_with_a_convolutional_detector_does_not_import_monai() -> None:
    """MONAI takes two seconds to import, and every worker of a prediction would."""
    code = (
        "import sys; from seg3d_monai.models import maskrcnn3d_tiny; import seg3d_monai.inference; maskrcnn3d_tiny(); "
        "sys.exit(sorted({'monai', 'nibabel', 'ignite'} & set(sys.modules)) or 0)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
