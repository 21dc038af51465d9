"""`seg3d plan`: from an index to a folder with a fingerprint, an overlay for each bundle, and their explanation.

Must not know: rules.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from seg3d_monai.data import CropIndex
from seg3d_monai.data.memory_limit import read_memory_limit
from seg3d_monai.planning.bundle_config import BundleConfig
from seg3d_monai.planning.explain import explained, in_short, measured
from seg3d_monai.planning.fingerprint import Fingerprint, take_fingerprint
from seg3d_monai.planning.plan import Plan, plan_bundle
from seg3d_monai.user_errors import write_whole

TRIPLES = {"crop_size": 1, "block_size": 1, "halo": 0}
"""Keys that are voxels (z, y, x), and the least of each."""
COUNTS = ("batch_size", "num_queries")


def write_plans(
    db: str | os.PathLike[str],
    output: str | os.PathLike[str],
    bundles: Sequence[tuple[Path, Sequence[str]]],
    *,
    memory: str | float = "8GB",
    given: Mapping[str, Any] | None = None,
    restart: bool = False,
    report: Callable[[str], None] = print,
) -> list[Plan]:
    """Plan bundles for the training volumes of an index, and write the plans.

    Writes `fingerprint.json`, `plan.txt`, and for each bundle NAME `NAME_train.json` and `NAME_inference.json`.

    Args:
        db: the crop index.
        output: folder to write; made if missing.
        bundles: folder of each bundle, and overlay files that it is planned on top of.
        memory: bytes, or text such as "8GB", that the tensors of a training or a prediction may take.
        given: keys of the bundles' configurations that the user has decided, and their values.
        restart: write over plans that are there and differ.
        report: told what was planned, in short.

    Returns:
        A plan for each bundle.

    Raises:
        FileNotFoundError: no index, or no bundle.
        FileExistsError: the folder holds another plan, perhaps edited, and `restart` is not set.
        ValueError: as `take_fingerprint` and `plan_bundle`; or a key that no bundle takes.
    """
    given = dict(given or {})
    for key, least in TRIPLES.items():
        if key in given:
            given[key] = _checked_triple(key, given[key], least)
    for key in COUNTS:
        if key in given and (isinstance(given[key], bool) or not isinstance(given[key], int) or given[key] < 1):
            raise ValueError(f"{key}={given[key]!r} is not a count; give an integer from 1")
    try:
        limit = read_memory_limit(memory) or 0
    except ValueError:
        raise ValueError(f'memory={memory!r} is no amount of memory; give bytes, or text such as "8GB"') from None
    configs = [BundleConfig(folder, overlays) for folder, overlays in bundles]
    _check_keys(given, configs)
    fingerprint = take_fingerprint(CropIndex(db))
    plans = [plan_bundle(fingerprint, config, limit, given) for config in configs]
    folder = Path(output)
    _write_all(folder, _files(fingerprint, plans, Path(db).name), restart)
    for plan in plans:
        report(in_short(plan))
    report(f"plan: {folder / 'plan.txt'}")
    for plan in plans:
        report(f"seg3d train {plan.bundle} --overlay {folder / plan.bundle}_train")
    return plans


def _files(fingerprint: Fingerprint, plans: Sequence[Plan], db: str) -> dict[str, str]:
    """Content of each file by its name."""
    facts = fingerprint.to_json()
    heading = f"Plan for {db}"
    parts = [f"{heading}\n{'=' * len(heading)}\n\n{measured(facts)}", *map(explained, plans)]
    files = {"fingerprint.json": _text(facts), "plan.txt": "\n\n\n".join(parts) + "\n"}
    for plan in plans:
        files |= {
            f"{plan.bundle}_train.json": _text(plan.train),
            f"{plan.bundle}_inference.json": _text(plan.inference),
        }
    return files


def _write_all(folder: Path, files: Mapping[str, str], restart: bool) -> None:
    others = [name for name, text in files.items() if _differs(folder / name, text)]
    if others and not restart:
        raise FileExistsError(
            f"{folder} holds another plan ({', '.join(others)} would change); choose another folder, or --restart"
        )
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        write_whole(folder / name, text)


def _differs(file: Path, text: str) -> bool:
    return file.exists() and file.read_text(encoding="utf-8") != text


def _text(content: Mapping[str, Any]) -> str:
    """JSON with a line for each key, which is easy to edit."""
    lines = [f"    {json.dumps(key)}: {json.dumps(entry)}" for key, entry in content.items()]
    return "{\n" + ",\n".join(lines) + "\n}\n"


def _checked_triple(key: str, given: Any, least: int) -> list[int]:
    is_triple = isinstance(given, list | tuple) and len(given) == 3
    if not is_triple or any(isinstance(n, bool) or not isinstance(n, int) or n < least for n in given):
        raise ValueError(f"{key}={given!r} is not three voxel counts from {least}; give [z,y,x]")
    return list(given)


def _check_keys(given: Mapping[str, Any], configs: Sequence[BundleConfig]) -> None:
    for key in given:
        if not any(config.takes(key) for config in configs):
            known = sorted({name for config in configs for name in config.siblings(key)})
            near = get_close_matches(key, known, n=1)
            mend = f"did you mean {near[0]}?" if near else f"choose from: {', '.join(known)}"
            raise ValueError(f"{key} is no key of {', '.join(config.name for config in configs)}; {mend}")
