"""MATH-500: the 500 problems of MATH (Hendrycks et al., arXiv 2103.03874) held out by Lightman et al. (2305.20050)."""

from services.evaluation.benchmark import Benchmark, Hub, Item, Record, content_id, text_of
from services.spec import RewardTerm

ASKED = "\nPlease reason step by step, and put your final answer within \\boxed{}."
"""Some copies end each problem with it. The protocol's system prompt says it, so every copy gives the same prompt."""


def read(record: Record, _examples: list[Record]) -> Item:
    problem = text_of(record, "problem").removesuffix(ASKED)
    return Item(content_id(problem), problem, {"answer": text_of(record, "answer")})


BENCHMARK = Benchmark(
    name="math500",
    title="MATH-500",
    measure="accuracy",
    file="math500.jsonl",
    hub=Hub("HuggingFaceH4/MATH-500", "test"),
    read=read,
    terms=(RewardTerm(name="math_verify"),),
    main=("math_verify",),
    max_tokens=3072,
    column="MATH500",
    vote={"answer": "math"},
    math=True,
)
