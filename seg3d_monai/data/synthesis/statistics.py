"""What an image looks like, in numbers that do not depend on where its cells lie.

These are its noise within planes and along z, its histogram, its power spectra, and how long and how wide bright
objects are. Noise is told apart because resampled stacks have more along one axis than along the others, and shapes
because spectra along single axes say little of objects that a wide point spread draws out along z.

The image is first normalised as for a network, so that a camera's offset and gain play no part.

It must not know scenes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.ndimage import gaussian_filter

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95, 0.99)
PERCENTILES = (1.0, 99.8)
"""They become 0 and 1."""
PLANE_BANDS, AXIAL_BANDS = 8, 6
SMOOTHING = 0.7
"""Standard deviation, in voxels, of the filter that takes the noise from what bright objects are measured in."""
_BRIGHT = 0.25  # of the way from the median to 1, from which on objects are bright
Array = np.ndarray


@dataclass(frozen=True, kw_only=True)
class Statistics:
    """Of an image whose `PERCENTILES` are 0 and 1.

    noise: standard deviation of what differs from voxel to voxel along y and x.
    axial_noise: that of what differs from plane to plane; where noise is white both are the same.
    quantiles: values at `QUANTILES`.
    plane_power: log10 of the power within planes, in `PLANE_BANDS` equal bands of frequency up to half a cycle a voxel.
    axial_power: log10 of the power along z, in `AXIAL_BANDS`.
    widths: [2], half-widths in voxels at half maximum of the autocorrelation of bright objects, along z and within
        planes; their ratio is how far objects are drawn out.
    low, high: the percentiles, in the image's own counts.
    """

    noise: float
    axial_noise: float
    quantiles: Array
    plane_power: Array
    axial_power: Array
    widths: Array
    low: float
    high: float

    @property
    def elongation(self) -> float:
        """How many times as long bright objects are along z as they are wide, in voxels."""
        return float(self.widths[0] / self.widths[1])

    def distance(self, other: Statistics) -> float:
        """Mean of six differences: of log10 of both noises, quantiles in tenths, log10 of both spectra, log2 of widths.

        A value of 1 is a noise or powers of ten times, or objects of twice the length: images that nobody would take
        for each other.
        """
        return float(
            np.mean(
                [
                    abs(np.log10(max(self.noise, 1e-6) / max(other.noise, 1e-6))),
                    abs(np.log10(max(self.axial_noise, 1e-6) / max(other.axial_noise, 1e-6))),
                    10 * np.abs(self.quantiles - other.quantiles).mean(),
                    np.abs(self.plane_power - other.plane_power).mean(),
                    np.abs(self.axial_power - other.axial_power).mean(),
                    np.abs(np.log2(self.widths / other.widths)).mean(),
                ]
            )
        )


def measure(image: Array) -> Statistics:
    """Statistics of an image.

    Args:
        image: [Z, Y, X], any numbers; eight voxels along each axis at least.

    Raises:
        ValueError: it has other axes, is smaller, or is constant.
    """
    if image.ndim != 3 or min(image.shape) < 8:
        raise ValueError(f"the image has shape {image.shape}; give [Z, Y, X] with eight voxels along each at least")
    low, high = (float(value) for value in np.percentile(image, PERCENTILES))
    if not high > low:
        raise ValueError(f"the image is constant: its percentiles {PERCENTILES} are both {low:g}")
    values = ((image - np.float32(low)) / np.float32(high - low)).astype(np.float32)
    return Statistics(
        noise=_noise(values),
        axial_noise=_axial_noise(values),
        quantiles=np.quantile(values, QUANTILES),
        plane_power=_power(values, (1, 2), PLANE_BANDS),
        axial_power=_power(values, (0,), AXIAL_BANDS),
        widths=_widths(values),
        low=low,
        high=high,
    )


def _noise(values: Array) -> float:
    """Standard deviation of white noise, by the median of a mask to which planes and edges are nothing.

    Immerkær 1996, with the median in place of the mean, since objects are no noise.
    """
    second = values[:, :, 2:] - 2 * values[:, :, 1:-1] + values[:, :, :-2]
    mixed = second[:, 2:] - 2 * second[:, 1:-1] + second[:, :-2]
    return float(np.median(np.abs(mixed)) / 0.6745 / 6)


def _axial_noise(values: Array) -> float:
    """Standard deviation of white noise, by the median of second differences along z."""
    second = values[2:] - 2 * values[1:-1] + values[:-2]
    return float(np.median(np.abs(second)) / 0.6745 / 6**0.5)


def _widths(values: Array) -> Array:
    """Half-widths of bright objects' autocorrelation along z and within planes, voxels.

    Only what is brighter than a quarter of the way from the median to 1 counts, else the glow of the background, which
    is everywhere, would outweigh objects. Where brightness follows from the distance to a middle, in whatever
    ellipsoidal measure, the ratio of the widths is that of the ellipsoid, wherever one cuts.
    """
    smooth = gaussian_filter(values, SMOOTHING)
    middle = float(np.median(smooth))
    bright = np.maximum(smooth - (middle + _BRIGHT * max(1 - middle, 0.1)), 0)
    z, y, x = (_half_width(bright, axis) for axis in range(3))
    return np.array([z, (y + x) / 2])


def _half_width(bright: Array, axis: int) -> float:
    """Shift along an axis, in voxels, at which the autocorrelation has fallen to half."""
    size = bright.shape[axis]
    work = np.moveaxis(bright, axis, 0).astype(np.float64)
    level = work.mean() ** 2
    top = (work * work).mean() - level
    before = 1.0
    for shift in range(1, size // 2 + 1):
        now = (float((work[shift:] * work[:-shift]).mean()) - level) / max(top, 1e-12)
        if now <= 0.5:
            return shift - (0.5 - now) / max(before - now, 1e-12)
        before = now
    return size / 2


def _power(values: Array, axes: tuple[int, ...], bands: int) -> Array:
    """log10 of the mean power in bands of frequency, along some axes, a window against the edges."""
    work = values - values.mean()
    for axis in axes:
        window = np.hanning(values.shape[axis] + 2)[1:-1].astype(np.float32)
        work = work * np.expand_dims(window, [a for a in range(3) if a != axis])
    power = np.abs(np.fft.fftn(work, axes=axes)) ** 2
    frequency = np.zeros(values.shape)
    for axis in axes:
        along = np.fft.fftfreq(values.shape[axis])
        frequency = frequency + np.expand_dims(along**2, [a for a in range(3) if a != axis])
    band = np.minimum((np.sqrt(frequency) * 2 * bands).astype(int), bands).ravel()  # corners of the plane lie beyond
    inside = band < bands
    sums = np.bincount(band[inside], power.ravel()[inside], bands)
    counts = np.bincount(band[inside], minlength=bands)
    size = np.prod([values.shape[axis] for axis in axes])
    mean: Array = np.log10(np.maximum(sums / np.maximum(counts, 1) / size, 1e-12))
    return mean
