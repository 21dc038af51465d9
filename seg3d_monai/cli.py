"""The command `seg3d`: from a specimen to objects and their measures.

Each command is a thin door: it imports the room it opens when it runs (so that help is instant) and holds no logic of
its own. `train` and `predict` run the bundle's own configuration files with `monai.bundle.run`, so anything possible
through `python -m monai.bundle run` is possible here and the other way round.

A mistake of the user is one line on stderr, `seg3d: error: ...`, and exit code 2; `--debug`, anywhere among the words,
or `SEG3D_TRACEBACK=1` shows where it arose. Every other exception is a defect of the package and keeps its traceback.
"""

import os
import sys
from collections.abc import Callable, Iterable, Mapping
from json import dumps  # `json` is an option of evaluate
from pathlib import Path
from typing import Any

from seg3d_monai import (
    __version__,
    cli_annotate,
    cli_data,
    cli_export,
    cli_report,
    cli_share,
    cli_synth,
    cli_tune,
    cli_view,
)
from seg3d_monai.cli_arguments import UsageError, bind, file_to_write, given, help_text, nearest, numbers
from seg3d_monai.cli_bundle import config_files, find_bundle, literal_path, overlay_files, run_bundle
from seg3d_monai.user_errors import full_disk_names, one_line, user_error, wants_traceback, write_whole

DEBUG = "--debug"


def doctor() -> None:
    """Show versions, threads, GPU, the path the ops take, optional extras and free disk."""
    from seg3d_monai.doctor import print_report

    print_report()


def train(bundle: str, *, config_file: str | None = None, overlay: str | None = None, **overrides: str) -> None:
    """Train a bundle: `monai.bundle run training` on its configs/train.json with overlays and overrides.

    Every further flag overrides the configuration: `--dataset_dir DATA --output_dir RUN`, `--a#b VALUE` reaches inside,
    and a key that the configuration does not have is refused.

    Args:
        bundle: Folder of the bundle, or the name of one in ./bundles or of the package.
        config_file: Configuration file, or "['a','b']", to run instead of configs/train.json.
        overlay: Names of files in configs/overlays, or paths of such files, separated by commas.
        overrides: Any key of the configuration and its value.
    """
    folder = find_bundle(bundle)
    files = config_files(folder, config_file, "train.json") + overlay_files(folder, overlay)
    with full_disk_names(overrides.get("output_dir", "--output_dir")):
        run_bundle("training", folder, files, overrides)


def predict(
    input: str,
    output: str,
    *,
    bundle: str = "maskrcnn3d",
    config_file: str | None = None,
    overlay: str | None = None,
    checkpoint: str | None = None,
    spacing: list[float] | None = None,
    axes: str | None = None,
    channels: int | list[int] | None = None,
    time: str | None = None,
    roi: list[int] | None = None,
    foreground: str | None = None,
    block_size: int | list[int] | None = None,
    halo: int | list[int] | None = None,
    num_workers: int | None = None,
    max_memory: str | None = None,
    score_threshold: float | None = None,
    min_volume: int | None = None,
    device: str | None = None,
    table: str | None = None,
    label_tiff: bool = False,
    output_dtype: str | None = None,
    ome_zarr_version: str | None = None,
    skip_bad: bool = False,
    restart: bool = False,
    dry_run: bool = False,
    **overrides: str,
) -> None:
    """Predict every instance of a whole stack, block by block, into an OME-Zarr and an object table.

    Runs the bundle's configs/inference.json; every further flag overrides that configuration. An unfinished output
    goes on where it was, whatever ended it; a finished identical one says so; any other existing output needs
    `--restart`. SIGTERM ends the run after the blocks in hand, with exit code 143.

    Args:
        input: TIFF, OME-TIFF, Zarr, OME-Zarr, NIfTI and others, see docs/formats.md.
        output: OME-Zarr to write, X.zarr; the table goes beside it as X.instances.parquet.
        bundle: Folder of the bundle, or the name of one in ./bundles or of the package.
        config_file: Configuration file, or "['a','b']", to run instead of configs/inference.json.
        overlay: Names of files in configs/overlays, or paths of such files, separated by commas.
        checkpoint: Trained weights; the bundle says which are used without it.
        spacing: Voxel size in micrometres, "[z,y,x]", where the file does not know it.
        axes: Order of the axes, for instance ZYX, CZYX or ZYXC.
        channels: Channel or list of channels to use.
        time: Time point; several, "[0,3,4]", or "all" write a series.
        roi: Region to predict, "[z1,y1,x1,z2,y2,x2]" in voxels; the output keeps the stack's frame.
        foreground: Mask of any resolution over the same extent; blocks outside it are not predicted.
        block_size: Voxels that a block owns, one number or "[z,y,x]".
        halo: Voxels read around a block on every side, one number or "[z,y,x]".
        num_workers: Number of processes; more than one are run by Ray, see also `--address`.
        max_memory: Refuse to run where more is needed, for instance 8GB.
        score_threshold: Drop instances whose score is lower, 0 to 1.
        min_volume: Leave out objects of fewer voxels.
        device: cpu, cuda or cuda:1.
        table: Format of the object table, parquet or csv, or "parquet,csv".
        label_tiff: Also write the labels as X.labels.tif.
        output_dtype: uint32 or uint16.
        ome_zarr_version: Version of OME-Zarr to write.
        skip_bad: Leave a hole where voxels cannot be read, instead of stopping.
        restart: Throw an existing output away.
        dry_run: Predict one block and say what the run would take: blocks, memory, disk, time.
        overrides: Any key of the configuration and its value.
    """
    options = {
        "output": literal_path(output),
        "spacing": spacing,
        "axes": axes,
        "channels": channels,
        "time": time if time in (None, "all") else numbers("time", time),
        "roi": roi,
        "foreground": foreground and literal_path(foreground),
        "block_size": block_size,
        "halo": halo,
        "num_workers": num_workers,
        "max_memory": max_memory,
        "score_threshold": score_threshold,
        "min_volume": min_volume,
        "device": device,
        "table": table,
        "label_tiff": label_tiff or None,
        "output_dtype": output_dtype,
        "ome_zarr_version": ome_zarr_version,
        "skip_bad": skip_bad or None,
        "restart": restart or None,
        "dry_run": dry_run or None,
    }
    _run_inference("run", input, bundle, config_file, overlay, checkpoint, overrides, options)


def seam_check(
    input: str,
    report: str,
    *,
    bundle: str = "maskrcnn3d",
    config_file: str | None = None,
    overlay: str | None = None,
    checkpoint: str | None = None,
    spacing: list[float] | None = None,
    axes: str | None = None,
    channels: int | list[int] | None = None,
    roi: list[int] | None = None,
    block_size: int | list[int] | None = None,
    halo: int | list[int] | None = None,
    **overrides: str,
) -> None:
    """Predict a region under two grids of blocks and report the objects that are split, merged, lost or moved at seams.

    Args:
        input: TIFF, OME-TIFF, Zarr, OME-Zarr, NIfTI and others, see docs/formats.md.
        report: File for all numbers, X.json; the picture goes beside it as X.png.
        bundle: Folder of the bundle, or the name of one in ./bundles or of the package.
        config_file: Configuration file, or "['a','b']", to run instead of configs/inference.json.
        overlay: Names of files in configs/overlays, or paths of such files, separated by commas.
        checkpoint: Trained weights; the bundle says which are used without it.
        spacing: Voxel size in micrometres, "[z,y,x]", where the file does not know it.
        axes: Order of the axes, for instance ZYX, CZYX or ZYXC.
        channels: Channel or list of channels to use.
        roi: Region, "[z1,y1,x1,z2,y2,x2]" in voxels; default a few blocks in the middle.
        block_size: Voxels that a block owns, one number or "[z,y,x]".
        halo: Voxels read around a block on every side, one number or "[z,y,x]".
        overrides: Any key of the configuration and its value.
    """
    file_to_write("REPORT", report, ".json")
    options = {
        "seam_report": literal_path(report),
        "spacing": spacing,
        "axes": axes,
        "channels": channels,
        "roi": roi,
        "block_size": block_size,
        "halo": halo,
    }
    _run_inference("seam_check", input, bundle, config_file, overlay, checkpoint, overrides, options)


def relabel(
    output: str,
    *,
    score_threshold: float | None = None,
    min_volume: int | None = None,
    num_workers: int = 1,
) -> None:
    """Paint a finished output again from its journal with other thresholds, without predicting.

    Args:
        output: OME-Zarr that `seg3d predict` wrote.
        score_threshold: Drop instances whose score is lower; not below the one that was predicted with.
        min_volume: Leave out objects of fewer voxels.
        num_workers: Number of processes.
    """
    from seg3d_monai.inference import relabel_volume

    with full_disk_names(output):
        done = relabel_volume(
            output,
            score_threshold=score_threshold,
            min_volume=min_volume,
            num_workers=num_workers,
            progress=sys.stderr.isatty(),
        )
    print(done)


def measure(
    output: str,
    image: str,
    *,
    table: str | None = None,
    atlas: str | None = None,
    atlas_spacing: list[float] | None = None,
    spacing: list[float] | None = None,
    axes: str | None = None,
    channels: int | list[int] | None = None,
    time: int = 0,
    level: str = "0",
) -> None:
    """Measure every object: intensity of each channel, shape, and the region of an atlas that it lies in.

    Args:
        output: OME-Zarr that `seg3d predict` wrote.
        image: Stack to measure in, of the same shape.
        table: File to write, .parquet or .csv; default X.measurements.parquet beside X.zarr.
        atlas: Label volume of regions over the same extent, of any voxel size.
        atlas_spacing: Voxel size of the atlas in micrometres, "[z,y,x]", where its file does not know it.
        spacing: Voxel size of the image in micrometres, "[z,y,x]", where the file does not know it.
        axes: Order of the image's axes, for instance ZYX, CZYX or ZYXC.
        channels: Channel or list of channels to measure.
        time: Time point of the image.
        level: Level of a multiscale image: its number, its name, or a voxel size such as 2um.
    """
    from seg3d_monai.inference import measure_objects

    with full_disk_names(table or output):
        written = measure_objects(
            output,
            image,
            table=table,
            atlas=atlas,
            atlas_spacing=atlas_spacing,
            spacing=spacing,
            axes=axes,
            channels=channels,
            time=time,
            level=level,
            progress=sys.stderr.isatty(),
        )
    print(f"measurements: {written}")


def evaluate(truth: str, prediction: str, *, json: str | None = None) -> None:
    """Compare predicted labels with true ones; the last line is `F1@0.5 = 0.xxx`.

    Args:
        truth: Label volume, Zarr array, or folder of volumes.
        prediction: The same kind; folders are paired by name.
        json: File for all numbers.
    """
    from seg3d_monai.report.evaluate import evaluate_paths

    target = None if json is None else file_to_write("--json", json, ".json")
    result = evaluate_paths(truth, prediction, progress=sys.stderr.isatty())
    print(metrics_table(result))
    if target is not None:
        write_whole(target, dumps(result, indent=2) + "\n")
    print(f"F1@0.5 = {result['thresholds']['0.5']['f1']:.3f}")


COMMANDS: dict[str, Callable[..., None]] = {
    "doctor": doctor,
    "synth": cli_synth.synth,
    "match": cli_synth.match,
    "convert": cli_data.convert,
    "index": cli_data.index,
    "plan": cli_data.plan,
    "train": train,
    "tune": cli_tune.tune,
    "predict": predict,
    "relabel": relabel,
    "measure": measure,
    "seam-check": seam_check,
    "evaluate": evaluate,
    "report": cli_report.report,
    "export": cli_export.export,
    "view": cli_view.view,
    "annotate suggest": cli_annotate.suggest,
    "annotate import": cli_annotate.import_labels,
    "bundle check": cli_share.check,
    "bundle pack": cli_share.pack,
}
"""A name of two words is a command of a group."""


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
    is_debugging = DEBUG in words or wants_traceback()
    try:
        return _dispatch([word for word in words if word != DEBUG])
    except KeyboardInterrupt:
        print("seg3d: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader, `head` for instance, has seen enough; closing stdout again at exit must not complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        mistake = user_error(error)
        if mistake is None or is_debugging:
            raise
        print(f"seg3d: error: {one_line(mistake)}", file=sys.stderr)
        return 2


def _dispatch(words: list[str]) -> int:
    name = words[0] if words else "--help"
    if name in ("--version", "-V", "version"):
        print(f"seg3d_monai {__version__}")
        return 0
    if name in ("--help", "-h", "help") and len(words) < 2:
        print(_overview(COMMANDS))
        return 0
    if name == "help":
        words = [*words[1:], "--help"]
    name, rest = _split_name(words)
    group = [command for command in COMMANDS if command.startswith(f"{name} ")]
    if group and (not rest or rest[0] in ("--help", "-h")):
        print(_overview(group))
        return 0
    if group:
        raise UsageError(f"unknown command {name} {rest[0]}; {nearest(f'{name} {rest[0]}', group)}")
    if name not in COMMANDS:
        kind = "flag" if name.startswith("-") else "command"
        raise UsageError(f"unknown {kind} {name}; {nearest(name, [*COMMANDS, '--help', '--version', DEBUG])}")
    command = COMMANDS[name]
    if "--help" in rest or "-h" in rest:
        print(help_text(command, f"seg3d {name}"))
        return 0
    try:
        arguments = bind(command, rest)
    except UsageError as error:
        raise UsageError(f"{name}: {error}") from None
    command(*arguments.args, **arguments.kwargs)
    return 0


def _split_name(words: list[str]) -> tuple[str, list[str]]:
    """The command's name, of one word or two, and the words after it."""
    pair = " ".join(words[:2])
    return (pair, words[2:]) if pair in COMMANDS else (words[0], words[1:])


def _overview(names: Iterable[str]) -> str:
    lines = [f"seg3d {__version__}: instance segmentation of cells in 3D light-sheet microscopy", "", "Commands:"]
    lines += [f"  {name:<16} {(COMMANDS[name].__doc__ or '').splitlines()[0]}" for name in names]
    lines += ["", "`seg3d COMMAND --help` shows a command's arguments; `seg3d --version` the version."]
    lines += [f"A mistake is one line and exit code 2; `{DEBUG}`, with any command, shows where it arose."]
    return "\n".join(lines)


def _run_inference(
    run_id: str,
    input: str,
    bundle: str,
    config_file: str | None,
    overlay: str | None,
    checkpoint: str | None,
    overrides: Mapping[str, str],
    options: Mapping[str, Any],
) -> None:
    # Whoever opens it knows URLs and patterns.
    if not Path(input).exists() and not any(sign in input for sign in ("://", "*", "?", "[")):
        raise FileNotFoundError(f"input {input!r} does not exist; check the path")
    folder = find_bundle(bundle)
    files = config_files(folder, config_file, "inference.json") + overlay_files(folder, overlay)
    paths = {"input": literal_path(input), "checkpoint": checkpoint and literal_path(checkpoint)}
    with full_disk_names(options.get("output") or options["seam_report"]):
        run_bundle(run_id, folder, files, overrides, given({**paths, **options}))


def _number(value: Any) -> str:
    return "n/a" if value is None else f"{value:.4f}" if isinstance(value, float) else str(value)
