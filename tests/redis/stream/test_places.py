"""Where shards are, and what belongs to which: all peers find the same, and little moves."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anyio_kkrpc.redis._stream._keys import Keys, hash_slot, stream_of
from anyio_kkrpc.redis._stream._places import (
    MOST_SHARDS,
    address_in,
    check_name,
    home_of,
    name_of_shard,
    shard_of,
    shard_of_key,
    stream_of_shard,
)

SLOTS = 16384
NAMES = st.text("abc:/.-é0", min_size=1, max_size=20)
SHARDS = st.integers(1, 64)


@given(NAMES, st.booleans(), st.integers(0, MOST_SHARDS - 1))
def test_names(name: str, tagged: bool, shard: int) -> None:
    """Shard 0 is the stream itself; the keys of each are in one slot, and tell whose they are."""
    stream = f"{{{name}}}rest" if tagged else name
    check_name(stream)
    own = name_of_shard(stream, shard)
    assert (own == stream) == (shard == 0)
    keys = Keys.of(own)
    assert {hash_slot(keys.inbox("x")), hash_slot(keys.dead)} == {hash_slot(own.encode())}
    if not tagged:
        assert stream_of(keys.control.decode().removesuffix(":control")) == own
    assert own.startswith(f"{{{name}" if tagged else name)


@settings(max_examples=2)
@given(NAMES)
def test_places(name: str) -> None:
    """So many shards as a power of two fall into as many equal parts, and nearly so into three."""
    slots = [hash_slot(name_of_shard(name, shard).encode()) for shard in range(64)]
    for count in (1, 2, 4, 8, 16, 32, 64):
        assert len({slot * count // SLOTS for slot in slots[:count]}) == count
    for count in (4, 8, 16, 32, 64):
        shares = Counter(slot * 3 // SLOTS for slot in slots[:count])
        assert len(shares) == 3
        assert max(shares.values()) - min(shares.values()) <= 2


@pytest.mark.parametrize("name", ["a}b", "a{}b", "{}a", "a{b}c", "{a}b}", "{a}{b}", "{a"])
def test_names_with_braces(name: str) -> None:
    with pytest.raises(ValueError, match="stream: with shards, a name has no braces"):
        check_name(name)


@settings(max_examples=40)
@given(st.text(max_size=40), SHARDS)
def test_keys_move_to_new_shards_only(key: str, shards: int) -> None:
    """What moves when there are more shards, moves to one of the new ones."""
    path = [shard_of_key(key, count) for count in range(1, shards + 1)]
    assert path[0] == 0
    for count, (before, after) in enumerate(pairwise(path), 1):
        assert after in (before, count)


@pytest.mark.parametrize("shards", [2, 3, 7, 64])
def test_keys_are_spread_evenly(shards: int) -> None:
    """Within 10 % for any number of shards up to 64."""
    found = Counter(shard_of_key(f"user-{number}", shards) for number in range(2500 * shards))
    assert 0.9 * 2500 < min(found.values()) <= max(found.values()) < 1.1 * 2500
    assert len(found) == shards


@pytest.mark.parametrize("turn", [0, 1, 2])
def test_homes_are_spread_evenly(turn: int) -> None:
    """Also those of the peers whose first one is away."""
    found = Counter(home_of(f"session{number:x}", 8, turn) for number in range(12000))
    assert 0.9 * 1500 < min(found.values()) <= max(found.values()) < 1.1 * 1500


@pytest.mark.parametrize("shards", [1, 3, 32])
def test_half_of_the_keys_moves_when_shards_double(shards: int) -> None:
    keys = [f"user-{number}" for number in range(4000)]
    moved = sum(shard_of_key(key, shards) != shard_of_key(key, 2 * shards) for key in keys)
    assert 0.47 * len(keys) < moved < 0.53 * len(keys)


def test_peers_agree() -> None:
    """Another process, with another hash seed, finds the same; so it was, and so it stays."""
    program = (
        "from anyio_kkrpc.redis._stream._places import *\n"
        "print(shard_of_key('user-7', 16), home_of('abc', 16), home_of('abc', 16, 1),"
        " name_of_shard('jobs', 5), name_of_shard('{shop}jobs', 1))"
    )
    found = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert found.stdout.split() == ["6", "7", "4", "jobs/5.440", "{shop/1.263}jobs"]


@given(st.text("ab@07", min_size=1, max_size=12), st.integers(0, MOST_SHARDS - 1))
def test_addresses(session_id: str, shard: int) -> None:
    """An address tells its shard; what tells none that there is, is in shard 0."""
    if shard_of(session_id, MOST_SHARDS):
        return  # no peer of a stream with shards is called so
    address = address_in(session_id, shard)
    assert shard_of(address, MOST_SHARDS) == shard
    assert shard_of(address, max(shard, 1)) == 0
    assert (address == session_id) == (shard == 0)


@pytest.mark.parametrize(
    "address", ["a@00", "a@03", "a@-1", "a@٣", "a@1000", "@", "3", "a@", "a@ 3"]
)
def test_no_addresses(address: str) -> None:
    assert shard_of(address, MOST_SHARDS) == 0


@settings(max_examples=20)
@given(st.text(min_size=1, max_size=30), SHARDS)
def test_homes(session_id: str, shards: int) -> None:
    """Each turn leads to another shard, until there is none left."""
    homes = [home_of(session_id, shards, turn) for turn in range(shards)]
    assert sorted(homes) == list(range(shards))


@pytest.mark.parametrize("stream", ["jobs", "{shop}jobs", "{shop}", "a/1.2", "jobs/7"])
@pytest.mark.parametrize("shard", [0, 1, 7, 100, MOST_SHARDS - 1])
def test_names_tell_of_their_stream(stream: str, shard: int) -> None:
    assert stream_of_shard(name_of_shard(stream, shard)) == (stream, shard)


@pytest.mark.parametrize(
    "name", ["jobs/1.255", "jobs/01.254", "jobs/256.1", "jobs/1", "/1.2", "jobs/1.254x", "a{b/1.3"]
)
def test_names_of_no_shard(name: str) -> None:
    """They look like one, and are another stream's."""
    assert stream_of_shard(name) == (name, 0)
