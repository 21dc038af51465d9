"""What a person reads: evaluation of results on disk, pictures, and the classical baseline."""

from seg3d_monai.report.evaluate import evaluate_paths
from seg3d_monai.report.slices import save_slices
from seg3d_monai.report.watershed import otsu_watershed

__all__ = ["evaluate_paths", "otsu_watershed", "save_slices"]
