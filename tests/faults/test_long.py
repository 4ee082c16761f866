"""The long form (make faults): fifty kills in one run of two ranks; a disk that fills up; a bad machine with kills.

`RLIF_FAULT_SEED` chooses the times and victims; each test prints what it did.
"""

import os
import random
import signal
import time
from collections import Counter
from pathlib import Path

import psutil
import pytest
from audit import read_steps
from faults.disturbances import Machine, full, small_disk, tear_newest
from faults.faulty_run import Run, assert_unharmed, write_recipe

pytestmark = [pytest.mark.faults, pytest.mark.timeout(7200)]

KILLS = 50
VICTIMS = (("trainer", "rank 0", "rank 1"), ("orchestrator",), ("rollout-0",), ("reward-0",), ("redis",))
"""`trainer` is the launcher, the parent of the ranks."""


@pytest.fixture
def dice() -> random.Random:
    return random.Random(int(os.environ.get("RLIF_FAULT_SEED", "0")))


def unbroken(folder: Path, model: Path, **trainer) -> Run:
    run = Run(write_recipe(folder, model, "unbroken", **trainer), folder / "unbroken")
    assert run.finish(1800) == 0, run.screen()
    return run


def kill(run: Run, victim: str) -> bool:
    """Whether there was somebody to kill."""
    try:
        pid = run.rank(int(victim[-1])) if victim.startswith("rank ") else run.pid(victim)
        if pid is None or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
            return False
        os.kill(pid, signal.SIGKILL)
    except (psutil.NoSuchProcess, ProcessLookupError, FileNotFoundError, KeyError):  # not started yet, or just gone
        return False
    return True


def told(run: Run, began: float, **counts: int) -> None:
    steps = read_steps(run.dir)
    lineages = len({row["lineage"] for row in steps})
    said = ", ".join(f"{count} {name}" for name, count in counts.items())
    print(f"\n{said}: {len(steps)} steps trained in {lineages} lineages, {time.monotonic() - began:.0f} s")  # noqa: T201


def test_fifty_kills(tiny_model, tmp_path, dice):
    shape = {"steps": 120, "ranks": 2, "zero_stage": 2}
    whole = unbroken(tmp_path, tiny_model, **shape)
    run = Run(write_recipe(tmp_path, tiny_model, "broken", **shape), tmp_path / "broken", tireless=True)
    kills, began = Counter[str](), time.monotonic()
    try:
        run.wait_step(1)
        while kills.total() < KILLS:
            if dice.random() < 0.8:  # the others come while the run still recovers
                run.wait_step(run.last_step() + 1, 600)
            time.sleep(dice.uniform(0, 0.6))
            victim = dice.choice(dice.choice(VICTIMS))
            if kill(run, victim):
                kills[victim] += 1
        assert run.finish(1800) == 0, run.screen()
    finally:
        run.close()
    told(run, began, kills=kills.total(), **{name.replace(" ", "_"): count for name, count in kills.items()})
    assert_unharmed(run.dir, whole.dir)


def test_a_full_disk(tiny_model, tmp_path, dice):
    """Redis, weights, checkpoints, records and logs are all on it. A run that gives up is started again by hand."""
    whole = unbroken(tmp_path, tiny_model)
    starts, fills, began = 1, (2, 6, 10, whole.last_step()), time.monotonic()
    with small_disk(tmp_path / "disk", megabytes=64) as disk:
        recipe = write_recipe(tmp_path, tiny_model, "disk/run")
        run = Run(recipe, disk / "run")
        try:
            for step in fills:
                while run.last_step() < step:
                    if run.process.poll() is not None:
                        assert starts < 10, run.screen()
                        run, starts = Run(recipe, disk / "run", "--resume"), starts + 1
                    assert time.monotonic() < began + 1800, run.screen()
                    time.sleep(0.02)
                if step != fills[-1]:
                    with full(disk):
                        time.sleep(dice.uniform(2, 8))
            assert run.finish(600) == 0, run.screen()
        finally:
            run.close()
        told(run, began, full_disks=len(fills) - 1, starts_of_rlif_up=starts)
        assert_unharmed(run.dir, whole.dir)


def test_a_bad_machine_with_kills(tiny_model, tmp_path, dice):
    """Slow syncs and clock jumps throughout, torn weights, and a kill after each."""
    shape = {"steps": 30}
    whole = unbroken(tmp_path, tiny_model, **shape)
    machine = Machine(tmp_path)
    recipe = write_recipe(tmp_path, tiny_model, "bad", **shape)
    run = Run(recipe, tmp_path / "bad", tireless=True, env=machine.env)
    kills, torn, jumps, began = 0, 0, 0, time.monotonic()
    try:
        for step in range(2, 26, 3):
            run.wait_step(step, 600)
            machine.set(sync_seconds=dice.uniform(0, 0.2), clock_seconds=dice.uniform(-1e6, 1e6))
            jumps += 1
            if step % 2:
                tear_newest(run)
                torn += 1
            else:
                kills += kill(run, dice.choice(("trainer", "orchestrator", "rollout-0", "reward-0", "redis")))
        assert run.finish(1800) == 0, run.screen()
    finally:
        run.close()
    told(run, began, clock_jumps=jumps, torn_files=torn, kills=kills)
    assert_unharmed(run.dir, whole.dir)
