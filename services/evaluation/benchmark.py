"""What a benchmark is: where its records come from, what each becomes, and who judges the answers."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import orjson

from services.contract import Reference, TestCase
from services.spec import RewardTerm

Record = dict[str, Any]


def content_id(*texts: str) -> str:
    """The same texts give the same id, in whatever file they stand."""
    return hashlib.sha256(orjson.dumps(texts)).hexdigest()[:16]


@dataclass(frozen=True)
class Item:
    """One question. `prompt` is the user's turn, or, in a benchmark without chat, the whole text to be continued."""

    id: str
    prompt: str
    reference: dict[str, Any]

    def judged_by(self) -> Reference:
        return Reference.model_validate(self.reference)

    @cached_property
    def reference_id(self) -> str:
        return content_id(orjson.dumps(self.reference, option=orjson.OPT_SORT_KEYS).decode())


@dataclass(frozen=True)
class Hub:
    """A data set on the Hugging Face hub; `files` are read instead where it can only be loaded by a script."""

    path: str
    split: str
    config: str | None = None
    files: tuple[str, ...] = ()


@dataclass(frozen=True)
class Benchmark:
    """One task of `rlif eval`.

    `file` is its name in `--data`, `examples` that of worked examples that its prompts begin with. `read(record,
    examples)` makes an item; it raises KeyError, TypeError or ValueError where the record is not of this benchmark.
    `terms` judge an answer: its value is the mean over the terms in `main`, the others are told beside it.
    `judged(text)` is what of a completion they see. `vote` are parameters by which answers are compared (none: they
    cannot be). `math`: the protocol's prompt is put around the question. `further` makes more figures of items, texts
    and values. `column` is the paper's, where `beside` (one of the further figures; none: the value) stands beside it.
    """

    name: str
    title: str
    measure: str
    file: str
    hub: Hub
    read: Callable[[Record, list[Record]], Item]
    terms: tuple[RewardTerm, ...]
    main: tuple[str, ...]
    max_tokens: int
    column: str | None = None
    beside: str | None = None
    examples: tuple[str, Hub] | None = None
    judged: Callable[[str], str] = field(default=lambda text: text)
    vote: dict[str, Any] | None = None
    further: Callable[[Sequence[tuple[Item, str, float]]], dict[str, float]] | None = None
    math: bool = False
    chat: bool = True
    stop: tuple[str, ...] = ()
    runs_code: bool = False
    judge: bool = False


def text_of(record: Record, name: str, may_be_empty: bool = False) -> str:
    """Raises KeyError, or ValueError naming the field: it is no text, or an empty one."""
    value = record[name]
    if not isinstance(value, str) or not (value.strip() or may_be_empty):
        raise ValueError(f"{name} is text (got {value!r:.60})")
    return value


def cases(given: Any) -> list[dict[str, str]]:
    """Tests as [{"input", "output"}]."""
    return [TestCase(input=one["input"], output=one["output"]).model_dump() for one in given]
