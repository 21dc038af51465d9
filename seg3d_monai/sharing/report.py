"""What a check of a bundle found, as lines for a terminal and as JSON.

Text of a bundle is shown with its control characters written out: it must not steer the terminal that it is read on.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict

from seg3d_monai.sharing.check import FAILED, NOT_CHECKED, PASSED, WARNING, Check, Content

_ORDER = (FAILED, WARNING, NOT_CHECKED, PASSED)


def listing(content: Content) -> Iterator[str]:
    """Everything that a bundle would run, a line each; `!` stands before what should be read first."""
    yield f"This bundle runs {len(content.findings)} expressions, components and imports:"
    for finding in content.findings:
        why = f"   [{'; '.join(finding.marks)}]" if finding.marks else ""
        sign = "!" if finding.marks else " "
        place = f"{finding.file}: {finding.key}: "
        yield f"{sign} {finding.kind:<10} {visible(place + finding.text + why)}"
    for name in content.code:
        yield f"  {'file':<10} {visible(name)}"
    yield f"{len(content.marked)} of them are marked"
    yield ""


def code_check(content: Content, trust: bool) -> Check:
    """The check that somebody has to read the listing."""
    name = "nothing is marked"
    if not content.marked:
        return Check(name=name, result=PASSED, why=f"{len(content.findings)} expressions, components and imports")
    told = f"{len(content.marked)} marked with ! in the list above"
    if trust:
        return Check(name=name, result=WARNING, why=f"{told}; --trust was given")
    return Check(name=name, result=FAILED, why=f"{told}; read them, --trust runs the rest of the checks")


def table(checks: Sequence[Check]) -> Iterator[str]:
    """One line a check: result, name, why; then how many of each."""
    width = max(len(check.name) for check in checks)
    for check in checks:
        yield f"{check.result:<12} {visible(check.name):<{width}}  {visible(check.why)}"
    counts = [(result, sum(check.result == result for check in checks)) for result in _ORDER]
    yield ", ".join(f"{count} {result}" for result, count in counts if count)


def as_json(bundle: str, content: Content, checks: Sequence[Check]) -> str:
    """All findings and checks.

    Args:
        bundle: As the user named it.
        content: Of the bundle.
        checks: That were made.
    """
    found = {
        "bundle": bundle,
        "findings": [asdict(finding) for finding in content.findings],
        "files_that_run": list(content.code),
        "checks": [asdict(check) for check in checks],
    }
    return json.dumps(found, indent=2) + "\n"


def visible(text: str) -> str:
    """Text with control characters, and those that reverse or hide what follows, written as escapes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
