"""Where the shards of a stream are, and which of them a key, a peer or an address belongs to.

All peers find the same by themselves, without asking anybody: names depend on the stream and the
shard's number alone, so that more shards rename none.
"""

from __future__ import annotations

import re
from binascii import crc32
from functools import lru_cache
from itertools import count

from ._keys import hash_slot

__all__ = (
    "MOST_SHARDS",
    "address_in",
    "check_name",
    "home_of",
    "homes_of",
    "name_of_shard",
    "parse_shard",
    "shard_of",
    "shard_of_key",
    "stream_of_shard",
)

# How many shards a stream has at most.
MOST_SHARDS = 256
_BITS = MOST_SHARDS.bit_length() - 1
# Slots that a shard's name may be in: so many that it is found soon, and no more than there are for
# each of the most shards.
_WIDTH = 16384 // MOST_SHARDS
_MASK = (1 << 64) - 1
_NAME = re.compile(r"(\{?)(.+)/([1-9][0-9]{0,2})\.[0-9]{1,9}((?:\}.*)?)", re.DOTALL)


def check_name(stream: str) -> None:
    """Refuse the name of a stream that has no room for the number of a shard.

    :raises ValueError: if it has braces which are no hash tag
    """
    before, brace, rest = stream.partition("{")
    tag, end, after = rest.partition("}")
    tagged = brace and not before and tag and end and not set("{}") & {*tag, *after}
    if not tagged and set("{}") & {*stream}:
        raise ValueError(
            "stream: with shards, a name has no braces but those of a hash tag at its beginning, "
            f"not {stream!r}"
        )


@lru_cache(maxsize=4 * MOST_SHARDS)
def name_of_shard(stream: str, shard: int) -> str:
    """Return the name of the stream that a shard is; shard 0 is the stream itself.

    The first two shards are half of all slots apart, the first four a quarter, and so on: so they
    are spread evenly over the masters of a Cluster whose number is a power of two, and over others
    but for one, however many shards there are. `jobs` has `jobs/1.37`, and `{shop}jobs`
    `{shop/1.37}jobs`; the number behind the dot makes it be in the right place.
    """
    if not shard:
        return stream
    tag, brace, rest = stream.removeprefix("{").partition("}")
    begin = "{" if brace else ""
    first = hash_slot(stream.encode()) // _WIDTH
    place = (first + _reversed(shard)) % MOST_SHARDS
    for number in count():
        name = f"{begin}{tag}/{shard}.{number}{brace}{rest}"
        if hash_slot(name.encode()) // _WIDTH == place:
            return name
    raise AssertionError  # pragma: no cover  # it is found among the first thousands


def stream_of_shard(name: str) -> tuple[str, int]:
    """Return the stream that a shard with a name belongs to, and its number."""
    found = _NAME.fullmatch(name)
    if found is not None and int(found[3]) < MOST_SHARDS:
        stream, shard = found[1] + found[2] + found[4], int(found[3])
        if name_of_shard(stream, shard) == name:
            return stream, shard
    return name, 0


def _reversed(shard: int) -> int:
    """Return where a shard is among `MOST_SHARDS`: its bits in reverse."""
    return int(f"{shard:0{_BITS}b}"[::-1], 2)


def shard_of_key(key: str, shards: int) -> int:
    """Return the shard of what has a key: by jump hash, so twice as many shards take over half."""
    return _jump(_mixed(key.encode(errors="surrogatepass")), shards)


def home_of(session_id: str, shards: int, turn: int = 0) -> int:
    """Return the shard in which a peer is at home.

    :param turn: 0 for the first choice, 1 for the one if that is away, and so on
    """
    return homes_of(session_id, shards)[turn] if turn else shard_of_key(session_id, shards)


def homes_of(session_id: str, shards: int) -> list[int]:
    """Return all shards, in the order in which a peer is at home in them, should some be away."""
    first = shard_of_key(session_id, shards)
    others = [shard for shard in range(shards) if shard != first]
    # Those who were at home in one shard don't all go to the same.
    start = shard_of_key(f"{session_id} ", len(others)) if others else 0
    return [first, *others[start:], *others[:start]]


def _mixed(data: bytes) -> int:
    """Return 64 bits in which each bit of a checksum matters (splitmix64)."""
    bits = ((crc32(data, len(data)) << 32 | crc32(data)) + 0x9E3779B97F4A7C15) & _MASK
    bits = ((bits ^ bits >> 30) * 0xBF58476D1CE4E5B9) & _MASK
    bits = ((bits ^ bits >> 27) * 0x94D049BB133111EB) & _MASK
    return bits ^ bits >> 31


def _jump(bits: int, buckets: int) -> int:
    """Return one of so many: jump consistent hash, of Lamping and Veach."""
    found, following = -1, 0
    while following < buckets:
        found = following
        bits = (bits * 2862933555777941757 + 1) & _MASK
        following = int((found + 1) * ((1 << 31) / ((bits >> 33) + 1)))
    return found


def address_in(session_id: str, shard: int) -> str:
    """Return what a peer is called in a shard: what others give as `to`."""
    return f"{session_id}@{shard}" if shard else session_id


def parse_shard(text: str, shards: int) -> int | None:
    """Return the shard that a text of the user's names, or None if there is none of that number."""
    if not (text.isascii() and text.isdecimal() and len(text) <= len(str(MOST_SHARDS))):
        return None
    return int(text) if int(text) < shards else None


def shard_of(address: str, shards: int) -> int:
    """Return the shard that an address is in; what names none that there is, is in shard 0."""
    number = address.rpartition("@")[2]
    if number.isdecimal() and number.isascii() and number != address and len(number) <= 3:
        shard = int(number)
        if shard < shards and not number.startswith("0"):
            return shard
    return 0
