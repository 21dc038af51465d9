"""What nobody can see: contrast against what images show, ignored objects, scenes drawn again."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from seg3d_monai.data.synthesis import Recipe, Scene, SyntheticCropDataset, SyntheticStack, preset
from seg3d_monai.data.synthesis.contrast import average_contrast, contrast_to_noise, visible_scene
from seg3d_monai.data.synthesis.scene import Background, Camera, Objects, Optics, Stain, Voxels
from seg3d_monai.data.synthesis.stack import IGNORED
from seg3d_monai.data.synthetic import annotate_partly
from seg3d_monai.data.synthetic_makers import Scenes

CLEAR = Optics(attenuation_um=1e6, haze=0, sheet_end=0, vignetting=0, stripes=0, psf_um=0.3)
EVEN = Stain(hollow=0, texture=0, brightness_spread=0, seam=1)
DEEP = Scene(
    seed=(4,),
    objects=Objects(fill=0.3, diameter_um=9.0),
    optics=Optics(attenuation_um=25.0),
    camera=Camera(photons=60, least_contrast=1.0),
)


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"optics": replace(CLEAR, psf_um=1.2)},
        {"stain": replace(EVEN, hollow=0.6)},
        {"stain": replace(EVEN, hollow=-0.6)},
        {"stain": replace(EVEN, nucleus=0.5), "background": Background(glow=1.5, glow_spread=0)},
        {"optics": replace(CLEAR, attenuation_um=20.0), "depth_um": 25.0},
        {"camera": Camera(photons=40, gain=0.5, read_noise=6.0)},
        {"camera": Camera(photons=40, gain=1.0, read_noise=0.0, bits=6, white_level=20)},
    ],
    ids=["plain", "blurred", "hollow", "dark rim", "glow", "deep", "read noise", "few bits"],
)
def test_contrast_is_that_of_the_image(change: dict[str, Any]) -> None:
    scene = Scene(
        seed=(1,),
        **{
            "voxels": Voxels(plane_um=0.8, anisotropy=1.5),
            "objects": Objects(
                fill=0.009, diameter_um=12, spread=0, attach=0, axis_ratio=1, deformation=0, closeness=2.0
            ),
            "optics": CLEAR,
            "stain": EVEN,
            "background": Background(glow=0.0),
            "camera": Camera(photons=20, read_noise=0.0, bits=16),
            **change,
        },
    )
    stack = next(
        made
        for seed in range(200)
        if (made := SyntheticStack(replace(scene, seed=(seed,)), (26, 44, 48))).cells.num_objects == 1
        and (abs(made.cells.centres()[0] - made.extent_um / 2) < made.extent_um / 2 - 8).all()
    )
    image, labels = stack.whole()
    inside, beside = image[0][labels == 1].astype(float), image[0][labels == 0].astype(float)
    # The noise of light that signal and background send together, twice: as differences of neighbours along x.
    mask = (labels == 1)[:, :, 1:] & (labels == 1)[:, :, :-1]
    noise = float(np.diff(image[0].astype(float), axis=2)[mask].std()) / 2**0.5
    expected = contrast_to_noise(
        stack.scene,
        centres_um=stack.cells.centres(),
        radii_um=np.array([6.0]),
        brightness=np.ones(1),
        extent_um=stack.extent_um,
    )
    assert expected.shape == (1,)
    assert expected[0] == pytest.approx((inside.mean() - np.median(beside)) / noise, rel=0.2)


def test_noise_that_is_correlated_hides_more() -> None:
    white = Scene(seed=(1,), camera=Camera(photons=200))
    correlated = replace(white, camera=replace(white.camera, grain=1.5, grain_axial=1.0))
    hidden = (4 * np.pi) ** 0.75 * 1.5  # a filter of s lets slow noise through (4 pi s^2)^(1/4) times as strong
    assert average_contrast(correlated) == pytest.approx(average_contrast(white) / hidden, rel=0.05)


@pytest.mark.parametrize(("ratio", "psf_um"), [(3.0, 0.7), (3.0, 1.4), (1.5, 2.5), (6.0, 0.8)])
def test_labels_end_where_a_quarter_of_the_light_is_left(ratio: float, psf_um: float) -> None:
    scene = Scene(
        seed=(11,),
        voxels=Voxels(plane_um=0.5, anisotropy=1.0),
        objects=Objects(
            fill=0.009, diameter_um=12, spread=0, attach=0, axis_ratio=1, deformation=0, closeness=2.0, outline=3.0
        ),
        optics=replace(CLEAR, psf_um=psf_um, psf_ratio=ratio, scatter=1.0),
        stain=EVEN,
        background=Background(glow=0.0),
        camera=Camera(photons=1e4, read_noise=0.0, offset=0.0, gain=1.0),
    )
    stack = next(
        made
        for seed in range(400)
        if (made := SyntheticStack(replace(scene, seed=(seed,)), (80, 60, 64))).cells.num_objects == 1
        and (abs(made.cells.centres()[0] - made.extent_um / 2) < made.extent_um / 2 - (16, 10, 10)).all()
    )
    image, labels = stack.whole()
    z, y, x = (stack.cells.centres()[0] / 0.5).astype(int)
    for profile, inside in ((image[0][:, y, x], labels[:, y, x]), (image[0][z, :, x], labels[z, :, x])):
        ends = np.flatnonzero(inside)[[0, -1]]
        share = np.mean([profile[ends[0] - 1 : ends[0] + 1], profile[ends[1] : ends[1] + 2]]) / profile.max()
        assert 0.15 < share < 0.35
    extents = [np.ptp(np.flatnonzero((labels == 1).any(axis=tuple({0, 1, 2} - {axis})))) + 1 for axis in range(3)]
    spread = psf_um * np.array([ratio, 1, 1])
    np.testing.assert_allclose(extents, 2 * np.sqrt(36 + 3 * spread**2) / 0.5, atol=1.5)
    plain = SyntheticStack(replace(stack.scene, objects=replace(scene.objects, outline=0.0)), (80, 60, 64)).whole()
    assert np.array_equal(plain[0], image)
    assert (labels[plain[1] > 0] == 1).all()
    assert (labels == 1).sum() == pytest.approx(4 / 3 * np.pi * np.prod(np.sqrt(36 + 3 * spread**2)) / 0.125, rel=0.03)


def test_a_margin_is_as_many_voxels_on_every_side() -> None:
    objects = Objects(fill=0.02, diameter_um=9, spread=0, attach=0, axis_ratio=1, deformation=0, closeness=2.0)
    shape, spacing = (30, 60, 70), np.array([1.5, 0.6, 0.6])
    voxels = Voxels(plane_um=0.6, anisotropy=2.5)
    plain, larger = (
        SyntheticStack(Scene(seed=(3,), voxels=voxels, objects=replace(objects, margin=margin)), shape)
        for margin in (0.0, 1.5)
    )
    (image, before), (again, after) = plain.whole(), larger.whole()
    assert np.array_equal(image, again)
    for number in range(1, int(before.max()) + 1):
        places = np.argwhere(before == number)
        if (places.min(0) < 3).any() or (places.max(0) >= np.array(shape) - 3).any():
            continue
        own = after[tuple(places[len(places) // 2])]
        assert (after[before == number] == own).all()
        extents = np.ptp(np.argwhere(after == own), axis=0) + 1
        np.testing.assert_allclose(extents, 9 / spacing + 3, atol=1.2)
        radii = 4.5 / spacing + 1.5
        assert (after == own).sum() == pytest.approx(4 / 3 * np.pi * radii.prod(), rel=0.05)
        break
    else:
        pytest.fail("no object lies inside")


def test_what_cannot_be_seen_is_ignored_and_ids_stay_compact() -> None:
    stack = SyntheticStack(DEEP, (40, 60, 50))
    image, labels = stack.whole()
    everything = SyntheticStack(replace(DEEP, camera=replace(DEEP.camera, least_contrast=0)), (40, 60, 50))
    assert np.array_equal(image, everything.whole()[0])
    assert np.array_equal(labels > 0, (everything.whole()[1] > 0) | (labels == IGNORED))
    seen = np.unique(labels[(labels > 0) & (labels != IGNORED)])
    assert seen.tolist() == list(range(1, len(seen) + 1))
    depths = np.arange(40)[:, None, None] + np.zeros(labels.shape)
    assert 0.1 < (labels == IGNORED).sum() / (labels > 0).sum() < 0.9
    assert depths[labels == IGNORED].mean() > depths[(labels > 0) & (labels != IGNORED)].mean() + 10
    lazy = stack.volumes()[1]
    assert lazy.num_ids == len(seen)
    assert np.array_equal(lazy.read((0, 0, 0, 40, 60, 50))[0], labels)


def test_nothing_and_everything_ignored() -> None:
    none = SyntheticStack(replace(DEEP, objects=Objects(fill=0.0)), (20, 40, 44))
    assert none.whole()[1].max() == none.volumes()[1].num_ids == 0
    dark = SyntheticStack(replace(DEEP, camera=Camera(photons=0.001, least_contrast=1.0)), (20, 40, 44))
    labels = dark.whole()[1]
    assert set(np.unique(labels).tolist()) == {0, int(IGNORED)}
    assert dark.volumes()[1].num_ids == 0


def test_crops_and_volumes_of_recipes_ignore_it() -> None:
    recipe = Recipe(
        {
            "objects": {"fill": 0.2, "diameter_um": 9.0},
            "optics": {"attenuation_um": 20.0},
            "camera": {"photons": [20, 60], "least_contrast": 1.0},
        }
    )
    crop = SyntheticCropDataset(recipe, num_samples=2, crop_size=(32, 40, 44), min_voxels=0, min_visible=0)[1]
    label, ids = crop["targets"]["label"], crop["targets"]["ids"]
    assert (label == -1).any()
    assert ids.tolist() == list(range(1, int(label.max()) + 1)) != []
    _image, labels, classes = Scenes(recipe, None, 1).volume((32, 40, 44), (5,), 0.0)
    assert len(classes) == labels[labels != IGNORED].max() > 0
    assert (labels == IGNORED).any()
    partly, kept = annotate_partly(labels, 0.5, np.random.default_rng(0))
    assert (partly[labels == IGNORED] == IGNORED).all()
    assert 0 < kept.max() <= len(classes)
    lazy = Scenes(recipe, None, 1).stack((32, 40, 44), (5,), 0.0)
    assert np.array_equal(lazy[1].read((0, 0, 0, 32, 40, 44))[0], labels)
    assert len(lazy[2]) == len(classes)


def test_scenes_in_which_nothing_could_be_seen_are_drawn_again() -> None:
    wide = Recipe({"camera": {"photons": [0.01, 100], "least_contrast": 1.0}}, [0, 400])
    plain = Recipe({"camera": {"photons": [0.01, 100]}}, [0, 400])
    same = 0
    for seed in range(40):
        scene = visible_scene(wide, (7, seed))
        assert average_contrast(scene) >= 1
        assert scene == visible_scene(wide, (7, seed))
        first = plain.scene((7, seed))
        assert visible_scene(plain, (7, seed)) == first
        if average_contrast(first) >= 1:
            assert scene == wide.scene((7, seed))
            same += 1
        else:
            assert scene.seed[:2] == (7, seed)
            assert len(scene.seed) == 3
    assert 0 < same < 40
    dark = Recipe({"camera": {"photons": [0.01, 0.1], "least_contrast": 2.0}})
    with pytest.raises(ValueError, match=r"least_contrast is 2, and the best of 100 scenes had 0\.\d+; give it more"):
        visible_scene(dark, 3)
    with pytest.raises(ValueError, match="least_contrast is -1"):
        Recipe({"camera": {"least_contrast": -1}})


def test_presets_ask_for_contrast() -> None:
    for name in ("lightsheet_nuclei", "confocal_nuclei", "membrane", "randomised"):
        assert preset(name).ranges["camera"]["least_contrast"] == 1.0
        assert average_contrast(visible_scene(preset(name), 0)) >= 1.0
