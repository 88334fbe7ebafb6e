"""How long to wait, and what to say, while Redis refuses something that it may take later."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Iterable
from random import uniform
from typing import TypeVar

from anyio import current_time, sleep

from ..._exceptions import RPCError
from ._errors import Meaning, RedisError, code_of, meaning_of, reason
from ._target import Target

logger = logging.getLogger("anyio_kkrpc")

T = TypeVar("T")

# Seconds of the first and of the longest pause between two attempts, at most (full jitter).
FIRST_PAUSE = 0.02
LONGEST_PAUSE = 1.0
_MOST_DOUBLINGS = 16
# The same while a slot of a Cluster moves, which is over soon.
MOVING_PAUSE = 0.1
# Seconds that a right which was taken away, or a login which isn't known yet, may take to come.
HEALING = 10.0


def jittered(failures: int, longest: float = LONGEST_PAUSE) -> float:
    """Return the seconds to wait after so many failures: at most twice as many as after one less.

    Any time up to that may be it, so that those who fail together don't try again together.

    :param longest: seconds
    """
    # An outage of days has more failures than a float has powers of two.
    doubled = FIRST_PAUSE * 2 ** min(failures, _MOST_DOUBLINGS)
    return uniform(0, min(longest, doubled))


class Outages:
    """What one server refuses for now, to all parts of a transport: said when it begins and ends.

    :ivar refused: how many commands it refused
    """

    def __init__(self, target: Target) -> None:
        self._target = target
        self._parts: set[str] = set()
        self._said: set[str] = set()
        self._left_out: set[str] = set()
        self._since = 0.0
        self.refused = 0

    def begin(self, part: str, exc: Exception) -> None:
        """Note that a part was refused something, and will try it again."""
        self.refused += 1
        code = code_of(exc)
        if not self._parts:
            self._since = current_time()
        self._parts.add(part)
        if code not in self._said:
            self._said.add(code)
            logger.warning(
                "%s refuses %s for now: %s; it is tried again", self._target, part, reason(exc)
            )

    def leave_out(self, part: str, exc: Exception) -> None:
        """Note that a part was refused something, and won't try it again."""
        self.refused += 1
        if part not in self._left_out:
            self._left_out.add(part)
            logger.warning("%s refuses %s: %s; left out", self._target, part, reason(exc))

    def end(self, part: str) -> None:
        """Note that a part's command was taken, or is given up."""
        self._left_out.discard(part)
        self._parts.discard(part)
        if not self._parts and self._said:
            self._said.clear()
            logger.warning(
                "%s takes all commands again, after %.1f seconds",
                self._target,
                current_time() - self._since,
            )


class Patience:
    """What one part of a transport does about errors of Redis: pause and try again, or give up.

    :param part: what is refused, in words
    :param outages: of all parts
    :param heals: what is waited for, up to `HEALING` seconds, though nobody knows that it comes: a
        login, or a right. One that was there before is always waited for.
    :param spare: whether the part can be left out: what Redis refuses for good is tried again too
    :ivar refusal: what is tried again was refused with this error, ``None`` if nothing is
    :ivar calm: whether the last attempt worked, or there was none and a right is waited for
    """

    def __init__(
        self,
        part: str,
        outages: Outages,
        *,
        heals: Iterable[Meaning] = (Meaning.RIGHTS,),
        spare: bool = False,
    ) -> None:
        self._part = part
        self._outages = outages
        self._heals = set(heals)
        self._spare = spare
        self._failures = 0
        self._ill_since: float | None = None
        self.refusal: Exception | None = None
        self.calm = Meaning.RIGHTS in self._heals

    def pause(self, exc: Exception) -> float:
        """Return the seconds to wait before trying again; what is of no use to try is raised."""
        meaning = meaning_of(exc)
        if meaning in (Meaning.RIGHTS, Meaning.LOGIN):
            now = current_time()
            if self._ill_since is None:
                self._ill_since = now
            if meaning not in self._heals or now - self._ill_since >= HEALING:
                raise exc
        else:
            self._ill_since = None
            again = meaning.passes or meaning is Meaning.GONE
            if not again and not (self._spare and meaning is Meaning.REFUSED):
                raise exc
        self.calm = False
        self.refusal = exc
        self._failures += 1
        if meaning is not Meaning.GONE:  # whoever makes it again says so
            self._outages.begin(self._part, exc)
        longest = MOVING_PAUSE if meaning is Meaning.MOVING else LONGEST_PAUSE
        return jittered(self._failures, longest)

    def worked(self) -> None:
        """Note that an attempt worked. Needed after those only that `calm` isn't set for."""
        self._heals.add(Meaning.RIGHTS)
        self.calm = True
        self.leave()

    def leave(self) -> None:
        """Note that nothing is tried any more."""
        self._failures = 0
        self._ill_since = self.refusal = None
        self._outages.end(self._part)


async def persist(patience: Patience, attempt: Callable[[], Awaitable[T]]) -> T:
    """Make an attempt again as long as the server refuses it for now; other errors are raised."""
    while True:
        try:
            result = await attempt()
        except (RPCError, RedisError) as exc:
            if meaning_of(exc) is Meaning.GONE:
                raise
            await sleep(patience.pause(exc))
        else:
            patience.worked()
            return result
