"""What `helm test` runs in the cluster: every service says it is ready, and the reward server scores a completion.

Usage: check.py [--wait=SECONDS] --score=URL URL...   with the token in RLIF_API_TOKEN.
Exit code 0 when all of it is so, 1 when something is not after SECONDS.
"""

import argparse
import os
import sys
import time

import httpx


def main() -> int:
    parser = argparse.ArgumentParser(description="Is every service ready, and does one completion get a score?")
    parser.add_argument("--score", required=True, help="a reward server")
    parser.add_argument("--wait", type=float, default=60, help="seconds that the services together may take")
    parser.add_argument("urls", nargs="+", help="services to ask for their readiness")
    arguments = parser.parse_args()
    faults, ends = [], time.monotonic() + arguments.wait
    token = os.environ.get("RLIF_API_TOKEN")
    with httpx.Client(timeout=60, headers={"Authorization": f"Bearer {token}"} if token else {}) as client:
        for url in arguments.urls:
            while (fault := _ready(client, url)) and time.monotonic() < ends:
                time.sleep(1)
            faults += fault
        faults += _scored(client, arguments.score)
    for fault in faults:
        print(f"FAILED {fault}", file=sys.stderr)
    return 1 if faults else 0


def _ready(client: httpx.Client, url: str) -> list[str]:
    try:
        answer = client.get(f"{url}/readyz")
    except httpx.HTTPError as error:
        return [f"{url}/readyz: {error}"]
    if answer.status_code != 200:
        return [f"{url}/readyz: {answer.status_code} {answer.text}"]
    print(f"ready  {url}: {answer.text}")
    return []


def _scored(client: httpx.Client, url: str) -> list[str]:
    body = {"items": [{"prompt": "2+2=", "completion": "4"}], "metrics": ["self_certainty"]}
    try:
        answer = client.post(f"{url}/v1/score", json=body)
    except httpx.HTTPError as error:
        return [f"{url}/v1/score: {error}"]
    if answer.status_code != 200:
        return [f"{url}/v1/score: {answer.status_code} {answer.text}"]
    result = answer.json()
    score, version = result["results"][0]["scores"]["self_certainty"], result["weight_version"]
    print(f"scored {url}: self_certainty {score:.4f} by weights {version['lineage']}.{version['version']}")
    return []


if __name__ == "__main__":
    sys.exit(main())
