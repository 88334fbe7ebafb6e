"""What earlier versions wrote is read as it was meant, and written again as it was."""

from __future__ import annotations

import json
import re
from collections import Counter
from itertools import product
from pathlib import Path
from typing import Any

import anyio
import pytest
import redis

from anyio_kkrpc import RedisStreamsTransport, TransportClosedError
from anyio_kkrpc.abc import Envelope
from anyio_kkrpc.codecs import get_codec
from anyio_kkrpc.redis._group._dead_letters import parse
from anyio_kkrpc.redis._stream._keys import Keys
from anyio_kkrpc.redis.dialects import Dialects, Several
from anyio_kkrpc.redis.dialects._signing import Signer
from anyio_kkrpc.redis.dialects.native import MARK
from anyio_kkrpc.testing import RedisServer
from tests.bounds import BOUND
from tests.redis.writing.pure import KEYS as WRITING_KEYS
from tests.redis.writing.pure import commands as make_commands
from tests.redis.writing.pure import dialects as writing_dialects
from tests.redis.writing.pure import parsed

from .record import KEY, STREAM, describe

VECTORS = Path(__file__).parent / "vectors"


def load(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (VECTORS / name).read_text().splitlines()]


LINES = load("native-0.jsonl")
CASES = sorted({line["case"] for line in LINES})
# Entries of several records, as version 3 wrote them first, and the lone ones between them.
TOGETHER = [line for line in load("native-3.jsonl") if line["key"].startswith("inbox:")]
TOGETHER = [line for line in TOGETHER if "record" in line]


@pytest.fixture
def anyio_backend() -> str:
    """Any one: what is written doesn't depend on it."""
    return "asyncio"


def as_bytes(value: Any) -> bytes:
    return bytes.fromhex(value["hex"]) if isinstance(value, dict) else str(value).encode()


def flat(line: dict[str, Any]) -> list[bytes]:
    return [as_bytes(item) for pair in line["fields"] for item in pair]


def lines_of(case: str) -> list[tuple[dict[str, Any], list[bytes]]]:
    return [(line, flat(line)) for line in LINES if line["case"] == case]


def dialects() -> Dialects:
    return Dialects(
        "native",
        "reader",
        get_codec("json"),
        superjson=True,
        remote_peer_id=None,
        skips_own=False,
        max_queue_size=10,
        max_queue_bytes=1000,
        deliver=lambda record, sender: None,
        now=lambda: 0.0,
        time_of_day=lambda: 0.0,
    )


def key_of(line: dict[str, Any]) -> bytes:
    keys, name = Keys.of(STREAM), line["key"]
    if name.startswith("inbox:"):
        return keys.inbox(name.removeprefix("inbox:"))
    return {"stream": keys.stream, "control": keys.control, "dead": keys.dead}[name]


def test_what_they_cover() -> None:
    """Every kind of record, in either codec, signed and not; every hint; dead letters."""
    found = Counter(
        (line["fields"][1][0], line["record"]["class"]) for line in LINES if "record" in line
    )
    kinds = {"Request", "Reply", "CallbackCall", "CallbackRelease", "StreamRequest"}
    kinds |= {"StreamReply", "Cancel", "Bye"}
    assert set(found) == {(codec, kind) for codec in ("json", "cbor") for kind in kinds}
    hints = {line["fields"][0][1] for line in LINES if line["fields"][0][0] == "hint"}
    assert hints == {"hello", "wake", "claim", "destroy typescript"}
    assert len([line for line in LINES if line["key"] == "dead"]) == 4
    assert len([line for line in LINES if line["fields"][-1][0] == "sig"]) > 60


@pytest.mark.parametrize("case", CASES)
def test_read(case: str) -> None:
    """The same records, of the same sender, with the same number; it is of the version before."""
    for line, fields in lines_of(case):
        if "record" not in line:
            continue
        reader = dialects()
        entry = reader.decode(fields)
        assert entry is not None
        assert describe(entry.record) == line["record"]
        pairs = dict(line["fields"])
        assert entry.sender == pairs["from"]
        assert entry.number == (pairs["n"].encode() if "n" in pairs else None)
        assert (entry.number is None) is (line["key"] == "stream")
        assert reader.native.version_of(entry.sender) == 0


def test_what_is_together() -> None:
    """Replies, items and callbacks, in either codec, signed and not."""
    lines = [line for line in TOGETHER if "behind" in line]
    forms = {(line["fields"][1][0], line["fields"][-1][0] == "sig") for line in lines}
    assert forms == set(product(("json", "cbor"), (True, False)))
    kinds = {record["class"] for line in lines for record in (line["record"], *line["behind"])}
    assert kinds == {"Reply", "CallbackCall", "CallbackRelease", "StreamRequest", "StreamReply"}


@pytest.mark.parametrize("line", TOGETHER)
def test_together_is_read(line: dict[str, Any]) -> None:
    """Each record as if it stood alone, with a number of its own; and the signature is right."""
    fields, pairs = flat(line), dict(line["fields"])
    reader = dialects()
    entry = reader.decode(fields)
    assert entry is not None
    entries = [entry]
    if isinstance(entry, Several):
        entries = entry.entries
        assert entry.number_each() == []
    assert [describe(one.record) for one in entries] == [line["record"], *line.get("behind", ())]
    epoch, count = pairs["n"].split(".")
    numbers = [f"{epoch}.{int(count) + at}".encode() for at in range(len(entries))]
    assert [one.number for one in entries] == numbers
    assert {one.sender for one in entries} == {pairs["from"]}
    assert reader.native.version_of(pairs["from"]) == 3
    if "sig" in pairs:
        signer = Signer(KEY, lambda: 0.0, lambda: b"nonce")
        signer.check(key_of(line), pairs["sig"].partition(".")[0].encode() + b"-0", fields)


@pytest.mark.parametrize("line", TOGETHER)
def test_together_is_written(line: dict[str, Any]) -> None:
    """The same fields and bytes, but for what differs from one entry to the next."""
    fields, recipient = flat(line), line["key"].removeprefix("inbox:")
    codec, signed = fields[2].decode(), fields[-2] == b"sig"
    speaks = writing_dialects(codec=codec, session_id=fields[1].decode())
    speaks.decode([b"from", recipient.encode(), *fields[2:4], *MARK])  # so that it is known
    signer = Signer(KEY, lambda: 1.0, lambda: b"n" * 16) if signed else None
    commands = make_commands(speaks=speaks, signer=signer)
    behind = [fields[at : at + 2] for at in range(8, len(fields), 2) if fields[at] != b"sig"]
    posts = []
    for name, data in (fields[2:4], *behind):
        record = get_codec(name.decode()).decode(data)
        post = commands.make(Envelope(record, None, recipient))
        assert post is not None
        posts.append(post)
    ((*command,),) = parsed(commands.join(posts))
    begin = [b"XADD", WRITING_KEYS.inbox(recipient), b"NOMKSTREAM", b"*"]
    written = command[len(begin) :]
    end = written[-2:] if signed else []
    assert command[: len(begin)] == begin
    assert re.fullmatch(rb"e\+[0-9a-f]+\.1", written[5])
    assert written == [*fields[:5], written[5], *fields[6 : 8 + 2 * len(behind)], *end]


@pytest.mark.parametrize("case", [case for case in CASES if "signed" in case])
def test_signatures(case: str) -> None:
    """They are right, for the key where they were written only."""
    for line, fields in lines_of(case):
        if fields[-2] == b"sig" and line["key"] != "dead":
            signer = Signer(KEY, lambda: 0.0, lambda: b"nonce")
            entry_id = fields[-1].partition(b".")[0] + b"-0"
            signer.check(key_of(line), entry_id, fields)
            with pytest.raises(Exception, match="signature is wrong"):
                signer.check(b"elsewhere", entry_id, fields)


@pytest.mark.parametrize("case", [case for case in CASES if "dead" in case])
def test_dead_letters(case: str) -> None:
    ((line, fields),) = [found for found in lines_of(case) if found[0]["key"] == "dead"]
    letter = parse(b"1-0", fields)
    pairs = dict(line["fields"])
    assert (letter.entry_id, letter.group) == (pairs["id"], "kkrpc-group")
    assert (letter.reason, letter.attempts) == (pairs["reason"], 1)
    assert (letter.first, letter.last) == (int(pairs["first"]) / 1000, int(pairs["last"]) / 1000)
    assert list(letter.fields) == [name for name, _ in line["fields"][6:]]
    assert [value for _, value in zip(fields[12::2], fields[13::2], strict=True)] == list(
        letter.fields.values()
    )


async def until(condition: Any) -> None:
    with anyio.fail_after(BOUND):
        while not condition():
            await anyio.sleep(0.005)


@pytest.mark.anyio
@pytest.mark.server
@pytest.mark.parametrize("case", CASES)
async def test_written(server: RedisServer, raw: redis.Redis, stream_name: str, case: str) -> None:
    """The same keys, fields and bytes; what is new is where the version before ignores it."""
    keys = Keys.of(stream_name)
    signed = "signed" in case
    lines = [(line, fields) for line, fields in lines_of(case) if "record" in line]
    senders = dict.fromkeys((fields[1].decode(), fields[2].decode()) for _, fields in lines)
    for sender, codec in senders:
        transport = RedisStreamsTransport(
            server.url,
            stream=stream_name,
            session_id=sender,
            codec=codec,
            signing_key=KEY if signed else None,
            honor_destroy_signal=False,
        )
        async with transport:
            for line, fields in lines:
                if fields[1].decode() == sender and fields[2].decode() == codec:
                    await _written(raw, transport, keys, line, fields)
    raw.delete(keys.stream, keys.control, keys.inbox("client"), keys.inbox("worker"))


async def _written(
    raw: redis.Redis,
    transport: RedisStreamsTransport,
    keys: Keys,
    line: dict[str, Any],
    fields: list[bytes],
) -> None:
    name = line["key"]
    recipient = name.removeprefix("inbox:") if name.startswith("inbox:") else None
    key = {"stream": keys.stream, "control": keys.control}.get(name) or keys.inbox(recipient)
    if recipient is not None and not raw.exists(key):
        raw.xadd(key, {"hint": "hello"})
    before = raw.xinfo_stream(key)["last-generated-id"] if raw.exists(key) else b"0-0"
    record = get_codec(fields[2].decode()).decode(fields[3])
    await transport.send(Envelope(record, None, recipient))
    await until(lambda: raw.xrange(key, b"(" + before))
    ((_, found),) = raw.xrange(key, b"(" + before)
    written = [item for pair in found.items() for item in pair]
    # The number and the signature differ from one entry to the next. The version before took what
    # stands before the dot as it is; now it says with a + that there are no gaps.
    expected, pattern = list(fields), re.compile(rb"[0-9a-f]{8}\+[0-9a-f]+\.[1-9][0-9]*")
    if b"n" in found:
        assert pattern.fullmatch(found[b"n"])
        expected[5] = found[b"n"]
    signature = []
    if b"sig" in found:
        assert re.fullmatch(rb"\d{13}\.[0-9a-f]{16}\.[0-9a-f]{64}", found[b"sig"])
        assert expected[-2] == b"sig"
        expected, signature = expected[:-2], [b"sig", found[b"sig"]]
    assert written == [*expected, *MARK, *signature]


@pytest.mark.anyio
@pytest.mark.server
async def test_hints(server: RedisServer, raw: redis.Redis, stream_name: str) -> None:
    """None is an entry that can't be read; the one that is to end a peer does so."""
    keys = Keys.of(stream_name)
    async with RedisStreamsTransport(server.url, stream=stream_name, session_id="worker") as peer:
        (last,) = [line for line in LINES if line["fields"][0][1] == "destroy typescript"]
        for line in LINES:
            if line["fields"][0][0] == "hint" and line is not last:
                key = keys.control if line["key"] == "control" else keys.inbox("worker")
                raw.xadd(key, dict(line["fields"]))
        raw.xadd(keys.control, dict(last["fields"]))
        with anyio.fail_after(BOUND), pytest.raises(TransportClosedError, match="of typescript"):
            await peer.receive()
        assert peer.statistics().invalid == 0
    raw.delete(keys.control)
