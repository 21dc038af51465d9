"""Census and links of a block, counted by hand and against naive loops."""

from collections import Counter

import numpy as np
import pytest
from inference_toys import Drawn, tissue_seeds, to_instances, voronoi

from seg3d_monai.inference.blocks import BlockPlan, intersection, roi_slices
from seg3d_monai.inference.evidence import count_pairs, label_map, link_block, take_census
from seg3d_monai.inference.journal import RowSource, pack_instances


def test_pairs_are_counted():
    rng = np.random.default_rng(0)
    # windows of larger arrays, as a shared ROI is
    a, b = (rng.integers(0, n, (6, 9, 12)).astype(np.int32)[1:, 2:8, 3:] for n in (5, 7))
    pairs = Counter(zip(a.ravel().tolist(), b.ravel().tolist(), strict=True))
    found = list(zip(*(column.tolist() for column in count_pairs(a, b)), strict=True))
    assert found == [(i, j, pairs[i, j]) for i, j in sorted(pairs)]
    flat = [column.tolist() for column in count_pairs(a.ravel(), b.ravel())]
    assert list(zip(*flat, strict=True)) == found
    assert all(len(column) == 0 for column in count_pairs(a[:0], b[:0]))


def views_1d(*texts):
    """Blocks of 6 with halo 3 along x: 0-8, 3-14, 9-17, as drawings of what each reads."""
    plan = BlockPlan.make(shape=(1, 1, 18), block_size=(1, 1, 6), halo=(0, 0, 3))
    starts = (0, 3, 9)
    predictor = Drawn(list(zip(starts, texts, strict=True)), {})
    placed = {b.index: predictor(None, b.read).place(b.read) for b in plan}
    return plan, placed


def test_a_census_by_hand():
    plan, placed = views_1d("...aa.bbb", "bbb....cccc.", "cccc.....")
    first, second = take_census(plan, 0, placed[0]), take_census(plan, 1, placed[1])
    assert first.own.tolist() == [2, 0]
    assert first.home.tolist() == [0, 1]
    assert first.reach.tolist() == [[1, 1]]
    assert first.corner.tolist() == [[0, 0, 3], [0, 0, 6]]
    # b lies at 3-5, so in block 0; c at 10-13: two voxels in each of blocks 1 and 2, and its own block wins
    assert second.own.tolist() == [0, 2]
    assert second.home.tolist() == [0, 1]
    assert second.reach.tolist() == [[0, 0], [1, 2]]
    assert len(take_census(plan, 0, [])) == 0


def test_links_by_hand():
    plan, placed = views_1d(".....aaaa", "..aaaa..bbbb", "..bbbb...")
    rows = RowSource({index: pack_instances(found) for index, found in placed.items()})
    homes = {index: take_census(plan, index, found).home for index, found in placed.items()}
    assert len(link_block(plan, 0, rows, homes)) == 0  # none comes before it
    links = link_block(plan, 1, rows, homes)
    # within 3-8: a of block 0 at 5-8, a of block 1 at 5-8; strength 4 / (4 + 8)
    assert (links.other.tolist(), links.theirs.tolist(), links.mine.tolist()) == ([0], [0], [0])
    assert links.strength.tolist() == [pytest.approx(4 / 12)]
    later = link_block(plan, 2, rows, homes)
    assert (later.other.tolist(), later.theirs.tolist(), later.mine.tolist()) == ([1], [1], [0])
    assert len(link_block(plan, 2, rows, {2: homes[2]})) == 0  # neighbours without an instance


def test_evidence_of_tissue_against_naive_loops():
    shape = (12, 30, 26)
    plan = BlockPlan.make(shape=shape, block_size=(6, 12, 13), halo=(3, 5, 4))
    truth = voronoi(tissue_seeds(shape, (6, 10, 9), seed=3), (0, 0, 0, *shape))
    placed = {b.index: to_instances(truth[roi_slices(b.read)]).place(b.read) for b in plan}
    rows = RowSource({index: pack_instances(found) for index, found in placed.items()})
    censuses = {index: take_census(plan, index, found) for index, found in placed.items()}
    for block in plan:
        census = censuses[block.index]
        labels = label_map(placed[block.index], block.read)
        for number in range(len(census)):
            mask = labels == number + 1
            owned = {
                other.index: int(mask[roi_slices(shared, block.read[:3])].sum())
                for other in plan
                if (shared := intersection(other.owned, block.read)) is not None
            }
            assert census.own[number] == owned[block.index]
            reached = {int(b) for n, b in census.reach if n == number}
            assert reached == {b for b, count in owned.items() if count and b != block.index}
            most = max(owned.values())
            home = block.index if owned[block.index] == most else min(b for b, c in owned.items() if c == most)
            assert census.home[number] == home
        links = link_block(plan, block.index, rows, {i: c.home for i, c in censuses.items()})
        pairs = {(int(o), int(t), int(m)) for o, t, m in zip(links.other, links.theirs, links.mine, strict=True)}
        expected = set()
        for other in plan:
            if other.index >= block.index or (shared := intersection(other.read, block.read)) is None:
                continue
            theirs = label_map(placed[other.index], shared)
            mine = label_map(placed[block.index], shared)
            for i, j in {(int(i), int(j)) for i, j in zip(theirs.ravel(), mine.ravel(), strict=True)}:
                assert ((theirs == i) == (mine == j)).all()  # a perfect predictor: the same cell
                expected.add((other.index, i - 1, j - 1))
        assert pairs == expected
