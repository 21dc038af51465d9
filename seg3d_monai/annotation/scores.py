"""What makes a region worth annotating: how much the model doubts, and how unlike it is to what is annotated.

Doubt is taken from scores alone. An instance with the score s is there with about the probability s, so whoever decides
errs with the probability min(s, 1 - s); the sum over a region is the number of objects that the model itself expects to
get wrong. With mirrored views the score is the mean over the views, and a view that misses an object counts as 0 (see
`merge_views`), so what two views disagree about is doubted too, be it a cell that only one finds or a pair that one
cuts in two. Detectors find a crowd of low scores in noise, which together would outweigh every real doubt, so the
predictor should drop what it all but rejects (`reject_score` of the bundles). Entropy of masks would add their
outlines, which are seldom what is wrong; it is left out.

The network cannot doubt what it does not see. Hence the second part: features of its backbone, pooled over the region,
tell places that look like nothing it was trained on.

Must not know: models, files.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from seg3d_monai.data.volume import Roi
from seg3d_monai.inference import Instances

_Result = TypeVar("_Result")


def doubt(found: Instances, region: Roi) -> float:
    """Number of objects that are expected to be wrong: the sum of min(s, 1 - s) over the scores s.

    Args:
        found: instances in the frame of a block; scores are probabilities.
        region: part of the block, (z1, y1, x1, z2, y2, x2) in its frame; instances whose box is centred there count.
    """
    centres = (found.boxes[:, :3] + found.boxes[:, 3:]) / 2
    inside = ((centres >= np.array(region[:3])) & (centres < np.array(region[3:]))).all(axis=1)
    scores = found.scores[inside].astype(np.float64)
    return float(np.minimum(scores, 1 - scores).clip(min=0).sum())


class BackboneProbe:
    """Looks at what a backbone makes of the images that pass through it, at no cost of its own.

    Args:
        backbone: module images [N, C, D, H, W] -> {level: features [N, F, d, h, w]}.
    """

    def __init__(self, backbone: nn.Module) -> None:
        self._backbone = backbone

    def watch(self, predict: Callable[[], _Result]) -> tuple[_Result, NDArray[np.float32]]:
        """Run a prediction, and pool the features of the first image on the way (mirrored views come later).

        Returns:
            What `predict` returns, and the mean of every channel of every level, float32 [F].

        Raises:
            ValueError: the prediction did not use the backbone.
        """
        features: list[NDArray[np.float32]] = []

        def note(module: nn.Module, images: object, levels: Mapping[str, Tensor]) -> None:
            if not features:
                features.append(pooled(levels))

        handle = self._backbone.register_forward_hook(note)
        try:
            result = predict()
        finally:
            handle.remove()
        if not features:
            raise ValueError("the prediction did not use the backbone; give the one of the predictor's own network")
        return result, features[0]

    def features(self, predict: Callable[[], object]) -> NDArray[np.float32]:
        """The features alone, as `watch` gives them; the prediction is left as soon as they are there."""

        def stop(module: nn.Module, images: object, levels: Mapping[str, Tensor]) -> None:
            raise _Enough(pooled(levels))

        handle = self._backbone.register_forward_hook(stop)
        try:
            predict()
        except _Enough as enough:
            return enough.features
        finally:
            handle.remove()
        raise ValueError("the prediction did not use the backbone; give the one of the predictor's own network")


class _Enough(BaseException):
    """Ends a prediction; no `except Exception` on the way may take it for a failure."""

    def __init__(self, features: NDArray[np.float32]) -> None:
        super().__init__()
        self.features = features


def pooled(levels: Mapping[str, Tensor]) -> NDArray[np.float32]:
    """The mean of every channel of every level over the first image.

    Args:
        levels: features [N, F, d, h, w] by level, any floating dtype.

    Returns:
        float32 [sum of F].
    """
    means = [features[0].float().flatten(1).mean(1) for features in levels.values()]
    return torch.cat(means).detach().cpu().numpy()


def standardised(features: NDArray[np.floating], centres: NDArray[np.floating]) -> Sequence[NDArray[np.float64]]:
    """Features [N, F] and centres [M, F] with unit variance along each dimension; constant ones become 0."""
    every = np.concatenate([features, centres]).astype(np.float64)
    spread = every.std(axis=0)
    scaled = (every - every.mean(axis=0)) * np.divide(1.0, spread, out=np.zeros_like(spread), where=spread > 1e-12)
    return scaled[: len(features)], scaled[len(features) :]
