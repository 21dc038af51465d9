"""Painting again from the journal: the same as predicting with those thresholds."""

import numpy as np
import pandas as pd
import pytest
from inference_toys import Jittered, blank, tissue_seeds, tree_digest

from seg3d_monai.inference import predict_volume, relabel_volume
from seg3d_monai.inference.journal import Journal
from seg3d_monai.inference.writer import LabelWriter

SHAPE = (14, 40, 36)
GRID = {"block_size": (6, 18, 20), "halo": (2, 4, 3), "progress": False}
PREDICTOR = Jittered(tissue_seeds(SHAPE, (7, 14, 12), seed=2), 1.0)
OPTIONS = [{"score_threshold": 0.7}, {"min_volume": 700}, {"score_threshold": 0.6, "min_volume": 500}]


def files(folder):
    return tree_digest(folder / "x.zarr"), (folder / "x.instances.parquet").read_bytes()


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("copy_image", [False, True])
def test_relabel_is_predict_with_other_thresholds(tmp_path, options, copy_image):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    expected = predict_volume(blank(SHAPE), PREDICTOR, tmp_path / "a/x.zarr", copy_image=copy_image, **options, **GRID)
    first = predict_volume(blank(SHAPE), PREDICTOR, tmp_path / "b/x.zarr", copy_image=copy_image, **GRID)
    before = files(tmp_path / "b")
    done = relabel_volume(tmp_path / "b/x.zarr", progress=False, **options)
    assert done.num_predicted == 0
    assert 0 < done.num_objects < first.num_objects
    assert done.num_objects == expected.num_objects
    assert files(tmp_path / "a") == files(tmp_path / "b")
    # the journal knows: the same prediction is finished, the old one is painted again
    assert predict_volume(
        blank(SHAPE), PREDICTOR, tmp_path / "b/x.zarr", copy_image=copy_image, **options, **GRID
    ).already_finished
    back = predict_volume(blank(SHAPE), PREDICTOR, tmp_path / "b/x.zarr", copy_image=copy_image, **GRID)
    assert (back.num_predicted, back.num_objects, back.already_finished) == (0, first.num_objects, False)
    assert files(tmp_path / "b") == before


def test_a_relabel_that_was_stopped_is_undone_by_predict(tmp_path, monkeypatch):
    predict_volume(blank(SHAPE), PREDICTOR, tmp_path / "x.zarr", **GRID)
    before = files(tmp_path)

    def stop(self, block, links):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "store_links", stop)
        with pytest.raises(KeyboardInterrupt):
            relabel_volume(tmp_path / "x.zarr", score_threshold=0.7, progress=False)
        with pytest.raises(KeyboardInterrupt):
            predict_volume(blank(SHAPE), PREDICTOR, tmp_path / "x.zarr", **GRID)
    assert predict_volume(blank(SHAPE), PREDICTOR, tmp_path / "x.zarr", **GRID).num_predicted == 0
    assert files(tmp_path) == before


@pytest.mark.parametrize("options", OPTIONS)
def test_thresholds_may_change_while_a_run_is_unfinished(tmp_path, options):
    calls = []

    def until_five(block, roi):
        if len(calls) == 5:
            raise RuntimeError("out of memory")
        calls.append(roi)
        return PREDICTOR(block, roi)

    with pytest.raises(RuntimeError, match="out of memory"):
        predict_volume(blank(SHAPE), until_five, tmp_path / "x.zarr", identity={}, **GRID)
    done = predict_volume(blank(SHAPE), PREDICTOR, tmp_path / "x.zarr", identity={}, **options, **GRID)
    assert done.num_predicted == done.num_blocks - 5
    (tmp_path / "new").mkdir()
    predict_volume(blank(SHAPE), PREDICTOR, tmp_path / "new/x.zarr", identity={}, **options, **GRID)
    assert files(tmp_path) == files(tmp_path / "new")


def test_a_plan_that_differs_elsewhere_is_refused_and_told_how_thresholds_are_changed(tmp_path):
    def predict(score, **options):
        identity = {"score_threshold": score}
        return predict_volume(blank(SHAPE), PREDICTOR, tmp_path / "x.zarr", identity=identity, **GRID | options)

    predict(0.5, provenance={"config": {"min_volume": 0}})
    with pytest.raises(ValueError, match=r"min_volume: 0 -> 300\); `seg3d relabel .* --min_volume VALUE` changes"):
        predict(0.5, provenance={"config": {"min_volume": 300}}, min_volume=300)
    with pytest.raises(
        ValueError, match=r"\(predictor.score_threshold: 0.5 -> 0.6\); `seg3d relabel .* --score_threshold"
    ):
        predict(0.6, provenance={"config": {"min_volume": 0}})
    with pytest.raises(ValueError, match=r"\(halo: .*\); pass --restart"):
        predict(0.5, provenance={"config": {"min_volume": 0}}, halo=3)


def test_objects_below_the_volume_are_gone(tmp_path):
    predict_volume(blank(SHAPE), PREDICTOR, tmp_path / "x.zarr", **GRID)
    before = pd.read_parquet(tmp_path / "x.instances.parquet")
    relabel_volume(tmp_path / "x.zarr", min_volume=400, progress=False)
    after = pd.read_parquet(tmp_path / "x.instances.parquet")
    kept = before[before["volume_voxels"] >= 400]
    assert 0 < len(kept) < len(before)
    assert len(after) == len(kept)
    # what a small object had hidden may have become visible
    assert (after["volume_voxels"].to_numpy() >= kept["volume_voxels"].to_numpy()).all()


@pytest.mark.parametrize(("name", "after"), [("create", 0), ("write", 4), ("publish", 0)])
def test_a_stopped_relabel_goes_on_and_the_old_output_stays(tmp_path, monkeypatch, name, after):
    predict_volume(blank(SHAPE), PREDICTOR, tmp_path / "x.zarr", **GRID)
    before = tree_digest(tmp_path / "x.zarr")
    original, calls = getattr(LabelWriter, name), []

    def stop(self, *args):
        calls.append(args)
        if len(calls) > after:
            raise KeyboardInterrupt
        return original(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(LabelWriter, name, stop)
        with pytest.raises(KeyboardInterrupt):
            relabel_volume(tmp_path / "x.zarr", score_threshold=0.7, progress=False)
    assert tree_digest(tmp_path / "x.zarr") == before
    relabel_volume(tmp_path / "x.zarr", score_threshold=0.7, progress=False)
    (tmp_path / "new").mkdir()
    predict_volume(blank(SHAPE), PREDICTOR, tmp_path / "new/x.zarr", score_threshold=0.7, **GRID)
    assert files(tmp_path) == files(tmp_path / "new")


def test_what_was_never_kept_cannot_come_back(tmp_path):
    predict_volume(blank(SHAPE), PREDICTOR, tmp_path / "x.zarr", identity={"score_threshold": 0.5}, **GRID)
    with pytest.raises(ValueError, match=r"score_threshold is 0\.3, but instances below 0\.5 were not kept"):
        relabel_volume(tmp_path / "x.zarr", score_threshold=0.3)


def test_relabel_needs_a_finished_prediction(tmp_path):
    with pytest.raises(FileNotFoundError, match="journal"):
        relabel_volume(tmp_path / "x.zarr", min_volume=3)

    def fail(block, roi):
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError):
        predict_volume(blank(SHAPE), fail, tmp_path / "x.zarr", **GRID)
    with pytest.raises(ValueError, match="not predicted yet"):
        relabel_volume(tmp_path / "x.zarr", min_volume=3)
    assert not np.any([path.suffix == ".zarr" for path in tmp_path.iterdir()])
