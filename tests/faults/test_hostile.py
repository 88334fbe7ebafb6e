"""Peers that may write to Redis but mean no good."""

from __future__ import annotations

import io
import logging
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import anyio
import cbor2
import msgspec
import pytest
import redis

from anyio_kkrpc import RedisStreamsTransport, RPCChannel, with_call_options
from anyio_kkrpc.middleware import access_log
from anyio_kkrpc.redis.dialects import _signing
from anyio_kkrpc.testing import RedisServer
from tests.bounds import BOUND, CALL_BOUND

pytestmark = [pytest.mark.anyio, pytest.mark.server, pytest.mark.slow]
KEY = b"a secret of sixteen bytes"


class Api:
    def __init__(self) -> None:
        self.ran: list[Any] = []

    def work(self, n: Any) -> Any:
        self.ran.append(n)
        return n


async def until(condition: Callable[[], Any]) -> None:
    with anyio.fail_after(BOUND):
        while not condition():
            await anyio.sleep(0.01)


@pytest.mark.parametrize("grouped", [False, True], ids=["broadcast", "group"])
async def test_signed_entries(
    redis_server: RedisServer,
    stream_name: str,
    witness: redis.Redis,
    grouped: bool,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With a key, what is forged, moved, changed or repeated is refused; honest calls answer."""
    options: dict[str, Any] = {"stream": stream_name, "use_consumer_group": grouped}
    api = Api()
    async with (
        RedisStreamsTransport(redis_server.url, signing_key=KEY, **options) as serving,
        RedisStreamsTransport(redis_server.url, signing_key=KEY, **options) as using,
        RedisStreamsTransport(redis_server.url, **options) as stranger,
        RPCChannel(serving, expose=api),
        RPCChannel(using, timeout=CALL_BOUND) as client,
    ):
        remote = client.get_api()
        assert await remote.work(1) == 1
        (entry,) = witness.xrange(stream_name)
        fields: dict[Any, Any] = entry[1]
        forged = [
            {**fields},  # again
            {name: value for name, value in fields.items() if name != b"sig"},
            {**fields, b"json": fields[b"json"].replace(b"[1]", b"[2]")},
            {**fields, b"from": stranger.session_id.encode()},
            {**fields, b"sig": b"1.2.3"},
            {**fields, b"sig": b"x"},
            {**fields, b"sig": b""},
        ]
        for number, bad in enumerate(forged, 1):
            witness.xadd(stream_name, bad)
            inbox = f"{{{stream_name}}}:inbox:{serving.session_id}"
            witness.xadd(inbox, bad)  # right signature, wrong place
            witness.xadd(f"{{{stream_name}}}:control", bad)
            await until(lambda n=number: serving.statistics().invalid == 3 * n)
        assert await remote.work(3) == 3
        # What was signed long ago is refused though its nonce is new here.
        monkeypatch.setattr(_signing, "WINDOW", -1.0)
        witness.xadd(stream_name, fields)
        await until(lambda: serving.statistics().invalid == 3 * len(forged) + 1)
        monkeypatch.undo()
        assert api.ran == [1, 3]
        if grouped:
            await until(lambda: witness.xpending(stream_name, "kkrpc-group")["pending"] == 0)
    assert "signature is wrong" in caplog.text


async def test_signed_dead_letters(
    redis_server: RedisServer, stream_name: str, witness: redis.Redis
) -> None:
    """A dead letter that is put back is signed anew."""
    options: dict[str, Any] = {
        "stream": stream_name,
        "use_consumer_group": True,
        "signing_key": KEY,
        "claim_idle": 0.1,
        "max_deliveries": 1,
    }
    api = Api()
    async with RedisStreamsTransport(redis_server.url, **options) as using:
        async with (
            RPCChannel(using, timeout=CALL_BOUND) as client,
            anyio.create_task_group() as group,
        ):
            failed: list[Exception] = []

            async def call() -> None:
                try:
                    await client.get_api().work(1)
                except Exception as exc:
                    failed.append(exc)

            group.start_soon(call)
            await until(lambda: witness.xlen(stream_name))
            witness.xgroup_create(stream_name, "kkrpc-group", "0")
            assert witness.xreadgroup("kkrpc-group", "gone", {stream_name: ">"})
            async with (
                RedisStreamsTransport(redis_server.url, **options) as serving,
                RPCChannel(serving, expose=api),
            ):
                await until(lambda: failed)
                (letter,) = await using.dead_letters()
                await using.retry_dead_letter(letter.id)
                await until(lambda: api.ran == [1])


@pytest.mark.parametrize("of", ["nobody", "another time", "another stream", "no time"])
async def test_forged_dead_letters(
    redis_server: RedisServer, stream_name: str, witness: redis.Redis, of: str
) -> None:
    """Who has no key gets no letter signed by who puts it back."""
    api = Api()
    options: dict[str, Any] = {"use_consumer_group": True, "signing_key": KEY}
    async with (
        RedisStreamsTransport(redis_server.url, stream=stream_name, **options) as serving,
        RedisStreamsTransport(redis_server.url, stream=stream_name, **options) as using,
        RedisStreamsTransport(redis_server.url, stream=f"{stream_name}2", **options) as elsewhere,
        RPCChannel(serving, expose=api),
        RPCChannel(using, timeout=CALL_BOUND) as client,
        RPCChannel(elsewhere) as other,
    ):
        assert await client.get_api().work(1) == 1
        await with_call_options(other.get_api(), reply=False).work(2)
        key = f"{stream_name}2" if of == "another stream" else stream_name
        ((entry_id, request),) = witness.xrange(key)
        if of == "nobody":
            request[b"sig"] = b"x"
        about = {
            "id": {"another time": b"1-1", "no time": b"x-1"}.get(of, entry_id),
            "group": "kkrpc-group",
            "reason": "delivered 5 times without being finished",
            "attempts": 5,
            "first": 1,
            "last": 2,
        }
        forged = witness.xadd(f"{{{stream_name}}}:dead", {**about, **request})
        with pytest.raises(LookupError, match="sign|id is"):
            await using.retry_dead_letter(forged.decode())
        assert await using.dead_letters() == []
        assert using.statistics().invalid == 1
        assert witness.xlen(f"{{{stream_name}}}:dead") == 1
        assert await client.get_api().work(3) == 3
        assert api.ran == [1, 3]


@pytest.fixture
def durable_server(server_executable: str) -> Iterator[RedisServer]:
    with RedisServer(server_executable, appendonly=True) as server:
        yield server


@pytest.mark.parametrize("grouped", [False, True], ids=["broadcast", "group"])
async def test_signed_through_an_outage(
    durable_server: RedisServer, grouped: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What waited for longer than a signature is good for is signed when it is written."""
    running, gate = anyio.Event(), anyio.Event()

    class Waiting(Api):
        async def wait(self, n: int) -> int:
            running.set()
            await gate.wait()
            return n

    options: dict[str, Any] = {
        "stream": "jobs",
        "use_consumer_group": grouped,
        "signing_key": KEY,
        "claim_idle": CALL_BOUND,
    }
    api = Waiting()
    results: list[int] = []
    async with (
        RedisStreamsTransport(durable_server.url, **options) as serving,
        RedisStreamsTransport(durable_server.url, **options) as using,
        RPCChannel(serving, expose=api),
        RPCChannel(using, timeout=CALL_BOUND) as client,
        anyio.create_task_group() as group,
    ):

        async def call(name: str, n: int, timeout: float | None) -> None:
            api = with_call_options(client.get_api(), timeout=timeout)
            results.append(await getattr(api, name)(n))

        group.start_soon(call, "wait", 1, CALL_BOUND)
        await running.wait()
        durable_server.kill()
        # What is signed now is signed as of two minutes ago; what is written later is not.
        clocks = {serving: serving._lane.admin.signer.now, using: using._lane.admin.signer.now}
        signed = dict.fromkeys(clocks, 0)

        def signs(peer: RedisStreamsTransport) -> float:
            signed[peer] += 1
            return clocks[peer]() - 120

        for peer in clocks:
            monkeypatch.setattr(peer._lane.admin.signer, "now", partial(signs, peer))
        gate.set()
        group.start_soon(call, "work", 2, CALL_BOUND)
        group.start_soon(call, "work", 3, None)
        await until(lambda: signed[serving] and signed[using] >= 2)
        monkeypatch.undo()
        await anyio.to_thread.run_sync(durable_server.start)
        await until(lambda: len(results) == 3)
        assert serving.statistics().invalid == using.statistics().invalid == 0
    assert sorted(results) == [1, 2, 3]
    assert sorted(api.ran) == [2, 3]


def _bombs() -> dict[str, dict[str, bytes]]:
    cycle: list[Any] = []
    cycle.append(cycle)
    begin = b'{"t":"q","id":"1","op":"call","p":["work"],"d":1'
    bus = b'{"protocol":"kkrpc.bus.v1","transportId":"t","from":"evil","sentAt":1%s,"message":%s}\n'
    classic = b'{"id":%s,"method":"work","args":[1],"type":"request"}\n'
    return {
        "budget of 400 digits": {"json": begin + b"0" * 400 + b"}"},
        "budget of 5,000 digits": {"json": begin + b"0" * 5000 + b"}"},
        "no budget": {
            "cbor": cbor2.dumps({"t": "q", "id": "1", "op": "get", "p": ["x"], "d": float("nan")})
        },
        "long number": {"json": b'{"t":"cbr","ids":[]}', "n": b"1" * 5000 + b"." + b"2" * 5000},
        "time of 5,000 digits": {"data": bus % (b"0" * 5000, b'{"t":"cbr","ids":[]}')},
        "id like an integer's": {"data": classic % b'"\\u0000abc"'},
        "id of 400 digits": {"data": classic % (b"1" * 400)},
        "long hint": {"hint": b"destroy " + b"x" * 1_000_000},
        "cyclic": {"cbor": cbor2.dumps({"t": "r", "id": "1", "v": cycle}, value_sharing=True)},
        "long array": {"cbor": b"\xa1\x61t\x9b\x7f\xff\xff\xff\xff\xff\xff\xff"},
        "deep cbor": {"cbor": b"\x81" * 1_000_000},
        "deep json": {"json": b"[" * 1_000_000},
        "huge": {"json": b'{"t":"q","id":"' + b"x" * (20 << 20) + b'"}'},
        "big number": {"json": b'{"t":"q","id":"1","op":"call","p":["work"],"d":1e400}'},
        "endless budget": {"json": b'{"t":"q","id":"1","op":"get","p":["no"],"d":-9e99}'},
    }


@pytest.mark.parametrize("grouped", [False, True], ids=["broadcast", "group"])
async def test_bombs(
    redis_server: RedisServer, stream_name: str, witness: redis.Redis, grouped: bool
) -> None:
    """Records made to exhaust their reader are skipped, wherever they stand; it goes on."""
    options: dict[str, Any] = {"stream": stream_name, "use_consumer_group": grouped}
    api = Api()
    async with (
        RedisStreamsTransport(redis_server.url, **options) as serving,
        RedisStreamsTransport(redis_server.url, **options) as using,
        RPCChannel(serving, expose=api),
        RPCChannel(using, timeout=CALL_BOUND) as client,
    ):
        for number, (name, bomb) in enumerate(_bombs().items()):
            fields: dict[Any, Any] = bomb if "hint" in bomb else {"from": b"evil", **bomb}
            for key in (
                stream_name,
                f"{{{stream_name}}}:control",
                f"{{{stream_name}}}:inbox:{serving.session_id}",
                f"{{{stream_name}}}:inbox:{using.session_id}",
            ):
                witness.xadd(key, fields)
            assert await client.get_api().work(number) == number, name
            assert api.ran.pop() == number
            assert not api.ran, name
        assert serving.statistics().invalid > 2 * number
        if grouped:
            await until(lambda: witness.xpending(stream_name, "kkrpc-group")["pending"] == 0)
    witness.delete(stream_name)


async def test_flood_of_cancels_and_replies(
    redis_server: RedisServer, stream_name: str, witness: redis.Redis
) -> None:
    """Cancels and replies of calls that never were cost a bounded memory, and no honest call."""
    api = Api()
    async with (
        RedisStreamsTransport(redis_server.url, stream=stream_name) as serving,
        RedisStreamsTransport(redis_server.url, stream=stream_name) as using,
        RPCChannel(serving, expose=api) as server,
        RPCChannel(using, timeout=CALL_BOUND) as client,
    ):
        pipe = witness.pipeline()
        inbox = f"{{{stream_name}}}:inbox:{serving.session_id}"
        for n in range(15_000):
            pipe.xadd(inbox, {"from": "evil", "json": b'{"t":"x","id":"%d"}' % n})
            pipe.xadd(inbox, {"from": "evil", "json": b'{"t":"r","id":"%d","v":1}' % n})
        pipe.execute()
        assert await client.get_api().work(1) == 1
        await until(lambda: server.statistics().ignored == 30_000)
        assert len(server._conversation.cancelled) == 10_000
        await until(lambda: witness.xlen(inbox) < 200)


async def test_inbox_of_the_wrong_type(
    redis_server: RedisServer, stream_name: str, witness: redis.Redis
) -> None:
    """A key that should be another peer's inbox but is a string: that reply fails, others don't."""
    api = Api()
    async with (
        RedisStreamsTransport(redis_server.url, stream=stream_name) as serving,
        RedisStreamsTransport(redis_server.url, stream=stream_name) as using,
        RPCChannel(serving, expose=api),
        RPCChannel(using, timeout=CALL_BOUND) as client,
    ):
        witness.set(f"{{{stream_name}}}:inbox:evil", "not a stream")
        request = b'{"t":"q","id":"1","op":"call","p":["work"],"a":[7]}'
        witness.xadd(stream_name, {"from": "evil", "json": request})
        await until(lambda: serving.statistics().undeliverable == 1)
        assert await client.get_api().work(1) == 1
    witness.delete(f"{{{stream_name}}}:inbox:evil")


EVIL = "evil\nERROR root: payment refused \x1b[31m\u2028\u202e"


def _forgeries() -> list[dict[str, bytes]]:
    """Entries with a text that would be a line of its own in the log, wherever there may be text."""
    records: list[dict[str, Any]] = [
        {"t": EVIL},
        {"t": "q", "id": EVIL, "op": "call", "p": [EVIL], "a": [EVIL], "meta": {EVIL: EVIL}},
        {"t": "q", "id": EVIL, "op": EVIL, "p": [EVIL]},
        {"t": "q", "id": "1", "op": "call", "p": ["work"], "a": [], "k": {EVIL: EVIL}},
        {"t": "q", "id": "2", "op": "call", "p": ["call"], "a": [{"__kkrpc_next_arg__": EVIL}]},
        {"t": "q", "id": "3", "op": "call", "p": ["call"], "d": EVIL},
        {"t": "r", "id": EVIL, "e": {"n": EVIL, "m": EVIL, "s": EVIL}},
        {"t": "cb", "id": EVIL, "a": [{"__kkrpc_next_arg__": EVIL}]},
        {"t": "cbr", "ids": [EVIL]},
        {"t": "sq", "id": EVIL, "sid": EVIL, "op": "pull"},
        {"t": "sr", "id": EVIL, "sid": EVIL, "e": {"n": EVIL, "m": EVIL}},
        {"t": "x", "id": EVIL},
    ]
    envelope = {"protocol": "kkrpc.bus.v1", "transportId": EVIL, "from": EVIL, "to": EVIL}
    message: dict[str, Any] = {"id": EVIL, "method": EVIL, "args": [EVIL], "type": "request"}
    evil = EVIL.encode()
    return [
        *({"from": evil, "json": msgspec.json.encode(record)} for record in records),
        *({"from": evil, "cbor": cbor2.dumps(record)} for record in records),
        *({"data": msgspec.json.encode({**envelope, "message": one})} for one in records),
        {"data": msgspec.json.encode(message), "sessionId": evil},
        {"data": msgspec.json.encode({**message, "type": EVIL}), "sessionId": evil},
        {
            "data": b'{"json":{"type":"response"},"meta":{"values":{"x":[%s]}}}'
            % msgspec.json.encode(EVIL)
        },
        {EVIL: evil, "from": evil},
        {"from": evil, "json": b'{"t":"cbr","ids":[]}', "n": evil, "v": evil},
        {"hint": b"destroy " + evil},
    ]


@pytest.mark.parametrize("grouped", [False, True], ids=["broadcast", "group"])
async def test_forged_log_lines(
    redis_server: RedisServer, stream_name: str, witness: redis.Redis, grouped: bool
) -> None:
    """Texts of other peers can't begin a line of the log, nor reach a terminal as commands."""
    options: dict[str, Any] = {
        "stream": stream_name,
        "use_consumer_group": grouped,
        "honor_destroy_signal": False,
    }
    handler = logging.StreamHandler(io.StringIO())
    handler.setFormatter(logging.Formatter("%(levelname)s %(message)s"))
    logger = logging.getLogger("anyio_kkrpc")
    logger.addHandler(handler)
    try:
        async with (
            RedisStreamsTransport(redis_server.url, **options) as serving,
            RedisStreamsTransport(redis_server.url, **options) as using,
            RPCChannel(serving, expose=Api(), middleware=[access_log()]),
            RPCChannel(using, timeout=CALL_BOUND) as client,
        ):
            for fields in _forgeries():
                for key in (
                    stream_name,
                    f"{{{stream_name}}}:control",
                    f"{{{stream_name}}}:inbox:{serving.session_id}",
                    f"{{{stream_name}}}:inbox:{using.session_id}",
                ):
                    witness.xadd(key, fields)  # type: ignore[arg-type]
            witness.xadd(f"{{{stream_name}}}:dead", {EVIL: EVIL, "id": EVIL, "from": EVIL})
            assert await using.dead_letters() == []
            assert await client.get_api().work(1) == 1
            await until(lambda: serving.statistics().invalid > 20)
            await until(lambda: using.statistics().invalid > 10)
    finally:
        logger.removeHandler(handler)
    lines = handler.stream.getvalue().split("\n")
    assert sum("payment refused" in line for line in lines) > 10
    for line in lines:
        assert line.isprintable()
        assert not line.startswith("ERROR root")
    witness.delete(stream_name, f"{{{stream_name}}}:dead")
