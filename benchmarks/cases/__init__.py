"""What is measured: one short module for each library.

A case has ``NEEDS`` (modules that must be installed), ``BACKENDS``, ``KINDS`` (its modes; one
without a name if there is no choice), ``serve``, which runs the worker, and ``connect``, which
gives the client. One with a server other than Redis starts it in ``server``, and has in
``PROGRAMS`` what that needs; one without a server is ``DIRECT``.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import shutil
import socket
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

NAMES = (
    "limit",
    "ours",
    "keyed",
    "nats",
    "rpyc",
    "grpc",
    "lists",
    "faststream",
    "taskiq",
    "arq",
    "docket",
    "streaq",
)
IN_FLIGHT = 64
PAYLOAD = "x" * 100


class Place(NamedTuple):
    """Where client and worker meet: a port on loopback and a name that nobody else uses."""

    port: int
    name: str
    kind: str


class Client(NamedTuple):
    """What a client can do.

    :param call: echo a text
    :param flood: keep so many calls in flight for so many seconds, and return how many were made;
        64 tasks that call one after the other if not given
    """

    call: Callable[[str], Awaitable[Any]]
    flood: Callable[[int, float], Awaitable[int]] | None = None


def load(name: str) -> ModuleType:
    """Return the module of a case."""
    return importlib.import_module(f"{__name__}.{name}_case")


def free_port() -> int:
    """Return a port on loopback that nobody listens on."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port: int = one.getsockname()[1]
        return port


def program(name: str) -> str | None:
    """Return the path of a program, beside this Python or on PATH."""
    beside = str(Path(sys.executable).parent)
    return shutil.which(name, path=os.pathsep.join([beside, os.environ.get("PATH", "")]))


def missing(case: ModuleType) -> list[str]:
    """Return which modules and programs the case needs and can't find."""
    modules = [name for name in case.NEEDS if importlib.util.find_spec(name) is None]
    return modules + [name for name in getattr(case, "PROGRAMS", ()) if program(name) is None]
