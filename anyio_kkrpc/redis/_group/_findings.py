"""What is to be done with what a script found: run, acknowledged, or answered; without any I/O."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from msgspec import Struct

from ..._exceptions import DeliveryError
from ..._wire_errors import library_error
from ...abc import Envelope
from ...records import Reply, Request
from ..dialects import Entry
from ..dialects._keyed import Keyed
from ._claims import Claims, Taken
from ._held import HeldEntry

__all__ = ("Died", "Findings", "sort_out")


class Died(Struct, frozen=True):
    """A request with a key that is a dead letter now.

    :ivar why: what who waits for it is told
    """

    entry_id: bytes
    keyed: Keyed
    why: str


class Findings(Struct):
    """What is to be done.

    :ivar regained: ids of what is held here already, and was delivered here once more
    :ivar taken: to be held and run, each with what it holds
    :ivar unreadable: ids of what can't be read, to be acknowledged
    :ivar answers: to the callers of what was given up
    :ivar died: what was given up and has a key
    """

    regained: list[bytes] = []
    taken: list[tuple[Taken, Entry]] = []
    unreadable: list[bytes] = []
    answers: list[Envelope] = []
    died: list[Died] = []


def sort_out(
    claims: Claims, held: Mapping[bytes, HeldEntry], decode: Callable[[Taken], Entry | None]
) -> Findings:
    """Return what is to be done with what was found.

    :param held: what this worker holds, by id
    :param decode: returns what an entry holds, ``None`` if it can't be read
    """
    found = Findings()
    for item in claims.taken:
        entry, known = decode(item), held.get(item.id)
        if known is not None and (entry is None or known.holds(entry.sender, entry.record)):
            found.regained.append(item.id)
        elif entry is None:
            found.unreadable.append(item.id)
        else:
            found.taken.append((item, entry))
    given_up = (
        (claims.dead, "it is a dead letter now"),
        (claims.kept, "it could not become a dead letter"),
    )
    for items, what_now in given_up:
        for item in items:
            entry = decode(item)
            why = f"the request was delivered {item.attempt} times without being finished; "
            if entry is not None and entry.keyed is not None:
                if items is claims.dead:
                    found.died.append(Died(item.id, entry.keyed, why + what_now))
                continue
            answer = _answer(entry, why + what_now)
            if answer is not None:
                found.answers.append(answer)
    return found


def _answer(entry: Entry | None, why: str) -> Envelope | None:
    """Return what tells the caller of a request that it won't be delivered again."""
    if entry is None or not isinstance(entry.record, Request) or entry.record.o is True:
        return None
    error = DeliveryError(why)
    return Envelope(Reply(entry.record.id, e=library_error(error)), None, entry.sender)
