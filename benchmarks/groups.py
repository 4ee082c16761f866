"""The queue: groups a second from push to acknowledgement, and the share of a run's steps that is no model compute.

    python benchmarks/groups.py [--groups N] [--tokens T] [--size G] [--json]
    python benchmarks/groups.py --run RUN_DIR [--skip N]

First form: groups of G completions of T tokens through `GroupQueue` on a private redis-server of its own, pushed by
four tasks while one consumer pulls, begins, finishes and acknowledges them eight at a time; beside it the same payloads
by bare XADD, XREADGROUP and XACK. With `appendfsync` always (the default of a private server) and everysec.
Second form: what a run that is over recorded in steps.jsonl, without its first steps: the shares of the trainer's
phases, and of what it did besides computing in the time in which it did not wait for groups.
"""

import argparse
import asyncio
import json
import random
import statistics
import tempfile
import time
from pathlib import Path

from redis.asyncio import Redis

from services import codec
from services.contract import Completion, CompletionScore, Sampling, Score, ScoredGroup, Task, Version
from services.queue import GroupQueue
from services.redis import EmbeddedRedis, connect
from services.steps import read_steps

PUSHERS, BATCH = 4, 8
COMPUTE = ("compute", "optimizer")
"""Phases of steps.jsonl in which the model computes."""


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--groups", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=512, help="of a completion")
    parser.add_argument("--size", type=int, default=8, help="completions of a group")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--run", type=Path, help="the folder of a run that is over")
    parser.add_argument("--skip", type=int, default=2, help="its first steps, which compile and warm up")
    parser.add_argument("--json", action="store_true")
    return parser.parse_args()


def make_groups(options: argparse.Namespace) -> list[ScoredGroup]:
    draw = random.Random(0)

    def completion() -> Completion:
        ids = [draw.randrange(150_000) for _ in range(options.tokens)]
        logprobs = [-draw.expovariate(1.0) for _ in ids]
        text = "word " * options.tokens
        return Completion(
            text=text, token_ids=ids, logprobs=logprobs, finish_reason="stop", weight_version=Version(version=1)
        )

    score = CompletionScore(components={"self_certainty": Score.of(1.5)}, reward=1.5, advantage=0.3, valid=True)
    return [
        ScoredGroup(
            group_id=f"{number:032x}",
            index=number,
            task=Task(task_id=str(number), prompt="a question " * 20),
            prompt_token_ids=[draw.randrange(150_000) for _ in range(100)],
            completions=[completion() for _ in range(options.size)],
            sampling=Sampling(max_tokens=options.tokens),
            scores=[score] * options.size,
            spec_id="spec",
        )
        for number in range(options.groups)
    ]


async def through_queue(url: str, run: str, groups: list[ScoredGroup]) -> float:
    """Groups a second."""
    waiting = iter(groups)
    async with connect(url) as pusher, connect(url) as puller:
        consumer = GroupQueue(puller, run)
        await consumer.claim_lineage(0)
        await consumer.recover([])

        async def push() -> None:
            queue = GroupQueue(pusher, run)
            for group in waiting:
                await queue.push(group)

        began = time.perf_counter()
        pushers = [asyncio.ensure_future(push()) for _ in range(PUSHERS)]
        done = 0
        while done < len(groups):
            entries = await consumer.pull(BATCH, 60)
            await consumer.begin(entries)
            await consumer.finish(entries)
            await consumer.ack([entry.entry_id for entry in entries], 0)
            done += len(entries)
        seconds = time.perf_counter() - began
        await asyncio.gather(*pushers)
    return len(groups) / seconds


async def bare(url: str, name: str, payloads: list[bytes]) -> float:
    """Groups a second of the stream commands alone."""
    waiting = iter(payloads)
    async with connect(url) as pusher, connect(url) as puller:
        await puller.xgroup_create(name, "g", id="0", mkstream=True)

        async def push(redis: Redis) -> None:
            for payload in waiting:
                await redis.xadd(name, {"g": payload})

        began = time.perf_counter()
        pushers = [asyncio.ensure_future(push(pusher)) for _ in range(PUSHERS)]
        done = 0
        while done < len(payloads):
            answer = await puller.xreadgroup("g", "c", {name: ">"}, BATCH, block=10_000)
            ids = [entry_id for _, entries in answer for entry_id, _ in entries]
            await puller.xack(name, "g", *ids)
            done += len(ids)
        seconds = time.perf_counter() - began
        await asyncio.gather(*pushers)
    return len(payloads) / seconds


async def measure(options: argparse.Namespace, url: str) -> list[dict]:
    groups = make_groups(options)
    payloads = [codec.pack(group) for group in groups]
    began = time.perf_counter()
    for payload in payloads:
        codec.unpack_as(ScoredGroup, payload)
    reading = len(groups) / (time.perf_counter() - began)
    rows = []
    async with connect(url) as redis:
        for policy in ("always", "everysec"):
            await redis.config_set("appendfsync", policy)
            ours, raw = [], []
            for number in range(options.rounds):
                ours.append(await through_queue(url, f"{policy}-{number}", groups))
                raw.append(await bare(url, f"bare:{policy}:{number}", payloads))
                await redis.flushall()
            rows.append(
                {
                    "appendfsync": policy,
                    "bytes": len(payloads[0]),
                    "groups_per_s": statistics.median(ours),
                    "bare_per_s": statistics.median(raw),
                    "unpacked_per_s": reading,
                }
            )
    return rows


def outside_compute(run: Path, skip: int) -> dict:
    rows = read_steps(run / "steps.jsonl")[skip:]
    if not rows:
        raise SystemExit(f"{run}: no step is left after the first {skip}")
    total = sum(row["seconds"]["total"] for row in rows)
    sums: dict[str, float] = {}
    for row in rows:
        for name, seconds in row["seconds"].items():
            sums[name] = sums.get(name, 0.0) + seconds
    busy = total - sums.get("wait", 0.0)
    outside = busy - sum(sums.get(name, 0.0) for name in COMPUTE)
    shares = {name: seconds / total for name, seconds in sums.items() if name != "total"}
    return {
        "steps": len(rows),
        "seconds_a_step": total / len(rows),
        "shares": shares,
        "outside_of_busy": outside / busy,
    }


def main() -> None:
    options = arguments()
    if options.run:
        found = outside_compute(options.run, options.skip)
        print(json.dumps(found, indent=1))
        return
    with tempfile.TemporaryDirectory() as folder, EmbeddedRedis(Path(folder)) as redis:
        rows = asyncio.run(measure(options, redis.url))
    if options.json:
        print(json.dumps(rows, indent=1))
        return
    for row in rows:
        print(
            f"appendfsync {row['appendfsync']}: {row['groups_per_s']:.0f} groups/s of {row['bytes'] / 1e3:.0f} kB, "
            f"bare stream commands {row['bare_per_s']:.0f} ({row['groups_per_s'] / row['bare_per_s']:.2f}x); "
            f"unpacking alone {row['unpacked_per_s']:.0f}"
        )


if __name__ == "__main__":
    main()
