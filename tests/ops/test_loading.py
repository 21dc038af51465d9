import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch

from seg3d_monai.ops import build, loading, prebuild, registration, status
from seg3d_monai.ops.build import BuildError, build_into_cache, cpu_recipe
from seg3d_monai.ops.schemas import SCHEMAS

RUN = """
import warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    from seg3d_monai.ops import nms3d, status
    import seg3d_monai.ops.registration
    import torch
    boxes = torch.tensor([[0, 0, 0, 2, 3, 4], [0, 0, 0, 2, 3, 4], [5, 0, 0, 7, 3, 4.0]])
    kept = nms3d(boxes, torch.tensor([0.1, 0.3, 0.2]), 0.5).tolist()
print("path", status()[0]["path"], "kept", kept, "warnings", sum("seg3d_monai" in str(w.message) for w in caught))
"""
PACKAGED_LIBRARY = loading.prebuilt_library()
FORK = multiprocessing.get_context("fork")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache and no prebuilt library, for this process and its children."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("SEG3D_OPS", raising=False)
    monkeypatch.setattr(loading, "PREBUILT", tmp_path / "no_prebuilt")
    return tmp_path / "cache" / "seg3d_monai"


@pytest.fixture
def csrc(tmp_path, monkeypatch):
    """Sources that compile at once, in place of the operators'; without registrations a library loads many times."""
    folder = tmp_path / "csrc"
    (folder / "cpu").mkdir(parents=True)
    (folder / "constant.h").write_text("#pragma once\n#define ANSWER 7\n")
    (folder / "one.cpp").write_text('#include "constant.h"\nint one() { return ANSWER; }\n')
    (folder / "cpu" / "two.cpp").write_text('#include "constant.h"\nint two() { return ANSWER + 1; }\n')
    monkeypatch.setattr(build, "CSRC", folder)
    return folder


@pytest.fixture
def make_compiler(csrc, tmp_path, monkeypatch):
    """Set $CXX to a script around the real compiler that logs each compiled file."""
    real = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if real is None:
        pytest.skip("no C++ compiler on this machine")

    def make(before_compiling=""):
        script = tmp_path / "compiler"
        script.write_text(
            f'#!/bin/sh\ncase " $* " in *" -c "*) echo compiled >> "{tmp_path}/log"; {before_compiling}\n;; esac\n'
            f'exec {real} "$@"\n'
        )
        script.chmod(0o755)
        monkeypatch.setenv("CXX", str(script))
        return script

    return make


def compiled_files(tmp_path):
    log = tmp_path / "log"
    return len(log.read_text().splitlines()) if log.exists() else 0


def run_python(code, **environment):
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **environment}, timeout=120
    )
    assert result.returncode == 0, result.stderr
    return result


def test_status_names_each_public_operator():
    rows = status()
    boxes, dense = ["roi_align3d", "nms3d", "batched_nms3d"], ["ms_deform_attn3d", "layer_norm", "group_norm"]
    names = [*boxes, "match_boxes3d", "mask_targets3d", "paste_masks3d", "label_pairs", "label_extents", *dense]
    assert [row["op"] for row in rows if row["device"] == "cpu"] == names
    assert [row["op"] for row in rows if row["device"] == "cuda"] == names * torch.cuda.is_available()
    on_cpu = [row for row in rows if row["device"] == "cpu"]
    assert all(row["path"] == registration.LOADED.path and row["reason"] for row in on_cpu)
    assert all((row["library"] is not None) == (row["path"] == "compiled") for row in rows)


@pytest.mark.parametrize("name", SCHEMAS)
def test_library_and_python_declare_the_same_schema(name):
    assert str(getattr(torch.ops.seg3d, name).default._schema) == f"seg3d::{name}{SCHEMAS[name]}"


def test_the_cache_is_used_again_and_a_changed_header_makes_a_new_library(cache, csrc, make_compiler, tmp_path):
    make_compiler()
    library, is_new = build_into_cache(cpu_recipe())
    assert is_new
    assert library.parent == cache
    assert compiled_files(tmp_path) == 2
    assert build_into_cache(cpu_recipe()) == (library, False)
    assert compiled_files(tmp_path) == 2
    prebuilt = loading.prebuilt_library()
    (csrc / "constant.h").write_text("#pragma once\n#define ANSWER 9\n")
    assert loading.prebuilt_library() != prebuilt
    changed, is_new = build_into_cache(cpu_recipe())
    assert is_new
    assert changed != library


@pytest.mark.parametrize("change", ["flags", "torch", "processor", "compiler"])
def test_the_key_holds_all_that_the_library_depends_on(change, monkeypatch):
    monkeypatch.setattr(build, "run", lambda command: "compiler 1")
    before = cpu_recipe().key
    assert cpu_recipe().key == before
    if change == "flags":
        monkeypatch.setattr(build, "FLAGS", (*build.FLAGS, "-g"))
    elif change == "torch":
        monkeypatch.setattr(torch, "__version__", "2.99.0")
    elif change == "processor":
        monkeypatch.setattr(build, "_processor", lambda: "another processor")
    else:
        monkeypatch.setattr(build, "run", lambda command: "compiler 2")
    assert cpu_recipe().key != before


def build_and_answer(answers, start):
    start.wait()
    answers.put(build_into_cache(cpu_recipe())[1])


def test_two_processes_build_once(cache, make_compiler, tmp_path):
    make_compiler(before_compiling="sleep 0.3")
    answers, start = FORK.Queue(), FORK.Barrier(2)
    processes = [FORK.Process(target=build_and_answer, args=(answers, start)) for _ in range(2)]
    for process in processes:
        process.start()
    assert sorted(answers.get(timeout=60) for _ in processes) == [False, True]
    for process in processes:
        process.join()
    assert compiled_files(tmp_path) == 2
    assert [file.suffix for file in sorted(cache.iterdir())] == [".lock", ".so"]


def build_in_own_session():
    os.setsid()
    build_into_cache(cpu_recipe())


def test_a_killed_build_leaves_nothing_that_harms_the_next(cache, make_compiler, tmp_path):
    make_compiler(before_compiling="sleep 60")
    process = FORK.Process(target=build_in_own_session)
    process.start()
    deadline = time.monotonic() + 60
    while compiled_files(tmp_path) == 0 and time.monotonic() < deadline:
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.join()
    assert not list(cache.glob("*.so"))
    assert list(cache.glob("*.build-*"))
    make_compiler()
    library, is_new = build_into_cache(cpu_recipe())
    assert is_new
    assert library.exists()
    assert not list(cache.glob("*.build-*"))


def test_a_damaged_library_in_the_cache_is_built_anew(cache, make_compiler, caplog):
    make_compiler()
    library, _ = build_into_cache(cpu_recipe())
    library.write_bytes(b"not a library")
    loaded = loading.load_operators()
    assert (loaded.path, loaded.library) == ("compiled", str(library))
    assert library.stat().st_size > 1000
    assert "rebuilding the compiled operators" in caplog.text


def test_the_first_compilation_is_said_in_one_line(cache, make_compiler, caplog):
    make_compiler()
    assert loading.load_operators().reason == "compiled on this machine"
    assert len(caplog.messages) == 1
    assert "this happens once" in caplog.text
    assert loading.load_operators().reason == "compiled earlier on this machine"
    assert len(caplog.messages) == 1


def test_reference_can_be_forced(cache):
    result = run_python(RUN, SEG3D_OPS="reference", CXX="/nonexistent/compiler")
    assert result.stdout.strip() == "path reference kept [1, 2] warnings 0"
    assert not cache.exists()


def test_without_a_compiler_there_is_one_warning_and_the_reference(cache):
    result = run_python(RUN, CXX="/nonexistent/compiler")
    if PACKAGED_LIBRARY.exists():
        assert result.stdout.strip() == "path compiled kept [1, 2] warnings 0"
    else:
        assert result.stdout.strip() == "path reference kept [1, 2] warnings 1"


def test_the_warning_names_the_cause_and_the_mend(cache, monkeypatch):
    monkeypatch.setenv("CXX", "/nonexistent/compiler")
    with pytest.warns(
        RuntimeWarning, match=r"CXX=/nonexistent/compiler was not found.*install a C\+\+ compiler"
    ) as caught:
        loaded = loading.load_operators()
    assert len(caught) == 1
    assert (loaded.path, loaded.library) == ("reference", None)
    assert "was not found" in loaded.reason


def test_a_compiler_that_fails_is_quoted(cache, make_compiler):
    make_compiler(before_compiling="echo 'trilinear.h:1: error: no such luck' >&2; exit 3")
    with pytest.warns(RuntimeWarning, match="failed with status 3: trilinear.h:1: error: no such luck"):
        assert loading.load_operators().path == "reference"
    assert not list(cache.glob("*.so"))
    assert not list(cache.glob("*.build-*"))


def test_a_cache_that_cannot_be_written_is_named(make_compiler, tmp_path, monkeypatch):
    make_compiler()
    (tmp_path / "a_file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "a_file"))
    with pytest.raises(BuildError, match=r"cannot write .*a_file"):
        build_into_cache(cpu_recipe())


def test_forcing_the_compiled_operators_where_they_cannot_be_is_an_error(cache, monkeypatch):
    monkeypatch.setenv("SEG3D_OPS", "compiled")
    monkeypatch.setenv("CXX", "/nonexistent/compiler")
    with pytest.raises(RuntimeError, match=r"SEG3D_OPS=compiled, but .* was not found; install a C"):
        loading.load_operators()


def test_an_unknown_choice_is_an_error(monkeypatch):
    monkeypatch.setenv("SEG3D_OPS", "fast")
    with pytest.raises(ValueError, match="SEG3D_OPS='fast' is not known; set it to 'compiled' or 'reference'"):
        loading.load_operators()


def test_a_prebuilt_library_comes_first_and_a_broken_one_is_said_and_left(cache, make_compiler, monkeypatch, caplog):
    make_compiler()
    loading.PREBUILT.mkdir()
    loading.prebuilt_library().write_bytes(b"not a library")
    monkeypatch.setattr(loading, "build_into_cache", lambda recipe: (_ for _ in ()).throw(BuildError("no cache today")))
    with pytest.warns(RuntimeWarning, match="does not load .*; no cache today"):
        loading.load_operators()
    assert "the prebuilt operators are left aside" in caplog.text
    monkeypatch.setattr(torch.ops, "load_library", lambda path: None)
    loaded = loading.load_operators()
    assert (loaded.path, loaded.library) == ("compiled", str(loading.prebuilt_library()))
    loading.prebuilt_library().rename(loading.PREBUILT / "ops-0123456789ab.so")
    with pytest.warns(RuntimeWarning, match="no cache today"):
        assert loading.load_operators().path == "reference"


def test_prebuilding_replaces_the_library_of_older_sources(cache, make_compiler, capsys, monkeypatch):
    make_compiler()
    loading.PREBUILT.mkdir()
    old = loading.PREBUILT / "ops-0123456789ab.so"
    old.touch()
    assert prebuild.main([]) == 0
    assert capsys.readouterr().out.strip() == str(loading.prebuilt_library())
    assert list(loading.PREBUILT.iterdir()) == [loading.prebuilt_library()]
    assert loading.load_operators().reason == "prebuilt with the package"
    monkeypatch.setenv("CXX", "/nonexistent/compiler")
    assert prebuild.main([]) == 1
    assert "CXX=/nonexistent/compiler was not found" in capsys.readouterr().err


def test_importing_the_package_does_not_load_the_operators():
    result = run_python("import sys, seg3d_monai; print('torch' in sys.modules, 'seg3d_monai.ops' in sys.modules)")
    assert result.stdout.split() == ["False", "False"]
