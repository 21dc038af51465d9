"""The place kernel against the sum of cosines that it stands for."""

import numpy as np
import pytest
import torch

from seg3d_monai.layers.place_kernel import (
    FIRST_GAIN,
    MAX_WAVELENGTH,
    MIN_WAVELENGTH,
    PAIRS,
    PLACE_CHANNELS,
    PlaceEmbedding,
    encode_places,
    place_features,
)

WAVELENGTHS = np.geomspace(MIN_WAVELENGTH, MAX_WAVELENGTH, PAIRS)


def cosines(places, centre, gains):
    """Sum over axes and wavelengths of gain * cos(2 pi distance / wavelength)."""
    distance = (np.asarray(places) - np.asarray(centre))[..., None]
    return (gains * np.cos(2 * np.pi * distance / WAVELENGTHS)).sum((-1, -2))


def test_features_are_the_encoded_centres_of_cells():
    features = place_features((3, 4, 5), (1, 2, 4), "cpu")
    assert features.shape == (3, 4, 5, PLACE_CHANNELS)
    centre = torch.tensor([2.5, 3.0, 14.0])  # of cell (2, 1, 3)
    torch.testing.assert_close(features[2, 1, 3], encode_places(centre))


def test_the_product_is_a_kernel_around_the_centre():
    torch.manual_seed(0)
    embedding = PlaceEmbedding(channels=7).double()
    torch.nn.init.normal_(embedding.gains.weight)
    queries, centres = torch.randn(2, 3, 7, dtype=torch.float64), 40 * torch.rand(2, 3, 3, dtype=torch.float64)
    embeds = embedding(queries, centres)
    gains = torch.nn.functional.softplus(embedding.gains(queries)).unflatten(-1, (3, PAIRS))
    assert (gains > 0).all()
    features = place_features((4, 5, 6), (2, 3, 5), "cpu").double()
    z, y, x = np.meshgrid(np.arange(4) * 2 + 1, np.arange(5) * 3 + 1.5, np.arange(6) * 5 + 2.5, indexing="ij")
    places = np.stack([z, y, x], -1)
    for image in range(2):
        for query in range(3):
            expected = cosines(places, centres[image, query].numpy(), gains[image, query].detach().numpy())
            actual = (features @ embeds[image, query]).detach().numpy()
            np.testing.assert_allclose(actual, expected, atol=1e-4)  # features are float32


@pytest.mark.parametrize("shift", [(0.0, 0.0, 0.0), (7.0, -3.0, 20.0), (300.0, 300.0, 300.0)])
def test_the_kernel_does_not_depend_on_where_the_block_lies(shift):
    embedding, queries = PlaceEmbedding(channels=4), torch.ones(1, 1, 4)
    centre, place = torch.tensor([[[5.0, 9.0, 12.0]]]), torch.tensor([6.0, 4.0, 20.0])
    shift = torch.tensor(shift)
    here = (embedding(queries, centre)[0, 0] * encode_places(place)).sum()
    there = (embedding(queries, centre + shift)[0, 0] * encode_places(place + shift)).sum()
    torch.testing.assert_close(here, there, atol=1e-3, rtol=0)


def test_it_starts_with_the_same_gain_everywhere_and_is_highest_at_the_centre():
    embedding = PlaceEmbedding(channels=4)
    centre = torch.tensor([[[20.0, 30.0, 40.0]]])
    embeds = embedding(torch.randn(1, 1, 4), centre)[0, 0]
    torch.testing.assert_close((embeds * encode_places(centre[0, 0])).sum(), torch.tensor(FIRST_GAIN * 3 * PAIRS))
    values = place_features((40, 60, 80), (1, 1, 1), "cpu") @ embeds
    highest = np.array(np.unravel_index(int(values.argmax()), values.shape)) + 0.5
    assert np.abs(highest - [20, 30, 40]).max() == 0.5
    assert values.amax() > values[:10].amax()


def test_zero_queries():
    assert PlaceEmbedding(channels=4)(torch.zeros(2, 0, 4), torch.zeros(2, 0, 3)).shape == (2, 0, PLACE_CHANNELS)
