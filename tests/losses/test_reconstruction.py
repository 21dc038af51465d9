"""The loss of hidden patches against hand-made numbers."""

import pytest
import torch

from seg3d_monai.losses import MaskedReconstruction
from seg3d_monai.losses.reconstruction import patched, unpatched
from seg3d_monai.models.masked_autoencoder import voxels_of

PATCH = (2, 1, 3)


def outputs(images, guess, hidden):
    return {"images": images, "reconstruction": guess, "hidden": hidden, "patch_size": PATCH}


def test_only_hidden_patches_count():
    images = torch.zeros(1, 1, 4, 2, 3)
    guess = images.clone()
    guess[0, 0, :2, 0] = 2.0  # patch 0, wrong by 2 everywhere
    guess[0, 0, 2, 1, 1] = 6.0  # patch 3, one of six voxels wrong by 6
    for hidden, wanted in (([1, 0, 0, 0], 4.0), ([0, 0, 0, 1], 6.0), ([1, 0, 0, 1], 5.0), ([0, 1, 1, 0], 0.0)):
        mask = torch.tensor(hidden, dtype=torch.bool).view(1, 2, 2, 1)
        loss = MaskedReconstruction(normalise=False)(outputs(images, guess, mask), [])
        assert set(loss) == {"reconstruction"}
        assert float(loss["reconstruction"]) == pytest.approx(wanted)


def test_who_guesses_nothing_of_a_normalised_patch_has_a_loss_of_one():
    images = torch.randn(2, 2, 4, 4, 9) * torch.tensor([0.5, 30.0])[:, None, None, None, None] + 7
    hidden = torch.ones(2, 2, 4, 3, dtype=torch.bool)
    criterion = MaskedReconstruction()
    assert float(criterion(outputs(images, torch.zeros_like(images), hidden), [])["reconstruction"]) == pytest.approx(1)
    wanted = patched(images, PATCH)
    wanted = (wanted - wanted.mean(-1, keepdim=True)) / wanted.std(-1, keepdim=True, correction=0)
    guess = wanted.unflatten(1, (2, 4, 3)).unflatten(-1, (2, *PATCH)).permute(0, 4, 5, 6, 7, 1, 2, 3).flatten(1, 4)
    guess = voxels_of(guess, PATCH)
    assert float(criterion(outputs(images, guess, hidden), [])["reconstruction"]) < 1e-10


def test_patches_are_put_back_where_they_were():
    images = torch.arange(2 * 2 * 4 * 3 * 9.0).view(2, 2, 4, 3, 9)
    assert torch.equal(unpatched(patched(images, PATCH), images.shape, PATCH), images)


def test_a_guess_is_shown_in_units_of_the_image():
    images = torch.randn(1, 2, 4, 2, 6) * 3 + 7
    hidden = torch.ones(1, 2, 2, 2, dtype=torch.bool)
    wanted = patched(images, PATCH)
    normed = (wanted - wanted.mean(-1, keepdim=True)) / wanted.std(-1, keepdim=True, correction=0)
    right = outputs(images, unpatched(normed, images.shape, PATCH), hidden)
    torch.testing.assert_close(MaskedReconstruction().guessed_images(right), images)
    nothing = MaskedReconstruction().guessed_images(outputs(images, torch.zeros_like(images), hidden))
    torch.testing.assert_close(patched(nothing, PATCH), wanted.mean(-1, keepdim=True).expand_as(wanted))
    plain = MaskedReconstruction(normalise=False).guessed_images(outputs(images, 2 * images, hidden))
    assert torch.equal(plain, 2 * images)


def test_empty_patches_do_not_explode():
    images = torch.zeros(1, 1, 4, 2, 3)
    images[..., 0] = 1e-4
    loss = MaskedReconstruction()(
        outputs(images, torch.zeros_like(images), torch.ones(1, 2, 2, 1, dtype=torch.bool)), []
    )
    assert float(loss["reconstruction"]) < 1e-3
    with pytest.raises(ValueError, match="least_std is 0"):
        MaskedReconstruction(least_std=0)
