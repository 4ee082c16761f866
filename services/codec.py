"""Messages as msgpack: token ids and logprobs travel as raw little-endian arrays, nothing is ever pickled."""

from functools import cache
from typing import Annotated, Any, TypeVar, get_args, get_origin

import msgpack
import numpy as np
from pydantic import BaseModel

from services.contract import Packed

DTYPES = {1: "<i4", 2: "<f4"}
"""Of arrays, by msgpack's extension type. Which fields are arrays, their models say (`services.contract.Packed`)."""
CODES = {dtype: code for code, dtype in DTYPES.items()}

Model = TypeVar("Model", bound=BaseModel)


@cache
def arrays(model: type[BaseModel]) -> dict[str, str]:
    """The dtypes of those fields of a model that are packed as arrays."""
    found = {}
    for name, field in model.model_fields.items():
        marks = [*field.metadata, *_marks(field.annotation)]
        if packed := [mark for mark in marks if isinstance(mark, Packed)]:
            found[name] = packed[0].dtype
    return found


def _marks(annotation: Any) -> list[Any]:
    if get_origin(annotation) is Annotated:
        return list(annotation.__metadata__)
    return [mark for part in get_args(annotation) for mark in _marks(part)]


def _pack_arrays(plain: Any, message: Any) -> Any:
    """`plain` is what `message` was dumped to. What is in it by a name that a model did not give stays as it is."""
    if isinstance(message, BaseModel):
        dtypes = arrays(type(message))
        return {
            name: _array(item, dtypes[name])
            if name in dtypes and item is not None
            else _pack_arrays(item, getattr(message, name))
            for name, item in plain.items()
        }
    if isinstance(message, list):
        return [_pack_arrays(*pair) for pair in zip(plain, message, strict=True)]
    return plain


def _array(numbers: list[int] | list[float], dtype: str) -> msgpack.ExtType:
    return msgpack.ExtType(CODES[dtype], np.asarray(numbers, dtype).tobytes())


def unpack_array(code: int, data: bytes) -> list[int] | list[float]:
    """Raises ValueError for a type that is no array's."""
    if code not in DTYPES:
        raise ValueError(f"unknown msgpack extension type {code}")
    return np.frombuffer(data, DTYPES[code]).tolist()


def pack(message: BaseModel | dict[str, Any], exclude_none: bool = False) -> bytes:
    """Raises ValueError (from numpy's OverflowError) when a token id does not fit 32 bits."""
    plain = message.model_dump(mode="json", exclude_none=exclude_none) if isinstance(message, BaseModel) else message
    try:
        return msgpack.packb(_pack_arrays(plain, message), use_bin_type=True)
    except OverflowError as error:
        raise ValueError(f"a token id does not fit 32 bits: {error}") from error


def unpack(data: bytes, **options: Any) -> Any:
    """`options` are `msgpack.unpackb`'s. Raises ValueError on anything that is not one well-formed message."""
    try:
        return msgpack.unpackb(data, **{"raw": False, "ext_hook": unpack_array, "strict_map_key": True, **options})
    except ValueError:
        raise
    except Exception as error:
        raise ValueError(f"not a msgpack message: {error}") from error


def unpack_as(model: type[Model], data: bytes) -> Model:
    """Raises ValueError (pydantic's ValidationError is one) when the bytes are not a valid `model`."""
    return model.model_validate(unpack(data))
