"""The shim itself: a kernel without fault runs clean, and planted faults come to light."""

import pytest
import shim_runner
import torch

THREADS = 96


def values(count=THREADS):
    return torch.arange(1, count + 1, dtype=torch.float32)


def test_a_kernel_without_fault_runs_clean_and_its_traffic_is_counted(tmp_path):
    for seed in range(3):
        run = shim_runner.run("run_planted", tmp_path, {"in": values()}, seed, fault="none")
        assert torch.equal(run.array("result", torch.float32), values().flip(0))
        # Three warps read and write 128 bytes each.
        assert (run.sectors, run.least) == (3 * 8, 3 * 8)


@pytest.mark.parametrize("fault", ["no_barrier", "no_warp_barrier"])
def test_a_missing_barrier_gives_a_wrong_result(tmp_path, fault):
    expected = values().flip(0) if fault == "no_barrier" else values().reshape(3, 32).flip(1).flatten()
    for seed in range(3):
        run = shim_runner.run("run_planted", tmp_path, {"in": values()}, seed, fault=fault)
        assert not torch.equal(run.array("result", torch.float32), expected)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("out_of_bounds", "heap-buffer-overflow"),
        ("shared_out_of_bounds", "out of bounds"),
        ("early_exit", "threads wait for each other for ever"),
    ],
)
def test_a_fault_ends_the_run_with_its_name(tmp_path, fault, message):
    result = shim_runner.start("run_planted", tmp_path, {"in": values()}, fault=fault)
    assert result.returncode != 0
    assert message in result.stderr


def test_strided_reads_touch_more_sectors_than_needed(tmp_path):
    run = shim_runner.run("run_planted", tmp_path, {"in": values(THREADS * 32)}, fault="strided")
    # Each lane reads 4 bytes of a sector of its own; the writes are dense.
    assert (run.sectors, run.least) == (3 * (32 + 4), 3 * (4 + 4))
