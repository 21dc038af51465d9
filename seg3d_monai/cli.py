"""The command `seg3d`: doctor, synth, index, train, predict, evaluate.

Each command is a thin door: it imports the room it opens when it runs (so that help is instant) and holds no logic of
its own. `train` and `predict` run the bundle's own configuration files with `monai.bundle.run`, so anything possible
through `python -m monai.bundle run` is possible here and the other way round.

A mistake of the user is one line on stderr, `seg3d: error: ...`, and exit code 2; `SEG3D_TRACEBACK=1` shows where it
arose. Every other exception is a defect of the package and keeps its traceback.
"""

import json
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from seg3d_monai import __version__
from seg3d_monai.cli_arguments import UsageError, bind, help_text, nearest
from seg3d_monai.cli_bundle import config_files, find_bundle, literal_path, overlay_files, run_bundle
from seg3d_monai.user_errors import one_line, user_error, wants_traceback


def doctor() -> None:
    """Show versions, threads, GPU, the path the ops take, optional extras and free disk."""
    from seg3d_monai.doctor import print_report

    print_report()


def synth(
    out: str,
    *,
    seed: int | None = None,
    spacing_um: list[float] | None = None,
    train_volumes: int | None = None,
    train_shape: list[int] | None = None,
    val_volumes: int | None = None,
    val_shape: list[int] | None = None,
    test_volumes: int | None = None,
    test_shape: list[int] | None = None,
    channels: int | None = None,
    num_classes: int | None = None,
) -> None:
    """Write a synthetic light-sheet specimen: training and validation volumes, unseen test stacks, their manifest.

    An unfinished folder of the same specimen goes on, a finished one is reused.

    Args:
        out: Folder to write; made if missing.
        seed: The same seed gives the same voxels.
        spacing_um: Voxel size in micrometres, "[z,y,x]".
        train_volumes: Number of annotated volumes for training.
        train_shape: Voxels of each, "[z,y,x]".
        val_volumes: Number of annotated volumes for validation.
        val_shape: Voxels of each, "[z,y,x]".
        test_volumes: Number of test stacks.
        test_shape: Voxels of each, "[z,y,x]".
        channels: 1 or 2.
        num_classes: 1 or 2.
    """
    options = _given(dict(locals()))
    from seg3d_monai.data.synthetic import write_specimen

    folder = Path(options.pop("out"))
    print(f"manifest: {write_specimen(folder, report=print, **options)}")


def index(
    manifest: str,
    db: str,
    *,
    crop_size: list[int] | None = None,
    stride: list[int] | None = None,
    min_voxels: int | None = None,
) -> None:
    """Index the annotated volumes of a manifest into a database of crops and their instances.

    Args:
        manifest: CSV file, or a folder with manifest.csv, or a folder of NAME/image.tif with NAME/labels.tif.
        db: SQLite file to write.
        crop_size: Voxels of a crop, "[z,y,x]"; default "[32,64,64]".
        stride: Voxels from crop to crop, "[z,y,x]"; default half a crop.
        min_voxels: Instances with fewer voxels inside a crop are ignored there.
    """
    from seg3d_monai.data import build_index

    options = {"stride": stride, "min_voxels": min_voxels}
    built = build_index(manifest, db, crop_size=crop_size or (32, 64, 64), **_given(options))
    print(f"{'split':<8} {'volumes':>8} {'specimens':>10} {'instances':>10} {'crops':>8}")
    volumes = built.volumes()
    for split in dict.fromkeys(volume.split for volume in volumes):
        those = [volume for volume in volumes if volume.split == split]
        specimens = len({volume.specimen for volume in those})
        instances, crops = sum(volume.num_instances for volume in those), sum(volume.num_crops for volume in those)
        print(f"{split or '(none)':<8} {len(those):>8} {specimens:>10} {instances:>10} {crops:>8}")
    print(f"index: {db}")


def train(bundle: str, *, config_file: str | None = None, overlay: str | None = None, **overrides: str) -> None:
    """Train a bundle: `monai.bundle run training` on its configs/train.json with overlays and overrides.

    Every further flag overrides the configuration: `--dataset_dir DATA --output_dir RUN`, `--a#b VALUE` reaches inside,
    and a key that the configuration does not have is refused.

    Args:
        bundle: Folder of the bundle, or its name in ./bundles.
        config_file: Configuration file, or "['a','b']", to run instead of configs/train.json.
        overlay: Names of files in configs/overlays without .json, separated by commas.
        overrides: Any key of the configuration and its value.
    """
    folder = find_bundle(bundle)
    files = config_files(folder, config_file, "train.json") + overlay_files(folder, overlay)
    run_bundle("training", files, overrides)


def predict(
    input: str,
    output: str,
    *,
    bundle: str,
    config_file: str | None = None,
    overlay: str | None = None,
    checkpoint: str | None = None,
    spacing: list[float] | None = None,
    axes: str | None = None,
    channels: int | list[int] | None = None,
    block_size: int | list[int] | None = None,
    halo: int | list[int] | None = None,
    num_workers: int | None = None,
    score_threshold: float | None = None,
    device: str | None = None,
    table: str | None = None,
    output_dtype: str | None = None,
    ome_zarr_version: str | None = None,
    restart: bool = False,
    dry_run: bool = False,
    **overrides: str,
) -> None:
    """Predict every instance of a whole stack, block by block, into an OME-Zarr and an object table.

    Runs the bundle's configs/inference.json; every further flag overrides that configuration. An unfinished output
    goes on where it was; a finished identical one says so; any other existing output needs `--restart`.

    Args:
        input: TIFF, OME-TIFF, Zarr, OME-Zarr or NIfTI.
        output: OME-Zarr to write, X.zarr; the table goes beside it as X.instances.parquet.
        bundle: Folder of the bundle, or its name in ./bundles.
        config_file: Configuration file, or "['a','b']", to run instead of configs/inference.json.
        overlay: Names of files in configs/overlays without .json, separated by commas.
        checkpoint: Trained weights; the bundle says which are used without it.
        spacing: Voxel size in micrometres, "[z,y,x]", where the file does not know it.
        axes: Order of the axes, for instance ZYX, CZYX or ZYXC.
        channels: Channel or list of channels to use.
        block_size: Voxels that a block owns, one number or "[z,y,x]".
        halo: Voxels read around a block on every side, one number or "[z,y,x]".
        num_workers: Number of processes.
        score_threshold: Drop instances whose score is lower, 0 to 1.
        device: cpu, cuda or cuda:1.
        table: Format of the object table, parquet or csv.
        output_dtype: uint32 or uint16.
        ome_zarr_version: Version of OME-Zarr to write.
        restart: Throw an existing output away.
        dry_run: Say what would be done, and do nothing.
        overrides: Any key of the configuration and its value.
    """
    if not Path(input).exists():
        raise FileNotFoundError(f"input {input!r} does not exist; check the path")
    folder = find_bundle(bundle)
    files = config_files(folder, config_file, "inference.json") + overlay_files(folder, overlay)
    options = {
        "input": literal_path(input),
        "output": literal_path(output),
        "checkpoint": checkpoint and literal_path(checkpoint),
        "spacing": spacing,
        "axes": axes,
        "channels": channels,
        "block_size": block_size,
        "halo": halo,
        "num_workers": num_workers,
        "score_threshold": score_threshold,
        "device": device,
        "table": table,
        "output_dtype": output_dtype,
        "ome_zarr_version": ome_zarr_version,
        "restart": restart or None,
        "dry_run": dry_run or None,
    }
    run_bundle("run", files, overrides, _given(options))


def evaluate(truth: str, prediction: str, *, json: str | None = None) -> None:
    """Compare predicted labels with true ones; the last line is `F1@0.5 = 0.xxx`.

    Args:
        truth: Label volume, Zarr array, or folder of volumes.
        prediction: The same kind; folders are paired by name.
        json: File for all numbers.
    """
    from seg3d_monai.report.evaluate import evaluate_paths

    if json is not None and not Path(json).absolute().parent.is_dir():
        raise FileNotFoundError(f"--json = {json!r}: its folder does not exist; make it first")
    result = evaluate_paths(truth, prediction, progress=sys.stderr.isatty())
    print(metrics_table(result))
    if json is not None:
        _write_json(Path(json), result)
    print(f"F1@0.5 = {result['thresholds']['0.5']['f1']:.3f}")


COMMANDS: dict[str, Callable[..., None]] = {
    "doctor": doctor,
    "synth": synth,
    "index": index,
    "train": train,
    "predict": predict,
    "evaluate": evaluate,
}


def metrics_table(result: Mapping[str, Any]) -> str:
    """The numbers of `evaluate` as aligned text.

    Args:
        result: What `evaluate_paths` returns.
    """
    columns = ["tp", "fp", "fn", "precision", "recall", "f1", "ap_dsb", "pq"]
    lines = ["  IoU " + "".join(f"{name:>10}" for name in columns)]
    for threshold, row in result["thresholds"].items():
        lines.append(f"{threshold:>5} " + "".join(f"{_number(row.get(name)):>10}" for name in columns))
    scalars = [(name, value) for name, value in result.items() if isinstance(value, int | float)]
    return "\n".join([*lines, "", *(f"{name:<16} {_number(value)}" for name, value in scalars)])


def main(argv: list[str] | None = None) -> int:
    """Run one command line.

    Args:
        argv: Words after `seg3d`; those of the process by default.

    Returns:
        The exit code: 0 done, 2 a user's mistake, 130 interrupted.
    """
    words = sys.argv[1:] if argv is None else argv
    try:
        return _dispatch(words)
    except KeyboardInterrupt:
        print("seg3d: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader, `head` for instance, has seen enough; closing stdout again at exit must not complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        mistake = user_error(error)
        if mistake is None or wants_traceback():
            raise
        print(f"seg3d: error: {one_line(mistake)}", file=sys.stderr)
        return 2


def _dispatch(words: list[str]) -> int:
    name = words[0] if words else "--help"
    if name in ("--version", "-V", "version"):
        print(f"seg3d_monai {__version__}")
        return 0
    if name in ("--help", "-h", "help") and len(words) < 2:
        print(_overview())
        return 0
    if name == "help":
        name, words = words[1], [words[1], "--help"]
    if name not in COMMANDS:
        kind = "flag" if name.startswith("-") else "command"
        raise UsageError(f"unknown {kind} {name}; {nearest(name, [*COMMANDS, '--help', '--version'])}")
    command, rest = COMMANDS[name], words[1:]
    if "--help" in rest or "-h" in rest:
        print(help_text(command, f"seg3d {name}"))
        return 0
    try:
        arguments = bind(command, rest)
    except UsageError as error:
        raise UsageError(f"{name}: {error}") from None
    command(*arguments.args, **arguments.kwargs)
    return 0


def _overview() -> str:
    lines = [f"seg3d {__version__}: instance segmentation of cells in 3D light-sheet microscopy", "", "Commands:"]
    lines += [f"  {name:<9} {(command.__doc__ or '').splitlines()[0]}" for name, command in COMMANDS.items()]
    lines += ["", "`seg3d COMMAND --help` shows a command's arguments; `seg3d --version` the version."]
    return "\n".join(lines)


def _given(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options that were given; the rest keep the default of whoever is called."""
    return {name: value for name, value in options.items() if value is not None}


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write beside the target and rename, so that no reader ever sees half a file."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        partial.write_text(json.dumps(content, indent=2) + "\n")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _number(value: Any) -> str:
    return "n/a" if value is None else f"{value:.4f}" if isinstance(value, float) else str(value)
