"""Where requests wait: what finds no room goes where it came from, or its caller is told."""

from __future__ import annotations

import pytest

from anyio_kkrpc import TransportClosedError
from anyio_kkrpc._protocol._records import Reply, Request
from anyio_kkrpc.abc import Envelope
from anyio_kkrpc.kit._queue import Overflow
from anyio_kkrpc.redis._connection._portion import MOST_ENTRIES
from anyio_kkrpc.redis._reading._large import LargeRequest
from anyio_kkrpc.redis._reading._reception import Reception

pytestmark = pytest.mark.anyio


class Hall:
    """A reception, and what it told."""

    def __init__(self, size: int = 2, overflow: Overflow = "drop_newest") -> None:
        self.dropped: list[bytes] = []
        self.finished: list[bytes] = []
        self.reception = Reception(
            size,
            1000,
            overflow,
            decode=self.decode,
            dropped=self.dropped.append,
            finished=self.finished.append,
        )

    def decode(self, fields: list[bytes]) -> Request:
        raise ValueError("no request at all")

    def answered(self) -> list[str]:
        records = [answer.record for answer in self.reception.answers]
        return [record.id for record in records if isinstance(record, Reply)]


def request(name: str, token: bytes | None = None) -> Envelope:
    return Envelope(Request(name, "call", ["f"]), "x", token=token)


@pytest.mark.parametrize(
    ("overflow", "lost"), [("drop_newest", ["3", "4"]), ("drop_oldest", ["1", "2"])]
)
def test_no_room(overflow: Overflow, lost: list[str]) -> None:
    """A caller in a broadcast is told; a group gets its entry back, and nobody is told."""
    hall = Hall(overflow=overflow)
    for name in "1234":
        hall.reception.inbound.deliver(request(name))
    assert hall.answered() == lost
    assert hall.dropped == []
    hall = Hall(overflow=overflow)
    for name in "1234":
        hall.reception.inbound.deliver(request(name, token=name.encode()))
    assert hall.answered() == []
    assert hall.dropped == [name.encode() for name in lost]


def test_room() -> None:
    hall = Hall(3)
    for left in (3, 2, 1, 0):
        assert hall.reception.room() == left
        hall.reception.inbound.deliver(request("one"))
    assert Hall(10**6).reception.room() == MOST_ENTRIES


@pytest.mark.parametrize("token", [None, b"1-0"])
def test_none_after_all(token: bytes | None) -> None:
    """What can't be decoded when it begins is counted, and of a group it is done with."""
    hall = Hall()
    large = LargeRequest(Request("large", "call", ["f"]), "x", None, token=token)
    large.fields, large.weight = [b"f", b"v"], 10
    assert not hall.reception.aside.begin(large)
    assert hall.reception.invalid == 1
    assert hall.finished == ([] if token is None else [token])


async def test_what_a_group_gets_back() -> None:
    hall = Hall(5)
    for name, token in (("own", None), ("taken", b"1-0"), ("own", None)):
        hall.reception.inbound.deliver(request(name, token))
    hall.reception.forget_taken()
    names = [(await hall.reception.inbound.receive()).record for _ in range(2)]
    assert [record.id for record in names if isinstance(record, Request)] == ["own", "own"]
    assert hall.reception.room() == 5


async def test_end() -> None:
    hall = Hall()
    hall.reception.inbound.deliver(request("one"))
    hall.reception.end(TransportClosedError("over"))
    with pytest.raises(TransportClosedError, match="over"):
        await hall.reception.inbound.receive()
