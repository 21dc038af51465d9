"""Filter expressions: what they select, against SQLite as the oracle of missing values, and what is refused."""

import sqlite3
from itertools import product

import numpy as np
import pytest

from seg3d_monai.data.filters import Column, Filter, Table

COLUMNS = {
    "quality_image": Column("number"),
    "stain": Column("text"),
    "note": Column("any"),
    "depth": Column("number"),
    "num_instances": Column("number", "crop"),
    "fraction": Column("number", "crop"),
}
ROWS = {
    "quality_image": [1.0, 2.0, 3.0, None],
    "stain": ["H2B", "DAPI", "H2B", None],
    "note": [3, "x", None, 0],
    "depth": [10, 20, 30, None],
}
NUM_CROPS = [3, 1, 2, 4]
CROPS = {
    "num_instances": np.array([0, 1, 2, 3, 4, 0, 2, 2, 9, 0], np.uint32),
    "fraction": np.array([0, 0.25, 0.5, 0.75, 1, 0, 0.5, 0.25, 1, 0]),
}


def select(expression: str) -> list[int]:
    """Numbers of the volumes, or of the crops, from 1."""
    found = Filter(expression, COLUMNS)(Table(ROWS, CROPS, NUM_CROPS))
    return (np.flatnonzero(found) + 1).tolist()


@pytest.mark.parametrize(
    ("expression", "expected"),
    [
        ('quality_image >= 2 and stain == "H2B"', [3]),
        ('quality_image >= 2 or stain == "H2B"', [1, 2, 3]),
        ('not (quality_image >= 2 and stain == "H2B")', [1, 2]),  # row 4 has no values: neither true nor false
        ('stain in ("DAPI", "GFP")', [2]),
        ('stain not in ["DAPI"]', [1, 3]),
        ("1 < quality_image <= 3", [2, 3]),
        ("quality_image != 2", [1, 3]),
        ("2 > quality_image", [1]),
        ("quality_image > -1.5", [1, 2, 3]),
        ("stain == None", [4]),
        ("None != stain", [1, 2, 3]),
        ("note is None", [3]),
        ("note is not None", [1, 2, 4]),
        ("depth == 20 or depth == 30 and quality_image < 3", [2]),
        ("depth > 10 and depth in (30,)", [3]),
        ("note", [1, 2]),
        ("note == 3", [1]),
        ("note != 3", [2, 4]),
        ("note >= 0", [1, 4]),  # text and numbers are in no order
        ("not note >= 0", []),
        ("True", [1, 2, 3, 4]),
        ("  quality_image == 1 ", [1]),
        ("stain in ()", []),
        ("stain not in ()", [1, 2, 3, 4]),
    ],
)
def test_a_filter_of_volumes_selects_what_it_says(expression: str, expected: list[int]) -> None:
    assert select(expression) == expected


@pytest.mark.parametrize(
    ("expression", "expected"),
    [
        ("num_instances >= 2", [3, 4, 5, 7, 8, 9]),
        ('num_instances >= 2 and stain == "H2B"', [3, 5]),
        ('stain == "H2B" and not num_instances', [1, 6]),
        ("num_instances > quality_image", [3, 4, 5]),
        ("not num_instances > quality_image", [1, 2, 6]),
        ("num_instances in (9, quality_image)", [2, 9]),
        ("num_instances == None", []),
        ("num_instances != None and fraction == 1", [5, 9]),
        ("0.25 <= fraction < 1 or depth == 20", [2, 3, 4, 7, 8]),
        ("quality_image == 1 or num_instances == 9", [1, 2, 3, 9]),
    ],
)
def test_a_filter_of_crops_selects_what_it_says(expression: str, expected: list[int]) -> None:
    assert select(expression) == expected


def test_missing_values_are_those_of_sql() -> None:
    """All pairs of small conditions, joined in all ways, against SQLite on the same rows."""
    connection = sqlite3.connect(":memory:")
    connection.execute("CREATE TABLE t (id, quality_image, stain, depth, num_instances, fraction)")
    number = 0
    for volume, count in enumerate(NUM_CROPS):
        for _ in range(count):
            values = [ROWS[name][volume] for name in ("quality_image", "stain", "depth")]
            crop = [CROPS["num_instances"][number].item(), CROPS["fraction"][number].item()]
            number += 1
            connection.execute("INSERT INTO t VALUES (?, ?, ?, ?, ?, ?)", (number, *values, *crop))
    simple = ["quality_image < 3", "stain == 'H2B'", "depth != 20", "num_instances > 1", "fraction <= 0.5"]
    simple += ["num_instances < quality_image", "stain in ('DAPI', 'GFP')", "depth not in (10, 30)"]
    for a, b in product(simple, simple):
        for form in ("({0}) and ({1})", "({0}) or ({1})", "not ({0}) and ({1})", "not (({0}) or not ({1}))"):
            # The crop column makes every answer one of crops.
            expression = f"num_instances >= 0 and ({form.format(a, b)})"
            rows = connection.execute(f"SELECT id FROM t WHERE {expression.replace('==', '=')} ORDER BY id")
            assert select(expression) == [row[0] for row in rows], expression


def test_large_numbers_are_compared_exactly() -> None:
    table = Table({"depth": [2**53, 2**53 + 1]}, {}, [1, 1])
    assert Filter(f"depth == {2**53 + 1}", COLUMNS)(table).tolist() == [False, True]


def test_the_level_and_the_names_of_a_filter() -> None:
    assert Filter("quality_image > 1 and stain == 'x'", COLUMNS).level == "volume"
    found = Filter("quality_image > 1 or fraction < 1", COLUMNS)
    assert (found.level, found.names) == ("crop", {"quality_image", "fraction"})
    empty = Table({name: [] for name in ROWS}, {name: values[:0] for name, values in CROPS.items()}, [])
    assert found(empty).shape == (0,)
    assert Filter("True", COLUMNS)(empty).shape == (0,)


def test_an_unknown_column_names_the_nearest_and_all() -> None:
    with pytest.raises(ValueError, match="no column 'qualty_image', the nearest is 'quality_image'") as caught:
        Filter("qualty_image > 1", COLUMNS)
    assert "depth, fraction, note, num_instances, quality_image, stain" in str(caught.value)


@pytest.mark.parametrize(
    "expression",
    [
        "",
        "quality_image >",
        "__import__('os')",
        "stain.lower() == 'h2b'",
        "quality_image + 1 > 2",
        "stain[0] == 'H'",
        "(lambda: 1)() == 1",
        "3",
        "'H2B'",
        "stain == b'H2B'",
        "stain in 'H2B'",
        "stain in ('H2B', None)",
        "quality_image < None",
        "None == None",
        "3 == None",
        "stain is 'H2B'",
        "quality_image == 1 if True else 2",
        "[x for x in (1,)]",
        "quality_image == 99999999999999999999",
        "stain; quality_image",
        "stain == 'x'; DROP TABLE t; --",
        "not " * 5000 + "True",
        "\0",
    ],
)
def test_what_is_outside_the_grammar_is_refused(expression: str) -> None:
    with pytest.raises(ValueError, match="where="):
        Filter(expression, COLUMNS)


def test_text_is_not_compared_with_numbers() -> None:
    with pytest.raises(ValueError, match="stain is text and 3 is a number"):
        Filter("stain == 3", COLUMNS)
    with pytest.raises(ValueError, match="'2' is text and quality_image is a number"):
        Filter("quality_image >= '2'", COLUMNS)
    with pytest.raises(ValueError, match="holds text"):
        Filter("stain and quality_image > 1", COLUMNS)
    with pytest.raises(TypeError, match="give a filter expression as a string"):
        Filter(3, COLUMNS)  # type: ignore[arg-type]
