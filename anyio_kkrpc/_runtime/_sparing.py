"""How often the same thing is logged."""

from __future__ import annotations

from msgspec import Struct

# So many lines in so many seconds; of the others the number is told.
MOST_LOGGED = 10
LOGGED_WITHIN = 10.0


class Sparing(Struct):
    """Lets `MOST_LOGGED` lines pass within `LOGGED_WITHIN` seconds, and counts the others.

    :ivar begun: when the first of these lines was
    """

    begun: float = float("-inf")
    logged: int = 0
    left_out: int = 0

    def admit(self, now: float, last: str) -> str | None:
        """Return what a line is to say of others, or ``None`` if it is left out.

        :param now: seconds
        :param last: what the last one says of those that follow
        """
        left_out = 0
        if now - self.begun >= LOGGED_WITHIN:
            left_out, self.begun, self.logged, self.left_out = self.left_out, now, 0, 0
        if self.logged == MOST_LOGGED:
            self.left_out += 1
            return None
        self.logged += 1
        if self.logged == MOST_LOGGED:
            return f"; further ones are {last}, for up to {LOGGED_WITHIN:.0f} s"
        return f"; {left_out} more before were not logged" if left_out else ""
