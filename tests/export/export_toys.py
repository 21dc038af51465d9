"""A plain IoU for the tests of exports."""

import numpy as np


def iou(a: np.ndarray, b: np.ndarray) -> float:
    """IoU of two boxes (z1, y1, x1, z2, y2, x2)."""
    shared = np.prod(np.clip(np.minimum(a[3:], b[3:]) - np.maximum(a[:3], b[:3]), 0, None))
    return float(shared / (np.prod(a[3:] - a[:3]) + np.prod(b[3:] - b[:3]) - shared))
