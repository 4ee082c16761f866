"""MMLU-Pro (Wang et al., arXiv 2406.01574): ten choices, five worked examples of the subject, no chat template."""

from string import ascii_uppercase

from services.evaluation.benchmark import Benchmark, Hub, Item, Record, content_id, text_of
from services.spec import RewardTerm

HEADER = (
    "The following are multiple choice questions (with answers) about {subject}. Think step by step and then finish "
    'your answer with "the answer is (X)" where X is the correct letter choice.\n\n'
)
SHOTS = 5
HUB = "TIGER-Lab/MMLU-Pro"


def _choices(record: Record) -> list[str]:
    """Some rows are filled up with N/A."""
    choices = [str(choice) for choice in record["options"] if choice != "N/A"]
    if not 2 <= len(choices) <= 26:
        raise ValueError(f"options are 2 to 26 texts (got {len(choices)})")
    return choices


def _question(record: Record) -> str:
    letters = zip(ascii_uppercase, _choices(record), strict=False)
    return (
        "Question:\n"
        + text_of(record, "question")
        + "\nOptions:\n"
        + "".join(f"{letter}. {choice}\n" for letter, choice in letters)
        + "Answer: Let's think step by step."
    )


def _worked(record: Record) -> str:
    """The validation split's reasoning begins with the words that the question ends with."""
    reasoning = text_of(record, "cot_content").removeprefix("A: Let's think step by step.").strip()
    return f"{_question(record)} {reasoning}\n\n"


def read(record: Record, examples: list[Record]) -> Item:
    subject, choices = text_of(record, "category"), _choices(record)
    shots = [_worked(one) for one in examples if one["category"] == subject][:SHOTS]
    if not shots:
        raise ValueError(f"category {subject!r} has no worked example in the validation split")
    prompt = HEADER.format(subject=subject) + "".join(shots) + _question(record)
    name = str(record["question_id"]) if "question_id" in record else content_id(record["question"], *choices)
    return Item(name, prompt, {"answer": text_of(record, "answer"), "choices": choices})


BENCHMARK = Benchmark(
    name="mmlu_pro",
    title="MMLU-Pro",
    measure="accuracy",
    file="mmlu_pro.jsonl",
    hub=Hub(HUB, "test"),
    read=read,
    terms=(RewardTerm(name="multiple_choice"),),
    main=("multiple_choice",),
    max_tokens=2048,
    column="MMLU-Pro",
    examples=("mmlu_pro_validation.jsonl", Hub(HUB, "validation")),
    vote={"answer": "regex", "regex": r"(?i)answer is \(?([A-J])\b"},
    chat=False,
    stop=("Question:",),
)
