"""A server that follows a run's weights and takes broadcasts, all but the model: in this process, or in one of its own.

    python tests/broadcast_server.py REDIS_URL RUN REPLICA [LINEAGE.VERSION]

prints a JSON line for each version that it serves; called to the version that is named, it stops itself (SIGSTOP).
"""

import asyncio
import json
import os
import signal
import sys
import uuid
from pathlib import Path

import torch

from services.contract import Version, WeightVersion
from services.weights import buckets, disk
from services.weights.follow import Follower
from services.weights.lines import Line, open_line
from services.weights.meeting import Meet, Ticket


class Receiving:
    """What stands where vLLM's engine does: tensors in memory, changed as the engine changes its own."""

    def __init__(self, stop_at: str = "") -> None:
        self.session, self.stop_at = uuid.uuid4().hex, stop_at
        self.tensors: dict[str, torch.Tensor] = {}
        self.events: list[str] = []
        self.tickets: list[Ticket] = []
        self.line: Line | None = None
        self.line_id = ""

    async def load(self, version: Version, directory: Path) -> None:
        manifest = WeightVersion.model_validate_json((directory / "manifest.json").read_bytes()).manifest
        self.tensors = {name: tensor.clone() for name, tensor in disk.read_tensors(directory, manifest)}
        self.events.append(f"file {version}")

    async def receive(self, weights: WeightVersion, meet: Meet) -> WeightVersion:
        self.events.append("pause")
        try:
            ticket = await meet(self.session, 1)
            if str(ticket.weights.id) == self.stop_at:
                os.kill(os.getpid(), signal.SIGSTOP)
            await asyncio.to_thread(self.take, ticket)
        finally:
            self.events.append("resume")
        self.tickets.append(ticket)
        self.events.append(f"broadcast {ticket.weights.id}")
        return ticket.weights

    def take(self, ticket: Ticket) -> None:
        call, manifest, cpu = ticket.call, ticket.weights.manifest, torch.device("cpu")
        if self.line_id != call.line_id:
            capacity = max(bucket.size for bucket in buckets.plan(manifest, call.bucket_bytes))
            rank, seconds = ticket.first_rank, call.seconds
            self.line = open_line(call.line, call.rendezvous, rank, call.size, cpu, seconds, capacity)
            self.line_id = call.line_id
        assert self.line is not None
        found: dict[str, torch.Tensor] = {}
        for some in buckets.received(self.line.broadcast, manifest, call.bucket_bytes, call.sums, cpu):
            found |= {name: tensor.clone() for name, tensor in some}
        self.tensors = found


def follower(redis_url: str, run: str, replica: str, engine: Receiving, service: str = "rollout") -> Follower:
    return Follower(redis_url, run, replica, service, "", engine.load, poll_seconds=0.02, receive=engine.receive)


async def main(redis_url: str, run: str, replica: str, stop_at: str = "") -> None:
    engine = Receiving(stop_at)
    following = follower(redis_url, run, replica, engine)
    await following.start()
    said = None
    while True:
        if following.version != said:
            said = following.version
            sums = {name: disk.checksum(tensor.contiguous()) for name, tensor in engine.tensors.items()}
            sys.stdout.write(json.dumps({"version": str(said), "sums": sums}) + "\n")
            sys.stdout.flush()
        await asyncio.sleep(0.02)


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
