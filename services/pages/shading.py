"""Tokens as they are shown: whitespace and hidden characters made visible, shaded by how unsure the model was."""

import math
import unicodedata
from dataclasses import dataclass

import numpy as np

from services.api import ScoreResult

STEPS = 8
"""Shades, from 0 (sure: none) to the strongest."""
SPACE, LINE_BREAK, NOTHING = "\u00b7", "\u21b5", "\u2205"
HIDDEN = frozenset({"Cc", "Cf", "Cn", "Co", "Cs", "Zl", "Zp"})
"""Unicode categories that show nothing, or move what stands beside them (such as marks of direction)."""


@dataclass(frozen=True)
class Shading:
    """A metric to shade by. `surer` is the end of its range at which the model was sure: `low` or `high`."""

    metric: str
    label: str
    unit: str
    surer: str


SHADINGS = {
    "self_certainty": Shading("self_certainty", "Self-certainty", "nats", "high"),
    "token_entropy": Shading("token_entropy", "Entropy", "nats", "low"),
    "mean_logprob": Shading("mean_logprob", "Log-probability", "nats", "high"),
}


@dataclass(frozen=True)
class Scale:
    """A shading and the values at its ends, of all completions together: beyond them the shade stays the same."""

    shading: Shading
    sure: float
    unsure: float

    def steps(self, values: list[float]) -> list[int]:
        """A shade per value."""
        width = self.unsure - self.sure
        if width == 0:
            return [0] * len(values)
        shares = (np.asarray(values) - self.sure) / width
        return np.clip((shares * STEPS).astype(int), 0, STEPS - 1).tolist()


def scale(shading: Shading, results: list[ScoreResult]) -> Scale:
    """From the 2nd to the 98th hundredth of all values, so that one far-off token does not wash out the others."""
    values = [value for result in results for value in (result.per_token or {}).get(shading.metric, [])]
    low, high = np.quantile(values, [0.02, 0.98]) if values else (0.0, 0.0)
    sure, unsure = (low, high) if shading.surer == "low" else (high, low)
    return Scale(shading, float(sure), float(unsure))


@dataclass(frozen=True)
class Part:
    """A piece of a token's text; a mark stands for something that would not be seen."""

    text: str
    is_mark: bool = False


@dataclass(frozen=True)
class Token:
    number: int
    name: str
    parts: list[Part]
    is_special: bool
    values: list[float]
    steps: list[int]
    """Values and shades run parallel to SHADINGS."""

    @property
    def title(self) -> str:
        lines = [f"{one.label} {number(value)}" for one, value in zip(SHADINGS.values(), self.values, strict=True)]
        return "\n".join(
            [f"{self.number}: {self.name}", *lines, f"Probability {math.exp(min(0.0, self.values[2])):.3g}"]
        )


def number(value: float | None, digits: int = 3) -> str:
    """With a real minus sign, and no zero below zero; a dash for none."""
    if value is None:
        return "\u2013"
    text = f"{value:.{digits}f}"
    return text.removeprefix("-") if float(text) == 0 else text.replace("-", "\u2212")


def parts(text: str) -> list[Part]:
    """A token's text, so that all of it can be seen. Spaces are marked only where the token is nothing else."""
    if text and not text.strip(" "):
        return [Part(SPACE * len(text), True)]
    found: list[Part] = []
    plain = ""
    for character in text:
        if character == "\n":
            mark, rest = LINE_BREAK, "\n"
        elif unicodedata.category(character) in HIDDEN or (character.isspace() and character != " "):
            mark, rest = escaped(character), ""
        else:
            plain += character
            continue
        found += [Part(plain)] if plain else []
        found.append(Part(mark, True))
        plain = rest
    return [*found, Part(plain)] if plain else found


def escaped(character: str) -> str:
    """\\t, \\r, or the code point."""
    return {"\t": "\\t", "\r": "\\r"}.get(character, f"U+{ord(character):04X}")


# ---- tokens that are a part of a character ------------------------------------------------------------------------


def _byte_letters() -> dict[str, int]:
    """The letters in which byte-level vocabularies (GPT-2's and its heirs') write bytes: what prints stands for itself,
    the others are counted up from U+0100."""
    printing = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printing]
    return {chr(byte): byte for byte in printing} | {chr(256 + place): byte for place, byte in enumerate(others)}


BYTE_LETTERS = _byte_letters()


def bytes_of(entry: str) -> bytes | None:
    """The bytes that an entry of the vocabulary stands for, where it is written as bytes."""
    if len(entry) == 6 and entry.startswith("<0x") and entry.endswith(">"):
        try:
            return bytes.fromhex(entry[3:5])
        except ValueError:
            return None
    if entry and all(letter in BYTE_LETTERS for letter in entry):
        return bytes(BYTE_LETTERS[letter] for letter in entry)
    return None


def _named(piece: str, entry: str) -> tuple[str, list[Part]]:
    if not piece:  # of a row of the LM head that the tokenizer has no entry for
        return "no text", [Part(NOTHING, True)]
    raw = bytes_of(entry) if "\ufffd" in piece else None
    if raw is None or raw == piece.encode():
        return f"\u201c{''.join(part.text for part in parts(piece)).strip(chr(10))}\u201d", parts(piece)
    shown = raw.hex(" ").upper()
    return f"bytes {shown}, a part of a character", [Part(f"\ufffd{shown}", True)]


def tokens(result: ScoreResult, entries: list[str], specials: frozenset[str], scales: list[Scale]) -> list[Token]:
    """`entries`: the vocabulary's own spelling of each token; `specials`: texts of the special tokens."""
    pieces, per_token = result.tokens or [], result.per_token or {}
    columns = [per_token.get(one.shading.metric, []) for one in scales]
    steps = [one.steps(column) for one, column in zip(scales, columns, strict=True)]
    found = []
    for place, (piece, entry) in enumerate(zip(pieces, entries, strict=True)):
        name, shown = _named(piece, entry)
        values, shades = [column[place] for column in columns], [column[place] for column in steps]
        found.append(Token(place + 1, name, shown, piece in specials, values, shades))
    return found
