"""A Python script as the ranks of one training job."""

import sys


def command(ranks: int, *rest: str) -> list[str]:
    """The command; `rlif train` starts its own ranks the same way."""
    argv = [sys.executable, *rest]
    if ranks == 1:
        return argv
    code = (
        "import sys; from services.launch.ranks import *; sys.exit(launch(sys.argv[2:], int(sys.argv[1]), Place(), {}))"
    )
    return [sys.executable, "-c", code, str(ranks), *argv]
