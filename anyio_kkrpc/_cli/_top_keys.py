"""The calls with keys that ``top`` shows: which workers have, and how many are to begin later."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import redis

from .._exceptions import ProtocolError
from ..redis._stream._keys import DELAYED, HANDED_BACK, Keys
from ..redis.dialects._keyed import parse_keyed
from ._top_look import KeyedCall, StreamLook

__all__ = ("look_for_keys",)

# Requests of a group that are looked at: those that were written first.
_MOST = 20
# What a request says of its key, without the rest of it, which may be long.
_SCRIPT = """
local found = {}
for i, id in ipairs(ARGV) do
  local entry = redis.call('XRANGE', KEYS[1], id, id)[1]
  found[i] = ''
  for j = 1, entry and #entry[2] or 0, 2 do
    if entry[2][j] == 'call' then found[i] = entry[2][j + 1] end
  end
end
return found
"""


def look_for_keys(client: redis.Redis, streams: Iterable[StreamLook]) -> None:
    """Add what is known of calls with keys; nothing, where this user may not ask for it."""
    with client.pipeline(transaction=False) as pipe:
        looks = [stream for stream in streams if stream.groups]
        for stream in looks:
            pipe.zcard(Keys.of(stream.name).due)
        held = [(stream, group) for stream in looks for group in stream.groups if group.running]
        for stream, group in held:
            pipe.xpending_range(stream.name, group.name, "-", "+", _MOST)
        answers = pipe.execute(raise_on_error=False) if looks else []
        for stream, due in zip(looks, answers, strict=False):
            stream.delayed = due if isinstance(due, int) else 0
        asked = []
        for (stream, group), found in zip(held, answers[len(looks) :], strict=True):
            taken = [] if isinstance(found, Exception) else [one for one in found if _is_run(one)]
            if taken:
                asked.append((group, taken))
                pipe.eval_ro(_SCRIPT, 1, stream.name, *(one["message_id"] for one in taken))
        told = pipe.execute(raise_on_error=False) if asked else []
    for (group, taken), keys in zip(asked, told, strict=True):
        if not isinstance(keys, Exception):
            group.keyed = [*_calls(taken, keys)]


def _is_run(held: dict[str, Any]) -> bool:
    return held["consumer"] not in (HANDED_BACK, DELAYED)


def _calls(taken: list[dict[str, Any]], keys: list[bytes]) -> Iterator[KeyedCall]:
    for held, field in zip(taken, keys, strict=True):
        try:
            key = parse_keyed(field).name if field else None
        except ProtocolError:
            continue
        if key is not None:
            worker = held["consumer"].decode(errors="replace")
            idle, attempt = held["time_since_delivered"] / 1000, held["times_delivered"]
            yield KeyedCall(key, worker, idle, attempt)
