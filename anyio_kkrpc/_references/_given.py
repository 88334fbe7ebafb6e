"""What this side has given by reference: to whom, how often, and until when. No I/O.

A reference is of one object and one peer: another peer that knows its id doesn't get the object.
The same object keeps its id for a peer until that peer has released it as often as it was given, so
that a release which crosses a giving ends nothing too much.

What a call passes is another matter: it isn't known who will run it, nor whether it runs once, nor
whether who has it has looked at its arguments. It is there for whoever runs the call, `Passing`, as
long as that waits for its answer. Then it is of those who have used it, or have answered.
"""

from __future__ import annotations

import secrets
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any, TypeAlias

from .._exceptions import OverloadedError

# References that one peer may hold, and that all calls which wait may pass together.
MAX_HELD = 10_000
# Released ids that are remembered, as at kkrpc.
_MAX_RELEASED = 1024

Peer: TypeAlias = "str | None"
# Of who isn't known yet: no peer has such an id.
ANYBODY = "\x00"


class UnknownReferenceError(LookupError):
    """There is no such reference, or not for this peer."""


class ReleasedReferenceError(UnknownReferenceError):
    """It was there, and was released."""


class Referent:
    """An object that others hold or may get.

    :ivar known: what was found out about it, as long as it is here: that refers to the object
    """

    __slots__ = ("known", "value")

    def __init__(self, value: Any) -> None:
        self.value: Any = value
        self.known: dict[str, Any] = {}


class Given:
    """An object that one peer holds.

    :ivar key: what tells it from others
    :ivar times: how often it was given and not released
    """

    __slots__ = ("id", "key", "peer", "referent", "times")

    def __init__(self, reference_id: str, referent: Referent, peer: Peer, key: Hashable) -> None:
        self.id: str = reference_id
        self.referent: Referent = referent
        self.peer: Peer = peer
        self.key: Hashable = key
        self.times: int = 0


class Passed:
    """An object that a call passes.

    :ivar times: how often it is among the arguments
    :ivar users: those who run the call and have used it, and whether they have it still
    """

    __slots__ = ("id", "passing", "referent", "times", "users")

    def __init__(self, reference_id: str, referent: Referent, passing: Passing) -> None:
        self.id: str = reference_id
        self.referent: Referent = referent
        self.passing: Passing = passing
        self.times: int = 0
        self.users: dict[Peer, bool] = {}

    def is_for(self, peer: Peer) -> bool:
        """Whether a peer may use it."""
        return self.passing.to in (ANYBODY, peer)


class Passing:
    """What one call passes.

    :ivar to: who may use it
    :ivar objects: by what tells them from others
    """

    __slots__ = ("objects", "to")

    def __init__(self, to: Peer) -> None:
        self.to: Peer = to
        self.objects: dict[Hashable, Passed] = {}


class GivenTable:
    """The objects that other peers hold.

    :param prefix: what their ids begin with; the rest can't be guessed
    :param key_of: returns what tells an object from others
    :param most: that one peer may hold, and that may be passed
    """

    def __init__(
        self,
        prefix: str = "",
        *,
        key_of: Callable[[Any], Hashable] = id,
        most: int = MAX_HELD,
    ) -> None:
        self._new_id: Callable[[], str] = lambda: prefix + secrets.token_urlsafe(18)
        self._key_of = key_of
        self._most = most
        self._by_peer: dict[Peer, dict[str, Given]] = {}
        # Those that keep their id when they are given once more.
        self._same: dict[tuple[Peer, Hashable], Given] = {}
        self._passed: dict[str, Passed] = {}
        self._released: OrderedDict[tuple[Peer, str], None] = OrderedDict()

    def __len__(self) -> int:
        return sum(map(len, self._by_peer.values())) + len(self._passed)

    def held_by(self, peer: Peer) -> int:
        """Return how many a peer holds."""
        return len(self._by_peer.get(peer, ()))

    def find(self, reference_id: str, peer: Peer) -> Referent:
        """Return the object that a peer means.

        :raises ReleasedReferenceError: if that peer has released it
        :raises UnknownReferenceError: if it has none such
        """
        given = self._entry(reference_id, peer)
        if given is not None:
            return given.referent
        passed = self._passed.get(reference_id)
        if passed is not None and passed.is_for(peer):
            return passed.referent
        if (peer, reference_id) in self._released:
            raise ReleasedReferenceError(reference_id)
        raise UnknownReferenceError(reference_id)

    def use(self, reference_id: str, peer: Peer) -> Referent:
        """Return the object that a peer uses, see `find`, and note that it has it."""
        referent = self.find(reference_id, peer)
        passed = self._passed.get(reference_id)
        if passed is not None:
            passed.users[peer] = True
        return referent

    # Given to a peer

    def give(self, value: Any, peer: Peer) -> Given:
        """Note that an object is about to be sent to a peer; `take_back` if it isn't.

        :raises OverloadedError: if that peer holds too many
        """
        key = self._key_of(value)
        given = self._same.get((peer, key))
        if given is None:
            if self.held_by(peer) >= self._most:
                raise OverloadedError(f"a peer holds {self._most} references, and gets no more")
            given = Given(self._new_id(), Referent(value), peer, key)
            self._same[peer, key] = given
            self._by_peer.setdefault(peer, {})[given.id] = given
        given.times += 1
        return given

    def take_back(self, reference_id: str, peer: Peer) -> None:
        """Note that what was given wasn't sent, once."""
        given = self._entry(reference_id, peer)
        if given is not None:
            self._end(given, 1)

    def release(self, reference_id: str, peer: Peer, times: int | None = None) -> bool:
        """Note that a peer needs it no more.

        :param times: how often it was given so far; all, if not told, as at kkrpc
        :return: whether that was the end of it
        """
        given = self._entry(reference_id, peer)
        if given is not None:
            return self._end(given, given.times if times is None else times)
        passed = self._passed.get(reference_id)
        if passed is not None and passed.is_for(peer):
            passed.users[peer] = False
        return False

    # Passed by a call

    def pass_on(self, passing: Passing, value: Any) -> Passed:
        """Note that a call passes an object, until `end`.

        :raises OverloadedError: if calls pass too many already
        """
        key = self._key_of(value)
        passed = passing.objects.get(key)
        if passed is None:
            if len(self._passed) >= self._most:
                why = f"calls that wait for their answer pass {self._most} references already"
                raise OverloadedError(why)
            passed = Passed(self._new_id(), Referent(value), passing)
            passing.objects[key] = self._passed[passed.id] = passed
        passed.times += 1
        return passed

    def answered(self, passing: Passing, peer: Peer) -> None:
        """Note that a peer has answered a call: it has what that passed, unless released."""
        for passed in passing.objects.values():
            passed.users.setdefault(peer, True)

    def end(self, passing: Passing) -> set[Peer]:
        """Note that a call is over; return who has something of it.

        What is too much for one peer, it doesn't have.
        """
        holders: set[Peer] = set()
        for key, passed in passing.objects.items():
            if self._passed.pop(passed.id, None) is None:
                continue
            for peer, has_it in passed.users.items():
                if has_it and self.held_by(peer) < self._most:
                    given = Given(passed.id, passed.referent, peer, key)
                    given.times = passed.times
                    self._by_peer.setdefault(peer, {})[given.id] = given
                    holders.add(peer)
        return holders

    # The end

    def lose_peer(self, peer: Peer) -> list[Any]:
        """Forget what a peer held that is gone; return the objects."""
        lost = list(self._by_peer.pop(peer, {}).values())
        for given in lost:
            self._same.pop((peer, given.key), None)
        for passed in self._passed.values():
            passed.users.pop(peer, None)
        return [given.referent.value for given in lost]

    def lose(self) -> list[Any]:
        """Forget all; return the objects."""
        lost = [value for peer in [*self._by_peer] for value in self.lose_peer(peer)]
        lost += [passed.referent.value for passed in self._passed.values()]
        self._passed.clear()
        self._released.clear()
        return lost

    def _entry(self, reference_id: str, peer: Peer) -> Given | None:
        of_peer = self._by_peer.get(peer)
        return None if of_peer is None else of_peer.get(reference_id)

    def _end(self, given: Given, times: int) -> bool:
        given.times -= min(max(times, 0), given.times)
        if given.times:
            return False
        peer, key = given.peer, (given.peer, given.key)
        of_peer = self._by_peer[peer]
        del of_peer[given.id]
        if not of_peer:
            del self._by_peer[peer]
        if self._same.get(key) is given:
            del self._same[key]
        self._released[peer, given.id] = None
        if len(self._released) > _MAX_RELEASED:
            self._released.popitem(last=False)
        return True
