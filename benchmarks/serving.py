"""Serving scores: 64 clients at once against the reward server, and against one that takes a request at a time.

    python benchmarks/serving.py [--clients N] [--seconds S] [--json] [model and length options]

Two real servers, one after the other, with the same random Qwen2 and the same requests (one completion each, as token
ids, self-certainty wanted):
  rlif    `rlif serve reward`: requests that wait share a batch, the LM head is tiled
  naive   a FastAPI app as reward-model servers are often written: a synchronous forward inside `async def`, full logits
The HTTP share is the part of the wall time in which the model's thread is idle: 1 - (time of its rounds) / (wall time).
Clients live in a process of their own on the same machine, so they take part of it from both servers.
"""

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=20.0, help="of load on each server, after a warm-up")
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--vocab", type=int, default=8192)
    parser.add_argument("--prompt", type=int, default=64, help="tokens")
    parser.add_argument("--completion", type=int, default=64, help="tokens")
    parser.add_argument("--threads", type=int, default=1, help="of the model; the other cores serve and ask")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--naive", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--port", type=int, default=0, help=argparse.SUPPRESS)
    return parser.parse_args()


def make_model(options: argparse.Namespace, folder: Path) -> None:
    import torch
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=options.vocab,
        hidden_size=options.hidden,
        intermediate_size=options.hidden * 4,
        num_hidden_layers=options.layers,
        num_attention_heads=options.hidden // 32,
        num_key_value_heads=options.hidden // 32,
        tie_word_embeddings=True,
        eos_token_id=0,
        bos_token_id=0,
    )
    Qwen2ForCausalLM(config).save_pretrained(folder)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"<eos>": 0, "a": 1})), eos_token="<eos>")
    tokenizer.save_pretrained(folder)


# ---- the naive server, in its own process ----------------------------------------------------------------------


def serve_naive(options: argparse.Namespace) -> None:
    import torch
    import uvicorn
    from fastapi import FastAPI, Request
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(options.threads)
    model = AutoModelForCausalLM.from_pretrained(options.naive, dtype=torch.float32).eval()
    app = FastAPI()

    @app.get("/readyz")
    async def ready() -> dict[str, str]:
        return {"status": "ready"}

    @app.post("/v1/score")
    async def score(request: Request) -> dict[str, list[float]]:
        found = []
        for item in (await request.json())["items"]:
            prompt, completion = item["prompt_token_ids"], item["completion_token_ids"]
            with torch.inference_mode():
                logits = model(input_ids=torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1].float()
                gap = torch.logsumexp(logits, -1) - logits.mean(-1) - torch.log(torch.tensor(float(logits.shape[1])))
            found.append(gap.mean().item())
        return {"scores": found}

    uvicorn.run(app, host="127.0.0.1", port=options.port, log_level="warning")


# ---- load ------------------------------------------------------------------------------------------------------


@contextmanager
def running(command: list[str], url: str, threads: int) -> Iterator[None]:
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "PASSIVE"}
    process = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
    try:
        ends = time.monotonic() + 120
        while True:
            try:
                if httpx.get(url + "/readyz", timeout=5).status_code == 200:
                    break
            except httpx.TransportError:
                pass
            if process.poll() is not None or time.monotonic() > ends:
                raise SystemExit(f"the server did not start: {' '.join(command)}")
            time.sleep(0.1)
        yield
    finally:
        process.terminate()
        process.wait(30)


def free_port() -> int:
    from services.address import listen

    with listen("127.0.0.1", 0) as bound:
        return bound.getsockname()[1]


def bodies(options: argparse.Namespace) -> list[bytes]:
    import random

    draw = random.Random(0)

    def ids(count: int) -> list[int]:
        return [draw.randrange(1, options.vocab) for _ in range(count)]

    items = [
        {"prompt_token_ids": ids(options.prompt), "completion_token_ids": ids(options.completion)} for _ in range(256)
    ]
    return [json.dumps({"items": [item], "metrics": ["self_certainty"]}).encode() for item in items]


async def load(url: str, work: list[bytes], clients: int, seconds: float) -> tuple[list[float], float]:
    """(seconds of each request, wall seconds)"""
    found: list[float] = []
    headers = {"Content-Type": "application/json"}
    limits = httpx.Limits(max_connections=clients, max_keepalive_connections=clients)
    async with httpx.AsyncClient(base_url=url, timeout=120, limits=limits, headers=headers) as http:
        started = time.monotonic()

        async def client(number: int) -> None:
            place = number
            while time.monotonic() < started + seconds:
                sent = time.perf_counter()
                answer = await http.post("/v1/score", content=work[place % len(work)])
                answer.raise_for_status()
                found.append(time.perf_counter() - sent)
                place += clients

        await asyncio.gather(*(client(number) for number in range(clients)))
        return found, time.monotonic() - started


def metric(url: str, name: str) -> float:
    lines = httpx.get(url + "/metrics").text.splitlines()
    return next((float(line.split()[1]) for line in lines if line.split(" ")[0] == name), 0.0)


def measure(options: argparse.Namespace, url: str) -> dict[str, float]:
    work = bodies(options)
    asyncio.run(load(url, work, options.clients, 3.0))
    before = {name: metric(url, name) for name in ROUNDS} if options.is_rlif else {}
    found, wall = asyncio.run(load(url, work, options.clients, options.seconds))
    cuts = statistics.quantiles(found, n=100)
    result = {"requests_per_second": len(found) / wall, "p50": 1000 * cuts[49], "p99": 1000 * cuts[98]}
    if before:
        scoring, rounds, calls = (metric(url, name) - before[name] for name in ROUNDS)
        result |= {"http_share": 1 - scoring / wall, "calls_per_round": calls / max(1.0, rounds)}
    return result


ROUNDS = ("rlif_scorer_round_seconds_sum", "rlif_scorer_round_seconds_count", "rlif_scorer_round_calls_sum")


def main() -> None:
    options = arguments()
    if options.naive:
        return serve_naive(options)
    result: dict = {}
    with tempfile.TemporaryDirectory(prefix="rlif-serving-") as folder:
        make_model(options, Path(folder))
        threads = str(options.threads)
        rlif = [sys.executable, "-m", "services.cli.main", "serve", "reward", "--model", folder, "--threads", threads]
        naive = [sys.executable, __file__, *sys.argv[1:], "--naive", folder]
        for name, command in (("rlif", rlif), ("naive", naive)):
            port = free_port()
            options.is_rlif = name == "rlif"
            with running([*command, "--port", str(port)], f"http://127.0.0.1:{port}", options.threads):
                result[name] = measure(options, f"http://127.0.0.1:{port}")
    result["ratio"] = result["rlif"]["requests_per_second"] / result["naive"]["requests_per_second"]
    if options.json:
        print(json.dumps(result))
        return
    shape = (
        f"hidden {options.hidden}, {options.layers} layers, V {options.vocab}, {options.prompt} + {options.completion}"
    )
    print(f"{options.clients} clients, one completion a request, {shape} tokens, {options.threads} model threads")
    for name in ("rlif", "naive"):
        row = result[name]
        print(f"{name:6} {row['requests_per_second']:7.1f} requests/s   p50 {row['p50']:7.1f} ms", end="   ")
        print(f"p99 {row['p99']:7.1f} ms")
    row = result["rlif"]
    print(f"rlif is {result['ratio']:.2f}x naive; {row['calls_per_round']:.1f} requests a batch; ", end="")
    print(f"{100 * row['http_share']:.0f} % of the time the model was idle (HTTP, JSON, waiting)")


if __name__ == "__main__":
    main()
