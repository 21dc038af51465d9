"""The commands `seg3d annotate suggest` and `seg3d annotate import`: doors as those of cli.py, which lists them."""

import sys

from seg3d_monai.cli_arguments import given
from seg3d_monai.cli_bundle import config_files, find_bundle, literal_path, overlay_files, run_bundle
from seg3d_monai.user_errors import full_disk_names


def suggest(
    db: str,
    *,
    checkpoint: str,
    output: str,
    bundle: str = "maskrcnn3d",
    overlay: str | None = None,
    num: int | None = None,
    candidates: int | None = None,
    pool: str | None = None,
    where: str | None = None,
    split: str | None = None,
    crop_size: list[int] | None = None,
    margin: list[int] | None = None,
    score_threshold: float | None = None,
    strategy: str | None = None,
    seed: int | None = None,
    device: str | None = None,
    **overrides: str,
) -> None:
    """Choose regions worth annotating, where the model doubts or which look unlike what is annotated, and export them.

    Runs the bundle's configs/inference.json with configs/annotate.json; every further flag overrides these. The same
    seed gives the same regions. docs/annotate.md is the guide.

    Args:
        db: Crop index, as `seg3d index` or a training writes it (RUN/crops.sqlite).
        checkpoint: Trained weights, RUN/model.pt.
        output: Folder to write; a folder 001, 002, … for each region.
        bundle: Folder of the bundle, or the name of one in ./bundles or of the package.
        overlay: Names of files in configs/overlays, or paths of such files, separated by commas.
        num: Regions to choose; default 10.
        candidates: Regions to choose from, at most; default 100. Time grows with it.
        pool: unannotated (default), or all for annotated regions too.
        where: Filter over the index's columns, 'quality_image >= 2'.
        split: Split of the volumes, default train; volumes without a split are taken too.
        crop_size: Voxels of a region, "[z,y,x]"; default the index's crops.
        margin: Voxels shown around a region that do not count, "[z,y,x]"; default the bundle's halo.
        score_threshold: Least score of the objects that are exported to be corrected.
        strategy: model (default), or random.
        seed: Of every draw.
        device: cpu, cuda or cuda:1.
        overrides: Any key of the configuration and its value.
    """
    folder = find_bundle(bundle)
    files = [path for name in ("inference.json", "annotate.json") for path in config_files(folder, None, name)]
    options = {
        "input": literal_path(db),
        "output": literal_path(output),
        "checkpoint": literal_path(checkpoint),
        "bundle": literal_path(bundle),
        "overlay": overlay,
        "num": num,
        "candidates": candidates,
        "pool": pool,
        "where": where,
        "split": split,
        "crop_size": crop_size,
        "margin": margin,
        "score_threshold": score_threshold,
        "strategy": strategy,
        "seed": seed,
        "device": device,
    }
    files += overlay_files(folder, overlay)
    with full_disk_names(output):
        run_bundle("suggest", folder, files, overrides, given(options))


def import_labels(
    folder: str,
    manifest: str,
    *,
    output: str | None = None,
    only: list[int] | None = None,
    accept_unchanged: bool = False,
    allow_empty: bool = False,
    replace_known: bool = False,
    min_inside: float = 0.5,
    specimen_pattern: str | None = None,
    num_workers: int = 1,
    skip_bad: bool = False,
) -> None:
    """Take corrected labels back: new label volumes, a new manifest and its index; nothing is overwritten.

    Prints the command that goes on training from the same weights with old and new labels.

    Args:
        folder: That `seg3d annotate suggest` wrote, with corrected labels.
        manifest: The manifest that the index was made of, or its folder.
        output: Manifest to write; default FOLDER/manifest.csv, or .json where there are several classes. New labels go
            to labels/ beside it.
        only: Numbers of the regions to take, "[1,3]"; default all that were changed.
        accept_unchanged: Take labels that nobody changed for truth as they are.
        allow_empty: Take regions that hold no object.
        replace_known: Let corrections win over what was annotated before.
        min_inside: Share of its voxels that an object must have inside the region; others are ignored.
        specimen_pattern: Regular expression that finds the specimen in a volume's name.
        num_workers: Number of processes that index.
        skip_bad: Leave out label chunks that cannot be decoded, instead of stopping.
    """
    from seg3d_monai.annotation import import_annotations

    with full_disk_names(output or folder):
        done = import_annotations(
            folder,
            manifest,
            output=output,
            only=only,
            accept_unchanged=accept_unchanged,
            allow_empty=allow_empty,
            replace_known=replace_known,
            min_inside=min_inside,
            specimen_pattern=specimen_pattern,
            num_workers=num_workers,
            skip_bad=skip_bad,
            progress=sys.stderr.isatty(),
        )
    print(done)
