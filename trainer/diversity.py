"""How much the completions of a group differ: pure functions of what was written, whatever it is worth."""

import re
from collections.abc import Sequence

from services.contract import Completion

BOXED = re.compile(r"\\boxed\s*\{([^{}]*)\}")


def distinct(completions: Sequence[Completion]) -> float | None:
    """Distinct bigrams of tokens over all bigrams, of the completions together (distinct-2, Li et al. 2016, arXiv
    1510.03055): low when they repeat themselves or each other. None where no completion has two tokens."""
    pairs = [pair for one in completions for pair in zip(one.token_ids, one.token_ids[1:], strict=False)]
    return len(set(pairs)) / len(pairs) if pairs else None


def answers(completions: Sequence[Completion]) -> float:
    """Distinct final answers over completions: 1 when all differ, 1/n when all say the same."""
    return len({final_answer(completion.text) for completion in completions}) / len(completions)


def final_answer(text: str) -> str:
    """What stands in the last \\boxed{}, else the last word without the punctuation around it; empty without one."""
    boxed = BOXED.findall(text)
    words = [boxed[-1]] if boxed else text.split()[-1:]
    return words[0].strip(" .,;:!?*$\"'`()[]").casefold() if words else ""
