"""Loaders that stop and go on: the same batches as without the stop, and nothing read twice."""

import json
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset

from seg3d_monai.data import CropLoader
from seg3d_monai.engine.trainer import _StepLoader


class Toy(Dataset[dict[str, Any]]):
    """Crops that hold their epoch and position, and a list of those that were read in this process."""

    seed = 5

    def __init__(self, num_samples: int = 11) -> None:
        self.num_samples = num_samples
        self.reads: list[tuple[int, int]] = []

    def __len__(self) -> int:
        return self.num_samples

    def __getitem__(self, item: tuple[int, int]) -> dict[str, Any]:
        self.reads.append(item)
        image = torch.tensor(item, dtype=torch.float32).reshape(2, 1, 1, 1)
        return {"image": image, "targets": {}, "crop_id": 0, "volume": "v", "roi": (0,) * 6}


def contents(batches: Any) -> list[list[list[float]]]:
    return [batch["image"].flatten(1).tolist() for batch in batches]


def epochs(loader: CropLoader, last: int) -> list[list[list[float]]]:
    """All batches from where the loader stands to the end of an epoch, as its docstring has it."""
    found = []
    for epoch in range(loader.epoch, last + 1):
        loader.set_epoch(epoch)
        found += contents(loader)
    return found


class Wasteful(Toy):
    """Its images tell how many MiB more are resident after 48 MiB were freed from between small things."""

    def __getitem__(self, item: tuple[int, int]) -> dict[str, Any]:
        before = resident()
        arrays = [(np.ones(6 * 2**20, np.uint8), np.ones(100_000, np.uint8)) for _ in range(8)]
        self.small = [small for _, small in arrays]
        del arrays
        growth = torch.full((1, 1, 1, 1), (resident() - before) / 1024)
        return {**super().__getitem__(item), "image": growth}


def resident() -> int:
    """KiB of this process."""
    found = re.search(r"VmRSS:\s*(\d+)", Path("/proc/self/status").read_text(encoding="utf-8"))
    assert found
    return int(found[1])


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux tells what a process keeps")
def test_a_worker_keeps_nothing_that_it_frees() -> None:
    loader = CropLoader(Wasteful(5), batch_size=1, num_workers=1)
    assert max(float(batch["image"]) for batch in loader) < 6


@pytest.mark.parametrize("workers", [(0, 0), (0, 2), (2, 0)])
@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("num_batches", [0, 1, 3, 4])
def test_a_loader_goes_on_where_another_stopped(workers: tuple[int, int], shuffle: bool, num_batches: int) -> None:
    if max(workers) > 0 and num_batches == 1:
        return  # starting processes takes its time, and 3 says the same
    options: dict[str, Any] = {"batch_size": 3, "shuffle": shuffle}
    expected = epochs(CropLoader(Toy(), **options), 2)
    assert len(expected) == 12
    first = CropLoader(Toy(), num_workers=workers[0], **options)
    first.set_epoch(1)
    iteration = iter(first)
    seen = contents(next(iteration) for _ in range(num_batches))
    state = json.loads(json.dumps(first.state_dict()))
    assert seen == expected[4 : 4 + num_batches]

    dataset = Toy()
    second = CropLoader(dataset, num_workers=workers[1], **options)
    second.load_state_dict(state)
    assert second.state_dict() == state
    assert epochs(second, 2) == expected[4 + num_batches :]
    if workers[1] == 0:
        assert len(dataset.reads) == 22 - min(11, 3 * num_batches)


def test_ranks_go_on_alike() -> None:
    def loader(rank: int) -> CropLoader:
        return CropLoader(Toy(), batch_size=2, shuffle=True, rank=rank, num_replicas=2)

    expected = [contents(loader(rank)) for rank in range(2)]
    halted = loader(0)
    next(iter(halted))
    for rank in range(2):
        again = loader(rank)
        again.load_state_dict(halted.state_dict())
        assert contents(again) == expected[rank][1:]


def test_where_a_loader_stands() -> None:
    loader = CropLoader(Toy(), batch_size=4)

    def place() -> tuple[object, object]:
        state = loader.state_dict()
        return state["epoch"], state["batch"]

    assert place() == (0, 0)
    iteration = iter(loader)
    next(iteration)
    assert place() == (0, 1)
    next(iteration)
    next(iteration)
    assert place() == (1, 0)  # all was handed out, whether or not anybody asked for more
    loader.set_epoch(7)
    assert place() == (7, 0)
    loader.skip(2)
    loader.set_epoch(7)
    assert place() == (7, 2)
    assert contents(loader) == [[[7, 8], [7, 9], [7, 10]]]
    assert place() == (8, 0)
    assert len(contents(loader)) == 3  # a skip counts once
    loader.skip(3)
    assert contents(loader) == []
    loader.skip(1)
    loader.set_epoch(8)  # of another epoch nothing was seen
    assert len(contents(loader)) == 3
    loader.skip(0)
    assert len(contents(loader)) == 3
    for number in (-1, 4):
        with pytest.raises(ValueError, match=f"num_batches={number} is outside 0 … 3"):
            loader.skip(number)


@pytest.mark.parametrize(
    ("other", "name"),
    [
        ({"batch_size": 3}, "batch_size"),
        ({"shuffle": True}, "shuffle"),
        ({"num_replicas": 2}, "num_replicas"),
    ],
)
def test_states_of_other_loaders_are_refused(other: dict[str, Any], name: str) -> None:
    state = CropLoader(Toy(), batch_size=2).state_dict()
    with pytest.raises(ValueError, match=f"{name}=.*begin the epoch anew"):
        CropLoader(Toy(), **{"batch_size": 2, **other}).load_state_dict(state)
    with pytest.raises(ValueError, match="num_samples=11, this one has 12"):
        CropLoader(Toy(12), batch_size=2).load_state_dict(state)


@pytest.mark.parametrize("accumulation_steps", [1, 2])
def test_a_resumed_training_reads_no_batch_that_it_has_seen(accumulation_steps: int) -> None:
    dataset = Toy()
    steps = _StepLoader(CropLoader(dataset, batch_size=2), accumulation_steps, lambda targets: {"n": 1.0})  # type: ignore[arg-type]
    steps.skip = 4
    steps.set_epoch(3)
    assert contents(steps) == [[[3, 8], [3, 9]], [[3, 10]]]
    assert dataset.reads == [(3, 8), (3, 9), (3, 10)]
    assert len(contents(steps)) == 6
    plain = _StepLoader([{"image": torch.tensor([[n]])} for n in range(3)], 1, None)  # type: ignore[arg-type]
    plain.skip = 2
    assert contents(plain) == [[[2]]]
