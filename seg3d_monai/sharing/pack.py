"""A bundle as one zip that others unpack and run: configurations merged, weights inside, the same bytes each time."""

from __future__ import annotations

import io
import json
import os
import shutil
import stat
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from seg3d_monai.engine.checkpoint import read_spacing, replace_file, save_weights
from seg3d_monai.sharing.files import CONFIGS, bundle_files, read_config
from seg3d_monai.sharing.ids import SEPARATOR, merge, normalise
from seg3d_monai.sharing.metadata import METADATA, with_version
from seg3d_monai.sharing.weights import halved, read_plain, write_safetensors

TRAIN, INFERENCE = "configs/train.json", "configs/inference.json"
WEIGHTS, SAFETENSORS = "models/model.pt", "models/model.safetensors"
CHECKPOINT = "$@bundle_root + '/models/model.pt'"
ROOT = "."
LEFT_OUT = ("__pycache__", "runs", "mlruns")
"""Folders, beside hidden ones and files, compiled Python, and the note that no weights are shipped."""
_NO_WEIGHTS_NOTE = "models/README.md"
_EARLIEST = (1980, 1, 1, 0, 0, 0)
"""Of every file in the zip, so that it does not tell when it was made."""


@dataclass(frozen=True, kw_only=True)
class Packed:
    """What was written.

    file: the zip.
    names: of the files in it.
    weights: where the weights came from, None without.
    """

    file: Path
    names: tuple[str, ...]
    weights: Path | None


def pack_bundle(
    folder: Path,
    target: Path,
    *,
    checkpoint: Path | None = None,
    overlays: Sequence[Path] = (),
    safetensors: bool = False,
    half: bool = False,
    version: str | None = None,
    changes: str | None = None,
    overwrite: bool = False,
) -> Packed:
    """Write a bundle as a zip with one folder of the bundle's name.

    Args:
        folder: The bundle; it is not changed.
        target: The zip to write.
        checkpoint: Weights to put in as models/model.pt; None takes those of the bundle, if any.
        overlays: Files merged into train.json and inference.json; the inference takes the keys that it has.
        safetensors: Write the weights as models/model.safetensors too.
        half: Keep kernels and matrices as float16.
        version: New version in the metadata; None leaves it.
        changes: What changed, for the changelog.
        overwrite: Replace the target.

    Raises:
        FileNotFoundError: If the target's folder, the weights or an overlay do not exist.
        ValueError: If the target exists, is no zip or lies in the bundle; if the weights hold anything but tensors and
            numbers, or numbers that do not fit; if an overlay's key is in no configuration; if the version is none or
            not a new one.
    """
    _check_target(folder, target, overwrite)
    if (version is None) != (changes is None):
        raise ValueError("--version and --changelog belong together; give both or none")
    files: dict[str, Path | bytes] = {name: folder / name for name in _packed_names(folder)}
    files |= _configs(folder, files, overlays)
    metadata = _section(folder / METADATA) if METADATA in files or version is not None else {}
    if version is not None and changes is not None:
        files[METADATA] = _json(with_version(metadata, version, changes))
    weights = checkpoint or (folder / WEIGHTS if WEIGHTS in files else None)
    if weights is None and (safetensors or half):
        raise ValueError(f"--{'safetensors' if safetensors else 'half'}: there are no weights; give --checkpoint")
    if weights is not None:
        files |= _weights(weights, safetensors, half)
        files.pop(_NO_WEIGHTS_NOTE, None)
    top = folder.resolve().name
    replace_file(target, lambda file: _write(file, {f"{top}/{name}": content for name, content in files.items()}))
    return Packed(file=target, names=tuple(sorted(files)), weights=weights)


def _check_target(folder: Path, target: Path, overwrite: bool) -> None:
    if target.suffix.lower() != ".zip":
        raise ValueError(f"{str(target)!r} is no name of a zip; end it in .zip")
    if not target.absolute().parent.is_dir():
        raise FileNotFoundError(f"{str(target)!r}: its folder does not exist; make it first")
    if target.resolve().is_relative_to(folder.resolve()):
        raise ValueError(f"{str(target)!r} lies in the bundle itself; write it elsewhere")
    if target.is_dir() or (target.exists() and not overwrite):
        raise ValueError(f"{str(target)!r} exists already; give --overwrite or another name")


def _packed_names(folder: Path) -> list[str]:
    names = []
    for name in bundle_files(folder):
        parts = name.split("/")
        hidden = any(part.startswith(".") for part in parts)
        if hidden or set(parts[:-1]) & set(LEFT_OUT) or name.endswith((".pyc", ".tmp", ".part")):
            continue
        if stat.S_ISREG(os.stat(folder / name).st_mode):  # what a link shows is packed, folders that are links are not
            names.append(name)
    return names


def _configs(folder: Path, files: Mapping[str, Any], overlays: Sequence[Path]) -> dict[str, bytes]:
    """The configurations that change: overlays merged in, the bundle's root and weights where they are unpacked."""
    named = [name for name in files if name.startswith("configs/") and name.count("/") == 1]
    if any(Path(name).stem in ("train", "inference") and not name.endswith(".json") for name in named):
        raise ValueError("the bundle's configurations are YAML; seg3d bundle pack merges JSON")
    before = {name: _section(folder / name) for name in named if name.endswith(CONFIGS) and name != METADATA}
    after = dict(before)
    known = {key for name in (TRAIN, INFERENCE) for key in before.get(name, {})}
    for overlay in overlays:
        changes = _section(overlay)
        unknown = [key for key in changes if _top(key) not in known]
        if unknown:
            raise ValueError(f"overlay {str(overlay)!r}: no configuration has the key {unknown[0]!r}")
        for name in (TRAIN, INFERENCE):
            if name in after:
                kept = {key: value for key, value in changes.items() if _top(key) in before[name]}
                after[name] = merge(after[name], kept)
    for name, config in after.items():
        places = {"bundle_root": ROOT} | ({"checkpoint": CHECKPOINT} if name == INFERENCE else {})
        after[name] = {key: places.get(key, value) for key, value in config.items()}
    return {name: _json(config) for name, config in after.items() if config != before[name]}


def _top(key: str) -> str:
    return normalise(key).removeprefix("+").partition(SEPARATOR)[0]


def _section(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise FileNotFoundError(f"{str(file)!r} does not exist; a bundle has it")
    try:
        content = read_config(file)
    except ValueError as error:
        raise ValueError(f"{str(file)!r} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{str(file)!r} holds no keys; a configuration is {{key: value}}")
    return content


def _json(content: Mapping[str, Any]) -> bytes:
    return (json.dumps(content, indent=4, ensure_ascii=False) + "\n").encode()


def _weights(source: Path, safetensors: bool, half: bool) -> dict[str, Path | bytes]:
    if source.suffix == ".safetensors":
        raise ValueError(f"--checkpoint {str(source)!r}: give the model.pt; --safetensors writes the other form")
    weights = read_plain(source)
    files: dict[str, Path | bytes] = {WEIGHTS: source}
    if half:
        weights, buffer = halved(weights, source), io.BytesIO()
        save_weights(buffer, weights, read_spacing(source))
        files[WEIGHTS] = buffer.getvalue()
    if safetensors:
        buffer = io.BytesIO()
        write_safetensors(weights, source, buffer)
        files[SAFETENSORS] = buffer.getvalue()
    return files


def _write(file: IO[bytes], files: Mapping[str, Path | bytes]) -> None:
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in sorted(files):
            content = files[name]
            info = zipfile.ZipInfo(name, _EARLIEST)
            info.create_system = 3  # Unix, wherever it is made
            info.external_attr = (stat.S_IFREG | 0o644) << 16
            # Weights do not shrink, and stored ones can be read without unpacking.
            info.compress_type = zipfile.ZIP_STORED if "/models/" in name else zipfile.ZIP_DEFLATED
            source = io.BytesIO(content) if isinstance(content, bytes) else content.open("rb")
            with source, archive.open(info, "w", force_zip64=True) as packed:
                shutil.copyfileobj(source, packed, 2**20)
