"""What a process and all its descendants use at this moment, read from /proc."""

import os
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

TICKS = os.sysconf("SC_CLK_TCK")


@dataclass
class Usage:
    """`cpu_seconds` include descendants that ended, also those nobody waited for. `memory_bytes` is resident memory
    without what is mapped from files on disk; pages that processes share count once for each. `pids`: the tree,
    ancestors first. `is_runnable`: one of its threads runs, or would if it had a CPU.
    """

    pids: list[int]
    cpu_seconds: float = 0.0
    memory_bytes: int = 0
    is_runnable: bool = False
    cpu: dict[int, tuple[float, float]] = field(default_factory=dict)
    """By process, its own CPU seconds and those of children that it waited for."""
    lost_seconds: float = 0.0
    """CPU time of processes that are gone and that nobody waited for."""
    fresh_seconds: float = 0.0
    """The same of those gone since the last look: their parent may have waited for them after we looked at it."""


def usage(root: int, before: Usage | None = None) -> Usage:
    """What the tree uses now; `before` is what the last look at it gave."""
    known = before.cpu if before else {}
    found = Usage(list(dict.fromkeys([root, *known])))  # a process whose parent just ended may be nobody's child yet
    for pid in found.pids:  # grows while it is walked
        with suppress(FileNotFoundError, ProcessLookupError):  # it ended meanwhile
            # The name, in brackets, may itself hold brackets and blanks.
            fields = Path(f"/proc/{pid}/stat").read_text("latin-1").rpartition(")")[2].split()
            own, waited = (sum(map(int, fields[place : place + 2])) / TICKS for place in (11, 13))
            found.memory_bytes += _resident(pid)
            found.cpu[pid] = own, waited
            found.is_runnable = found.is_runnable or any(state(f"{pid}/task/{task}") == "R" for task in _threads(pid))
            found.pids += [child for child in children(pid) if child not in found.pids]
    found.pids = list(found.cpu) or [root]
    if before:
        gone = sum(sum(known[pid]) for pid in known.keys() - found.cpu.keys())
        waited_for = sum(max(0.0, found.cpu[pid][1] - known[pid][1]) for pid in known.keys() & found.cpu.keys())
        found.lost_seconds = before.lost_seconds + max(0.0, before.fresh_seconds - waited_for)
        found.fresh_seconds = max(0.0, gone - max(0.0, waited_for - before.fresh_seconds))
    found.cpu_seconds = sum(map(sum, found.cpu.values())) + found.lost_seconds + found.fresh_seconds
    return found


def memory(pids: list[int]) -> int:
    """Bytes that processes use together: of a page that several share each counts its part. Slower than `usage`."""
    return sum(map(_part, pids))


def _part(pid: int) -> int:
    try:
        return _kilobytes(f"/proc/{pid}/smaps_rollup", ("Pss_Anon:", "Pss_Shmem:"))
    except (FileNotFoundError, ProcessLookupError):
        return 0
    except PermissionError:  # it made itself unreadable (PR_SET_DUMPABLE)
        with suppress(FileNotFoundError, ProcessLookupError):
            return _resident(pid)
        return 0


def _resident(pid: int) -> int:
    return _kilobytes(f"/proc/{pid}/status", ("RssAnon:", "RssShmem:"))


def _kilobytes(path: str, names: tuple[str, ...]) -> int:
    """Bytes that the lines of a file name together."""
    lines = Path(path).read_text("latin-1").splitlines()
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith(names))


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
