"""The seam check: every word counted by hand, a naive comparison, and models with and without seams."""

import json
from collections import Counter

import numpy as np
import pytest
import zarr
from inference_toys import Jittered, Perfect, blank, tissue_seeds, to_instances, voronoi
from matplotlib.image import imread
from scipy.spatial import cKDTree

from seg3d_monai.inference import Instances
from seg3d_monai.inference.seam_cells import KINDS, compare_labels
from seg3d_monai.inference.seam_check import seam_check
from seg3d_monai.inference.seam_report import SeamReport, Tally

NO_FACES = ((), (), ())


def line(text):
    """A 1-D answer; a letter is an object."""
    return np.array([0 if c == "." else ord(c) - ord("a") + 1 for c in text], np.uint32).reshape(1, 1, -1)


def compare_lines(first, second, faces=(), **options):
    return compare_labels(line(first), line(second), faces=((), (), faces), **({"max_shift": 99} | options))


@pytest.mark.parametrize(
    ("first", "second", "kind", "ids", "iou"),
    [
        ("aaaa..", "aaaa..", "same", ((1,), (1,)), 1),
        ("bbbb..", "cccc..", "same", ((2,), (3,)), 1),  # ids mean nothing across answers
        ("aaaaaa", "aaabbb", "split", ((1,), (1, 2)), 1),
        ("aaaaaa", "aab.cc", "split", ((1,), (1, 2, 3)), 5 / 6),
        ("aaabbb", "aaaaaa", "merged", ((1, 2), (1,)), 1),
        ("aaaaaaaaab", "ddcccccccc", "mixed", ((1, 2), (3, 4)), 1),  # d lies in a, and b in c, which is mostly in a
        ("aaaa..", "......", "lost", ((1,), ()), 0),
        ("......", "..aaaa", "lost", ((), (1,)), 0),
        ("aaaaaaaaaa", "aa........", "lost", ((1,), (1,)), 0.2),
        ("aaaaaaaaaa", "b...c.....", "lost", ((1,), (2, 3)), 0.2),  # two crumbs are no split
        ("aaaaaaaaaa", "aaa.......", "moved", ((1,), (1,)), 0.3),
        ("aaaaaaa...", "...aaaaaaa", "moved", ((1,), (1,)), 0.4),
        ("aaaaaa..", "..aaaaaa", "same", ((1,), (1,)), 0.5),
    ],
)
def test_words_in_one_dimension(first, second, kind, ids, iou):
    (cell,) = compare_lines(first, second)
    assert cell.kind == kind
    assert (cell.first_ids, cell.second_ids) == ids
    assert cell.iou == pytest.approx(iou)
    (swapped,) = compare_lines(second, first)
    assert swapped.kind == {"split": "merged", "merged": "split"}.get(kind, kind)
    assert (swapped.second_ids, swapped.first_ids) == ids


def test_half_is_not_more_than_half():
    cells = compare_lines("aaaa..", "..aaaa")
    assert [(c.kind, c.first_ids, c.second_ids) for c in cells] == [("lost", (1,), ()), ("lost", (), (1,))]
    (cell,) = compare_lines("aaaaa...", "..aaaaa.")  # 3 of 5, IoU 3 / 7
    assert cell.kind == "moved"


def test_limits_of_a_move():
    first, second = "aaaaaa....", ".aaaaaa..."  # IoU 5 / 7, one voxel apart
    assert [compare_lines(first, second, min_iou=m)[0].kind for m in (0.71, 0.72)] == ["same", "moved"]
    assert [compare_lines(first, second, max_shift=m)[0].kind for m in (1, 0.99)] == ["same", "moved"]
    (cell,) = compare_lines(first, second, spacing=(4, 2, 0.5), max_shift=0.49)
    assert (cell.kind, cell.shift) == ("moved", 0.5)


def test_place_of_a_cell():
    (cell,) = compare_lines("..aaaa....", "..aabbb...", origin=(7, 8, 10))
    assert cell.box == (7, 8, 12, 8, 9, 17)
    # 2 + 3 + 4 + 5 in the first answer and 2 + ... + 6 in the second, over 9 voxels
    assert cell.centroid == pytest.approx((7, 8, 10 + (14 + 20) / 9))
    assert cell.shift == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("first", "second", "faces", "at_face"),
    [
        (".aa......", ".aa......", [4], False),  # voxel 3 lies next to the face, 2 does not
        (".aaa.....", ".aa......", [4], True),
        (".aa......", ".aaa.....", [4], True),  # either answer will do
        ("....aa...", "....aa...", [4], True),
        (".....aa..", ".....aa..", [4], False),
        (".....aa..", ".....aa..", [4, 7], True),
        ("aaaaaaaaa", "aaaaaaaaa", [], False),
    ],
)
def test_at_a_face(first, second, faces, at_face):
    for start in (0, 30):
        moved = [face + start for face in faces]
        (cell,) = compare_lines(first, second, moved, origin=(0, 0, start))
        assert cell.at_face is at_face


def test_cut_by_the_region():
    cells = compare_lines("aa.bb.cc", "aa.bb.cc", goes_on=(False, False, True, True, False, False))
    assert [c.is_cut for c in cells] == [True, True, True]  # the upper end of z is one voxel away
    cells = compare_lines("aa.bb.cc", "aa.bb.cc", goes_on=(False, False, True, False, False, False))
    assert [c.is_cut for c in cells] == [True, False, False]
    cells = compare_lines("aa.bb.cc", "aa.bb.c.", goes_on=(False, False, False, False, False, True))
    assert [c.is_cut for c in cells] == [False, False, True]


def test_three_dimensions_by_hand():
    """Spacing (2, 1, 0.5): a voxel has 1 um3. A ball of 96 um3 has a radius of 2.84 um, of which half is 1.42."""
    first = np.zeros((9, 14, 25), np.uint32)
    second = first.copy()
    first[0:3, 0:4, 0:8] = 1
    second[1:4, 0:4, 0:8] = 1  # one plane, 2 um
    first[0:3, 5:9, 0:8] = 2
    second[0:3, 6:10, 0:8] = 2  # one row, 1 um
    first[4:9, 11:14, 10:20] = 3
    second[4:6, 11:14, 10:20] = 5
    second[6:9, 11:14, 10:20] = 3  # parted at z = 6
    first[0:3, 0:4, 20:25] = 4
    cells = compare_labels(first, second, faces=([6], [10], []), spacing=(2, 1, 0.5))
    assert [(c.kind, c.at_face, c.first_ids, c.second_ids) for c in cells] == [
        ("moved", False, (1,), (1,)),
        ("same", True, (2,), (2,)),  # the second answer's reaches y = 9
        ("split", True, (3,), (3, 5)),
        ("lost", False, (4,), ()),
    ]
    assert [c.iou for c in cells] == pytest.approx([2 / 4, 3 / 5, 1, 0])
    assert [c.shift for c in cells[:3]] == pytest.approx([2, 1, 0])
    assert cells[3].shift is None
    assert cells[0].box == (0, 0, 0, 4, 4, 8)
    assert cells[2].centroid == (6, 12, 14.5)


def balls(seeds, shape):
    """A Voronoi tissue with gaps, whose ids are not in a row."""
    voxels = np.stack(np.indices(shape), axis=-1).reshape(-1, 3) + 0.5
    distance, nearest = cKDTree(seeds).query(voxels)
    return np.where(distance < 4, 1 + 3 * nearest, 0).reshape(shape).astype(np.uint32)


def naive_cells(first, second, faces, min_iou, max_shift, spacing):
    """The same by sets of voxels, joined until nothing changes."""
    objects = [
        (side, int(i), {tuple(v) for v in np.argwhere(labels == i).tolist()})
        for side, labels in enumerate((first, second))
        for i in np.unique(labels[labels > 0])
    ]
    groups = [{n} for n in range(len(objects))]
    for n, (side, _, voxels) in enumerate(objects):
        for m, (other_side, _, others) in enumerate(objects):
            if side < other_side and 2 * len(voxels & others) > min(len(voxels), len(others)):
                old = [g for g in groups if n in g or m in g]
                groups = [g for g in groups if g not in old] + [set().union(*old)]
    found = Counter()
    for group in groups:
        ids = [tuple(sorted(objects[n][1] for n in group if objects[n][0] == side)) for side in (0, 1)]
        union = [set().union(*(objects[n][2] for n in group if objects[n][0] == side)) for side in (0, 1)]
        iou = len(union[0] & union[1]) / len(union[0] | union[1])
        if iou < 0.3:
            kind = "lost"
        elif len(ids[0]) > 1 or len(ids[1]) > 1:
            kind = "split" if len(ids[0]) == 1 else "merged" if len(ids[1]) == 1 else "mixed"
        else:
            apart = np.mean(list(union[0]), axis=0) - np.mean(list(union[1]), axis=0)
            kind = "moved" if iou < min_iou or np.linalg.norm(apart * spacing) > max_shift else "same"
        near = any(v[a] in (f - 1, f) for v in union[0] | union[1] for a in range(3) for f in faces[a])
        found[(kind, near, *ids)] += 1
    return found


@pytest.mark.parametrize("seed", range(3))
def test_random_answers_match_a_naive_comparison(seed):
    """Cells that wobble, some that only one answer has, and some with two seeds in one answer."""
    rng = np.random.default_rng(seed)
    shape, faces = (9, 17, 13), ([4], [6, 12], [])
    seeds = rng.uniform(0, 1, (30, 3)) * shape
    first = balls(np.concatenate([seeds[:26], seeds[:3] + 2]), shape)
    second = balls(np.concatenate([seeds[4:] + rng.normal(0, 0.6, (26, 3)), seeds[-3:] - 2]), shape)
    cells = compare_labels(first, second, faces=faces, spacing=(2, 1, 0.5), min_iou=0.6, max_shift=2.0)
    found = Counter((c.kind, c.at_face, c.first_ids, c.second_ids) for c in cells)
    assert found == naive_cells(first, second, faces, 0.6, 2.0, (2, 1, 0.5))
    assert {"same", "moved", "split", "merged"} <= {cell.kind for cell in cells}


@pytest.mark.parametrize("count", [0, 1, 2])
def test_equal_answers_agree(count):
    labels = np.zeros((3, 5, 7), np.uint32)
    for i in range(count):
        labels[1, 1:4, 3 * i : 3 * i + 2] = i + 1
    cells = compare_labels(labels, labels, faces=([1], [2], [3]))
    assert [c.kind for c in cells] == ["same"] * count
    lost = compare_labels(labels, np.zeros_like(labels), faces=NO_FACES)
    assert [c.kind for c in lost] == ["lost"] * count


def test_wrong_answers_and_limits_are_refused():
    with pytest.raises(ValueError, match=r"first has shape \(1, 1, 3\) and second \(1, 1, 4\)"):
        compare_lines("aaa", "aaaa")
    with pytest.raises(ValueError, match=r"min_iou is 0\.2"):
        compare_lines("aaa", "aaa", min_iou=0.2)
    with pytest.raises(ValueError, match="max_shift is 0"):
        compare_lines("aaa", "aaa", max_shift=0)


def report_of(at_faces, away):
    return SeamReport(
        roi=(0, 0, 0, 4, 5, 6),
        block_size=(2, 5, 3),
        halo=(1, 0, 1),
        offsets=((0, 0, 0), (1, 0, 1)),
        spacing_um=None,
        min_iou=0.5,
        max_shift=None,
        num_objects=(9, 9),
        num_cut=2,
        at_faces=at_faces,
        away=away,
        disagreements=(),
    )


def test_rates_and_intervals():
    """Newcombe 1998, table II, examples a and h, by method 10."""
    report = report_of(Tally(70, num_split=50, num_moved=6), Tally(80, num_lost=48))
    assert (report.at_faces.rate, report.away.rate) == (0.8, 0.6)
    assert report.excess == pytest.approx(0.2)
    assert report.excess_interval == pytest.approx((0.0524, 0.3339), abs=1e-4)
    report = report_of(Tally(10, num_mixed=10), Tally(10))
    assert report.excess_interval == pytest.approx((0.6075, 1), abs=1e-4)
    assert "excess at faces: 100.0 %, 95 % interval 60.8 to 100.0 %" in str(report)


def test_the_excess_without_moved_cells_is_a_line_of_its_own():
    """Newcombe's example a in other kinds, and once more with cells that have moved in both groups."""
    broken = report_of(Tally(70, num_split=50, num_mixed=3, num_merged=3), Tally(80, num_lost=48))
    wobbling = report_of(
        Tally(120, num_split=50, num_mixed=3, num_merged=3, num_moved=20), Tally(160, num_lost=48, num_moved=40)
    )
    lines = str(broken).splitlines()
    assert "excess at faces: 20.0 %, 95 % interval 5.2 to 33.4 %" in lines
    assert "excess without moved: 20.0 %, 95 % interval 5.2 to 33.4 %" in lines
    lines = str(wobbling).splitlines()
    assert any(line.startswith("excess at faces: 8.3 %,") for line in lines)  # 76 / 120 - 88 / 160
    assert any(line.startswith("excess without moved: 16.7 %,") for line in lines)  # 56 / 120 - 48 / 160
    assert "without moved" not in str(report_of(Tally(3, num_moved=1), Tally(0)))


def test_a_group_without_cells_has_no_rate():
    report = report_of(Tally(3, num_merged=1), Tally(0))
    assert (report.away.rate, report.away.rate_interval, report.excess, report.excess_interval) == (None,) * 4
    assert "one of the groups has no cell" in str(report)
    facts = report.as_json()
    assert facts["away"]["rate"] is None
    assert facts["excess"] is None
    assert facts["at_faces"]["num_disagreeing"] == 1


SHAPE = (36, 60, 20)
SEEDS = tissue_seeds(SHAPE, (4, 5, 5), seed=5)
TRUTH = voronoi(SEEDS, (0, 0, 0, *SHAPE))
GRID = {"block_size": (24, 30, 64), "halo": (4, 5, 0), "progress": False}


def test_a_perfect_model_has_no_seam():
    report = seam_check(blank(SHAPE), Perfect(TRUTH), **GRID)
    assert report.roi == (0, 0, 0, *SHAPE)
    assert report.offsets == ((0, 0, 0), (12, 15, 0))
    assert report.num_objects == (TRUTH.max(), TRUTH.max())
    assert report.disagreements == ()
    assert report.num_cut == 0
    faces = ((12, 24), (15, 30, 45))  # and none along x, where one block holds all
    planes = [np.take(TRUTH, [f - 1, f], axis).ravel() for axis, along in enumerate(faces) for f in along]
    num_at_faces = len(np.unique(np.concatenate(planes)))
    assert (report.at_faces, report.away) == (Tally(num_at_faces), Tally(TRUTH.max() - num_at_faces))


def test_objects_cut_by_the_region_are_not_counted():
    roi = (0, 5, 0, 36, 60, 16)
    report = seam_check(blank(SHAPE), Perfect(TRUTH), roi=roi, **GRID)
    inside = TRUTH[:, 5:, :16]
    cut = np.unique(np.concatenate([inside[:, 0].ravel(), inside[:, :, -1].ravel()]))
    assert report.num_objects == (len(np.unique(inside)),) * 2
    assert report.num_cut == len(cut)
    assert report.at_faces.num_cells + report.away.num_cells == len(np.unique(inside)) - len(cut)
    assert report.disagreements == ()


class Shy(Perfect):
    """A model that sees no object at the rim of its block: a halo of less than an object leaves seams."""

    def __call__(self, block, roi):
        labels = self.truth[roi[0] : roi[3], roi[1] : roi[4], roi[2] : roi[5]].copy()
        for axis, (low, high) in enumerate(zip(roi[:3], roi[3:], strict=True)):
            if low > 0:
                labels[np.isin(labels, np.take(labels, 0, axis))] = 0
            if high < self.truth.shape[axis]:
                labels[np.isin(labels, np.take(labels, -1, axis))] = 0
        return to_instances(labels)


def test_a_seam_is_found():
    report = seam_check(blank(SHAPE), Shy(TRUTH), **(GRID | {"halo": 1}))
    assert report.at_faces.num_lost > 20
    assert report.away.num_disagreeing == 0
    assert report.excess_interval[0] > 0.05
    assert all(cell.at_face for cell in report.disagreements)


def test_a_model_that_varies_everywhere(tmp_path):
    report = seam_check(
        blank(SHAPE),
        Jittered(SEEDS, 0.2),
        max_shift=0.4,
        json_path=tmp_path / "seams.json",
        picture_path=tmp_path / "seams.png",
        **GRID,
    )
    assert report.at_faces.num_moved > 10
    assert report.away.num_moved > 3
    assert {cell.kind for cell in report.disagreements} == {"moved"}  # outlines wobble, no cell is parted or lost
    assert report.excess_interval[0] < 0 < report.excess_interval[1]
    facts = json.loads((tmp_path / "seams.json").read_text())
    assert facts == report.as_json()
    assert len(facts["disagreements"]) == report.at_faces.num_disagreeing + report.away.num_disagreeing
    assert facts["at_faces"]["rate"] == report.at_faces.rate
    order = [(not c.at_face, KINDS.index(c.kind), c.box) for c in report.disagreements]
    assert order == sorted(order)
    check_colours(tmp_path / "seams.png")


def check_colours(path):
    """Amber and sky lines are there."""
    picture = imread(path)[..., :3]
    for colour in ((1.0, 0.69, 0.0), (0.21, 0.79, 1.0)):
        assert (np.abs(picture - colour).max(axis=-1) < 0.1).sum() > 200


def test_no_object_at_all(tmp_path):
    paths = {"json_path": tmp_path / "seams.json", "picture_path": tmp_path / "seams.png"}
    report = seam_check(blank(SHAPE), lambda block, roi: Instances.empty(), **paths, **GRID)
    assert (report.at_faces, report.away, report.num_objects) == (Tally(0), Tally(0), (0, 0))
    assert json.loads(paths["json_path"].read_text())["excess"] is None
    check_colours(paths["picture_path"])  # the faces


@pytest.mark.parametrize(
    ("shape", "block_size", "offset", "roi", "second"),
    [
        ((30, 100, 45), (10, 20, 9), 0, (0, 20, 9, 30, 80, 36), (5, 10, 4)),
        ((8, 100, 45), (10, 20, 50), 0, (0, 20, 0, 8, 80, 45), (0, 10, 0)),  # one block along z and x: no seam there
        ((40, 21, 33), (10, 20, 10), (5, 0, 5), (5, 0, 0, 35, 21, 25), (10, 10, 10)),
    ],
)
def test_the_region_in_the_middle(shape, block_size, offset, roi, second):
    report = seam_check(
        blank(shape),
        lambda block, roi: Instances.empty(),
        block_size=block_size,
        halo=(1, 2, 3),
        offset=offset,
        progress=False,
    )
    assert report.roi == roi
    assert report.offsets[1] == second


def test_a_file_with_axes_channels_and_spacing(tmp_path):
    path = tmp_path / "x.zarr"
    zarr.create_array(path, data=np.zeros((2, *SHAPE), np.uint16))
    report = seam_check(path, Perfect(TRUTH), axes="CZYX", channels=[1], spacing=(2, 1, 0.5), **GRID)
    assert report.spacing_um == (2, 1, 0.5)
    assert report.at_faces.num_cells > 0
    assert seam_check(np.zeros(SHAPE), Perfect(TRUTH), spacing=(3, 1, 1), **GRID).spacing_um == (3, 1, 1)


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ({"block_size": SHAPE}, ValueError, r"no face .* lies in the region \[0, 0, 0, 36, 60, 20\]"),
        ({"roi": (0, 0, 0, 5, 9, 8)}, ValueError, "no face"),
        ({"halo": 0}, ValueError, "halo is 0"),
        ({"min_iou": 1.5}, ValueError, r"min_iou is 1\.5"),
        ({"max_shift": -1.0}, ValueError, r"max_shift is -1\.0"),
        ({"axes": "ZYX"}, ValueError, "describe a file"),
        ({"spacing": (1, 1, 1)}, ValueError, "describe a file"),
        ({"image": "missing.tif"}, FileNotFoundError, r"missing\.tif"),
        ({"json_path": "missing/x.json"}, FileNotFoundError, "the folder of json_path"),
        ({"picture_path": "missing/x.png"}, FileNotFoundError, "the folder of picture_path"),
    ],
)
def test_wrong_arguments_are_refused_before_any_prediction(change, kind, message):
    def predictor(block, roi):
        raise AssertionError("predicted")

    with pytest.raises(kind, match=message):
        seam_check(**({"image": blank(SHAPE), "predictor": predictor, **GRID} | change))
