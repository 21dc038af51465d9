"""Which library of the operators is taken: prebuilt for the processor, prebuilt for any, compiled, none."""

import sys
from pathlib import Path

import pytest
import torch

from seg3d_monai.ops import build, loading, prebuild
from seg3d_monai.ops.build import AVX512_FLAGS, BuildError, build_into_cache, find_compiler


@pytest.fixture
def package(tmp_path, monkeypatch):
    """An empty folder of prebuilt libraries, and nothing that can be compiled."""
    monkeypatch.delenv("SEG3D_OPS", raising=False)
    monkeypatch.setattr(loading, "PREBUILT", tmp_path)

    def refuse(recipe):
        raise BuildError("nothing can be compiled today")

    monkeypatch.setattr(loading, "cpu_recipe", lambda: None)
    monkeypatch.setattr(loading, "build_into_cache", refuse)
    return tmp_path


@pytest.fixture
def tried(monkeypatch):
    """Libraries that torch was asked to load; those whose content is `broken` do not."""
    asked = []

    def load_library(path):
        asked.append(Path(path))
        if Path(path).read_bytes() == b"broken":
            raise OSError("undefined symbol: torch_not_there")

    monkeypatch.setattr(torch.ops, "load_library", load_library)
    return asked


def has_capability(monkeypatch, name):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: name)


@pytest.mark.parametrize(("capability", "variant"), [("AVX512", "avx512"), ("AVX2", ""), ("DEFAULT", "")])
def test_the_library_for_this_processor_comes_first(package, tried, monkeypatch, caplog, capability, variant):
    has_capability(monkeypatch, capability)
    for name in ("", "avx512"):
        loading.prebuilt_library(name).touch()
    loaded = loading.load_operators()
    assert (loaded.path, loaded.reason) == ("compiled", "prebuilt with the package")
    assert tried == [Path(loaded.library)] == [loading.prebuilt_library(variant)]
    assert caplog.messages == []


def test_one_that_does_not_load_is_said_once_and_the_next_is_taken(package, tried, monkeypatch, caplog):
    has_capability(monkeypatch, "AVX512")
    loading.prebuilt_library("avx512").write_bytes(b"broken")
    loading.prebuilt_library().touch()
    assert loading.load_operators().library == str(loading.prebuilt_library())
    assert len(caplog.messages) == 1
    assert "-avx512.so does not load (undefined symbol: torch_not_there)" in caplog.messages[0]


def test_compiling_comes_after_all_that_is_prebuilt(package, tried, monkeypatch, caplog):
    has_capability(monkeypatch, "DEFAULT")
    loading.prebuilt_library().write_bytes(b"broken")
    compiled = package / "of_the_cache.so"
    compiled.touch()
    monkeypatch.setattr(loading, "build_into_cache", lambda recipe: (compiled, True))
    loaded = loading.load_operators()
    assert (loaded.reason, loaded.library) == ("compiled on this machine", str(compiled))
    assert tried == [loading.prebuilt_library(), compiled]
    assert len(caplog.messages) == 1


def test_a_library_of_other_sources_is_named_and_not_loaded(package, tried, monkeypatch, caplog):
    (package / "ops-0123456789ab.so").touch()
    (package / "ops-cuda-0123456789ab.so").touch()
    with pytest.warns(RuntimeWarning, match="ops-0123456789ab.so was built from other sources; nothing can be"):
        assert loading.load_operators().path == "reference"
    assert tried == []
    assert len(caplog.messages) == 1
    assert "cuda" not in caplog.text


def test_without_any_library_there_is_one_warning_with_cause_and_mend(package, tried, caplog):
    with pytest.warns(
        RuntimeWarning, match=r"in plain PyTorch, .*nothing can be compiled today\. To mend it"
    ) as caught:
        assert loading.load_operators().path == "reference"
    assert len(caught) == 1
    assert caplog.messages == []


def test_the_cache_in_the_home_of_somebody_else_is_no_defect(monkeypatch, tmp_path):
    class Recipe:
        key = "ops-0123"

    def refuse(self):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(Path, "exists", refuse)  # root, who may run this test, may read everything
    with pytest.raises(BuildError, match=r"cannot write .*Permission denied.*; XDG_CACHE_HOME names another place"):
        build_into_cache(Recipe())


def test_a_damaged_library_in_a_cache_that_cannot_be_written_is_left_there(package, monkeypatch):
    damaged = package / "of_the_cache.so"
    damaged.write_bytes(b"not a library")
    monkeypatch.setattr(loading, "build_into_cache", lambda recipe: (damaged, False))

    def refuse(self, missing_ok=False):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "unlink", refuse)
    with pytest.warns(RuntimeWarning, match=r"of_the_cache.so does not load"):
        assert loading.load_operators().path == "reference"


def test_windows_runs_the_reference(monkeypatch):
    monkeypatch.setattr(sys, "platform", "win32")
    with pytest.raises(BuildError, match="not compiled on Windows"):
        find_compiler()


def test_prebuilding_for_avx512_makes_a_second_library(monkeypatch, tmp_path, capsys):
    built = {}
    monkeypatch.setattr(loading, "PREBUILT", tmp_path)
    monkeypatch.setattr(build, "find_compiler", lambda: ["compiler"])
    monkeypatch.setattr(build, "run", lambda command: "compiler 1")
    monkeypatch.setattr(prebuild, "compile_library", lambda target, recipe: built.update({target: recipe.compiler}))
    assert prebuild.main(["--avx512"]) == 0
    assert list(built) == [loading.prebuilt_library(), loading.prebuilt_library("avx512")]
    plain, wide = built.values()
    assert set(wide) - set(plain) == set(AVX512_FLAGS)
    assert "-march=native" not in wide
