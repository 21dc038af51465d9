"""Bytes are counted as the tensors that live, and what is foretold is near what a process really takes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from seg3d_monai.planning.bundle_config import BundleConfig
from seg3d_monai.planning.live_memory import LivePeak, training_peak
from seg3d_monai.planning.memory import Line, MemoryModel, _line, _two_sizes, grid_of_objects

BUNDLES = Path(__file__).parents[2] / "bundles"


def test_tensors_count_while_they_live():
    x = torch.ones(1000)
    with LivePeak() as counted:
        y = x * 2
        assert (counted.live, counted.peak) == (4000, 4000)
        z = y.double()
        assert (counted.live, counted.peak) == (12000, 12000)
        del y
        assert (counted.live, counted.peak) == (8000, 12000)
        del z
        assert (counted.live, counted.peak) == (0, 12000)


def test_views_and_results_in_place_count_once():
    x = torch.ones(1000)
    with LivePeak() as counted:
        x.add_(1)
        assert counted.peak == 0
        view = x.view(10, 100)[2:4]
        y = view + 1
        y.mul_(2)
        assert y.T is not None
        assert counted.peak == 200 * 4


def test_what_the_backward_pass_saves_and_makes_counts():
    weight = torch.ones(1000, requires_grad=True)
    with LivePeak() as counted:
        out = (weight * 2).exp()  # exp saves its result
        assert counted.live == 4000
        loss = out.sum()
        del out
        assert counted.live == 4004
        loss.backward()
        live = counted.live
    assert weight.grad is not None
    assert live >= 4004  # the gradient, and the loss
    assert counted.peak >= 4004 + 4000  # beside exp's result at least the gradient of its input


def test_a_step_takes_no_less_than_what_it_saves():
    network = torch.nn.Sequential(torch.nn.Conv3d(1, 8, 3, padding=1), torch.nn.ReLU(), torch.nn.Conv3d(8, 1, 3))
    image = torch.rand(1, 1, 6, 10, 12)
    saved: dict[int, int] = {}

    def note(tensor):
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    class Wrapped(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = network

        def forward(self, images, targets):
            return self.inner(images)

    def loss(outputs, targets):
        return {"mean": outputs.square().mean()}

    peak = training_peak(Wrapped(), loss, image, {}, None)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        kept = loss(network(image), {})["mean"]
    weights = {p.untyped_storage().data_ptr() for p in network.parameters()}
    needed = sum(size for key, size in saved.items() if key not in weights)
    assert kept.requires_grad
    assert needed <= peak <= 3 * needed
    assert all(parameter.grad is None for parameter in network.parameters())


def test_a_line_through_two_sizes():
    assert _line([(100, 1100.0), (300, 1300.0)]) == Line(offset=1000, slope=1)
    assert _line([(100, 1100.0), (300, 900.0)]) == Line(offset=1100, slope=0)
    assert _line([(1, 10.0), (1, 12.0)]) == Line(offset=10, slope=0)
    model = MemoryModel(weights=10, image=Line(1000, 2), block=Line(50, 3))
    assert model.training((2, 5, 10), 3) == 5 * 10 + 3 * (1000 + 200)
    assert model.prediction((2, 5, 10)) == 10 + 50 + 300


def test_sizes_that_are_tried_are_cheap():
    assert _two_sizes((48, 80, 80), 400_000) == ((48, 40, 80), (48, 80, 80))
    assert _two_sizes((48, 80, 80), 100_000) == ((24, 40, 40), (48, 40, 40))
    assert _two_sizes((512, 512, 512), 300_000) == ((32, 64, 64), (64, 64, 64))
    assert _two_sizes((1, 1, 1), 400_000) == ((1, 1, 1), (1, 1, 1))


@pytest.mark.parametrize(("count", "expected"), [(100, 8), (3, 3)])
def test_objects_in_rows(count, expected):
    target = grid_of_objects((4, 6, 7), (2, 3, 3), count)
    assert target["boxes"].shape == (expected, 6)
    assert target["ids"].tolist() == list(range(1, expected + 1))
    assert torch.bincount(target["label"].flatten())[1:].tolist() == [18] * expected


def test_an_object_larger_than_the_crop_fills_it():
    target = grid_of_objects((4, 6, 7), (9, 9, 9), 5)
    assert target["boxes"].tolist() == [[0, 0, 0, 4, 6, 7]]


MEASURE = """
import ctypes, json, re, sys
from pathlib import Path
import torch
from seg3d_monai.planning.bundle_config import BundleConfig
from seg3d_monai.planning.memory import grid_of_objects

def status(field):
    return int(re.search(rf"^{field}:\\s*(\\d+) kB", Path("/proc/self/status").read_text(), re.M)[1]) * 1024

def peak_of(run):
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    run()
    return status("VmHWM")

bundle, crop, batch = BundleConfig(Path(sys.argv[1])), json.loads(sys.argv[2]), int(sys.argv[3])
libc = ctypes.CDLL(None)
libc.mallopt(-3, 65536); libc.mallopt(-1, 65536)  # what is freed goes back to the system
torch.set_num_threads(1)
torch.ones(8, 8) @ torch.ones(8, 8)
def build():
    return bundle.build("network_def").train(), bundle.build("loss")
warm = build()
target = grid_of_objects((16, 32, 32), (8, 12, 12), 4)
torch.stack(list(warm[1](warm[0](torch.rand(1, 1, 16, 32, 32), [target]), [target]).values())).sum().backward()
del warm
before = status("VmRSS")

def step():
    network, criterion = build()
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3)
    average = [parameter.detach().clone() for parameter in network.parameters()]
    target = grid_of_objects(tuple(crop), (8, 12, 12), 40)
    for _ in range(2):
        losses = criterion(network(torch.rand(batch, 1, *crop), [target] * batch), [target] * batch)
        torch.stack(list(losses.values())).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
print(peak_of(step) - before)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the system does not tell a process's peak")
@pytest.mark.parametrize("name", ["maskrcnn3d", "maskdino3d"])
def test_what_is_foretold_is_what_a_training_takes(name):
    from seg3d_monai.planning.memory import measure_memory

    folder, crop, batch = BUNDLES / name, (32, 96, 96), 2
    model = measure_memory(BundleConfig(folder), {"amp": "off"}, crop_size=(24, 64, 64), objects=20, extent=(8, 12, 12))
    words = [sys.executable, "-c", MEASURE, str(folder), json.dumps(crop), str(batch)]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    assert model.training(crop, batch) == pytest.approx(int(done.stdout), rel=0.25)
