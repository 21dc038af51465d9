"""The dense part of a network for other runtimes: torch.export, ONNX, TorchScript.

Must not be imported by any other room. Nothing here is loaded by `import seg3d_monai.export` but torch and the models;
ONNX is imported by the file that writes it.
"""

from seg3d_monai.export.dense import DensePart, DenseTensor

__all__ = ["DensePart", "DenseTensor"]
