"""A plan as a text for people: what was measured, what follows from it, and why.

Must not know: how a plan is made.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import Any

from seg3d_monai.planning.choices import Decision
from seg3d_monai.planning.plan import Plan
from seg3d_monai.planning.wording import by, number, value

WIDTH = 110
SHOWN = {"small": 1, "median": 3, "large": 5}
"""Percentiles of a fingerprint's lists that the tables show, by their place."""


def measured(facts: dict[str, Any]) -> str:
    """What a fingerprint says.

    Args:
        facts: `Fingerprint.to_json()`.
    """
    spacings = [
        f"{'unknown' if s['zyx'] is None else by(s['zyx']) + ' um'} ({s['volumes']} volumes)"
        for s in facts["spacings_um"]
    ]
    lines = [
        ("volumes", f"{facts['num_volumes']} of {facts['num_specimens']} specimens: {facts['volumes_are']}"),
        ("voxel size, z y x", "; ".join(spacings[:4]) + ("; …" if len(spacings) > 4 else "")),
        ("channels", by(facts["channels"])),
        ("objects", f"{facts['num_objects']:,}, {_share(facts)} whole, that is within their volume"),
        ("classes", ", ".join(f"{id}: {count:,}" for id, count in facts["classes"].items())),
        ("touch another one", _touching(facts)),
    ]
    rows = [
        ("size of a volume, voxels", "size_voxels", 1),
        ("objects of a volume", "objects_per_volume", 1),
        ("foreground, %", "foreground", 100),
        ("grey value that becomes 0", "intensity_low", 1),
        ("grey value that becomes 1", "intensity_high", 1),
        ("extent of an object, voxels", "object_extent_voxels", 1),
        ("extent of an object, um", "object_extent_um", 1),
        ("voxels of an object", "object_voxels", 1),
    ]
    percentiles = [f"{facts['percentiles'][place]} %" for place in SHOWN.values()]
    head = "".join(f"{text:>20}" for text in percentiles)
    table = [f"{'percentile':<30}{head}"]
    for title, key, factor in rows:
        if facts[key] is not None:
            cells = (_cell(facts[key][place], factor) for place in SHOWN.values())
            table.append(f"{title:<30}" + "".join(f"{cell:>20}" for cell in cells))
    return "\n".join([*(f"{name:<30}{text}" for name, text in lines), "", *table])


def explained(plan: Plan) -> str:
    """Every decision of a plan, what the bundle has, and the reason."""
    parts = []
    for decision in plan.decisions:
        mark = "*" if decision.is_change else " "
        before = f"   (bundle: {value(decision.default)})" if decision.is_change else ""
        parts.append(_wrapped(f"{mark} {decision.key} = {value(decision.value)}{before}", "      "))
        parts.append(_wrapped(f"      {decision.reason}", "      "))
    title = f"{plan.bundle} (* differs from the bundle)"
    facts = [_wrapped(fact, "  ") for fact in plan.facts]
    return "\n".join([title, "=" * len(title), *parts, "", *facts])


def in_short(plan: Plan) -> str:
    """The decisions that differ from the bundle, one a line."""
    changed: Sequence[Decision] = [decision for decision in plan.decisions if decision.is_change]
    lines = [f"  {d.key:<36} {value(d.value)}  (bundle: {value(d.default)})" for d in changed]
    return "\n".join([f"{plan.bundle}: {len(changed)} of {len(plan.decisions)} keys differ from the bundle", *lines])


def _share(facts: dict[str, Any]) -> str:
    return f"{facts['num_objects_whole'] / facts['num_objects_read']:.0%}"


def _touching(facts: dict[str, Any]) -> str:
    if facts["touching"] is None:
        return "not measured"
    return f"{facts['touching']:.0%} of {facts['touching_is_of']} that were looked at"


def _cell(entry: Any, factor: float) -> str:
    return by(entry) if isinstance(entry, list) else number(factor * entry)


def _wrapped(text: str, indent: str) -> str:
    return textwrap.fill(text, WIDTH, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)
