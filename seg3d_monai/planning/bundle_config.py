"""A bundle's configurations as a plan sees them: what a key is set to, which keys may be set, and what it then builds.

A key is an id of MONAI's configuration language, `network_def#anchor_shapes`. It may also be an argument that a
component has and the configuration leaves at its default.

Must not know: data, rules.
"""

from __future__ import annotations

import inspect
import json
import pydoc
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from monai.bundle import ConfigParser

from seg3d_monai.engine import check_config

TRAIN, INFERENCE = "train", "inference"
OF_TRAINING = ("batch_size", "num_workers")
"""Keys that mean something else in the inference: blocks at a time, processes of a run."""
Values = Mapping[str, Any]


class BundleConfig:
    """The configurations `train.json` and `inference.json` of a bundle, under overlays.

    Args:
        folder: the bundle's folder.
        overlays: overlay files that the plan is made on top of, such as another model size; the inference takes those
            of their keys that it has.

    Attributes:
        name: of the bundle.
    """

    def __init__(self, folder: Path, overlays: Sequence[str] = ()) -> None:
        self.name = Path(folder).resolve().name
        configs = Path(folder) / "configs"
        self._files = {TRAIN: configs / "train.json", INFERENCE: configs / "inference.json"}
        for file in self._files.values():
            if not file.is_file():
                raise FileNotFoundError(f"bundle {str(folder)!r} has no {file.name}; plans are for a training bundle")
        self._changes: dict[str, Any] = {}
        for overlay in overlays:
            self._changes |= ConfigParser.load_config_file(overlay)
        self._parsers = {which: self.parser(which) for which in self._files}

    def parser(self, which: str, values: Values | None = None) -> ConfigParser:
        """A parser of the training's or the inference's configuration with further values set."""
        parser = ConfigParser()
        parser.read_config(str(self._files[which]))
        top_level = set(parser.get())
        for changes in (self._changes, values or {}):
            for key, value in changes.items():
                if which == TRAIN or key.partition("#")[0] in top_level:
                    parser[key] = value
        return parser

    def takes(self, key: str, which: str | None = None) -> bool:
        """Whether a key is set in a configuration, or is an argument of one of its components; by default, of any."""
        if which is None:
            return any(self.takes(key, one) for one in self._files)
        parser = self._parsers[which]
        return key in parser or key.rpartition("#")[2] in _parameters(parser, key)

    def siblings(self, key: str) -> list[str]:
        """Keys that might be meant by one that is not taken: those in its section, else the top level's."""
        section = key.rpartition("#")[0]
        found = {str(name) for parser in self._parsers.values() for name in parser.get() if not name.startswith("_")}
        for parser in self._parsers.values():
            inside = parser[section] if section and section in parser else None
            if isinstance(inside, dict):
                names = {*inside, *_parameters(parser, key)}
                return sorted(f"{section}#{name}" for name in names if not name.startswith("_"))
        return sorted(found)

    def get(self, key: str) -> Any:
        """What a key is set to, else the default of the component's argument, as JSON holds it.

        Raises:
            KeyError: if no configuration takes the key.
        """
        for parser in self._parsers.values():
            if key in parser:
                return _as_json(parser[key])
            if (parameter := _parameters(parser, key).get(key.rpartition("#")[2])) is not None:
                return _as_json(None if parameter.default is parameter.empty else parameter.default)
        raise KeyError(key)

    def build(self, id: str, values: Values | None = None) -> Any:
        """The component that the training's configuration describes, such as `network_def` or `loss`."""
        return self.parser(TRAIN, values).get_parsed_content(id)

    def overlay(self, which: str, values: Values) -> dict[str, Any]:
        """Those of the values that a configuration takes and does not have already."""
        return {
            key: value
            for key, value in values.items()
            if self.takes(key, which) and _as_json(value) != self._own(which, key)
            if which == TRAIN or key not in OF_TRAINING
        }

    def check(self, values: Values) -> None:
        """Check both configurations, under their overlays, as a run does.

        Raises:
            ValueError: for a key or a target that does not exist.
        """
        for which, entries in ((TRAIN, ()), (INFERENCE, ("seam_check",))):
            parser = self.parser(which, self.overlay(which, values))
            parser.parse()
            check_config(entries, parser=parser)

    def _own(self, which: str, key: str) -> Any:
        """What one configuration sets a key to; the argument's default where it does not."""
        parser = self._parsers[which]
        if key in parser:
            return _as_json(parser[key])
        default = _parameters(parser, key)[key.rpartition("#")[2]].default
        return _as_json(None if default is inspect.Parameter.empty else default)


def _parameters(parser: ConfigParser, key: str) -> Mapping[str, inspect.Parameter]:
    """Arguments of the component that a key lies in; none where it lies in none."""
    section = key.rpartition("#")[0]
    component = parser[section] if section and section in parser else None
    target = component.get("_target_") if isinstance(component, dict) else None
    located = pydoc.locate(target) if isinstance(target, str) and not target.startswith(("@", "$", "%")) else None
    return inspect.signature(located).parameters if callable(located) else {}


def _as_json(value: Any) -> Any:
    return json.loads(json.dumps(value))
