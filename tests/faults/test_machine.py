"""One run on a bad machine, in short: slow syncs, a clock that jumps, weights torn while they are the newest."""

import json
import time

import pytest
from faults.disturbances import Machine, tear_newest
from faults.faulty_run import Run, assert_unharmed, newest_weights, write_recipe

pytestmark = [pytest.mark.faults, pytest.mark.slow, pytest.mark.timeout(600)]

STEPS = 8


def test_slow_syncs_clock_jumps_and_torn_weights_change_nothing(tiny_model, tmp_path):
    unbroken = Run(write_recipe(tmp_path, tiny_model, "unbroken", steps=STEPS), tmp_path / "unbroken")
    assert unbroken.finish() == 0, unbroken.screen()
    machine = Machine(tmp_path)
    run = Run(write_recipe(tmp_path, tiny_model, "bad", steps=STEPS), tmp_path / "bad", env=machine.env)
    try:
        run.wait_step(1)
        machine.set(sync_seconds=0.05, clock_seconds=7200)
        run.wait_step(3)
        machine.set(sync_seconds=0.05, clock_seconds=-86400)
        run.wait_step(5)
        torn = tear_newest(run).replace("-", ".")
        assert run.finish() == 0, run.screen()
    finally:
        run.close()
    assert_unharmed(run.dir, unbroken.dir)
    published = json.loads((newest_weights(run.dir) / "manifest.json").read_text())
    assert published["created_at"] < time.time() - 80000  # the clock did jump
    # The trainer found the torn version and began a lineage of its own.
    assert f"the published weights {torn} are damaged" in (run.dir / "logs" / "trainer.log").read_text()
