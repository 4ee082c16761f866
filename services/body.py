"""Bodies of requests: JSON or msgpack to plain values, with bounds on how many of them one body makes.

A byte of a body can become a hundred bytes of memory, and no other request is served while the values of one are made
and validated: the bytes alone bound neither.
"""

import math
from typing import Any

import orjson

from services import codec

MOST_VALUES = 2**21
"""Numbers, strings, keys and the like in one body; a call has some for each token id."""
MOST_CONTAINERS = 2**18
"""Lists and objects."""
SMALL = 2**18
"""Bytes of a body that cannot hold values enough to be worth counting."""
PLAIN = (str, int, float, bool, type(None), list, dict)


class TooMuch(ValueError):
    """The body has more values than a server makes of one."""


class NotPlain(ValueError):
    """A value is none that JSON has. `path` leads to it: keys and places."""

    def __init__(self, message: str, path: tuple[str | int, ...]):
        super().__init__(message)
        self.path = path


def read_json(body: bytes) -> Any:
    """Raises TooMuch, and ValueError for what is not JSON."""
    if len(body) > SMALL:
        _count(body)
    return orjson.loads(body)


def _count(body: bytes) -> None:
    bare = body.replace(b"\\\\", b"").replace(b'\\"', b"")
    strings = bare.count(b'"') // 2
    if strings <= MOST_VALUES:
        bare = b"".join(bare.split(b'"')[::2])  # what stands between the strings
    _check(bare.count(b"[") + bare.count(b"{"), strings + bare.count(b","))


def _check(containers: int, values: int) -> None:
    if containers > MOST_CONTAINERS:
        raise TooMuch(f"at most {MOST_CONTAINERS} lists and objects in one body (got {containers} or more)")
    if values > MOST_VALUES:
        raise TooMuch(f"at most {MOST_VALUES} values in one body (got {values} or more)")


def read_msgpack(body: bytes) -> Any:
    """Raises TooMuch, NotPlain (NaN, infinity, bytes, times), and ValueError for what is not msgpack."""
    containers = values = 0
    is_plain = True

    def note(found: Any, items: Any) -> Any:
        nonlocal containers, values, is_plain
        containers, values = containers + 1, values + len(found)
        _check(containers, values)
        is_plain = is_plain and all(map(_is_plain, items))
        return found

    def array(code: int, data: bytes) -> list[int] | list[float]:
        nonlocal values
        values += len(data) // 4
        _check(containers, values)
        return codec.unpack_array(code, data)

    found = codec.unpack(
        body,
        ext_hook=array,
        list_hook=lambda items: note(items, items),
        object_hook=lambda fields: note(fields, [*fields, *fields.values()]),
        max_array_len=MOST_VALUES,
        max_map_len=MOST_VALUES,
    )
    if not (is_plain and _is_plain(found)):
        raise _fault(found)
    return found


def _is_plain(value: Any) -> bool:
    return math.isfinite(value) if type(value) is float else isinstance(value, PLAIN)


def _fault(root: Any) -> NotPlain:
    """The first value that is not plain; the depth is not ours to recurse into."""
    open_ends: list[tuple[tuple[str | int, ...], Any]] = [((), root)]
    while open_ends:
        path, value = open_ends.pop()
        if not _is_plain(value):
            what = str(value) if isinstance(value, float) else type(value).__name__
            return NotPlain(f"must be a value that JSON has: finite, and no bytes (got {what})", path)
        if isinstance(value, dict):
            if bad := [key for key in value if not isinstance(key, str)]:
                return NotPlain(f"keys must be strings (got {type(bad[0]).__name__})", path)
            open_ends += [((*path, key), item) for key, item in reversed(value.items())]
        elif isinstance(value, list):
            open_ends += [((*path, place), item) for place, item in reversed(list(enumerate(value)))]
    raise AssertionError("unreachable")
