"""Records that no codec has made."""

from __future__ import annotations

from anyio_kkrpc._protocol._values import Packed
from anyio_kkrpc.codecs._uncoded import uncoded
from anyio_kkrpc.records import Reply, Request, StreamReply


def test_values_with_references_are_plain() -> None:
    """As they come from a codec; all other records are the same."""
    value = Packed({"__kkrpc_next_refs__": [1]})
    for record in (Reply("1", value), StreamReply("1", "2", d=False, v=value)):
        made = uncoded(record)
        assert isinstance(made, type(record))
        assert made.v == {"__kkrpc_next_refs__": [1]}
        assert type(made.v) is dict
        assert record.v is value
    for other in (Reply("1", 5), Reply("1", {}), Request("1", "call", ["f"])):
        assert uncoded(other) is other
