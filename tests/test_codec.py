"""The wire format: what goes in comes out, arrays are raw little-endian bytes, and malformed bytes raise ValueError."""

import random
import struct

import msgpack
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scored_groups import make_group

from services import codec
from services.api import RolloutGroup, ScoreItem
from services.contract import Completion, ScoredGroup, Version
from services.spec import RewardSpec, RewardTerm

int32 = st.integers(-(2**31), 2**31 - 1)
float32 = st.floats(width=32, allow_nan=False, allow_infinity=False)
text = st.text(st.characters(exclude_categories=["Cs"]))
leaf = st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats(allow_nan=False) | text
plain = st.recursive(
    leaf,
    lambda inner: st.lists(inner) | st.dictionaries(text | st.sampled_from(["token_ids", "logprobs"]), inner),
    max_leaves=20,
)


def completion(pairs: list[tuple[int, float]], **fields) -> Completion:
    numbers = {"token_ids": [token for token, _ in pairs], "logprobs": [number for _, number in pairs]}
    return Completion(**{"text": "", "finish_reason": "stop", **numbers, **fields})


@given(st.lists(st.tuples(int32, float32)))
def test_arrays_round_trip_bit_exactly(pairs):
    group = RolloutGroup(group_id="g", prompt_token_ids=[7], completions=[completion(pairs)])
    found = codec.unpack_as(RolloutGroup, codec.pack(group))
    assert found == group
    assert [struct.pack("<f", a) for a in found.completions[0].logprobs] == [struct.pack("<f", b) for _, b in pairs]


@given(plain)
def test_everything_else_round_trips(value):
    assert codec.unpack(codec.pack({"value": value})) == {"value": value}


@given(st.lists(st.tuples(st.integers(0, 2**31 - 1), st.floats(-1e4, 0, width=32))), st.integers(0, 2**32), text)
@settings(max_examples=50)
def test_scored_groups_round_trip(pairs, seed, content):
    group = make_group(seed, random.Random(seed))
    group.completions[0] = completion(pairs, text=content, weight_version=Version(lineage=1, version=seed))
    for one in group.completions:
        one.logprobs = np.float32(one.logprobs).tolist()
    assert codec.unpack_as(ScoredGroup, codec.pack(group)) == group


def test_arrays_are_raw_little_endian_bytes():
    packed = msgpack.unpackb(codec.pack(completion([(1, -0.5), (-2, 0.5)])))
    assert packed["token_ids"] == msgpack.ExtType(1, b"\x01\x00\x00\x00\xfe\xff\xff\xff")
    assert packed["logprobs"] == msgpack.ExtType(2, b"\x00\x00\x00\xbf\x00\x00\x00\x3f")
    optional = msgpack.unpackb(codec.pack(ScoreItem(prompt_token_ids=[1], completion="c")))
    assert optional["prompt_token_ids"] == msgpack.ExtType(1, b"\x01\x00\x00\x00")
    assert optional["completion_token_ids"] is None


def test_what_a_caller_calls_token_ids_is_no_array():
    schema = {"dependentRequired": {"token_ids": ["x"]}, "enum": [{"logprobs": [0.1]}, {"token_ids": [2**40]}]}
    spec = RewardSpec(rewards=[RewardTerm(name="json_schema", params={"schema": schema})])
    assert codec.unpack_as(RewardSpec, codec.pack(spec)) == spec


@pytest.mark.parametrize("token", [2**31, -(2**31) - 1, 2**70])
def test_a_token_id_beyond_32_bits_is_refused(token):
    with pytest.raises(ValueError, match="32 bits"):
        codec.pack(completion([(token, 0.0)]))


@given(st.binary(max_size=200))
def test_any_bytes_give_a_message_or_a_value_error(data):
    for read in (codec.unpack, lambda data: codec.unpack_as(ScoredGroup, data)):
        try:
            read(data)
        except ValueError:
            pass


@given(st.integers(0, 2**32), st.data())
@settings(max_examples=50)
def test_a_cut_group_is_never_taken_for_a_whole_one(seed, data):
    packed = codec.pack(make_group(0, random.Random(seed)))
    cut = data.draw(st.integers(0, len(packed) - 1))
    with pytest.raises(ValueError):
        codec.unpack_as(ScoredGroup, packed[:cut])
    with pytest.raises(ValueError):
        codec.unpack(packed + b"\x00")


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xc1",
        msgpack.packb({1: "int key"}),
        msgpack.packb({"token_ids": msgpack.ExtType(9, b"")}),
        msgpack.packb({"token_ids": msgpack.ExtType(1, b"123")}),
        msgpack.packb("not utf-8").replace(b"not", b"\xff\xfe\xfd"),
        b"\x91" * 5000,
        b"\xdf\xff\xff\xff\xff",
        b"\x80\x04\x95\x0b\x00\x00\x00\x00\x00\x00\x00\x8c\x07builtin\x94.",
    ],
)
def test_malformed_bytes_are_a_value_error(data):
    with pytest.raises(ValueError):
        codec.unpack(data)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_numbers_that_are_not_finite_do_not_become_groups(bad):
    group = make_group(0, random.Random(0))
    group.completions[0].logprobs[0] = bad
    with pytest.raises(ValueError, match="finite"):
        codec.unpack_as(ScoredGroup, codec.pack(group))
