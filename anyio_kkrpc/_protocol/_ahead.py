"""Flow control for callbacks: how far those who call a function may be ahead of it.

Whoever passes functions says how many invocations of each may be on their way or wait for their
turn. Who calls such a function counts them, for each function of each request that runs. Now and
then an invocation asks to be told when it has run: once for each half of what may be ahead. So an
answer is on its way whenever nothing more may be sent.
"""

from __future__ import annotations

from typing import Any

from msgspec import UNSET

from ._budget import BUDGET
from ._errors import ProtocolError
from ._records import CallbackCall

# Invocations that may be ahead. A round trip for each half of them keeps up with a function that
# takes no less than a thirtieth of that time, and none is larger than what the budget allows.
WINDOW = 64
# Of another peer's number, since what is ahead is remembered here.
MAX_WINDOW = 10_000


class Ahead:
    """The invocations of one function that were sent, and are not known to have run.

    Their number is bounded, and so is what they weigh: `BUDGET`, beside the last one.

    :ivar id: chosen by this side
    :ivar owner: id of the peer that has the function
    :ivar results: whether its results can be asked for
    :ivar driver: the driver's object for it
    """

    __slots__ = (
        "_open",
        "_sent",
        "_unasked",
        "_unasked_weight",
        "_weight",
        "_window",
        "driver",
        "id",
        "owner",
        "results",
    )

    def __init__(self, ahead_id: str, owner: str | None, window: int) -> None:
        self.id: str = ahead_id
        self.owner: str | None = owner
        self.results: bool = False
        self.driver: Any = None
        self._window = min(max(window, 1), MAX_WINDOW)
        # What they weigh, by their numbers, which begin with 1.
        self._open: dict[int, int] = {}
        self._weight = 0
        self._sent = 0
        self._unasked = self._unasked_weight = 0

    @property
    def full(self) -> bool:
        """Whether nothing more may be sent."""
        return len(self._open) >= self._window or self._weight >= BUDGET

    def send(self, record: CallbackCall, weight: int) -> int:
        """Count an invocation that is about to be sent, and let it ask if it is time; return its
        number.

        :raises ProtocolError: if nothing more may be sent
        """
        if self.full:
            raise ProtocolError("more invocations of a callback than may be ahead")
        self._sent += 1
        self._open[self._sent] = weight
        self._weight += weight
        self._unasked += 1
        self._unasked_weight += weight
        if self._unasked * 2 >= self._window or self._unasked_weight * 2 >= BUDGET:
            self._unasked = self._unasked_weight = 0
            record.f, record.i = self.id, self._sent
        return self._sent

    def take_back(self, number: int, record: CallbackCall) -> None:
        """Note that an invocation was not sent after all."""
        weight = self._open.pop(number, None)
        if weight is None:
            return
        self._weight -= weight
        if record.i is not UNSET:
            self._unasked = self._window  # the next one asks in its place
        elif self._unasked:
            self._unasked -= 1
            self._unasked_weight = max(self._unasked_weight - weight, 0)

    def doubt(self) -> None:
        """Note that invocations that were sent, or word of them, may be lost: wait for none."""
        self._open.clear()
        self._weight = 0

    def ran(self, count: int) -> None:
        """Note that all up to this number have run.

        :raises ProtocolError: if so many were not sent
        """
        if count > self._sent:
            raise ProtocolError("more invocations of a callback ran than were sent")
        while self._open:
            number = next(iter(self._open))
            if number > count:
                break
            self._weight -= self._open.pop(number)
