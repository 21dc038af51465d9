"""The command `seg3d`: from a specimen to objects and their measures.

Each command is a thin door: it imports the room it opens when it runs (so that help is instant) and holds no logic of
its own. `train` and `predict` run the bundle's own configuration files with `monai.bundle.run`, so anything possible
through `python -m monai.bundle run` is possible here and the other way round.

A mistake of the user is one line on stderr, `seg3d: error: ...`, and exit code 2; `SEG3D_TRACEBACK=1` shows where it
arose. Every other exception is a defect of the package and keeps its traceback.
"""

import json
import os
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from seg3d_monai import __version__, cli_annotate
from seg3d_monai.cli_arguments import UsageError, bind, help_text, nearest
from seg3d_monai.cli_bundle import config_files, find_bundle, literal_path, overlay_files, run_bundle
from seg3d_monai.user_errors import one_line, user_error, wants_traceback

BUNDLES = ("maskrcnn3d", "maskdino3d", "mask2former3d")


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
    unlabelled_volumes: int | None = None,
    unlabelled_shape: list[int] | None = None,
    annotated_fraction: float | None = None,
    stream: bool = False,
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
        unlabelled_volumes: Number of volumes for training without labels.
        unlabelled_shape: Voxels of each, "[z,y,x]".
        annotated_fraction: Share of each training volume that is annotated, the rest is ignored; default 1.
        stream: Make test stacks some planes at a time, of any depth and in bounded memory.
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
    overlap: list[int] | None = None,
    min_voxels: int | None = None,
    min_object_voxels: int | None = None,
    where: str | None = None,
    specimen_pattern: str | None = None,
    num_workers: int | None = None,
    skip_bad: bool = False,
) -> None:
    """Index the volumes of a manifest into a database of crops and their instances.

    Volumes that are there already and have not changed are not scanned again; an interrupted build goes on.

    Args:
        manifest: CSV, Parquet or JSON file, or a folder that holds manifest.csv, or a folder of NAME/image.tif with
            NAME/labels.tif.
        db: SQLite file to write.
        crop_size: Voxels of a crop, "[z,y,x]"; default "[32,64,64]".
        stride: Voxels from crop to crop, "[z,y,x]"; default half a crop.
        overlap: Voxels that neighbouring crops share, "[z,y,x]", in place of stride.
        min_voxels: Instances with fewer voxels inside a crop are ignored there.
        min_object_voxels: Instances with fewer voxels do not count.
        where: Filter over the manifest's columns; other volumes are left out, 'quality_image >= 2'.
        specimen_pattern: Regular expression that finds the specimen in a volume's name.
        num_workers: Number of processes; default one for each CPU.
        skip_bad: Leave out label chunks that cannot be decoded, instead of stopping.
    """
    from seg3d_monai.data import DataConfig, build_index, read_manifest

    sizes = {"crop_size": crop_size, "stride": stride, "overlap": overlap}
    counts = {"min_voxels": min_voxels, "min_object_voxels": min_object_voxels, "where": where}
    built = build_index(
        read_manifest(manifest, specimen_pattern=specimen_pattern),
        db,
        DataConfig(**_given({**sizes, **counts})),
        num_workers=num_workers or len(os.sched_getaffinity(0)),
        skip_bad=skip_bad,
        progress=sys.stderr.isatty(),
    )
    print(f"{'split':<10} {'volumes':>8} {'specimens':>10} {'instances':>10} {'crops':>10}")
    labelled, bare = built.volumes(), built.volumes(labelled=False)
    groups = {split or "(none)": [v for v in labelled if v.split == split] for split in {v.split: 0 for v in labelled}}
    for name, those in [*groups.items(), *([("unlabelled", bare)] if bare else [])]:
        specimens = len({volume.specimen for volume in those})
        instances, crops = sum(volume.num_instances for volume in those), sum(volume.num_crops for volume in those)
        print(f"{name:<10} {len(those):>8} {specimens:>10} {instances:>10} {crops:>10}")
    unreadable = sum(len(volume.unreadable) for volume in labelled)
    if unreadable:
        print(f"{unreadable} chunks of labels cannot be read and are ignored")
    print(f"index: {db}")


def plan(
    db: str,
    *,
    output: str = "plan",
    bundle: str = "all",
    overlay: str | None = None,
    memory: str = "8GB",
    target_spacing: list[float] | None = None,
    crop_size: list[int] | None = None,
    batch_size: int | None = None,
    restart: bool = False,
    **overrides: str,
) -> None:
    """Plan a training from the data: an overlay for each bundle, and why it is as it is; see docs/plan.md.

    Every further flag decides a key of the bundles' configurations, and what depends on it follows: `--num_queries
    300`, `--network_def#mask_roi_size "[8,14,14]"`.

    Args:
        db: Index that `seg3d index` or a training wrote.
        output: Folder for fingerprint.json, plan.txt, and BUNDLE_train.json and BUNDLE_inference.json of each bundle.
        bundle: Folder of a bundle or its name in ./bundles, several separated by commas, or all.
        overlay: Names of files in configs/overlays without .json, on top of which to plan, such as model_r50.
        memory: What the tensors of a training or a prediction may take; a limit, not a goal.
        target_spacing: Voxel size in micrometres to train at, "[z,y,x]"; default from the volumes.
        crop_size: Voxels of a crop, "[z,y,x]".
        batch_size: Crops of a step.
        restart: Write over another plan in the folder.
        overrides: Any key of the configurations and its value.
    """
    from fire.parser import DefaultParseValue

    from seg3d_monai.planning import write_plans

    named = {"target_spacing_um": target_spacing, "crop_size": crop_size, "batch_size": batch_size}
    parsed = {key: DefaultParseValue(text) for key, text in overrides.items()}
    folders = [find_bundle(name.strip()) for name in (BUNDLES if bundle == "all" else bundle.split(","))]
    bundles = [(folder, overlay_files(folder, overlay)) for folder in folders]
    write_plans(db, output, bundles, memory=memory, given=_given(named) | parsed, restart=restart)


def convert(
    input: str,
    output: str,
    *,
    axes: str | None = None,
    spacing: list[float] | None = None,
    channels: int | list[int] | None = None,
    time: str | None = None,
    level: str | None = None,
    scene: str | None = None,
    roi: list[int] | None = None,
    labels: bool = False,
    chunk_size: int | list[int] | None = None,
    shard_size: int | list[int] | None = None,
    ome_zarr_version: str | None = None,
    num_workers: int | None = None,
    max_memory: str | None = None,
    skip_bad: bool = False,
    restart: bool = False,
    dry_run: bool = False,
) -> None:
    """Write any stack as a chunked OME-Zarr with a pyramid, which everything here reads fastest.

    An unfinished output goes on, whatever ended it; a finished one of the same input says so; any other existing
    output needs `--restart`. docs/formats.md lists what is read.

    Args:
        input: File, folder, URL, or a pattern in quotes such as "stack/*.tif".
        output: OME-Zarr to write, NAME.zarr.
        axes: Order of the axes, for instance ZYX, CZYX or ZYXC.
        spacing: Voxel size in micrometres, "[z,y,x]", where the file does not know it.
        channels: Channel or list of channels to write.
        time: Time point; several, "[0,3,4]", or "all" write a series.
        level: Level of a multiscale input: its number, its name, or a voxel size such as 2um.
        scene: Number or name of the image where a file holds several.
        roi: Region to write, "[z1,y1,x1,z2,y2,x2]" in voxels.
        labels: The voxels are ids, so coarser levels take the most frequent one; written to labels/instances.
        chunk_size: Voxels of a chunk, one number or "[z,y,x]"; default "[64,128,128]".
        shard_size: Voxels of a file, a multiple of the chunks; default about "[64,512,512]", 0 for a file a chunk.
        ome_zarr_version: 0.5, or 0.4, which has no shards.
        num_workers: Number of threads.
        max_memory: What may be read at once, for instance 8GB; default a quarter of the machine's.
        skip_bad: Leave zeros where voxels cannot be read, and list these regions, instead of stopping.
        restart: Throw an existing output away.
        dry_run: Check the options and say what would be written.
    """
    options = {
        "axes": axes,
        "spacing": spacing,
        "channels": channels,
        "time": time if time in (None, "all") else _numbers("time", time),
        "level": level,
        "scene": scene,
        "roi": roi,
        "chunk_size": chunk_size,
        "shard_size": shard_size,
        "ome_zarr_version": ome_zarr_version,
        "num_workers": num_workers,
        "max_memory": max_memory,
    }
    from seg3d_monai.data.convert import convert_volume

    done = convert_volume(
        input,
        output,
        labels=labels,
        skip_bad=skip_bad,
        restart=restart,
        dry_run=dry_run,
        progress=sys.stderr.isatty(),
        **_given(options),
    )
    print(done.describe(is_plan=dry_run))


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
        bundle: Folder of the bundle, or its name in ./bundles.
        config_file: Configuration file, or "['a','b']", to run instead of configs/inference.json.
        overlay: Names of files in configs/overlays without .json, separated by commas.
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
        "time": time if time in (None, "all") else _numbers("time", time),
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
    bundle: str,
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
        bundle: Folder of the bundle, or its name in ./bundles.
        config_file: Configuration file, or "['a','b']", to run instead of configs/inference.json.
        overlay: Names of files in configs/overlays without .json, separated by commas.
        checkpoint: Trained weights; the bundle says which are used without it.
        spacing: Voxel size in micrometres, "[z,y,x]", where the file does not know it.
        axes: Order of the axes, for instance ZYX, CZYX or ZYXC.
        channels: Channel or list of channels to use.
        roi: Region, "[z1,y1,x1,z2,y2,x2]" in voxels; default a few blocks in the middle.
        block_size: Voxels that a block owns, one number or "[z,y,x]".
        halo: Voxels read around a block on every side, one number or "[z,y,x]".
        overrides: Any key of the configuration and its value.
    """
    if not Path(report).absolute().parent.is_dir():
        raise FileNotFoundError(f"report {report!r}: its folder does not exist; make it first")
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
    "convert": convert,
    "index": index,
    "plan": plan,
    "train": train,
    "predict": predict,
    "relabel": relabel,
    "measure": measure,
    "seam-check": seam_check,
    "evaluate": evaluate,
    "annotate suggest": cli_annotate.suggest,
    "annotate import": cli_annotate.import_labels,
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
        raise UsageError(f"unknown {kind} {name}; {nearest(name, [*COMMANDS, '--help', '--version'])}")
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
    run_bundle(run_id, files, overrides, _given({**paths, **options}))


def _numbers(name: str, text: str) -> int | list[int]:
    """An integer or a list of them, of a flag that also takes a word."""
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    numbers = value if isinstance(value, list) else [value]
    if not numbers or any(isinstance(n, bool) or not isinstance(n, int) for n in numbers):
        raise UsageError(f'--{name} is {text!r}; pass a number, a list "[0,2]" or "all"')
    return value


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
