"""What a transport writes: requests, replies with acknowledgements, controls."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

from redis.exceptions import RedisError

from .._exceptions import DeliveryError, OverloadedError
from .._protocol._records import Bye, Cancel, Record
from ..abc import Envelope
from ._connection import Connection
from ._connection import _pack as pack_command
from ._keys import Keys
from .dialects import Dialect

logger = logging.getLogger("anyio_kkrpc")

# Cancels are of interest for moments; older ones only take up memory.
_CONTROL_LENGTH = b"1000"
_CONTROL_TTL_MS = b"3600000"
# Peers whose key and codec are remembered.
_PEERS = 4096


class Writer:
    """Writes to one connection.

    :param returned: told of envelopes that could not be delivered
    """

    def __init__(
        self,
        connection: Connection,
        keys: Keys,
        dialect: Dialect,
        *,
        group: tuple[bytes, bytes] | None,
        max_message_size: int,
        no_mkstream: bool,
        returned: Callable[[Envelope], object],
    ) -> None:
        self._connection = connection
        self._keys = keys
        self._dialect = dialect
        self._max_size = max_message_size
        self._returned = returned
        self._no_mkstream = (b"NOMKSTREAM",) if no_mkstream else ()
        self._inboxes: OrderedDict[str, bytes] = OrderedDict()
        self._flavors: OrderedDict[str, Any] = OrderedDict()
        self._acknowledge: bytes | None = None
        if group is not None:
            stream, name = group
            # The id is appended to the constant head of the command.
            whole = pack_command((b"XACK", stream, name, b"0"))
            self._acknowledge = whole[: -len(b"$1\r\n0\r\n")]
        self.sent = 0
        self.undeliverable = 0

    def remember(self, peer: str, flavor: Any) -> None:
        """Note how answers to a peer are to be encoded."""
        flavors = self._flavors
        if peer not in flavors and len(flavors) >= _PEERS:
            flavors.popitem(last=False)
        flavors[peer] = flavor

    async def send(self, envelope: Envelope) -> None:
        """Write a record that isn't a reply to an entry of a group."""
        connection = self._connection
        connection.post(*self._command(envelope))
        await connection.flush()

    async def send_and_confirm(self, envelope: Envelope) -> None:
        """Write a record, and wait until Redis has it.

        :raises DeliveryError: if it doesn't take it, or the recipient isn't there
        """
        key, fields = self._entry(envelope)
        try:
            reply = await self._connection.request(*self._add(key, envelope), *fields)
        except Exception as exc:
            raise refusal(exc) from exc
        if reply is None:
            raise _gone(envelope)
        if key is self._keys.control:
            await self._connection.request(b"PEXPIRE", key, _CONTROL_TTL_MS)

    def settle(self, entry_id: bytes, reply: Envelope | None) -> None:
        """Queue the acknowledgement of an entry of the group behind its reply, for one write."""
        assert self._acknowledge is not None
        if reply is not None:
            self._connection.post(*self._command(reply))
        acknowledge = b"%s$%d\r\n%s\r\n" % (self._acknowledge, len(entry_id), entry_id)
        self._connection.post(acknowledge)

    async def flush(self) -> None:
        """Write what is queued."""
        await self._connection.flush()

    def _command(self, envelope: Envelope) -> tuple[bytes, int, Callable[[object], None] | None]:
        key, fields = self._entry(envelope)
        command = pack_command((*self._add(key, envelope), *fields))
        self.sent += 1

        def on_reply(reply: object) -> None:
            if reply is None:
                self._give_back(envelope, _gone(envelope))
            elif isinstance(reply, Exception):
                self._give_back(envelope, refusal(reply))

        if key is self._keys.control:
            command += pack_command((b"PEXPIRE", key, _CONTROL_TTL_MS))
            return command, 2, None
        return command, 1, on_reply

    def _entry(self, envelope: Envelope) -> tuple[bytes, tuple[bytes, ...]]:
        record, recipient = envelope.record, envelope.recipient
        flavor = None if recipient is None else self._flavors.get(recipient)
        fields = self._dialect.encode(record, flavor)
        size = len(fields[-1])
        if size > self._max_size:
            raise OverloadedError(
                f"a message of {size} bytes exceeds max_message_size ({self._max_size} bytes)"
            )
        return self._key(record, recipient), fields

    def _key(self, record: Record, recipient: str | None) -> bytes:
        if recipient is None:
            return self._keys.control if isinstance(record, (Cancel, Bye)) else self._keys.stream
        inboxes = self._inboxes
        key = inboxes.get(recipient)
        if key is None:
            if len(inboxes) >= _PEERS:
                inboxes.popitem(last=False)
            key = inboxes[recipient] = self._keys.inbox(recipient)
        return key

    def _add(self, key: bytes, envelope: Envelope) -> tuple[bytes, ...]:
        if key is self._keys.control:
            return (b"XADD", key, b"MAXLEN", b"~", _CONTROL_LENGTH, b"*")
        if envelope.recipient is not None:
            # A peer that has gone has no inbox, and must not get one back.
            return (b"XADD", key, *self._no_mkstream, b"*")
        return (b"XADD", key, b"*")

    def _give_back(self, envelope: Envelope, error: Exception) -> None:
        self.undeliverable += 1
        self._returned(Envelope(envelope.record, None, envelope.recipient, error=error))


def refusal(exc: Exception) -> Exception:
    """Return the error for an entry that Redis did not take."""
    if not isinstance(exc, RedisError):
        return exc
    error = DeliveryError(f"Redis refused the message: {exc}")
    error.__cause__ = exc
    return error


def _gone(envelope: Envelope) -> DeliveryError:
    return DeliveryError(f"peer {envelope.recipient!r} is not there: it has no inbox")
