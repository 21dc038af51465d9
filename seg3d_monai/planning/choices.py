"""What a plan decides, key by key: a rule's value, or the one that the user gave, and why.

Must not know: what the keys mean.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from seg3d_monai.planning.bundle_config import BundleConfig

Rule = Callable[..., tuple[Any, str]]
GIVEN = "given"


@dataclass(frozen=True)
class Decision:
    """One key of a plan.

    Args:
        key: of the bundle's configurations.
        value: what the plan sets it to, as JSON holds it.
        default: what the bundle sets it to.
        reason: in words, or `GIVEN`.
    """

    key: str
    value: Any
    default: Any
    reason: str

    @property
    def is_change(self) -> bool:
        """Whether the bundle has another value."""
        return bool(self.value != self.default)


class Choices:
    """Decisions on the keys of one bundle; a key that is decided again has its last value.

    Args:
        bundle: what the keys are of.
        given: keys and values of the user; those that the bundle does not take are left out.
    """

    def __init__(self, bundle: BundleConfig, given: Mapping[str, Any]) -> None:
        self.bundle = bundle
        self.given = {key: value for key, value in given.items() if bundle.takes(key)}
        self.decisions: dict[str, Decision] = {}
        for key in self.given:
            self.choose(key, lambda: (None, ""))

    @property
    def values(self) -> dict[str, Any]:
        """What was decided, by key."""
        return {key: decision.value for key, decision in self.decisions.items()}

    def choose(self, key: str, rule: Rule, *arguments: Any) -> Any:
        """Decide on a key.

        Args:
            key: of the configurations; one that the bundle does not take is not decided on.
            rule: (*arguments) -> value and reason; not asked where the user gave the key.
            arguments: of the rule.

        Returns:
            The given value, else the rule's.
        """
        value, reason = (self.given[key], GIVEN) if key in self.given else rule(*arguments)
        value = plain(value)
        if self.bundle.takes(key):
            self.decisions[key] = Decision(key, value, self.bundle.get(key), reason)
        return value


def plain(value: Any) -> Any:
    """A value as JSON gives it back: lists in place of tuples and arrays, no numbers of NumPy."""
    if isinstance(value, list | tuple | np.ndarray):
        return [plain(item) for item in value]
    return value.item() if isinstance(value, np.generic) else value
