"""What wheels hold, the tag that a library deserves, and bundles found without the repository."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import zipfile
from email import message_from_string
from pathlib import Path

import pytest

import seg3d_monai
from seg3d_monai.cli_bundle import find_bundle
from seg3d_monai.shipped import shipped_bundles

ROOT = Path(__file__).resolve().parents[2]


def load_script(name: str):
    place = ROOT / "scripts" / "installing" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"installing.{name}", place)
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(ROOT / "scripts"))
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(ROOT / "scripts"))
    return module


platform_tag = load_script("platform_tag")


def names(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as opened:
        return set(opened.namelist())


def text(wheel: Path, ending: str) -> str:
    with zipfile.ZipFile(wheel) as opened:
        (name,) = [name for name in opened.namelist() if name.endswith(ending)]
        return opened.read(name).decode()


def tracked(folder: str) -> set[str]:
    """Files that the repository keeps, or would, in a folder; all of them where there is no git."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z", folder]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        found = {path.relative_to(ROOT).as_posix() for path in (ROOT / folder).rglob("*") if path.is_file()}
        return {name for name in found if "__pycache__" not in name and "/_lib/" not in name}
    return {name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()}


def run_unpacked(site: Path, cwd: Path, *words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run Python on the unpacked wheel, in place of the repository's package."""
    environment = {**os.environ, "PYTHONPATH": str(site), "SEG3D_OPS": "reference", **variables}
    return subprocess.run([sys.executable, "-P", *words], cwd=cwd, env=environment, capture_output=True, text=True)


def test_the_pure_wheel_is_for_any_platform_and_holds_the_package_and_nothing_else(wheel):
    assert wheel.name == f"seg3d_monai-{seg3d_monai.__version__}-py3-none-any.whl"
    assert "Root-Is-Purelib: true" in text(wheel, "dist-info/WHEEL")
    inside = {name for name in names(wheel) if ".dist-info/" not in name}
    bundles = {name.replace("bundles/", "seg3d_monai/_bundles/", 1) for name in tracked("bundles")}
    assert {name for name in inside if name.startswith("seg3d_monai/_bundles/")} == bundles
    assert inside - bundles == tracked("seg3d_monai")
    assert not [name for name in inside if "__pycache__" in name or name.endswith((".pyc", ".so"))]


def test_links_of_bundles_are_files_of_the_wheel(wheel):
    links = [path for path in (ROOT / "bundles").rglob("*") if path.is_symlink()]
    assert links
    with zipfile.ZipFile(wheel) as opened:
        for link in links:
            info = opened.getinfo(f"seg3d_monai/_bundles/{link.relative_to(ROOT / 'bundles').as_posix()}")
            assert info.external_attr >> 28 == 0o10, link  # a regular file
            assert opened.read(info) == link.read_bytes(), link


def test_metadata_names_dependencies_extras_licence_and_the_command(wheel):
    metadata = message_from_string(text(wheel, "dist-info/METADATA"))
    assert metadata["Version"] == seg3d_monai.__version__
    assert metadata["Requires-Python"] == ">=3.11"
    assert metadata["License-Expression"] == "Apache-2.0"
    assert "torch>=2.10" in metadata.get_all("Requires-Dist")
    extras = {"cluster", "view", "formats", "tracking", "export", "share", "docs", "dev", "all"}
    assert set(metadata.get_all("Provides-Extra")) == extras
    assert "seg3d = seg3d_monai.cli:main" in text(wheel, "entry_points.txt")
    assert any(name.endswith("dist-info/licenses/LICENSE") for name in names(wheel))


def test_bundles_of_a_wheel_are_found_from_any_folder(site, tmp_path):
    code = (
        "import sys; from seg3d_monai.cli_bundle import find_bundle; print(*map(find_bundle, sys.argv[1:]), sep='\\n')"
    )
    done = run_unpacked(site, tmp_path, "-c", code, "maskrcnn3d", "bundles/maskdino3d")
    expected = [site / "seg3d_monai" / "_bundles" / name for name in ("maskrcnn3d", "maskdino3d")]
    assert done.stdout.splitlines() == list(map(str, expected)), done.stderr
    done = run_unpacked(site, tmp_path, "-m", "seg3d_monai", "train", "maskrcn3d")
    assert done.returncode == 2
    assert "did you mean maskrcnn3d" in done.stderr.replace("'", "")


def test_a_bundle_where_the_user_stands_comes_before_the_packages_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    own = shipped_bundles() / "maskrcnn3d"
    assert find_bundle("maskrcnn3d") == find_bundle("bundles/maskrcnn3d") == own
    (tmp_path / "bundles" / "maskrcnn3d" / "configs").mkdir(parents=True)
    assert find_bundle("maskrcnn3d") == find_bundle("bundles/maskrcnn3d") == Path("bundles/maskrcnn3d")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="'empty' has no folder configs"):
        find_bundle("empty")
    with pytest.raises(FileNotFoundError, match=r"'bundles' (does not exist|has no folder configs)"):
        find_bundle("bundles")


def test_the_repository_is_read_in_place():
    assert shipped_bundles() == ROOT / "bundles"
    assert not (ROOT / "seg3d_monai" / "_bundles").exists()


def test_doctor_runs_from_a_wheel_with_files_that_cannot_be_written(site, tmp_path):
    home = tmp_path / "home"
    home.mkdir(mode=0o555)
    done = run_unpacked(site, tmp_path, "-m", "seg3d_monai", "doctor", HOME=str(home), PYTHONDONTWRITEBYTECODE="1")
    assert done.returncode == 0, done.stderr
    assert str(site / "seg3d_monai") in done.stdout
    assert "ops" in done.stdout
    assert list(home.iterdir()) == []


def test_a_wheel_with_a_library_names_its_platform_and_no_version_of_python(tmp_path):
    build_wheels = load_script("build_wheels")
    copy = build_wheels.copy_sources(tmp_path / "sources")
    library = copy / "seg3d_monai" / "_lib" / "ops-0123456789ab.so"
    library.parent.mkdir()
    library.write_bytes(b"stands for a library")
    models = copy / "bundles" / "mask2former3d" / "models"
    (models / "model.pt").write_bytes(b"what the bundle ships")
    (models / "best.pt").write_bytes(b"somebody's weights")
    (tmp_path / "out").mkdir()
    wheel = build_wheels.build_wheel(copy, tmp_path / "out", tag="manylinux_2_34_x86_64")
    assert wheel.name == f"seg3d_monai-{seg3d_monai.__version__}-py3-none-manylinux_2_34_x86_64.whl"
    assert "Root-Is-Purelib: false" in text(wheel, "dist-info/WHEEL")
    assert "seg3d_monai/_lib/ops-0123456789ab.so" in names(wheel)
    assert not [name for name in names(wheel) if ".data/" in name]  # where files of the other kind would lie
    assert "seg3d_monai/_bundles/mask2former3d/models/model.pt" in names(wheel)
    assert not [name for name in names(wheel) if name.endswith("best.pt")]


@pytest.mark.parametrize(
    ("versions", "minor"),
    [
        ({}, 17),
        ({"GLIBC": (2, 2, 5), "GLIBCXX": (3, 4, 19), "GCC": (3, 0)}, 17),
        ({"GLIBC": (2, 28), "GLIBCXX": (3, 4, 21)}, 28),
        ({"GLIBC": (2, 14), "GLIBCXX": (3, 4, 29)}, 34),
        ({"GLIBC": (2, 32), "GLIBCXX": (3, 4, 29), "CXXABI": (1, 3, 11)}, 34),
        ({"GLIBC": (2, 14), "CXXABI": (1, 3, 15)}, 39),
    ],
)
def test_the_tag_is_the_oldest_system_that_has_all_symbols(versions, minor):
    assert platform_tag.glibc_minor(versions) == minor


def test_symbols_newer_than_any_known_system_are_an_error():
    with pytest.raises(ValueError, match=r"GLIBCXX_3\.4\.99 is newer than what is known"):
        platform_tag.glibc_minor({"GLIBCXX": (3, 4, 99)})


def compile_c(source: str, target: Path, *flags: str) -> Path:
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None or shutil.which("readelf") is None or sys.platform != "linux":
        pytest.skip("no C compiler with readelf on this machine")
    code = target.with_suffix(".c")
    code.write_text(source)
    subprocess.run([compiler, "-shared", "-fPIC", str(code), "-o", str(target), *flags], check=True)
    return target


def test_a_library_that_searches_in_a_folder_of_the_builder_is_refused(tmp_path):
    plain = compile_c("int answer(void) { return 42; }\n", tmp_path / "libplain.so", "-Wl,-soname,libplain.so")
    assert platform_tag.platform_tag([plain]).startswith("manylinux_2_17_")
    with_path = compile_c("int one(void) { return 1; }\n", tmp_path / "path.so", f"-Wl,-rpath,{tmp_path}")
    with pytest.raises(ValueError, match=r"path.so searches in .*, which holds on one machine alone"):
        platform_tag.check_links(with_path)
    linked = compile_c(
        "int answer(void); int two(void) { return answer(); }\n", tmp_path / "linked.so", f"-L{tmp_path}", "-lplain"
    )
    with pytest.raises(ValueError, match=r"linked.so is linked with libplain.so"):
        platform_tag.check_links(linked)


@pytest.mark.long
def test_the_wheels_of_this_platform_work_where_nobody_may_write(tmp_path):
    built = subprocess.run([str(ROOT / "scripts" / "build_wheels"), "--out", str(tmp_path)], check=True)
    assert built.returncode == 0
    (prebuilt,) = [file for file in tmp_path.glob("*.whl") if not file.stem.endswith("-any")]
    inside = [name for name in names(prebuilt) if name.startswith("seg3d_monai/_lib/")]
    assert inside
    assert all(name.endswith(".so") for name in inside)
    # Its own dependencies are those of the environment that runs this test, so that nothing is downloaded.
    site = tmp_path / "site"
    with zipfile.ZipFile(prebuilt) as opened:
        opened.extractall(site)
    variables = {"SEG3D_OPS": "", "CXX": "no-compiler", "XDG_CACHE_HOME": str(tmp_path / "no" / "cache")}
    code = "import json; from seg3d_monai.ops import status; print(json.dumps(status()[0]))"
    done = run_unpacked(site, tmp_path, "-W", "error", "-c", code, **variables)
    found = json.loads(done.stdout)
    assert (found["path"], found["reason"]) == ("compiled", "prebuilt with the package")
    assert Path(found["library"]).parent == site / "seg3d_monai" / "_lib"
