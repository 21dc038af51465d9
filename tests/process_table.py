"""What the kernel tells of processes, which may end while it is asked (Linux)."""

from pathlib import Path


def is_alive(pid: int) -> bool:
    """Whether a process runs; one that waits to be reaped does not."""
    words = _stat(pid)
    return words is not None and words[0] not in "ZX"


def descendants(pid: int) -> set[int]:
    """Processes below one."""
    parents = {}
    for folder in Path("/proc").glob("[0-9]*"):
        words = _stat(int(folder.name))
        if words is not None:
            parents[int(folder.name)] = int(words[1])
    found = {pid}
    while more := {child for child, parent in parents.items() if parent in found} - found:
        found |= more
    return found - {pid}


def _stat(pid: int) -> list[str] | None:
    """State, parent and what follows the name in /proc/PID/stat."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
