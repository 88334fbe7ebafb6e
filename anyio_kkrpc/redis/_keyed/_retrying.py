"""Dead letters that have a key are put back with it."""

from __future__ import annotations

from ..._exceptions import ProtocolError
from .._connection._command import Command
from .._group._dead_letters import RETRY_DEAD
from .._stream._keys import Keys
from ..dialects._keyed import CALL, Keyed, parse_keyed
from ._scripts import RETRY

__all__ = ("keyed_of", "retry_command")


def keyed_of(fields: tuple[bytes, ...]) -> Keyed | None:
    """Return what the fields of a request say of its key; ``None`` if it has none."""
    for name, value in zip(fields[4::2], fields[5::2], strict=False):
        if name == CALL:
            try:
                return parse_keyed(value)
            except ProtocolError:
                return None
    return None


def retry_command(keys: Keys, letter_id: str, fields: tuple[bytes, ...]) -> Command:
    """Return the command that puts a dead letter back.

    :param fields: of its request
    """
    keyed = keyed_of(fields)
    if keyed is None:
        return (b"EVAL", RETRY_DEAD, b"2", keys.stream, keys.dead, letter_id, *fields)
    key = keyed.key
    names = (keys.stream, keys.dead, keys.call(key), keys.progress(key))
    return RETRY.unknown(names, (letter_id, keyed.digest, *fields))
