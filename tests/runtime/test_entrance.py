"""What was made before a fork, as by ``gunicorn --preload``, is refused in the forked process."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from anyio_kkrpc._runtime._entrance import Entrance
from tests.bounds import BOUND

# Each line that it writes is of one process: which one, what it entered, and what came of it.
PROGRAM = """
import os, socket, sys
import anyio
from anyio_kkrpc import ByteStreamTransport, MemoryTransport, RedisStreamsTransport, RPCChannel

class Untouched(anyio.abc.ByteStream):
    async def receive(self, max_bytes=65536): os._exit(3)
    async def send(self, item): os._exit(3)
    async def send_eof(self): os._exit(3)
    async def aclose(self): os._exit(3)

def things():
    # Nobody accepts: who connects waits there, and is found at the end.
    url = f"redis://127.0.0.1:{listener.getsockname()[1]}"
    yield RedisStreamsTransport(url, connect_timeout=0.01)
    yield ByteStreamTransport(Untouched())
    memory, _ = MemoryTransport.pair()
    yield RPCChannel(memory)

async def enter(thing):
    try:
        async with thing:
            pass
    except Exception as exc:
        return f"{type(exc).__name__}: {exc}"
    return "entered"

def report(who, things):
    for thing in things:
        print(who, type(thing).__name__, anyio.run(enter, thing, backend=sys.argv[1]), flush=True)

listener = socket.create_server(("127.0.0.1", 0))
made = list(things())
print("parent", os.getpid(), flush=True)
pid = os.fork()
if not pid:
    report("forked", made)
    listener.setblocking(False)
    try:
        listener.accept()
    except BlockingIOError:
        pass
    else:
        print("connected", flush=True)
    # What is made after the fork is as good as ever.
    memory, _ = MemoryTransport.pair()
    report("anew", [RPCChannel(memory)])
    os._exit(0)
assert os.waitpid(pid, 0)[1] == 0
report("parent", made[2:])
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_made_before_a_fork(backend: str) -> None:
    """Before it has read or written anything, with what to do; its parent may enter it."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, backend],
        capture_output=True,
        text=True,
        timeout=BOUND,
        check=True,
    )
    assert done.stderr == ""
    first, *rest = done.stdout.splitlines()
    maker = first.removeprefix("parent ")
    assert len(rest) == 5
    for name, line in zip(
        ("RedisStreamsTransport", "ByteStreamTransport", "RPCChannel"), rest, strict=False
    ):
        said = f"forked {name} RuntimeError: this {name} was made by process {maker}, before a fork"
        assert line.startswith(said)
        assert "make it after the fork" in line
    assert rest[3:] == ["anew RPCChannel entered", "parent RPCChannel entered"]


def test_one_is_let_in(monkeypatch: pytest.MonkeyPatch) -> None:
    entrance = Entrance("Thing")
    with monkeypatch.context() as forked:
        forked.setattr(os, "getpid", lambda: 1)
        with pytest.raises(
            RuntimeError, match=r"this Thing was made by process \d+, before a fork"
        ):
            entrance.enter()
    assert not entrance.used
    entrance.enter()
    assert entrance.used
    with pytest.raises(RuntimeError, match="Thing can be entered once"):
        entrance.enter()
