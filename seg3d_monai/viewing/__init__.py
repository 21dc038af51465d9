"""A stack, its predicted and true objects, in napari: described without it (`build_layers`), and shown (`show`)."""

from seg3d_monai.viewing.layer_data import LayerData
from seg3d_monai.viewing.layers import build_layers
from seg3d_monai.viewing.window import show

__all__ = ["LayerData", "build_layers", "show"]
