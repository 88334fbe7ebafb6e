"""Hypothesis strategies for records, shared by the tests of codecs and transports."""

from __future__ import annotations

import datetime
from typing import Any

from hypothesis import strategies as st
from msgspec import UNSET

from anyio_kkrpc._protocol._records import (
    Bye,
    CallbackCall,
    CallbackProgress,
    CallbackRelease,
    Cancel,
    Record,
    Reply,
    Request,
    StreamReply,
    StreamRequest,
)

texts = st.text(st.characters(codec="utf-8"), max_size=20)
json_values: st.SearchStrategy[Any] = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=8,
)
cbor_values: st.SearchStrategy[Any] = st.recursive(
    json_values
    | st.binary(max_size=20)
    | st.integers()
    | st.floats(allow_nan=False)
    | st.uuids()
    | st.decimals(allow_nan=False)
    | st.dates()
    | st.datetimes(timezones=st.just(datetime.timezone.utc)),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=8,
)


def maybe(strategy: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """A member that may be absent."""
    return st.just(UNSET) | strategy


def records(values: st.SearchStrategy[Any]) -> st.SearchStrategy[Record]:
    """Any record with such values."""
    mappings = st.dictionaries(texts, values, max_size=3)
    return st.one_of(
        st.builds(
            Request,
            id=texts,
            op=st.sampled_from(["call", "get", "set", "new", "ref"]),
            p=st.lists(texts, max_size=3),
            a=maybe(st.lists(values, max_size=3)),
            v=maybe(values),
            k=maybe(mappings),
            d=maybe(st.integers(0, 2**40)),
            o=maybe(st.booleans()),
            meta=maybe(mappings),
        ),
        st.builds(Reply, id=texts, v=maybe(values), e=maybe(mappings)),
        st.builds(CallbackCall, id=texts, a=st.lists(values, max_size=3), k=maybe(mappings)),
        st.builds(CallbackProgress, id=texts, n=st.integers(0, 2**53 - 1)),
        st.builds(CallbackRelease, ids=st.lists(texts, max_size=3)),
        st.builds(
            StreamRequest,
            id=texts,
            sid=texts,
            op=st.sampled_from(["pull", "return", "throw"]),
            n=maybe(values),
            v=maybe(values),
        ),
        st.builds(
            StreamReply,
            id=texts,
            sid=texts,
            d=maybe(st.booleans()),
            v=maybe(values),
            e=maybe(mappings),
            i=maybe(st.integers(0, 2**40)),
        ),
        st.builds(Cancel, id=texts),
        st.just(Bye()),
    )
