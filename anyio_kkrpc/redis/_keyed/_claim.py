"""What has a call made, unless it is there."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from msgspec import UNSET, Struct

from ..._exceptions import ProtocolError
from ...abc import KeyedRequest
from ...records import Request
from .._connection._command import Argument, pack
from .._stream._keys import Keys
from ..dialects._base import check_size
from ..dialects._keyed import keyed_field
from ..dialects._signing import Signer
from ..dialects.native import NativeDialect
from ._kept import Sealer, pack_fields
from ._script import Script
from ._scripts import CLAIM, CLAIM_LATER

__all__ = ("Claim", "Claims")


class Claim(Struct):
    """What has a call made.

    :ivar again: ``1`` if that may have been done already
    """

    script: Script
    names: tuple[bytes, ...]
    head: tuple[bytes, ...]
    rest: tuple[bytes, ...]
    again: bytes = b"0"

    def command(self, *, known: bool = True) -> tuple[Argument, ...]:
        """Return the command.

        :param known: whether the server knows the script
        """
        make = self.script.known if known else self.script.unknown
        return make(self.names, (*self.head, self.again, *self.rest))

    def packed(self) -> bytes:
        """Return the command, packed, for a server that knows the script."""
        return pack(
            (
                *(b"EVALSHA", self.script.sha, b"%d" % len(self.names), *self.names),
                *(*self.head, self.again, *self.rest),
            )
        )


class Claims:
    """Makes them, for one peer.

    :param group: the one whose workers run the calls
    :param sealer: seals what is kept of a call that is to begin later
    :param signer: what signs entries, if anything does
    """

    def __init__(
        self,
        keys: Keys,
        group: bytes,
        session_id: str,
        native: NativeDialect,
        sealer: Sealer,
        signer: Signer | None,
        *,
        max_message_size: int,
        max_backlog: int | None,
    ) -> None:
        self._keys = keys
        self._session = session_id.encode()
        self._native = native
        self._sealer = sealer
        self._signer = signer
        self._max_size = max_message_size
        self._bounds = (group, b"" if max_backlog is None else b"%d" % max_backlog)

    def make(self, call: KeyedRequest, key: bytes, *, waits: bool) -> Claim:
        """Return what has a call made, unless it is there.

        :param waits: whether this peer waits for it
        :raises OverloadedError: if it is too large
        :raises TypeError: if it can't be encoded
        """
        digest, keys = call.digest.encode(), self._keys
        fields = self._fields(call, digest, key)
        names = (keys.stream, keys.call(key), keys.waits(key), keys.progress(key))
        head = (digest, self._session, b"1" if waits else b"0")
        if call.delay <= 0 and call.at is None:
            if self._signer is not None:
                fields = self._signer.sign(keys.stream, fields)
            return Claim(CLAIM, names, head, (*self._bounds, *fields))
        seconds = call.delay if call.at is None else call.at
        times = (b"%d" % round(seconds * 1000), b"%d" % (call.at is not None))
        sealed = self._sealer.seal(names[1], digest, pack_fields(fields))
        return Claim(CLAIM_LATER, (*names, keys.due), head, (*times, key, sealed))

    def metadata_of(self, fields: list[bytes]) -> Mapping[str, Any]:
        """Return what the request of an entry carries, nothing if that can't be read."""
        if not self._native.matches(fields):
            return {}
        try:
            record = self._native.codec_named(fields[2]).decode(fields[3])
        except ProtocolError:
            return {}
        meta = record.meta if isinstance(record, Request) else UNSET
        return {} if meta is UNSET else meta

    def _fields(self, call: KeyedRequest, digest: bytes, key: bytes) -> tuple[bytes, ...]:
        keep, keep_errors = round(call.keep * 1000) or 1, round(call.keep_errors * 1000)
        within = 0 if call.run_within is None else round(call.run_within * 1000) or 1
        field = keyed_field(digest, keep, keep_errors, within, key, call.bounds)
        fields = self._native.encode_keyed(call.request, field)
        check_size(len(fields[3]), self._max_size)
        return fields
