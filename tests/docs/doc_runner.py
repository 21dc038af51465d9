"""Runs a command of a document in a copy of the workspace, in this process: the command as it stands, made small.

A command stays what it is but for three things: an overlay of toy sizes is its last, a few values become those of one
process without a cluster, and options of a size that nobody wants to wait for are added. One that is run by itself, and
not after those before it on its page, finds no older output, and weights of the network that its overlays make.
"""

import contextlib
import glob
import re
import runpy
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from unittest import mock

import numpy as np
from doc_workspace import DETECTORS, toy, write_weights

from seg3d_monai.cli import main
from seg3d_monai.viewing import window
from seg3d_monai.viewing.layer_data import LayerData

USES = {
    "train": "train",
    "tune": "tune",
    "predict": "inference",
    "seam-check": "inference",
    "annotate suggest": "suggest",
    "plan": "plan",
    "bundle pack": "inference",
    "export": "inference",
}
"""Commands that take the overlay of a bundle, and which."""
OUTPUT_PLACES = {"convert": 1, "predict": 1, "seam-check": 1, "index": 1, "match": 1, "synth": 0, "bundle pack": 1}
OUTPUT_PLACES["export"] = 1
"""Which of the words without a flag is written."""
OUTPUT_FLAGS = {"annotate suggest": "output", "plan": "output", "train": "output_dir"}
ONE_PROCESS = {"train_workers": "1", "num_workers": "1", "address": None, "gpus_per_worker": None}
"""What stands for several processes and clusters; None leaves the flag out."""
SHORT = {"shape": "[16,32,32]", "train_volumes": "1", "num": "2"}
"""Values in place of those that take long."""
SMALLER = {
    "synth": ["--train_shape", "[40,72,72]", "--val_shape", "[40,72,72]", "--test_volumes", "0"],
    "match": ["--rounds", "1", "--num_scenes", "12"],
    "seam-check": ["--block_size", "[30,64,64]", "--halo", "[4,8,8]"],
    "tune": ["--least_score", "0.3"],
    "bundle check": ["--schema", "meta_schema_20240725.json"],  # no network
    "annotate suggest": ["--candidates", "3", "--num", "2", "--crop_size", "[12,32,32]", "--margin", "[2,4,4]"],
}
"""Words that are added, unless the command has them."""


def run(words: Sequence[str], *, alone: bool = True) -> None:
    """Run a command of a document; the process stands in a copy of the workspace.

    Args:
        words: of the command.
        alone: whether it is run by itself.

    Raises:
        AssertionError: it does not end with exit code 0.
    """
    if words[0] == "seg3d":
        run_seg3d(list(words[1:]), alone)
    else:
        assert list(words[:3]) == ["python", "-m", "monai.bundle"], words
        (run_monai if words[3] == "run" else check_with_monai)(list(words[3:]))


def run_seg3d(words: list[str], alone: bool) -> None:
    """`seg3d ...`, in this process; a window is looked at without napari."""
    command, rest = _command(words), words[len(_command(words).split()) :]
    rest = _in_one_process(rest)
    free, flags = _sort(rest)
    if command in ("evaluate", "view"):  # what a shell does; only `convert` takes patterns in quotes
        rest = [found for word in rest for found in (sorted(glob.glob(word)) or [word])]
    if command == "convert" and "roi" in flags:
        rest[rest.index("--roi") + 1] = "[0,0,0,40,72,72]"
    if command == "export":  # torch takes a minute to write ONNX; tests/export does so
        rest = [re.sub(r"\.onnx$", ".ts", word) for word in rest]
    if alone:
        for output in _outputs(command, free, flags):
            _remove(output)
    if command in USES:
        unnamed = {"plan": "all", "annotate suggest": "maskrcnn3d"}.get(command, free[0])
        bundle = Path(flags.get("bundle", unnamed)).name
        with_shipped = command == "predict" and "checkpoint" not in flags  # the weights fit the bundle as it is
        if bundle in (*DETECTORS, "pretrain3d", "all") and not with_shipped:
            if alone and "checkpoint" in flags:
                _write_weights(flags, bundle)
            rest = _made_small(rest, flags, USES[command], bundle)
    for flag, value in zip(SMALLER.get(command, [])[::2], SMALLER.get(command, [])[1::2], strict=True):
        if flag.lstrip("-") not in flags:
            rest += [flag, value]
    with mock.patch.object(window, "check_napari"), mock.patch("seg3d_monai.viewing.show", look):
        assert main([*command.split(), *rest]) == 0, f"seg3d {command} {' '.join(rest)}"


def run_monai(words: list[str]) -> None:
    """`python -m monai.bundle run ...`, in this process."""
    rest = _in_one_process(words[1:])
    run_id, flags = _sort(rest)
    files = [name.strip("'\" ") for name in flags["config_file"].strip("[]").split(",")]
    bundle = Path(files[0]).parts[1] if files[0].startswith("bundles/") else ""
    use = {"training": "train", "evaluating": "train", "tuning": "tune"}.get(run_id[0] if run_id else "", "inference")
    if bundle:
        if run_id == ["training"]:
            _remove(Path(flags.get("output_dir", f"runs/{bundle}")))
        elif bundle != "maskrcnn3d" or any("/overlays/" in name for name in files):
            overlays = [name for name in files if "/overlays/" in name]
            checkpoint = flags.get("checkpoint", f"{flags.get('output_dir')}/model.pt")
            write_weights(Path(checkpoint), bundle, (*overlays, toy("inference", bundle)))
        files.append(toy(use, bundle))
    for name in ("output", "out"):
        if name in flags:
            _remove(Path(flags[name]))
    if use == "tune":
        _remove(Path(flags["output_dir"]) / "tuned.json")
    if use == "train" and "dataset_dir" not in flags:
        rest += ["--dataset_dir", "DATA"]
    rest[rest.index("--config_file") + 1] = str(files)
    _monai("run", *rest)


def check_with_monai(words: list[str]) -> None:
    """Another command of `python -m monai.bundle`, in a bundle's folder.

    `verify_net_in_out` looks at the network in its own size, which the metadata describe.
    """
    _, flags = _sort(words)
    if "ckpt_file" in flags:
        folder = Path.cwd()
        with contextlib.chdir(folder.parents[1]):
            write_weights(folder / flags["ckpt_file"], folder.name)
        small = [flags["config_file"], f"../../{toy('inference', folder.name)}"]
        words[words.index("--config_file") + 1] = str(small)
        words[words.index("--input_shape") + 1] = "[1,1,16,32,32]"
    _monai(*words)


def look(layers: Sequence[LayerData], *, title: str = "", screenshot: Path | None = None) -> None:
    """Stands in for `seg3d_monai.viewing.show`: reads a plane of each layer, and opens no window."""
    for layer in layers:
        data = layer.data[0] if isinstance(layer.data, list) else layer.data
        assert np.asarray(data[len(data) // 2]).size
    if screenshot is not None:
        screenshot.touch()


def _monai(*words: str) -> None:
    with mock.patch.object(sys, "argv", ["monai.bundle", *words]):
        runpy.run_module("monai.bundle", run_name="__main__")


def _command(words: Sequence[str]) -> str:
    groups = ("annotate", "bundle")
    return " ".join(words[: 2 if words[0] in groups else 1])


def _sort(words: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """Words without a flag, and flags with their values."""
    free: list[str] = []
    flags: dict[str, str] = {}
    place = 0
    while place < len(words):
        word = words[place]
        place += 1
        if not word.startswith("--"):
            free.append(word)
            continue
        has_value = place < len(words) and not words[place].startswith("--")
        flags[word[2:]] = words[place] if has_value else ""
        place += has_value
    return free, flags


def _in_one_process(words: Sequence[str]) -> list[str]:
    free, flags = _sort(words)
    kept = {flag: (ONE_PROCESS | SHORT).get(flag, value) for flag, value in flags.items()}
    given = [(f"--{flag}", value) for flag, value in kept.items() if value is not None]
    return free + [word for flag, value in given for word in ((flag, value) if value else (flag,))]


def _outputs(command: str, free: Sequence[str], flags: Mapping[str, str]) -> Iterator[Path]:
    """What a command writes and the workspace holds already."""
    if command in OUTPUT_PLACES:
        yield Path(free[OUTPUT_PLACES[command]])
    if command in OUTPUT_FLAGS:
        yield Path(flags.get(OUTPUT_FLAGS[command], "plan"))
    if command == "tune":
        yield Path(flags["output_dir"]) / "tuned.json"


def _write_weights(flags: Mapping[str, str], bundle: str) -> None:
    """Weights in place of those of a training with these overlays, unless it is the one that the workspace has."""
    named = [name.removesuffix(".json") for name in flags.get("overlay", "").split(",") if name]
    if bundle == "maskrcnn3d" and all(name.startswith("RUN/") for name in named):
        return
    inside = Path("bundles") / bundle / "configs" / "overlays"
    files = [inside / f"{name}.json" if (inside / f"{name}.json").is_file() else Path(f"{name}.json") for name in named]
    write_weights(Path(flags["checkpoint"]), bundle, (*map(str, files), toy("inference", bundle)))


def _made_small(rest: list[str], flags: Mapping[str, str], use: str, bundle: str) -> list[str]:
    """The overlay of toy sizes behind those of the command, and data where none are named."""
    small = ",".join([*filter(None, [flags.get("overlay")]), toy(use, bundle)])
    rest = [*rest]
    if "overlay" in flags:
        rest[rest.index("--overlay") + 1] = small
    else:
        rest += ["--overlay", small]
    return [*rest, "--dataset_dir", "DATA"] if use == "train" and "dataset_dir" not in flags else rest


def _remove(path: Path) -> None:
    """Take away an output of the workspace, and what lies beside it under its name."""
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
    if path.suffix == ".zarr":
        for beside in path.parent.glob(f"{path.stem}.*"):
            if beside.suffix in (".parquet", ".sqlite"):
                beside.unlink()
