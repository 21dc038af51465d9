"""Specimens of a recipe: a scene for each volume, streamed or whole, refused where they cannot be."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from seg3d_monai.data import open_volume, read_manifest
from seg3d_monai.data.synthesis import SyntheticStack, preset
from seg3d_monai.data.synthetic import write_specimen

SMALL: dict[str, Any] = {
    "recipe": "confocal_nuclei",
    "train_volumes": 2,
    "train_shape": (30, 40, 36),
    "test_shape": (34, 44, 50),
    "spacing_um": (2.0, 0.7, 0.7),
}


def test_each_volume_is_a_scene_of_its_own(tmp_path: Path) -> None:
    manifest = write_specimen(tmp_path / "a", seed=4, **SMALL)
    rows = {row.name: row for row in read_manifest(manifest).rows}
    assert list(rows) == ["train_0", "train_1", "val_0", "test_0"]
    offsets = []
    for number, name in enumerate(rows, start=1):
        image = open_volume(str(rows[name].image))
        assert image.spacing_um == pytest.approx((2.0, 0.7, 0.7))
        offsets.append(float(np.median(image.read((0, 0, 0, *image.shape[1:])))))
        assert preset("confocal_nuclei").scene((4, number)).seed == (4, number)
    assert len(set(offsets)) == 4
    again = write_specimen(tmp_path / "b", seed=4, **SMALL)
    for file in sorted(path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*") if path.is_file()):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes(), file
    assert write_specimen(tmp_path / "a", seed=4, **SMALL) == manifest
    assert again != manifest
    with pytest.raises(ValueError, match="different: recipe"):
        write_specimen(tmp_path / "a", seed=4, **(SMALL | {"recipe": "membrane"}))


def test_a_recipe_draws_voxel_sizes_where_none_is_given(tmp_path: Path) -> None:
    options = {**SMALL, "spacing_um": None, "recipe": "lightsheet_nuclei", "train_shape": (40, 60, 60)}
    manifest = write_specimen(tmp_path / "a", test_volumes=0, **options)
    found = [open_volume(str(row.image)).spacing_um for row in read_manifest(manifest).rows]
    assert found == [pytest.approx(preset("lightsheet_nuclei").scene((0, n)).voxels.spacing_um) for n in (1, 2, 3)]
    assert len(set(found)) == 3


def test_a_streamed_stack_holds_the_scenes_voxels(tmp_path: Path) -> None:
    recipe = tmp_path / "own.json"
    recipe.write_text(json.dumps({"objects": {"diameter_um": [9, 12], "fill": 0.2, "lobed": 0.5}}), encoding="utf-8")
    options = {**SMALL, "recipe": recipe, "train_volumes": 0, "val_volumes": 0, "stream": True}
    rows = read_manifest(write_specimen(tmp_path / "a", seed=1, **options)).rows
    (row,) = rows
    image, labels = open_volume(str(row.image)), open_volume(str(row.label))
    from dataclasses import replace

    from seg3d_monai.data.synthesis import read_recipe
    from seg3d_monai.data.synthesis.scene import Voxels

    scene = replace(read_recipe(recipe).scene((1, 1)), voxels=Voxels(plane_um=0.7, anisotropy=2.0 / 0.7))
    wanted_image, wanted_labels = SyntheticStack(scene, (34, 44, 50)).whole()
    whole = (0, 0, 0, 34, 44, 50)
    assert np.array_equal(image.read(whole), wanted_image)
    assert np.array_equal(labels.read(whole)[0], wanted_labels)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"recipe": "none"}, "preset 'none' does not exist"),
        ({"num_classes": 2}, "num_classes is 2; the objects of a recipe are of one class"),
        ({"spacing_um": (2.0, 0.7, 0.8)}, "as long along y as along x"),
        ({"train_shape": (2, 40, 36)}, "too small for objects.diameter_um"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_written(
    tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        write_specimen(tmp_path / "a", **(SMALL | options))
    assert not (tmp_path / "a" / "manifest.csv").exists()


def test_a_density_given_as_a_number_must_be_reached(tmp_path: Path) -> None:
    dense = tmp_path / "dense.json"
    dense.write_text(json.dumps({"objects": {"fill": 1.1, "closeness": 1.0}}), encoding="utf-8")
    with pytest.raises(ValueError, match=r"objects.fill is 1.1, \d+ objects; \d+ found a place"):
        write_specimen(tmp_path / "a", **(SMALL | {"recipe": dense}))
    dense.write_text(json.dumps({"objects": {"fill": [1.0, 1.2], "closeness": 1.0}}), encoding="utf-8")
    assert write_specimen(tmp_path / "b", **(SMALL | {"recipe": dense})).is_file()
