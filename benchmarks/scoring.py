"""Scoring speed and memory: the scorers, the naive way, and the bare arithmetic that no scorer can do without.

    python benchmarks/scoring.py [--dtype bfloat16|float32] [--threads N] [--rounds N] [--json]
    python benchmarks/scoring.py --group [...]

Arms score the same completions with the same random Qwen2, each in a process of its own:
  tiled   TransformersScorer, as the reward server runs it (self-certainty, entropy, log-probabilities)
  vllm    VllmService, as the reward server runs it with --engine vllm; its prefix cache is emptied before every run
  naive   model(...).logits of every row, widened to float32, logsumexp and mean of it
  limit   decoder forward and LM-head product of the completion rows, in the fastest tile; nothing is reduced
They take turns, in alternating order, so that a slow spell of the machine hits all of them. Memory is the peak resident
size during an arm's first full run, less the size before it (the limit's output buffer is made before), of the process
and its children; vLLM's includes the pages of its cache that are used for the first time.

--group: eight completions of one prompt of 512 tokens, with vLLM sharing the prompt (vllm) and not (unshared), and
tiled. Beside the measured ratio stands what the arithmetic allows: the completions' rows of the LM head and their part
of the decoder are the same work either way, so the smaller the model is against its vocabulary, the less there is to
gain.
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
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil

ARMS = ("tiled", "vllm", "naive", "limit")
GROUP_ARMS = ("tiled", "vllm", "unshared")
GROUP = {"vocab": 32_000, "layers": 24, "sequences": 8, "prompt": 512, "completion": 512}
LIMIT_TILES = (2048, 8192, 32768)
METRICS = ("self_certainty", "token_entropy", "mean_logprob", "sequence_logprob")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--vocab", type=int, default=151_936)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--sequences", type=int, default=4)
    parser.add_argument("--prompt", type=int, default=64, help="prompt tokens a sequence")
    parser.add_argument("--completion", type=int, default=448, help="completion tokens a sequence")
    parser.add_argument("--group", action="store_true", help="completions of one prompt, which may be shared")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--arm", choices={*ARMS, *GROUP_ARMS}, help=argparse.SUPPRESS)
    parser.add_argument("--model", type=Path, help=argparse.SUPPRESS)
    if parser.parse_args().group:
        parser.set_defaults(**GROUP)
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
        num_attention_heads=options.hidden // 64,
        num_key_value_heads=max(1, options.hidden // 256),
        tie_word_embeddings=True,
        eos_token_id=0,
        bos_token_id=0,
    )
    model = Qwen2ForCausalLM(config)
    with torch.no_grad():
        model.lm_head.weight.mul_(4)  # from nearly uniform distributions to some that have a shape
    model.to(getattr(torch, options.dtype)).save_pretrained(folder)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"<eos>": 0})), eos_token="<eos>")
    tokenizer.save_pretrained(folder)


# ---- one arm, in its own process -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Arm:
    """`run` scores everything and returns the mean self-certainty, or 0 where none is computed."""

    run: Callable[[], float]
    warm_up: Callable[[], object]
    reset: Callable[[], object] = lambda: None


def token_ids(options: argparse.Namespace):
    """int64 [sequences, prompt + completion]"""
    import torch

    shape = options.sequences, options.prompt + options.completion
    ids = torch.randint(1, options.vocab, shape, generator=torch.Generator().manual_seed(1))
    if options.group:
        ids[:, : options.prompt] = ids[0, : options.prompt]
    return ids


def items_of(options: argparse.Namespace) -> list:
    from reward_server.scorer.items import TokenItem

    rows = token_ids(options).tolist()
    return [TokenItem(row[: options.prompt], row[options.prompt :], METRICS) for row in rows]


def mean_certainty(results) -> float:
    return statistics.fmean(result.scores["self_certainty"] for result in results)


def prepare_vllm(options: argparse.Namespace) -> Arm:
    from reward_server.scorer.items import TokenItem
    from reward_server.scorer.vllm import VllmService, VllmSettings

    threads, shared = options.threads, options.arm == "vllm"
    settings = VllmSettings(options.model, "model", options.dtype, "cpu", threads, share_prefixes=shared)
    loop, service, items = asyncio.new_event_loop(), VllmService(settings), items_of(options)
    asyncio.set_event_loop(loop)
    loop.run_until_complete(service.start())

    def score(what) -> float:
        return mean_certainty(loop.run_until_complete(service.score(what, deadline_seconds=3600)).results)

    def forget() -> None:
        loop.run_until_complete(service.llm.reset_prefix_cache())

    return Arm(lambda: score(items), lambda: score([TokenItem([1], [2, 3], METRICS)]), forget)


def prepare(options: argparse.Namespace) -> Arm:
    if options.arm in ("vllm", "unshared"):
        return prepare_vllm(options)
    import torch

    torch.set_num_threads(options.threads)
    from reward_server.scorer.items import TokenItem
    from reward_server.scorer.transformers import TransformersScorer

    scorer = TransformersScorer(str(options.model), options.dtype, "cpu")
    ids, items = token_ids(options), items_of(options)
    completion_rows = slice(options.prompt - 1, options.prompt + options.completion - 1)

    def tiled() -> float:
        return mean_certainty(scorer.score(items))

    @torch.inference_mode()
    def naive() -> float:
        logits = scorer.model(input_ids=ids, use_cache=False).logits[:, completion_rows].float()
        certainty = torch.logsumexp(logits, -1) - logits.mean(-1) - torch.log(torch.tensor(float(options.vocab)))
        return certainty.mean().item()

    @torch.inference_mode()
    def limit(tile: int) -> float:
        hidden = scorer.decoder(input_ids=ids, use_cache=False).last_hidden_state
        rows = hidden[:, completion_rows].reshape(-1, options.hidden)
        for weight in scorer.head.weight.split(tile):
            torch.mm(rows, weight.T, out=buffer[: len(rows) * len(weight)].view(len(rows), len(weight)))
        return 0.0

    def warm_up() -> object:
        return scorer.score([TokenItem([1], [2, 3], METRICS)])

    if options.arm != "limit":
        return Arm({"tiled": tiled, "naive": naive}[options.arm], warm_up)
    buffer = torch.empty(options.sequences * options.completion * max(LIMIT_TILES), dtype=scorer.head.weight.dtype)
    fastest = min((tile for tile in LIMIT_TILES for _ in range(2)), key=lambda tile: timed(lambda: limit(tile)))
    return Arm(lambda: limit(fastest), warm_up)


def timed(run: Callable[[], object]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def family() -> list[Path]:
    """/proc of this process and of its children."""
    this = psutil.Process()
    return [Path(f"/proc/{process.pid}") for process in (this, *this.children(recursive=True))]


def memory(field: str) -> int:
    """Bytes, from /proc/*/status."""
    lines = [line for place in family() for line in (place / "status").read_text().splitlines()]
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":"))


def serve_arm(options: argparse.Namespace) -> None:
    """Answers every line on stdin with one run: JSON with seconds, self_certainty, extra_bytes (the first run's)."""
    arm = prepare(options)
    arm.warm_up()
    for _ in sys.stdin:
        arm.reset()
        before = memory("VmRSS")
        for place in family():
            (place / "clear_refs").write_text("5")  # VmHWM starts again from here
        started = time.perf_counter()
        certainty = arm.run()
        seconds = time.perf_counter() - started
        extra = max(0, memory("VmHWM") - before)
        print(json.dumps({"seconds": seconds, "self_certainty": certainty, "extra_bytes": extra}), flush=True)


# ---- all arms --------------------------------------------------------------------------------------------------


def measure(options: argparse.Namespace, folder: Path, arms: tuple[str, ...]) -> dict[str, list[dict[str, float]]]:
    command = [sys.executable, __file__, *sys.argv[1:], "--model", str(folder), "--threads", str(options.threads)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(options.threads)}
    processes = {}
    runs: dict[str, list[dict[str, float]]] = {arm: [] for arm in arms}
    try:
        for arm in arms:
            processes[arm] = subprocess.Popen(
                [*command, "--arm", arm], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
            )
        for number in range(options.rounds + 1):
            for arm in arms if number % 2 else reversed(arms):
                runs[arm].append(ask(arm, processes[arm]))
    finally:
        for process in processes.values():
            process.terminate()
            process.wait()
    return runs


def ask(arm: str, process: subprocess.Popen) -> dict[str, float]:
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write("run\n")
    process.stdin.flush()
    for line in process.stdout:
        if line.startswith("{"):  # vLLM writes to stdout as well
            return json.loads(line)
    raise SystemExit(f"the {arm} arm ended early (exit code {process.wait()})")


RATIOS = {
    "tiled": ("limit", "naive"),
    "vllm": ("limit", "naive", "tiled", "unshared"),
}
"""For each arm, those that its speed is divided by."""


def report(options: argparse.Namespace, runs: dict[str, list[dict[str, float]]]) -> dict:
    """The first run of each arm counts for memory alone; times and ratios are medians of the others."""
    tokens = options.sequences * (options.prompt + options.completion)
    arms = {}
    for arm, measured in runs.items():
        seconds = [run["seconds"] for run in measured[1:]]
        arms[arm] = {
            "tokens_per_second": tokens / statistics.median(seconds),
            "seconds": seconds,
            "extra_mib": measured[0]["extra_bytes"] / 2**20,
            "self_certainty": measured[0]["self_certainty"],
        }

    def ratio(arm: str, other: str) -> float:
        pairs = zip(arms[arm]["seconds"], arms[other]["seconds"], strict=True)
        return statistics.median(theirs / ours for ours, theirs in pairs)

    found = {
        "setting": {name: value for name, value in vars(options).items() if name not in ("arm", "model", "json")},
        "arms": arms,
        "ratios": {f"{arm} / {other}": ratio(arm, other) for arm in RATIOS for other in RATIOS[arm] if other in arms},
    }
    return found | ({"arithmetic_allows": allowed(options)} if options.group else {})


def allowed(options: argparse.Namespace) -> float:
    """Multiplications of a group without and with a shared prompt: decoder weights, attention, completions' head rows.

    The shape is `make_model`'s. vLLM shares whole blocks of the cache before the prompt's last token; here all of it.
    """
    hidden, group, prompt, completion = options.hidden, options.sequences, options.prompt, options.completion
    length = prompt + completion
    keys = max(1, hidden // 256) * 64
    weights = options.layers * (2 * hidden * hidden + 2 * hidden * keys + 3 * hidden * hidden * 4)

    def attention(first: int, last: int) -> float:
        """Of rows [first, last): each looks at all before it, for its scores and for its values."""
        return options.layers * 2 * hidden * (last - first) * (first + last) / 2

    head = group * completion * hidden * options.vocab
    alone = group * (length * weights + attention(0, length)) + head
    rest = group * (completion * weights + attention(prompt, length)) + head
    return alone / (prompt * weights + attention(0, prompt) + rest)


def main() -> None:
    options = arguments()
    if options.arm:
        return serve_arm(options)
    with tempfile.TemporaryDirectory(prefix="rlif-scoring-") as folder:
        make_model(options, Path(folder))
        result = report(options, measure(options, Path(folder), GROUP_ARMS if options.group else ARMS))
    if options.json:
        print(json.dumps(result))
        return
    shape = f"{options.sequences} x ({options.prompt} + {options.completion}) tokens"
    shape += " of one prompt" if options.group else ""
    print(f"V {options.vocab}, hidden {options.hidden}, {options.layers} layers, {options.dtype}, {shape}, ", end="")
    print(f"{options.threads} threads, {options.rounds} rounds")
    for arm, row in result["arms"].items():
        line = f"{arm:8} {row['tokens_per_second']:9.0f} tok/s  {row['extra_mib']:8.0f} MiB extra"
        print(line + (f"  self-certainty {row['self_certainty']:.5f}" if row["self_certainty"] else ""))
    for pair, value in result["ratios"].items():
        print(f"speed {pair}: {value:.2f} (median)")
    if options.group:
        print(f"a shared prompt: the arithmetic allows {result['arithmetic_allows']:.2f}")


if __name__ == "__main__":
    main()
