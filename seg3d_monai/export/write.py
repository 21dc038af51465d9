"""Writes the dense part of a bundle's network to a file, runs the file, and keeps it if it computes the same."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from seg3d_monai import __version__
from seg3d_monai.export.dense import DensePart
from seg3d_monai.export.formats import INPUT, OPSET, file_format
from seg3d_monai.export.source import random_images, read_source

TOLERANCE = 1e-3
"""Largest difference that a file may show in an output, as a share of the output's largest number."""


@dataclass(frozen=True)
class Difference:
    """Of one output: the largest absolute difference, and that as a share of the output's largest number."""

    absolute: float
    relative: float


def check_target(out: str, overwrite: bool) -> Path:
    """The file to write, before anything has been done.

    Raises:
        ValueError: an ending that is no format.
        ImportError: what the format needs is not installed.
        FileNotFoundError: its folder does not exist.
        FileExistsError: it, or its description X.json, exists already.
    """
    path = Path(out)
    file_format(path)
    if not path.absolute().parent.is_dir():
        raise FileNotFoundError(f"{out!r}: its folder does not exist; make it first")
    for existing in (path, path.with_suffix(".json")):
        if existing.is_dir() or (existing.exists() and not overwrite):
            raise FileExistsError(f"{str(existing)!r} exists; choose another name or give --overwrite")
    return path


def export_bundle(
    folder: Path,
    files: Sequence[str],
    path: Path,
    *,
    checkpoint: str | None = None,
    shape: Sequence[int] | None = None,
    batch: int = 1,
) -> dict[str, Difference]:
    """Write X.pt2, X.onnx or X.ts, and X.json, which describes it.

    Args:
        folder: of the bundle.
        files: its configuration of inference, then overlays.
        path: file to write; an existing one is replaced once the new one is whole.
        checkpoint: trained weights; None: those that the configuration names.
        shape: (D, H, W) voxels of the input; None: of the bundle's block with its halo.
        batch: images at a time.

    Returns:
        How far the file's outputs are from the network's, by name.

    Raises:
        FileNotFoundError, ValueError, TypeError: as `read_source` and `ExportSource.input_shape`; a network that cannot
            be written in this format; outputs that differ by more than `TOLERANCE`.
    """
    source = read_source(folder, files, checkpoint)
    size = source.input_shape(shape, batch)
    dense = DensePart(source.network).eval()
    example, images = random_images(size, 0), random_images(size, 1)
    with torch.no_grad():
        expected = dense(images)
    form = file_format(path)
    partial, described = (path.with_name(f".{path.stem}.{os.getpid()}{suffix}") for suffix in (path.suffix, ".json"))
    try:
        form.write(dense, example, partial)
        with torch.no_grad():
            found = form.read(partial, list(expected))(images)
        differences = compare_outputs(expected, found)
        content = {
            "format": "seg3d_monai.export",
            "version": 1,
            "made_by": {"seg3d_monai": __version__, "torch": torch.__version__},
            "file": path.name,
            "opset": OPSET if path.suffix == ".onnx" else None,
            "input": {"name": INPUT, "shape": list(size), "axes": "NCZYX", "dtype": "float32"},
            "outputs": {name: {"shape": list(values.shape), "dtype": "float32"} for name, values in expected.items()},
            **source.facts(expected),
            "differences": {name: vars(difference) for name, difference in differences.items()},
        }
        described.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        os.replace(partial, path)
        os.replace(described, path.with_suffix(".json"))
    finally:
        partial.unlink(missing_ok=True)
        described.unlink(missing_ok=True)
    return differences


def compare_outputs(expected: Mapping[str, Tensor], found: Mapping[str, Any]) -> dict[str, Difference]:
    """How far outputs are from those expected.

    Raises:
        ValueError: another shape, a number that is not finite, or a difference above `TOLERANCE`.
    """
    differences = {}
    for name, values in expected.items():
        other = found[name]
        if values.shape != other.shape or values.dtype != other.dtype:
            raise ValueError(
                f"the file gives {name} as {other.dtype} {tuple(other.shape)} instead of {values.dtype} "
                f"{tuple(values.shape)}, and is not kept"
            )
        absolute = float((values - other).abs().max())
        relative = absolute / max(float(values.abs().max()), torch.finfo(torch.float32).tiny)
        if not relative <= TOLERANCE:  # nor NaN
            raise ValueError(
                f"the file's {name} differs from the network's by {absolute:.3g}, {relative:.3g} of its largest "
                f"number, where {TOLERANCE:g} is allowed, and is not kept; try another format"
            )
        differences[name] = Difference(absolute, relative)
    return differences
