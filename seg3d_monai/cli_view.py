"""The command `seg3d view`: a door as those of cli.py, which lists it."""

from pathlib import Path

from seg3d_monai.cli_arguments import UsageError, numbers


def view(
    image: str,
    prediction: str | None = None,
    *,
    truth: str | None = None,
    table: str | None = None,
    roi: list[int] | None = None,
    level: str | None = None,
    spacing: list[float] | None = None,
    axes: str | None = None,
    channels: int | list[int] | None = None,
    time: str = "0",
    color_by: str | None = None,
    seam_report: str | None = None,
    screenshot: str | None = None,
) -> None:
    """Look at a stack with its predicted and true objects in napari; docs/view.md is the guide.

    Voxels are read as they come into sight. Needs `pip install "seg3d_monai[view]"`.

    Args:
        image: TIFF, OME-TIFF, Zarr, OME-Zarr, NIfTI and others, see docs/formats.md.
        prediction: OME-Zarr that `seg3d predict` wrote, or any label volume.
        truth: True labels; they are drawn as outlines.
        table: Object table, .parquet or .csv; default the one beside the prediction. Measurements will do too.
        roi: Region, "[z1,y1,x1,z2,y2,x2]" in voxels of the level.
        level: Show this level of a multiscale image alone: its number, its name, or a voxel size such as 2um.
        spacing: Voxel size of the level in micrometres, "[z,y,x]", where the file does not know it.
        axes: Order of the image's axes, for instance ZYX, CZYX or ZYXC.
        channels: Channel or list of channels to show.
        time: Time point, or all.
        color_by: Column of the object table, such as score, that colours the predicted objects.
        seam_report: X.json of `seg3d seam-check`; its places are marked.
        screenshot: Write a picture, FILE.png, and open no window.
    """
    when = time if time == "all" else numbers("time", time)
    if isinstance(when, list):
        raise UsageError(f'--time is {time!r}; pass one time point or "all"')
    if screenshot is not None:
        if not screenshot.lower().endswith(".png"):
            raise UsageError(f"--screenshot is {screenshot!r}; give the name of a .png")
        if not Path(screenshot).absolute().parent.is_dir():
            raise FileNotFoundError(f"--screenshot {screenshot!r}: its folder does not exist; make it first")

    from seg3d_monai.viewing import build_layers, show
    from seg3d_monai.viewing.window import check_napari

    check_napari()
    layers = build_layers(
        image,
        prediction,
        truth=truth,
        table=table,
        roi=roi,
        level=level,
        spacing=spacing,
        axes=axes,
        channels=channels,
        time="all" if when == "all" else int(when),
        color_by=color_by,
        seam_report=seam_report,
    )
    show(layers, title=f"seg3d view: {Path(image).name}", screenshot=None if screenshot is None else Path(screenshot))
    if screenshot is not None:
        print(f"screenshot: {screenshot}")
