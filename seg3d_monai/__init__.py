"""Instance segmentation of cells in 3D light-sheet microscopy, built on PyTorch and MONAI."""

import os

__version__ = "0.1.0.dev0"

# Huge pages for large tensors on the CPU, where Linux has them. A network on a block of voxels asks for gigabytes again
# and again, and a page fault for every 4 KB of them takes a fifth of its time. PyTorch looks at the variable when it
# makes the first tensor of a process.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
