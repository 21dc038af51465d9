"""Objects touch by faces: not by edges, corners, or what nobody annotated."""

import numpy as np
import pytest
from planning_toys import BOXES, SHAPE, write_index

from seg3d_monai.planning.touching import touches_another, touching_share

IGNORE = 65535


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("turned", [False, True])
def test_a_face_along_each_axis_and_side(axis, turned):
    label = np.zeros((3, 4, 5), np.uint16)
    label[1, 1, 1] = 5
    place = [1, 1, 1]
    place[axis] += -1 if turned else 1
    label[tuple(place)] = 8
    assert touches_another(label, 5, IGNORE)
    assert touches_another(label, 8, IGNORE)


@pytest.mark.parametrize("place", [(2, 2, 1), (2, 2, 2), (1, 1, 3)])
def test_edges_corners_and_a_gap_do_not_touch(place):
    label = np.zeros((4, 4, 5), np.uint16)
    label[1, 1, 1], label[place] = 5, 8
    assert not touches_another(label, 5, IGNORE)


def test_ignored_voxels_are_no_object():
    label = np.zeros((3, 3, 3), np.uint16)
    label[1, 1, 1], label[1, 1, 2] = 5, IGNORE
    assert not touches_another(label, 5, IGNORE)


def test_of_no_object_and_without_time_nothing_is_said(tmp_path):
    index = write_index(tmp_path, {"a": (SHAPE, BOXES)})
    table = index.instances(1)
    volume = np.zeros(4, np.int64)
    none = slice(0, 0)
    assert touching_share(index, index.volumes(), volume[none], table.boxes[none], table.labels[none], seconds=9) == (
        None,
        0,
    )
    assert touching_share(index, index.volumes(), volume, table.boxes, table.labels, seconds=-1) == (None, 0)
    assert touching_share(index, index.volumes(), volume, table.boxes, table.labels, seconds=9) == (0.5, 4)
