"""A message to somebody's web hook: a POST of JSON with a deadline, tried a few times, never the run's problem."""

import asyncio
import logging
import os
from typing import Any
from urllib.parse import urlsplit

import httpx

from services.clients import pause_before

log = logging.getLogger(__name__)

ATTEMPTS = 4
SECONDS = 10.0


async def post(url: str, body: dict[str, Any]) -> bool:
    """Whether it was taken (2xx). RLIF_WEBHOOK_TOKEN goes with it as bearer token; logs name the host alone, because
    the rest of such a URL often is a secret."""
    token, host = os.environ.get("RLIF_WEBHOOK_TOKEN"), urlsplit(url).hostname
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    async with httpx.AsyncClient(timeout=SECONDS) as client:
        for attempt in range(1, ATTEMPTS + 1):
            try:
                async with asyncio.timeout(SECONDS):
                    answer = await client.post(url, json=body, headers=headers)
                if answer.is_success:
                    return True
                said = f"answered {answer.status_code}"
            except (httpx.HTTPError, TimeoutError) as error:
                said = f"could not be reached ({type(error).__name__})"
            log.warning("the web hook at %s %s (attempt %d of %d)", host, said, attempt, ATTEMPTS)
            if attempt < ATTEMPTS:
                await asyncio.sleep(pause_before(attempt))
    return False
