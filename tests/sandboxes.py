"""The real sandbox for tests: skipped where it cannot be set up, unless RLIF_REQUIRE_SANDBOX is set."""

import os

import pytest

from reward_server.sandbox.bubblewrap import Bubblewrap
from services.startup import StartupError


async def started(sandbox: Bubblewrap) -> Bubblewrap:
    try:
        await sandbox.start()
    except StartupError as error:
        if os.environ.get("RLIF_REQUIRE_SANDBOX"):
            raise
        pytest.skip(str(error))
    return sandbox
