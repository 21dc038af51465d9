"""scripts/bench_engine: both trainings of a comparison do the same work, and what is counted is what is there."""

import json
import os
import subprocess
import sys
import time
from collections import deque
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from ignite.engine import Events
from torch import nn

SCRIPTS = Path(__file__).resolve().parents[1] / "scripts"
SECTIONS = ["engine", "zero0", "workers", "gradients", "bytes", "start"]


@pytest.fixture(autouse=True)
def bench(monkeypatch):
    """The folder of the benchmark's modules, importable."""
    monkeypatch.syspath_prepend(str(SCRIPTS))


class ToyLoader:
    """Three batches an epoch that depend on its number; each takes a while."""

    seconds = 0.0

    def __len__(self):
        return 3

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __iter__(self):
        for position in range(3):
            time.sleep(self.seconds)
            generator = torch.Generator().manual_seed(10 * self.epoch + position)
            yield {"image": torch.rand(2, 1, 2, 3, 5, generator=generator), "targets": [{}, {}], "crop_id": [0, 1]}


class ToyNetwork(nn.Module):
    """A linear map with dropout: its losses depend on what is drawn, and on all weights before."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(30, 4)
        self.dropout = nn.Dropout(0.5)

    def forward(self, images, targets):
        return self.linear(self.dropout(images.flatten(1)))


def toy_criterion(outputs, targets):
    return {"first": outputs.square().mean(), "second": (outputs.float() - 3).abs().mean()}


def toy_trainer(loader, **changes):
    from seg3d_monai.engine import InstanceTrainer, WarmupCosine

    torch.manual_seed(3)
    network = ToyNetwork()
    settings = {
        "device": "cpu",
        "max_epochs": 4,
        "train_data_loader": loader,
        "network": network,
        "optimizer": torch.optim.AdamW(network.parameters(), lr=0.05),
        "loss_function": toy_criterion,
        "amp": "bf16",
        "clip_norm": 0.5,
        "schedule": WarmupCosine(warmup=0.3, final=0.1),
        "ema_decay": 0.9,
        "seed": 7,
    }
    return InstanceTrainer(**{**settings, **changes})


def test_plain_loop_trains_as_the_engine_does_bit_for_bit():
    from bench.engine.turns import EngineRun, PlainLoop, take_turns

    whole = toy_trainer(ToyLoader())
    losses = []
    whole.add_event_handler(Events.ITERATION_COMPLETED, lambda: losses.append(whole.state.output[0]["loss"]))
    whole.run()

    trainer, parts = toy_trainer(ToyLoader()), toy_trainer(ToyLoader())
    engine, plain = EngineRun(trainer), PlainLoop(parts, parts.data_loader)
    take_turns([engine, plain], 3, 4)  # 12 steps, over the ends of epochs
    assert engine.losses == plain.losses == losses
    assert len(set(losses)) == 12
    for mine, theirs, uninterrupted in zip(
        trainer.network.parameters(), parts.network.parameters(), whole.network.parameters(), strict=True
    ):
        assert torch.equal(mine, theirs)
        assert torch.equal(mine, uninterrupted)


def test_steps_of_both_include_their_loader_and_the_engines_its_handlers():
    from bench.engine.turns import EngineRun, PlainLoop

    loader = ToyLoader()
    loader.seconds = 0.02

    class Slow:
        def attach(self, engine):
            engine.add_event_handler(Events.ITERATION_COMPLETED, lambda: time.sleep(0.03))
            engine.add_event_handler(Events.EPOCH_STARTED, lambda: time.sleep(0.04))

    trainer, parts = toy_trainer(loader, train_handlers=[Slow()]), toy_trainer(loader)
    engine, plain = EngineRun(trainer), PlainLoop(parts, parts.data_loader)
    for run in (engine, plain):
        start = time.perf_counter()
        run.take(2)
        run.take(2)
        whole = time.perf_counter() - start
        assert sum(run.seconds) <= whole
        assert sum(run.seconds) > 0.95 * whole - 0.01
    assert min(plain.seconds) >= 0.02
    assert min(engine.seconds) >= 0.05
    assert engine.seconds[3] >= 0.09  # the first of the second epoch


def test_comparison_takes_ratios_step_by_step():
    from bench.engine.turns import compare

    ours = SimpleNamespace(seconds=[9.0, 1.1, 2.1, 8.8], losses=[4.0, 2.0, 1.0, 1.0])
    baseline = SimpleNamespace(seconds=[1.0, 1.0, 2.0, 4.0], losses=[4.0, 2.0, 1.0, 0.8])
    row = compare(ours, baseline, num_warmup=1)
    assert row["times_baseline"] == pytest.approx(1.1)  # of 1.1, 1.05 and 2.2
    assert row["times_baseline_mean"] == pytest.approx(12 / 7)
    assert (row["ours_ms"], row["baseline_ms"]) == (2100, 2000)
    assert row["largest_deviation"] == pytest.approx(0.25)
    assert row["num_steps"] == 3


def test_lattice_is_the_same_whatever_the_rpn_says():
    from bench.engine.gradients import lattice

    anchors, scores = [torch.zeros(4, 6)], [torch.rand(3, 4)]
    first, *others = lattice(scores, [torch.rand(3, 4, 6)], anchors, (20, 30, 18), pre_nms_top_n=2)
    wanted = [(z, y, 0, z + 12, y + 18, 18) for z in (0, 8) for y in (0, 12)]
    assert first.tolist() == [list(map(float, box)) for box in wanted]
    assert len(others) == 2
    assert all(torch.equal(first, other) for other in others)


def test_gradient_read_from_weights_is_that_of_autograd(tmp_path):
    from bench.engine.bundle import Options
    from bench.engine.gradients import Way, compare, gradient_of, read_way, start_run
    from bench.models.training import specimen_for

    options = Options(folder=tmp_path, data=specimen_for(tmp_path, is_quick=True), threads=1, is_quick=True)
    read = gradient_of(options, Way(1, 4))
    run = start_run(read_way(options, Way(1, 4), {"learning_rate": 1e-3}))
    run.take(1)
    wanted = {name: p.grad.double().numpy() for name, p in run.trainer.network.named_parameters()}
    assert set(read) == set(wanted)
    assert min(np.linalg.norm(value) for value in wanted.values()) > 0
    row = compare(read, [1.0], wanted, [1.0])
    assert row["worst"] < 1e-6


def test_gradients_are_compared_by_their_norms():
    from bench.engine.gradients import Way, compare

    wanted = {"a": np.array([3.0, 4.0]), "b": np.array([[0.1]]), "c": np.zeros(2)}
    found = {"a": np.array([3.0, 4.05]), "b": np.array([[0.12]]), "c": np.zeros(2)}
    row = compare(found, [2.0, 1.1], wanted, [2.0, 1.0])
    assert row["worst_parameter"] == "b"
    assert row["worst"] == pytest.approx(0.2)
    assert row["overall"] == pytest.approx(np.hypot(0.05, 0.02) / np.hypot(5, 0.1))
    assert row["loss_deviation"] == pytest.approx(0.1)
    assert compare({**wanted, "c": np.ones(2)}, [1.0], wanted, [1.0])["worst"] == np.inf
    assert Way(1, 2, 2).name == "1 worker x batch 2 x accumulation 2"
    assert Way(2, 2, stage=3).name == "2 workers x batch 2, ZeRO 3"


class Held:
    """Something with attributes."""

    def __init__(self, **attributes):
        vars(self).update(attributes)


def toy_holder():
    """A trainer's parts: 10 weights with gradients, Adam's two moments and count, an average, a copy, two buffers."""
    network, own = nn.Linear(4, 2), nn.Linear(4, 2)
    optimizer = torch.optim.Adam(network.parameters())
    network(torch.rand(3, 4)).sum().backward()
    optimizer.step()
    replicas = Held(module=network, buckets={"reduce": deque([Held(buffer=torch.zeros(100)[:5])])}, itself=None)
    replicas.itself = replicas
    replicas.view = network.weight.detach()[0]
    return Held(replicas=replicas, optimizer=optimizer, network=own, ema=Held(averages=[torch.zeros(10)]))


def test_bytes_are_those_of_storages_each_once():
    from bench.engine.bytes import count_bytes, held_tensors

    trainer = toy_holder()
    count = count_bytes(trainer, exchanged=[torch.zeros(6, dtype=torch.bfloat16), trainer.network.bias])
    assert dict(count) == {
        "weights": 40,
        "gradients": 40,
        "optimizer state": 2 * 40 + 2 * 4,
        "the config's network": 40,
        "averaged weights": 40,
        "buffers": 400 + 12,
        "buffer": 400,
        "exchanged": 12,
    }
    found = {name for name, _ in held_tensors(trainer.replicas)}
    assert {"weight", "weight.grad", "bias", "bias.grad", "buffer", "view"} == found


def test_worst_moment_within_a_step_is_found():
    from bench.engine.bytes import PeakBytes

    trainer = toy_holder()
    resting = 40 + 40 + 88 + 40 + 400
    with PeakBytes(trainer) as peak:
        trainer.replicas.gathered = torch.zeros(1000)
        torch.rand(3, 4) @ torch.rand(4, 2)
        del trainer.replicas.gathered
        torch.rand(3, 4) @ torch.rand(4, 2)
        activations = torch.zeros(5000) + 1
    assert peak.num_counts == 2
    assert peak.at == "aten::mm"
    assert sum(peak.most.values()) == resting + 40 + 4000  # with the average
    assert peak.buffers.most_common(1) == [("gathered", 4000)]
    assert len(activations) == 5000


def test_start_that_fails_tells_what_the_command_said(tmp_path, monkeypatch):
    from bench.engine import start
    from bench.engine.bundle import Options

    program = tmp_path / "python"
    program.write_text("#!/bin/sh\necho it cannot start\nexit 3\n")
    program.chmod(0o755)
    monkeypatch.setattr(start.sys, "executable", str(program))
    options = Options(folder=tmp_path, data=tmp_path / "manifest.csv", threads=1, is_quick=True)
    with pytest.raises(RuntimeError, match=r"exit code 3:\nit cannot start"):
        start.start_once(options, tmp_path / "start", 2)

    csv = tmp_path / "train.csv"
    assert not start.has_row(csv)
    csv.write_text("epoch,iteration\n")
    assert not start.has_row(csv)
    csv.write_text("epoch,iteration\n1,1\n")
    assert start.has_row(csv)


def test_report_marks_bars_met_and_missed():
    from bench.engine.bars import verdicts
    from bench.engine.report import bars_table

    nothing = {section: [] for section in SECTIONS}
    met = {
        "engine": [{"times_baseline": 1.03, "largest_deviation": 0.0}],
        "zero0": [{"times_baseline": 1.1}],
        "workers": [{"speed_up": 1.75}],
        "gradients": [{}, {"way": "2 workers", "worst": 1e-4, "overall": 1e-5}],
        "bytes": [{}, {"workers": 2, "of_zero0": 0.65}],
        "start": [{"workers": 2, "seconds": 44.9}],
    }
    missed = {
        "engine": [{"times_baseline": 1.031, "largest_deviation": 1e-9}],
        "zero0": [{"times_baseline": 1.101}],
        "workers": [{"speed_up": 1.74}],
        "gradients": [{}, {"way": "2 workers", "worst": float("inf"), "overall": 1.1e-4}],
        "bytes": [{}, {"workers": 2, "of_zero0": 0.651}],
        "start": [{"workers": 2, "seconds": 45.0}],
    }
    for result, is_met, word in ((met, True, "pass"), (missed, False, "FAIL")):
        rows = list(verdicts(result))
        assert [row["met"] for row in rows] == [is_met] * 8
        assert [line.split()[-1] for line in bars_table(rows).splitlines()[2:]] == [word] * 8
    assert list(verdicts(nothing)) == []


def test_quick_run_measures_every_section(tmp_path):
    file = tmp_path / "deeper" / "quick.json"
    environment = {**os.environ, "PYTHON": sys.executable}
    words = ["--quick", "--threads", "1", "--json", str(file)]
    run = subprocess.run([str(SCRIPTS / "bench_engine"), *words], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    result = json.loads(file.read_text())
    assert result["is_quick"] is True
    assert {"hardware", "versions", "operators", "method", "command"} <= set(result)
    (engine,), (zero0,), (workers,), (start,) = (result[key] for key in ("engine", "zero0", "workers", "start"))
    assert engine["largest_deviation"] == 0
    assert zero0["largest_deviation"] < 1e-5
    assert min(engine["times_baseline"], zero0["times_baseline"], workers["speed_up"]) > 0
    assert len(workers["one_ms"]) == len(workers["two_ms"]) == 1
    reference, *others = result["gradients"]
    assert reference["overall"] == 0
    assert reference["norm"] > 0
    assert [row["way"] for row in others] == [
        "1 worker x batch 2 x accumulation 2",
        *("2 workers x batch 2", "2 workers x batch 2, ZeRO 3"),
    ]
    assert max(row["worst"] for row in others) <= 1e-4
    assert max(row["loss_deviation"] for row in others) <= 1e-4
    zero, three = result["bytes"]
    weights = 4e-6 * zero["num_parameters"]
    assert zero["mb"]["weights"] == pytest.approx(weights)
    assert zero["mb"]["optimizer state"] == pytest.approx(2 * weights, rel=0.01)
    assert zero["mb"]["gradients"] <= weights
    assert three["mb"]["averaged weights"] == pytest.approx(weights / 2, rel=0.01)
    assert three["of_zero0"] == pytest.approx(three["state_mb"] / zero["state_mb"])
    assert start["seconds"] > 1
    assert "FAIL" in run.stdout or "pass" in run.stdout
    assert "QUICK" in run.stdout
