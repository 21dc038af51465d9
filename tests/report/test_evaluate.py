"""Evaluation on disk: pairing by name, streaming, refusals that list everything."""

import json
from pathlib import Path

import numpy as np
import pytest
import tifffile
import zarr

from seg3d_monai.metrics import InstanceMetrics
from seg3d_monai.report import evaluate, evaluate_paths


def labels(seed: int, shape: tuple[int, int, int] = (6, 20, 33)) -> np.ndarray:
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 30, [-(-n // 4) for n in shape])
    fine = coarse.repeat(4, 0).repeat(4, 1).repeat(4, 2)
    return fine[tuple(slice(0, n) for n in shape)].astype(np.uint16)


def write_tiff(path: Path, array: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    tifffile.imwrite(path, array, photometric="minisblack", metadata={"axes": "ZYX"})
    return path


def write_ome_zarr(path: Path, array: np.ndarray) -> Path:
    axes = [{"name": name, "type": "space", "unit": "micrometer"} for name in "zyx"]
    scale = [{"type": "scale", "scale": [2.0, 0.8, 0.8]}]
    ome = {"version": "0.5", "multiscales": [{"axes": axes, "datasets": [{"path": "0", "coordinateTransformations": scale}]}]}  # fmt: skip  # noqa: E501
    group = zarr.create_group(path, zarr_format=3, attributes={"ome": ome})
    group.create_array("0", data=array, chunks=(4, 8, 16))
    return path


def write_output(path: Path, array: np.ndarray, image: np.ndarray | None = None) -> Path:
    """As a prediction is stored: labels/instances, with or without a copy of the image."""
    if image is None:
        zarr.create_group(path, zarr_format=3)
    else:
        write_ome_zarr(path, image)
    zarr.create_group(path / "labels", zarr_format=3, attributes={"ome": {"version": "0.5", "labels": ["instances"]}})
    write_ome_zarr(path / "labels" / "instances", array)
    return path


def expected(*pairs: tuple[np.ndarray, np.ndarray]) -> dict:
    metrics = InstanceMetrics()
    for truth, prediction in pairs:
        metrics.update(truth, prediction)
    return metrics.compute()


def without_volumes(result: dict) -> dict:
    json.dumps(result, allow_nan=False)
    return {key: value for key, value in result.items() if key != "volumes"}


@pytest.mark.parametrize("max_voxels", [2**24, 300])
def test_a_tiff_against_a_prediction_zarr(tmp_path: Path, max_voxels: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluate, "MAX_VOXELS", max_voxels)
    truth, prediction = labels(0), labels(1)
    prediction[2:4] = truth[2:4]
    true_path = write_tiff(tmp_path / "truth.tif", truth)
    for image in (None, np.zeros_like(truth)):
        predicted_path = write_output(tmp_path / f"out_{image is None}.zarr", prediction, image)
        result = evaluate_paths(true_path, predicted_path)
        assert without_volumes(result) == expected((truth, prediction))
        assert list(result["volumes"]) == ["truth"]


def test_folders_are_paired_by_name_and_pooled(tmp_path: Path) -> None:
    arrays = {name: (labels(seed), labels(seed + 10)) for seed, name in enumerate(("a_t001", "b.v2", "c"))}
    truth, prediction = tmp_path / "truth", tmp_path / "prediction"
    write_tiff(truth / "a_t001" / "labels.tif", arrays["a_t001"][0])
    write_tiff(truth / "a_t001" / "image.tif", arrays["a_t001"][0])
    write_tiff(truth / "b.v2.tif", arrays["b.v2"][0])
    write_ome_zarr(truth / "c.zarr", arrays["c"][0])
    (truth / "index.csv").write_text("name\n")
    (truth / "notes").mkdir()
    write_output(prediction / "a_t001.zarr", arrays["a_t001"][1])
    (prediction / "a_t001.instances.parquet").write_bytes(b"x")
    write_tiff(prediction / "b.v2.ome.tif", arrays["b.v2"][1])
    write_tiff(prediction / "c" / "labels.tif", arrays["c"][1])
    result = evaluate_paths(truth, prediction)
    pooled = expected(*arrays.values())
    found = without_volumes(result)
    assert {k: v["tp"] for k, v in found["thresholds"].items()} == {k: v["tp"] for k, v in pooled["thresholds"].items()}
    assert found["seg"] == pytest.approx(pooled["seg"])
    assert list(result["volumes"]) == ["a_t001", "b.v2", "c"]
    alone = expected(arrays["c"])
    assert result["volumes"]["c"]["seg"] == pytest.approx(alone["seg"])
    assert result["volumes"]["c"]["num_truth"] == alone["num_truth"]


def test_unpaired_names_are_listed_together(tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        write_tiff(tmp_path / "truth" / f"{name}.tif", labels(0))
    for name in ("b", "d"):
        write_tiff(tmp_path / "prediction" / f"{name}.tif", labels(0))
    with pytest.raises(ValueError, match=r"a has no prediction; c has no prediction; d has no truth") as caught:
        evaluate_paths(tmp_path / "truth", tmp_path / "prediction")
    assert "\n" not in str(caught.value)


def test_shapes_and_types_that_do_not_fit_are_listed_together(tmp_path: Path) -> None:
    write_tiff(tmp_path / "truth" / "a.tif", labels(0))
    write_tiff(tmp_path / "prediction" / "a.tif", labels(0, (6, 20, 32)))
    write_tiff(tmp_path / "truth" / "b.tif", labels(0).astype(np.float32))
    write_tiff(tmp_path / "prediction" / "b.tif", labels(0))
    with pytest.raises(ValueError, match=r"(?s)a: truth has shape \(6, 20, 33\).*float32"):
        evaluate_paths(tmp_path / "truth", tmp_path / "prediction")


def test_empty_folders_mixed_kinds_doubles_and_missing_paths(tmp_path: Path) -> None:
    truth, empty = tmp_path / "truth", tmp_path / "empty"
    file = write_tiff(truth / "a.tif", labels(0))
    empty.mkdir()
    with pytest.raises(ValueError, match="holds no volume"):
        evaluate_paths(truth, empty)
    with pytest.raises(ValueError, match="two volumes or two folders"):
        evaluate_paths(truth, file)
    with pytest.raises(FileNotFoundError, match="prediction"):
        evaluate_paths(truth, tmp_path / "nowhere")
    write_tiff(truth / "a" / "labels.tif", labels(0))
    with pytest.raises(ValueError, match="several volumes of one name"):
        evaluate_paths(truth, truth)


def test_ignored_truth_survives_the_reading(tmp_path: Path) -> None:
    truth = labels(0)
    truth[:, 10:] = 65535
    prediction = np.where(truth == 65535, 0, truth)
    prediction[:, 12:14, 3:5] = 999
    result = evaluate_paths(write_tiff(tmp_path / "t.tif", truth), write_tiff(tmp_path / "p.tif", prediction))
    assert result["thresholds"]["0.95"]["f1"] == 1.0
    assert result["thresholds"]["0.95"]["fp"] == 0


def test_one_volume_called_labels_takes_its_folders_name(tmp_path: Path) -> None:
    path = write_tiff(tmp_path / "emb10" / "labels.tif", labels(0))
    assert list(evaluate_paths(path, path)["volumes"]) == ["emb10"]
