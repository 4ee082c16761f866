"""A server's part in a broadcast to its vLLM engine: asked of the engine's workers, within a deadline.

A worker that waits for ever cannot be woken, and a half-loaded model cannot be mended: then the engine is lost. It says
why in `lost`; the server ends, and whoever watches it starts it again.
"""

import asyncio
import uuid
from typing import Any

from services.weights.meeting import Ticket

BACKEND = "rlif"
"""The name of our weight-transfer engine within vLLM (services.weights.vllm_worker)."""
CONFIG = {"backend": BACKEND}
MARGIN_SECONDS = 5.0
"""A server gives up a little later than the trainer, whose end frees it where that can be."""


class Broadcasts:
    """The broadcasts to one engine of `workers` workers; `session` tells it from the one that runs after a restart."""

    def __init__(self, workers: int):
        self.workers = workers
        self.session = uuid.uuid4().hex
        self.lost = ""
        self._line_id = ""

    async def open(self, llm: Any, ticket: Ticket) -> None:
        """Open the line of the ticket's call unless it is open; the model stays as it is. Raises RuntimeError."""
        call = ticket.call
        if self._line_id == call.line_id:
            return
        self._line_id = ""
        try:
            async with asyncio.timeout(call.seconds + MARGIN_SECONDS):
                line = {"init_info": _line_info(ticket)}
                await llm.collective_rpc("init_weight_transfer_engine", kwargs=line)
        except TimeoutError:
            self.lost = f"the line for weights {call.version} was not open after {call.seconds:g} s"
            raise RuntimeError(self.lost) from None
        except Exception as error:  # vLLM reports whatever happened to a worker as a bare error
            raise RuntimeError(f"the line for weights {call.version} could not be opened: {error}") from error
        self._line_id = call.line_id

    async def take(self, llm: Any, ticket: Ticket) -> None:
        """Load what comes along the line, while nothing runs. Raises RuntimeError; then the engine is lost."""
        call = ticket.call
        try:
            async with asyncio.timeout(call.seconds + MARGIN_SECONDS):
                await llm.collective_rpc("start_weight_update")
                await llm.collective_rpc("update_weights", kwargs={"update_info": _buckets_info(ticket)})
                await llm.collective_rpc("finish_weight_update")
                await llm.reset_prefix_cache()
                await llm.update_weight_version(str(call.version))
        except TimeoutError:
            self.lost = f"the broadcast of weights {call.version} did not end within {call.seconds:g} s"
            raise RuntimeError(self.lost) from None
        except Exception as error:
            self.lost = f"the broadcast of weights {call.version} broke off: {error}"
            raise RuntimeError(self.lost) from error


def _line_info(ticket: Ticket) -> dict[str, Any]:
    from services.weights import buckets

    call = ticket.call
    return {
        "kind": call.line,
        "rendezvous": call.rendezvous,
        "first_rank": ticket.first_rank,
        "size": call.size,
        "seconds": call.seconds,
        "capacity": max(bucket.size for bucket in buckets.plan(ticket.weights.manifest, call.bucket_bytes)),
    }


def _buckets_info(ticket: Ticket) -> dict[str, Any]:
    manifest = ticket.weights.manifest
    return {
        "names": [entry.name for entry in manifest],
        "dtypes": [entry.dtype for entry in manifest],
        "shapes": [entry.shape for entry in manifest],
        "bucket_bytes": ticket.call.bucket_bytes,
        "sums": ticket.call.sums,
    }
