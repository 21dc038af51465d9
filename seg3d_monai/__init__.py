"""Instance segmentation of cells in 3D light-sheet microscopy, built on PyTorch and MONAI."""

__version__ = "0.1.0.dev0"
