"""Scoring speed and memory: the scorer, the naive way, and the bare arithmetic that no scorer can do without.

    python benchmarks/scoring.py [--dtype bfloat16|float32] [--threads N] [--rounds N] [--json]

Three arms score the same completions with the same random Qwen2, each in a process of its own:
  tiled   TransformersScorer, as the reward server runs it (self-certainty, entropy, log-probabilities)
  naive   model(...).logits of every row, widened to float32, logsumexp and mean of it
  limit   decoder forward and LM-head product of the completion rows, in the fastest tile; nothing is reduced
They take turns, in alternating order, so that a slow spell of the machine hits all of them. Memory is the peak resident
size during an arm's first full run, less the size before it (the limit's output buffer is made before).
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

ARMS = ("tiled", "naive", "limit")
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
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--arm", choices=ARMS, help=argparse.SUPPRESS)
    parser.add_argument("--model", type=Path, help=argparse.SUPPRESS)
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


def prepare(options: argparse.Namespace) -> tuple[Callable[[], float], Callable[[], object]]:
    """(a full run that returns the mean self-certainty, or 0 where none is computed; a small warm-up)"""
    import torch

    torch.set_num_threads(options.threads)
    from reward_server.scorer.items import TokenItem
    from reward_server.scorer.transformers import TransformersScorer

    scorer = TransformersScorer(str(options.model), options.dtype, "cpu")
    length = options.prompt + options.completion
    ids = torch.randint(1, options.vocab, (options.sequences, length), generator=torch.Generator().manual_seed(1))
    items = [TokenItem(row[: options.prompt].tolist(), row[options.prompt :].tolist(), METRICS) for row in ids]
    completion_rows = slice(options.prompt - 1, length - 1)

    def tiled() -> float:
        return statistics.fmean(result.scores["self_certainty"] for result in scorer.score(items))

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
        return {"tiled": tiled, "naive": naive}[options.arm], warm_up
    buffer = torch.empty(options.sequences * options.completion * max(LIMIT_TILES), dtype=scorer.head.weight.dtype)
    fastest = min((tile for tile in LIMIT_TILES for _ in range(2)), key=lambda tile: timed(lambda: limit(tile)))
    return lambda: limit(fastest), warm_up


def timed(run: Callable[[], object]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def memory(field: str) -> int:
    """Bytes, from /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":"))


def serve_arm(options: argparse.Namespace) -> None:
    """Answers every line on stdin with one run: JSON with seconds, self_certainty, extra_bytes (the first run's)."""
    run, warm_up = prepare(options)
    warm_up()
    for _ in sys.stdin:
        before = memory("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again from here
        started = time.perf_counter()
        certainty = run()
        seconds = time.perf_counter() - started
        extra = max(0, memory("VmHWM") - before)
        print(json.dumps({"seconds": seconds, "self_certainty": certainty, "extra_bytes": extra}), flush=True)


# ---- all arms --------------------------------------------------------------------------------------------------


def measure(options: argparse.Namespace, folder: Path) -> dict[str, list[dict[str, float]]]:
    command = [sys.executable, __file__, *sys.argv[1:], "--model", str(folder), "--threads", str(options.threads)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(options.threads)}
    processes = {}
    runs: dict[str, list[dict[str, float]]] = {arm: [] for arm in ARMS}
    try:
        for arm in ARMS:
            processes[arm] = subprocess.Popen(
                [*command, "--arm", arm], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
            )
        for number in range(options.rounds + 1):
            for arm in ARMS if number % 2 else reversed(ARMS):
                process = processes[arm]
                assert process.stdin is not None and process.stdout is not None
                process.stdin.write("run\n")
                process.stdin.flush()
                line = process.stdout.readline()
                if not line:
                    raise SystemExit(f"the {arm} arm ended early (exit code {process.wait()})")
                runs[arm].append(json.loads(line))
    finally:
        for process in processes.values():
            process.terminate()
            process.wait()
    return runs


def report(options: argparse.Namespace, runs: dict[str, list[dict[str, float]]]) -> dict:
    """The first run of each arm counts for memory alone; times are medians of the others."""
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
    pairs = zip(arms["tiled"]["seconds"], arms["limit"]["seconds"], arms["naive"]["seconds"], strict=True)
    ratios = [(limit / tiled, naive / tiled) for tiled, limit, naive in pairs]
    return {
        "setting": {name: value for name, value in vars(options).items() if name not in ("arm", "model", "json")},
        "arms": arms,
        "tiled_to_limit": statistics.median(ratio for ratio, _ in ratios),
        "tiled_to_naive": statistics.median(ratio for _, ratio in ratios),
    }


def main() -> None:
    options = arguments()
    if options.arm:
        return serve_arm(options)
    with tempfile.TemporaryDirectory(prefix="rlif-scoring-") as folder:
        make_model(options, Path(folder))
        result = report(options, measure(options, Path(folder)))
    if options.json:
        print(json.dumps(result))
        return
    shape = f"{options.sequences} x ({options.prompt} + {options.completion}) tokens"
    print(f"V {options.vocab}, hidden {options.hidden}, {options.layers} layers, {options.dtype}, {shape}, ", end="")
    print(f"{options.threads} threads, {options.rounds} rounds")
    for arm, row in result["arms"].items():
        line = f"{arm:6} {row['tokens_per_second']:9.0f} tok/s  {row['extra_mib']:8.0f} MiB extra"
        print(line + (f"  self-certainty {row['self_certainty']:.5f}" if row["self_certainty"] else ""))
    print(f"tiled is {result['tiled_to_limit']:.2f} x the limit and {result['tiled_to_naive']:.2f} x naive (median)")


if __name__ == "__main__":
    main()
