"""Checks of the operators' arguments: every message names the argument, the value and the mend."""

import math
from collections.abc import Sequence
from numbers import Integral, Real

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

FLOATING = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def check_tensor(name: str, value: Tensor, shape: str, dtypes: Sequence[torch.dtype]) -> None:
    """Raise unless `value` is a tensor with as many axes as the words of `shape` and one of the dtypes.

    A shape that begins or ends with "..." allows any number of axes in its place.
    """
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor [{shape}], got {type(value).__name__}")
    if value.dtype not in dtypes:
        names = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise TypeError(f"{name} must be {names}, got {value.dtype}; convert it with .to(...)")
    axes = shape.split(", ")
    has_axes = value.dim() >= len(axes) - 1 if "..." in axes else value.dim() == len(axes)
    if not has_axes:
        raise ValueError(f"{name} must have the shape [{shape}], got {tuple(value.shape)}; reshape it")


def check_boxes(name: str, boxes: Tensor, dtypes: Sequence[torch.dtype]) -> None:
    """Raise unless `boxes` is a floating tensor [K, 6]."""
    check_tensor(name, boxes, "K, 6", dtypes)
    if boxes.shape[1] != 6:
        raise ValueError(f"{name} must have the shape [K, 6] = (z1, y1, x1, z2, y2, x2), got {tuple(boxes.shape)}")


def check_length(name: str, value: Tensor, boxes: Tensor) -> None:
    """Raise unless `value` has one entry for each box."""
    if value.shape[0] != boxes.shape[0]:
        raise ValueError(f"{name} must have one entry per box, got {value.shape[0]} for {boxes.shape[0]} boxes")


def check_device(name: str, value: Tensor, other_name: str, other: Tensor) -> None:
    """Raise unless both tensors are on the same device."""
    if value.device != other.device:
        raise ValueError(f"{name} is on {value.device}, {other_name} on {other.device}; move them to one device")


def check_affine(x: Tensor, channels: int, weight: Tensor, bias: Tensor) -> None:
    """Raise unless `weight` and `bias` are [C] and have the dtype of `x`, or are float32 beside a half type."""
    halves = (torch.bfloat16, torch.float16)
    check_tensor("weight", weight, "C", (x.dtype, torch.float32) if x.dtype in halves else (x.dtype,))
    check_tensor("bias", bias, "C", (weight.dtype,))
    for name, vector in (("weight", weight), ("bias", bias)):
        if vector.shape[0] != channels:
            raise ValueError(f"{name} must have one entry per channel, got {vector.shape[0]} for C = {channels}")
        check_device(name, vector, "x", x)


def check_norm_settings(eps: float, relu: bool) -> None:
    """Raise unless `eps` is a number >= 0 and `relu` is a bool."""
    if not isinstance(eps, Real) or isinstance(eps, bool):
        raise TypeError(f"eps must be a float >= 0, got {eps!r}")
    if not 0 <= eps < math.inf:
        raise ValueError(f"eps must be a float >= 0, got {eps!r}")
    if not isinstance(relu, bool):
        raise TypeError(f"relu must be True or False, got {relu!r}")


def check_values_finite(name: str, boxes: Tensor) -> None:
    """Raise if a box has a NaN or infinite corner, where reading the values costs nothing."""
    if values_are_readable(boxes) and not bool(torch.isfinite(boxes).all()):
        row = int((~torch.isfinite(boxes)).any(1).nonzero()[0])
        raise ValueError(f"{name}[{row}] = {boxes[row].tolist()} is not finite; remove such boxes first")


def values_are_readable(tensor: Tensor) -> bool:
    """Whether values can be looked at now: on the CPU, outside tracing. Elsewhere the kernels check for themselves."""
    return (
        not torch.compiler.is_compiling()
        and tensor.device.type == "cpu"
        and not is_in_torch_dispatch_mode()
        and type(tensor) in (Tensor, torch.nn.Parameter)
    )


def three_sizes(name: str, value: int | Sequence[int]) -> tuple[int, int, int]:
    """`value` as three positive ints (z, y, x)."""
    sizes: Sequence[int] = (value, value, value) if isinstance(value, int) else value
    if isinstance(sizes, str) or not isinstance(sizes, Sequence) or not all(isinstance(s, Integral) for s in sizes):
        raise TypeError(f"{name} must be an int or three ints (z, y, x), got {value!r}")
    if len(sizes) != 3 or any(s < 1 for s in sizes):
        raise ValueError(f"{name} must be a positive int or three of them (z, y, x), got {value!r}")
    return int(sizes[0]), int(sizes[1]), int(sizes[2])


def three_scales(name: str, value: float | Sequence[float]) -> tuple[float, float, float]:
    """`value` as three positive floats (z, y, x)."""
    scales: Sequence[float] = (value, value, value) if isinstance(value, int | float) else value
    if isinstance(scales, str) or not isinstance(scales, Sequence) or not all(isinstance(s, Real) for s in scales):
        raise TypeError(f"{name} must be a float or three floats (z, y, x), got {value!r}")
    if len(scales) != 3 or not all(0 < s < math.inf for s in scales):
        raise ValueError(f"{name} must be a positive float or three of them (z, y, x), got {value!r}")
    return float(scales[0]), float(scales[1]), float(scales[2])


def fraction(name: str, value: float) -> float:
    """`value` as a float in [0, 1]."""
    if not isinstance(value, Real) or isinstance(value, bool):
        raise TypeError(f"{name} must be a float in [0, 1], got {value!r}")
    if not 0 <= value <= 1:
        raise ValueError(f"{name} must be in [0, 1], got {value!r}")
    return float(value)
