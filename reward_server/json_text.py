"""Reading JSON out of a model's text: strictly, and so that what Python cannot read is no verdict on the text."""

import json
from typing import Any

LONGEST_NUMBER = 4000
"""Digits of an integer; beyond some thousands Python refuses to read one, though it is JSON."""


class TooLong(Exception):
    """A number that is not read."""


def _integer(text: str) -> int:
    if len(text) > LONGEST_NUMBER:
        raise TooLong(f"a number of {len(text)} digits")
    return int(text)


def _no_number(text: str) -> None:
    raise ValueError(f"{text} is not JSON")


_DECODER = json.JSONDecoder(parse_int=_integer, parse_constant=_no_number)


def decode(text: str) -> Any:
    """Raises ValueError (not JSON), TooLong and RecursionError (not read)."""
    return _DECODER.decode(text)


def decode_at(text: str, start: int) -> Any:
    """The value that begins at `start`, whatever comes after it. Raises as `decode` does."""
    return _DECODER.raw_decode(text, start)[0]
