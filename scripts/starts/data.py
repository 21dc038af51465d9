"""Who is for what: a few volumes with labels, many without, and those to judge on."""

from dataclasses import dataclass, replace

from peers.volumes import in_memory, write_volume
from seg3d_monai.data import ManifestRow, read_manifest, write_manifest
from seg3d_monai.data.synthetic import write_specimen
from starts.options import Options

QUICK_SHAPE, SAMPLE_SHAPE = (24, 64, 64), (48, 128, 128)


@dataclass(frozen=True)
class Division:
    """The volumes of the comparison.

    Attributes:
        labelled: their labels are learned from.
        unlabelled: all that are not judged on, the labelled ones among them; their labels are not read.
        val: judged on.
    """

    labelled: tuple[ManifestRow, ...]
    unlabelled: tuple[ManifestRow, ...]
    val: tuple[ManifestRow, ...]


def divided(options: Options) -> Division:
    """Divide the volumes of the data.

    Raises:
        ValueError: a volume or specimen does not exist, has no labels, or is named for both.
    """
    rows = read_manifest(sample_or_given(options), specimen_pattern=options.specimen_pattern).rows
    specimens = options.val_specimens or (rows[-1].specimen,)
    unknown = sorted(set(specimens) - {row.specimen for row in rows})
    if unknown:
        raise ValueError(f"--val_specimens {' '.join(unknown)}: choose among {listed({row.specimen for row in rows})}")
    val = tuple(row for row in rows if row.specimen in specimens and row.label is not None)
    rest = tuple(row for row in rows if row.specimen not in specimens)
    names = options.labelled or tuple(row.name for row in rest if row.label is not None)[:1]
    unknown = sorted(set(names) - {row.name for row in rest if row.label is not None})
    if unknown:
        raise ValueError(
            f"--labelled {' '.join(unknown)}: no volume with labels outside of --val_specimens has this name; choose "
            f"among {listed({row.name for row in rest if row.label is not None})}"
        )
    if not names or not val:
        raise ValueError("the data need a volume with labels to learn from, and another specimen to judge on")
    return Division(labelled=tuple(row for row in rest if row.name in names), unlabelled=rest, val=val)


def sample_or_given(options: Options) -> object:
    """The data, or a synthetic specimen where the user gave none."""
    if options.dataset_dir is not None:
        return options.dataset_dir
    shape = QUICK_SHAPE if options.is_quick else SAMPLE_SHAPE
    return write_specimen(options.folder / "sample", train_volumes=2, train_shape=shape, test_shape=shape)


def write(options: Options, division: Division) -> None:
    """Write the two manifests that are trained from, and the volumes to judge on as arrays."""
    held_back = [replace(row, split="test") for row in division.val]
    trained = [replace(row, split="train") for row in division.labelled]
    write_manifest(options.folder / "labelled.json", [*trained, *held_back])
    images = [replace(row, split="train", label=None, ignore=None) for row in division.unlabelled]
    write_manifest(options.folder / "unlabelled.json", [*images, *(replace(row, split="val") for row in division.val)])
    (options.folder / "volumes").mkdir(exist_ok=True)
    for row in division.val:
        write_volume(options.folder / "volumes", in_memory(row))


def listed(names: set[str]) -> str:
    """The first of them, in order."""
    shown = sorted(names)
    return ", ".join(shown[:12]) + (" …" if len(shown) > 12 else "")
