"""The command `seg3d report`: a door as those of cli.py, which lists it."""

import sys
from pathlib import Path

from seg3d_monai.cli_arguments import UsageError
from seg3d_monai.cli_bundle import parse_override


def report(
    source: str,
    out: str | None = None,
    *,
    image: str | None = None,
    truth: str | None = None,
    channel: int = 0,
    roi: list[int] | None = None,
    **overrides: str,
) -> None:
    """Write one HTML page about a training or a prediction: pictures, curves, metrics, faults, how it was made.

    The page needs nothing else and no network. For a training its unseen volumes are predicted anew with its weights;
    further flags override its configuration, such as `--score_threshold 0.6`.

    Args:
        source: Folder of a training, or the OME-Zarr that `seg3d predict` wrote.
        out: Page to write; default report.html in the folder of a training, NAME.report.html beside a prediction.
        image: For a prediction: what was predicted.
        truth: For a prediction: true labels, where they are known.
        channel: For a prediction: channel of the image that is shown.
        roi: For a prediction: region to look at, "[z1,y1,x1,z2,y2,x2]" in voxels; default the middle.
        overrides: For a training: any key of its configuration and its value.
    """
    from seg3d_monai.report.build import write_report
    from seg3d_monai.report.sources import read_prediction, read_run

    path = Path(source)
    if not path.exists():
        raise FileNotFoundError(f"{source!r} does not exist; give the folder of a training, or a predicted OME-Zarr")
    is_prediction = path.name.endswith(".zarr")
    target = Path(out) if out else path.with_name(f"{path.name.removesuffix('.zarr')}.report.html")
    if not (out or is_prediction):
        target = path / "report.html"
    if not target.absolute().parent.is_dir():
        raise FileNotFoundError(f"{str(target)!r}: its folder does not exist; make it first")
    if is_prediction:
        if overrides:
            raise UsageError(f"unknown flag --{next(iter(overrides))}; a prediction's configuration is not run again")
        if image is None:
            raise UsageError("--image is missing; give what was predicted, so that it can be shown")
        found = read_prediction(path, image, truth, channel, roi)
    else:
        if image or truth or roi:
            raise UsageError("--image, --truth and --roi are for predictions; a training has volumes of its own")
        changes = {key: parse_override(key, text) for key, text in overrides.items()}
        found = read_run(path, changes, progress=sys.stderr.isatty())
    print(f"report: {write_report(found, target)}")
