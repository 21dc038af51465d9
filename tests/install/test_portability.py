"""What other systems lack: modules of Unix alone, Linux's calls, characters in names of files."""

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

from seg3d_monai import cli_data
from seg3d_monai.inference.workers import BlockWorker

ROOT = Path(__file__).resolve().parents[2]
UNIX_ONLY = ("fcntl", "resource", "pwd", "grp", "termios", "syslog")
IMPORT_ALL = """
import builtins, importlib, pkgutil, sys

blocked = set(sys.argv[1:])
original = builtins.__import__

def guarded(name, globals=None, locals=None, fromlist=(), level=0):
    # Other packages know of their system themselves.
    if name in blocked and (globals or {}).get("__name__", "").startswith("seg3d_monai"):
        raise ImportError(f"No module named {name!r}", name=name)
    return original(name, globals, locals, fromlist, level)

builtins.__import__ = guarded
import seg3d_monai

modules = [found.name for found in pkgutil.walk_packages(seg3d_monai.__path__, "seg3d_monai.")]
for module in modules:
    if not module.endswith("__main__"):
        importlib.import_module(module)
print(len(modules))
"""


def test_every_module_imports_without_modules_of_unix_alone(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "SEG3D_OPS": "reference"}
    command = [sys.executable, "-c", IMPORT_ALL, *UNIX_ONLY]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 200


def test_the_number_of_cpus_is_known_where_a_process_has_no_affinity(monkeypatch):
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    assert cli_data._num_cpus() == os.cpu_count()


def test_peak_memory_is_bytes_on_linux_and_zero_where_the_system_does_not_tell(monkeypatch):
    assert BlockWorker.peak_memory(None) > 50e6
    monkeypatch.setitem(sys.modules, "resource", None)
    assert BlockWorker.peak_memory(None) == 0


def test_names_of_files_hold_on_every_system():
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        names = [
            str(path.relative_to(ROOT)) for folder in ("seg3d_monai", "bundles") for path in ROOT.glob(f"{folder}/**/*")
        ]
    else:
        names = [name for name in listed.stdout.split("\0") if name]
    assert [name for name in names if set(name) & set('<>:"|?*\\') or name.endswith((".", " "))] == []
    reserved = {"con", "prn", "aux", "nul", *(f"{kind}{n}" for kind in ("com", "lpt") for n in range(1, 10))}
    assert [name for name in names if {part.split(".")[0].lower() for part in name.split("/")} & reserved] == []
    assert [name for name, count in Counter(map(str.lower, names)).items() if count > 1] == []
