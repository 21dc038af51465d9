"""Assignment of predictions to truth: indices only, no gradients. Must not know models or losses."""

from seg3d_monai.matching.hungarian import HungarianMatcher
from seg3d_monai.matching.iou_matcher import IoUMatcher
from seg3d_monai.matching.points import PointSet, batch_point_features, point_features, sample_points
from seg3d_monai.matching.samplers import sample_balanced

__all__ = [
    "HungarianMatcher",
    "IoUMatcher",
    "PointSet",
    "batch_point_features",
    "point_features",
    "sample_balanced",
    "sample_points",
]
