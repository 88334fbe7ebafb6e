"""Dead letters: requests that were given up, with what is known about them.

A letter holds the library's own fields and those of the request. The request may have fields of the
same names, so the last field, ``request``, tells which are its own: ``first count``, in pairs. The
library's are read by name. Letters of the version before have no such field: what is about the
letter is in the first six pairs, in its order, and the rest is the request's. A letter is written
so that that version can read it, too: ``docs/wire.md`` has the rule.
"""

from __future__ import annotations

from collections.abc import Callable

from msgspec import Struct

from ..._exceptions import KeyConflictError, ProtocolError
from .._connection._command import Command
from .._connection._link import Link
from .._connection._portion import Portion
from .._stream._entries import PAGE, after, pages
from ..dialects._signing import Signer

# What each letter tells, in the order in which it is written.
ABOUT = (b"id", b"group", b"reason", b"attempts", b"first", b"last")
# Tells which fields are the request's own.
_BOUNDARY = b"request"
# Entries of all dialects begin with one of these.
_BEGINNINGS = frozenset({b"from", b"data", b"sessionId"})
# Names and values of a request. A script can't pass on more than some 8,000 values: what has more
# is no request of any dialect, and is cut.
_MOST_VALUES = 6000
_MOST_ATTEMPTS = 2**63 - 1
# The end of the year 9999, in milliseconds.
_MOST_TIME = 253_402_300_799_999

# Adds a letter, for scripts; returns why Redis refused it, if it did.
WRITE_LETTER = (
    b"""
local function write_letter(key, id, group, deliveries, now, fields)
  local letter = {'id', id, 'group', group,
    'reason', 'delivered ' .. deliveries .. ' times without being finished',
    'attempts', deliveries, 'first', string.match(id, '^%%d+'), 'last', now}
  local count = math.min(#fields, %d)
  for i = 1, count do letter[12 + i] = fields[i] end
  letter[13 + count] = 'request'
  letter[14 + count] = string.format('6 %%d', count / 2)
  local added = redis.pcall('XADD', key, '*', unpack(letter))
  return type(added) == 'table' and added.err or nil
end
"""
    % _MOST_VALUES
)

RETRY_DEAD = b"""
if redis.replicate_commands then redis.replicate_commands() end
if #redis.call('XRANGE', KEYS[2], ARGV[1], ARGV[1]) == 0 then return false end
local new = redis.call('XADD', KEYS[1], '*', unpack(ARGV, 2))  -- first: it may be refused
redis.call('XDEL', KEYS[2], ARGV[1])
return new
"""


class DeadLetter(Struct, frozen=True):
    """A request that was delivered too often without being finished.

    :ivar id: its id among the dead letters, for `RedisStreamsTransport.retry_dead_letter`
    :ivar entry_id: the id it had in the stream
    :ivar group: the consumer group that gave it up
    :ivar reason: why, in words
    :ivar attempts: how often it was delivered
    :ivar first: when it was written, in seconds since the epoch on Redis' clock
    :ivar last: when it was given up, on the same clock
    :ivar fields: the original fields of the entry
    """

    id: str
    entry_id: str
    group: str
    reason: str
    attempts: int
    first: float
    last: float
    fields: dict[str, bytes]


def parse(letter_id: bytes, flat: list[bytes]) -> DeadLetter:
    """Return the letter that an entry holds.

    :raises ProtocolError: if it holds none
    """
    about, request = split(flat)
    fields = zip(request[::2], request[1::2], strict=True)
    return DeadLetter(
        letter_id.decode(),
        _text(about, b"id"),
        _text(about, b"group"),
        _text(about, b"reason"),
        _number(about, b"attempts", _MOST_ATTEMPTS),
        _number(about, b"first", _MOST_TIME) / 1000,
        _number(about, b"last", _MOST_TIME) / 1000,
        {name.decode(errors="backslashreplace"): value for name, value in fields},
    )


def split(flat: list[bytes]) -> tuple[dict[bytes, bytes], list[bytes]]:
    """Return what is about the letter, by name, and the fields of its request.

    :raises ProtocolError: if it isn't clear which are which, or something is missing
    """
    names, values = flat[::2], flat[1::2]
    start, end = _boundary(names, values)
    about: dict[bytes, bytes] = {}
    for index, name in enumerate(names):
        if not start <= index < end:
            about.setdefault(name, values[index])
    missing = [name.decode() for name in ABOUT if name not in about]
    if missing:
        raise ProtocolError(f"a dead letter without {', '.join(missing)}")
    return about, flat[2 * start : 2 * end]


def _boundary(names: list[bytes], values: list[bytes]) -> tuple[int, int]:
    """Return where the request's own fields begin and end, in pairs."""
    if names[-1] == _BOUNDARY:
        first, _, count = values[-1].partition(b" ")
        if first.isdigit() and count.isdigit() and len(values[-1]) < 20:
            start, end = int(first), int(first) + int(count)
            if end < len(names):
                return start, end
    if set(names[: len(ABOUT)]) == set(ABOUT):
        start = len(ABOUT)
        # A native entry begins with its sender: what stands before that isn't the request's.
        if b"from" in names[start:] and b"data" not in names[start:]:
            start = names.index(b"from", start)
        return start, len(names)
    for index, name in enumerate(names):
        if name in _BEGINNINGS:
            return index, len(names)
    raise ProtocolError("a dead letter without a request")


def _text(about: dict[bytes, bytes], name: bytes) -> str:
    return about[name].decode(errors="backslashreplace")


def _number(about: dict[bytes, bytes], name: bytes, most: int) -> int:
    value = about[name]
    number = int(value) if value.isdigit() and len(value) < 20 else -1
    if not 0 <= number <= most:
        raise ProtocolError(f"a dead letter whose {name.decode()} is {value[:40]!r}")
    return number


def _verify(signer: Signer, stream: bytes, about: dict[bytes, bytes], request: list[bytes]) -> None:
    """Refuse a letter whose request was not signed when it was written to the stream.

    :raises ProtocolError: if it is refused
    """
    written = about[b"id"]
    _number({b"id": written.partition(b"-")[0]}, b"id", _MOST_TIME)
    signer.verify(stream, written, request)


async def dead_letters(
    link: Link,
    stream: bytes,
    dead: bytes,
    count: int,
    signer: Signer | None,
    skipped: Callable[[bytes, ProtocolError], object],
) -> list[DeadLetter]:
    """Return the oldest dead letters.

    :param signer: checks their requests, if all are signed
    :param skipped: told of each entry that isn't one, and why
    """
    letters: list[DeadLetter] = []
    start, portion = b"-", Portion(PAGE)
    while len(letters) < count:
        page = pages(b"XRANGE", dead, start, b"+", most=count - len(letters))
        entries = await link.ask("dead letters", portion, page)
        for letter_id, flat in entries:
            try:
                if signer is not None:
                    _verify(signer, stream, *split(flat))
                letters.append(parse(letter_id, flat))
            except ProtocolError as exc:
                skipped(letter_id, exc)
        if not entries:
            break
        start = after(entries[-1][0])
    return letters


async def retry_dead_letter(
    link: Link,
    stream: bytes,
    dead: bytes,
    letter_id: str,
    signer: Signer | None,
    command: Callable[[str, tuple[bytes, ...]], Command],
) -> str | None:
    """Put a dead letter back into the stream; return its new id, ``None`` if there is none such.

    :param command: returns what does it, of the letter's id and the fields of its request
    :raises ProtocolError: if what is there isn't a dead letter, or its request isn't signed by one
        of us, where all are
    """
    entries = await link.request(b"XRANGE", dead, letter_id, letter_id)
    if not entries:
        return None
    about, request = split(entries[0][1])
    fields = tuple(request)
    if not fields:
        raise ProtocolError("a dead letter without a request")
    if len(fields) > _MOST_VALUES:
        raise ProtocolError(f"a dead letter whose request has {len(fields) // 2} fields")
    if signer is not None:
        # Else who can write to Redis, and has no key, would have it signed by who retries it.
        _verify(signer, stream, about, request)
        fields = signer.sign(stream, fields[:-2])
    new = await link.request(*command(letter_id, fields))
    if new == 0:
        raise KeyConflictError("another call has the key by now, or has had it")
    return None if new is None else new.decode()


async def purge_dead_letters(link: Link, dead: bytes) -> int:
    """Remove all dead letters; return how many."""
    return int(await link.request(b"XTRIM", dead, b"MAXLEN", b"0"))
