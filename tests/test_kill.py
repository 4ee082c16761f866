"""kill -9 on every process of a real run: it goes on, loses nothing, trains nothing twice, ends with equal weights."""

import os
import shutil
import signal

import pytest
from audit import read_steps, surviving
from faults.faulty_run import Run, assert_unharmed, write_recipe

from services.contract import group_id

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

STEPS, GROUPS_PER_STEP = 16, 4


@pytest.fixture(scope="module")
def unbroken(tiny_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    run = Run(write_recipe(folder, tiny_model, "unbroken"), folder / "unbroken")
    assert run.finish() == 0, run.screen()
    return run


def test_unbroken_run_trains_the_expected_groups(unbroken):
    kept = surviving(read_steps(unbroken.dir))
    assert sorted(kept) == list(range(1, STEPS + 1))
    trained = [group for groups in kept.values() for group in groups]
    assert len(set(trained)) == len(trained) == STEPS * GROUPS_PER_STEP
    epoch_zero = {group_id("kill", 0, f"t{n}") for n in range(40)}
    assert epoch_zero <= set(trained)  # 64 groups: all 40 of the first epoch, 24 of the second


def test_kill_nine_on_every_process(unbroken, tiny_model):
    folder = unbroken.dir.parent
    run = Run(write_recipe(folder, tiny_model, "broken"), folder / "broken")
    try:
        for step, victim in [(2, "trainer"), (4, "orchestrator"), (6, "rollout-0"), (8, "reward-0"), (10, "redis")]:
            run.wait_step(step)
            os.kill(run.pid(victim), signal.SIGKILL)
        run.wait_step(13)
        os.kill(run.pid("trainer"), signal.SIGKILL)
        assert run.finish() == 0, run.screen()
    finally:
        run.close()
    assert len({record["lineage"] for record in read_steps(run.dir)}) >= 2
    assert_unharmed(run.dir, unbroken.dir)


@pytest.mark.faults
def test_a_killed_supervisor_is_resumed(unbroken, tiny_model):
    folder = unbroken.dir.parent
    recipe = write_recipe(folder, tiny_model, "resumed")
    run = Run(recipe, folder / "resumed")
    try:
        run.wait_step(5)
    finally:
        run.process.kill()
        run.close()
    refused = Run(recipe, folder / "resumed")
    assert refused.finish(60) == 2
    again = Run(recipe, folder / "resumed", "--resume")
    assert again.finish() == 0, again.screen()
    assert_unharmed(again.dir, unbroken.dir)


@pytest.mark.faults
def test_what_only_a_damaged_checkpoint_held_is_made_again(unbroken, tiny_model):
    """Its groups are acknowledged long since."""
    folder = unbroken.dir.parent
    recipe = write_recipe(folder, tiny_model, "spoilt")
    run = Run(recipe, folder / "spoilt")
    try:
        run.wait_step(8)
    finally:
        run.process.kill()
        run.close()
    newest = max((run.dir / "checkpoints").glob("0-*"), key=lambda path: int(path.name[2:]))
    (victim,) = newest.glob("rank-0/*.safetensors")
    os.truncate(victim, victim.stat().st_size // 2)
    again = Run(recipe, folder / "spoilt", "--resume")
    assert again.finish() == 0, again.screen()
    assert_unharmed(again.dir, unbroken.dir)


def test_a_lost_redis_costs_nothing_that_a_checkpoint_holds(unbroken, tiny_model):
    folder = unbroken.dir.parent
    recipe = write_recipe(folder, tiny_model, "forgotten")
    run = Run(recipe, folder / "forgotten")
    try:
        run.wait_step(8)
    finally:
        run.process.kill()
        run.close()
    shutil.rmtree(run.dir / "redis")
    again = Run(recipe, folder / "forgotten", "--resume")
    assert again.finish() == 0, again.screen()
    assert_unharmed(again.dir, unbroken.dir)
