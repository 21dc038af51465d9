"""Whether a run may begin, go on or is finished: what lies at OUTPUT, and what its journal says.

Nothing is overwritten that another run or another program wrote. This file reads the journal and looks at files; it
must not know how blocks are predicted or painted.
"""

from __future__ import annotations

import logging
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from seg3d_monai.inference.blocks import Block, BlockPlan
from seg3d_monai.inference.journal import (
    DONE,
    FINISHED,
    PREDICTING,
    THRESHOLDS,
    UNREADABLE,
    Journal,
    JournalInUseError,
    describe_difference,
)
from seg3d_monai.inference.writer import is_own_output, partial_path

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class OutputPaths:
    """What a run writes.

    Attributes:
        output: the OME-Zarr.
        partial: where it is built.
        journal: the journal.
        tables: the object tables.
        label_tiff: the labels as a TIFF, or None.
    """

    output: Path
    partial: Path
    journal: Path
    tables: tuple[Path, ...]
    label_tiff: Path | None

    @classmethod
    def of(cls, output: Path, tables: Sequence[str], label_tiff: bool) -> OutputPaths:
        """The files beside OUTPUT, with a table for each format."""
        return cls(
            output=output,
            partial=partial_path(output),
            journal=output.with_suffix(".journal.sqlite"),
            tables=tuple(output.with_suffix(f".instances.{table}") for table in tables),
            label_tiff=output.with_suffix(".labels.tif") if label_tiff else None,
        )

    def results(self) -> list[Path]:
        """What is there when the run has finished, beside the journal."""
        return [self.output, *self.tables, *([] if self.label_tiff is None else [self.label_tiff])]

    def are_complete(self) -> bool:
        """Whether all results are there and none is being built."""
        return all(path.exists() for path in self.results()) and not self.partial.exists()

    def remove(self) -> None:
        """Delete results and journal."""
        self.journal.unlink(missing_ok=True)
        self.journal.with_name(self.journal.name + "-journal").unlink(missing_ok=True)
        for path in (*self.results(), self.partial):
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)


def read_stored_run(paths: OutputPaths, restart: bool) -> dict[str, Any] | None:
    """What the journal says about the run that was begun under this name.

    Args:
        paths: what the run writes.
        restart: whether a run that was begun is to be forgotten.

    Returns:
        Its facts "plan", "input", "state", "num_objects" and "is_published", and its "holes" {block: reason}; None if a
        new run may begin.

    Raises:
        ValueError: if a result exists that is not this run's, or another process uses the journal.
    """
    if restart:
        if paths.journal.exists():
            try:
                Journal(paths.journal).close()
            except JournalInUseError:
                raise
            except ValueError:
                _log.warning("%s is not a usable journal and will be replaced", paths.journal)
        if paths.output.exists() and not is_own_output(paths.output):
            raise ValueError(f"{paths.output} exists and was not written by seg3d predict; choose another OUTPUT")
        return None
    if paths.journal.exists():
        with Journal(paths.journal) as journal:
            if journal.fact("plan") is not None:
                names = ("plan", "input", "state", "num_objects", "is_published")
                stored = {name: journal.fact(name) for name in names}
                if paths.output.exists() and stored["state"] == PREDICTING and not stored["is_published"]:
                    raise ValueError(
                        f"{paths.output} exists but the run in {paths.journal} did not write it; pass --restart"
                    )
                if stored["state"] == PREDICTING and not journal.blocks_in_state(DONE, UNREADABLE):
                    return None  # nothing is lost: another plan may take its place
                return stored | {"holes": journal.unreadable()}
    for found in paths.results():
        if found.exists():
            raise ValueError(f"{found} exists without the journal of its run; choose another OUTPUT or pass --restart")
    return None


@contextmanager
def no_trace_of_mistakes(journal: Journal, path: Path, *, is_new: bool) -> Iterator[None]:
    """Within it a mistake of the user takes the journal away that it begot, if no block was finished until then.

    Args:
        journal: in use.
        path: its file.
        is_new: whether this run began it.
    """
    try:
        yield
    except (TypeError, ValueError):
        if is_new and not journal.blocks_in_state(DONE, UNREADABLE):
            with suppress(PermissionError):  # of Windows, which keeps a file in use
                path.unlink(missing_ok=True)
        raise


def input_was_repaired(
    stored: dict[str, Any],
    facts: dict[str, Any],
    input_identity: dict[str, Any],
    output: Path,
    plan: BlockPlan,
    volumes: Sequence[Any],
) -> bool:
    """Whether the input was repaired since some of its blocks could not be read.

    A plan that differs in `THRESHOLDS` only is the same run: `Journal.change_thresholds` lets it go on.

    Args:
        stored: what `read_stored_run` returned.
        facts: the plan that is asked for now.
        input_identity: the input's identity now.
        output: named in the error.
        plan: the plan of blocks.
        volumes: the input, one for each time point.

    Raises:
        ValueError: if the plan or the input differs in any other way.
    """
    begun, mend = "finished" if stored["state"] == FINISHED else "begun", "pass --restart to start anew"
    if describe_difference(_without_thresholds(stored["plan"]), _without_thresholds(facts)) is not None:
        difference = describe_difference(stored["plan"], facts)
        name = str(difference).partition(":")[0].rpartition(".")[2]
        if name in THRESHOLDS and stored["state"] != PREDICTING:
            mend = f"`seg3d relabel {output} --{name} VALUE` changes that without predicting; {mend}"
    else:
        difference = describe_difference(stored["input"], input_identity, "input.")
        if stored["holes"] and difference is not None:
            return True
        if difference is None:
            # The identity is of a sample: a repaired chunk elsewhere shows only when it is read.
            return stored["state"] != PREDICTING and any(_is_readable(plan[b], volumes) for b in stored["holes"])
    raise ValueError(f"{output} was {begun} with another plan ({difference}); {mend}")


def _without_thresholds(plan: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in plan.items() if name not in THRESHOLDS}


def _is_readable(block: Block, volumes: Sequence[Any]) -> bool:
    try:
        volumes[block.time].read(block.read)
    except Exception:  # of any reader
        return False
    return True


def check_output(output: Path) -> None:
    """See that OUTPUT can be written.

    Raises:
        FileNotFoundError: if its folder does not exist.
        ValueError: if its name does not end with .zarr, or its folder cannot be written to.
    """
    if output.suffix != ".zarr":
        raise ValueError(f"output is {str(output)!r}; give a name that ends with .zarr")
    if not output.parent.is_dir():
        raise FileNotFoundError(f"the folder of output {output} does not exist; make {output.parent} first")
    try:
        with tempfile.TemporaryFile(dir=output.parent):
            pass
    except OSError as error:
        raise ValueError(
            f"output {output} cannot be written: {error.strerror}; choose a folder that you may write to"
        ) from error


def check_not_input(output: Path, volume: Any) -> None:
    """See that OUTPUT and the input are apart.

    Raises:
        ValueError: if one is the other, or lies in it.
    """
    if volume.path is None:
        return
    source, target = Path(volume.path).resolve(), output.resolve()
    if target == source or target in source.parents or source in target.parents:
        raise ValueError(f"output {output} and the input {volume.path} overlap; choose another OUTPUT")
