"""A node that serves nothing itself: it holds workers of the vLLM engine that a leader on another node serves."""

import logging
import time
from contextlib import suppress

import httpx

from rollout_server.engines.base import EngineSettings
from rollout_server.engines.vllm import arguments
from services import vllm_process
from services.startup import StartupError

log = logging.getLogger(__name__)

LOOK_SECONDS = 5.0
LEADER_SECONDS = 60.0
"""How long the leader may be silent: its workers would wait for it for ever."""
START_SECONDS = 1800.0
"""How long the leader may take to serve once all nodes have joined."""


def work(settings: EngineSettings, leader_port: int) -> int:
    """Take part in the engine until it is over; weights are loaded when the leader loads them, from the same path.

    Returns an exit code, always 1: an engine that lost a node must be started anew on all of them. Raises StartupError:
    vLLM refuses the settings, or the nodes did not meet.
    """
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.usage.usage_lib import UsageContext
    from vllm.v1.executor.multiproc_executor import MultiprocExecutor

    args = AsyncEngineArgs.from_cli_args(arguments(settings, vllm_process.on_cpu(settings.device, settings.threads)))
    vllm_process.model_config(args, settings.served_name)
    log.info("node %d of %d joins the leader %s", settings.node_rank, settings.nodes, settings.leader)
    try:
        config = args.create_engine_config(usage_context=UsageContext.OPENAI_API_SERVER, headless=True)
        executor = MultiprocExecutor(config, monitor_workers=True)
    except Exception as error:  # vLLM reports every start-up failure of its processes as a bare error
        raise StartupError(f"--engine vllm: node {settings.node_rank} could not join: {error}") from error
    log.info("node %d has joined", settings.node_rank)
    try:
        why = _until_over(executor, f"http://{settings.leader}:{leader_port}/healthz")
    finally:
        executor.shutdown()
    log.error("node %d ends: %s", settings.node_rank, why)
    return 1


def _until_over(executor, url: str) -> str:
    """Why this node has nothing more to do."""
    silent_at = time.monotonic() + START_SECONDS
    while True:
        if executor.is_failed:
            return "one of its workers died"
        with suppress(httpx.HTTPError):
            httpx.get(url, timeout=LOOK_SECONDS)
            silent_at = time.monotonic() + LEADER_SECONDS
        if time.monotonic() > silent_at:
            return f"the leader does not answer at {url}"
        time.sleep(LOOK_SECONDS)
