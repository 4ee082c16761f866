"""Bringing new weights to servers: against a raw copy, deltas by learning rate, and what an update costs rollouts.

    python benchmarks/weights.py [--parts disk delta adapter rollout] [--rounds N] [--json] [model and load options]

disk     a version published and followed (files, checksums, redis, the scorer's own loader), against copying the same
         bytes with one fsync. Medians of the rounds.
adapter  versions of LoRA adapters on all linear layers, by rank: their bytes against a whole version, and the seconds
         of publishing, merging and loading them.
delta    real AdamW steps (float32 master weights, bfloat16 as served) on next-token loss of random tokens: the bytes of
         a delta against a whole version, and the seconds of publishing and following it, after some steps to warm up.
rollout  a real `rlif serve rollout` under load, without updates and with one every few seconds, in every `in_flight`
         mode: seconds of finished completions lost per update.
"""

import argparse
import asyncio
import json
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import yaml

from reward_server.scorer.transformers import TransformersScorer
from services.api import RolloutRequest
from services.cli.child import serving
from services.clients import RolloutClient
from services.contract import Sampling, Version
from services.recipe_sections import Lora, Model
from services.redis import EmbeddedRedis, connect_sync
from services.weights import disk
from services.weights.follow import Follower
from services.weights.publish import Publisher
from trainer import lora
from trainer import policy as policies

PARTS = ("disk", "delta", "adapter", "rollout")
MODES = ("wait", "keep", "abort")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--rounds", type=int, default=5, help="versions of each kind that are timed")
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--vocab", type=int, default=32000)
    parser.add_argument("--rates", type=float, nargs="+", default=(1e-6, 3e-6, 1e-5, 1e-4), help="learning rates")
    parser.add_argument("--ranks", type=int, nargs="+", default=(4, 16, 64), help="of LoRA adapters")
    parser.add_argument("--warm-up", type=int, default=3, help="optimizer steps before a delta is measured")
    parser.add_argument("--seconds", type=float, default=30.0, help="of load in every mode")
    parser.add_argument("--every", type=float, default=6.0, help="seconds between two updates")
    parser.add_argument("--completion", type=int, default=128, help="tokens of a completion under load")
    parser.add_argument("--clients", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", action="store_true")
    return parser.parse_args()


def make_model(folder: Path, hidden: int, layers: int, vocab: int) -> Path:
    """A random Qwen2 in bfloat16."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=hidden * 4,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 32,
        num_key_value_heads=hidden // 32,
        tie_word_embeddings=True,
        eos_token_id=0,
        bos_token_id=0,
    )
    Qwen2ForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"<eos>": 0, "a": 1})), eos_token="<eos>")
    tokenizer.save_pretrained(folder)
    return folder


def load(folder: Path, dtype: torch.dtype):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)


# ---- following -------------------------------------------------------------------------------------------------


class Following:
    """A scorer that follows a run, in an event loop of its own that runs only inside `reach`."""

    def __init__(self, url: str, run: str, base: Path, mirrors: Path):
        self.scorer = TransformersScorer(str(base), dtype="bfloat16", device="cpu")
        self.url, self.run, self.base, self.mirrors = url, run, base, mirrors
        self.loop = asyncio.new_event_loop()
        self.follower = self.loop.run_until_complete(self._start())

    async def _start(self) -> Follower:
        async def take(version: Version, directory: Path) -> None:
            await asyncio.to_thread(self.scorer.load, version, directory)

        follower = Follower(self.url, self.run, "bench", "bench", "", take, 0.02, self.mirrors, lambda: self.base)
        await follower.start()
        return follower

    def reach(self, version: Version) -> float:
        """Seconds until it serves the version."""
        began = time.perf_counter()
        self.loop.run_until_complete(self.follower.at_least(version, 600))
        return time.perf_counter() - began

    def close(self) -> None:
        self.loop.run_until_complete(self.follower.stop())
        self.loop.close()


def raw_copy(source: Path, target: Path) -> float:
    """Seconds of copying a file with one fsync."""
    began = time.perf_counter()
    shutil.copyfile(source, target)
    disk.sync(target)
    seconds = time.perf_counter() - began
    target.unlink()
    return seconds


def measure_disk(options: argparse.Namespace, url: str, base: Path, place: Path) -> dict:
    publish, follow, copy = [], [], []
    with connect_sync(url) as redis:
        publisher = Publisher(redis, "disk", place / "disk", keep=2)
        following = Following(url, "disk", base, place)
        tensors = dict(load(base, torch.bfloat16).named_parameters())
        for number in range(options.rounds + 1):  # the first is not counted
            began = time.perf_counter()
            weights = publisher.publish(Version(version=number), tensors.items(), base)
            publish.append(time.perf_counter() - began)
            follow.append(following.reach(weights.id))
            copy.append(raw_copy(Path(weights.location) / disk.SINGLE, place / "copy"))
        following.close()
    found = {
        name: statistics.median(values[1:])
        for name, values in {"publish_s": publish, "follow_s": follow, "copy_s": copy}.items()
    }
    size = sum(tensor.nbytes for tensor in tensors.values())
    return {"bytes": size, **found, "ratio": (found["publish_s"] + found["follow_s"]) / found["copy_s"]}


# ---- deltas ----------------------------------------------------------------------------------------------------


def trained(base: Path, rate: float, vocab: int) -> Iterator[tuple[dict[str, torch.Tensor], float]]:
    """After every AdamW step: the weights as served, and the share of their elements that the step changed."""
    model = load(base, torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.0)
    made = torch.Generator().manual_seed(1)
    before = {name: tensor.detach().bfloat16() for name, tensor in model.named_parameters()}
    while True:
        ids = torch.randint(0, vocab, (4, 64), generator=made)
        model(input_ids=ids, labels=ids).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        now = {name: tensor.detach().bfloat16() for name, tensor in model.named_parameters()}
        changed = sum(int((now[name].view(torch.int16) != before[name].view(torch.int16)).sum()) for name in now)
        yield now, changed / sum(tensor.numel() for tensor in now.values())
        before = now


def measure_delta(options: argparse.Namespace, url: str, base: Path, place: Path) -> list[dict]:
    rows = []
    for rate in options.rates:
        run = f"delta-{rate:g}"
        publish, follow, sizes, shares = [], [], [], []
        with connect_sync(url) as redis:
            every = options.warm_up + options.rounds + 1
            publisher = Publisher(redis, run, place / run, snapshot_every=every, mirror_dir=place)
            following = Following(url, run, base, place)
            for number, (tensors, share) in enumerate(trained(base, rate, options.vocab)):
                if number == every:
                    break
                began = time.perf_counter()
                weights = publisher.publish(Version(version=number), tensors.items(), base)
                published = time.perf_counter() - began
                followed = following.reach(weights.id)
                if number > options.warm_up:
                    assert weights.transport == "delta"
                    publish.append(published), follow.append(followed), shares.append(share)
                    sizes.append(sum(file.stat().st_size for file in Path(weights.location).glob("changes.*")))
            following.close()
            whole = sum(tensor.nbytes for tensor in tensors.values())
        row = {"rate": rate, "changed": statistics.median(shares), "bytes": statistics.median(sizes)}
        times = {"publish_s": statistics.median(publish), "follow_s": statistics.median(follow)}
        rows.append(row | {"share_of_whole": row["bytes"] / whole} | times)
    return rows


# ---- adapters --------------------------------------------------------------------------------------------------


def measure_adapter(options: argparse.Namespace, url: str, base: Path, place: Path) -> list[dict]:
    rows = []
    whole = sum(file.stat().st_size for file in base.glob("*.safetensors"))
    for rank in options.ranks:
        run = f"adapter-{rank}"
        settings = Model(path=str(base), dtype="bfloat16", lora=Lora(rank=rank))
        policy = policies.load(settings)
        adapter = lora.published(policy.model, settings)
        assert adapter is not None
        publish, follow = [], []
        with connect_sync(url) as redis:
            publisher = Publisher(redis, run, place / run, keep=2)
            following = Following(url, run, base, place)
            for number in range(options.rounds + 1):  # the first makes the follower's copy of the base
                with torch.no_grad():
                    for parameter in policy.parameters():
                        if parameter.requires_grad:
                            parameter.normal_(std=0.01)
                began = time.perf_counter()
                tensors = policies.adapters(policy, partitioned=False)
                weights = publisher.publish(Version(version=number), tensors, base, adapter)
                publish.append(time.perf_counter() - began)
                follow.append(following.reach(weights.id))
            following.close()
        size = sum(file.stat().st_size for file in Path(weights.location).glob("*.safetensors"))
        times = {"publish_s": statistics.median(publish[1:]), "follow_s": statistics.median(follow[1:])}
        rows.append({"rank": rank, "bytes": size, "share_of_whole": size / whole, "first_s": follow[0]} | times)
    return rows


# ---- rollouts --------------------------------------------------------------------------------------------------


async def loaded(options: argparse.Namespace, url: str, publish, every: float | None) -> tuple[float, int]:
    """(completion tokens finished a second, updates) under load. `publish()` makes the next version."""
    tokens, updates, ends = 0, 0, time.monotonic() + options.seconds
    sampling = Sampling(max_tokens=options.completion)

    async def client(number: int) -> None:
        nonlocal tokens
        async with RolloutClient(url) as rollouts:
            turn = 0
            while time.monotonic() < ends:
                turn += 1
                asked = RolloutRequest(group_id=f"{number}-{turn}", prompt_token_ids=[1] * 16, n=8, sampling=sampling)
                [group] = (await rollouts.rollouts([asked], 300)).groups
                tokens += sum(len(one.token_ids) for one in group.completions)

    async def update() -> None:
        nonlocal updates
        while every is not None:
            await asyncio.sleep(every)
            await asyncio.to_thread(publish)
            updates += 1

    began = time.monotonic()
    updater = asyncio.ensure_future(update())
    await asyncio.gather(*(client(number) for number in range(options.clients)))
    seconds = time.monotonic() - began  # until the last has its answer: what was begun is counted
    updater.cancel()
    return tokens / seconds, updates


def measure_rollout(options: argparse.Namespace, url: str, base: Path, place: Path) -> list[dict]:
    rows = []
    model = load(base, torch.bfloat16)
    for mode in MODES:
        run = f"rollout-{mode}"
        with connect_sync(url) as redis:
            publisher = Publisher(redis, run, place / run, keep=2)
            numbers = iter(range(10**6))

            def publish(publisher=publisher, numbers=numbers) -> None:
                publisher.publish(Version(version=next(numbers)), model.named_parameters(), base)

            recipe = {
                "run": {"name": run, "dir": str(place / run)},
                "model": {"path": str(base), "dtype": "bfloat16"},
                "data": {"path": "none.jsonl", "fields": {"prompt": "p"}},
                "rewards": "intuitor",
                "rollout": {"threads": options.threads, "device": "cpu"},
                "trainer": {"steps": 1, "groups_per_step": 1},
                "weights": {"in_flight": mode},
                "queue": {"url": url},
            }
            (place / f"{run}.yaml").write_text(yaml.safe_dump(recipe))
            with serving("rollout", "--recipe", str(place / f"{run}.yaml")) as server:
                publish()
                asyncio.run(loaded(argparse.Namespace(**{**vars(options), "seconds": 2}), server, publish, None))
                calm, _ = asyncio.run(loaded(options, server, publish, None))
                busy, updates = asyncio.run(loaded(options, server, publish, options.every))
        lost = (1 - busy / calm) * options.every
        rows.append({"mode": mode, "calm": calm, "with_updates": busy, "updates": updates, "lost_s": lost})
    return rows


# ---- the whole -------------------------------------------------------------------------------------------------


def main() -> None:
    options = arguments()
    torch.set_num_threads(options.threads)
    os.environ.setdefault("OMP_NUM_THREADS", str(options.threads))
    found: dict = {}
    with tempfile.TemporaryDirectory() as folder, EmbeddedRedis(Path(folder) / "redis") as redis:
        place = Path(folder)
        base = make_model(place / "base", options.hidden, options.layers, options.vocab)
        small = make_model(place / "small", 128, 4, 8192)
        if "disk" in options.parts:
            found["disk"] = measure_disk(options, redis.url, base, place)
        if "delta" in options.parts:
            found["delta"] = measure_delta(options, redis.url, base, place)
        if "adapter" in options.parts:
            found["adapter"] = measure_adapter(options, redis.url, base, place)
        if "rollout" in options.parts:
            found["rollout"] = measure_rollout(options, redis.url, small, place)
    if options.json:
        print(json.dumps(found, indent=1))
        return
    if row := found.get("disk"):
        print(
            f"disk: {row['bytes'] / 1e6:.0f} MB: publish {row['publish_s']:.2f} s, follow {row['follow_s']:.2f} s, "
            f"raw copy {row['copy_s']:.2f} s: {row['ratio']:.2f}x"
        )
    for row in found.get("delta", ()):
        print(
            f"delta at {row['rate']:g}: {100 * row['changed']:.2f} % of the elements changed, "
            f"{row['bytes'] / 1e6:.2f} MB, {100 * row['share_of_whole']:.2f} % of the whole; "
            f"publish {row['publish_s']:.2f} s, follow {row['follow_s']:.2f} s"
        )
    for row in found.get("adapter", ()):
        print(
            f"adapter of rank {row['rank']}: {row['bytes'] / 1e6:.2f} MB, {100 * row['share_of_whole']:.2f} % of the "
            f"whole; publish {row['publish_s']:.2f} s, follow {row['follow_s']:.2f} s (first {row['first_s']:.2f} s)"
        )
    for row in found.get("rollout", ()):
        print(
            f"in_flight {row['mode']}: {row['calm']:.0f} tok/s calm, {row['with_updates']:.0f} with {row['updates']} "
            f"updates: {row['lost_s']:.2f} s lost an update"
        )


if __name__ == "__main__":
    main()
