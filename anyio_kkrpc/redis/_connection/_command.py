"""A command on its way: what it is made of, what sends it, and its bytes. No I/O."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable
from typing import Any, TypeAlias, cast

from hiredis import pack_command

Argument: TypeAlias = bytes | str | int | float
Command: TypeAlias = tuple[Argument, ...]
# Sends a command and returns its reply.
Execute: TypeAlias = Callable[..., Awaitable[Any]]
# Sends several in one write and returns their replies; error replies are among them.
ExecuteMany: TypeAlias = Callable[[Iterable[Command]], Awaitable[list[Any]]]

pack = cast(Callable[[Command], bytes], pack_command)
