"""torchrun whose exit code tells a refusal (2) from a failure (1), and which leaves the last word to the ranks.

`python -m services.launch.torchrun <torchrun's arguments>`.
"""

import sys

from torch.distributed import run
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from services.supervisor import EXIT_FAILED, EXIT_REFUSED


def main(arguments: list[str]) -> int:
    try:
        run.run(run.parse_args(arguments))
    except ChildFailedError as error:
        codes = {failure.exitcode for failure in error.failures.values()}
        return EXIT_REFUSED if EXIT_REFUSED in codes else EXIT_FAILED
    except SignalException as error:
        return 128 + error.sigval
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
