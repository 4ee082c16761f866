#!/usr/bin/env -S python3 -IS
"""Exit code 0 when HEALTH_URL (or the first argument) answers 200 within 4 s; else 1, and what it answered."""

import os
import sys
from http.client import HTTPException
from urllib.error import HTTPError
from urllib.request import ProxyHandler, build_opener


def main() -> int:
    url = sys.argv[1] if len(sys.argv) > 1 else os.environ["HEALTH_URL"]
    try:
        # A proxy of the environment must not be asked for an address of this very container.
        with build_opener(ProxyHandler({})).open(url, timeout=4) as answer:
            answer.read()
        return 0
    except HTTPError as error:
        sys.stderr.write(f"{url}: {error.code} {error.read(2000).decode(errors='replace')}\n")
    except (OSError, HTTPException) as error:
        sys.stderr.write(f"{url}: {error}\n")
    return 1


if __name__ == "__main__":
    sys.exit(main())
