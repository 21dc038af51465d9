"""The journal: whole blocks or nothing, one driver, plans that can be compared."""

import sqlite3
from contextlib import closing

import numpy as np
import pytest
from inference_toys import to_instances

from seg3d_monai.inference.blocks import BlockPlan
from seg3d_monai.inference.evidence import take_census
from seg3d_monai.inference.journal import Journal, JournalInUseError, describe_difference, pack_instances

CENSUS = take_census(BlockPlan.make(shape=(1, 1, 1), block_size=1, halo=0), 0, [])
ROI = (10, 20, 30, 13, 24, 36)


def placed():
    labels = np.random.default_rng(0).integers(0, 4, (3, 4, 6))
    return to_instances(labels, {1: 0.25, 2: 0.5, 3: 0.75}).place(ROI)


def test_blocks_come_back_as_they_went(tmp_path):
    path = tmp_path / "a.journal.sqlite"
    with Journal(path) as journal:
        journal.begin({"plan": {"shape": [3, 4, 6]}, "state": "predicting"})
        journal.start_block(7)
        journal.start_block(8)
        journal.finish_blocks({7: (pack_instances(placed()), CENSUS)})
    with Journal(path) as journal:
        assert journal.fact("plan") == {"shape": [3, 4, 6]}
        assert journal.fact("unknown") is None
        assert journal.blocks_in_state("done") == {7}
        assert journal.blocks_in_state("started") == {8}
        journal.start_block(8)
        assert journal.starts() == {7: 1, 8: 2}
        found = journal.instances(7)
        assert journal.instances(8) == []
    for before, after in zip(placed(), found, strict=True):
        assert (before.mask == after.mask).all()
        for name in ("number", "score", "class_index", "box", "roi"):
            assert getattr(before, name) == getattr(after, name)


def test_reading_by_roi_and_score():
    with Journal(":memory:") as journal:
        journal.start_block(0)
        labels = np.zeros((3, 4, 6), int)
        labels[0, 0, 0], labels[2, 3, 5] = 1, 2
        journal.finish_blocks({0: (pack_instances(to_instances(labels, {1: 0.25, 2: 0.5}).place(ROI)), CENSUS)})
        assert [i.number for i in journal.instances(0, (10, 20, 30, 11, 21, 31))] == [0]
        assert [i.number for i in journal.instances(0, (11, 20, 30, 13, 24, 36))] == [1]
        assert journal.instances(0, (11, 20, 30, 12, 24, 36)) == []
        assert [i.number for i in journal.instances(0, min_score=0.5)] == [1]


def test_a_block_is_stored_whole_or_not_at_all():
    with Journal(":memory:") as journal:
        journal.start_block(0)
        rows = pack_instances(placed())
        with pytest.raises(sqlite3.IntegrityError):
            journal.finish_blocks({0: ([*rows, rows[0]], CENSUS)})
        assert journal.blocks_in_state("done") == set()
        assert journal.instances(0) == []


def test_why_a_block_could_not_be_read_is_known_until_it_is_tried_again(tmp_path):
    path = tmp_path / "a.journal.sqlite"
    with Journal(path) as journal:
        for block in (5, 2, 9):
            journal.start_block(block)
        journal.mark_unreadable(5, "chunk 3 is damaged")
        journal.mark_unreadable(2, "NaN at (z 1, y 2, x 3)")
    with Journal(path) as journal:
        assert list(journal.unreadable().items()) == [(2, "NaN at (z 1, y 2, x 3)"), (5, "chunk 3 is damaged")]
        journal.start_block(5)
        journal.finish_blocks({5: ([], CENSUS)})
        journal.mark_unreadable(9, "chunk 4 is damaged")
        assert journal.unreadable() == {2: "NaN at (z 1, y 2, x 3)", 9: "chunk 4 is damaged"}
        assert journal.starts() == {2: 1, 5: 2, 9: 1}
    with closing(sqlite3.connect(path)) as stored:
        assert stored.execute("SELECT reason FROM blocks WHERE block = 5").fetchone() == (None,)
        assert stored.execute("SELECT name FROM facts").fetchall() == [("format",)]


def test_a_journal_of_an_older_format_is_refused(tmp_path):
    path = tmp_path / "a.journal.sqlite"
    Journal(path).close()
    with closing(sqlite3.connect(path)) as stored, stored:
        stored.execute("UPDATE facts SET value = '2' WHERE name = 'format'")
    with pytest.raises(ValueError, match=r"has format 2, this version writes 3; finish it .* or predict .* --restart"):
        Journal(path)


def test_a_second_driver_is_kept_out(tmp_path):
    path = tmp_path / "a.journal.sqlite"
    with Journal(path) as journal:
        journal.set_fact("x", 1)
        with pytest.raises(JournalInUseError, match="in use by another run"):
            Journal(path)
    Journal(path).close()


def test_something_else_is_no_journal(tmp_path):
    path = tmp_path / "a.journal.sqlite"
    path.write_bytes(b"not a database" * 100)
    with pytest.raises(ValueError, match="cannot be used as a journal"):
        Journal(path)


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ({"a": 1, "b": [1, 2]}, {"a": 1, "b": [1, 2]}, None),
        ({"a": {"b": 1}}, {"a": {"b": 2}}, "a.b: 1 -> 2"),
        ({"a": 1}, {"a": 1, "c": None}, "c: 'absent' -> None"),
        ({"a": {"b": 1}}, {"a": 3}, "a: {'b': 1} -> 3"),
    ],
)
def test_differences_are_named(old, new, expected):
    assert describe_difference(old, new) == expected
