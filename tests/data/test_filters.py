"""Filter expressions: what SQL they become, what they select, and what is refused."""

import sqlite3

import pytest

from seg3d_monai.data.filters import Column, compile_filter

COLUMNS = {
    "quality_image": Column("t.q", "number"),
    "stain": Column("t.s", "text"),
    "note": Column("t.n", "any"),
    "depth": Column("(SELECT value FROM a WHERE a.row = t.id AND a.name = ?)", "number", ("depth",)),
}
ROWS = [(1, 1.0, "H2B", 3), (2, 2.0, "DAPI", "x"), (3, 3.0, "H2B", None), (4, None, None, 0)]


def select(expression: str) -> list[int]:
    connection = sqlite3.connect(":memory:")
    connection.execute("CREATE TABLE t (id, q, s, n)")
    connection.executemany("INSERT INTO t VALUES (?, ?, ?, ?)", ROWS)
    connection.execute("CREATE TABLE a (row, name, value)")
    connection.executemany("INSERT INTO a VALUES (?, 'depth', ?)", [(1, 10), (2, 20), (3, 30)])
    sql, parameters = compile_filter(expression, COLUMNS)
    return [row[0] for row in connection.execute(f"SELECT id FROM t WHERE {sql} ORDER BY id", parameters)]


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
        ("depth == 20 or depth == 30 and quality_image < 3", [2]),
        ("depth > 10 and depth in (30,)", [3]),
        ("note", [1, 2]),
        ("True", [1, 2, 3, 4]),
        ("  quality_image == 1 ", [1]),
        ("stain in ()", []),
    ],
)
def test_a_filter_selects_what_it_says(expression: str, expected: list[int]) -> None:
    assert select(expression) == expected


def test_constants_are_bound_and_never_in_the_sql() -> None:
    evil = "x'; DROP TABLE t; --"
    sql, parameters = compile_filter(f'stain == "{evil}" and depth > 1', COLUMNS)
    assert "DROP" not in sql
    assert parameters == (evil, "depth", 1)
    assert select(f'stain == "{evil}"') == []


def test_an_unknown_column_names_the_nearest_and_all() -> None:
    with pytest.raises(ValueError, match="no column 'qualty_image', the nearest is 'quality_image'") as caught:
        compile_filter("qualty_image > 1", COLUMNS)
    assert "depth, note, quality_image, stain" in str(caught.value)


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
        "stain is 'H2B'",
        "quality_image == 1 if True else 2",
        "[x for x in (1,)]",
        "quality_image == 99999999999999999999",
        "stain; quality_image",
    ],
)
def test_what_is_outside_the_grammar_is_refused(expression: str) -> None:
    with pytest.raises(ValueError, match="where="):
        compile_filter(expression, COLUMNS)


def test_text_is_not_compared_with_numbers() -> None:
    with pytest.raises(ValueError, match="stain is text and 3 is a number"):
        compile_filter("stain == 3", COLUMNS)
    with pytest.raises(ValueError, match="'2' is text and quality_image is a number"):
        compile_filter("quality_image >= '2'", COLUMNS)
    with pytest.raises(ValueError, match="holds text"):
        compile_filter("stain and quality_image > 1", COLUMNS)
    with pytest.raises(TypeError, match="give a filter expression as a string"):
        compile_filter(3, COLUMNS)  # type: ignore[arg-type]
