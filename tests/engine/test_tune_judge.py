"""Settings are scored from kept detections as a prediction with them is scored, and the network looks once."""

import numpy as np
import pytest
import torch
from torch import nn
from tune_toys import SETTINGS, Bright, item, known_best, predictor_of, row_of_cells, scene

from seg3d_monai.engine import VolumeEvaluator
from seg3d_monai.engine.objective import Objective
from seg3d_monai.engine.tune_judge import DetectionJudge, network_attributes
from seg3d_monai.inference import at_model_spacing
from seg3d_monai.inference.detections import InstanceSettings

BLOCKS = {"block_size": (4, 6, 10), "halo": (4, 6, 8)}


def judge_of(dataset, predictor, network, *, names=(), metric="f1_50", blocks=None):
    return DetectionJudge(
        dataset=dataset,
        predictor=predictor,
        network=network,
        network_names=names,
        objective=Objective(metric),
        least_score=0.05,
        **blocks or {"block_size": None, "halo": None},
    )


def predicted(dataset, predictor, settings, blocks=None):
    """The metrics of a prediction."""
    evaluator = VolumeEvaluator(
        dataset=dataset, predictor=predictor.with_settings(InstanceSettings(**settings)), **blocks or {}
    )
    evaluator.run()
    return evaluator.state.report


class Noisy(nn.Module):
    """Jittered true boxes and others, with random scores and mask logits, by the shape of the image."""

    def __init__(self, truths):
        super().__init__()
        self.truths = {truth.shape: truth for truth in truths}
        self.looks = 0

    def forward(self, images):
        self.looks += 1
        size = tuple(images.shape[2:])
        rng = np.random.default_rng(size)
        boxes = [[*np.argwhere(self.truths[size] == i).min(0), *(np.argwhere(self.truths[size] == i).max(0) + 1)]
                 for i in np.unique(self.truths[size]) if 0 < i < 65535]  # fmt: skip
        boxes = np.concatenate([np.array(boxes, float).reshape(-1, 6)] * 3 + [rng.uniform(0, 8, (9, 6))])
        boxes = boxes + rng.normal(0, 0.6, boxes.shape)
        boxes = np.concatenate([np.minimum(boxes[:, :3], boxes[:, 3:] - 1), boxes[:, 3:]], 1).clip(0)
        count = len(boxes)
        return [
            {
                "boxes": torch.tensor(np.minimum(boxes, np.tile(size, 2)), dtype=torch.float32),
                "scores": torch.tensor(rng.uniform(0, 1, count).round(2), dtype=torch.float32),  # some are equal
                "classes": torch.zeros(count, dtype=torch.int64),
                "mask_logits": torch.tensor(rng.normal(0.7, 1, (count, 3, 4, 4)), dtype=torch.float32),
            }
        ]


def noisy_volumes(spacing=None):
    """A crowd, one partly ignored, one empty; each of a shape of its own."""
    rng = np.random.default_rng(1)
    truths = []
    for number, count in enumerate((12, 7, 0)):
        truth = np.zeros((9, 14 + number, 22), np.uint16)
        for i in range(count):
            z, y, x = rng.integers(0, (6, 10, 17))
            truth[z : z + 4, y : y + 5, x : x + 6] = 3 * i + 2
        if number == 1:
            truth[:, :, 12:] = 65535
        truths.append(truth)
    image = rng.integers(0, 1000, (9, 20, 22)).astype(np.uint16)
    return truths, [item(image[:, : t.shape[1]], t, name=f"n{i}", spacing=spacing) for i, t in enumerate(truths)]


@pytest.mark.parametrize("settings", [
    SETTINGS,
    {"score_threshold": 0.05, "mask_threshold": 0.5, "min_voxels": 0, "min_visible": 0.0},
    {"score_threshold": 0.35, "mask_threshold": 0.35, "min_voxels": 20, "min_visible": 0.5},
    {"score_threshold": 0.5, "mask_threshold": 0.6, "min_voxels": 5, "min_visible": 0.9},
    {"score_threshold": 1.0, "mask_threshold": 0.6, "min_voxels": 5, "min_visible": 0.9},
])  # fmt: skip
def test_where_a_volume_is_one_block_the_numbers_are_those_of_a_prediction(settings):
    truths, dataset = noisy_volumes()
    network = Noisy(truths)
    predictor = predictor_of(network)
    judge = judge_of(dataset, predictor, network)
    wanted = predicted(dataset, predictor, settings)
    found = judge.report(settings)
    assert found["thresholds"] == {t: pytest.approx(at) for t, at in wanted["thresholds"].items()}
    for name in ("map", "seg", "mucov", "aji", "foreground_iou", "num_truth", "num_predicted"):
        assert found[name] == pytest.approx(wanted[name])
    assert (judge.num_truth, judge.num_blocks) == (wanted["num_truth"], 3)


def test_also_where_the_network_sees_other_voxels():
    settings = {"score_threshold": 0.3, "mask_threshold": 0.45, "min_voxels": 8, "min_visible": 0.4}
    truths, dataset = noisy_volumes(spacing=(2.0, 1.0, 1.0))
    network = Noisy([np.repeat(truth, 2, axis=0) for truth in truths])
    predictor = at_model_spacing(predictor_of(network), [1.0, 1.0, 1.0], None)
    judge = judge_of(dataset, predictor, network)
    wanted = predicted(dataset, predictor, settings)
    assert 0 < wanted["seg"] < 1
    assert judge.report(settings)["thresholds"] == {t: pytest.approx(at) for t, at in wanted["thresholds"].items()}


def test_the_curve_holds_what_each_threshold_gives():
    truths, dataset = noisy_volumes()
    network = Noisy(truths)
    judge = judge_of(dataset, predictor_of(network), network, metric="f1_25 + seg")
    curve = judge.curve(SETTINGS)
    assert curve.lower == 0.05
    assert list(curve.upper) == sorted(set(curve.upper))
    assert curve.upper[-1] == 1.0
    assert len(curve.upper) > 20
    for threshold in (0.05, 0.3, 0.301, 0.61, 0.9, curve.upper[3], 1.0):
        step = curve.step_at(threshold)
        report = judge.report(SETTINGS | {"score_threshold": threshold})
        assert curve.values[step] == report["thresholds"]["0.25"]["f1"] + report["seg"]
        assert curve.num_objects[step] >= report["num_predicted"]  # which leaves out those in ignored voxels
    assert network.looks == 3


def test_a_curve_by_hand():
    """Scores 1, 0.8, 0.7, 0.6 are true, 0.5, 0.48, 0.45 false."""
    network = Bright()
    judge = judge_of([item(*known_best())], predictor_of(network), network)
    curve = judge.curve(SETTINGS)
    assert curve.upper == pytest.approx([0.45, 0.48, 0.5, 0.6, 0.7, 0.8, 1.0])
    assert curve.values == pytest.approx([8 / 11, 8 / 10, 8 / 9, 1, 6 / 7, 4 / 6, 2 / 5])
    assert curve.num_objects == [7, 6, 5, 4, 3, 2, 1]


def test_very_many_scores_are_thinned_out():
    rng = np.random.default_rng(0)

    class Many(Bright):
        def detect(self, image):
            corner = rng.uniform(0, 90, (5000, 3)).astype(np.float32)
            scores = np.concatenate([rng.uniform(0.05, 0.1, 4000), rng.uniform(0.99, 1, 500), rng.uniform(0, 1, 500)])
            return {
                "boxes": torch.from_numpy(np.concatenate([corner, corner + 2], 1)),
                "scores": torch.from_numpy(scores.astype(np.float32)),
                "classes": torch.zeros(5000, dtype=torch.int64),
                "mask_logits": torch.ones(5000, 1, 1, 1),
            }

    image, labels = scene((92, 92, 92), [((1, 1, 1, 5, 5, 5), 1000, True, None)])
    network = Many()
    upper = judge_of([item(image, labels)], predictor_of(network), network).curve(SETTINGS).upper
    assert 50 < len(upper) <= 101
    assert np.diff(upper).max() < 0.03
    assert sum(u > 0.99 for u in upper) > 4


def test_nothing_found():
    class Blind(Bright):
        def detect(self, image):
            return super().detect(np.zeros_like(image))

    network = Blind()
    judge = judge_of([item(*known_best())], predictor_of(network), network)
    assert (judge.curve(SETTINGS).upper, judge.curve(SETTINGS).values) == ([1.0], [0.0])
    assert judge.report(SETTINGS)["thresholds"]["0.5"]["fn"] == 4


def test_the_network_looks_once_for_each_of_its_settings():
    network = Bright()
    dataset = [item(*known_best()), item(*row_of_cells([1000, 300], [True, True]))]
    judge = judge_of(dataset, predictor_of(network), network, names=["detection_nms_threshold"])
    for nms in (0.3, 0.6, 0.3, 0.6):
        for mask_threshold in (0.3, 0.5):
            for min_voxels in (1, 50):
                judge.curve(SETTINGS | {"detection_nms_threshold": nms, "mask_threshold": mask_threshold,
                                        "min_voxels": min_voxels})  # fmt: skip
    shapes = [item["volume"].shape[1:] for item in dataset]
    assert network.looks == [(nms, shape) for nms in (0.3, 0.6) for shape in shapes]
    assert network.detection_nms_threshold == 0.4
    found = [judge.report(SETTINGS | {"score_threshold": 0.55, "detection_nms_threshold": nms}) for nms in (0.3, 0.6)]
    assert [report["thresholds"]["0.5"]["fp"] for report in found] == [0, 5]  # each true cell of at least 0.55 again


def crowd_of_cells():
    """Cells of 3 x 4 x 5 voxels wherever there is room, many of them on faces of blocks."""
    corners = [(z, y, x) for z in (0, 4, 8) for y in (0, 5, 11, 17) for x in (1, 7, 13, 19, 25)]
    cells = [((z, y, x, z + 3, y + 4, x + 5), 1000 - 7 * i, i % 3 > 0, None) for i, (z, y, x) in enumerate(corners)]
    return scene((12, 21, 31), cells)


def test_in_blocks_every_object_counts_once_and_as_in_a_prediction():
    image, labels = crowd_of_cells()
    network = Bright()
    predictor = predictor_of(network)
    dataset = [item(image, labels), item(*known_best())]
    judge = judge_of(dataset, predictor, network, blocks=BLOCKS)
    assert judge.num_blocks > 20
    assert judge.num_truth == 40 + 4
    for threshold in (0.05, 0.7, 0.9):
        settings = SETTINGS | {"score_threshold": threshold}
        wanted, found = predicted(dataset, predictor, settings, BLOCKS), judge.report(settings)
        assert found["thresholds"] == {t: pytest.approx(at) for t, at in wanted["thresholds"].items()}
        assert found["seg"] == pytest.approx(wanted["seg"])
    assert judge.report(SETTINGS | {"score_threshold": 0.05})["thresholds"]["0.95"]["tp"] == 44


def test_an_object_that_no_block_sees_whole_is_cut_in_truth_and_prediction():
    image, labels = scene((4, 6, 60), [((1, 1, 2, 3, 5, 58), 1000, True, None)])
    network = Bright()
    judge = judge_of([item(image, labels)], predictor_of(network), network, blocks=BLOCKS)
    half = judge.report(SETTINGS)["thresholds"]["0.95"]
    assert (half["tp"], half["fp"], half["fn"]) == (1, 0, 0)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int32, np.int64])
def test_labels_of_any_type(dtype):
    image, labels = known_best()
    labels = labels.astype(dtype)
    labels[:, :, :2] = -1 if np.dtype(dtype).kind == "i" else np.iinfo(dtype).max
    network = Bright()
    judge = judge_of([item(image, labels)], predictor_of(network), network)
    assert judge.num_truth == 4
    assert judge.report(SETTINGS | {"score_threshold": 0.55})["thresholds"]["0.95"]["f1"] == 1.0


@pytest.mark.parametrize("value", [0, 65535])
def test_volumes_without_an_object_are_refused(value):
    image, labels = known_best()
    labels = np.full_like(labels, value)
    network = Bright()
    with pytest.raises(ValueError, match=r"there is no object in a, b, so .* tune_split or tune_where"):
        judge_of([item(image, labels, "a"), item(image, labels, "b")], predictor_of(network), network)
    assert network.looks == []


def test_attributes_of_a_network_come_back_after_an_error():
    network = Bright()
    values = {"detection_nms_threshold": 0.9, "capacity": 3}
    with network_attributes(network, values):
        assert (network.detection_nms_threshold, network.capacity) == (0.9, 3)
    with pytest.raises(ZeroDivisionError), network_attributes(network, values):
        _ = 1 / 0
    assert (network.detection_nms_threshold, network.capacity) == (0.4, None)
