"""Recipes and scenes: what is drawn stays in its range, what contradicts is refused by name."""

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from seg3d_monai.data.synthesis import PRESETS, Recipe, Scene, preset, read_recipe
from seg3d_monai.data.synthesis.scene import GROUPS, Objects, Stain, Voxels


@pytest.mark.parametrize("name", PRESETS)
def test_presets_draw_every_number_from_its_range(name: str) -> None:
    recipe = preset(name)
    scenes = [recipe.scene((3, n)) for n in range(200)]
    for group, ranges in recipe.ranges.items():
        for key, given in ranges.items():
            drawn = np.array([getattr(getattr(scene, group), key) for scene in scenes])
            low, high = given if isinstance(given, tuple) else (given, given)
            assert low <= drawn.min()
            assert drawn.max() <= high
            if low < high:
                assert len(set(drawn.tolist())) == 200
                assert drawn.min() < low + 0.1 * (high - low)
    depths = [scene.depth_um for scene in scenes]
    low, high = PRESETS[name]["depth_um"]
    assert low <= min(depths) < max(depths) <= high


def test_lengths_and_light_are_drawn_by_ratio_and_shares_evenly() -> None:
    recipe = Recipe({"camera": {"photons": [10, 1000]}, "objects": {"fill": [0.1, 0.5]}})
    scenes = [recipe.scene(n) for n in range(400)]
    assert np.mean([scene.camera.photons < 100 for scene in scenes]) == pytest.approx(0.5, abs=0.08)
    assert np.mean([scene.objects.fill < 0.3 for scene in scenes]) == pytest.approx(0.5, abs=0.08)


def test_the_same_seed_draws_the_same_scene_and_one_range_leaves_the_others() -> None:
    wide = Recipe({"objects": {"fill": [0.1, 0.5]}, "optics": {"haze": [0, 1]}}, [0, 50])
    narrow = Recipe({"objects": {"fill": 0.2}, "optics": {"haze": [0, 1]}}, [0, 50])
    assert wide.scene((1, 2)) == wide.scene((1, 2)) != wide.scene((1, 3))
    one, other = wide.scene(4), narrow.scene(4)
    assert (one.seed, one.optics, one.depth_um) == ((4,), other.optics, other.depth_um)
    assert other.objects == replace(one.objects, fill=0.2)


def test_numbers_that_came_later_leave_the_scenes_of_a_seed_as_they_were() -> None:
    plain = Recipe({"optics": {"psf_um": [0.3, 0.9]}, "camera": {"photons": [10, 90], "bits": [8, 16]}})
    both = Recipe(
        {
            "optics": {"psf_um": [0.3, 0.9], "wings": [0.1, 0.8], "wings_ratio": [1, 4]},
            "camera": {"photons": [10, 90], "bits": [8, 16], "grain": [0, 1]},
        }
    )
    one, other = plain.scene(5), both.scene(5)
    assert other.optics.wings != one.optics.wings == 0
    assert replace(other.optics, wings=0.0, wings_ratio=2.0) == one.optics
    assert replace(other.camera, grain=0.0) == one.camera
    # Drawn from the streams that the scenes of a seed always had.
    share = np.random.default_rng((5, 7)).random(1 + 2 + 13 + 11 + 9 + 1)[-1]
    assert one.optics.psf_um == pytest.approx(0.3 * 3**share)


def test_a_recipe_comes_back_from_its_file(tmp_path: Any) -> None:
    file = tmp_path / "own.json"
    for name in PRESETS:
        file.write_text(json.dumps(preset(name).described()), encoding="utf-8")
        assert read_recipe(file).scene(5) == preset(name).scene(5)
    assert Recipe({}).described() == {}
    assert Recipe({}).scene(0) == Scene()


@pytest.mark.parametrize(
    ("ranges", "message"),
    [
        ({"colour": {}}, r"no colour; its groups are voxels, objects"),
        ({"objects": {"size": 3}}, r"objects has no size; choose among diameter_um"),
        ({"objects": {"fill": [0.5, 0.1]}}, r"objects.fill is \[0.5, 0.1\], which is upside down"),
        ({"objects": {"fill": [0.1, 0.2, 0.3]}}, "give a number, or"),
        ({"objects": {"fill": "much"}}, "objects.fill is 'much'"),
        ({"objects": {"fill": True}}, "objects.fill is True"),
        ({"objects": {"fill": -0.1}}, r"objects.fill is -0.1; it must be at least 0 and at most 1.2"),
        ({"objects": {"closeness": [0.3, 1]}}, r"closeness is 0.3; it must be at least 0.5"),
        ({"camera": {"photons": [0, 10]}}, "camera.photons is 0; it must be above 0"),
        ({"optics": {"haze": float("nan")}}, "optics.haze is nan"),
        ({"objects": {"diameter_um": [1, 9]}, "voxels": {"plane_um": [0.2, 1]}}, "less than two voxels across"),
        ({"objects": {"ellipsoid": [0, 1]}}, "may all be 0"),
        ({"stain": {"nucleus": 0}}, "nucleus and membrane may both be 0"),
    ],
)
def test_what_makes_no_sense_is_refused(ranges: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Recipe(ranges)


def test_scenes_refuse_it_too() -> None:
    with pytest.raises(ValueError, match="are all 0"):
        Scene(objects=Objects(ellipsoid=0))
    with pytest.raises(ValueError, match="nothing would be seen"):
        Scene(stain=Stain(nucleus=0))
    with pytest.raises(ValueError, match="less than two voxels"):
        Scene(voxels=Voxels(plane_um=9))
    with pytest.raises(ValueError, match="depth_um is -1"):
        Recipe({}, -1.0)
    for group in GROUPS.values():
        group()  # defaults are within their limits


def test_recipes_that_cannot_be_read(tmp_path: Any) -> None:
    with pytest.raises(ValueError, match="preset 'nuclei' does not exist; choose one of lightsheet_nuclei"):
        read_recipe("nuclei")
    with pytest.raises(FileNotFoundError):
        read_recipe(tmp_path / "none.json")
    for text, message in (("{", "is not JSON"), ("[1]", "is no recipe"), ('{"objects": 3}', "is no recipe")):
        (tmp_path / "own.json").write_text(text, encoding="utf-8")
        with pytest.raises(ValueError, match=message):
            read_recipe(tmp_path / "own.json")
