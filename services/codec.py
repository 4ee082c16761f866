"""Messages as msgpack: token ids and logprobs travel as raw little-endian arrays, nothing is ever pickled."""

from typing import Any, TypeVar

import msgpack
import numpy as np
from pydantic import BaseModel

INT32, FLOAT32 = 1, 2
ARRAYS = {"token_ids": INT32, "prompt_token_ids": INT32, "completion_token_ids": INT32, "logprobs": FLOAT32}
"""Fields that are packed as arrays wherever they occur. float32 is what engines compute: nothing is rounded twice."""
DTYPES = {INT32: np.dtype("<i4"), FLOAT32: np.dtype("<f4")}

Model = TypeVar("Model", bound=BaseModel)


def _pack_arrays(value: Any) -> Any:
    if isinstance(value, dict):
        return {
            key: msgpack.ExtType(ARRAYS[key], np.asarray(item, DTYPES[ARRAYS[key]]).tobytes())
            if key in ARRAYS and isinstance(item, list)
            else _pack_arrays(item)
            for key, item in value.items()
        }
    if isinstance(value, list):
        return [_pack_arrays(item) for item in value]
    return value


def _unpack_array(code: int, data: bytes) -> list[int] | list[float]:
    if code not in DTYPES:
        raise ValueError(f"unknown msgpack extension type {code}")
    return np.frombuffer(data, DTYPES[code]).tolist()


def pack(message: BaseModel | dict[str, Any]) -> bytes:
    """Raises ValueError (from numpy's OverflowError) when a token id does not fit 32 bits."""
    plain = message.model_dump(mode="json") if isinstance(message, BaseModel) else message
    try:
        return msgpack.packb(_pack_arrays(plain), use_bin_type=True)
    except OverflowError as error:
        raise ValueError(f"a token id does not fit 32 bits: {error}") from error


def unpack(data: bytes) -> Any:
    """Raises ValueError on anything that is not one well-formed message."""
    try:
        return msgpack.unpackb(data, raw=False, ext_hook=_unpack_array, strict_map_key=True)
    except ValueError:
        raise
    except Exception as error:
        raise ValueError(f"not a msgpack message: {error}") from error


def unpack_as(model: type[Model], data: bytes) -> Model:
    """Raises ValueError (pydantic's ValidationError is one) when the bytes are not a valid `model`."""
    return model.model_validate(unpack(data))
