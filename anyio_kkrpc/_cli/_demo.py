"""``anyio-kkrpc demo``: workers, a subscriber and a client at work on a real server.

The workers are processes of their own, and get URL, stream, name and backend on standard input.
"""

from __future__ import annotations

import logging
import random
import subprocess
import sys
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, nullcontext

import anyio
import msgspec
from anyio import create_task_group, fail_after, sleep
from anyio.abc import Process
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn
from rich.table import Table

from .._calling._proxy import with_call_options
from .._channel import RPCChannel
from .._exceptions import RemoteError
from ..redis import RedisStreamsTransport
from ..testing import RedisServer

START_TIMEOUT = 60.0
CALLS = 400


class Worker:
    """What the worker processes expose."""

    def __init__(self, name: str) -> None:
        self._name = name

    def name(self) -> str:
        """Tell which worker this is."""
        return self._name

    def add(self, a: int, b: int) -> int:
        """Add two numbers."""
        return a + b

    def divide(self, a: float, b: float) -> float:
        """Divide, or fail."""
        return a / b

    async def render(self, frames: int, on_frame: Callable[[int, str], Awaitable[None]]) -> str:
        """Call back after each frame."""
        for frame in range(1, frames + 1):
            await sleep(0.03)
            await on_frame(frame, self._name)
        return f"{frames} frames"

    async def words(self, text: str) -> AsyncIterator[str]:
        """Stream the words of a text."""
        for word in text.split():
            await sleep(0.04)
            yield word


async def serve(url: str, stream: str, name: str) -> None:
    """Be a worker until the destroy signal comes."""
    # What its handler raises is shown by who called it.
    logging.getLogger("anyio_kkrpc").setLevel(logging.ERROR)
    async with (
        RedisStreamsTransport(url, stream=stream, use_consumer_group=True) as transport,
        RPCChannel(transport, expose=Worker(name)) as channel,
    ):
        await channel.serve_forever()


@asynccontextmanager
async def _workers(url: str, stream: str, backend: str) -> AsyncGenerator[None, None]:
    processes: list[Process] = []
    try:
        for name in ("worker-1", "worker-2"):
            command = [sys.executable, "-m", "anyio_kkrpc._cli._demo"]
            process = await anyio.open_process(
                command,
                stdin=subprocess.PIPE,
                stdout=None,
                stderr=None,
                start_new_session=True,  # a Ctrl-C in the terminal is for this process alone
            )
            processes.append(process)
            assert process.stdin is not None
            # Not as arguments: the URL may hold a password, and anybody can list those.
            await process.stdin.send(msgspec.json.encode([url, stream, name, backend]) + b"\n")
        yield
        with anyio.move_on_after(5):  # they have been told to end
            for process in processes:
                await process.wait()
    finally:
        with anyio.move_on_after(5, shield=True):
            for process in processes:
                if process.returncode is None:
                    process.terminate()
                await process.wait()


class News:
    """What the subscriber exposes; every subscriber gets every call."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self.heard = anyio.Event()

    def headline(self, text: str) -> None:
        """Take a piece of news."""
        self._console.print(f"  subscriber heard: [italic]{text}[/]")
        self.heard.set()


async def run(url: str | None, backend: str = "asyncio") -> None:
    """Show everything, and clean up."""
    console = Console(highlight=False)
    stream = f"kkrpc-demo-{random.randrange(1 << 32):08x}"
    with RedisServer() if url is None else nullcontext() as server:
        address = url if server is None else server.url
        assert address is not None
        if server is not None:
            console.print(f"[bold]Server[/]    started at {address}")
        console.print("[bold]Workers[/]   two processes in one consumer group")
        async with RedisStreamsTransport(
            address, stream=stream, use_consumer_group=True
        ) as transport:
            try:
                async with _workers(address, stream, backend):
                    await _client(transport, console)
                    await _publish(address, f"{stream}-news", console)
                    console.print("[bold]Destroy[/]   signal sent: the workers end")
                    await transport.signal_destroy()
            finally:
                await _delete(transport)
    console.print("[bold green]Done[/]: all processes have ended, and their keys are gone.")


async def _client(transport: RedisStreamsTransport, console: Console) -> None:
    async with RPCChannel(transport) as channel:
        api = channel.get_api()
        with fail_after(START_TIMEOUT):
            result = await api.add(7, 8)
        console.print(f"[bold]Call[/]      api.add(7, 8) -> {result}")
        try:
            await api.divide(1, 0)
        except RemoteError as exc:
            console.print(f"[bold]Error[/]     api.divide(1, 0) -> {exc}")

        with Progress(
            TextColumn("[bold]Callback[/]  {task.description}"),
            BarColumn(30),
            TaskProgressColumn(),
            console=console,
        ) as progress:
            bar = progress.add_task("api.render(40, on_frame)", total=40)
            await api.render(40, lambda frame, name: progress.update(bar, completed=frame))

        console.print("[bold]Stream[/]    api.words(...) ->", end="")
        async with api.words("items arrive while the worker still makes them") as words:
            async for word in words:
                console.print(f" {word}", end="")
        console.print()

        answered: Counter[str] = Counter()

        async def ask() -> None:
            answered[await api.name()] += 1

        started = anyio.current_time()
        # Both workers must have started; until then one of them answers all.
        with fail_after(START_TIMEOUT):
            while len(answered) < 2 or answered.total() < CALLS:
                async with create_task_group() as group:
                    for _ in range(CALLS):
                        group.start_soon(ask)
        seconds = anyio.current_time() - started
        table = Table("worker", "answered", title=f"{answered.total()} concurrent calls")
        for name, count in sorted(answered.items()):
            table.add_row(name, str(count))
        console.print(table)
        console.print(f"  {answered.total() / seconds:,.0f} calls a second on this machine")
        info = await transport.get_stream_info()
        console.print(
            f"[bold]Stream[/]    {transport.stream}: {info.length} entries, {info.groups} group"
        )


async def _publish(url: str, stream: str, console: Console) -> None:
    console.print("[bold]Broadcast[/] to all subscribers, without waiting for an answer")
    news = News(console)
    async with (
        RedisStreamsTransport(url, stream=stream) as subscriber,
        RPCChannel(subscriber, expose=news),
        RedisStreamsTransport(url, stream=stream) as publisher,
        RPCChannel(publisher) as channel,
    ):
        try:
            await with_call_options(channel.get_api(), reply=False).headline("the demo works")
            with fail_after(START_TIMEOUT):
                await news.heard.wait()
        finally:
            await _delete(publisher)


async def _delete(transport: RedisStreamsTransport) -> None:
    with anyio.move_on_after(5, shield=True):
        await transport.delete_stream()


if __name__ == "__main__":
    *arguments, loop = msgspec.json.decode(sys.stdin.buffer.readline())
    anyio.run(serve, *arguments, backend=loop)
