"""What a machine does to a run: a slow disk and a jumping clock (by a preloaded library), a full disk, a torn file."""

import mmap
import os
import shutil
import signal
import struct
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from faults.faulty_run import Run, newest_weights

QUIET_SECONDS = 1.5
"""Longer than a step, shorter than a rollout server's start."""
SOURCE = Path(__file__).with_name("faults.c")


class Machine:
    """The faults of a run's machine, for processes started with `env`."""

    def __init__(self, folder: Path):
        compiler = shutil.which("cc")
        if compiler is None:
            pytest.skip("the slow disk and the jumping clock need a C compiler (cc)")
        library, self.file = folder / "faults.so", folder / "faults"
        subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-o", library, SOURCE, "-ldl"], check=True, timeout=60)
        self.file.write_bytes(struct.pack("dd", 0.0, 0.0))
        self.env = {"LD_PRELOAD": str(library), "RLIF_FAULTS": str(self.file)}

    def set(self, sync_seconds: float, clock_seconds: float) -> None:
        """Every sync takes that much longer, and the wall clock is that far off, from now on."""
        with self.file.open("r+b") as handle, mmap.mmap(handle.fileno(), 16) as there:
            there[:16] = struct.pack("dd", sync_seconds, clock_seconds)


def tear_newest(run: Run, seconds: float = 60) -> str:
    """Kill the rollout server, and truncate the weights that it has to load when it comes back; returns their version.

    Those are the ones that nothing follows for a while: without rollouts the trainer soon has no groups.
    """
    os.kill(run.pid("rollout-0"), signal.SIGKILL)
    newest, since, ends = newest_weights(run.dir), time.monotonic(), time.monotonic() + seconds
    while time.monotonic() < since + QUIET_SECONDS:
        assert time.monotonic() < ends, f"weights keep coming without a rollout server:\n{run.screen()}"
        time.sleep(0.05)
        if (now := newest_weights(run.dir)) != newest:
            newest, since = now, time.monotonic()
    file = newest / "model.safetensors"
    os.truncate(file, file.stat().st_size // 2)
    return newest.name


@contextmanager
def small_disk(folder: Path, megabytes: int) -> Iterator[Path]:
    """A file system of its own on `folder`, which needs root."""
    if os.geteuid() != 0:
        pytest.skip("a disk that is full needs root, to mount one")
    folder.mkdir()
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", folder],
        capture_output=True,
        text=True,
        timeout=60,
    )
    if made.returncode:
        pytest.skip(f"a disk that is full cannot be mounted here: {made.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True, timeout=60)


@contextmanager
def full(disk: Path) -> Iterator[None]:
    """Within, not a byte is free: the kernel answers ENOSPC."""
    ballast = disk / "ballast"
    with ballast.open("wb", buffering=0) as handle:
        try:
            while handle.write(bytes(1 << 16)):
                pass
        except OSError:
            pass
        try:
            yield
        finally:
            ballast.unlink()
