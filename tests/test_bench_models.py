"""scripts/bench_models: the floor is the network's kernels and nothing else, and the report says what was met."""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from seg3d_monai.ops import ms_deform_attn3d

SCRIPTS = Path(__file__).resolve().parents[1] / "scripts"


@pytest.fixture(autouse=True)
def bench(monkeypatch):
    """The folder of the benchmark's modules, importable."""
    monkeypatch.syspath_prepend(str(SCRIPTS))


class Toy(nn.Module):
    """A convolution, a linear layer and an attention, one of each."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv3d(2, 4, 3, padding=1)
        self.linear = nn.Linear(4, 8)

    def forward(self, images: Tensor) -> dict[str, object]:
        """[2, 2, 4, 5, 6] -> tokens [2, 1, 120, 8]."""
        cells = self.conv(images).flatten(2).transpose(1, 2).contiguous()
        tokens = self.linear(cells)[:, None]
        return {"names": ["1"], "nested": [{"tokens": F.scaled_dot_product_attention(tokens, tokens, tokens)}]}


TOY_CALLS = {
    ("convolution", "aten::convolution"): [(2, 2, 4, 5, 6), (4, 2, 3, 3, 3), (4,)],
    ("convolution", "aten::convolution_backward"): [(2, 4, 4, 5, 6), (2, 2, 4, 5, 6), (4, 2, 3, 3, 3)],
    ("linear", "aten::addmm"): [(8,), (240, 4), (4, 8)],
    ("linear", "aten::mm"): [(240, 8), (8, 4)],  # the gradient of the input
    ("linear", "aten::mm", "weight"): [(8, 240), (240, 4)],
}
"""Kinds, kernels and shapes of the toy's calls, its attention aside."""


def toy_criterion(outputs: dict) -> Tensor:
    """A loss with a product of its own."""
    tokens = outputs["nested"][0]["tokens"].reshape(240, 8)
    return (tokens @ torch.linspace(-1, 1, 24).view(8, 3)).square().sum()


@pytest.fixture
def toy():
    """The toy, its input, and the calls of one step."""
    from bench.models.floor import record

    torch.manual_seed(0)
    network, images = Toy(), torch.randn(2, 2, 4, 5, 6)
    return network, images, record(lambda: network(images), toy_criterion)


def of_name(calls, name):
    """The only call of a kernel."""
    (call,) = [call for call in calls if call.name == name]
    return call


def test_recorded_calls_are_those_of_the_network_forward_and_backward(toy):
    _, _, calls = toy
    attention = [call for call in calls if call.kind == "attention"]
    others = [(call.kind, call.name, call.shapes) for call in calls if call.kind != "attention"]
    assert sorted(others) == sorted((key[0], key[1], shapes) for key, shapes in TOY_CALLS.items())
    assert [call.name.endswith("_backward") for call in attention] == [False, True]
    assert attention[0].shapes[:3] == [(2, 1, 120, 8)] * 3
    assert attention[1].shapes[:4] == [(2, 1, 120, 8)] * 4
    # The image needs no gradient, weight and bias do: what was not computed in the step is not in the floor.
    assert list(of_name(calls, "aten::convolution_backward").args[-1]) == [False, True, True]


def test_two_stages_of_the_backward_pass_give_the_gradients_of_one(toy):
    network, images, _ = toy
    found = [parameter.grad.clone() for parameter in network.parameters()]
    network.zero_grad()
    toy_criterion(network(images)).backward()
    for gradient, parameter in zip(found, network.parameters(), strict=True):
        torch.testing.assert_close(gradient, parameter.grad)


def test_calls_run_again_give_the_same_results(toy):
    network, images, calls = toy
    convolved = F.conv3d(images, network.conv.weight, network.conv.bias, padding=1)
    torch.testing.assert_close(of_name(calls, "aten::convolution").run(), convolved)
    _, weight, bias = of_name(calls, "aten::convolution_backward").run()
    torch.testing.assert_close(weight, network.conv.weight.grad)
    torch.testing.assert_close(bias, network.conv.bias.grad)
    (product,) = [call for call in calls if call.shapes == TOY_CALLS["linear", "aten::mm", "weight"]]
    torch.testing.assert_close(product.run(), network.linear.weight.grad)
    attended = next(call for call in calls if call.kind == "attention").run()[0]
    torch.testing.assert_close(attended, network(images)["nested"][0]["tokens"])


def test_recorded_tensors_are_those_of_the_step(toy):
    network, images, calls = toy
    forward, backward = (of_name(calls, f"aten::convolution{end}") for end in ("", "_backward"))
    assert forward.args[0].data_ptr() == backward.args[1].data_ptr() == images.data_ptr()
    assert forward.args[1].data_ptr() == network.conv.weight.data_ptr()
    assert not any(x.requires_grad for call in calls for x in call.args if isinstance(x, Tensor))


def test_replay_runs_every_call_once(toy):
    from bench.models.floor import KINDS, Recorder, replay

    _, _, calls = toy
    with Recorder() as again:
        seconds = replay(calls, torch.device("cpu"))
    assert Counter(call.name for call in again.calls) == Counter(call.name for call in calls)
    assert list(seconds) == list(KINDS)
    assert all(value >= 0 for value in seconds.values())


def test_deformable_attention_and_batched_products_have_their_kinds():
    from bench.models.floor import record

    value = torch.randn(1, 8, 2, 4, requires_grad=True)
    places, weights = torch.rand(1, 3, 2, 1, 4, 3), torch.rand(1, 3, 2, 1, 4)
    queries = torch.randn(1, 5, 8)

    def network() -> dict[str, Tensor]:
        read = ms_deform_attn3d(value, torch.tensor([[2, 2, 2]]), places, weights)
        with torch.no_grad():
            masks = queries @ read.transpose(1, 2)
        return {"read": read, "masks": masks, "unused": value * 2}

    calls = record(network, lambda outputs: outputs["read"].sum())
    assert [(call.kind, call.name) for call in calls] == [
        ("attention", "seg3d::ms_deform_attn3d"),
        ("batched product", "aten::bmm"),
        ("attention", "seg3d::ms_deform_attn3d_backward"),
    ]
    assert calls[0].args[2].data_ptr() == places.data_ptr()


def test_recorded_calls_are_in_the_trainers_own_step(tmp_path):
    from bench.models.floor import Recorder
    from bench.models.steps import step_in_parts
    from bench.models.training import build, first_batches, read_config, specimen_for

    specimen = specimen_for(tmp_path, is_quick=True)
    changes = {"dataset_dir": str(specimen), "output_dir": str(tmp_path / "run"), "device": "cpu"}
    parser = read_config("maskrcnn3d", [], changes, is_quick=True)  # it samples proposals: the draws must be the same
    training = build(parser, "cpu")
    first, second = first_batches(parser, 2)
    training.step(first)
    recorded = training.record(second)
    with Recorder() as whole:
        losses = training.step(second)
    assert losses["loss"] > 0
    described = [Counter((call.name, str(call.shapes)) for call in calls) for calls in (recorded, whole.calls)]
    assert described[0] == described[1]  # this criterion has no matrix product

    parts = step_in_parts(training, first)
    assert min(parts.values()) > 0
    assert parts["matching"] < parts["criterion"]
    assert parts["whole"] == pytest.approx(
        sum(parts[name] for name in ("forward", "criterion", "backward", "clip, optimizer, EMA"))
    )
    assert training.step(second)["loss"] > 0  # the clocks are gone without a trace


def test_crowded_crop_has_touching_cells_of_varied_sizes():
    from bench.models.memory import crowded_crop

    batch = crowded_crop((24, 40, 48), 20)
    (target,) = batch["targets"]
    label = target["label"]
    assert batch["image"].shape == (1, 1, 24, 40, 48)
    assert len(target["ids"]) == len(target["boxes"]) == 20
    assert set(label.unique().tolist()) <= {-1, 0, *target["ids"].tolist()}
    sizes = [int((label == number).sum()) for number in target["ids"]]
    assert max(sizes) > 3 * min(sizes)
    neighbours = torch.cat([label.unfold(axis, 2, 1).reshape(-1, 2) for axis in range(3)]).unique(dim=0)
    touching = neighbours[(neighbours > 0).all(1) & (neighbours[:, 0] != neighbours[:, 1])]
    assert len(touching.unique()) > 10


def test_report_marks_bars_met_and_missed():
    from bench.models.bars import verdicts
    from bench.models.report import bars_table

    parts = {"criterion": 15.0, "clip, optimizer, EMA": 5.0, "whole": 100.0}
    steps = [
        {"model": "maskrcnn3d", "times_floor": 1.35, "parts_ms": parts},
        {"model": "maskdino3d", "times_floor": 1.601, "parts_ms": parts | {"criterion": 15.1}},
    ]
    loops = [
        {"model": "maskrcnn3d", "crops_per_s": 5.0, "waiting_share": 0.02},
        {"model": "maskrcnn3d", "crops_per_s": 6.0, "waiting_share": 0.03},
        {"model": "mask2former3d", "crops_per_s": 1.0, "waiting_share": 0.029},
    ]
    peaks = [
        {"model": "maskrcnn3d", "peak_gb": 15.9},
        {"model": "maskdino3d", "peak_gb": 16.0},
        {"model": "mask2former3d", "peak_gb": None, "error": "killed"},
    ]
    rows = list(verdicts({"steps": steps, "loop": loops, "memory": peaks}))
    assert [row["met"] for row in rows] == [True, True, False, False, False, True, True, False, False]
    bars = ["<= 1.35x", "<= 0.2", "<= 1.6x", "<= 0.2", "< 0.03", "< 0.03"] + ["< 16 GB"] * 3
    assert [row["bar"] for row in rows] == bars
    lines = bars_table(rows).splitlines()[2:]
    assert [line.split()[-1] for line in lines] == ["yes", "yes", "NO", "NO", "NO", "yes", "yes", "NO", "NO"]
    assert "1.35" in lines[0]
    not_measured = list(verdicts({"steps": [], "loop": [], "memory": [{"model": "maskrcnn3d", "peak_gb": None}]}))
    assert bars_table(not_measured).endswith("not measured")


def test_quick_run_writes_what_it_promises(tmp_path):
    file = tmp_path / "deeper" / "quick.json"
    words = ["--quick", "--models", "mask2former3d", "--repeats", "2", "--threads", "1", "--output", str(file)]
    other = tmp_path / "other.json"
    other.write_text('{"train#trainer#clip_norm": 4.0}')
    words += ["--overlays", "schedule_stable", str(other), "--workers", "0"]
    environment = {**os.environ, "PYTHON": sys.executable}
    shown = subprocess.run(
        [str(SCRIPTS / "bench_models"), *words], env=environment, capture_output=True, text=True, check=True
    ).stdout
    result = json.loads(file.read_text())
    assert result["is_quick"] is True
    assert {"hardware", "versions", "operators", "method", "command"} <= set(result)
    (steps,), (memory,) = result["steps"], result["memory"]
    assert len(steps["step_runs_ms"]) == len(steps["floor_runs_ms"]) == 2
    assert steps["times_floor"] > 0
    assert steps["changed_ids"] == ["dataset_dir", "device", "output_dir"]
    assert min(steps["calls"].values()) > 0
    assert len(steps["instances_of_crops"]) == 6
    assert memory["num_instances"] == 6
    assert memory["checkpointed"] == ["backbone", "pixel_decoder"]
    assert memory["settings"]["autocast"] == "bfloat16"
    if sys.platform == "linux":
        assert memory["peak_gb"] > memory["rss_after_import_gb"] > 0.05
    (loop,) = result["loop"]
    assert loop["overlays"] == steps["overlays"] == ["schedule_stable", "other"]
    assert loop["settings"]["clip_norm"] == 4.0
    assert loop["num_workers"] == 0
    assert 0 < loop["waiting_share"] < 1
    assert loop["crops_per_s"] < 2 / (loop["step_ms"] / 1e3) * 1.5
    assert [row["model"] for row in result["bars"]] == ["mask2former3d"] * 4
    assert "of which matching" in shown
    assert "QUICK" in shown
