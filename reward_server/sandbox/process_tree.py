"""What a process and all its descendants use at this moment, read from /proc."""

import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

TICKS = os.sysconf("SC_CLK_TCK")
PAGE = os.sysconf("SC_PAGE_SIZE")


@dataclass
class Usage:
    """`cpu_seconds` include descendants that ended and were waited for. `memory_bytes` is resident memory without what
    files share, and counts pages that a process shares with its fork for both. `pids`: the tree, ancestors first.
    `is_runnable`: one of its threads runs, or would if it had a CPU."""

    pids: list[int]
    cpu_seconds: float = 0.0
    memory_bytes: int = 0
    is_runnable: bool = False


def usage(root: int) -> Usage:
    found = Usage([root])
    for pid in found.pids:  # grows while it is walked
        try:
            # The name, in brackets, may itself hold brackets and blanks.
            fields = Path(f"/proc/{pid}/stat").read_text("latin-1").rpartition(")")[2].split()
            found.cpu_seconds += sum(map(int, fields[11:15])) / TICKS
            _, resident, shared, *_ = map(int, Path(f"/proc/{pid}/statm").read_text().split())
            found.memory_bytes += max(0, resident - shared) * PAGE
        except (FileNotFoundError, ProcessLookupError):
            continue  # it ended meanwhile
        found.is_runnable = found.is_runnable or any(state(f"{pid}/task/{task}") == "R" for task in _threads(pid))
        found.pids += children(pid)
    return found


def children(pid: int) -> list[int]:
    found: list[int] = []
    for thread in _threads(pid):
        with suppress(FileNotFoundError, ProcessLookupError):
            found += map(int, Path(f"/proc/{pid}/task/{thread}/children").read_text().split())
    return found


def _threads(pid: int) -> list[str]:
    with suppress(FileNotFoundError, ProcessLookupError):
        return os.listdir(f"/proc/{pid}/task")
    return []


def state(pid: int | str) -> str:
    """The letter that the kernel gives a process, or a thread `pid/task/tid` (R: runs or could, T: stopped, Z: zombie);
    X when it is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text("latin-1").rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return "X"


def files_in(pid: int, folder: str) -> int:
    """How many files there are in the file system that `folder` is for a process with a root of its own; 0 when it has
    ended, or is still on its way there."""
    try:
        if os.stat(f"/proc/{pid}/root").st_dev == os.stat("/").st_dev:
            return 0
        found = os.statvfs(f"/proc/{pid}/root{folder}")
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return 0
    return found.f_files - found.f_ffree
