"""One worker of ``anyio-kkrpc serve``: in the process of the command, or in one of its own.

The supervisor starts its workers as ``python -m anyio_kkrpc._cli._worker``, with a socket as their
standard input. It writes the options there, so that no password stands in a list of processes, and
the worker writes what becomes of it, a word for each line, and a report when asked. When that
socket ends, the supervisor is gone, and the worker ends cleanly as it does on SIGTERM.
"""

from __future__ import annotations

import importlib
import logging
import os
import signal
import sys
import traceback
from collections.abc import AsyncIterator, Callable
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import anyio
import msgspec
from anyio import CancelScope, Event, create_task_group, move_on_after, open_signal_receiver, sleep
from msgspec import Struct

from .._channel import RPCChannel
from .._exceptions import RPCError, TransportConnectionError
from .._runtime._lone import lone_error
from .._serving._table import Exposed, entered, expose
from .._signals import serve_until_caught
from ..middleware import Middleware, access_log
from ..redis import RedisStreamsTransport
from ._report import report
from ._restarts import Word

BACKENDS: dict[str, tuple[str, dict[str, Any]]] = {
    "asyncio": ("asyncio", {}),
    "uvloop": ("asyncio", {"use_uvloop": True}),
    "trio": ("trio", {}),
}
# Seconds between two looks at how many calls it has done and how much memory it takes.
LOOK_INTERVAL = 0.5
# What the supervisor writes to get a report, and how many seconds Redis has to answer for it.
QUESTION = b"?\n"
ANSWER_WITHIN = 1.0
_MIB = 1024 * 1024


class Options(Struct, frozen=True, kw_only=True):
    """What a worker is told.

    :ivar consumer_name: its name in the group, which its successor takes over
    :ivar middleware: ``module:name`` each, the outermost first
    :ivar max_calls: it ends after so many, for a new one
    :ivar max_memory: or when it takes more than so many MiB
    """

    target: str
    url: str
    stream: str
    group: str | None
    backend: str
    concurrency: int
    grace: float
    debug: bool
    codec: str
    max_len: int | None
    claim_idle: float
    max_deliveries: int
    signing_key: bytes | None
    consumer_name: str | None = None
    timeout: float = 30.0
    send_tracebacks: bool = False
    middleware: list[str] | None = None
    tracing: bool = False
    access_log: bool = False
    log_level: str | None = None
    max_calls: int | None = None
    max_memory: int | None = None
    shards: int = 1

    def __repr__(self) -> str:
        return f"<Options for {self.target} on {self.stream}>"  # the URL may hold a password


class Report(Struct):
    """How a worker is.

    :ivar ready: whether it serves, Redis answers it, and requests are read
    :ivar memory: bytes that it takes
    :ivar channel: what `RPCChannel.statistics` tells
    :ivar transport: what the transport's does
    """

    ready: bool
    memory: float
    channel: dict[str, Any]
    transport: dict[str, Any]


def load(target: str) -> Exposed:
    """Return the table of what ``module:name`` says.

    :raises ImportError: if there is no such module
    :raises LookupError: if it has no such name
    :raises TypeError: if it can't be exposed
    """
    api = _find(target)
    if isinstance(api, type):
        api = api()
    return api if isinstance(api, Exposed) else expose(api)


def _find(target: str) -> Any:
    module_name, _, name = target.partition(":")
    if module_name.endswith(".py"):
        module = ".".join(Path(module_name).with_suffix("").parts).strip("./")
        better = f"{module}:{name}" if name else module
        raise ImportError(f"{target} names a file: say {better}")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    found: Any = importlib.import_module(module_name)
    for part in name.split(".") if name else ():
        if not hasattr(found, part):
            raise LookupError(f"{target}: {module_name} has no {name!r}")
        found = getattr(found, part)
    return found


def _load_middleware(options: Options) -> list[Middleware]:
    found: list[Middleware] = []
    if options.tracing:
        from ..otel import tracing

        found.append(tracing())
    if options.access_log:
        found.append(access_log())
    return found + [_find(target) for target in options.middleware or ()]


def check(options: Options) -> None:
    """Raise what the options are refused with, before a process is started."""
    make_transport(options)
    if not options.target:
        raise ValueError("MODULE:NAME: is empty")
    for target in options.middleware or ():
        if not target.partition(":")[2]:
            raise ValueError(f"--middleware: needs MODULE:NAME, not {target!r:.80}")
    if options.backend != "asyncio":
        try:
            importlib.import_module(options.backend)
        except ImportError:
            raise ValueError(
                f"--backend: {options.backend} is missing: pip install {options.backend}"
            ) from None


def make_transport(options: Options) -> RedisStreamsTransport:
    """Return the transport of a worker."""
    group: dict[str, Any] = {} if options.group is None else {"consumer_group": options.group}
    return RedisStreamsTransport(
        options.url,
        stream=options.stream,
        use_consumer_group=options.group is not None,
        codec=options.codec,
        max_len=options.max_len,
        claim_idle=options.claim_idle,
        max_deliveries=options.max_deliveries,
        consumer_name=options.consumer_name,
        signing_key=options.signing_key,
        shards=options.shards,
        **group,
    )


def run(options: Options) -> bool:
    """Be a worker in this process, until told to end; return whether it was to begin anew."""
    worker = _Worker(options)
    worker.prepare()
    worker.serve()
    return worker.ended_by is signal.SIGHUP


class _Worker:
    """Serves what its options say.

    :param tell: told the words of its life, and how it is when that is asked
    """

    def __init__(
        self, options: Options, tell: Callable[[Word | Report], object] | None = None
    ) -> None:
        self._options = options
        self._tell = tell
        self._serving = False
        self._entered: tuple[RPCChannel, RedisStreamsTransport] | None = None
        self.ended_by: signal.Signals | None = None

    def prepare(self) -> None:
        """Load what it is to serve.

        :raises Exception: whatever that raises
        """
        options = self._options
        level = options.log_level or ("info" if options.access_log else None)
        if level is not None:
            logging.basicConfig(
                level=level.upper(),
                format="%(asctime)s %(levelname)s %(name)s: %(message)s",
            )
        self._table = load(options.target)
        self._middleware = _load_middleware(options)

    def serve(self) -> None:
        backend, loop = BACKENDS[self._options.backend]
        anyio.run(self._serve, backend=backend, backend_options=loop)

    async def _serve(self) -> None:
        options, supervised = self._options, self._tell is not None
        wanted = [signal.SIGTERM, signal.SIGINT, *(() if supervised else (signal.SIGHUP,))]
        with lone_error(), ExitStack() as signals:
            # Before anybody is told that it serves.
            caught = signals.enter_context(open_signal_receiver(*wanted))
            async with create_task_group() as group:
                if supervised:
                    group.start_soon(self._heed_parent, name="anyio_kkrpc parent")
                beginning, begun = CancelScope(), Event()
                group.start_soon(self._end_early, caught, beginning, begun, group.cancel_scope)
                async with (
                    make_transport(options) as transport,
                    entered(self._table) as table,
                    RPCChannel(
                        transport,
                        expose=table,
                        timeout=options.timeout,
                        max_concurrency=options.concurrency,
                        send_tracebacks=options.send_tracebacks,
                        grace_period=options.grace,
                        middleware=self._middleware,
                    ) as channel,
                ):
                    beginning.cancel()
                    await begun.wait()  # on Trio one task at a time may wait for signals
                    self._entered = channel, transport
                    where = options.stream
                    if options.group is not None:  # by this name errors and `top` tell of it
                        where += f", {options.group} as {transport.consumer_name}"
                    names = len(list(table))
                    what = f"{names} name" if names == 1 else f"{names} names"
                    say(f"serving {what} on {where} (pid {os.getpid()})")
                    await self._serve_channel(channel, caught)
                    if supervised:  # it may be told to end more than once
                        group.start_soon(self._heed_no_more, caught)
                    else:
                        signals.close()  # a second Ctrl-C ends it at once
                group.cancel_scope.cancel()
        say(f"ended (pid {os.getpid()})")

    async def _end_early(
        self,
        caught: AsyncIterator[signal.Signals],
        beginning: CancelScope,
        begun: Event,
        all_of_it: CancelScope,
    ) -> None:
        """End by the signals that come while it connects and enters what it is to serve."""
        with beginning:
            async for number in caught:
                self.ended_by = number
                all_of_it.cancel()
                return
        begun.set()

    async def _heed_no_more(self, caught: AsyncIterator[signal.Signals]) -> None:
        """Take further signals: it is ending already, and its supervisor bounds that."""
        async for _ in caught:
            pass

    async def _serve_channel(
        self, channel: RPCChannel, caught: AsyncIterator[signal.Signals]
    ) -> None:
        """Serve until the channel ends, or a signal comes."""
        tell = self._tell or (lambda word: None)
        tell(Word.serving)
        self._serving = True
        with lone_error():
            async with create_task_group() as group:
                group.start_soon(self._look, channel, tell, name="anyio_kkrpc recycling")
                self.ended_by = await serve_until_caught(channel, caught)
                self._serving = False
                group.cancel_scope.cancel()
        if self.ended_by is None:
            tell(Word.destroyed)

    async def _heed_parent(self) -> None:
        """Tell the supervisor how this worker is when it asks; end when it is gone."""
        tell = self._tell or (lambda report: None)
        while True:
            await anyio.wait_readable(0)
            data = b""
            with suppress(OSError):  # it is gone, and hadn't read all
                data = os.read(0, 4096)
            if not data:
                os.kill(os.getpid(), signal.SIGTERM)
                return
            tell(await self._report())

    async def _report(self) -> Report:
        memory = resident_mib() * _MIB
        if self._entered is None:
            return Report(False, memory, {}, {})
        channel, transport = self._entered
        ready = False
        with move_on_after(ANSWER_WITHIN), suppress(RPCError):
            if self._options.shards == 1:  # else one that is away says nothing of the others
                await transport.get_stream_info()
            ready = self._serving and not channel.closed
        told = channel.statistics(), transport.statistics()
        ready = ready and told[1].reading
        return Report(ready, memory, *map(msgspec.to_builtins, told))

    async def _look(self, channel: RPCChannel, tell: Callable[[Word], object]) -> None:
        """End when it has done as many calls as it may, or takes too much memory."""
        options = self._options
        if options.max_calls is None and options.max_memory is None:
            return
        while True:
            await sleep(LOOK_INTERVAL)
            statistics = channel.statistics()
            calls = statistics.served + statistics.failed + statistics.cancelled
            if options.max_calls is not None and calls >= options.max_calls:
                why = f"{calls} calls"
            elif options.max_memory is not None and resident_mib() > options.max_memory:
                why = f"{resident_mib():.0f} MiB"
            else:
                continue
            say(f"after {why} a new worker takes the place of this one (pid {os.getpid()})")
            tell(Word.recycled)
            os.kill(os.getpid(), signal.SIGTERM)
            return


def resident_mib() -> float:
    """Return the memory that this process takes, in MiB; where that isn't told, the most so far."""
    import resource  # not on every platform

    with suppress(OSError):
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * resource.getpagesize() / _MIB
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / _MIB if sys.platform == "darwin" else peak / 1024


def say(text: str) -> None:
    """Write a line for who looks."""
    sys.stderr.write(f"anyio-kkrpc: {text}\n")
    sys.stderr.flush()


def _tell_parent(what: Word | Report) -> None:
    line = what.value.encode() if isinstance(what, Word) else msgspec.json.encode(what)
    with suppress(OSError):  # it is gone, which ends this worker, too
        os.write(0, line + b"\n")


def _be_supervised() -> int:
    with os.fdopen(0, "rb", buffering=0, closefd=False) as parent:
        options = msgspec.json.decode(parent.readline(), type=Options)
    worker = _Worker(options, _tell_parent)
    try:
        worker.prepare()
    except (Exception, SystemExit) as exc:
        _tell_parent(Word.refused)
        return _failed(exc, options)
    try:
        worker.serve()
    except Exception as exc:
        if isinstance(exc, TransportConnectionError):
            _tell_parent(Word.unreachable)
        return _failed(exc, options)
    return 0


def _failed(exc: BaseException, options: Options) -> int:
    if options.debug:
        traceback.print_exc()
    error = exc if isinstance(exc, Exception) else ImportError(f"{options.target}: {exc!r}")
    return max(report(error), 1)


if __name__ == "__main__":
    sys.exit(_be_supervised())
