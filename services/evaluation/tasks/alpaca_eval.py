"""AlpacaEval 2.0 (Dubois et al., arXiv 2404.04475): how often does a judge prefer the answer to the baseline's?

The data set's `output` is the baseline's answer (GPT-4 Turbo's). The judge sees each pair twice, once in either order,
so that a liking for the first place cancels out. The rubric is ours: it is no copy of the leaderboard's, and with
another judge than GPT-4.1 the figures are not the paper's either.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from services.evaluation.benchmark import Benchmark, Hub, Item, Record, content_id, text_of
from services.spec import RewardTerm

RUBRIC = """Two assistants answered the same request. Say which answer a careful person would rather have got.

Request:
{prompt}

Answer A:
%s

Answer B:
%s

Look at correctness, completeness and whether the answer does what was asked; length by itself is no merit. Reason
briefly, then end with one line `Preference for %s: N`, N being a whole number from 0 (surely the other answer) to 10
(surely answer %s)."""
MINE, OTHER = "{completion}", "{reference}"
NUMBER = r"(?i)preference for [ab][^\w-]{0,8}(\d+(?:\.\d+)?)"


def read(record: Record, _examples: list[Record]) -> Item:
    instruction = text_of(record, "instruction")
    return Item(content_id(instruction), instruction, {"answer": text_of(record, "output")})


def judged_by(url: str, model: str, key_env: str | None) -> tuple[RewardTerm, ...]:
    """The terms for a judge behind an OpenAI-compatible server."""
    judge: dict[str, Any] = {"url": url, "model": model, "regex": NUMBER} | ({"key_env": key_env} if key_env else {})
    first, second = RUBRIC % (MINE, OTHER, "A", "A"), RUBRIC % (OTHER, MINE, "B", "B")
    return (
        RewardTerm(name="llm_judge", label="answer_first", params=judge | {"rubric": first}),
        RewardTerm(name="llm_judge", label="answer_second", params=judge | {"rubric": second}),
    )


STEPS, SMALL = 50, 1e-9
SHRINKAGE = 1e-6
"""Keeps the fit finite where every answer is preferred."""


def at_equal_length(answers: Sequence[tuple[Item, str, float]]) -> dict[str, float]:
    """The win rate that a logistic regression of the preferences on the difference in length, tanh((m - b) / std),
    gives for no difference: the length control of arXiv 2404.04475 without its term for each instruction's difficulty.
    """
    lengths = np.array([len(text) - len(item.reference["answer"]) for item, text, _ in answers], np.float64)
    rows = np.stack([np.ones_like(lengths), np.tanh(lengths / (lengths.std() or 1.0))], axis=1)
    wins = np.array([value for _, _, value in answers])
    weights = np.zeros(2)
    for _ in range(STEPS):  # Newton's method
        chances = 1 / (1 + np.exp(-rows @ weights))
        slope = rows.T @ (wins - chances) - SHRINKAGE * weights
        curvature = (rows * (chances * (1 - chances))[:, None]).T @ rows + SHRINKAGE * np.eye(2)
        step = np.linalg.solve(curvature, slope)
        weights = weights + np.clip(step, -2, 2)
        if np.abs(step).max() < SMALL:
            break
    return {"at_equal_length": float(1 / (1 + np.exp(-weights[0])))}


BENCHMARK = Benchmark(
    name="alpaca_eval",
    title="AlpacaEval 2.0",
    measure="win rate",
    file="alpaca_eval.jsonl",
    hub=Hub("tatsu-lab/alpaca_eval", "train", files=("alpaca_eval_gpt4_baseline.json",)),
    read=read,
    terms=(),
    main=("answer_first", "answer_second"),
    max_tokens=2048,
    column="AlpacaEval",
    beside="at_equal_length",
    further=at_equal_length,
    judge=True,
)
