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


def test_no_truth_no_objects_and_no_training():
    looked = scene()
    bare = LookedAt(name="v", image=looked.image, labels=0 * looked.labels, table=looked.table.iloc[:0])
    page = build(Source(title="t", lead="l", volumes=[bare], notes=["Only a part."]))
    words = " ".join(checked(page).words)
    assert "Only a part." in words
    assert "Without annotated truth" in words
    for section in ("Training", "Quality", "Faults", "Seams"):
        assert section not in words


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
    page.table(["a"], [[1], ["<b>"]])
    assert '<td class="n">1</td>' in page.text()
    assert "<td>&lt;b&gt;</td>" in page.text()
