"""dataset_or_sample: the user's folder as it is, else a synthetic sample that is made once."""

from pathlib import Path

import pytest

from seg3d_monai.data import dataset_or_sample, read_manifest
from seg3d_monai.data import sample as sample_module


def test_a_given_folder_is_taken_and_nothing_is_written(tmp_path: Path) -> None:
    assert dataset_or_sample(tmp_path / "mine", sample_dir=tmp_path / "sample") == tmp_path / "mine"
    assert not (tmp_path / "sample").exists()


def test_the_sample_is_made_once_and_has_an_unseen_test_stack(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = sample_module.write_specimen

    def small(out: Path, **options: object) -> Path:
        return whole(out, **(options | {"train_shape": (16, 48, 40), "test_shape": (16, 40, 48)}))  # type: ignore[arg-type]

    monkeypatch.setattr(sample_module, "write_specimen", small)
    manifest = dataset_or_sample("", sample_dir=tmp_path / "sample")
    rows = read_manifest(manifest).rows
    assert {row.split for row in rows} == {"train", "val", "test"}
    assert len({row.specimen for row in rows}) >= 3
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "sample").rglob("*")}
    assert dataset_or_sample("", sample_dir=tmp_path / "sample") == manifest
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "sample").rglob("*")} == before
