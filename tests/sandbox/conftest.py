"""A real sandbox."""

import pytest
from sandboxes import started

from reward_server.sandbox.bubblewrap import Bubblewrap


@pytest.fixture
async def sandbox():
    sandbox = await started(Bubblewrap(concurrency=2))
    yield sandbox
    await sandbox.stop()
