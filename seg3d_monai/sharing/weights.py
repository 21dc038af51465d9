"""Weights of a bundle: read so that they cannot run code, looked through, and written as safetensors.

A pickle may call anything when it is loaded; `weights_only` restricts it to tensors and plain containers.
"""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from seg3d_monai.engine.checkpoint import SPACING, read_spacing

MOST_GROWTH = 4
"""Of unpacked to packed bytes; torch itself does not compress."""
SMALL = 2**20


def read_plain(path: Path) -> dict[str, Any]:
    """The state dict of a file, read without running what stands in it.

    Args:
        path: A file of `torch.save(state_dict)`, or `.safetensors`.

    Returns:
        Tensors and numbers by name.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is damaged, would run code, unpacks to much more than its size, or holds anything but tensors
            and numbers.
        ImportError: Naming the extra, for safetensors without its library.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{str(path)!r} does not exist; give the model.pt of a training")
    try:
        state = _library(path).load_file(path) if path.suffix == ".safetensors" else _unpickled(path)
    except ImportError:  # names its extra
        raise
    except Exception as error:  # torch.load raises many kinds
        reason = (str(error) or type(error).__name__).splitlines()[0]
        reason = re.split(r"(?<=[.:])\s", reason)[0].rstrip(".:")  # torch goes on with how to load it all the same
        raise ValueError(
            f"{str(path)!r} holds more than weights, or is damaged; it is not loaded: {reason}; give the model.pt of a "
            "training"
        ) from error
    if not isinstance(state, Mapping):
        raise ValueError(f"{str(path)!r} holds a {type(state).__name__}, not weights by name")
    for key, value in state.items():
        if not isinstance(key, str) or not isinstance(value, Tensor | int | float):
            kind = type(value).__name__
            raise ValueError(
                f"{str(path)!r} holds a {kind} at {key!r}, not weights alone; give the model.pt of a training"
            )
    return dict(state)


def halved(weights: Mapping[str, Any], source: Path) -> dict[str, Any]:
    """Kernels and matrices as float16, in half of the bytes; what has one axis, such as norms, stays as it is.

    Networks load them as the float32 that they compute with.

    Args:
        weights: What `read_plain` returns.
        source: The file that they were read from.

    Raises:
        ValueError: If a number is too large for float16, or none; the message names the weight.
    """
    found = dict(weights)
    for key, value in weights.items():
        if isinstance(value, Tensor) and value.dtype == torch.float32 and value.dim() > 1:
            found[key] = value.half()
            if not found[key].isfinite().all():
                raise ValueError(f"--half: {key!r} of {str(source)!r} has numbers too large for float16; leave it out")
    return found


def write_safetensors(weights: Mapping[str, Any], source: Path, file: IO[bytes]) -> None:
    """Write weights as safetensors; the voxel size of the training, if known, goes to the header.

    Args:
        weights: What `read_plain` returns.
        source: The file that they were read from.
        file: Open for writing.

    Raises:
        ValueError: If there is a number beside the tensors, which safetensors cannot hold.
        ImportError: Naming the extra.
    """
    numbers = [key for key, value in weights.items() if not isinstance(value, Tensor)]
    if numbers:
        raise ValueError(f"--safetensors: {numbers[0]!r} is a number; safetensors holds tensors only")
    spacing_um = read_spacing(source)
    header = {"format": "pt"} | ({SPACING: json.dumps(list(spacing_um))} if spacing_um else {})
    plain = {key: weights[key].clone().contiguous() for key in sorted(weights)}  # shared memory is refused
    file.write(_library(source).save(plain, header))


def _unpickled(path: Path) -> Any:
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            size = sum(info.file_size for info in archive.infolist())
        if size > max(SMALL, MOST_GROWTH * path.stat().st_size):
            raise ValueError(f"it unpacks to {size:,} bytes")
    return torch.load(path, map_location="cpu", weights_only=True)


def _library(path: Path) -> Any:
    try:
        import safetensors.torch
    except ImportError as error:
        raise ImportError(f"{path.name!r} needs safetensors: pip install 'seg3d_monai[share]'") from error
    return safetensors.torch
