"""The page of a report: whole in itself, harmless, right in its numbers; made from trainings and predictions."""

import base64
import io
import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from test_looked_at import scene

from seg3d_monai.metrics import InstanceMetrics
from seg3d_monai.report.build import build, write_report
from seg3d_monai.report.charts import losses
from seg3d_monai.report.looked_at import LookedAt
from seg3d_monai.report.page import Page, shown
from seg3d_monai.report.sources import Source

VOID = {"meta", "img", "br"}


class Checked(HTMLParser):
    """Sees that elements are closed in order, and gathers what a test asks about."""

    def __init__(self):
        super().__init__()
        self.open, self.tags, self.sources, self.words = [], [], [], []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.sources += [value for name, value in attributes if name in ("src", "href", "xlink:href")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.sources += [value for name, value in attributes if name in ("src", "href", "xlink:href")]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("style", "pre"):
            self.words.append(data)


def checked(text):
    parser = Checked()
    parser.feed(text)
    assert parser.open == []
    return parser


def source(volumes, **options):
    pooled = InstanceMetrics()
    for looked in volumes:
        pooled.update(looked.truth, looked.labels)
    train = pd.DataFrame(
        {"epoch": 1, "iteration": range(10, 60, 10), "elapsed_seconds": np.arange(5) * 60.0, "lr": 0.1, "loss": 2.0}
    )
    validation = pd.DataFrame(
        {"elapsed_seconds": [60, 240], "f1_50": [0.2, 0.4], "f1_70": [0.1, 0.2], "seg": [0.2, 0.3]}
    )
    values = {
        "title": "Training <b>bold</b>",
        "lead": "one volume",
        "volumes": volumes,
        "metrics": pooled.compute(),
        "train": train,
        "validation": validation,
        "facts": {"steps": 1234, "peak memory, GB": None},
        "seams": (40, 3),
        "texts": {"config.json": '{"a": "<script>alert(1)</script>"}'},
    }
    return Source(**(values | options))


def test_a_page_needs_nothing_else_and_runs_nothing():
    text = build(source([scene()]))
    parser = checked(text)
    assert "script" not in parser.tags
    assert "<script>alert" not in text
    assert "Training &lt;b&gt;bold" in text
    assert all(each.startswith(("data:image/png;base64,", "#")) for each in parser.sources)
    outside = set(re.findall(r"https?://[^\"'<> ]+", text))
    assert outside <= {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}  # names of languages
    for data in re.findall(r"data:image/png;base64,([^\"]+)", text):
        assert Image.open(io.BytesIO(base64.b64decode(data))).size[0] > 100
    for drawing in re.findall(r"<svg.*?</svg>", text, re.DOTALL):
        ElementTree.fromstring(drawing)


def test_a_page_says_what_there_is():
    words = " ".join(checked(build(source([scene()]))).words)
    for section in ("Summary", "Pictures", "Training", "Quality", "Objects", "Faults", "Seams", "Time and memory"):
        assert section in words
    assert "v at (2, 12, 4), 192 voxels, IoU 0.00" in words  # missed
    assert "score 0.90" in words  # false positive
    assert "1,234" in words
    assert "0.075" in words  # 3 of 40


def test_the_same_source_gives_the_same_page():
    assert build(source([scene()])) == build(source([scene()]))


def test_losses_are_drawn_without_what_stands_beside_them():
    table = pd.DataFrame({"elapsed_seconds": [60.0, 120.0], "loss": [2.0, 1.0]})
    beside = {"epoch": 1, "iteration": [10, 20], "memory_gb": [3.0, 4.0], "cuda_memory_gb": 1.0, "lr": 0.1}
    assert losses(table.assign(**beside)) == losses(table)


def test_no_truth_no_objects_and_no_training():
    looked = scene()
    bare = LookedAt(name="v", image=looked.image, labels=0 * looked.labels, table=looked.table.iloc[:0])
    page = build(Source(title="t", lead="l", volumes=[bare], notes=["Only a part."], seam_note="Not looked at."))
    words = " ".join(checked(page).words)
    assert "Only a part." in words
    assert "Without annotated truth" in words
    assert "Not looked at." in words
    for section in ("Training", "Quality", "Faults"):
        assert section not in words


def test_a_seam_check_is_told_with_its_interval():
    check = {
        "at_faces": {"num_cells": 40, "num_disagreeing": 3, "rate": 0.075, "rate_interval": [0.02, 0.2]},
        "away": {"num_cells": 21, "num_disagreeing": 0, "rate": 0.0, "rate_interval": [0.0, 0.155]},
        "excess": 0.075,
        "excess_interval": [-0.09, 0.2],
    }
    words = " ".join(checked(build(source([scene()], seams=None, seam_check=check))).words)
    assert "next to a block's face 40 3 0.075 0.020 to 0.200" in words
    assert "elsewhere 21 0 0.000 0.000 to 0.155" in words
    assert "95 % interval -0.090 to 0.200" in words


def test_a_pretraining_has_curves_and_no_objects():
    curves = pd.DataFrame({"elapsed_seconds": [60, 240], "explained": [0.25, 0.375]})
    words = " ".join(checked(build(source([], metrics=None, validation=curves, seams=None))).words)
    assert "0.375 share of the hidden that is known" in words
    assert "Training" in words
    for section in ("Pictures", "Quality", "Objects", "Faults", "Seams"):
        assert section not in words


def test_how_it_was_made_is_told():
    words = " ".join(checked(build(source([scene()], made={"bundle": "maskrcnn3d, 0.1.0"}))).words)
    assert "bundle maskrcnn3d, 0.1.0" in words


def test_no_kind_of_fault_crowds_out_another():
    labels = np.zeros((4, 60, 60), np.uint32)
    truth = np.zeros((4, 60, 60), np.uint16)
    for number in range(49):  # missed, each a little larger than the one before
        y, x = 8 * (number // 7), 8 * (number % 7)
        truth[: 1 + number // 25, y : y + 4, x : x + 4] = number + 1
    labels[0, 56:59, 56:59] = 7
    table = pd.DataFrame({"id": [7], "score": [0.5]})
    looked = LookedAt(name="v", image=truth, labels=labels, table=table, truth=truth, origin=(5, 100, 0))
    words = " ".join(checked(build(source([looked]))).words)
    assert "false positive v 5, 157, 57 9 0.000 0.500" in words
    assert "10 more are not listed." in words
    assert words.count("missed v") == 39


def test_many_volumes_and_many_faults_stay_readable():
    text = build(source([scene() for _ in range(30)]))
    parser = checked(text)
    assert parser.tags.count("img") <= 2 * 4 + 8 * 6
    assert "are not listed" in " ".join(parser.words)


def test_an_old_page_is_replaced_when_the_new_one_is_whole(tmp_path, monkeypatch):
    file = write_report(source([scene()]), tmp_path / "report.html")
    before = file.read_bytes()

    def broken(_):
        raise RuntimeError("no page")

    monkeypatch.setattr("seg3d_monai.report.build.build", broken)
    with pytest.raises(RuntimeError, match="no page"):
        write_report(source([scene()]), file)
    assert file.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]


def test_numbers_as_people_read_them():
    values = [None, True, 12345, 0.12345, 12.345, 12345.6, "x"]
    assert [shown(value) for value in values] == ["unknown", "yes", "12,345", "0.123", "12.3", "12,346", "x"]
    page = Page("t", "l")
    page.section("s")
    page.table(["a", "b"], [[1, "<b>"], [None, None]])
    assert '<tr><th class="n">a</th><th>b</th></tr>' in page.text()
    assert '<td class="n">1</td>' in page.text()
    assert '<td class="n">–</td><td>unknown</td>' in page.text()
    assert "<td>&lt;b&gt;</td>" in page.text()
