"""Is what a program printed what it should have printed?"""

import math
import re

NUMBER = re.compile(r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d{1,4})?")


def same_output(said: str, wanted: str, tolerance: float | None = None) -> bool:
    """Whether the whole outputs agree token by token: words between white space, whose kind and amount do not matter.

    With `tolerance`, two numbers a (said) and b (wanted) agree when |a - b| <= tolerance * max(1, |b|).
    """
    ours, theirs = said.split(), wanted.split()
    return len(ours) == len(theirs) and all(
        a == b or (tolerance is not None and _close(a, b, tolerance)) for a, b in zip(ours, theirs, strict=True)
    )


def _close(said: str, wanted: str, tolerance: float) -> bool:
    if not (NUMBER.fullmatch(said) and NUMBER.fullmatch(wanted)):
        return False
    a, b = float(said), float(wanted)
    return math.isfinite(a) and math.isfinite(b) and abs(a - b) <= tolerance * max(1.0, abs(b))
