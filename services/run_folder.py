"""A run's folder: what rlif may write and remove there, and who else may."""

import fcntl
import logging
import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from services.recipe import Recipe
from services.startup import StartupError
from services.steps import traces_of_training

log = logging.getLogger(__name__)

MARKER = ".rlif"
"""A file that says that rlif prepared the folder: only there it removes anything."""
REMADE = ("redis", "weights", "model", "logs")
"""What a start that came to nothing leaves, and the next one removes."""
FOLDERS = (*REMADE, "checkpoints", "cluster")
WRITTEN = (*FOLDERS, "recipe.yaml", "steps.jsonl")


def prepare(recipe: Recipe, resume: bool) -> None:
    """Make the folder, readable by this user alone, unless it is there.

    Raises StartupError: it belongs to an earlier run and `resume` was not asked for, or the reverse; it holds what rlif
    would write but did not; the model or the data lie where rlif writes.
    """
    run_dir = recipe.run.dir
    there = (run_dir / "recipe.yaml").exists()
    if there and not resume and traces_of_training(run_dir):
        raise StartupError(f"run.dir {run_dir} holds a run already: go on with --resume, or choose another run.dir")
    if resume and not there:
        raise StartupError(f"run.dir {run_dir} holds no run to resume")
    read = {"model.path": recipe.model.path, "data.path": recipe.data.path}
    read |= {"evaluation.data.path": recipe.evaluation.data.path} if recipe.evaluation else {}
    for key, path in read.items():
        inside = next((name for name in FOLDERS if _lies_in(Path(path), run_dir / name)), None)
        if inside:
            raise StartupError(
                f"{key}: {path} lies in {run_dir / inside}, where the run writes: choose another run.dir"
            )
    try:
        run_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not resume and not (run_dir / MARKER).exists():
            foreign = next((name for name in WRITTEN if os.path.lexists(run_dir / name)), None)
            if foreign:
                raise StartupError(
                    f"run.dir {run_dir}: its {foreign} is not of a run that rlif prepared, and would be overwritten; "
                    "choose another run.dir"
                )
            (run_dir / MARKER).touch(mode=0o600)
    except OSError as error:
        raise StartupError(f"run.dir {run_dir} cannot be made or written: {error.strerror}") from error


def _lies_in(path: Path, folder: Path) -> bool:
    """Names of the Hugging Face hub are no paths that exist."""
    return path.exists() and path.resolve().is_relative_to(folder.resolve())


def clear_untrained(run_dir: Path) -> None:
    """A start that came to nothing must not stand in the way of the next, nor leave it groups of another recipe."""
    if (run_dir / MARKER).is_file() and not traces_of_training(run_dir):
        for name in REMADE:
            shutil.rmtree(run_dir / name, ignore_errors=True)


def private_folder(folder: Path) -> None:
    """Make a folder that only this user can enter, or make it so. Raises StartupError, as `check_own` does."""
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        check_own(folder)
        folder.chmod(0o700)
    except OSError as error:
        raise StartupError(f"run.dir: cannot write {folder}: {error.strerror}") from error


def check_own(folder: Path) -> None:
    """Before secrets go there, or commands are taken from there. Raises StartupError: it is a link, or somebody else's,
    or others may write there."""
    there = folder.lstat()
    if not stat.S_ISDIR(there.st_mode):
        raise StartupError(f"run.dir: {folder} is a link or no folder; a run's secrets go into a folder of its own")
    if there.st_uid != os.getuid():
        raise StartupError(f"run.dir: {folder} belongs to another user (uid {there.st_uid}); choose one of your own")
    if there.st_mode & 0o022:
        raise StartupError(f"run.dir: others may write {folder}, where secrets are kept; `chmod go-w {folder}` first")


@contextmanager
def only_one(run_dir: Path) -> Iterator[None]:
    """Holds the run's lock; the kernel lets go of it when this process ends, however it ends. Raises StartupError:
    another `rlif up` has it (two of them would write one queue and one set of checkpoints)."""
    try:
        handle = os.open(run_dir / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except OSError as error:
        raise StartupError(f"run.dir {run_dir} cannot be written: {error.strerror}") from error
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(handle)
        raise StartupError(
            f"run.dir {run_dir}: another `rlif up` is running this run (or a job is); stop it first"
        ) from error
    except OSError as error:  # Lustre mounted without flock, say
        log.warning("run.dir %s: its file system has no locks (%s): see that no second start uses it", run_dir, error)
    try:
        yield
    finally:
        os.close(handle)


def write_private(path: Path, text: str) -> None:
    """For this user's eyes only, from the first byte on: a redis URL may carry a password."""
    aside = path.with_name(path.name + ".part")
    aside.unlink(missing_ok=True)
    with open(os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as handle:
        handle.write(text)
    aside.replace(path)
