"""What the JSON of both generations has in common: numbers, errors, and names that aren't found."""

from __future__ import annotations

import re
from typing import Any

import msgspec
from msgspec import UNSET

from .._protocol._values import ARGUMENT, Packed
from .._wire_errors import BARE
from ..records import CallbackCall, Record, Request
from .superjson import MAX_SAFE

# Not the digits of a fraction or exponent.
_LONG_INTEGER = re.compile(rb"(?<![0-9.eE+])[0-9]{16,}(?![0-9.eE])")
# What an error says that kkrpc itself raised, in either generation, for a name that it lacks.
_NOT_FOUND = re.compile(
    r"Cannot access .+ on undefined|undefined is not a constructor"
    r"|(Method |Property |Constructor )(path )?.+ not found( at .*)?"
    r"|(Method )?\S* is not (a (constructor )?function|writable)",
    re.DOTALL,
)
# Members of an error that only our own peers know.
OURS = frozenset({"cause", "rpc_error", "at"})
_NOT_FIELDS = OURS | {"name", "message", "stack", "n", "m", "s"}
NOT_FOUND = "method_not_found"
NO_CONSTRUCTOR = "undefined is not a constructor"


def check_numbers(text: bytes) -> None:
    """Refuse integers that JavaScript would round.

    :raises TypeError: if there is one
    """
    if _LONG_INTEGER.search(text) is None:
        return

    def visit(value: Any) -> None:
        if value.__class__ is int:
            if not -MAX_SAFE <= value <= MAX_SAFE:
                raise TypeError(
                    f"{value} is beyond 2**53 - 1, and JSON would round it in JavaScript: "
                    "send it as text"
                )
        elif value.__class__ is list:
            for item in value:
                visit(item)
        elif value.__class__ is dict:
            for item in value.values():
                visit(item)

    visit(msgspec.json.decode(text))


def is_not_found(text: str) -> bool:
    """Whether the text of an error says that the other side has no such name."""
    return _NOT_FOUND.fullmatch(text) is not None


def mark_kind(error: dict[str, Any]) -> None:
    """Mark an error that came, by its fields, as one of those that have a class of their own."""
    error.pop("rpc_error", None)
    message = str(error.get("m", ""))
    of_kkrpc = error.get("n") == "Error" or message == NO_CONSTRUCTOR
    if of_kkrpc and is_not_found(message):
        error["rpc_error"] = NOT_FOUND
    elif error.get("n") == "RPCValidationError" and isinstance(error.get("issues"), list):
        error["rpc_error"] = "validation"


def thrown_error(value: Any) -> dict[str, Any]:
    """Return what stands for a value that was raised in JavaScript: its text is what String() makes
    of it there, and members of an object are fields of the error.
    """
    error: dict[str, Any] = {}
    if isinstance(value, dict):
        error.update((key, item) for key, item in value.items() if key not in _NOT_FIELDS)
    error.update(n="Error", m=_text_of(value), rpc_error=BARE)
    if isinstance(value, dict) and isinstance(value.get("name"), str):
        error["n"] = value["name"]
    if isinstance(value, dict) and isinstance(value.get("message"), str):
        error["m"] = value["message"]
    return error


def _text_of(value: Any) -> str:
    if isinstance(value, str):
        return value
    if value is UNSET:
        return "undefined"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    if isinstance(value, list):
        return ",".join("" if item is None else _text_of(item) for item in value)
    return "[object Object]" if isinstance(value, dict) else str(value)


def unknown_segment(path: list[str], error: dict[str, Any]) -> int:
    """Return the index of the first segment of ``path`` that the exposed table lacks."""
    at = error.get("at", 0)
    return min(at, len(path) - 1) if isinstance(at, int) else 0


def refuse_references(record: Record, peers: str) -> None:
    """Refuse what is passed by reference, and the use of what was.

    :param peers: who doesn't know references
    :raises TypeError: if it is that
    """
    values = [getattr(record, "v", None)]
    if isinstance(record, Request):
        values += record.a or ()
    for value in values:
        packed = isinstance(value, dict) and value.get(ARGUMENT) == "references"
        if packed or value.__class__ is Packed:
            raise TypeError(f"{peers} take nothing by reference")
    if isinstance(record, CallbackCall) and record.p is not UNSET:
        raise TypeError(f"{peers} have nothing that is used by reference")
