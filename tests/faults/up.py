"""`rlif up` for runs that are killed all the time: a process that lived for seconds counts as well again."""

from services import supervisor
from services.cli.main import main

supervisor.CALM_SECONDS = 3.0

if __name__ == "__main__":
    main()
