"""Broadcasts between real GPUs (ipc: one, nccl: two). Skipped without them, so no machine without a GPU has run it."""

import asyncio
import uuid

import pytest
import torch
from rollout_weights import publish
from served import served
from tiny import make_tiny_model
from transformers import AutoModelForCausalLM

from services.api import RolloutRequest
from services.clients import RolloutClient
from services.contract import Sampling, Version
from services.redis import connect_sync
from services.weights.broadcast import Broadcaster
from services.weights.sender import BROADCASTS, Sender

pytest.importorskip("vllm")
pytestmark = [pytest.mark.vllm, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]


@pytest.mark.parametrize("transport", ["ipc", "nccl"])
async def test_an_engine_on_a_gpu_takes_broadcasts(redis_url, tmp_path, monkeypatch, transport):
    if transport == "nccl" and torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs: NCCL takes none twice")
    from rollout_server.app import Settings, create

    torch.cuda.init()  # this process, the trainer, sees all; the engine's sees one
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0" if transport == "ipc" else "1")
    run = f"gpu-{uuid.uuid4().hex[:8]}"
    folders = [make_tiny_model(tmp_path / str(seed), seed=seed, hidden=128, tied=False) for seed in range(3)]
    oracles = [AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64) for folder in folders]
    settings = Settings(
        str(folders[0]),
        engine="vllm",
        device="cuda",
        dtype="float32",
        max_model_len=256,
        gpu_memory_utilization=0.3,
        redis_url=redis_url,
        run_id=run,
        broadcasts=True,
    )
    failed = BROADCASTS.labels("failed")._value.get()
    with connect_sync(redis_url) as redis, served(create(settings), deadline_seconds=280) as url:
        sender = Sender(redis, run, transport, torch.device("cuda", 0), seconds=60)
        broadcaster = Broadcaster(sender, transport, tmp_path / "weights", bucket_bytes=100_000)
        try:
            for step in range(6):
                wanted = Version(version=step)
                location = await asyncio.to_thread(publish, broadcaster, wanted, folders[step % 3])
                assert location.exists() == (step == 0)
                asked = RolloutRequest(
                    group_id=str(step),
                    prompt="The sun",
                    n=2,
                    sampling=Sampling(max_tokens=16),
                    min_weight_version=wanted,
                )
                async with RolloutClient(url) as client:
                    answer = await client.rollouts([asked], deadline_seconds=120)
                assert answer.weight_version == wanted
                check(answer.groups[0], oracles[step % 3])
        finally:
            await asyncio.to_thread(broadcaster.close)
    assert BROADCASTS.labels("failed")._value.get() == failed


def check(group, oracle) -> None:
    for one in group.completions:
        ids = group.prompt_token_ids + one.token_ids
        with torch.no_grad():
            logits = oracle(torch.tensor([ids])).logits[0, len(group.prompt_token_ids) - 1 : -1]
        expected = logits.log_softmax(-1)[range(len(one.token_ids)), one.token_ids]
        # GPUs multiply float32 with fewer bits; another version's logprobs are off by whole nats.
        torch.testing.assert_close(torch.tensor(one.logprobs), expected.float(), atol=0.05, rtol=0.05)
