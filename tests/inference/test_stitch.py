"""The stitching rule on toys counted by hand: 1-D drawings and 6 x 6 x 6 volumes."""

import itertools
from contextlib import closing

import numpy as np
import pytest
from inference_toys import Drawn, Perfect, blank, same_partition, to_instances

from seg3d_monai.data.volume import open_volume
from seg3d_monai.inference import Instances, predict_labels, predict_volume
from seg3d_monai.inference.blocks import BlockPlan, roi_shape
from seg3d_monai.inference.evidence import label_map
from seg3d_monai.inference.instances import PlacedInstance
from seg3d_monai.inference.journal import Journal
from seg3d_monai.inference.paint import paint_block
from seg3d_monai.inference.run import Run
from seg3d_monai.inference.stitch import Records, group_instances
from seg3d_monai.inference.workers import BlockWorker, ThreadWorkers


def stitch_1d(views, scores=None, *, size, halo):
    length = max(x + len(text) for x, text in views)
    predictor = Drawn(views, scores)
    labels, table = predict_labels(blank((1, 1, length)), predictor, (1, 1, size), (0, 0, halo))
    assert table["id"].tolist() == list(range(1, len(table) + 1))
    return "".join("." if v == 0 else str(v) for v in labels.ravel())


# Two blocks of 6 with halo 3: A owns 0-5 and reads 0-8, B owns 6-11 and reads 3-11.
@pytest.mark.parametrize(
    ("a", "b", "scores", "expected"),
    [
        # both see the same object
        ("....aaaa.", ".aaaa....", {}, "....1111...."),
        # they disagree by a voxel: a up to the face, b behind it
        ("....aaaa.", "..aaaa...", {}, "....11111..."),
        # larger than the halo on both sides: every view is truncated
        (".aaaaaaaa", "aaaaaaaa.", {}, ".1111111111."),
        # B sees two where A sees one: the better match is joined, the rest has no voxel in B
        ("..aaaaaaa", "aabbbbbbb", {}, "..1111111111"),
        # B sees two where A sees one, and the second one is B's own
        (".aaaaaa..", "aaaa.bbb.", {}, ".111111.222."),
        # B misses it, most of it is A's: kept whole
        ("....aaa..", ".........", {}, "....111....."),
        # B misses it, half of it is A's: kept whole
        ("....aaaa.", ".........", {}, "....1111...."),
        # B misses it, most of it is B's: dropped
        (".....aaa.", ".........", {}, "............"),
        # nothing, and one object away from the face
        (".........", ".........", {}, "............"),
        ("aa.......", ".........", {}, "11.........."),
        # each block's own object up to the face: two touching objects stay two
        ("...aaabbb", "aaabbb...", {}, "...111222..."),
        # A's object ends at the face, B's begins there, and neither sees the other's
        ("...aaa...", "...aaa...", {}, "...111222..."),
        # too little overlap to be one (1 of 6): the higher score gets the voxel
        ("..aaaaa..", "...aaaa..", {}, "..11112222.."),
        # B knows the object and says that it ends before the face: it gives A's tip no voxel
        ("..aaaaa..", "aaa......", {}, "..1111......"),
    ],
)
def test_two_blocks_by_hand(a, b, scores, expected):
    assert stitch_1d([(0, a), (3, b)], scores, size=6, halo=3) == expected


def test_a_contested_voxel_goes_to_the_higher_score():
    class Scored(Drawn):
        def __call__(self, block, roi):
            found = super().__call__(block, roi)
            return Instances(found.boxes, np.full(len(found), 0.9 if roi[2] == 0 else 0.8), found.classes, found.masks)

    labels, _ = predict_labels(blank((1, 1, 12)), Scored([(0, "..aaaaa.."), (3, "...aaaa..")]), (1, 1, 6), (0, 0, 3))
    assert labels.ravel().tolist() == [0, 0, 1, 1, 1, 1, 1, 2, 2, 2, 0, 0]


# Two blocks of 12 with halo 6: A owns 0-11 and reads 0-17, B owns 12-23 and reads 6-23.
def test_duplicate_without_enough_overlap_is_removed():
    a = "..aaaaaaaaaaaaaaaa"  # 2-17, 10 of 16 voxels are A's
    b = "......bb.........."  # 12-13: IoU 2 / 12
    views = [(0, a), (6, b)]
    assert stitch_1d(views, {"a": 0.9, "b": 0.5}, size=12, halo=6) == "..1111111111111111......"
    # the small one has the higher score: more than half of both is visible
    assert stitch_1d(views, {"a": 0.5, "b": 0.9}, size=12, halo=6) == "..1111111111221111......"


def test_two_views_that_both_defer_are_not_lost():
    a = "...........aaaaaaa"  # 11-17: 1 voxel is A's, 6 are B's
    b = "aaaaaaa..........."  # 6-12: 6 voxels are A's, 1 is B's; IoU 2 / 12
    assert stitch_1d([(0, a), (6, b)], size=12, halo=6) == "...........11..........."


def test_duplicates_that_meet_yield_one_at_a_time():
    # three blocks of 40 with halo 40: a (A, 0.9) hides 7 of b's 13 voxels, b (B, 0.8) hides c's only one
    a = "." + "a" * 76 + "." * 3  # 1-76, 39 are A's
    b = "." * 70 + "b" * 13 + "." * 37  # 70-82, 10 are B's
    c = "." * 42 + "c" + "." * 37  # 82
    found = stitch_1d([(0, a), (0, b), (40, c)], {"a": 0.9, "b": 0.8, "c": 0.7}, size=40, halo=40)
    assert found == "." + "1" * 76 + "." * 5 + "2" + "." * 37


def test_a_rod_through_five_blocks_is_one():
    # owned 0-3, 4-7, ...; halo 1; the rod covers 2-17
    rod = "..aaaaaaaaaaaaaaaa.."
    views = [(max(4 * i - 1, 0), rod[max(4 * i - 1, 0) : 4 * i + 5]) for i in range(5)]
    assert stitch_1d(views, size=4, halo=1) == "..1111111111111111.."


def test_two_rods_that_touch_at_a_face_stay_two():
    line = "..aaaaaabbbbbbbbbb.."
    views = [(max(4 * i - 1, 0), line[max(4 * i - 1, 0) : 4 * i + 5]) for i in range(5)]
    assert stitch_1d(views, size=4, halo=1) == "..1111112222222222.."


def test_an_object_that_the_middle_block_misses_is_painted_there():
    # halo 3 of block 4: blocks 0 (reads 0-6) and 2 (reads 5-11) still meet in 5-6
    views = [(0, "..aaaaa"), (1, ".........."), (5, "aaaaa..")]
    assert stitch_1d(views, size=4, halo=3) == "..11111111.."


def test_within_a_block_the_highest_score_gets_the_voxel():
    def predictor(block, roi):
        masks = [np.ones((1, 1, 4), bool), np.ones((1, 1, 4), bool)]
        return Instances([[0, 0, 1, 1, 1, 5], [0, 0, 3, 1, 1, 7]], [0.3, 0.6], [4, 5], masks)

    labels, table = predict_labels(blank((1, 1, 8)), predictor)
    assert labels.ravel().tolist() == [0, 1, 1, 2, 2, 2, 2, 0]
    assert table["score"].tolist() == [0.3, 0.6]
    assert table["class"].tolist() == [4, 5]


def test_a_hidden_instance_gets_no_id():
    def predictor(block, roi):
        masks = [np.ones((1, 1, 2), bool), np.ones((1, 1, 4), bool), np.ones((1, 1, 1), bool)]
        return Instances(
            [[0, 0, 2, 1, 1, 4], [0, 0, 1, 1, 1, 5], [0, 0, 7, 1, 1, 8]], [0.3, 0.6, 0.5], [0, 0, 0], masks
        )

    labels, table = predict_labels(blank((1, 1, 8)), predictor)
    assert labels.ravel().tolist() == [0, 1, 1, 1, 1, 0, 0, 2]
    assert table["volume_voxels"].tolist() == [4, 1]


def test_label_map_ties_go_to_the_lower_number():
    row = np.ones((1, 1, 3), bool)
    first = PlacedInstance(0, 0.5, 0, (0.0,) * 6, (0, 0, 0, 1, 1, 3), row)
    second = PlacedInstance(1, 0.5, 0, (0.0,) * 6, (0, 0, 2, 1, 1, 5), row)
    for order in ([first, second], [second, first]):
        assert label_map(order, (0, 0, 0, 1, 1, 6)).ravel().tolist() == [1, 1, 1, 2, 2, 0]
        assert label_map(order, (0, 0, 2, 1, 1, 4)).ravel().tolist() == [1, 2]


def records_of(blocks, links, own=None, home=None):
    """links: [(instance, instance of a later block, strength)]."""
    blocks = np.array(blocks)
    count = len(blocks)
    lower, higher, strength = (np.array(column) for column in zip(*links, strict=True))
    return Records(
        first=np.searchsorted(blocks, np.arange(blocks.max() + 2)),
        block=blocks,
        score=np.full(count, 0.9),
        class_index=np.zeros(count, int),
        corner=np.zeros((count, 3), int),
        own=np.full(count, 5) if own is None else np.array(own),
        at_home=np.ones(count, bool) if home is None else np.array(home) == blocks,
        reaching=np.zeros(0, int),
        reached=np.zeros(0, int),
        lower=lower,
        higher=higher,
        strength=strength,
    )


@pytest.mark.parametrize(
    ("strength", "expected"),
    [
        # instances 0 and 1 in block 0, 2 in block 1, 3 in block 2; the chain 0 - 2 - 3 - 1 is cut at its weakest link
        ((0.9, 0.4, 0.8), [0, 1, 0, 0]),
        ((0.9, 0.8, 0.4), [0, 1, 0, 1]),
        # equal evidence: the pair of lower instances goes first
        ((0.5, 0.5, 0.5), [0, 1, 0, 1]),
    ],
)
def test_two_instances_of_one_block_are_never_joined(strength, expected):
    pairs = [(0, 2), (1, 3), (2, 3)]
    links = [(*pair, s) for pair, s in zip(pairs, strength, strict=True)]
    assert group_instances(records_of([0, 0, 1, 2], links)).tolist() == expected


def test_a_chain_with_nothing_to_cut_is_one():
    assert group_instances(records_of([0, 0, 1, 2], [(0, 2, 0.5), (2, 3, 0.5)])).tolist() == [0, 1, 0, 0]


def test_slivers_join_nothing_and_strays_are_dropped():
    # 1 has no voxel of its own; 2 is alone and mostly another block's
    records = records_of([0, 1, 1, 2], [(0, 1, 0.9), (1, 3, 0.9)], own=[5, 0, 2, 5], home=[0, 0, 2, 2])
    assert group_instances(records).tolist() == [0, -1, -1, 3]


def toy(*objects):
    """A 6 x 6 x 6 truth; every object is a list of slices or voxels."""
    truth = np.zeros((6, 6, 6), int)
    for label, where in enumerate(objects, start=1):
        for part in where:
            truth[part] = label
    return truth


TOYS = {
    "corner of eight blocks": toy([np.s_[2:4, 2:4, 2:4]]),
    "edge of four blocks": toy([np.s_[2:4, 2:4, 0:2]], [np.s_[2:4, 2:4, 4:6]]),
    "faces": toy([np.s_[1:5, 1, 1]], [np.s_[1, 3:5, 1:5]], [np.s_[4, 4, 2:5]]),
    "meeting at a corner only": toy([(2, 2, 2), (3, 3, 3)]),
    "crossing diagonals": toy([(i, i, i) for i in range(6)], [(i, 5 - i, 5) for i in range(5)]),
    "rods through all": toy([np.s_[:, 0, 0]], [np.s_[3, :, 2]], [np.s_[5, 5, :]]),
    "shell and core": toy([np.s_[0:6, 0:6, 0:6]], [np.s_[1:5, 1:5, 1:5]]),
    "everything": toy([np.s_[:, :, :]]),
    "touching halves": toy([np.s_[:3]], [np.s_[3:]]),
    "layers across": toy(*[[np.s_[:, i]] for i in range(6)]),
    "every voxel": np.arange(1, 217).reshape(6, 6, 6),
    "one voxel": toy([(3, 2, 4)]),
    "nothing": toy(),
}
GRIDS = [((3, 3, 3), (1, 1, 1)), ((2, 3, 4), (1, 2, 1)), ((1, 2, 6), (1, 1, 0)), ((4, 2, 3), 3), ((6, 6, 6), 0)]


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("name", TOYS)
def test_a_perfect_predictor_gives_the_truth(name, grid):
    truth = TOYS[name]
    labels, table = predict_labels(blank(truth.shape), Perfect(truth), *grid)
    assert same_partition(labels, truth)
    assert len(table) == truth.max()


@pytest.mark.parametrize("blind", [[0], [7], [1, 2], [0, 1, 2, 3, 4, 5, 6]])
def test_blocks_that_miss_the_object_on_a_corner_are_filled_by_the_others(blind):
    truth = TOYS["corner of eight blocks"]
    plan = BlockPlan.make(shape=truth.shape, block_size=3, halo=1)
    missed = {plan[i].read for i in blind}

    def predictor(block, roi):
        return Instances.empty() if roi in missed else Perfect(truth)(block, roi)

    labels, table = predict_labels(blank(truth.shape), predictor, 3, 1)
    assert (labels == truth).all()
    assert table["volume_voxels"].tolist() == [8]


def test_ids_follow_the_blocks_then_the_position():
    truth = toy([(5, 5, 5)], [np.s_[0, 4:6, 0]], [(0, 0, 1)], [(0, 0, 0)], [np.s_[2:4, 0, 5]])
    labels, table = predict_labels(blank(truth.shape), Perfect(truth), (3, 6, 3), 1)
    # blocks: (z 0-2, x 0-2) holds (0,0,0), (0,0,1), (0,4:6,0); (z 0-2, x 3-5) the column; the last one (5,5,5)
    assert [labels[p] for p in ((0, 0, 0), (0, 0, 1), (0, 4, 0), (2, 0, 5), (5, 5, 5))] == [1, 2, 3, 4, 5]
    assert table["z1"].tolist() == [0, 0, 0, 2, 5]


def test_the_order_of_blocks_does_not_matter():
    rng = np.random.default_rng(5)
    shape, grid = (6, 9, 8), ((3, 4, 4), (1, 2, 2))
    plan = BlockPlan.make(shape=shape, block_size=grid[0], halo=grid[1])
    views = {
        b.read: to_instances(rng.integers(0, 6, roi_shape(b.read)), dict(enumerate(rng.uniform(size=7)))) for b in plan
    }
    painted = []
    for order in itertools.islice(itertools.permutations(range(len(plan))), 0, 10000, 2500):
        worker = BlockWorker(plan, [blank(shape)], [lambda _, roi: views[roi]])
        with Journal(":memory:") as journal, closing(ThreadWorkers(worker)) as workers:
            run = Run(plan=plan, journal=journal, workers=workers)
            run._batches = lambda missing, order=order: [(i,) for i in order]
            run.predict()
            stitched = run.stitch()
            painted.append(
                [
                    p.values[p.slots].tolist()
                    for p in (paint_block(plan, journal, stitched.claims(b.index)) for b in plan)
                ]
            )
    assert painted[0] == painted[1] == painted[2] == painted[3]


def test_a_threshold_makes_instances_vanish(tmp_path):
    predictor = Drawn([(0, "aa..bbbbb"), (3, ".bbbbb...")], {"a": 0.4, "b": 0.8})
    for threshold, count in ((None, 2), (0.5, 1), (0.9, 0)):
        done = predict_volume(
            blank((1, 1, 12)),
            predictor,
            tmp_path / f"{threshold}.zarr",
            (1, 1, 6),
            (0, 0, 3),
            score_threshold=threshold,
        )
        assert done.num_objects == count


@pytest.mark.parametrize(("min_volume", "expected"), [(0, "11..22222..."), (3, "....11111..."), (6, "............")])
def test_small_objects_are_left_out(min_volume, expected, tmp_path):
    predictor = Drawn([(0, "aa..bbbbb"), (3, ".bbbbb...")])
    predict_volume(blank((1, 1, 12)), predictor, tmp_path / "x.zarr", (1, 1, 6), (0, 0, 3), min_volume=min_volume)
    labels = open_volume(tmp_path / "x.zarr").read((0, 0, 0, 1, 1, 12))
    assert "".join("." if v == 0 else str(v) for v in labels.ravel()) == expected
