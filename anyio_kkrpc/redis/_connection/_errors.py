"""What an error of Redis means. Nobody else decides it."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from enum import Enum, auto
from typing import TypeAlias

from ..._exceptions import OverloadedError, TransportClosedError, TransportConnectionError
from ..._runtime._log import quoted

__all__ = (
    "Meaning",
    "Parse",
    "OF_CONNECTION",
    "MovedAway",
    "RedisError",
    "ResponseError",
    "code_of",
    "leads_elsewhere",
    "meaning_of",
    "moved_to",
    "named",
    "no_memory",
    "parse_error",
    "parse_moving_error",
    "reason",
)


# Returns the exception for the text of an error reply.
Parse: TypeAlias = Callable[[str], Exception]


class RedisError(Exception):
    """An error reply of Redis. Its text is what the server sent, but for a leading ``ERR``."""


class ResponseError(RedisError):
    """An error reply that is about the command, and neither about connection nor login."""


class Meaning(Enum):
    """What becomes of a command, and of its connection, after an error.

    :cvar PASSING: the server refuses it for now: the connection stays, and it is repeated there,
        after a pause
    :cvar MOVING: the same, because the slot of a Cluster moves to another node, which takes moments
    :cvar FULL: the same, because memory is used up: only what makes room, or what somebody waits
        for already, is repeated; what is new is refused
    :cvar ELSEWHERE: the connection is lost, or leads to a server that can't help: connect again
    :cvar GONE: the stream or its group was deleted: it is made again
    :cvar MOVED: the server is a node of a Cluster, and the stream is on another one, where nobody
        goes after it: the URL is that of one server
    :cvar RIGHTS: the user lacks a right; it may be given back
    :cvar LOGIN: the server doesn't know user and password; it may get to know them
    :cvar REFUSED: this one command is refused, and will be again
    :cvar FINAL: it didn't come from Redis
    """

    PASSING = auto()
    MOVING = auto()
    FULL = auto()
    ELSEWHERE = auto()
    GONE = auto()
    MOVED = auto()
    RIGHTS = auto()
    LOGIN = auto()
    REFUSED = auto()
    FINAL = auto()

    @property
    def passes(self) -> bool:
        """Whether the same command on the same connection will be taken later."""
        return self in _PASSES

    @property
    def heals(self) -> bool:
        """Whether somebody who looks after the server may mend it soon."""
        return self is Meaning.RIGHTS or self is Meaning.LOGIN


_PASSES = frozenset((Meaning.PASSING, Meaning.MOVING, Meaning.FULL))
# By the first word of the reply.
_BY_CODE = {
    "NOREPLICAS": Meaning.PASSING,  # min-replicas-to-write
    "MISCONF": Meaning.PASSING,  # it can't write to its disk
    "BUSY": Meaning.PASSING,  # a script runs for long
    "TRYAGAIN": Meaning.MOVING,  # some of the keys are on the other node
    "ASK": Meaning.MOVING,  # the key is on the other node, or nowhere
    "OOM": Meaning.FULL,
    "LOADING": Meaning.ELSEWHERE,
    "READONLY": Meaning.ELSEWHERE,
    "MASTERDOWN": Meaning.ELSEWHERE,
    "CLUSTERDOWN": Meaning.ELSEWHERE,
    "NOGROUP": Meaning.GONE,
    "UNBLOCKED": Meaning.GONE,
    "MOVED": Meaning.MOVED,
    "NOPERM": Meaning.RIGHTS,
    "NOAUTH": Meaning.LOGIN,
    "WRONGPASS": Meaning.LOGIN,
}
_UNNAMED = "The user executing the script can't run this command"
_NO_MORE_CLIENTS = "max number of clients"
_NO_LDAP = "problem with LDAP service"
# What is no fault of a command begins so.
OF_CONNECTION = ("LOADING ", _NO_MORE_CLIENTS, _NO_LDAP)
_CALLED = re.compile(rb"redis\.p?call\('(\w+)'")
# By the beginning of what follows the word ERR.
_BY_TEXT = {
    "no such key": Meaning.GONE,
    "The XGROUP subcommand requires the key to exist": Meaning.GONE,
    "ACL failure in script": Meaning.RIGHTS,
    _UNNAMED: Meaning.RIGHTS,
    _NO_MORE_CLIENTS: Meaning.ELSEWHERE,
    "invalid password": Meaning.LOGIN,
    "wrong number of arguments for 'auth'": Meaning.LOGIN,
    "AUTH <password> called without": Meaning.LOGIN,
    "Client sent AUTH, but no password": Meaning.LOGIN,
    _NO_LDAP: Meaning.ELSEWHERE,
    "WAIT cannot be used with replica": Meaning.ELSEWHERE,
}
# Redis before 7.0 puts the error of a command behind what it says of the script that gave it, or
# behind the line alone if the script returned it (pcall).
_IN_SCRIPT = re.compile(r"^(?:ERR )?(?:Error running script .*)?@user_script: ?\d+: -?", re.DOTALL)
_WITH_SUBCOMMAND = frozenset(("CLIENT", "XGROUP", "XINFO"))
_WITHOUT_KEY = frozenset(("AUTH", "CLIENT", "INFO", "PING", "ROLE", "SELECT", "TIME"))
# Characters of a key that a text shows.
_SHOWN = 200


def parse_error(text: str) -> RedisError:
    """Return the exception for an error reply. Never raises."""
    error = ResponseError(text.removeprefix("ERR "))
    if str(error).startswith(OF_CONNECTION) or meaning_of(error) is Meaning.LOGIN:
        return RedisError(str(error))
    return error


class MovedAway(ResponseError):
    """The server is a node of a Cluster, and tells on which other one the stream is.

    :ivar host: name or IP address of the other one, empty if it is that of this one
    """

    def __init__(self, text: str, host: str, port: int) -> None:
        super().__init__(text)
        self.host, self.port = host, port


def parse_moving_error(text: str) -> Exception:
    """Do what `parse_error` does, for connections whose stream is gone after where it moves to."""
    words = text.split(" ")
    if words[0] == "MOVED" and len(words) == 3:
        host, _, port = words[2].rpartition(":")
        if port.isascii() and port.isdigit() and len(port) <= 5 and 0 < int(port) < 65536:
            # A question mark stands for a node that hasn't told its name.
            return MovedAway(text, "" if host == "?" else host.strip("[]"), int(port))
    return parse_error(text)


def moved_to(exc: BaseException) -> MovedAway | None:
    """Return what tells where the stream is, if the error of a connection does."""
    if isinstance(exc, TransportConnectionError):
        return moved_to(exc.__cause__) if exc.__cause__ is not None else None
    return exc if isinstance(exc, MovedAway) else None


def code_of(exc: BaseException) -> str:
    """Return the code of an error reply, such as ``"OOM"``; ``"ERR"`` if it has none."""
    word = _text(exc).partition(" ")[0]
    return word if word.isupper() and word.isalpha() else "ERR"


def meaning_of(exc: BaseException) -> Meaning:
    """Return what an error means: that of an error reply, or one of a connection."""
    if isinstance(exc, TransportConnectionError):
        cause = exc.__cause__
        if isinstance(cause, RedisError):
            meaning = meaning_of(cause)
            return meaning if meaning.heals or meaning is Meaning.MOVED else Meaning.ELSEWHERE
        return Meaning.ELSEWHERE
    if isinstance(exc, TransportClosedError):
        return Meaning.ELSEWHERE
    if isinstance(exc, MovedAway):
        return Meaning.ELSEWHERE
    if not isinstance(exc, RedisError):
        return Meaning.FINAL
    found = _BY_CODE.get(code_of(exc))
    if found is not None:
        return found
    text = _text(exc)
    for beginning, meaning in _BY_TEXT.items():
        if text.startswith(beginning):
            return meaning
    return Meaning.REFUSED


def leads_elsewhere(exc: BaseException) -> bool:
    """Whether a connection that gave this error is given up for another one.

    Whether the server knows user and password, it tells at the next login.
    """
    meaning = meaning_of(exc)
    return meaning is Meaning.ELSEWHERE or (
        meaning is Meaning.LOGIN and isinstance(exc, RedisError)
    )


def reason(exc: BaseException) -> str:
    """Return an error in words. The code says nothing more where it is about the login."""
    code, text, meaning = code_of(exc), quoted(exc), meaning_of(exc)
    if meaning is Meaning.LOGIN:
        return text.removeprefix(f"{code} ")
    if meaning is Meaning.MOVED:
        where = text.removeprefix("MOVED ")
        return (
            f"MOVED {where}: the server is a node of a Redis Cluster, and what this needs is on "
            "another node: the url is to begin with redis+cluster://, or rediss+cluster:// for TLS"
        )
    return text


def named(exc: Exception, command: Sequence[bytes | str | int | float]) -> Exception:
    """Return an error with command and key, if it is about them; else the error as it is."""
    if not isinstance(exc, ResponseError):
        return exc
    if meaning_of(exc) not in (Meaning.RIGHTS, Meaning.REFUSED):
        return exc
    # Redis 7.0 doesn't tell which command of a script it is.
    within = ""
    if _UNNAMED in str(exc) and isinstance(script := command[1], bytes):
        names = sorted({name.decode() for name in _CALLED.findall(script)})
        within = f"one of {', '.join(names)} in "
    return type(exc)(f"{exc} ({within}{command_name(command)})")


def _text(exc: BaseException) -> str:
    text = str(exc)
    return _IN_SCRIPT.sub("", text, 1).removeprefix("ERR ").lstrip("-")


def command_name(command: Sequence[bytes | str | int | float]) -> str:
    """Return a command in words: its name, and its key if it has one."""
    words = [
        word.decode(errors="backslashreplace") if isinstance(word, bytes) else str(word)
        for word in command[:64]
    ]
    name = words[0].upper()
    key = None
    if name in ("EVAL", "EVALSHA"):
        key = words[3:4]
    elif name in ("XREAD", "XREADGROUP"):
        key = words[words.index("STREAMS") + 1 :][:1] if "STREAMS" in words else []
    elif name in _WITH_SUBCOMMAND:
        key = words[2:3]
        name = " ".join((name, *words[1:2])).upper()
    else:
        key = words[1:2]
    if not key or name.partition(" ")[0] in _WITHOUT_KEY:
        return name
    return f"{name}, key {key[0][:_SHOWN]!r}"


def no_memory(exc: Exception) -> OverloadedError:
    """Return the error for a request while Redis has no memory."""
    error = OverloadedError(
        "Redis is out of memory: the request did not run, and may be tried again"
    )
    error.__cause__ = exc
    return error
