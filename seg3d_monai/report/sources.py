"""Where a report's volumes come from: a training's folder, or the output of a prediction.

A training's best weights predict its unseen volumes anew, by its own configuration. Of volumes that are too large to be
shown whole, the middle is taken.

It must not know pictures or pages.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from tqdm import tqdm

from seg3d_monai.data import ArrayVolume, Volume, open_volume
from seg3d_monai.data.memory_limit import peak_memory
from seg3d_monai.inference import predict_labels
from seg3d_monai.inference.predict import plan_blocks, predict_plan
from seg3d_monai.inference.seam_cells import SAME, compare_labels
from seg3d_monai.metrics import InstanceMetrics
from seg3d_monai.report.evaluate import OUTPUT_LABELS
from seg3d_monai.report.looked_at import LookedAt
from seg3d_monai.report.made import made_of_prediction, made_of_run

MOST_VOXELS = 2**26
"""Of a volume that is read at once."""


@dataclass(kw_only=True)
class Source:
    """What a report is about.

    title, lead: of the page.
    volumes: what is shown.
    metrics: of `InstanceMetrics.compute`, pooled over the volumes; None without truth.
    train, validation: the logs of a training, None without.
    facts: numbers for the section on time and memory.
    seams: cells, and those that differ between blocks and one block; None where no volume was cut into blocks.
    seam_check: what `seg3d seam-check` wrote, None without.
    seam_note: what there is to say where neither of the two is known.
    made: how it was made, in short, by name.
    texts: configuration, environment and the like, by name.
    notes: what a reader must know, such as that a part is shown only.
    """

    title: str
    lead: str
    volumes: list[LookedAt]
    metrics: dict[str, Any] | None = None
    train: pd.DataFrame | None = None
    validation: pd.DataFrame | None = None
    facts: dict[str, Any] = field(default_factory=dict)
    seams: tuple[int, int] | None = None
    seam_check: Mapping[str, Any] | None = None
    seam_note: str = ""
    made: dict[str, str] = field(default_factory=dict)
    texts: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def read_run(folder: Path, changes: Mapping[str, Any], progress: bool = False) -> Source:
    """Predict a training's unseen volumes with its weights.

    Args:
        folder: the `output_dir` of a training.
        changes: keys of its configuration and other values, such as `score_threshold` or `dataset_dir`.
        progress: whether to show a bar.

    Raises:
        FileNotFoundError: it holds no configuration or no weights yet.
        ValueError: the configuration cannot be used.
    """
    from monai.bundle import ConfigParser

    for name, reason in (("config.json", "it is no training's folder"), ("model.pt", "nothing was trained yet")):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder} holds no {name}: {reason}")
    parser = ConfigParser()
    parser.read_config(str(folder / "config.json"))
    for key, value in changes.items():
        parser[key] = value
    if "final" not in parser.get():
        return _read_pretraining(folder)
    parser["output_dir"] = str(folder)
    parser["report_weights"] = f"$engine.load_weights(@network, {str(folder / 'model.pt')!r})"
    parser.parse(True)
    parser.get_parsed_content("report_weights").eval()
    dataset, predictor = (parser.get_parsed_content(name) for name in ("final#dataset", "predictor"))
    block_size, halo = parser["block_size"], parser["halo"]
    pooled, volumes, voxels, seconds, seams = InstanceMetrics(), [], 0, 0.0, [0, 0]
    num_cut = 0
    for number in tqdm(range(len(dataset)), unit="volume", desc="report", disable=not progress):
        item = dataset[number]
        image, truth, origin = _middle(item["volume"], item["label"])
        start = time.perf_counter()
        volume = ArrayVolume(image, item["volume"].spacing_um)
        plan = plan_blocks(volume, predictor, block_size, halo)
        labels, table = predict_plan(plan, volume, predictor)
        seconds += time.perf_counter() - start
        voxels += labels.size
        if max(plan.grid) > 1:
            whole, _ = predict_labels(volume, predictor)
            cells = compare_labels(whole.astype(np.int64), labels.astype(np.int64), faces=((), (), ()))
            seams[0] += len(cells)
            seams[1] += sum(cell.kind != SAME for cell in cells)
            num_cut += 1
        pooled.update(truth, labels)
        volumes.append(
            LookedAt(
                name=item["name"],
                image=image[0],
                labels=labels,
                table=table,
                truth=truth,
                spacing_um=item["volume"].spacing_um,
                origin=origin,
            )
        )
    train = _log(folder / "train.csv")
    facts = _training_facts(train) | {
        "prediction, Mvoxel/s": voxels / max(seconds, 1e-9) / 1e6,
        "peak memory of this prediction, GB": _peak_gb(),
    }
    made, texts = made_of_run(folder)
    source = Source(
        title=f"Training {folder.name}",
        lead=f"{len(volumes)} volume{'' if len(volumes) == 1 else 's'} that the training has not seen, predicted with "
        f"{folder.name}/model.pt",
        volumes=volumes,
        metrics=pooled.compute(),
        train=train,
        validation=_log(folder / "validation.csv"),
        facts=facts,
        seams=(seams[0], seams[1]) if num_cut else None,
        seam_note="No volume is larger than one block, so there is no seam. Of a large stack: seg3d seam-check.",
        made=made,
        texts=texts,
    )
    _note_parts(source)
    return source


def _read_pretraining(folder: Path) -> Source:
    """A training that finds no objects: its curves, and how it was made."""
    train = _log(folder / "train.csv")
    made, texts = made_of_run(folder)
    return Source(
        title=f"Pre-training {folder.name}",
        lead="A backbone that learns from volumes without labels; it finds no objects.",
        volumes=[],
        train=train,
        validation=_log(folder / "validation.csv"),
        facts=_training_facts(train),
        made=made,
        texts=texts,
    )


def read_prediction(
    output: Path,
    image: str | Path,
    truth: str | Path | None = None,
    channel: int = 0,
    roi: Sequence[int] | None = None,
    seams: str | Path | None = None,
) -> Source:
    """Read what `seg3d predict` wrote.

    Args:
        output: OME-Zarr with `labels/instances`, its object table beside it.
        image: what was predicted.
        truth: true labels, where they are known.
        channel: of the image.
        roi: (z1, y1, x1, z2, y2, x2), what is looked at; None is the middle, as much as can be read at once.
        seams: JSON that `seg3d seam-check` wrote of the same stack and weights.

    Raises:
        FileNotFoundError: one of them does not exist.
        ValueError: shapes do not fit.
    """
    place = output / OUTPUT_LABELS
    if not place.exists():
        raise FileNotFoundError(f"{output} holds no {OUTPUT_LABELS}; give what seg3d predict wrote")
    labels, pixels = open_volume(place), open_volume(image, channels=channel)
    known = None if truth is None else open_volume(truth)
    for name, volume in (("the image", pixels), ("truth", known)):
        if volume is not None and volume.shape[1:] != labels.shape[1:]:
            raise ValueError(
                f"{name} has {volume.shape[1:]} voxels and the prediction {labels.shape[1:]}; they must agree"
            )
    region = list(roi) if roi is not None else _middle_roi(labels.shape[1:])
    table = _object_table(output)
    shown = labels.read(region)[0]
    looked = LookedAt(
        name=output.name,
        image=pixels.read(region)[0],
        labels=shown,
        table=table[table["id"].isin(np.unique(shown))],
        truth=None if known is None else known.read(region)[0],
        spacing_um=labels.spacing_um or pixels.spacing_um,
        origin=(region[0], region[1], region[2]),
    )
    metrics = None
    if looked.truth is not None:
        pooled = InstanceMetrics()
        pooled.update(looked.truth, looked.labels)
        metrics = pooled.compute()
    made, texts = made_of_prediction(output, place)
    source = Source(
        title=f"Prediction {output.name}",
        lead=f"{len(table):,} objects in {' x '.join(f'{n:,}' for n in labels.shape[1:])} voxels",
        volumes=[looked],
        metrics=metrics,
        facts={"voxels": int(np.prod(labels.shape[1:])), "peak memory of making this page, GB": _peak_gb()},
        seam_check=None if seams is None else _read_seams(Path(seams)),
        seam_note="Not looked at yet: seg3d seam-check predicts a region under two grids of blocks and writes a JSON, "
        "which seg3d report --seams takes.",
        made=made,
        texts=texts,
    )
    source.notes.append(
        "A prediction keeps no times, so that the same input gives the same bytes; seg3d predict --dry_run predicts "
        "one block and says what the whole takes."
    )
    if shown.shape != labels.shape[1:]:
        source.notes.append(
            f"Pictures, charts and metrics are of the region {region}; the number of objects is of all."
        )
    return source


def _read_seams(file: Path) -> dict[str, Any]:
    """What a seam check found.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is something else.
    """
    if not file.is_file():
        raise FileNotFoundError(f"--seams {str(file)!r} does not exist; give the JSON that seg3d seam-check wrote")
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"--seams {str(file)!r} is no JSON: {error}") from error
    if not isinstance(found, dict) or not {"at_faces", "away", "excess"} <= found.keys():
        raise ValueError(f"--seams {str(file)!r} is not what seg3d seam-check writes; give its JSON")
    return found


def _training_facts(train: pd.DataFrame | None) -> dict[str, Any]:
    if train is None or not len(train):
        return {}
    last = train.iloc[-1]
    facts = {
        "minutes of training": float(last["elapsed_seconds"]) / 60,
        "steps": int(last["iteration"]),
        "seconds a step": float(last["elapsed_seconds"]) / int(last["iteration"]),
    }
    for column, where in (("memory_gb", ""), ("cuda_memory_gb", " on the GPU")):
        if column in train and train[column].notna().any():
            facts[f"peak memory of the training{where}, GB"] = float(train[column].max())
    return facts


def _object_table(output: Path) -> pd.DataFrame:
    stem = output.name.removesuffix(".zarr")
    for suffix, read in ((".parquet", pd.read_parquet), (".csv", pd.read_csv)):
        file = output.with_name(f"{stem}.instances{suffix}")
        if file.is_file():
            found: pd.DataFrame = read(file)
            return found
    raise FileNotFoundError(f"{output} has no object table {stem}.instances.parquet beside it")


def _middle(volume: Volume, label: Volume) -> tuple[np.ndarray, np.ndarray, tuple[int, int, int]]:
    region = _middle_roi(volume.shape[1:])
    return volume.read(region), label.read(region)[0], (region[0], region[1], region[2])


def _middle_roi(extent: Sequence[int]) -> list[int]:
    """The middle of a volume, as much of it as can be read at once, of the same proportions."""
    share = min(1.0, (MOST_VOXELS / float(np.prod(np.array(extent, float)))) ** (1 / 3))
    size = [max(1, int(n * share)) for n in extent]
    start = [(n - m) // 2 for n, m in zip(extent, size, strict=True)]
    return [*start, *(a + m for a, m in zip(start, size, strict=True))]


def _note_parts(source: Source) -> None:
    parts = [looked.name for looked in source.volumes if any(looked.origin)]
    if parts:
        source.notes.append(f"Only the middle is looked at of {', '.join(parts)}.")


def _log(file: Path) -> pd.DataFrame | None:
    return pd.read_csv(file) if file.is_file() else None


def _peak_gb() -> float | None:
    """Peak of this process's memory in 1e9 bytes; None where the platform does not say."""
    peak = peak_memory()
    return None if peak is None else peak / 1e9
