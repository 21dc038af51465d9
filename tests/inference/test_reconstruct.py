"""Pictures of what a pre-trained network knows: crops that cover a region, the three channels, refusals."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from seg3d_monai.data import ArrayVolume, open_volume
from seg3d_monai.data.tiff_write import write_ome_tiff
from seg3d_monai.inference.reconstruct import Reconstructor, crop_starts, reconstruct_volume
from seg3d_monai.losses import MaskedReconstruction

PATCH = (2, 3, 4)


class Guess(nn.Module):
    """Hides the first patch of each crop, and guesses one value everywhere."""

    patch_size = PATCH

    def __init__(self, value: float = 0.5) -> None:
        super().__init__()
        self.value = value
        self.sizes: list[tuple[int, ...]] = []

    def forward(self, images: Tensor, targets: Sequence[object] | None = None) -> dict[str, object]:
        self.sizes.append(tuple(images.shape[2:]))
        hidden = torch.zeros(len(images), *(n // p for n, p in zip(images.shape[2:], PATCH, strict=True)), dtype=bool)
        hidden[:, 0, 0, 0] = True
        guess = torch.full_like(images, self.value)
        return {"images": images, "reconstruction": guess, "hidden": hidden, "patch_size": PATCH}


def inferer(**options: object) -> Reconstructor:
    values = {"network": Guess(), "loss_function": MaskedReconstruction(normalise=False), "crop_size": (4, 6, 8)}
    return Reconstructor(**(values | options))


@pytest.mark.parametrize(
    ("extent", "size", "wanted"),
    [
        ((4, 6, 8), (4, 6, 8), {(0, 0, 0)}),
        ((9, 6, 8), (4, 6, 8), {(0, 0, 0), (4, 0, 0), (5, 0, 0)}),
        ((4, 7, 16), (4, 6, 8), {(0, 0, 0), (0, 1, 0), (0, 0, 8), (0, 1, 8)}),
    ],
)
def test_crops_cover_a_region(extent: tuple, size: tuple, wanted: set) -> None:
    assert set(crop_starts(extent, size)) == wanted


def test_the_three_channels_of_one_crop() -> None:
    raw = np.random.default_rng(0).integers(0, 1000, (1, 6, 9, 12)).astype(np.uint16)
    roi = (1, 2, 3, 5, 8, 11)
    shown, explained = inferer()(ArrayVolume(raw), roi)
    low, high = np.percentile(raw, (1.0, 99.8))
    wanted = (raw[0, 1:5, 2:8, 3:11] - low) / (high - low)
    assert shown.shape == (3, 4, 6, 8)
    np.testing.assert_allclose(shown[0], wanted, atol=1e-5)
    first = (slice(0, 2), slice(0, 3), slice(0, 4))
    assert (shown[1][first] == 0).all()
    np.testing.assert_allclose(shown[2][first], 0.5)
    for channel in (1, 2):
        rest = shown[channel].copy()
        rest[first] = shown[0][first]
        np.testing.assert_array_equal(rest, shown[0])
    assert explained == pytest.approx(1 - np.square(shown[0][first] - 0.5).mean(), abs=1e-5)


def test_a_small_region_is_cut_to_whole_patches() -> None:
    network = Guess()
    raw = np.random.default_rng(0).integers(0, 1000, (2, 3, 7, 11)).astype(np.uint16)
    reader = inferer(network=network, crop_size=(32, 96, 96), in_channels=2)
    shown, _ = reader(ArrayVolume(raw), (0, 0, 0, 3, 7, 11))
    assert set(network.sizes) == {(2, 6, 8)}
    low, high = np.percentile(raw, (1.0, 99.8), axis=(1, 2, 3))[:, :, None, None, None]
    np.testing.assert_allclose(shown[:2], (raw - low) / (high - low), atol=1e-5)  # the last voxels too
    assert shown.shape == (6, 3, 7, 11)


def test_mistakes_are_told(tmp_path: Path) -> None:
    volume = ArrayVolume(np.zeros((2, 4, 6, 8), np.uint16))
    with pytest.raises(ValueError, match="2 channels and the network takes 1"):
        inferer()(volume, (0, 0, 0, 4, 6, 8))
    with pytest.raises(ValueError, match=r"must hold a patch of \[2, 3, 4\]"):
        inferer(in_channels=2)(volume, (0, 0, 0, 4, 2, 8))
    with pytest.raises(ValueError, match="two in all"):
        inferer(in_channels=2)(volume, (0, 0, 0, 2, 3, 4))
    image = tmp_path / "a.tif"
    with pytest.raises(ValueError, match=r"give a NAME\.tif"):
        reconstruct_volume(image=image, inferer=inferer(), output=tmp_path / "b.zarr")
    with pytest.raises(FileNotFoundError, match="its folder does not exist"):
        reconstruct_volume(image=image, inferer=inferer(), output=tmp_path / "no" / "b.tif")


def test_the_middle_of_a_large_stack_is_written(tmp_path: Path) -> None:
    raw = np.random.default_rng(0).integers(0, 1000, (8, 12, 16)).astype(np.uint16)
    write_ome_tiff(tmp_path / "a.tif", raw, (2.0, 1.0, 0.5))
    said = reconstruct_volume(
        image=tmp_path / "a.tif", inferer=inferer(), output=tmp_path / "b.tif", most_size=(4, 6, 100)
    )
    assert "in [2, 3, 0, 6, 9, 16]" in said
    seen = open_volume(tmp_path / "b.tif")
    assert (seen.shape, seen.spacing_um) == ((3, 4, 6, 16), (2.0, 1.0, 0.5))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.tif", "b.tif"]
    first = (tmp_path / "b.tif").read_bytes()
    reconstruct_volume(image=tmp_path / "a.tif", inferer=inferer(), output=tmp_path / "b.tif", most_size=(4, 6, 100))
    assert (tmp_path / "b.tif").read_bytes() == first
