"""The command `seg3d tune`: a door as those of cli.py, which lists it."""

from seg3d_monai.cli_arguments import given
from seg3d_monai.cli_bundle import config_files, find_bundle, literal_path, overlay_files, run_bundle
from seg3d_monai.user_errors import full_disk_names


def tune(
    bundle: str,
    *,
    output_dir: str,
    dataset_dir: str | None = None,
    overlay: str | None = None,
    checkpoint: str | None = None,
    tune_split: str | None = None,
    tune_where: str | None = None,
    metric: str | None = None,
    out: str | None = None,
    restart: bool = False,
    flips: list[str] | None = None,
    block_size: list[int] | None = None,
    halo: list[int] | None = None,
    device: str | None = None,
    **overrides: str,
) -> None:
    """Choose score threshold, mask threshold and the like on annotated volumes, and write them as an overlay.

    Runs the bundle's configs/train.json with configs/tune.json; every further flag overrides these. The overlay is for
    `seg3d predict` and for evaluations, the report beside it says what it gains. docs/tune.md is the guide.

    Args:
        bundle: Folder of the bundle, or the name of one in ./bundles or of the package.
        output_dir: Folder of the training, RUN.
        dataset_dir: The data that it was trained on, or others.
        overlay: Names of files in configs/overlays, or paths of such files, separated by commas.
        checkpoint: Trained weights; default RUN/model.pt.
        tune_split: Split of the volumes; default val.
        tune_where: Filter over the columns of the index, 'specimen == "Emb09"'; of all splits if none is named.
        metric: What is best, "f1_50", or a sum; default "f1_50 + seg".
        out: Overlay to write, X.json; the report goes beside it as X.txt. Default RUN/tuned.json.
        restart: Write over an existing overlay.
        flips: Also predict mirrored along these axes, "[y,x]", and tune for that.
        block_size: Voxels that a block owns, "[z,y,x]".
        halo: Voxels read around a block on every side, "[z,y,x]".
        device: cpu, cuda or cuda:1.
        overrides: Any key of the configuration and its value.
    """
    folder = find_bundle(bundle)
    files = [path for name in ("train.json", "tune.json") for path in config_files(folder, None, name)]
    options = {
        "output_dir": literal_path(output_dir),
        "dataset_dir": dataset_dir and literal_path(dataset_dir),
        "checkpoint": checkpoint and literal_path(checkpoint),
        "tune_split": tune_split,
        "tune_where": tune_where,
        "metric": metric,
        "out": out and literal_path(out),
        "restart": restart or None,
        "flips": flips,
        "block_size": block_size,
        "halo": halo,
        "device": device,
    }
    files += overlay_files(folder, overlay)
    with full_disk_names(out or output_dir):
        run_bundle("tuning", folder, files, overrides, given(options))
