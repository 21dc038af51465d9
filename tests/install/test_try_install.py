"""`scripts/try_install` says what cannot be had, and reads the path of the operators from what doctor prints."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "scripts"))
try:
    from installing.self_test import operators
    from installing.try_install import Row, find_python, table
finally:
    sys.path.remove(str(ROOT / "scripts"))

STEPS = ("help", "check", "train", "predict", "result")


def run(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(ROOT / "scripts" / "try_install"), *words], capture_output=True, text=True)


def test_a_python_that_is_not_there_is_a_row_and_no_failure(tmp_path):
    wheel = tmp_path / "seg3d_monai-1.0-py3-none-any.whl"
    wheel.touch()
    done = run("--wheel", str(wheel), "--python", "3.999", "--torch", "2.10.0", "2.13.0")
    assert done.returncode == 0, done.stderr
    header, *rows = done.stdout.splitlines()
    assert header.split() == ["wheel", "python", "torch", "extras", "ops", *STEPS]
    assert [row.split()[:3] for row in rows] == [["pure", "3.999", "2.10.0"], ["pure", "3.999", "2.13.0"]]
    assert all("not to be had: no python3.999 that runs" in row for row in rows)


def test_a_wheel_that_is_not_there_is_an_error(tmp_path):
    done = run("--wheel", str(tmp_path / "none.whl"))
    assert done.returncode == 2
    assert "try_install: error: no such file" in done.stderr


def test_an_interpreter_is_found_by_its_path():
    version = ".".join(map(str, sys.version_info[:3]))
    assert find_python(sys.executable) == (sys.executable, version)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("ops              nms3d: compiled on cpu (site/seg3d_monai/_lib/ops-0123.so)", "prebuilt"),
        ("ops              nms3d: compiled on cpu (site/seg3d_monai/_lib/ops-0123-avx512.so)", "prebuilt AVX-512"),
        ("ops              nms3d: compiled on cpu (home/.cache/seg3d_monai/ops-0123-4567.so)", "compiled"),
        ("ops              nms3d: reference on cpu (SEG3D_OPS=reference)", "reference"),
        ("torch            2.13.0", "?"),
    ],
)
def test_the_path_of_the_operators_is_read_from_doctor(line, expected):
    assert operators(f"torch 2.13.0\n{line}\n") == expected


def test_columns_of_the_table_are_aligned():
    row = Row("prebuilt", "3.11.2", "2.10.0", seconds={"help": 0.14})
    lines = table([row, Row("pure", "3.13", "2.13.0")]).splitlines()
    assert [line.index("2.1") for line in lines[1:]] == [lines[0].index("torch")] * 2
    assert "0.1 s" in lines[1]
