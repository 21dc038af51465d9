"""The commands `seg3d index`, `plan` and `convert`: doors as those of cli.py, which lists them."""

import os
import sys
from pathlib import Path

from seg3d_monai.cli_arguments import UsageError, given, numbers
from seg3d_monai.cli_bundle import find_bundle, overlay_files, parse_override
from seg3d_monai.user_errors import full_disk_names

BUNDLES = ("maskrcnn3d", "maskdino3d", "mask2former3d")


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
        DataConfig(**given({**sizes, **counts})),
        num_workers=_num_cpus() if num_workers is None else num_workers,
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
    from seg3d_monai.planning import write_plans

    named = {"target_spacing_um": target_spacing, "crop_size": crop_size, "batch_size": batch_size}
    parsed = {key: parse_override(key, text) for key, text in overrides.items()}
    folders = [find_bundle(name.strip()) for name in (BUNDLES if bundle == "all" else bundle.split(","))]
    bundles = [(folder, overlay_files(folder, overlay)) for folder in folders]
    if Path(output).exists() and not Path(output).is_dir():
        raise UsageError(f"--output {output!r} is a file; give a folder")
    with full_disk_names(output):
        write_plans(db, output, bundles, memory=memory, given=given(named) | parsed, restart=restart)


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
        "time": time if time in (None, "all") else numbers("time", time),
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

    with full_disk_names(output):
        done = convert_volume(
            input,
            output,
            labels=labels,
            skip_bad=skip_bad,
            restart=restart,
            dry_run=dry_run,
            progress=sys.stderr.isatty(),
            **given(options),
        )
    print(done.describe(is_plan=dry_run))


def _num_cpus() -> int:
    """CPUs that this process may use, or, where the system does not tell (macOS, Windows), that there are."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
