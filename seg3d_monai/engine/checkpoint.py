"""Checkpoint files: atomic, format-versioned, checked when read, with the one before kept.

`last.pt` and `last.prev.pt` hold the whole state of a training, `best.pt` the same at the best validation, `model.pt`
plain weights (a state dict); each keeps the voxel size of the training, if it is known. All are zip archives of
`torch.save` that load with `weights_only=True`; reading verifies their CRCs, so that a torn or flipped file is named
instead of used. Weights are also read from `.safetensors`. This module must not know what the state means.
"""

from __future__ import annotations

import json
import logging
import os
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, TypeVar

import torch
from torch import Tensor, nn

__all__ = [
    "adapt_input_channels",
    "load_weights",
    "read_checkpoint",
    "read_last",
    "read_spacing",
    "replace_file",
    "start_from",
    "write_checkpoint",
    "write_last",
    "write_weights",
]

FORMAT = "seg3d_monai.checkpoint"
VERSION = 1
SPACING = "spacing_um"
_BACKBONE = "backbone"
"""What networks call their backbone, and pyramids what is beneath them."""
logger = logging.getLogger(__name__)
_Network = TypeVar("_Network", bound=nn.Module)


def replace_file(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Write a file beside its place, flush it to the disk, then move it there; on any failure the old one stays.

    Args:
        path: the file's place; its folder must exist.
        write: writes the content to an open binary file.

    Raises:
        OSError: if the disk is full or the folder cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_checkpoint(path: Path, state: Mapping[str, Any]) -> None:
    """Write a training state (tensors, numbers, strings, containers of them) atomically."""
    content = {"format": FORMAT, "version": VERSION, **state}
    replace_file(path, lambda file: torch.save(content, file))


def write_last(folder: Path, state: Mapping[str, Any]) -> None:
    """Write `last.pt`; the one before becomes `last.prev.pt`."""
    incoming = folder / "last.new.pt"
    write_checkpoint(incoming, state)  # first, so that a full disk leaves both older files alone
    if (folder / "last.pt").exists():
        os.replace(folder / "last.pt", folder / "last.prev.pt")
    os.replace(incoming, folder / "last.pt")


def write_weights(path: Path, weights: Mapping[str, Tensor], spacing_um: Sequence[float] | None = None) -> None:
    """Write a plain state dict atomically.

    Args:
        path: the file's place.
        weights: tensors by name.
        spacing_um: (z, y, x) micrometres per voxel of the training; kept where torch keeps facts about a state dict, in
            its attribute `_metadata`, so that it stays one of tensors alone.
    """
    replace_file(path, lambda file: save_weights(file, weights, spacing_um))


def save_weights(file: IO[bytes], weights: Mapping[str, Any], spacing_um: Sequence[float] | None = None) -> None:
    """Write to an open file what `write_weights` writes."""
    plain: dict[str, Any] = OrderedDict(weights)
    if spacing_um is not None:
        plain._metadata = {"": {SPACING: list(spacing_um)}}  # type: ignore[attr-defined]
    torch.save(plain, file)


def read_last(folder: Path) -> dict[str, Any] | None:
    """Read `last.pt`, or the one before if it is missing or damaged (a warning names it); None if there is none.

    Raises:
        ValueError: if files exist and every one is damaged.
    """
    paths = [path for path in (folder / "last.pt", folder / "last.prev.pt") if path.exists()]
    faults = []
    for path in paths:
        try:
            return read_checkpoint(path)
        except ValueError as error:
            logger.warning("%s", error)
            faults.append(str(error))
    if faults:
        raise ValueError("; ".join(faults))
    return None


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a training state.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is damaged, no checkpoint of this package, or of a later format.
    """
    state = _read(Path(path))
    if state.get("format") != FORMAT:
        raise ValueError(f"{str(path)!r} is not a training checkpoint; give a last.pt or best.pt")
    if state["version"] > VERSION:
        raise ValueError(f"{str(path)!r} has format version {state['version']}, known is {VERSION}; update seg3d_monai")
    return state


def read_spacing(path: str | Path) -> tuple[float, float, float] | None:
    """The voxel size (z, y, x) in micrometres that a network was trained with.

    Args:
        path: as `load_weights` takes it.

    Returns:
        None where the file does not say it, or is not there yet.

    Raises:
        ValueError: if the file is damaged.
    """
    if not Path(path).is_file():
        return None
    state = _read(Path(path))
    facts = state if state.get("format") == FORMAT else getattr(state, "_metadata", {}).get("", {})
    found = facts.get(SPACING)
    return None if found is None else (float(found[0]), float(found[1]), float(found[2]))


def adapt_input_channels(weights: Mapping[str, Tensor], network: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Fit weights to a network whose images have another number of channels, as timm does.

    The first convolution is the one weight whose shape differs, and that in its input channels only. To one channel its
    weights are summed, which answers to a grey image as before; to more or fewer they are repeated in turn, cut and
    scaled by old / new, which keeps the size of the activations.

    Args:
        weights: state dict; it is not changed.
        network: state dict of the network that shall receive it.

    Returns:
        The weights, the first convolution replaced where it has to be.

    Raises:
        ValueError: if anything but the input channels of one convolution differs in shape.
    """
    differing = sorted(key for key in weights.keys() & network.keys() if weights[key].shape != network[key].shape)
    adapted = dict(weights)
    if not differing:
        return adapted
    old, new = weights[differing[0]].shape, network[differing[0]].shape
    is_input = len(differing) == 1 and len(old) == len(new) >= 3 and old[:1] + old[2:] == new[:1] + new[2:]
    if not is_input:
        listed = ", ".join(f"{k} {tuple(weights[k].shape)} instead of {tuple(network[k].shape)}" for k in differing[:4])
        raise ValueError(
            f"the weights differ in more than the input channels of one convolution ({len(differing)} differently "
            f"shaped: {listed}{', …' if len(differing) > 4 else ''}); use the configuration they were trained with"
        )
    kernel = weights[differing[0]]
    if new[1] == 1:
        kernel = kernel.sum(1, keepdim=True)
    else:
        turns = -(-new[1] // old[1])
        kernel = torch.cat([kernel] * turns, 1)[:, : new[1]] * (old[1] / new[1])
    adapted[differing[0]] = kernel
    return adapted


def start_from(
    network: _Network, initial_weights: str | Path | None, backbone_weights: str | Path | None = None
) -> _Network:
    """The network with the weights that a training starts from, where a file is given; other image channels adapted.

    Args:
        network: receives the weights, in place.
        initial_weights: of the whole network, as `load_weights` takes it; None leaves it as it is.
        backbone_weights: of a network with the same backbone, such as one that was pre-trained without labels: only
            what lies beneath pyramids is taken, after `initial_weights`.

    Returns:
        The network.

    Raises:
        FileNotFoundError, ValueError: as `load_weights`.
    """
    if initial_weights:
        load_weights(network, initial_weights, adapt_input=True)
    if backbone_weights:
        weights = _of_backbone(_plain_weights(Path(backbone_weights)))
        if not weights:
            raise ValueError(f"{str(backbone_weights)!r} holds no backbone; give the model.pt of a pre-training")
        backbone = network.get_submodule(_BACKBONE)
        beneath = backbone.get_submodule(_BACKBONE) if hasattr(backbone, _BACKBONE) else backbone
        _load(beneath, weights, backbone_weights, adapt_input=True)
    return network


def load_weights(network: _Network, path: str | Path, *, adapt_input: bool = False) -> _Network:
    """Load a plain state dict (`model.pt`) or the evaluated weights of a training checkpoint into a network.

    Args:
        network: receives the weights, in place; every key and shape must agree.
        path: file of `write_weights`, `write_checkpoint` or any `torch.save(state_dict)`, or a `.safetensors`.
        adapt_input: whether weights for another number of image channels are adapted, with a warning. That is a start
            for a training; for a prediction it would hide that the image is not what the network was trained on.

    Returns:
        The network, so that a config can write `"$load_weights(@network_def, @ckpt_path)"`.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is damaged, or naming the missing, unexpected and differently shaped keys.
    """
    return _load(network, _plain_weights(Path(path)), path, adapt_input=adapt_input)


def _plain_weights(path: Path) -> dict[str, Tensor]:
    """The state dict of a file, or the evaluated weights of a training checkpoint."""
    weights = _read(path)
    if weights.get("format") == FORMAT:
        weights = weights["ema"] or weights["network"]
    return weights


def _of_backbone(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights of the backbone, by its own keys; pyramids over it are left out."""
    beneath = f"{_BACKBONE}.{_BACKBONE}."
    prefix = beneath if any(key.startswith(beneath) for key in weights) else f"{_BACKBONE}."
    return {key.removeprefix(prefix): value for key, value in weights.items() if key.startswith(prefix)}


def _load(network: _Network, weights: dict[str, Tensor], path: str | Path, *, adapt_input: bool) -> _Network:
    """Load weights of which every key and shape must agree; see `load_weights`."""
    own = network.state_dict()
    if adapt_input:
        try:
            adapted = adapt_input_channels(weights, own)
        except ValueError as error:
            raise ValueError(f"{str(path)!r} does not fit the network: {error}") from error
        for key in weights.keys() & own.keys():
            if weights[key].shape != adapted[key].shape:
                old, new = weights[key].shape[1], adapted[key].shape[1]
                logger.warning("%r: %s was adapted from %d input channels to %d", str(path), key, old, new)
        weights = adapted
    shapes = [
        f"{k} {tuple(weights[k].shape)} instead of {tuple(own[k].shape)}"
        for k in own.keys() & weights.keys()
        if weights[k].shape != own[k].shape
    ]
    faults = {
        "missing": sorted(own.keys() - weights.keys()),
        "unexpected": sorted(weights.keys() - own.keys()),
        "differently shaped": sorted(shapes),
    }
    if any(faults.values()):
        listed = "; ".join(
            f"{len(keys)} {name}: {', '.join(keys[:4])}{', …' if len(keys) > 4 else ''}"
            for name, keys in faults.items()
            if keys
        )
        raise ValueError(
            f"{str(path)!r} does not fit the network ({listed}); use the configuration it was trained with"
        )
    network.load_state_dict(weights)
    return network


def _read(path: Path) -> dict[str, Any]:
    if path.is_dir():
        raise ValueError(f"{str(path)!r} is a folder; give the checkpoint in it, such as {str(path / 'model.pt')!r}")
    if not path.is_file():
        raise FileNotFoundError(f"{str(path)!r} does not exist; train first or give another checkpoint")
    try:
        if path.suffix == ".safetensors":
            return _read_safetensors(path)
        with zipfile.ZipFile(path) as archive:
            if (bad := archive.testzip()) is not None:
                raise zipfile.BadZipFile(f"CRC of {bad}")
        state = torch.load(path, map_location="cpu", weights_only=True)
    except ImportError:  # names its extra
        raise
    except Exception as error:  # torch.load raises many kinds for a damaged file
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"{str(path)!r} is damaged or no checkpoint ({reason}); give another, or delete it if a training made it"
        ) from error
    if not isinstance(state, dict):
        raise ValueError(f"{str(path)!r} holds a {type(state).__name__}, not weights; give a checkpoint")
    return state


def _read_safetensors(path: Path) -> dict[str, Any]:
    """A state dict of safetensors; the voxel size stands in its header."""
    try:
        from safetensors import safe_open
    except ImportError as error:
        raise ImportError(f"{str(path)!r} needs safetensors: pip install 'seg3d_monai[share]'") from error
    with safe_open(path, framework="pt") as file:
        weights: dict[str, Any] = OrderedDict((key, file.get_tensor(key)) for key in file.keys())  # noqa: SIM118
        spacing_um = (file.metadata() or {}).get(SPACING)
    if spacing_um is not None:
        weights._metadata = {"": {SPACING: json.loads(spacing_um)}}  # type: ignore[attr-defined]
    return weights
