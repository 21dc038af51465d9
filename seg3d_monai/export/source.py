"""What is exported: a bundle's network with trained weights, the shape of its input, and what a user of it must know.

Must not know file formats.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from seg3d_monai.data.intensity import NORMALISED_RANGE
from seg3d_monai.engine import check_config
from seg3d_monai.engine.checkpoint import load_weights, read_spacing
from seg3d_monai.export.dense import DensePart
from seg3d_monai.models import MaskRCNN3d

Axes = tuple[int, int, int]


@dataclass(frozen=True, kw_only=True)
class ExportSource:
    """A bundle's network, ready to be exported.

    Args:
        name: of the bundle.
        network: with its trained weights, in evaluation mode.
        checkpoint: file of the weights.
        in_channels: channels of the image.
        percentiles: of each channel of the whole volume, which are mapped to 0 and 1.
        block_size, halo: (z, y, x) voxels with which the bundle predicts.
        settings: which detections count, by name.
    """

    name: str
    network: nn.Module
    checkpoint: Path
    in_channels: int
    percentiles: tuple[float, float]
    block_size: Axes
    halo: Axes
    settings: dict[str, Any]

    @property
    def stride(self) -> Axes:
        """(z, y, x) voxels of a cell of the backbone's coarsest level."""
        backbone = self.network.get_submodule("backbone")
        if isinstance(self.network, MaskRCNN3d):
            backbone = backbone.get_submodule("backbone")  # beneath the pyramid
        strides: dict[str, Axes] = backbone.strides  # type: ignore[assignment]
        z, y, x = (max(stride[axis] for stride in strides.values()) for axis in range(3))
        return z, y, x

    def input_shape(self, shape: Sequence[int] | None, batch: int) -> tuple[int, int, int, int, int]:
        """(N, C, D, H, W) of the input.

        Args:
            shape: (D, H, W) voxels, multiples of `stride`; None: of the bundle's block with its halo, rounded up.
            batch: N, images at a time.

        Raises:
            ValueError: a shape that is not three multiples of the stride, or a batch below 1.
        """
        if batch < 1:
            raise ValueError(f"--batch is {batch}; give at least 1")
        if shape is None:
            shape = _up([b + 2 * h for b, h in zip(self.block_size, self.halo, strict=True)], self.stride)
        if len(shape) != 3 or min(shape) < 1:
            raise ValueError(f"--shape is {list(shape)}; give three positive numbers of voxels (z, y, x)")
        if any(n % s for n, s in zip(shape, self.stride, strict=True)):
            raise ValueError(
                f"--shape is {list(shape)}; give multiples of the coarsest stride {list(self.stride)}, such as "
                f"{_up(shape, self.stride)}"
            )
        return batch, self.in_channels, shape[0], shape[1], shape[2]

    def facts(self, outputs: dict[str, Tensor]) -> dict[str, Any]:
        """What a user of the outputs must know beside their shapes, as JSON holds it."""
        found: dict[str, Any] = {
            "bundle": self.name,
            "weights": self.checkpoint.name,
            "network": type(self.network).__name__,
            "intensity": {
                "percentiles": list(self.percentiles),
                "of": "each channel of the whole volume, never of a block",
                "become": [0.0, 1.0],
                "clipped_to": list(NORMALISED_RANGE),
            },
            "spacing_um": _listed(read_spacing(self.checkpoint)),
            "block_size": list(self.block_size),
            "halo": list(self.halo),
            "settings": self.settings,
        }
        network = self.network
        if isinstance(network, MaskRCNN3d):
            levels: dict[str, Axes] = network.backbone.strides  # type: ignore[assignment]
            found["level_strides"] = {level: list(stride) for level, stride in levels.items()}
            found["anchors"] = {
                level: network.anchors.num_anchors * outputs[f"features_{level}"][0, 0].numel()
                for level in network.anchors.strides
            }
            names = "pre_nms_top_n post_nms_top_n proposal_nms_threshold"
            found["proposals"] = {name: getattr(network, name)[1] for name in names.split()}
            found["proposals"] |= {"min_objectness": network.min_objectness, "min_size": 1.0}
        else:
            decoder: Any = network.get_submodule("pixel_decoder")
            found["mask_stride"] = list(decoder.strides[decoder.mask_levels[0]])
            found["has_no_object"] = bool(network.has_no_object)
        return found


def read_source(folder: Path, files: Sequence[str], checkpoint: str | None) -> ExportSource:
    """A bundle's network with trained weights.

    Args:
        folder: of the bundle.
        files: its configuration of inference, then overlays.
        checkpoint: trained weights, as `load_weights` takes them; None: those that the configuration names.

    Raises:
        FileNotFoundError: there are no weights.
        ValueError: a key of the configuration that nothing reads, or weights that do not fit.
        TypeError: a network that has no dense part.
    """
    from monai.bundle import ConfigParser

    parser = ConfigParser()
    parser.read_config(list(files))
    parser["device"] = "cpu"
    if "bundle_root" in parser:  # says where it was written for
        parser["bundle_root"] = str(folder)
    if checkpoint is not None:
        parser["checkpoint"] = checkpoint
    parser.parse(True)
    check_config(("seam_check", "dense_net_def"), parser=parser)
    path = Path(str(parser.get_parsed_content("checkpoint")))
    if not path.is_file():
        raise FileNotFoundError(f"checkpoint {str(path)!r} does not exist; train first or give --checkpoint")
    network: nn.Module = parser.get_parsed_content("network_def")
    DensePart(network)  # before the weights are read
    load_weights(network, path)
    inferer = parser.get_parsed_content("inferer")
    return ExportSource(
        name=folder.resolve().name,
        network=network.eval(),
        checkpoint=path,
        in_channels=int(parser.get_parsed_content("in_channels")),
        percentiles=inferer.percentiles,
        block_size=_axes(parser.get_parsed_content("block_size")),
        halo=_axes(parser.get_parsed_content("halo")),
        settings=dict(vars(inferer.settings)),
    )


def random_images(shape: Sequence[int], seed: int) -> Tensor:
    """Images of random numbers from 0 to 1, where most voxels lie after normalisation."""
    return torch.rand(tuple(shape), generator=torch.Generator().manual_seed(seed))


def _up(shape: Sequence[int], stride: Axes) -> list[int]:
    """The next multiples of a stride."""
    return [-(-n // s) * s for n, s in zip(shape, stride, strict=True)]


def _axes(value: int | Sequence[int]) -> Axes:
    z, y, x = (value, value, value) if isinstance(value, int) else value
    return int(z), int(y), int(x)


def _listed(value: Sequence[float] | None) -> list[float] | None:
    return None if value is None else list(value)
