"""IFEval (Zhou et al., arXiv 2311.07911): instructions that a program can check. Accuracy is prompt-level, strict."""

from services.evaluation.benchmark import Benchmark, Hub, Item, Record, content_id, text_of
from services.spec import RewardTerm


def read(record: Record, _examples: list[Record]) -> Item:
    prompt = text_of(record, "prompt")
    reference = {"instruction_id_list": record["instruction_id_list"], "kwargs": record["kwargs"]}
    return Item(str(record["key"]) if "key" in record else content_id(prompt), prompt, reference)


def _term(label: str, variant: str, pay: str) -> RewardTerm:
    return RewardTerm(name="instruction_following", label=label, params={"variant": variant, "pay": pay})


BENCHMARK = Benchmark(
    name="ifeval",
    title="IFEval",
    measure="accuracy",
    file="ifeval.jsonl",
    hub=Hub("google/IFEval", "train"),
    read=read,
    terms=(
        _term("prompt_strict", "strict", "all"),
        _term("prompt_loose", "loose", "all"),
        _term("instruction_share_strict", "strict", "share"),
        _term("instruction_share_loose", "loose", "share"),
    ),
    main=("prompt_strict",),
    max_tokens=2048,
)
