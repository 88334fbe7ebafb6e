"""Signatures, without a server."""

from __future__ import annotations

import pytest

from anyio_kkrpc import ProtocolError
from anyio_kkrpc.redis.dialects._signing import Signer

KEY = b"a secret of sixteen bytes"


@pytest.mark.parametrize("time", [b"", b"x", b"-1", b"\xb2", b"1" * 16, b"1" * 5000])
def test_times_that_are_none(time: bytes) -> None:
    """Also who has the key can't make its readers calculate with anything."""
    signer = Signer(KEY, lambda: 1.0, lambda: b"nonce")
    fields = (b"from", b"a", b"json", b"{}")
    signed = signer.sign(b"s", fields)
    signer.check(b"s", b"1000-0", list(signed))
    head = time + b".nonce"
    signature = b"%s.%s" % (head, signer._digest(b"s", head, fields))
    with pytest.raises(ProtocolError, match=r"tells no time|long before"):
        signer.check(b"s", b"1000-0", [*fields, b"sig", signature])
