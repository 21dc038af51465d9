"""The command `seg3d report`: a door as those of cli.py, which lists it."""

import inspect
import sys
from pathlib import Path

from seg3d_monai.cli_arguments import UsageError, file_to_write, nearest
from seg3d_monai.cli_bundle import parse_override
from seg3d_monai.user_errors import full_disk_names


def report(
    source: str,
    out: str | None = None,
    *,
    image: str | None = None,
    truth: str | None = None,
    channel: int = 0,
    roi: list[int] | None = None,
    seams: str | None = None,
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
        seams: For a prediction: JSON that `seg3d seam-check` wrote of the same stack and weights.
        overrides: For a training: any key of its configuration and its value.
    """
    from seg3d_monai.report.build import write_report
    from seg3d_monai.report.sources import read_prediction, read_run

    path = Path(source)
    if not path.exists():
        raise FileNotFoundError(f"{source!r} does not exist; give the folder of a training, or a predicted OME-Zarr")
    is_prediction = path.name.endswith(".zarr")
    target = Path(out) if out else path.with_name(f"{path.name.removesuffix('.zarr')}.report.html")
    if not (is_prediction or path.is_dir()):
        raise UsageError(f"{source!r} is a file; give the folder of a training, or a predicted OME-Zarr")
    if not (out or is_prediction):
        target = path / "report.html"
    file_to_write("OUT", str(target), ".html", ".htm")
    if is_prediction:
        if overrides:
            word = next(iter(overrides))
            hint = nearest(word, inspect.signature(report).parameters.keys() - {"overrides"}, prefix="--")
            raise UsageError(f"unknown flag --{word} of a prediction; {hint}")
        if image is None:
            raise UsageError("--image is missing; give what was predicted, so that it can be shown")
        found = read_prediction(path, image, truth, channel, roi, seams)
    else:
        if image or truth or roi or seams:
            raise UsageError(
                "--image, --truth, --roi and --seams are for predictions; a training has volumes of its own"
            )
        changes = {key: parse_override(key, text) for key, text in overrides.items()}
        found = read_run(path, changes, progress=sys.stderr.isatty())
    with full_disk_names(target):
        print(f"report: {write_report(found, target)}")
