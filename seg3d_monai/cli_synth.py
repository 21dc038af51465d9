"""The commands `seg3d synth` and `seg3d match`: doors as those of cli.py, which lists them."""

import json
from pathlib import Path

from seg3d_monai.cli_arguments import file_to_write, given
from seg3d_monai.user_errors import full_disk_names, write_whole

MOST_VOXELS = (64, 192, 192)
"""A larger image is looked at in its middle."""


def synth(
    out: str,
    *,
    recipe: str | None = None,
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
        recipe: lightsheet_nuclei, confocal_nuclei, membrane or randomised, or a JSON file of ranges: every volume is a
            scene of its own (docs/synthesis.md). Default is the built-in microscope.
        seed: The same seed gives the same voxels.
        spacing_um: Voxel size in micrometres, "[z,y,x]"; a recipe draws one for each volume.
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
    options = given(dict(locals()))
    from seg3d_monai.data.synthetic import write_specimen

    folder = Path(options.pop("out"))
    with full_disk_names(folder):
        print(f"manifest: {write_specimen(folder, report=print, **options)}")


def match(
    image: str,
    recipe: str,
    *,
    start: str = "randomised",
    axes: str | None = None,
    spacing: list[float] | None = None,
    channel: int = 0,
    roi: list[int] | None = None,
    rounds: int | None = None,
    num_scenes: int | None = None,
    seed: int | None = None,
) -> None:
    """Write a recipe whose synthetic volumes look like an image: its noise, histogram and power spectra.

    No labels are needed. Scenes of a wide recipe are drawn and compared with the image; the nearest become the ranges
    of the next round.

    Args:
        image: File, folder, URL, or a pattern in quotes; its middle is looked at where it is large.
        recipe: JSON file to write, for `seg3d synth --recipe`.
        start: Recipe to begin with: a preset or a JSON file. Its numbers stay, its ranges are narrowed.
        axes: Order of the axes, for instance ZYX, CZYX or ZYXC.
        spacing: Voxel size in micrometres, "[z,y,x]", where the file does not know it.
        channel: Channel to look at.
        roi: Region to look at, "[z1,y1,x1,z2,y2,x2]" in voxels.
        rounds: How often ranges are narrowed; default 4.
        num_scenes: Scenes drawn each round; default 150.
        seed: The same seed finds the same recipe.
    """
    from seg3d_monai.data import open_volume
    from seg3d_monai.data.synthesis import match_recipe, read_recipe

    target = file_to_write("RECIPE", recipe, ".json")
    begin = read_recipe(start)
    volume = open_volume(image, axes=axes, spacing=spacing, channels=channel)
    if volume.spacing_um is None:
        raise ValueError(f"{image!r} does not say its voxel size; give --spacing '[z,y,x]' in micrometres")
    region = roi or [
        edge
        for place in (0, 1)
        for size, most in zip(volume.shape[1:], MOST_VOXELS, strict=True)
        for edge in [(size - min(size, most)) // 2 + place * min(size, most)]
    ]
    options = given({"rounds": rounds, "num_scenes": num_scenes, "seed": seed})
    found = match_recipe(volume.read(region)[0], volume.spacing_um, begin, report=print, **options)
    write_whole(target, json.dumps(found.recipe.described(), indent=2) + "\n")
    print(f"recipe: {target}")
