"""Box head shapes, and detections from hand-written logits."""

import pytest
import torch

from seg3d_monai.heads import BoxHead, select_detections

SIZE = (9, 17, 33)
PROPOSALS = torch.tensor(
    [
        [0.0, 0, 0, 4, 8, 16],
        [0, 0, 0, 4, 8, 14],  # IoU 7/8 with the first
        [4, 8, 16, 8, 16, 32],
        [-2, -2, -2, 3, 5, 7],
        [8.5, 0, 0, 12, 8, 16],  # half a voxel along z once clipped
    ]
)


def detect(prob, proposals=PROPOSALS, deltas=None, **changes):
    """Detections for rows of class probabilities, background last."""
    arguments = {"score_threshold": 0.05, "nms_threshold": 0.5, "max_detections": 100} | changes
    logits = torch.tensor(prob).log().reshape(-1, 3)
    deltas = torch.zeros(len(proposals), 6) if deltas is None else deltas
    return select_detections(logits, deltas, proposals, SIZE, **arguments)


ROWS = [[0.6, 0.1, 0.3], [0.1, 0.7, 0.2], [0.05, 0.15, 0.8], [0.3, 0.2, 0.5], [0.9, 0.05, 0.05]]


def test_each_proposal_is_a_detection_of_its_most_probable_class_duplicates_dropped_across_classes():
    found = detect(ROWS)
    assert found["classes"].tolist() == [1, 0, 1]
    torch.testing.assert_close(found["scores"], torch.tensor([0.7, 0.3, 0.15]))
    assert found["boxes"].tolist() == [[0, 0, 0, 4, 8, 14], [0, 0, 0, 3, 5, 7], [4, 8, 16, 8, 16, 32]]
    assert found["rows"].tolist() == [1, 3, 2]
    assert found["classes"].dtype == found["rows"].dtype == torch.int64


def test_thresholds():
    assert len(detect(ROWS, nms_threshold=0.9)["boxes"]) == 4
    assert detect(ROWS, score_threshold=0.3001)["classes"].tolist() == [1]
    assert detect(ROWS, max_detections=2)["scores"].tolist() == pytest.approx([0.7, 0.3])


def test_deltas_move_boxes_by_a_tenth_of_the_extent_and_a_fifth_of_the_log():
    deltas = torch.tensor([[5.0, 0, -2.5, 0, 5 * torch.tensor(0.5).log(), 0]])
    found = detect([[0.6, 0.1, 0.3]], proposals=torch.tensor([[2.0, 4, 8, 6, 12, 24]]), deltas=deltas)
    torch.testing.assert_close(found["boxes"], torch.tensor([[4.0, 6, 4, 8, 10, 20]]))


@pytest.mark.parametrize("rows", [0, 1])
def test_no_detection(rows):
    found = detect([[0.01, 0.01, 0.98]] * rows, proposals=PROPOSALS[:rows])
    shapes = {"boxes": (0, 6), "scores": (0,), "classes": (0,), "rows": (0,)}
    assert {k: tuple(v.shape) for k, v in found.items()} == shapes


@pytest.mark.parametrize("rows", [0, 1, 5])
def test_head_shapes_and_autocast(rows):
    head = BoxHead(in_channels=3, roi_size=(2, 3, 4), num_classes=2, hidden=7)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits, deltas = head(torch.randn(rows, 3, 2, 3, 4))
    assert (logits.shape, deltas.shape) == ((rows, 3), (rows, 6))
    assert logits.dtype == deltas.dtype == torch.float32
    (logits.sum() + deltas.sum()).backward()
    assert all(p.grad is not None for p in head.parameters())


def test_rows_are_independent():
    torch.manual_seed(0)
    head = BoxHead(in_channels=2, roi_size=(1, 2, 3), num_classes=2, hidden=5)
    x = torch.randn(6, 2, 1, 2, 3)
    for whole, single in zip(head(x), head(x[3:4]), strict=True):
        torch.testing.assert_close(whole[3:4], single)
