"""Assignment of predictions to truth: indices only, no gradients. Must not know models or losses."""

from seg3d_monai.matching.iou_matcher import IoUMatcher
from seg3d_monai.matching.samplers import sample_balanced

__all__ = ["IoUMatcher", "sample_balanced"]
