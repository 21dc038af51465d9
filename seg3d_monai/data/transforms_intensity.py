"""What microscopes do to images, as MONAI dictionary transforms: blur, coarse planes, noise, missing channels.

Labels stay as they are: a nucleus does not change its place because it was imaged worse.

Must not know: files, labels, the crop index.
"""

from collections.abc import Hashable, Mapping, Sequence

import numpy as np
import torch
from monai.networks.layers import gaussian_1d
from monai.transforms import MapTransform, RandomizableTransform
from torch.nn import functional

from seg3d_monai.data.blur import filter_along


class RandBlurd(RandomizableTransform, MapTransform):
    """Gaussian blur as by MONAI's RandGaussianSmoothd, but with the same bits whatever the number of threads.

    Args:
        keys: float [C, D, H, W].
        prob: probability, 0 to 1.
        sigma_range: smallest and largest standard deviation in y and in x, voxels; half of it in z.
    """

    def __init__(
        self, *, keys: Sequence[str] | str = "image", prob: float = 0.1, sigma_range: Sequence[float] = (0.25, 1.5)
    ) -> None:
        MapTransform.__init__(self, keys)
        RandomizableTransform.__init__(self, prob)
        low, high = sigma_range
        self._range = (float(low), float(high))

    def __call__(self, data: Mapping[Hashable, torch.Tensor]) -> dict[Hashable, torch.Tensor]:
        """Transform one sample."""
        result = dict(data)
        self.randomize(None)
        if self._do_transform:
            sigmas = self.R.uniform(*self._range, size=3) * (0.5, 1, 1)
            for key in self.key_iterator(result):
                image = torch.as_tensor(result[key])
                for axis, sigma in enumerate(sigmas, start=1):
                    image = filter_along(image, gaussian_1d(torch.tensor(sigma)).tolist(), axis)
                result[key] = image
        return result


class RandCoarseZd(RandomizableTransform, MapTransform):
    """Image as with thicker planes, further apart: averages over slabs, interpolated linearly between their middles.

    Args:
        keys: float [C, D, H, W].
        prob: probability, 0 to 1.
        factor_range: smallest and largest thickness of a slab, in planes, from 1.

    Raises:
        ValueError: for a thickness below 1.
    """

    def __init__(
        self, *, keys: Sequence[str] | str = "image", prob: float = 0.2, factor_range: Sequence[float] = (1.5, 3.0)
    ) -> None:
        MapTransform.__init__(self, keys)
        RandomizableTransform.__init__(self, prob)
        if len(factor_range) != 2 or not 1 <= factor_range[0] <= factor_range[1]:
            raise ValueError(f"factor_range={factor_range} is not two thicknesses 1 <= low <= high in planes")
        self._range = (float(factor_range[0]), float(factor_range[1]))

    def __call__(self, data: Mapping[Hashable, torch.Tensor]) -> dict[Hashable, torch.Tensor]:
        """Transform one sample."""
        result = dict(data)
        self.randomize(None)
        if self._do_transform:
            factor = self.R.uniform(*self._range)
            for key in self.key_iterator(result):
                image = torch.as_tensor(result[key])
                matrix = coarsening(image.shape[1], max(1, round(image.shape[1] / factor))).to(image)
                result[key] = torch.matmul(matrix, image.flatten(2)).reshape(image.shape)
        return result


class RandNoised(RandomizableTransform, MapTransform):
    """Gaussian noise as by MONAI's RandGaussianNoised, drawn as float32, in a quarter of the time.

    Args:
        keys: float32 [C, D, H, W], each with noise of its own.
        prob: probability, 0 to 1.
        std: largest standard deviation.
    """

    def __init__(self, *, keys: Sequence[str] | str = "image", prob: float = 0.1, std: float = 0.1) -> None:
        MapTransform.__init__(self, keys)
        RandomizableTransform.__init__(self, prob)
        self._std = float(std)

    def __call__(self, data: Mapping[Hashable, torch.Tensor]) -> dict[Hashable, torch.Tensor]:
        """Transform one sample."""
        result = dict(data)
        self.randomize(None)
        if self._do_transform:
            std = self.R.uniform(0, self._std)
            generator = torch.Generator().manual_seed(int(self.R.randint(2**32, dtype=np.uint32)))
            for key in self.key_iterator(result):
                image = torch.as_tensor(result[key])
                result[key] = torch.add(image, torch.randn(image.shape, generator=generator), alpha=std)
        return result


class RandChannelDropd(RandomizableTransform, MapTransform):
    """Blank one channel, which one at random; images of a single channel stay as they are.

    Args:
        keys: float [C, D, H, W]; 0, the background of a normalised image, fills the channel.
        prob: probability, 0 to 1.
    """

    def __init__(self, *, keys: Sequence[str] | str = "image", prob: float = 0.1) -> None:
        MapTransform.__init__(self, keys)
        RandomizableTransform.__init__(self, prob)

    def __call__(self, data: Mapping[Hashable, torch.Tensor]) -> dict[Hashable, torch.Tensor]:
        """Transform one sample."""
        result = dict(data)
        self.randomize(None)
        chosen = self.R.rand()
        for key in self.key_iterator(result):
            num_channels = result[key].shape[0]
            if self._do_transform and num_channels > 1:
                result[key] = result[key].clone()
                result[key][int(chosen * num_channels)] = 0
        return result


def coarsening(num_planes: int, num_slabs: int) -> torch.Tensor:
    """The linear map of `num_planes` planes to averages over slabs and back, float32 [num_planes, num_planes]."""
    slabs = functional.adaptive_avg_pool1d(torch.eye(num_planes), num_slabs)
    return functional.interpolate(slabs[None], size=num_planes, mode="linear", align_corners=False)[0].T.contiguous()
