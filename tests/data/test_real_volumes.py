"""Discovery, index and normalisation on BBBC050, where it lies beside the project; its facts are counted elsewhere."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tifffile

from seg3d_monai.data import DataConfig, build_index, read_manifest, split_by_specimen

FOLDER = Path(__file__).parents[3] / "shared" / "data" / "bbbc050"
pytestmark = pytest.mark.skipif(not FOLDER.is_dir(), reason="../shared/data/bbbc050 is not beside the project")


def test_a_folder_of_pairs_is_discovered_and_split_by_embryo() -> None:
    rows = read_manifest(FOLDER, specimen_pattern=r"^(Emb\d+)_").rows
    assert len(rows) == 121
    assert {row.spacing_um for row in rows} == {(1.75, 0.8, 0.8)}
    split = split_by_specimen(rows, val_specimens=["Emb10", "Emb11"])
    assert {row.specimen for row in split if row.split == "val"} == {"Emb10", "Emb11"}
    assert sum(row.split == "train" for row in split) == 99


def test_the_index_counts_what_the_files_hold(tmp_path: Path) -> None:
    names = ("Emb03_t051", "Emb10_t001", "Emb10_t501")
    manifest = read_manifest(FOLDER, specimen_pattern=r"^(Emb\d+)_")
    manifest = replace(manifest, rows=tuple(row for row in manifest.rows if row.name in names))
    index = build_index(manifest, tmp_path / "crops.sqlite", DataConfig(crop_size=(32, 64, 96)), progress=False)
    for record in index.volumes():
        label = tifffile.imread(FOLDER / record.name / "labels.tif")
        image = tifffile.imread(FOLDER / record.name / "image.tif")
        ids, voxels = np.unique(label[label > 0], return_counts=True)
        table = index.instances(record.id)
        assert table.labels.tolist() == ids.tolist()
        assert table.voxels.tolist() == voxels.tolist()
        np.testing.assert_allclose(record.intensity.low, np.percentile(image, 1.0))
        np.testing.assert_allclose(record.intensity.high, np.percentile(image, 99.8))
    assert index.volumes(where='name == "Emb03_t051"')[0].num_instances == 1
