"""Criteria: (outputs, targets) -> {name: weighted scalar}. Must not know models, data or engines."""

from seg3d_monai.losses.mask_rcnn import MaskRCNNCriterion
from seg3d_monai.losses.reconstruction import MaskedReconstruction
from seg3d_monai.losses.set_criterion import SetCriterion

__all__ = ["MaskRCNNCriterion", "MaskedReconstruction", "SetCriterion"]
