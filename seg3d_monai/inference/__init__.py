"""Whole-stack inference: blocks, journal, stitching and writing. Takes a predictor as a callable; imports no model."""

from seg3d_monai.inference.instances import Instances
from seg3d_monai.inference.predict import Prediction, predict_labels, predict_volume, relabel_volume
from seg3d_monai.inference.predictor import InstancePredictor

__all__ = ["InstancePredictor", "Instances", "Prediction", "predict_labels", "predict_volume", "relabel_volume"]
