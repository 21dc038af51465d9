"""Checks of a bundle against the model zoo's format that run nothing of it: files, configurations, metadata, weights.

The rules are those of MONAI's bundle specification and of the model zoo's own verification. What does run the bundle is
check_run.py.
"""

from __future__ import annotations

import configparser
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from seg3d_monai.sharing.expressions import Finding, list_code, list_logging
from seg3d_monai.sharing.files import CODE, bundle_file, bundle_files, links_outside, read_configs
from seg3d_monai.sharing.ids import merge, missing_references
from seg3d_monai.sharing.metadata import METADATA, find_schema, packages, schema_faults, version_faults
from seg3d_monai.sharing.weights import read_plain

PASSED, WARNING, FAILED, NOT_CHECKED = "passed", "warning", "failed", "not checked"
LOGGING = "configs/logging.conf"
RUN_CONFIGS = ("train", "evaluate", "inference", "multi_gpu_train")
WEIGHTS = ("models/model.pt", "models/model.safetensors")
_DOCUMENTS = ("LICENSE", "docs/README.md", "docs/data_license.txt")
_BASES = ((), ("train",), ("inference",))
"""What a configuration is run on top of, tried in turn."""
_TOLD = 3


@dataclass(frozen=True, kw_only=True)
class Check:
    """One check: its name, one of the results of this module, and one line of why."""

    name: str
    result: str
    why: str


@dataclass(frozen=True, kw_only=True)
class Content:
    """What stands in a bundle, read and not run.

    folder: the bundle.
    configs: parsed configurations by name.
    faults: the reason by name, of those that cannot be read.
    findings: what they would run.
    code: names of files that run by themselves.
    """

    folder: Path
    configs: Mapping[str, Any]
    faults: Mapping[str, str]
    findings: Sequence[Finding]
    code: Sequence[str]

    @property
    def marked(self) -> list[Finding]:
        """Findings that somebody should read before anything is run."""
        return [finding for finding in self.findings if finding.marks]


def read_content(folder: Path) -> Content:
    """Read a bundle and list what it would run.

    Args:
        folder: The bundle.
    """
    configs, faults = read_configs(folder)
    findings = list_code(configs)
    if (folder / LOGGING).is_file():
        findings += list_logging(LOGGING, _text(folder / LOGGING))
    code = [name for name in bundle_files(folder) if name.lower().endswith(CODE)]
    return Content(folder=folder, configs=configs, faults=faults, findings=findings, code=code)


def check_format(content: Content, schema: Path | None = None) -> list[Check]:
    """Run every check that needs nothing of the bundle to run.

    Args:
        content: What `read_content` returns.
        schema: JSON schema of the metadata; see `metadata.find_schema`.

    Raises:
        FileNotFoundError, ValueError: If the schema cannot be read.
    """
    checks = [*_files(content), *_configs(content), _logging(content), *_references(content)]
    return [*checks, *_metadata(content, schema), _weights(content)]


def weights_file(folder: Path) -> Path | None:
    """The weights that a bundle ships, None where there are none."""
    return next((folder / name for name in WEIGHTS if (folder / name).is_file()), None)


def _files(content: Content) -> list[Check]:
    folder = content.folder
    checks = [_present(name, (folder / name).is_file()) for name in _DOCUMENTS]
    checks += [
        _present(f"configs/{name}.json", bundle_file(folder, f"configs/{name}") is not None) for name in RUN_CONFIGS
    ]
    checks.append(_present(METADATA, (folder / METADATA).is_file()))
    if weights_file(folder) is not None or bundle_file(folder, "large_files") is not None:
        checks.append(_present(WEIGHTS[0], True))
    else:
        checks.append(
            Check(name=f"file {WEIGHTS[0]}", result=WARNING, why="none is shipped, nor named by large_files.yml")
        )
    outside = links_outside(folder)
    why = f"{_some(outside)} lead out of the bundle; seg3d bundle pack writes what they show" if outside else "none"
    return [*checks, Check(name="links out of the bundle", result=WARNING if outside else PASSED, why=why)]


def _present(name: str, is_there: bool) -> Check:
    return Check(
        name=f"file {name}", result=PASSED if is_there else FAILED, why="is there" if is_there else "is missing"
    )


def _configs(content: Content) -> list[Check]:
    broken = [f"{name}: {why}" for name, why in content.faults.items()]
    broken += [f"{name}: it holds no keys" for name, config in content.configs.items() if not _is_section(name, config)]
    return [_judged("configurations parse", broken, f"{len(content.configs)} files")]


def _is_section(name: str, config: Any) -> bool:
    return isinstance(config, Mapping) or not name.startswith("configs/")


def _logging(content: Content) -> Check:
    file = content.folder / LOGGING
    if not file.is_file():
        return Check(name=LOGGING, result=FAILED, why="is missing")
    parser = configparser.RawConfigParser()
    try:
        parser.read_string(_text(file))
    except configparser.Error as error:
        return Check(name=LOGGING, result=FAILED, why=" ".join(str(error).split()))
    lacking = [f"no section {name}" for name in ("loggers", "handlers", "formatters") if not parser.has_section(name)]
    return _judged(LOGGING, lacking, "can be parsed")


def _references(content: Content) -> list[Check]:
    """Of each configuration alone or, where that is not enough, on top of the training's or the inference's."""
    checks = []
    by_stem = {Path(name).stem: name for name in content.configs if name.count("/") == 1 and name != METADATA}
    by_stem = {stem: name for stem, name in by_stem.items() if name.startswith("configs/")}
    for stem, name in sorted(by_stem.items()):
        attempts = []
        for bases in _BASES:
            if stem in bases or any(base not in by_stem for base in bases):
                continue
            try:
                merged = merge(*(content.configs[by_stem[base]] for base in bases), content.configs[name])
            except ValueError as error:
                attempts.append([str(error)])
                continue
            merged["_meta_"] = content.configs.get(METADATA, {})
            attempts.append(missing_references(merged, content.configs))
        checks.append(_judged(f"references of {name}", min(attempts, key=len), "all lead somewhere"))
    return checks


def _metadata(content: Content, schema: Path | None) -> list[Check]:
    names = ("metadata schema", "version and changelog", "required packages")
    metadata = content.configs.get(METADATA)
    if not isinstance(metadata, Mapping):
        return [Check(name=name, result=NOT_CHECKED, why=f"{METADATA} cannot be read") for name in names]
    parsed, place = find_schema(content.folder, metadata, schema)
    try:
        if parsed is None:
            checks = [Check(name=names[0], result=NOT_CHECKED, why=place)]
        else:
            checks = [_judged(names[0], schema_faults(metadata, parsed), f"valid by {place}")]
    except ImportError as error:
        checks = [Check(name=names[0], result=NOT_CHECKED, why=str(error))]
    checks.append(_judged(names[1], version_faults(metadata), f"version {metadata.get('version')}"))
    try:
        told, lacking = packages(metadata)
    except ValueError as error:
        return [*checks, Check(name=names[2], result=FAILED, why=str(error))]
    why = "; ".join([*lacking, f"installed: {', '.join(told) or 'none'}"])
    return [*checks, Check(name=names[2], result=WARNING if lacking else PASSED, why=why)]


def _weights(content: Content) -> Check:
    file = weights_file(content.folder)
    if file is None:
        return Check(name="weights are weights alone", result=NOT_CHECKED, why="none are shipped")
    name = file.relative_to(content.folder).as_posix()
    try:
        weights = read_plain(file)
    except (ValueError, OSError) as error:
        return Check(name="weights are weights alone", result=FAILED, why=str(error).replace(str(file), name))
    except ImportError as error:
        return Check(name="weights are weights alone", result=NOT_CHECKED, why=str(error))
    return Check(name="weights are weights alone", result=PASSED, why=f"{name}, {len(weights)} tensors")


def _judged(name: str, faults: Sequence[str], good: str) -> Check:
    return Check(name=name, result=FAILED if faults else PASSED, why=_some(faults) if faults else good)


def _some(lines: Sequence[str]) -> str:
    more = f"; and {len(lines) - _TOLD} more" if len(lines) > _TOLD else ""
    return "; ".join(lines[:_TOLD]) + more


def _text(file: Path) -> str:
    return file.read_text(encoding="utf-8", errors="replace")
