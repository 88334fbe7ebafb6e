"""Lines that real peers wrote, said once more to a Python peer, and what it answers to them."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import anyio
from anyio.abc import ByteStream
from anyio.streams.memory import MemoryObjectReceiveStream, MemoryObjectSendStream

from anyio_kkrpc import ByteStreamTransport, RPCChannel
from tests.bounds import BOUND, CALL_BOUND

VECTORS = Path(__file__).parent / "vectors"


class MemoryBytes(ByteStream):
    """One end of a pipe in memory."""

    def __init__(
        self, incoming: MemoryObjectReceiveStream[bytes], outgoing: MemoryObjectSendStream[bytes]
    ) -> None:
        self._incoming = incoming
        self._outgoing = outgoing

    async def receive(self, max_bytes: int = 65536) -> bytes:
        return await self._incoming.receive()

    async def send(self, item: bytes) -> None:
        await self._outgoing.send(bytes(item))

    async def send_eof(self) -> None:
        await self._outgoing.aclose()

    async def aclose(self) -> None:
        await self._incoming.aclose()
        await self._outgoing.aclose()


class Recorded:
    """A peer that says what a recorded one said, with the ids of those that it talks to now."""

    def __init__(self, stream: ByteStream) -> None:
        self._stream = stream
        self._rest = b""
        self._ids: dict[str, str] = {}

    async def say(self, message: Any) -> None:
        """Write a message."""
        await self._stream.send(json.dumps(self.translated(message)).encode() + b"\n")

    async def hear(self) -> Any:
        """Return the next message."""
        with anyio.fail_after(BOUND):
            while b"\n" not in self._rest:
                self._rest += await self._stream.receive()
        line, _, self._rest = self._rest.partition(b"\n")
        return json.loads(line)

    async def expect(self, recorded: Any) -> None:
        """Read a message, which must be the recorded one but for ids that its sender made up."""
        heard = await self.hear()
        self.learn(recorded, heard)
        assert heard == self.translated(recorded)

    def learn(self, recorded: Any, heard: Any) -> None:
        if isinstance(recorded, dict) and isinstance(heard, dict):
            for key, value in recorded.items():
                if key in ("id", "sid") and isinstance(value, str) and key in heard:
                    self._ids.setdefault(value, heard[key])
                self.learn(value, heard.get(key))
        elif isinstance(recorded, list) and isinstance(heard, list):
            for one, other in zip(recorded, heard, strict=False):
                self.learn(one, other)

    async def write(self, text: str) -> None:
        """Write some text of lines, or of a part of one."""
        await self._stream.send(self.translated_text(text).encode())

    def translated_text(self, text: str) -> str:
        """Return a text with the ids that it mentions."""
        for recorded, told in self._ids.items():
            text = text.replace(recorded, told)
        return text

    def translated(self, value: Any) -> Any:
        if isinstance(value, dict):
            return {key: self.translated(item) for key, item in value.items()}
        if isinstance(value, list):
            return [self.translated(item) for item in value]
        return self._ids.get(value, value) if isinstance(value, str) else value


@asynccontextmanager
async def recorded_peer(
    api: object = None, *, middleware: Sequence[Any] = (), **options: Any
) -> AsyncIterator[tuple[RPCChannel, Recorded]]:
    """Open a channel that serves ``api``, and the peer that it talks to."""
    to_us, from_peer = anyio.create_memory_object_stream[bytes](1000)
    to_peer, from_us = anyio.create_memory_object_stream[bytes](1000)
    pipe = MemoryBytes(from_us, to_us)
    async with (
        pipe,
        ByteStreamTransport(MemoryBytes(from_peer, to_peer), **options) as transport,
        RPCChannel(transport, expose=api, timeout=CALL_BOUND, middleware=middleware) as channel,
    ):
        yield channel, Recorded(pipe)


def texts_in(name: str) -> dict[str, list[tuple[str, str]]]:
    """Return what was written in each case of a file over stdio: by whom, and the text, which is a
    line, several, or a part of one.
    """
    cases: dict[str, list[tuple[str, str]]] = {}
    for line in (VECTORS / f"{name}.jsonl").read_text().splitlines():
        vector = json.loads(line)
        case, fields = vector["case"], vector["fields"]
        if case.startswith("stdio:"):
            cases.setdefault(case.removeprefix("stdio: "), []).append(
                (fields["from"], fields["data"])
            )
    return cases


def cases_in(name: str) -> dict[str, list[tuple[str, Any]]]:
    """Return what was written in each case of a file: by whom, and the message without envelope."""
    cases: dict[str, list[tuple[str, Any]]] = {}
    for line in (VECTORS / f"{name}.jsonl").read_text().splitlines():
        vector = json.loads(line)
        if vector["case"].startswith("stdio:"):
            continue  # see `texts_in`
        message, sender = json.loads(vector["fields"]["data"]), vector["fields"].get("from")
        if "protocol" in message:
            message, sender = message["message"], message["from"]
        cases.setdefault(vector["case"], []).append((sender, message))
    return cases
