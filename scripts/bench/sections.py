"""The five tables of the benchmark. Each function measures one row and returns it as a flat dict for the JSON file."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench import memory
from bench.agreement import HALF_TOLERANCE, compare
from bench.cases import Case
from bench.problem import Problem, bytes_to_move, forward, forward_backward, num_bytes
from bench.steps import Steps
from bench.timing import TOUCHED_BYTES, measure, touch_memory

Row = dict[str, Any]
Pass = Callable[[Callable[..., Tensor], Problem], tuple[Tensor, ...]]

LEAST_COPY_BYTES = 2**24
"""The clone() of a smaller tensor would measure the call and the caches, not the memory."""


@dataclass(frozen=True)
class Settings:
    """What holds for the whole run."""

    device: str
    threads: int
    repeats: int
    is_quick: bool


def passes_of(problem: Problem) -> Iterator[tuple[str, Pass]]:
    """The passes that a problem has, by name; each takes a function and the problem."""
    yield "forward", forward
    if problem.differentiable:
        yield "forward + backward", partial(forward_backward, grad=problem.gradient_of_output())


def against_baseline(case: Case, settings: Settings) -> Iterator[Row]:
    """Our operator, the baseline and a plain copy by turns; one row per pass."""
    problem = case.problem(settings.device, torch.float32, settings.is_quick)
    extra_bytes = memory.peak_extra_bytes(case.full_name, settings.device, settings.threads, settings.is_quick)
    if settings.device == "cpu" and not settings.is_quick:
        touch_memory(TOUCHED_BYTES)
    for name, run in passes_of(problem):
        row: Row = {"op": case.op, "name": case.name, "pass": name, "work": case.work}
        row |= measure_pass(problem, run, extra_bytes.get(name), settings)
        bars = case.forward_bars if name == "forward" else case.backward_bars
        yield row | {"bars": [bar.judge(row.get(bar.quantity)) for bar in bars]}


def measure_pass(problem: Problem, run: Pass, extra_bytes: int | None, settings: Settings) -> Row:
    """Times, floor, memory and agreement of one pass.

    The floor is the least traffic at the copy's rate. The copy is clone() of a tensor as large as the output, or of
    LEAST_COPY_BYTES if that is more; what it reads counts, and what it writes.
    """
    copied_bytes = max(LEAST_COPY_BYTES, num_bytes(*forward(problem.ours, problem)))
    source = torch.ones(copied_bytes, dtype=torch.uint8, device=problem.device)

    def copy_once() -> None:
        source.clone()

    contenders: dict[str, Callable[[], Any]] = {"ours": partial(run, problem.ours, problem), "copy": copy_once}
    if problem.baseline is not None:
        contenders["baseline"] = partial(run, problem.baseline, problem)
    timings = measure(contenders, problem.device, settings.repeats, baseline="baseline" if problem.baseline else None)
    ours, copy, baseline = (timings.get(name) for name in ("ours", "copy", "baseline"))
    assert ours is not None
    assert copy is not None
    rate = 2 * copied_bytes / copy.median
    floor_s = bytes_to_move(problem, ours.result) / rate
    results_bytes = num_bytes(*ours.result)
    row: Row = {
        "ours_ms": ours.median * 1e3,
        "ours_runs_ms": ours.runs_ms,
        "copy_gb_per_s": rate / 1e9,
        "floor_ms": floor_s * 1e3,
        "times_floor": ours.median / floor_s,
        "fraction_of_copy_rate": floor_s / ours.median,
        "results_mb": results_bytes / 1e6,
    }
    if extra_bytes is not None:
        row |= {"extra_mb": extra_bytes / 1e6, "extra_of_results": extra_bytes / results_bytes}
    if baseline is not None:
        row |= {
            "baseline": problem.baseline_name,
            "baseline_ms": baseline.median * 1e3,
            "baseline_runs_ms": baseline.runs_ms,
            "ratio": baseline.median / ours.median,
            "agreement": compare(ours.result, baseline.result, problem).as_json(),
        }
    return row


def two_ways(problems: dict[str, Problem], settings: Settings, quantity: str, limit: float) -> Iterator[Row]:
    """Our operator on two problems by turns, in time per unit of work; the quotient second / first has a limit.

    One problem in two dtypes should have one result; that is compared too.
    """
    (first_key, first), (second_key, second) = problems.items()
    for (name, run_first), (_, run_second) in zip(passes_of(first), passes_of(second), strict=True):
        contenders = {
            first_key: partial(run_first, first.ours, first),
            second_key: partial(run_second, second.ours, second),
        }
        timings = measure(contenders, first.device, settings.repeats)
        row: Row = {"pass": name, "unit": first.unit}
        for key, problem in problems.items():
            row[f"{key}_ms"] = timings[key].median * 1e3
            row[f"{key}_runs_ms"] = timings[key].runs_ms
            row[f"{key}_ns_per_unit"] = timings[key].median / problem.num_units * 1e9
        row[quantity] = row[f"{second_key}_ns_per_unit"] / row[f"{first_key}_ns_per_unit"]
        if first.inputs[0].dtype != second.inputs[0].dtype:
            agreement = compare(timings[second_key].result, timings[first_key].result, first, HALF_TOLERANCE)
            row["agreement"] = agreement.as_json()
        del timings  # the results are large, and the next pass needs the memory
        yield row | {"bar": f"<= {limit:g}", "met": row[quantity] <= limit}


def anisotropic(case: Case, settings: Settings) -> Iterator[Row]:
    """Cubic against elongated volumes."""
    changed = case.quick_anisotropic if settings.is_quick else case.anisotropic
    make = partial(case.problem, settings.device, torch.float32, settings.is_quick)
    for row in two_ways({"cubic": make(), "anisotropic": make(**changed)}, settings, "anisotropic_over_cubic", 1.2):
        yield {"op": case.op, "name": case.name, **row}


def bfloat16(case: Case, settings: Settings) -> Iterator[Row]:
    """float32 against bfloat16."""
    changed = {"rounded": True} if case.op == "nms3d" else {}
    problems = {
        str(dtype).removeprefix("torch."): case.problem(settings.device, dtype, settings.is_quick, **changed)
        for dtype in (torch.float32, torch.bfloat16)
    }
    for row in two_ways(problems, settings, "bfloat16_over_float32", 1.0):
        yield {"op": case.op, "name": case.name, **row}


def growth(steps: Steps, settings: Settings) -> Iterator[Row]:
    """Our passes while one size grows step by step, all steps by turns; each step against the one before."""
    problems = {
        size: steps.make(settings.device, torch.float32, **{**steps.base, **changed})
        for size, changed in steps.changes.items()
    }
    rows: dict[str, Row] = {
        size: {"op": steps.op, "symbol": steps.symbol, "size": size, "work": steps.work} for size in problems
    }
    passes = {size: dict(passes_of(problem)) for size, problem in problems.items()}
    device = torch.device(settings.device)
    for name in next(iter(passes.values())):
        contenders = {size: partial(passes[size][name], problem.ours, problem) for size, problem in problems.items()}
        before = None
        for size, timing in measure(contenders, device, settings.repeats).items():
            rows[size] |= {f"{name}_ms": timing.median * 1e3, f"{name}_runs_ms": timing.runs_ms}
            if before is not None:
                factor = timing.median / before
                rows[size][f"{name}_factor"] = factor
                if steps.limit is not None:
                    rows[size] |= {"bar": f"<= {steps.limit:g}x the step before", "met": factor <= steps.limit}
            before = timing.median
    yield from rows.values()
