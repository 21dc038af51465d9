"""The launcher: the same config in one process or in several on Ray, which may be killed, stopped or refused.

The cluster is real: two nodes of one CPU each on this machine, and once a Ray that the training starts itself.
"""

import json
import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import launch_toys
import pytest
import ray
import torch
import torch.distributed as dist
from monai.bundle import ConfigParser, ConfigWorkflow
from process_table import descendants, is_alive
from ray_nodes import RESTART, WAIT, add_node, cluster_of, wait_until

from seg3d_monai.engine import ray_launch
from seg3d_monai.engine.launch import Launcher, check_shared, evaluate, portable_config


def write_config(folder):
    """The toy bundle as two files that are merged."""
    configs = folder / "configs"
    configs.mkdir()
    (configs / "train.json").write_text(json.dumps(launch_toys.CONFIG | {"output_dir": "", "bundle_root": str(folder)}))
    (configs / "overlay.json").write_text(json.dumps({"train#trainer#steps": "$@steps"}))
    return [str(configs / name) for name in ("train.json", "overlay.json")]


@pytest.fixture
def workflow(tmp_path, monkeypatch):
    """Make the toy bundle's workflow in a folder of its own; its output_dir is relative."""
    files = write_config(tmp_path)
    monkeypatch.chdir(tmp_path)

    def make(**overrides):
        return ConfigWorkflow(
            config_file=files, workflow_type="train", logging_file=False, **{"output_dir": "run/toy"} | overrides
        )

    return make


def train(workflow):
    workflow.initialize()
    workflow.run()


def cause(raised):
    """What a component raised, behind MONAI's RuntimeErrors."""
    error = raised.value
    while error.__cause__ is not None:
        error = error.__cause__
    return error


class Note(NamedTuple):
    """What a toy trainer did, and where."""

    what: str
    step: int
    pid: int
    threads: int
    node: str
    time: float


def notes(folder, rank):
    """What one worker noted, its lives one after the other."""
    path = folder / f"notes_{rank}"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    words = [line.split() for line in lines if line.endswith("\n")]
    return [Note(what, int(step), int(pid), int(n), node, float(when)) for what, step, pid, n, node, when in words]


def lives(folder, rank):
    """The same, a list a life."""
    found = []
    for note in notes(folder, rank):
        if note.what == "start":
            found.append([])
        found[-1].append(note)
    return found


# In this process


def test_one_worker_is_this_process_and_needs_no_ray(workflow, monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(sys.modules, "ray", None)
    train(workflow())
    assert capsys.readouterr().out == "started at 0\ntotal = 3\n"
    assert {note.pid for note in notes(tmp_path / "run" / "toy", 0)} == {os.getpid()}


def test_ray_that_is_not_installed(workflow, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(RuntimeError) as raised:
        train(workflow(train_workers=2))
    assert 'pip install "seg3d_monai[cluster]"' in str(raised.value.__cause__)


def test_no_cluster_at_the_address(workflow):
    assert not ray.is_initialized()
    with pytest.raises(RuntimeError) as raised:
        train(workflow(train_workers=2, address="127.0.0.1:9"))
    assert "no Ray cluster answers at address '127.0.0.1:9'" in str(raised.value.__cause__)


@pytest.mark.parametrize(
    ("name", "value", "mend"),
    [
        ("train_workers", 0, "give an integer >= 1"),
        ("train_workers", "2", "give an integer >= 1"),
        ("cpus_per_worker", 0.5, "give an integer >= 1"),
        ("gpus_per_worker", -1, "give 0 or more"),
        ("max_failures", -1, "give an integer >= 0"),
        ("resource_timeout_s", 0, "give seconds >= 1"),
    ],
)
def test_values_out_of_range(name, value, mend):
    with pytest.raises(ValueError, match=f"{name}={value!r} cannot be used; {mend}"):
        Launcher(output_dir="run", **{name: value})


def test_the_config_that_is_sent(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train").mkdir()
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.tif").touch()
    config = {
        "_meta_": {"root": "."},
        "bundle_root": ".",
        "dataset_dir": "",
        "output_dir": "runs/first",
        "initial_weights": "model.pt",
        "tracking_uri": "sqlite:///data/a.db",
        "split": "train",  # a folder of that name is no reason
        "image": "data/a.tif",
        "home_dir": "~/x",
        "db": "$@output_dir + '/crops.sqlite'",
        "extra_files": ["a.json", {"path": Path("b.json"), "_target_": "data/a.tif"}],
        "sizes": (2, 3.5, None, True),
    }
    before = repr(config)
    sent = portable_config(config)
    assert repr(config) == before
    changed = {
        "bundle_root": str(tmp_path),
        "output_dir": f"{tmp_path}/runs/first",
        "initial_weights": f"{tmp_path}/model.pt",
        "image": f"{tmp_path}/data/a.tif",
        "extra_files": [f"{tmp_path}/a.json", {"path": f"{tmp_path}/b.json", "_target_": "data/a.tif"}],
    }
    assert sent == config | changed


def test_a_config_that_cannot_be_sent():
    with pytest.raises(TypeError, match=r"net#parts#1 is a Linear, .* train with train_workers=1"):
        portable_config({"net": {"parts": [1, torch.nn.Linear(1, 1)]}})


def test_the_lists_that_are_sent(workflow, monkeypatch):
    sent = []
    monkeypatch.setattr(ray_launch, "run_group", lambda config, **_: sent.append(config))
    train(workflow(train_workers=2))
    train(
        workflow(
            train_workers=2, prepare=["$print(1)"], init_id="prepare", mine=["$@launcher.run('fit')"], run_id="mine"
        )
    )
    assert sent[0]["initialize"] == launch_toys.CONFIG["initialize"]
    assert sent[0]["run"] == sent[0]["training"] == launch_toys.CONFIG["training"]
    assert (sent[1]["initialize"], sent[1]["run"]) == (["$print(1)"], ["$@launcher.run('fit')"])
    assert not {"prepare", "mine"} & sent[1].keys()
    assert sent[0]["output_dir"] == os.path.abspath("run/toy")


def test_lists_are_evaluated_entry_by_entry():
    parser = ConfigParser({"seen": [], "steps": ["$@seen.append(1)", "$@seen.append(len(@seen))"], "one": "$@seen"})
    evaluate(parser, "steps")
    evaluate(parser, "steps")
    evaluate(parser, "one")
    evaluate(parser, "no_such_list")
    assert parser.get_parsed_content("seen") == [1, 1, 1, 3]


@pytest.fixture
def group_of_one():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_a_folder_that_cannot_be_written_is_named(group_of_one, tmp_path):
    check_shared(tmp_path / "run")
    assert not list((tmp_path / "run").iterdir())
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"file/run' cannot be written .* choose another folder"):
        check_shared(tmp_path / "file" / "run")


def raised_by(call):
    try:
        call()
    except Exception as error:
        return error


def wrapped(error):
    """As MONAI wraps what a component raises."""
    try:
        raise RuntimeError("Failed to evaluate ConfigExpression") from error
    except RuntimeError as outer:
        return outer


class OddError(ValueError):
    def __init__(self, first, second):
        super().__init__(f"{first} and {second}")


@pytest.mark.parametrize(
    ("error", "kind", "text"),
    [
        (wrapped(ValueError("halo is\n-1")), ValueError, "halo is; -1"),
        (wrapped(FileNotFoundError(2, "No such file", "a.tif")), FileNotFoundError, "No such file: a.tif"),
        (OddError(1, 2), ValueError, "1 and 2"),
        (raised_by(lambda: b"\xff".decode()), UnicodeError, "'utf-8' codec can't decode"),
        (wrapped(ImportError("pip install deepspeed", name="deepspeed")), ImportError, "pip install deepspeed"),
        (wrapped(FloatingPointError("loss nan")), FloatingPointError, "loss nan"),
        (wrapped(KeyError("boxes")), RuntimeError, "worker 0 of 1 on .*failed:\n(.|\n)*KeyError: 'boxes'"),
        (RuntimeError("mat1 and mat2"), RuntimeError, "worker 0 of 1 on .*failed:\n(.|\n)*mat1 and mat2"),
        (torch.OutOfMemoryError("CUDA out of memory"), RuntimeError, "CUDA out of memory"),
        (wrapped(ConnectionResetError("peer")), ConnectionError, "worker 0 of 1 .* lost touch with another"),
        (wrapped(RuntimeError("[../gloo/tcp/pair.cc:547] Connection closed")), ConnectionError, "lost touch"),
        (dist.DistBackendError("NCCL error: remote process exited"), ConnectionError, "NCCL error"),
        (dist.DistNetworkError("store"), ConnectionError, "lost touch"),
    ],
)
def test_errors_are_sent_as_built_in_ones(group_of_one, error, kind, text):
    sent = ray_launch._portable(error)
    assert type(sent) is kind
    assert re.search(text, str(sent))


def test_losses_are_made_good_so_often(monkeypatch, caplog):
    lives = iter(["worker 1 was lost (a)", "worker 0 was lost (b)", "worker 1 was lost (c)"])
    fake = SimpleNamespace(is_initialized=lambda: True, cluster_resources=lambda: {"CPU": 2.0})
    monkeypatch.setattr(ray_launch, "import_ray", lambda: fake)
    monkeypatch.setattr(ray_launch, "_make_desk", lambda ray: None)
    monkeypatch.setattr(ray_launch, "_live", lambda *_: next(lives))
    options = {"num_workers": 2, "gpus_per_worker": None, "cpus_per_worker": None, "address": None}
    options |= {"resource_timeout_s": 1}
    environment = dict(os.environ)
    with pytest.raises(ChildProcessError, match=r"^worker 1 was lost \(c\); this was loss 3 .*max_failures=2"):
        ray_launch.run_group({}, max_failures=2, **options)
    assert caplog.messages[0] == "worker 1 was lost (a); loss 1, of which max_failures=2 are made good"
    assert dict(os.environ) == environment
    lives = iter(["worker 1 was lost (a)", None])
    ray_launch.run_group({}, max_failures=2, **options)


# In groups


def test_from_the_shell_a_group_outlives_a_worker_and_saves_at_sigterm(tmp_path):
    files = write_config(tmp_path)
    folder = tmp_path / "run" / "toy"
    folder.mkdir(parents=True)
    (folder / "last.pt").write_text("[70, 1000.0]")  # of another run, which this one does not resume
    options = {"output_dir": "run/toy", "train_workers": 2, "steps": 4000, "seconds": 0.05, "max_failures": 1}
    command = [
        *(sys.executable, "-m", "monai.bundle", "run", "training", "--config_file", str(files)),
        *(word for key, value in options.items() for word in (f"--{key}", str(value))),
        *("--accident", json.dumps({"rank": 1, "step": 4, "what": "kill"})),
    ]
    environment = os.environ | {"PYTHONPATH": f"{Path(__file__).parent}:{os.environ.get('PYTHONPATH', '')}"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, cwd=tmp_path, env=environment, start_new_session=True, **pipes) as process:
        try:
            wait_until(
                lambda: process.poll() is not None or (len(lives(folder, 1)) == 2 and notes(folder, 1)[-1].step > 6)
            )
            below = descendants(process.pid)
            process.send_signal(signal.SIGTERM)
            out, errors = process.communicate(timeout=WAIT)
        finally:
            process.kill()
    assert process.returncode == 128 + signal.SIGTERM, errors
    assert len(below) >= 5  # two workers and what Ray itself runs
    assert "worker 1 was lost (" in errors
    assert "loss 1, of which max_failures=1 are made good" in errors
    assert "SIGTERM: stopping the workers" in errors
    assert [line for line in out.splitlines() if line.startswith("started")] == ["started at 0", "started at 3"]
    assert "total" not in out  # it did not come to its end

    assert (folder / "built").read_text() == "by 0"
    for rank in (0, 1):
        first, second = lives(folder, rank)
        assert (first[0].step, second[0].step) == (0, 3)  # anew, then from the last checkpoint
        assert [note.step for note in second[1:-1]] == list(range(4, second[-1].step + 1))
        assert second[-1].what == "stop"
        assert len({note.pid for note in first + second}) == 2
        assert {note.threads for note in first + second} == {1}
        assert second[1].time - first[-1].time < RESTART
    last = notes(folder, 0)[-1].step
    assert notes(folder, 1)[-1].step == last
    assert json.loads((folder / "last.pt").read_text()) == [last, 3 * last]
    wait_until(lambda: not any(map(is_alive, below)), 20)


@pytest.fixture(scope="module")
def cluster():
    """Two nodes of one CPU each, to which this process is connected."""
    with cluster_of("ab") as made:
        yield made


@pytest.mark.long
def test_a_mistake_ends_the_training_at_once(cluster, workflow, tmp_path):
    with pytest.raises(RuntimeError) as raised:
        train(workflow(train_workers=2, accident={"rank": 1, "step": 2, "what": "mistake"}))
    assert type(cause(raised)) is FileNotFoundError
    assert str(cause(raised)).startswith("No such file or directory: crops.tif (worker 1 of 2 on ")
    assert [(note.what, note.step) for note in notes(tmp_path / "run" / "toy", 1)] == [("start", 0), ("step", 1)]


@pytest.mark.long
def test_ctrl_c_in_python(cluster, workflow, tmp_path):
    folder = tmp_path / "run" / "toy"

    def interrupt():
        wait_until(lambda: any(note.step > 2 for note in notes(folder, 1)))
        os.kill(os.getpid(), signal.SIGINT)

    made = workflow(train_workers=2, steps=4000, seconds=0.05)
    interrupter = threading.Thread(target=interrupt)
    interrupter.start()
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(SystemExit) as end:
        train(made)
    interrupter.join()
    assert end.value.code == 128 + signal.SIGINT
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before
    assert notes(folder, 0)[-1].what == "stop"
    assert not {"built", "train::trainer"} & made.parser.ref_resolver.resolved_content.keys()  # nothing was built here
    assert ray.is_initialized()  # this connection is not the launcher's to end


@pytest.mark.long
def test_a_folder_that_the_nodes_do_not_share(cluster, workflow, monkeypatch, tmp_path):
    monkeypatch.setenv("TOY_NODE", "driver")
    with pytest.raises(RuntimeError) as raised:
        train(workflow(train_workers=2, output_dir=f"$'{tmp_path}/' + os.environ['TOY_NODE']"))
    assert type(cause(raised)) is ValueError
    message = str(cause(raised))
    assert message.startswith("output_dir is not shared: what worker 0 on ")
    assert {f"{tmp_path}/{name}" in message for name in "ab"} == {True}
    assert not list(tmp_path.glob("[ab]/notes*"))


@pytest.mark.long
def test_more_than_the_cluster_has(cluster, workflow):
    with pytest.raises(RuntimeError) as raised:
        train(workflow(train_workers=3, cpus_per_worker=2, resource_timeout_s=1))
    assert type(cause(raised)) is ValueError
    assert str(cause(raised)).startswith(
        "train_workers=3, cpus_per_worker=2, gpus_per_worker=0 ask for 6 CPUs and 0 GPUs; Ray has 2 CPUs and 0 GPUs on "
        "3 nodes, of which 2 and 0 are free after resource_timeout_s=1"
    )


@pytest.mark.long
def test_a_group_outlives_a_machine(cluster, workflow, tmp_path, capsys):
    folder = tmp_path / "run" / "toy"
    add_node(cluster, "c")

    def lose_a_node():
        wait_until(lambda: any(note.step > 2 for note in notes(folder, 1)))
        cluster.remove_node(cluster.toy_nodes[notes(folder, 1)[0].node], allow_graceful=False)

    loser = threading.Thread(target=lose_a_node)
    loser.start()
    train(workflow(train_workers=2, steps=200, seconds=0.05))
    loser.join()
    assert capsys.readouterr().out.splitlines()[-1] == "total = 600"
    for rank in (0, 1):
        first, second = lives(folder, rank)
        assert second[0].step > 2
        assert second[1].time - first[-1].time < RESTART
    lost = lives(folder, 1)[0][0].node
    assert lost not in {lives(folder, rank)[-1][0].node for rank in (0, 1)}
