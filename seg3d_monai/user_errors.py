"""A user's mistake, told from a defect of the package, as one line. For the command line and for bundle runs."""

import os
import sys
from types import TracebackType

# What a user's mistake raises anywhere in the package; ImportError is a missing extra, which names itself.
USER_ERRORS = (ValueError, TypeError, OSError, ImportError)


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
    """An exception's text on one line; the operating system's own errors as `cause: file`.

    Args:
        error: A user error.
    """
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        return f"{error.strerror}: {error.filename}"
    parts = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = " ".join(part if part.endswith((".", ":", ";", ",")) else part + ";" for part in parts).rstrip(";")
    return text or type(error).__name__


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
