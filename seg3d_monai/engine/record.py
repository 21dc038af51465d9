"""What a run leaves beside its checkpoints: the merged config, and versions, git state, threads and seed."""

from __future__ import annotations

import json
import platform
import re
import subprocess
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Any

import torch
from monai.bundle import ConfigParser

import seg3d_monai
from seg3d_monai.engine.checkpoint import replace_file
from seg3d_monai.engine.config import live_parser
from seg3d_monai.engine.replicas import rank
from seg3d_monai.user_errors import FULL

__all__ = ["record_run"]


def record_run(output_dir: str | Path, *, seed: int) -> None:
    """Write `config.json` (files and overrides merged, macros resolved) and `environment.json` under output_dir.

    Call it from a bundle's `initialize` list. It is the first write of a run, so it also finds a folder without
    permission before anything is computed. Of several processes that train together, the first one writes.

    Args:
        output_dir: folder of the run; made if missing.
        seed: seed of the run, recorded.

    Raises:
        ValueError: if output_dir cannot be written.
        OSError: if the disk is full.
    """
    if rank() > 0:
        return
    folder, parser = Path(output_dir), live_parser()
    environment = {
        "seed": seed,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "threads": torch.get_num_threads(),
        "interop_threads": torch.get_num_interop_threads(),
        "cuda": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "git": {
            "package": git_state(Path(seg3d_monai.__file__).parent, "__init__.py"),
            "bundle": git_state(_bundle_root(parser), "configs/metadata.json"),
        },
        "packages": installed_versions(),
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in (("config.json", parser.get()), ("environment.json", environment)):
            text = json.dumps(content, indent=2, default=str)
            replace_file(folder / name, lambda file, text=text: file.write(text.encode()))  # type: ignore[misc]
    except OSError as error:
        if error.errno in FULL:  # the folder is right
            raise
        raise ValueError(f"output_dir={str(folder)!r} cannot be written ({error}); choose another folder") from error


def installed_versions() -> dict[str, str]:
    """Versions of the package, of what it requires, and of what its optional extras bring as far as it is installed."""
    versions = {"seg3d_monai": seg3d_monai.__version__}
    try:
        needed = requires("seg3d_monai") or []
    except PackageNotFoundError:  # a source tree that is not installed
        needed = []
    for text in (text for text in needed if not re.search(r"extra == .(dev|all)\b", text)):
        name = re.split(r"[^\w.-]", text, maxsplit=1)[0]
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return versions


def git_state(folder: Path, file: str) -> dict[str, Any] | None:
    """What git knows of a folder: {"revision": commit, "dirty": whether anything in the folder differs from it}.

    Args:
        folder: of the package or bundle.
        file: name of one of its files. If git does not keep it the answer is None: a package that is installed in an
            environment inside some work tree does not belong to it.
    """

    def git(*words: str) -> str | None:
        command = ["git", "--no-optional-locks", "-C", str(folder), *words]
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
        return done.stdout.strip() if done.returncode == 0 else None

    try:
        if git("ls-files", "--error-unmatch", "--", file) is None:
            return None
        return {"revision": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain", "--", "."))}
    except (OSError, subprocess.TimeoutExpired):  # no git here, or a work tree that answers too slowly
        return None


def _bundle_root(parser: ConfigParser) -> Path:
    return Path(parser.get_parsed_content("bundle_root") if "bundle_root" in parser else ".")
