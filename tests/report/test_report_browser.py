"""A report as a browser shows it, on a screen and on a phone, light and dark."""

from functools import cache

import pandas as pd
import pytest
from browsers import find_browser, look
from test_looked_at import scene
from test_report_page import source

from seg3d_monai.report.build import build
from seg3d_monai.report.sources import Source

BROWSER = find_browser()
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no browser is installed: chromium, google-chrome or firefox")
DRAWINGS = {"everything": 7, "seam check": 5, "no truth": 2, "pre-training": 2}
"""Charts of each page."""
SEAMS = {
    "at_faces": {"num_cells": 40, "num_disagreeing": 3, "rate": 0.075, "rate_interval": [0.02, 0.2]},
    "away": {"num_cells": 0, "num_disagreeing": 0, "rate": None, "rate_interval": None},
    "excess": None,
    "excess_interval": None,
}


@cache
def pages() -> dict[str, str]:
    looked = scene(origin=(10, 200, 3000))
    told = {"bundle": "maskrcnn3d, 0.1.0", "weights, SHA-256": "0123456789abcdef" * 4, "data": "a/" * 80}
    curves = pd.DataFrame({"elapsed_seconds": [60.0, 120.0], "explained": [0.2, 0.4]})
    return {
        "everything": build(source([looked], made=told, texts={"config.json": "x" * 400})),
        "seam check": build(source([looked], seams=None, seam_check=SEAMS, train=None, validation=None)),
        "no truth": build(Source(title="t", lead="l", volumes=[looked], seam_note="Not looked at.")),
        "pre-training": build(source([], metrics=None, validation=curves, seams=None)),
    }


@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("name", DRAWINGS)
def test_a_report_in_a_browser(name: str, width: int) -> None:
    assert BROWSER is not None
    seen, paths, console = look(BROWSER, pages()[name], width)
    assert console == []
    assert seen["requests"] == []
    assert {path for path in paths if path != "/favicon.ico"} == {"/", "/page"}
    assert seen["inner"] == width
    assert seen["scroll"] <= width, seen["wide"]
    assert seen["wide"] == []
    assert seen["cut"] == []
    assert all(picture["own"] > 100 and min(picture["box"]) > 50 for picture in seen["images"])
    assert all(picture["alt"] for picture in seen["images"])
    assert all(min(drawing) > 100 for drawing in seen["drawings"])
    assert seen["links"]
    assert all(seen["links"])
    assert len(seen["drawings"]) == DRAWINGS[name]


def test_a_dark_reader_gets_a_dark_page() -> None:
    assert BROWSER is not None
    page = pages()["pre-training"]
    light, dark = (look(BROWSER, page, 900, is_dark)[0] for is_dark in (False, True))

    def brightness(colour: str) -> float:
        return sum(float(part) for part in colour.removeprefix("rgb(").removesuffix(")").split(",")) / 765

    assert brightness(light["paper"]) > 0.9
    assert brightness(light["ink"]) < 0.3
    assert brightness(dark["paper"]) < 0.2
    assert brightness(dark["ink"]) > 0.7


def test_the_looker_sees_what_must_not_be() -> None:
    """A page that asks for things, complains and is too wide, so that the tests above can fail."""
    assert BROWSER is not None
    page = (
        "<!DOCTYPE html><title>bad</title><img src='/elsewhere.png'><div style='width:3000px'>x</div>"
        "<svg width='20' height='20'><text x='0' y='10'>much too long</text></svg><nav><a href='#none'>a</a></nav>"
        "<script>console.error('a complaint')</script>"
    )
    seen, paths, console = look(BROWSER, page, 390)
    assert "/elsewhere.png" in paths
    assert any(name.endswith("/elsewhere.png") for name in seen["requests"])
    assert any("a complaint" in line for line in console)
    assert seen["scroll"] > 390
    assert seen["wide"] == ["DIV."]
    assert seen["cut"] == ["much too long"]
    assert seen["images"][0]["own"] == 0
    assert seen["links"] == [False]
