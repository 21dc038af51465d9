"""Whole-stack inference: blocks, journal, stitching and writing. Takes a predictor as a callable; imports no model."""

from seg3d_monai.inference.instances import Instances
from seg3d_monai.inference.measure import measure_objects
from seg3d_monai.inference.predict import Prediction, predict_labels, predict_volume
from seg3d_monai.inference.predictor import InstancePredictor
from seg3d_monai.inference.relabel import relabel_volume
from seg3d_monai.inference.resample import ResamplingPredictor, at_model_spacing
from seg3d_monai.inference.schedule import Terminated

__all__ = [
    "InstancePredictor",
    "Instances",
    "Prediction",
    "ResamplingPredictor",
    "Terminated",
    "at_model_spacing",
    "measure_objects",
    "predict_labels",
    "predict_volume",
    "relabel_volume",
]
