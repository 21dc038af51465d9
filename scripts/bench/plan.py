"""All that can be measured, by name: section/operator/row."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

from bench import sections
from bench.cases import CASES
from bench.steps import doublings, tenfold


@dataclass(frozen=True)
class Job:
    """One row, or one small group of rows, of a section's table."""

    section: str
    op: str
    name: str
    run: Callable[[], Iterator[sections.Row]]

    @property
    def full_name(self) -> str:
        """What --only looks at."""
        return f"{self.section}/{self.op}/{self.name}".replace(" ", "_")


def all_jobs(settings: sections.Settings) -> list[Job]:
    """Every job, in the order of the report."""
    varied = [case for case in CASES if case.anisotropic]
    halved = [case for case in CASES if case.anisotropic or case.has_bfloat16]
    return [
        *(Job("bars", c.op, c.name, partial(sections.against_baseline, c, settings)) for c in CASES),
        *(Job("anisotropic", c.op, c.name, partial(sections.anisotropic, c, settings)) for c in varied),
        *(Job("bfloat16", c.op, c.name, partial(sections.bfloat16, c, settings)) for c in halved),
        *(Job("tenfold", s.op, s.symbol, partial(sections.growth, s, settings)) for s in tenfold(settings.is_quick)),
        *(Job("doubling", s.op, s.symbol, partial(sections.growth, s, settings)) for s in doublings(settings.is_quick)),
    ]
