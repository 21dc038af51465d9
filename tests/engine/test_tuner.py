"""From volumes to an overlay: settings that are known by construction, what is written, and what is refused."""

import json

import numpy as np
import pytest
from tune_toys import CANDIDATES, Bright, item, known_best, predictor_of, row_of_cells, scene

from seg3d_monai.engine import Tuner, check_tune_files, tuner
from seg3d_monai.engine.checkpoint import write_weights

NMS = {"detection_nms_threshold": [0.2, 0.4, 0.6]}


@pytest.fixture
def tune(tmp_path):
    """Tune on volumes and return the overlay and the report."""

    def run(dataset, network=None, *, settings=None, **changes):
        network = network or Bright()
        write_weights(tmp_path / "model.pt", network.state_dict())
        options = {"candidates": CANDIDATES, "network_candidates": NMS} | changes
        Tuner(
            dataset=dataset,
            predictor=predictor_of(network, **settings or {}),
            network=network,
            checkpoint=tmp_path / "model.pt",
            out=tmp_path / "tuned.json",
            **options,
        ).run()
        return json.loads((tmp_path / "tuned.json").read_text()), (tmp_path / "tuned.txt").read_text()

    return run


def table(report):
    """The rows of a report's table, by their first words."""
    lines = report.split("\n\n")[1:3]
    return {line[:40].strip(): line[40:].split() for part in lines for line in part.splitlines()}


def test_a_threshold_between_false_and_true_objects(tune, capsys):
    overlay, report = tune([item(*known_best())] * 10)
    assert overlay == {
        "score_threshold": 0.55,
        "mask_threshold": 0.5,
        "min_voxels": 1,
        "min_visible": 0.0,
        "network_def#detection_nms_threshold": 0.4,
    }
    rows = table(report)
    assert rows["score_threshold"] == ["0.8", "0.55"]
    assert rows["f1_50 + seg"] == ["1.1667", "2.0000"]  # two of four are found: 2 * 2 / (2 * 2 + 2), and half of SEG
    assert rows["precision_50"] == ["1.0000", "1.0000"]
    assert [rows[name] for name in ("found at IoU 0.5", "false", "missed")] == [["20", "40"], ["0", "0"], ["20", "0"]]
    curve = {float(words[0]): words[1:] for words in map(str.split, report.split("\n\n")[4].splitlines())}
    assert curve[0.55] == ["2.0000", "40", "objects", "after"]
    assert curve[0.8] == ["1.1667", "20", "objects", "before"]
    assert curve[0.5] == [f"{8 / 9 + 1:.4f}", "50", "objects"]
    assert "warning: 40 objects are few" in report
    assert "trained" not in report
    assert capsys.readouterr().out.rstrip().splitlines()[-1].startswith("overlay: ")


def test_every_setting_is_found(tune):
    """Small false objects have high scores, rims of cells are dim, and the network starts with doubles."""
    image, labels = known_best(rim=0.42)
    image[0, 0, 4:60:7] = 990
    network = Bright(detection_nms_threshold=0.6)
    overlay, report = tune([item(image, labels)] * 15, network, metric="f1_50 + f1_90")
    assert overlay == {
        "score_threshold": 0.55,
        "mask_threshold": 0.3,
        "min_voxels": 4,
        "min_visible": 0.0,
        "network_def#detection_nms_threshold": 0.4,
    }
    rows = table(report)
    assert rows["f1_50 + f1_90"][1] == "2.0000"
    assert rows["network_def#detection_nms_threshold"] == ["0.6", "0.4"]
    assert network.detection_nms_threshold == 0.6
    assert "warning" not in report


def test_what_is_best_already_stays(tune):
    """As good as what there is are thresholds from 0.5 to 0.6, a lower NMS threshold, and any number of voxels."""
    network = Bright()
    overlay, report = tune([item(*known_best())] * 20, network, settings={"score_threshold": 0.59, "min_voxels": 7})
    assert [overlay[name] for name in ("score_threshold", "min_voxels", "mask_threshold")] == [0.59, 7, 0.5]
    assert "before and after" in report
    assert len(network.looks) == 20 * (1 + 3)  # a prediction, and each of the NMS thresholds


def test_gains_of_less_than_an_object_move_nothing(tune):
    """One of thirty cells would have a better mask with another threshold, which is worth a third of an object."""
    cells = row_of_cells([1000] * 30, [True] * 30)
    image, labels = cells[0].copy(), cells[1]
    x = np.flatnonzero(labels[1, 2] == 30)
    image[:, :, x[[0, -1]]] = np.where(image[:, :, x[[0, -1]]] > 0, 420, 0)
    overlay, _ = tune([item(image, labels)], settings={"score_threshold": 0.5}, metric="seg")
    assert overlay["mask_threshold"] == 0.5


def test_one_setting_can_be_left_alone_and_others_tuned(tune):
    image, labels = known_best(rim=0.42)
    overlay, _ = tune(
        [item(image, labels)] * 10, candidates={"mask_threshold": [], "min_voxels": [1, 4]}, network_candidates=None
    )
    assert overlay == {"score_threshold": 0.55, "mask_threshold": 0.5, "min_voxels": 1, "min_visible": 0.0}


def test_flips_are_kept_in_the_overlay(tune):
    overlay, _ = tune([item(*known_best())] * 10, settings={"flips": ["x"]}, flips=["x"])
    assert overlay["flips"] == ["x"]
    assert overlay["score_threshold"] == 0.55


def test_a_few_objects_move_nothing(tune):
    """Without the false one F1 would rise from 0.8 to 1, which is less than one object of two changes."""
    cells = row_of_cells([1000, 900, 850], [True, True, False])
    overlay, report = tune([item(*cells)], metric="f1_50")
    assert overlay["score_threshold"] == 0.8
    assert "warning: 2 objects are few" in report


def test_training_volumes_are_named(tune):
    dataset = [item(*known_best(), name=f"v{i}", split="train" if i else "val") for i in range(7)]
    _, report = tune(dataset)
    assert "warning: the network was trained on v1, v2, v3, v4 and 2 more, where" in report


def test_blocks_are_noted_and_the_numbers_are_those_of_a_prediction(tune):
    overlay, report = tune([item(*known_best())] * 10, block_size=(6, 9, 24), halo=(0, 0, 8))
    assert overlay["score_threshold"] == 0.55
    assert "note: the volumes have 30 blocks." in report
    assert table(report)["f1_50 + seg"] == ["1.1667", "2.0000"]


def test_what_is_worse_in_a_prediction_is_not_taken(tune, monkeypatch):
    monkeypatch.setattr(tuner, "search_settings", lambda judge, start, *_, **__: dict(start) | {"min_voxels": 500})
    overlay, report = tune([item(*known_best())])
    assert overlay["min_voxels"] == 1
    assert "min_voxels 500" in report
    assert "nothing was changed" in report
    assert table(report)["missed"] == ["2", "2"]


def test_the_crowd_of_a_limited_network_is_looked_at_in_parts(tune):
    corners = [(y, x) for y in (1, 7) for x in range(4, 60, 8)]
    image, labels = scene((8, 12, 64), [((2, y, x, 5, y + 3, x + 4), 900 + x, True, None) for y, x in corners])
    image[0, 0, 0] = 1000
    overlay, report = tune([item(image, labels)], Bright(capacity=8), network_candidates={}, metric="recall_50")
    assert overlay["score_threshold"] == 0.8
    assert table(report)["found at IoU 0.5"] == ["14", "14"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"metric": "f1_5O"}, "metric='f1_5O' holds 'f1_5O', which is no metric; did you mean f1_"),
        ({"candidates": {"mask_treshold": [0.5]}}, "names 'mask_treshold'; choose from mask_threshold, min_voxels"),
        ({"candidates": {"score_threshold": [0.5]}}, "names 'score_threshold'; choose from mask_threshold"),
        ({"candidates": {"min_visible": [0.5, 1.5]}}, "min_visible is 1.5"),
        ({"network_candidates": {"nms": [0.5]}}, "network_candidates names 'nms'"),
        ({"network_candidates": {"score_threshold": [0.5]}}, "network_candidates names 'score_threshold'"),
        ({"least_score": 5}, "least_score is 5"),
    ],
)
def test_mistakes_are_refused_before_anything_is_read(tune, changes, message):
    network = Bright()
    with pytest.raises(ValueError, match=message):
        tune([None], network, **changes)
    assert network.looks == []


def test_volumes_without_objects_are_refused_before_the_network_looks(tune, tmp_path):
    image, labels = known_best()
    network = Bright()
    with pytest.raises(ValueError, match="there is no object in toy"):
        tune([item(image, 0 * labels)], network)
    assert network.looks == []
    assert not (tmp_path / "tuned.json").exists()


def test_files_are_looked_for_first(tmp_path):
    checkpoint, out = tmp_path / "model.pt", tmp_path / "tuned.json"
    with pytest.raises(FileNotFoundError, match=r"model\.pt' does not exist; train first"):
        check_tune_files(checkpoint, out, False)
    checkpoint.touch()
    check_tune_files(checkpoint, out, False)
    with pytest.raises(ValueError, match=r"does not end in \.json"):
        check_tune_files(checkpoint, tmp_path / "tuned", False)
    out.touch()
    with pytest.raises(FileExistsError, match=r"tuned\.json exists; choose another file with --out, or .*--restart"):
        check_tune_files(checkpoint, out, False)
    check_tune_files(checkpoint, out, True)


def test_the_same_again(tune):
    image, labels = known_best(rim=0.42)
    first = tune([item(image, labels)])
    assert tune([item(image, labels)]) == first
