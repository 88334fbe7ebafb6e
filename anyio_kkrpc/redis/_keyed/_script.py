"""Scripts that run by EVALSHA, or by EVAL where the server doesn't know them yet."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from functools import cached_property
from typing import Any

from anyio import sleep

from .._connection._command import Argument, pack
from .._connection._errors import Meaning, RedisError, code_of, meaning_of
from .._connection._link import Link
from .._connection._patience import LONGEST_PAUSE, MOVING_PAUSE, jittered

__all__ = ("Script", "ask_patiently", "is_unknown", "run_script")

# Seconds of the longest pause before what is refused for now is asked again.
_PAUSES = {
    Meaning.MOVING: MOVING_PAUSE,
    Meaning.PASSING: LONGEST_PAUSE,
    Meaning.FULL: LONGEST_PAUSE,
}


class Script:
    """A script, with what EVALSHA knows it by.

    :ivar source: its text
    """

    def __init__(self, source: bytes) -> None:
        self.source = source

    @cached_property
    def sha(self) -> bytes:
        """What EVALSHA knows it by."""
        from hashlib import sha1  # loads OpenSSL's hash functions, which few need

        return sha1(self.source, usedforsecurity=False).hexdigest().encode()

    def known(self, keys: Sequence[bytes], args: Sequence[Argument]) -> tuple[Argument, ...]:
        """Return the command that runs it where it has run before."""
        return (b"EVALSHA", self.sha, b"%d" % len(keys), *keys, *args)

    def unknown(self, keys: Sequence[bytes], args: Sequence[Argument]) -> tuple[Argument, ...]:
        """Return the command that runs it anywhere."""
        return (b"EVAL", self.source, b"%d" % len(keys), *keys, *args)

    def packed(self, keys: Sequence[bytes], args: Sequence[Argument], *, known: bool) -> bytes:
        """Return one of the two, packed."""
        return pack((self.known if known else self.unknown)(keys, args))


def is_unknown(reply: Any) -> bool:
    """Whether the server doesn't know the script."""
    return isinstance(reply, RedisError) and code_of(reply) == "NOSCRIPT"


async def run_script(link: Link, script: Script, keys: Sequence[bytes], *args: Argument) -> Any:
    """Run a script that may be repeated; return its reply."""
    try:
        return await link.request(*script.known(keys, args))
    except RedisError as exc:
        if not is_unknown(exc):
            raise
        return await link.request(*script.unknown(keys, args))


async def ask_patiently(
    ask: Callable[[], Awaitable[Any]],
    refusal: Callable[[Exception], Exception],
    *,
    needs_memory: bool = False,
) -> Any:
    """Ask Redis. What it refuses for now, as while a slot moves, is asked again after a pause.

    :param refusal: returns what is raised for the rest
    :param needs_memory: whether it is asked again, too, while Redis is out of memory, since
        somebody waits for it
    """
    failures = 0
    while True:
        try:
            return await ask()
        except RedisError as exc:
            meaning = meaning_of(exc)
            if meaning not in _PAUSES or (meaning is Meaning.FULL and not needs_memory):
                raise refusal(exc) from exc
        failures += 1
        await sleep(jittered(failures, _PAUSES[meaning]))
