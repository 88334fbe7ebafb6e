"""The commands and their options; what they do stands in the modules beside this one.

Those are imported by the command that needs them, so that ``--help`` is there at once.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from functools import partial
from typing import Annotated, Any

import anyio
import typer

from .. import __version__
from ._attaching import attach
from ._options import (
    DEFAULT_GROUP,
    DEFAULT_STREAM,
    DEFAULT_URL,
    AccessLog,
    Arguments,
    Backend,
    ClaimIdle,
    Codec,
    CodecOfCall,
    Concurrency,
    Dialect,
    Get,
    Grace,
    Group,
    GroupOfKeys,
    Http,
    Keep,
    Key,
    Kwargs,
    LogLevel,
    LoopOfWorker,
    MaxCalls,
    MaxDeliveries,
    MaxLen,
    MaxMemory,
    Method,
    Middlewares,
    Reload,
    Reply,
    SendTracebacks,
    Shards,
    SigningKey,
    Start,
    Stream,
    Target,
    TimeoutOfCall,
    TimeoutOfWorker,
    To,
    Tracing,
    Url,
    Workers,
)
from ._report import report
from ._terminal import ends_on_sigterm

EPILOG = (
    "Exit codes: 0 done, 1 the remote function raised, 2 wrong usage, 3 refused (no such function, "
    "wrong arguments, overloaded), 4 no answer in time, 5 no connection or not deliverable, "
    "130 interrupted."
)

app = typer.Typer(
    name="anyio-kkrpc",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog=EPILOG,
)
dead = typer.Typer(
    no_args_is_help=True, help="Look at requests that were given up; try them again."
)
app.add_typer(dead, name="dead")


def _show_version(wanted: bool) -> None:
    if wanted:
        sys.stdout.write(f"anyio-kkrpc {__version__}\n")
        raise typer.Exit


@app.callback()
def common(
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks of errors.")] = False,
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_show_version, is_eager=True, help="Print the version, and end."
        ),
    ] = False,
) -> None:
    """Bidirectional RPC over Redis Streams: serve an object, call it, and look at what goes on."""


@app.command()
def serve(
    target: Target,
    url: Url = DEFAULT_URL,
    stream: Stream = DEFAULT_STREAM,
    group: Group = None,
    workers: Workers = 1,
    backend: LoopOfWorker = Backend.asyncio,
    concurrency: Concurrency = 100,
    grace: Grace = 10.0,
    timeout: TimeoutOfWorker = 30.0,
    codec: Codec = "json",
    max_len: MaxLen = None,
    claim_idle: ClaimIdle = 15.0,
    max_deliveries: MaxDeliveries = 5,
    shards: Shards = 1,
    signing_key: SigningKey = None,
    middleware: Middlewares = None,
    tracing: Tracing = False,
    access_log: AccessLog = False,
    log_level: LogLevel = None,
    send_tracebacks: SendTracebacks = False,
    max_calls: MaxCalls = None,
    max_memory: MaxMemory = None,
    http: Http = None,
    reload: Reload = False,
) -> None:
    """Serve an object, in one process or several.

    SIGTERM and SIGINT end it cleanly: calls that run have --grace seconds to finish, and what
    was not begun goes back to the group. SIGHUP has new processes take the place of the present
    ones, one after the other. A worker process that ends, whatever the reason, is started again.

    Each option can be given in the environment: --max-len as ANYIO_KKRPC_MAX_LEN.

    Example: anyio-kkrpc serve shop.api:Api --group workers --workers 4 --backend trio
    """
    given = {**locals(), "backend": backend.value, "signing_key": _encoded(signing_key)}
    _check_group(group, workers, shards)
    at = None if http is None else _address(http)
    from . import _supervisor, _worker

    del given["workers"], given["reload"], given["http"]
    options = _worker.Options(**given, debug="--debug" in sys.argv)
    _worker.check(options)
    if workers > 1 or reload or max_calls is not None or max_memory is not None or http is not None:
        anyio.run(partial(_supervisor.supervise, options, workers, reload=reload, at=at))
    elif _worker.run(options):  # a new process takes the place of this one
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def _check_group(group: str | None, workers: int, shards: int) -> None:
    if group == "":
        raise typer.BadParameter("needs a name", param_hint="--group")
    if workers > 1 and group is None:
        raise typer.BadParameter(
            "needs --group when above 1: without one each process would run each call",
            param_hint="--workers",
        )
    if shards > 1 and group is None:
        raise typer.BadParameter(
            "needs --group when above 1: without one each worker would read all of them",
            param_hint="--shards",
        )


def _address(text: str) -> tuple[str, int]:
    from ._http import parse_address

    try:
        return parse_address(text)
    except ValueError as exc:
        raise typer.BadParameter(str(exc), param_hint="--http") from exc


@app.command()
def check(
    http: Annotated[
        str | None,
        typer.Option(
            metavar="HOST:PORT",
            envvar="ANYIO_KKRPC_HTTP",
            help="Ask the service that was started with this --http.",
        ),
    ] = None,
    live: Annotated[
        bool, typer.Option("--live", help="With --http: only whether the supervisor runs.")
    ] = False,
    url: Url = DEFAULT_URL,
    stream: Stream = DEFAULT_STREAM,
    group: Group = None,
    shards: Shards = 1,
    workers: Annotated[
        int,
        typer.Option("--workers", "-w", min=1, help="How many have to be there, in each shard."),
    ] = 1,
    timeout: Annotated[
        float, typer.Option("--timeout", "-t", min=0.001, max=1e6, help="Seconds to wait.")
    ] = 5.0,
) -> None:
    """Tell whether workers take calls: exit code 0 if they do, 1 if not. For probes.

    With --http it asks the service itself: is there a worker whose event loop runs, that Redis
    answers, and that serves? Without, it asks Redis whether workers of --group are there.

    Example: anyio-kkrpc check --http :9464
    """
    from . import _check

    if http is not None:
        _address(http)
        _check.by_http(http, "/healthz" if live else "/readyz", timeout)
        return
    if live or not group:
        raise typer.BadParameter("is needed, or --http", param_hint="--group")
    _check.by_redis(url, stream, group, shards=shards, workers=workers, timeout=timeout)


@app.command()
def call(
    method: Method,
    arguments: Arguments = None,
    kwargs: Kwargs = None,
    url: Url = DEFAULT_URL,
    stream: Stream = DEFAULT_STREAM,
    timeout: TimeoutOfCall = 30.0,
    to: To = None,
    reply: Reply = True,
    get: Get = False,
    key: Key = None,
    keep: Keep = None,
    start: Start = False,
    group: GroupOfKeys = DEFAULT_GROUP,
    shards: Shards = 1,
    codec: CodecOfCall = "json",
    dialect: Dialect = "native",
    signing_key: SigningKey = None,
) -> None:
    """Call a function and print its result as a line of JSON; a stream as a line for each item.

    Example: anyio-kkrpc call math.add 1 2

    Text and objects: anyio-kkrpc call order '{"item": "tea"}' gift -k note='"for Ada"' -t 5

    The first lines of a stream, which ends it: anyio-kkrpc call count_to 1000000 | head -3
    """
    from . import _call

    if not all(method.split(".")):
        raise typer.BadParameter(f"needs a dotted name, not {method!r}", param_hint="METHOD")
    if start and key is None:
        raise typer.BadParameter("needs --key", param_hint="--start")
    if get and (arguments or kwargs):
        raise typer.BadParameter("a property takes no arguments", param_hint="--get")
    request = _call.Request(
        method=method,
        args=[_call.parse_argument(text) for text in arguments or ()],
        kwargs=dict(_parse_kwarg(text) for text in kwargs or ()),
        timeout=timeout,
        to=to,
        reply=reply and not start,
        get=get,
        key=key,
        keep=keep,
    )
    options: dict[str, Any] = {"stream": stream, "codec": codec, "dialect": dialect}
    options |= {"group": group, "shards": shards, "signing_key": _encoded(signing_key)}
    _call.run(request, url, **options)


app.command()(attach)


def _encoded(key: str | None) -> bytes | None:
    return None if key is None else key.encode()


def _parse_kwarg(text: str) -> tuple[str, Any]:
    from . import _call

    name, equals, value = text.partition("=")
    if not equals or not name:
        raise typer.BadParameter(f"needs NAME=JSON, not {text!r}", param_hint="--kwarg")
    return name, _call.parse_argument(value)


@app.command()
def top(
    url: Url = DEFAULT_URL,
    stream: Annotated[
        str | None, typer.Option("--stream", "-s", help="Only this one; all if not given.")
    ] = None,
    shards: Shards = 1,
    interval: Annotated[float, typer.Option(min=0.1, help="Seconds between two looks.")] = 1.0,
    once: Annotated[bool, typer.Option("--once", help="Print one look, and end.")] = False,
) -> None:
    """Watch streams: groups, waiting and running calls, workers, rates, dead letters.

    Ctrl-C, q or SIGTERM ends it, with exit code 0. When the server goes away it says so, and goes
    on when the server is there again. Where output is no terminal, one look follows the other.

    It reads only. Rates and the number of waiting calls need Redis 7 or Valkey.
    """
    from . import _top

    _top.run(url, stream, shards, interval, once=once)


@app.command()
def demo(
    url: Annotated[
        str | None,
        typer.Option(
            envvar="ANYIO_KKRPC_URL",
            help="Use this server instead of one of its own.",
            show_envvar=True,
        ),
    ] = None,
    backend: Annotated[Backend, typer.Option(help="The event loop.")] = Backend.asyncio,
) -> None:
    """Start a server, two workers, a subscriber and a client, and show what they do.

    The server is a Redis or Valkey on PATH, else the embedded one. It ends by itself in seconds and
    leaves nothing behind.
    """
    from . import _demo, _worker

    name, loop = _worker.BACKENDS[backend.value]
    with ends_on_sigterm():
        anyio.run(_demo.run, url, name, backend=name, backend_options=loop)


@app.command()
def server(
    port: Annotated[
        int, typer.Option("--port", "-p", min=1, max=65535, help="On the loopback interface.")
    ] = 6379,
) -> None:
    """Start a Redis or Valkey server to try things out on. Ctrl-C ends it, and its data are gone.

    It is the redis-server or valkey-server on PATH, else the one of the extra "demo".
    """
    from . import _server

    _server.run(port)


@dead.command("list")
def dead_list(
    url: Url = DEFAULT_URL,
    stream: Stream = DEFAULT_STREAM,
    shards: Shards = 1,
    as_json: Annotated[bool, typer.Option("--json", help="A line of JSON for each.")] = False,
) -> None:
    """List the dead letters, the oldest first."""
    from . import _dead

    anyio.run(partial(_dead.show_all, url, stream, shards, as_json=as_json))


@dead.command("show")
def dead_show(
    letter: Annotated[str, typer.Argument(metavar="ID", help="Its id among the dead letters.")],
    url: Url = DEFAULT_URL,
    stream: Stream = DEFAULT_STREAM,
    shards: Shards = 1,
) -> None:
    """Show one with its arguments, as JSON."""
    from . import _dead

    anyio.run(_dead.show_one, url, stream, shards, letter)


@dead.command("retry")
def dead_retry(
    letters: Annotated[
        list[str] | None, typer.Argument(metavar="ID...", help="Their ids among the dead letters.")
    ] = None,
    url: Url = DEFAULT_URL,
    stream: Stream = DEFAULT_STREAM,
    shards: Shards = 1,
    every: Annotated[bool, typer.Option("--all", help="All of them.")] = False,
    signing_key: SigningKey = None,
) -> None:
    """Put dead letters back into the stream as new requests."""
    if every == bool(letters):
        raise typer.BadParameter("give ids, or --all", param_hint="ID")
    from . import _dead

    anyio.run(_dead.retry, url, stream, shards, letters, _encoded(signing_key))


@dead.command("purge")
def dead_purge(
    letters: Annotated[
        list[str] | None, typer.Argument(metavar="ID...", help="Only these; all if not given.")
    ] = None,
    url: Url = DEFAULT_URL,
    stream: Stream = DEFAULT_STREAM,
    shards: Shards = 1,
    older: Annotated[
        str | None,
        typer.Option(
            "--older", metavar="AGE", help="Only those given up longer ago: 90s, 30m, 12h, 7d."
        ),
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Don't ask.")] = False,
) -> None:
    """Remove dead letters for good: all, some, or old ones."""
    from . import _dead

    if letters and older is not None:
        raise typer.BadParameter("give ids, or --older", param_hint="ID")
    if letters:
        _dead.purge_some(url, stream, shards, letters)
        return
    age = None if older is None else _dead.parse_age(older)
    if not yes:
        if not sys.stdin.isatty():
            raise typer.BadParameter("is needed where nobody can be asked", param_hint="--yes")
        which = "all dead letters" if older is None else f"dead letters older than {older}"
        typer.confirm(f"Remove {which} of {stream}?", abort=True)
    if age is None:
        anyio.run(_dead.purge, url, stream, shards)
    else:
        _dead.purge_older(url, stream, shards, age)


def run(argv: Sequence[str]) -> int:
    """Run a command; return its exit code."""
    arguments = list(argv)
    # Taken anywhere among the options, since it is added when a command has failed.
    end = arguments.index("--") if "--" in arguments else len(arguments)
    debug = "--debug" in arguments[:end]
    arguments = [a for a in arguments[:end] if a != "--debug"] + arguments[end:]
    try:
        code = app(arguments, standalone_mode=False)
    except (KeyboardInterrupt, typer.Abort):
        return 130
    except Exception as exc:
        if debug:
            raise
        return report(exc)
    return code if isinstance(code, int) else 0
