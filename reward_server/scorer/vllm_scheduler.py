"""A vLLM scheduler under which a scored row is never taken from the prefix cache: cached rows yield no output."""

import os

from vllm.v1.core.kv_cache_utils import BlockHash
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import Request


class ScorerScheduler(Scheduler):
    """Requests share the blocks of what comes before their first scored row, and only those.

    The block that holds the first scored row and all blocks after it get names of their own, so that neither an equal
    completion nor a prompt that ends with its block can be found in the cache.
    """

    def add_request(self, request: Request) -> None:
        params = request.pooling_params
        if params is not None and params.extra_kwargs is not None:
            shared = min(first for first, _, _ in params.extra_kwargs["passes"]) // self.hash_block_size
            own = len(request.block_hashes) - shared
            request.block_hashes[shared:] = [BlockHash(os.urandom(32)) for _ in range(own)]
        super().add_request(request)
