"""Masked autoencoders: what is hidden is not seen, all of it counts, voxels come back to their places."""

import pytest
import torch

from seg3d_monai.backbones import ResNet, convnext_backbone, swin_backbone
from seg3d_monai.backbones.vit import ViT
from seg3d_monai.losses import MaskedReconstruction
from seg3d_monai.models import InpaintingAutoencoder, TokenAutoencoder, masked_autoencoder3d
from seg3d_monai.models.masked_autoencoder import PatchMask, voxels_of

SIZE = (8, 24, 32)


def make(kind, in_channels=1, **options):
    torch.manual_seed(0)
    if kind == "vit":
        backbone = ViT(in_channels=in_channels, channels=16, depth=2, num_heads=2, patch_size=(2, 8, 4))
    else:
        strides = ((1, 1, 1), (2, 2, 2))
        backbone = ResNet(
            in_channels=in_channels, depths=(1, 1), widths=(8, 16), stem_channels=8, stage_strides=strides
        )
    options = {
        "decoder_channels": 12,
        "decoder_heads": 2,
        "patch_size": (2, 8, 4),
        "in_channels": in_channels,
    } | options
    return masked_autoencoder3d(backbone=backbone, **options)


kinds = pytest.mark.parametrize("kind", ["vit", "resnet"])


@pytest.mark.parametrize("ratio", [0.01, 0.3, 0.6, 0.999])
@pytest.mark.parametrize("block", [(1, 1, 1), (2, 3, 1)])
def test_equally_many_patches_are_hidden_of_each_image(ratio, block):
    hidden = PatchMask(ratio, block)(5, (4, 3, 8), torch.device("cpu"))
    assert hidden.shape == (5, 4, 3, 8)
    number = min(max(1, round(ratio * 96)), 95)
    assert hidden.flatten(1).sum(1).tolist() == [number] * 5
    if number > 1:
        assert len({tuple(one.flatten().tolist()) for one in hidden}) > 1


def test_blocks_are_hidden_together():
    hidden = PatchMask(0.5, (2, 2, 2))(20, (4, 6, 8), torch.device("cpu"))
    blocks = hidden.unflatten(3, (4, 2)).unflatten(2, (3, 2)).unflatten(1, (2, 2)).permute(0, 1, 3, 5, 2, 4, 6)
    counts = blocks.flatten(4).sum(-1)
    assert (((counts == 0) | (counts == 8)).flatten(1).sum(1) >= 23).all()  # one of the 24 may be cut


def test_wrong_masks():
    for ratio in (0, 1, -0.5):
        with pytest.raises(ValueError, match="mask_ratio is"):
            PatchMask(ratio)
    with pytest.raises(ValueError, match="block_patches"):
        PatchMask(0.5, (0, 1, 1))


@kinds
@pytest.mark.parametrize("in_channels", [1, 2])
def test_hidden_voxels_are_not_seen_and_every_weight_learns(kind, in_channels):
    network = make(kind, in_channels)
    assert isinstance(network, TokenAutoencoder if kind == "vit" else InpaintingAutoencoder)
    images = torch.randn(3, in_channels, *SIZE)
    torch.manual_seed(1)
    outputs = network(images, [{}] * 3)
    assert outputs["reconstruction"].shape == images.shape
    hidden = outputs["hidden"]
    assert hidden.shape == (3, 4, 3, 8)
    voxels = hidden[:, None].repeat_interleave(2, 2).repeat_interleave(8, 3).repeat_interleave(4, 4)
    changed = torch.where(voxels, torch.randn_like(images), images)
    torch.manual_seed(1)
    other = network(changed)
    torch.testing.assert_close(other["reconstruction"], outputs["reconstruction"])
    torch.manual_seed(1)
    seen = network(torch.where(voxels, images, images + 1))
    assert not torch.allclose(seen["reconstruction"], outputs["reconstruction"])
    loss = MaskedReconstruction()(outputs, [{}] * 3)["reconstruction"]
    loss.backward()
    untrained = {name for name, p in network.named_parameters() if p.grad is None}
    assert untrained == {name for name, p in network.named_parameters() if not p.requires_grad}
    assert all(name.startswith("backbone.pyramid.") for name in untrained)  # ViTDet's, of a later use
    assert all(p.grad.isfinite().all() for p in network.parameters() if p.grad is not None)


@kinds
def test_a_network_learns_what_can_be_known(kind):
    network = make(kind, mask_ratio=0.3)
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam(network.parameters(), 3e-3)
    losses = []
    for step in range(120):  # each image is of one grey value
        images = torch.randn(6, 1, 1, 1, 1, generator=generator).expand(6, 1, *SIZE)
        torch.manual_seed(step)
        loss = MaskedReconstruction(normalise=False)(network(images), [])["reconstruction"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    assert sum(losses[:5]) / 5 > 0.4
    assert sorted(losses[-20:])[10] < 0.3  # the first images are wrong by 1 on average, some by much more


@kinds
def test_autocast_and_sizes_that_do_not_fit(kind):
    network = make(kind)
    with torch.autocast("cpu", torch.bfloat16):
        outputs = network(torch.randn(1, 1, *SIZE))
    assert MaskedReconstruction()(outputs, [])["reconstruction"].dtype == torch.float32
    for size in ((8, 24, 30), (2, 8, 4)):
        with pytest.raises(ValueError, match="whole patches"):
            network(torch.randn(1, 1, *size))


def test_patches_are_multiples_of_the_finest_stride():
    with pytest.raises(ValueError, match="patch_size is"):
        make("resnet", patch_size=(2, 3, 4))


@pytest.mark.parametrize("build", [convnext_backbone, swin_backbone])
def test_other_backbones(build):
    network = masked_autoencoder3d(backbone=build(size="tiny"), patch_size=(4, 8, 8), decoder_channels=16)
    outputs = network(torch.randn(1, 1, 16, 32, 48))
    assert outputs["reconstruction"].shape == (1, 1, 16, 32, 48)


def test_voxels_of_cells():
    cells = torch.arange(2 * 3 * 2 * 2 * 1 * 2 * 4 * 3).view(2, 12, 2, 4, 3)
    voxels = voxels_of(cells, (2, 2, 1))
    assert voxels.shape == (2, 3, 4, 8, 3)
    for channel, (a, b) in ((0, (0, 0)), (5, (0, 1)), (10, (1, 0))):
        assert torch.equal(voxels[:, channel // 4, a::2, b::2], cells[:, channel])


@kinds
def test_images_are_reconstructed_as_the_network_reads_them(kind):
    network = make(kind, image_power=0.5)
    assert "power=0.5" in repr(network)
    images = torch.randn(1, 1, *SIZE)
    torch.manual_seed(1)
    outputs = network(images)
    torch.testing.assert_close(outputs["images"], images.abs().sqrt() * images.sign())
    plain = make(kind)
    assert network.state_dict().keys() == plain.state_dict().keys()
    torch.manual_seed(1)
    same = plain(outputs["images"])
    torch.testing.assert_close(same["reconstruction"], outputs["reconstruction"])
