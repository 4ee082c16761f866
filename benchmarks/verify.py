"""Checking math: the server's verifier processes against math-verify alone, and good requests beside hostile ones.

    python benchmarks/verify.py [--data FILE.jsonl] [--pairs N] [--workers N] [--seconds S] [--json]

First part: the same (reference, completion) pairs, half of them right, checked by math-verify in one process (parse and
verify, as its manual has it) and by the reward `math_verify` in the server's worker processes. Each side has checked as
many other pairs before: parsers are slow at first.
Second part: a real `rlif serve reward`. One client asks for one good verdict after the other, calm for a while, then
while three others send groups of hostile answers without pause.
"""

import argparse
import asyncio
import json
import os
import random
import statistics
import time
from pathlib import Path

import httpx
from prometheus_client import REGISTRY

from reward_server.evaluate import Means, score_groups
from reward_server.rewards import math_verify
from reward_server.specs import named_spec
from reward_server.workers import WorkerPool
from services.api import CompletionText, RewardGroup
from services.cli.child import serving
from services.contract import Reference, Task

HOSTILE = [
    "\\boxed{9^{9^{9^9}}}",
    "\\boxed{10^{10^{10}}}",
    "\\boxed{(10^9)!}",
    "\\boxed{" + "\\frac{1}{" * 30 + "2" + "}" * 30 + "}",
    "\\boxed{" + "{" * 200 + "1" + "}" * 200 + "}",
    "\\boxed{" + "(" * 60 + "1" + ")" * 60 + "}",
    "\\boxed{(x+1)^{5000}}",
    "\\boxed{\\sum_{i=1}^{1000000000} i^{i}}",
]
ATTACKERS = 3
MADE = [
    "42",
    "\\frac{3}{4}",
    "x^2+1",
    "(3, 4)",
    "\\sqrt{2}",
    "-17",
    "0.125",
    "2\\pi",
    "[0, 1)",
    "1{,}024",
    "y = 3x - 2",
]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="JSONL with the field `answer`; left out: made answers")
    parser.add_argument("--pairs", type=int, default=600)
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--seconds", type=float, default=15.0, help="of good requests, calm and under attack each")
    parser.add_argument("--json", action="store_true")
    return parser.parse_args()


def pairs(options: argparse.Namespace) -> list[tuple[str, str]]:
    """(reference, completion): every second completion gives the answer of another row. Twice as many as asked for."""
    if options.data:
        answers = [json.loads(line)["answer"] for line in options.data.read_text().splitlines()]
        answers = random.Random(0).sample(answers, min(2 * options.pairs, len(answers)))
    else:
        answers = [MADE[number % len(MADE)] for number in range(2 * options.pairs)]
    return [
        (answer, f"Let us see.\n\nSo it is $\\boxed{{{answer if place % 2 else answers[place - 1]}}}$.")
        for place, answer in enumerate(answers)
    ]


# ---- throughput ------------------------------------------------------------------------------------------------


def alone(before: list[tuple[str, str]], work: list[tuple[str, str]]) -> float:
    """Pairs a second of math-verify in this process."""
    from math_verify import parse, verify

    for some in (before, work):
        started = time.perf_counter()
        for gold, text in some:
            verify(parse(f"${gold}$"), parse(text))
    return len(work) / (time.perf_counter() - started)


async def pooled(before: list[tuple[str, str]], work: list[tuple[str, str]], workers: int) -> tuple[float, int]:
    """(pairs a second of the reward, verdicts that failed)"""
    pool = WorkerPool(workers, warm_up=[math_verify.WARM_UP])
    pool.start()
    everyone = pool.fast_workers + pool.slow_workers + 1  # one is the spare
    while REGISTRY.get_sample_value("rlif_verifier_processes") != everyone:
        await asyncio.sleep(0.05)
    for some in (before, work):
        groups = [group(str(place), gold, [text]) for place, (gold, text) in enumerate(some)]
        started = time.perf_counter()
        scored = await score_groups(named_spec("math_verify"), groups, Means(pool), time.monotonic() + 600)
    rate = len(work) / (time.perf_counter() - started)
    await pool.stop()
    failed = sum(not item.valid for one in scored for item in one.scores)
    return rate, failed


def group(name: str, gold: str, texts: list[str]) -> RewardGroup:
    task = Task(task_id=name, prompt="?", reference=Reference(answer=gold))
    return RewardGroup(group_id=name, task=task, completions=[CompletionText(text=text) for text in texts])


# ---- latency beside an attack ----------------------------------------------------------------------------------


async def latencies(url: str, work: list[tuple[str, str]], seconds: float, attackers: int) -> tuple[list[float], int]:
    """(seconds of each good request, how many hostile groups were answered meanwhile)"""
    answered = 0

    async def attack(number: int) -> None:
        nonlocal answered
        async with httpx.AsyncClient(base_url=url, timeout=120) as client:
            for turn in range(10_000):
                texts = [f"{number} {turn} {text}" for text in HOSTILE]
                body = {"spec": "math_verify", "groups": [group("bad", "7", texts).model_dump()]}
                await client.post("/v1/rewards", json=body)
                answered += 1

    tasks = [asyncio.create_task(attack(number)) for number in range(attackers)]
    found: list[float] = []
    ends = time.monotonic() + seconds
    async with httpx.AsyncClient(base_url=url, timeout=120) as client:
        place = 0
        while time.monotonic() < ends:
            gold, text = work[place % len(work)]
            body = {"spec": "math_verify", "groups": [group("good", gold, [text]).model_dump()]}
            started = time.perf_counter()
            answer = await client.post("/v1/rewards", json=body)
            found.append(time.perf_counter() - started)
            assert answer.status_code == 200, answer.text
            outcome = answer.json()["groups"][0]["scores"][0]["components"]["math_verify"]["outcome"]
            assert outcome not in ("timeout", "error"), answer.text
            place += 1
            await asyncio.sleep(0.02)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    return found, answered


def percentiles(seconds: list[float]) -> dict[str, float]:
    """Milliseconds."""
    cuts = statistics.quantiles(seconds, n=100)
    return {"p50": 1000 * cuts[49], "p99": 1000 * cuts[98], "requests": len(seconds)}


def main() -> None:
    options = arguments()
    everything = pairs(options)
    before, work = everything[: len(everything) // 2], everything[len(everything) // 2 :]
    single = alone(before, work)
    rate, failed = asyncio.run(pooled(before, work, options.workers))
    result = {"alone": single, "pool": rate, "workers": options.workers, "ratio": rate / single, "failed": failed}
    with serving("reward", "--verifier-workers", str(options.workers)) as url:
        asyncio.run(latencies(url, work, 3.0, 0))  # warm up
        calm, _ = asyncio.run(latencies(url, work, options.seconds, 0))
        attacked, hostile = asyncio.run(latencies(url, work, options.seconds, ATTACKERS))
    result |= {"calm": percentiles(calm), "attacked": percentiles(attacked), "hostile_groups": hostile}
    if options.json:
        print(json.dumps(result))
        return
    print(
        f"{len(work)} pairs: math-verify alone {single:.0f} pairs/s, {options.workers} workers {rate:.0f} pairs/s: ",
        end="",
    )
    print(f"{rate / single:.2f}x ({failed} without a verdict)")
    for name in ("calm", "attacked"):
        row = result[name]
        print(f"{name:9} p50 {row['p50']:7.1f} ms   p99 {row['p99']:7.1f} ms   ({row['requests']} good requests)")
    ratios = [result["attacked"][name] / result["calm"][name] for name in ("p50", "p99")]
    print(
        f"beside {ATTACKERS} attackers: p50 {ratios[0]:.2f}x, p99 {ratios[1]:.2f}x; {hostile} hostile groups answered"
    )


if __name__ == "__main__":
    main()
