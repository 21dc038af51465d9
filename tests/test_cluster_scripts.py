"""The scripts for clusters, with stand-ins for Slurm, ssh, Ray and the training that note how they are called."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
import yaml

from seg3d_monai.cli_bundle import find_bundle

SCRIPTS = Path(__file__).resolve().parents[1] / "scripts" / "cluster"
NOTE = 'echo "$(basename "$0") $*" >> "$NOTES"\n'
STANDINS = {
    "srun": NOTE + 'while [[ "$1" == --* ]]; do shift; done; exec "$@"',
    "ssh": NOTE + 'exec bash -c "${@: -1}"',
    "scontrol": NOTE + 'if [[ "$1" == show ]]; then printf "node%s\\n" 1 2 3; fi',
    "hostname": "echo 10.0.0.1 fe80::1",
    "ray": NOTE + 'if [[ "$*" == *--block* ]]; then exec sleep 60; fi',
    "python": NOTE
    + """trap 'echo saved >> "$NOTES"; exit 143' TERM
for _ in {1..5}; do sleep 0.1; done
if [[ "$*" == *wait* ]]; then for _ in {1..600}; do sleep 0.1; done; fi
exit 7""",
}
ARGUMENTS = ["--config_file", "a folder/train.json", "--train_workers", "3"]


@pytest.fixture
def start(tmp_path):
    """Start a script among stand-ins; returns the process and the file of notes."""
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, body in STANDINS.items():
        (programs / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (programs / name).chmod(0o755)
    notes = tmp_path / "notes"
    notes.touch()
    environment = {"SLURM_JOB_NODELIST": "node[1-3]", "SLURM_CPUS_PER_TASK": "8", "SLURM_JOB_ID": "42"}

    def run(script, *arguments):
        process = subprocess.Popen(
            [str(SCRIPTS / script), *arguments],
            cwd=tmp_path,
            env=os.environ | environment | {"PATH": f"{programs}:{os.environ['PATH']}", "NOTES": str(notes)},
            stderr=subprocess.PIPE,
            text=True,
        )
        return process, notes

    return run


def lines_of(notes, word):
    return [line for line in notes.read_text().splitlines() if line.startswith(word + " ")]


def test_slurm_starts_ray_on_every_node_and_the_training_on_the_first(start):
    process, notes = start("slurm", *ARGUMENTS)
    assert process.wait(30) == 7  # the training's own
    assert sorted(line for line in lines_of(notes, "srun") if "ray" in line) == [
        "srun --ntasks-per-node=1 --cpus-per-task=8 --nodes=1 --nodelist=node1 ray start --num-cpus=8 "
        "--disable-usage-stats --block --head --node-ip-address=10.0.0.1 --port=6379",
        "srun --ntasks-per-node=1 --cpus-per-task=8 --nodes=2 --exclude=node1 ray start --num-cpus=8 "
        "--disable-usage-stats --block --address=10.0.0.1:6379",
    ]
    assert lines_of(notes, "python") == [
        "python -m monai.bundle run training --config_file a folder/train.json --train_workers 3 "
        "--address 10.0.0.1:6379 --resume True"
    ]
    assert lines_of(notes, "scontrol") == ["scontrol show hostnames node[1-3]"]


def test_slurm_requeues_what_was_saved_at_its_signal(start):
    process, notes = start("slurm", *ARGUMENTS, "--wait", "1")
    end = time.monotonic() + 30
    while not lines_of(notes, "python"):
        assert time.monotonic() < end
        time.sleep(0.05)
    time.sleep(0.3)  # until the stand-in listens
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 143
    assert notes.read_text().splitlines()[-2:] == ["saved", "scontrol requeue 42"]


def test_by_hand_starts_and_stops_ray_on_every_host(start, tmp_path):
    process, notes = start("by_hand", "node2", "node3", "--", *ARGUMENTS)
    assert process.wait(30) == 7
    head, *others = lines_of(notes, "ray")
    assert head == "ray start --head --node-ip-address=10.0.0.1 --port=6379 --disable-usage-stats"
    assert others == ["ray start --address=10.0.0.1:6379 --disable-usage-stats"] * 2 + ["ray stop"] * 3
    hosts = [line.split()[2] for line in lines_of(notes, "ssh")]
    assert hosts == ["node2", "node3", "node2", "node3"]
    assert lines_of(notes, "python")[0].endswith("--train_workers 3 --address 10.0.0.1:6379")


def test_by_hand_without_hosts_says_how_it_is_called(start):
    process, notes = start("by_hand", "--", *ARGUMENTS)
    assert process.wait(30) == 2
    assert "scripts/cluster/by_hand HOST... --" in process.stderr.read()
    assert not notes.read_text()


def test_kuberay_asks_for_what_the_training_takes():
    job = yaml.safe_load((SCRIPTS / "kuberay.yaml").read_text())
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    words = job["spec"]["entrypoint"].split()
    flags = dict(zip(words[5::2], words[6::2], strict=True))
    assert words[:5] == ["python", "-m", "monai.bundle", "run", "training"]
    cluster = job["spec"]["rayClusterSpec"]
    (group,) = cluster["workerGroupSpecs"]
    (container,) = group["template"]["spec"]["containers"]
    limits = container["resources"]["limits"]
    workers = int(flags["--train_workers"])
    assert workers * int(flags["--gpus_per_worker"]) == group["replicas"] * int(limits["nvidia.com/gpu"])
    assert workers * int(flags["--cpus_per_worker"]) == group["replicas"] * int(limits["cpu"])
    for pod in (group, cluster["headGroupSpec"]):
        names = {volume["name"] for volume in pod["template"]["spec"]["volumes"]}
        assert {mount["name"] for mount in pod["template"]["spec"]["containers"][0]["volumeMounts"]} == names
    train = find_bundle("maskrcnn3d") / "configs" / "train.json"
    assert all(f'"{flag.removeprefix("--")}"' in train.read_text() for flag in flags if flag != "--config_file")
