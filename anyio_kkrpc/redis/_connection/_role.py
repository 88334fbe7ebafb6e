"""What a server says that it is: the reply of ROLE. No I/O."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypeAlias

# Host and port.
Node: TypeAlias = tuple[str, int]
# Returns the longest silence of a connection, in seconds, as the role of its server wants it.
Silence: TypeAlias = Callable[["Role | None"], float]

# Seconds that a server may be silent at most where others have a copy of what it has.
_SILENCE = 1.0
# Of a number in a reply.
_MOST_DIGITS = 20


class Role(NamedTuple):
    """What a server is among those that copy one another.

    :ivar name: ``"master"``, ``"slave"`` of a replica, as Redis calls it, or ``"sentinel"``
    :ivar replicas: how many copy it
    :ivar master: of a replica: host and port of what it copies
    :ivar nodes: host and port of what copies it, as it knows them
    """

    name: str
    replicas: int = 0
    master: tuple[str, int] | None = None
    nodes: tuple[tuple[str, int], ...] = ()

    @property
    def is_replica(self) -> bool:
        """Whether it copies another one."""
        return self.master is not None


def read_role(reply: Any) -> Role | None:
    """Return what a reply of ROLE says; ``None`` if the server doesn't tell."""
    match reply:
        case [b"master", int(), [*replicas]]:
            return Role("master", len(replicas), None, tuple(node for node, _ in _each(replicas)))
        case [b"slave", bytes(host), int(port), *_]:
            return Role("slave", 0, (host.decode(errors="backslashreplace"), port))
        case [b"sentinel", *_]:
            return Role("sentinel")
    return None


def longest_silence(role: Role | None, given: float) -> float:
    """Return the seconds that a server may be silent when an answer is due.

    :param role: what it said that it is
    :param given: what is given to one that nothing copies, and that copies none
    """
    if role is None or not (role.replicas or role.is_replica):
        return given
    return min(given, _SILENCE)  # if it is frozen, another one may be promoted soon


class Copies(NamedTuple):
    """How far a server has come in what it writes, and what copies it.

    :ivar offset: in bytes
    :ivar nodes: how far each of them said that it is
    """

    offset: int
    nodes: dict[Node, int]


def read_copies(reply: Any) -> Copies | None:
    """Return what a reply of ROLE says; ``None`` if it isn't that of a master."""
    match reply:
        case [b"master", int(offset), [*replicas]]:
            found = [(node, said) for node, said in _each(replicas) if said is not None]
            if len(found) == len(replicas):
                return Copies(offset, dict(found))
    return None


def _each(replicas: list[Any]) -> Iterator[tuple[Node, int | None]]:
    """Return each replica that makes sense, and how far it said that it is, if it did."""
    for replica in replicas:
        match replica:
            case [bytes(host), bytes(port), *rest]:
                number = _number(port)
                if host and number is not None and number < 65536:
                    said = _number(rest[0]) if rest else None
                    yield (host.decode(errors="backslashreplace"), number), said


def _number(text: Any) -> int | None:
    """Return the number that a reply has as text; ``None`` if it isn't one of 64 bits or less."""
    whole = isinstance(text, bytes) and text.isdigit() and len(text) <= _MOST_DIGITS
    return int(text) if whole else None


class WrongRoleError(OSError):
    """A server is of no use for what it is."""


def wrong_role(role: Role | None, *, moves: bool) -> WrongRoleError | None:
    """Return the error if a server is of no use.

    :param role: what it says that it is, ``None`` if it doesn't tell
    :param moves: whether the right one may be somewhere else. If not, a replica is the one that was
        asked for.
    """
    if role is None:
        return None
    if role.name == "sentinel":
        return WrongRoleError("it is a sentinel")
    if moves and role.master is not None:
        host, port = role.master
        return WrongRoleError(f"it is a replica of {host}, port {port}")
    return None
