"""scripts/bench_ops: it runs on tiny sizes, writes what it promises, and its instruments read true."""

import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

SCRIPTS = Path(__file__).resolve().parents[1] / "scripts"
BARS = [
    ("roi_align3d", "box"),
    ("roi_align3d", "box_split"),
    ("roi_align3d", "mask"),
    ("roi_align3d", "adaptive"),
    ("nms3d", "scattered_20k"),
    ("nms3d", "scattered_1m"),
    ("nms3d", "clusters"),
    ("ms_deform_attn3d", "self"),
    ("ms_deform_attn3d", "self_local"),
    ("ms_deform_attn3d", "cross"),
    ("layer_norm", "maps"),
    ("group_norm", "maps"),
]
VARIED = [row for row in BARS if row[1] in ("box", "mask", "adaptive", "scattered_20k", "self", "cross")]
HALVED = [*VARIED, ("layer_norm", "maps"), ("group_norm", "maps")]


def run_bench(*words: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(SCRIPTS / "bench_ops"), *words],
        env={**os.environ, "PYTHON": sys.executable},
        capture_output=True,
        text=True,
        check=check,
    )


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """Report and JSON of one quick run."""
    file = tmp_path_factory.mktemp("bench") / "deeper" / "quick.json"
    shown = run_bench("--quick", "--repeats", "3", "--json", str(file))
    return shown.stdout, json.loads(file.read_text())


@pytest.fixture
def bench(monkeypatch):
    """The folder of the benchmark's modules, importable."""
    monkeypatch.syspath_prepend(str(SCRIPTS))


def passes(op: str) -> list[str]:
    return ["forward"] if op == "nms3d" else ["forward", "forward + backward"]


def test_says_where_it_was_measured(quick):
    shown, result = quick
    assert result["is_quick"] is True
    assert result["threads"] == 2
    assert result["command"].startswith("scripts/bench_ops --quick")
    assert {"cpu", "cores", "memory_gb"} <= set(result["hardware"])
    assert result["versions"]["torch"] == torch.__version__
    assert {"python", "monai", "seg3d_monai", "compiler"} <= set(result["versions"])
    assert {"roi_align3d", "nms3d", "ms_deform_attn3d"} <= {op["op"] for op in result["operators"]}
    assert all("/" not in (op["library"] or "") for op in result["operators"])
    assert result["date"][:10] in shown


def test_rows_of_the_bars(quick):
    _, result = quick
    assert [(row["op"], row["name"], row["pass"]) for row in result["bars"]] == [
        (op, name, each) for op, name in BARS for each in passes(op)
    ]
    for row in result["bars"]:
        has_baseline = row["name"] != "scattered_1m"
        keys = ["ours_ms", "floor_ms", "times_floor", "fraction_of_copy_rate", "copy_gb_per_s", "results_mb"]
        for key in keys + ["baseline_ms", "ratio"] * has_baseline:
            assert math.isfinite(row[key]), (row["name"], key)
            assert row[key] > 0, (row["name"], key)
        assert len(row["ours_runs_ms"]) >= 3
        if sys.platform == "linux":
            assert row["extra_mb"] >= 0
        for bar in row["bars"]:
            assert set(bar) == {"bar", "value", "met"}


def test_what_is_compared_computes_the_same(quick):
    shown, result = quick
    compared = [row for row in result["bars"] + result["bfloat16"] if "agreement" in row]
    assert len(compared) == 20 + 15
    assert [row for row in compared if not row["agreement"]["agrees"]] == []
    assert "DIFFERENT" not in shown


def test_variants(quick):
    _, result = quick
    for section in ("anisotropic", "bfloat16"):
        rows = result[section]
        assert [(row["op"], row["name"], row["pass"]) for row in rows] == [
            (op, name, each) for op, name in (VARIED if section == "anisotropic" else HALVED) for each in passes(op)
        ]
        quotient = "anisotropic_over_cubic" if section == "anisotropic" else "bfloat16_over_float32"
        assert all(0 < row[quotient] < math.inf and isinstance(row["met"], bool) for row in rows)


def test_growth(quick):
    _, result = quick
    assert [row["size"] for row in result["tenfold"]] == ["100", "1,000"]
    assert isinstance(result["tenfold"][1]["met"], bool)
    symbols = {(row["op"], row["symbol"].split()[0]) for row in result["doubling"]}
    assert symbols >= {("roi_align3d", "K"), ("roi_align3d", "C"), ("roi_align3d", "out"), ("nms3d", "n")}
    assert symbols >= {("ms_deform_attn3d", "Lq"), ("ms_deform_attn3d", "L")}
    for row in result["doubling"]:
        times = [value for key, value in row.items() if key.endswith(("forward_ms", "backward_ms", "_factor"))]
        assert times
        assert all(0 < value < math.inf for value in times)


def test_only_chooses_rows():
    listed = run_bench("--list", "--only", "bars/nms3d", "--only", "tenfold").stdout.split()
    assert listed == [
        "bars/nms3d/scattered_20k",
        "bars/nms3d/scattered_1m",
        "bars/nms3d/clusters",
        "tenfold/nms3d/n_scattered",
    ]


@pytest.mark.parametrize(
    ("words", "message"),
    [(["--only", "nsm3d"], "--only nsm3d names no row"), (["--threads", "0"], "--threads and --repeats")],
)
def test_refuses_in_one_line(words, message):
    shown = run_bench(*words, check=False)
    assert shown.returncode == 2
    assert message in shown.stderr
    assert shown.stderr.count("\n") == 1


@pytest.mark.usefixtures("bench")
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the system does not tell a process its peak")
def test_extra_memory_is_what_a_call_takes_and_gives_back():
    from bench.memory import measure_here
    from bench.problem import Problem

    def wasteful(x: torch.Tensor) -> torch.Tensor:
        scratch = torch.ones(100 * len(x))
        return x + scratch[: len(x)]

    def problem(length: int) -> Problem:
        return Problem(
            ours=wasteful,
            baseline=None,
            baseline_name="",
            input_names=("x",),
            inputs=(torch.ones(length),),
            output_shape=(length,),
            differentiable=(),
            read_by_backward=(),
            num_units=length,
            unit="numbers",
        )

    extra = measure_here(problem(1_000_000), problem(1_000))["forward"]
    assert extra == pytest.approx(400e6, rel=0.03)


@pytest.mark.usefixtures("bench")
def test_bytes_to_move():
    from bench.cases import CASES
    from bench.problem import bytes_to_move, forward, forward_backward

    case = next(case for case in CASES if case.name == "box")
    problem = case.problem("cpu", torch.float32, is_quick=True)
    features, boxes, output = 2 * 8 * 8**3 * 4, 16 * (6 * 4 + 8), 16 * 8 * 3**3 * 4
    assert bytes_to_move(problem, forward(problem.ours, problem)) == features + boxes + output
    both = forward_backward(problem.ours, problem, problem.gradient_of_output())
    # Back: the output's gradient and the boxes in, the features' gradient out.
    assert bytes_to_move(problem, both) == 2 * (features + boxes + output)


@pytest.mark.usefixtures("bench")
def test_a_difference_is_seen():
    from bench.agreement import compare
    from bench.cases import CASES

    by_name = {case.name: case.problem("cpu", torch.float32, is_quick=True) for case in CASES}
    one = torch.linspace(-1, 1, 100_000)
    off = one.clone()
    off[5] += 1e-2
    assert compare((one,), (one,), by_name["box"]).agrees
    assert not compare((one,), (off,), by_name["box"]).agrees
    assert not compare((one,), (one[:-1],), by_name["box"]).agrees
    assert not compare((one, one), (one, off), by_name["box"]).agrees
    # Gradients of attention: value, locations (may jump in few places), weights.
    assert compare((one, one, one, one), (one, one, off, one), by_name["self"]).agrees
    assert not compare((one, one, one, one), (one, off, one, one), by_name["self"]).agrees
    assert not compare((one, one, one, one), (one, one, -one, one), by_name["self"]).agrees
    kept = torch.tensor([4, 2, 7])
    assert compare((kept,), (kept,), by_name["clusters"]).agrees
    assert "ordered differently" in compare((kept,), (kept.flip(0),), by_name["clusters"]).words
    assert not compare((kept,), (kept[:2],), by_name["clusters"]).agrees


@pytest.mark.usefixtures("bench")
def test_contenders_take_turns_and_a_slow_baseline_runs_once(monkeypatch):
    from bench import timing

    order: list[str] = []

    def contender(name: str, seconds: float):
        def run() -> str:
            order.append(name)
            time.sleep(seconds)
            return name

        return run

    contenders = {name: contender(name, 0.001) for name in ("ours", "copy", "baseline")}
    timings = timing.measure(contenders, torch.device("cpu"), 4, baseline="baseline")
    assert order[-12:] == ["ours", "copy", "baseline"] * 4
    assert [len(timings[name].seconds) for name in contenders] == [4, 4, 4]
    assert timings["baseline"].result == "baseline"

    order.clear()
    monkeypatch.setattr(timing, "SLOW_S", 0.05)
    contenders["baseline"] = contender("baseline", 0.1)
    timings = timing.measure(contenders, torch.device("cpu"), 4, baseline="baseline")
    assert order == ["ours", "copy"] * 3 + ["baseline"] + ["ours", "copy"] * 2
    assert timings["baseline"].median >= 0.1
    assert len(timings["ours"].seconds) == 4


@pytest.mark.usefixtures("bench")
def test_bars():
    from bench.cases import Bar, at_least

    assert at_least(50).is_met(50)
    assert not at_least(50).is_met(49.9)
    assert Bar("times_floor", 5).is_met(5)
    assert not Bar("times_floor", 5).is_met(5.1)
    assert Bar("extra_of_results", 0.1).words == "extra memory <= 10% of the results"
