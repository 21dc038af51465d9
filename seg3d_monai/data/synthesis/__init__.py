"""Synthetic volumes with labels, of scenes whose every number is drawn from a range."""

from seg3d_monai.data.synthesis.dataset import SyntheticCropDataset, read_recipe
from seg3d_monai.data.synthesis.match import Match, match_recipe
from seg3d_monai.data.synthesis.presets import PRESETS, preset
from seg3d_monai.data.synthesis.scene import Recipe, Scene
from seg3d_monai.data.synthesis.stack import SyntheticStack
from seg3d_monai.data.synthesis.statistics import Statistics, measure

__all__ = [
    "PRESETS",
    "Match",
    "Recipe",
    "Scene",
    "Statistics",
    "SyntheticCropDataset",
    "SyntheticStack",
    "match_recipe",
    "measure",
    "preset",
    "read_recipe",
]
