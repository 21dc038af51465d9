"""A user's mistake, told from a defect of the package, as one line. For the command line and for bundle runs."""

import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

# What a user's mistake raises anywhere in the package; ImportError is a missing extra, which names itself.
USER_ERRORS = (ValueError, TypeError, OSError, ImportError)

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""What only a write can meet: no space on the disk, in the user's quota, or in a file."""
MENDS = {
    **dict.fromkeys(FULL, "make room and give the same command again"),
    errno.EACCES: "check its permissions, or choose another",
    errno.EPERM: "check its permissions, or choose another",
    errno.EROFS: "choose a place that can be written to",
    errno.ENOENT: "check the path",
    errno.EISDIR: "give a file",
    errno.ENOTDIR: "one of the folders in this path is a file; check the path",
    errno.EEXIST: "choose another name",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.EIO: "the quota may be used up, or the disk fails: mend that and give the same command again",
}
"""What to do about an error of the operating system."""


def user_error(error: BaseException) -> BaseException | None:
    """The user's mistake in a chain of exceptions, or None for a defect of the package.

    MONAI wraps whatever a component raises in RuntimeErrors, so those are looked behind. A user error is itself the
    best description even where it was raised from another.

    Args:
        error: The exception that arrived.
    """
    current: BaseException | None = error
    while current is not None and not isinstance(current, USER_ERRORS):
        current = current.__cause__ or (None if current.__suppress_context__ else current.__context__)
    if isinstance(current, ImportError) and (current.name or "").startswith("seg3d_monai"):
        return None
    return current


def one_line(error: BaseException) -> str:
    """An exception's text on one line; the operating system's own errors as `cause: file; mend`.

    Args:
        error: A user error.
    """
    if isinstance(error, OSError) and error.strerror and error.errno is not None:
        mend = None if ";" in error.strerror else MENDS.get(error.errno)  # one of ours may bring its own
        place = "" if error.filename is None else f": {error.filename}"
        return f"{error.strerror}{place}" + (f"; {mend}" if mend else "")
    parts = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = " ".join(part if part.endswith((".", ":", ";", ",")) else part + ";" for part in parts).rstrip(";")
    return text or type(error).__name__


@contextmanager
def full_disk_names(path: str | os.PathLike[str]) -> Iterator[None]:
    """Within it an error of a full disk names what was being written; the operating system itself leaves that out.

    Args:
        path: What is written, as the user called it.
    """
    try:
        yield
    except Exception as error:
        mistake = user_error(error)
        if isinstance(mistake, OSError) and mistake.errno in FULL and mistake.filename is None:
            mistake.filename = os.fspath(path)
        raise


def write_whole(path: Path, content: str | bytes) -> None:
    """Write beside the target and rename, so that nobody ever sees half a file, and an old one stays until then.

    Args:
        path: The file; its folder exists.
        content: Of it; text is written as UTF-8.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with full_disk_names(path):
            partial.write_bytes(content.encode() if isinstance(content, str) else content)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def wants_traceback() -> bool:
    """Whether SEG3D_TRACEBACK asks to see where mistakes arose."""
    return os.environ.get("SEG3D_TRACEBACK", "") not in ("", "0")


def print_user_error(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """A `sys.excepthook` that prints a user's mistake as one line and everything else with its traceback."""
    mistake = user_error(error) if isinstance(error, Exception) else None
    if mistake is None or wants_traceback():
        sys.__excepthook__(kind, error, trace)
    else:
        print(f"{type(mistake).__name__}: {one_line(mistake)}", file=sys.stderr, flush=True)
