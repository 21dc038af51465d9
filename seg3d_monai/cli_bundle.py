"""Finds a bundle's configuration files and runs them with `monai.bundle.run`, the keys of overrides checked first.

It adds nothing to what the configuration says. A misspelt key's first part is refused here, before MONAI is imported;
what lies behind a `#` is checked by the bundle itself. Bundles are MONAI bundles: a folder with `configs/`, overlays
in `configs/overlays/`.
"""

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fire.parser import DefaultParseValue

from seg3d_monai.cli_arguments import UsageError, nearest
from seg3d_monai.shipped import shipped_bundle, shipped_bundles

# Arguments of monai.bundle.run itself, which no configuration file declares.
RUN_ARGUMENTS = ("init_id", "final_id", "meta_file", "logging_file", "tracking", "args_file")


def find_bundle(bundle: str) -> Path:
    """The folder of a bundle.

    Args:
        bundle: A folder, or the name of a folder in ./bundles or of one of the package's own bundles; `bundles/NAME`,
            as the configurations call theirs, is the latter wherever the user stands.

    Raises:
        FileNotFoundError: If none of them holds configs/.
    """
    name = Path(bundle)
    for folder in (name, Path("bundles") / name, shipped_bundle(name)):
        if (folder / "configs").is_dir():
            return folder
    if name.is_dir():
        raise FileNotFoundError(f"bundle {bundle!r} has no folder configs; name a MONAI bundle's own folder")
    known = {path.parent.name for root in {Path("bundles"), shipped_bundles()} for path in root.glob("*/configs")}
    raise FileNotFoundError(f"bundle {bundle!r} does not exist; {nearest(Path(bundle).name, known)}")


def config_files(folder: Path, config_file: str | None, default: str) -> list[str]:
    """The configuration files to run: those named, by path or by name in the bundle, else the bundle's default.

    Args:
        folder: The bundle.
        config_file: One name, or several as monai.bundle takes them, `"['a.json','b.json']"`.
        default: Name of a file in configs/.

    Raises:
        FileNotFoundError: If one of them does not exist.
    """
    if config_file is None:  # the bundle's, whatever file of that name lies where the user stands
        return [_existing(folder / "configs", default, "config file", may_be_path=False)]
    names = [name.strip().strip("'\"") for name in config_file.strip().strip("[]").split(",")]
    return [_existing(folder / "configs", name, "config file") for name in names]


def overlay_files(folder: Path, overlay: str | None) -> list[str]:
    """The overlay files of a bundle.

    Args:
        folder: The bundle.
        overlay: Names in configs/overlays or paths, with or without .json, separated by commas.

    Raises:
        FileNotFoundError: If there is no such overlay.
    """
    names = [name.strip() for name in (overlay or "").strip("[]()").split(",") if name.strip()]
    overlays = folder / "configs" / "overlays"
    return [_existing(overlays, name.removesuffix(".json") + ".json", "overlay") for name in names]


_JSON_WORDS = {"true": True, "false": False, "null": None}


def run_bundle(
    run_id: str, folder: Path, files: list[str], flags: Mapping[str, str], options: Mapping[str, Any] | None = None
) -> None:
    """Exactly `python -m monai.bundle run RUN_ID --config_file FILES --KEY VALUE ...`, its keys checked first.

    A configuration's own `bundle_root` holds for whoever stands where it was written for; here it is the bundle.

    Args:
        run_id: The configuration's entry to run.
        folder: The bundle.
        files: Configuration files, later ones win.
        flags: Keys of the configuration, `#` for nested ones, and their values as text.
        options: Further keys, their values already parsed.

    Raises:
        UsageError: If a key's first part, or a section on its way, is in none of the files.
    """
    declared: dict[str, Any] = {}
    for file in files:
        declared |= {key.lstrip("+"): value for key, value in _read_config(file).items()}
    top_level = {key.partition("#")[0] for key in declared}
    root = {"bundle_root": literal_path(str(folder))} if "bundle_root" in top_level - set(flags) else {}
    options = root | dict(options or {})
    for key in [*flags, *options]:
        if _first(key) not in top_level | set(RUN_ARGUMENTS):
            raise UsageError(f"unknown flag --{key}; {nearest(key, top_level, prefix='--')}")
        _check_sections(key, declared)
    parsed = {key: parse_override(key, text, declared.get(key)) for key, text in flags.items()}
    # MONAI takes an override of None for none.
    overrides = {key: "$None" if value is None else value for key, value in parsed.items()} | options

    # Whoever names a bundle trusts it; the README says so, and a warning at each run would hide other ones.
    warnings.filterwarnings("ignore", message="parsing config_file")
    from monai.bundle import run

    run(run_id, config_file=files if len(files) > 1 else files[0], **overrides)


def literal_path(path: str) -> str:
    """A path that a bundle's configuration does not take for a reference, a macro or an expression."""
    return f"./{path}" if path.startswith(("@", "%", "$")) else path


def _existing(folder: Path, name: str, kind: str, may_be_path: bool = True) -> str:
    """The path of `name`, tried as a path, unless it may be none, and inside `folder`."""
    for candidate in (Path(name), folder / name) if may_be_path else (folder / name,):
        if candidate.is_file():
            return str(candidate)
    known = [path.name for path in folder.glob("*.json")]
    raise FileNotFoundError(f"{kind} {name!r} does not exist; {nearest(Path(name).name, known)}")


def _check_sections(key: str, declared: Mapping[str, Any]) -> None:
    """MONAI itself says only `KeyError` where a section between the first and the last part does not exist."""
    parts = key.replace("::", "#").split("#")
    section: Any = declared
    for depth, part in enumerate(parts[:-1]):
        if isinstance(section, list) and part.isdigit() and int(part) < len(section):
            section = section[int(part)]
        elif isinstance(section, Mapping) and part in section:
            section = section[part]
        elif isinstance(section, Mapping) and depth:
            known = ["#".join([*parts[:depth], name]) for name in section if not name.startswith("_")]
            raise UsageError(f"unknown flag --{key}; {nearest('#'.join(parts[: depth + 1]), known, prefix='--')}")
        else:
            return  # an overlay's own `a#b` key, or a reference: the bundle's check decides


def _first(key: str) -> str:
    return key.replace("::", "#").partition("#")[0]


def parse_override(key: str, text: str, declared: Any = None) -> Any:
    """The value that `python -m monai.bundle` would see, except that a folder called 2024 stays a folder.

    And except for JSON's words, as they stand in the configuration itself: true is no text there.
    """
    names_path = key.endswith(("_dir", "_file", "_path"))
    is_text = isinstance(declared, str) and not declared.startswith(("$", "@", "%"))
    if text in _JSON_WORDS and not (names_path or is_text):
        return _JSON_WORDS[text]
    value = DefaultParseValue(text)
    return text if isinstance(value, int | float) and (names_path or is_text) else value


def _read_config(file: str) -> dict[str, Any]:
    if not file.endswith(".json"):
        from monai.bundle import ConfigParser

        return dict(ConfigParser.load_config_file(file))
    try:
        content = json.loads(Path(file).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"config file {file} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"config file {file} holds no JSON object; a configuration is {{key: value}}")
    return content
