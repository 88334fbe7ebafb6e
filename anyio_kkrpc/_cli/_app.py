"""The commands and their options; what they do stands in the modules beside this one."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Sequence
from enum import Enum
from functools import partial
from typing import Annotated, Any

import anyio
import typer

from .._exceptions import (
    DeliveryError,
    MethodNotFoundError,
    OverloadedError,
    RemoteError,
    RPCError,
    RPCTimeoutError,
    RPCValidationError,
    TransportClosedError,
    TransportConnectionError,
)
from .._log import quoted
from ..testing import ServerError
from . import _call, _dead, _serve, _server, _top
from ._terminal import ends_on_sigterm

# Exit codes beside 0, 2 (wrong usage) and 130 (interrupted).
EXIT_CODES: dict[type[Exception], int] = {
    RemoteError: 1,
    MethodNotFoundError: 3,
    RPCValidationError: 3,
    OverloadedError: 3,
    RPCTimeoutError: 4,
    TransportConnectionError: 5,
    TransportClosedError: 5,
    DeliveryError: 5,
}
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


class Backend(str, Enum):
    """Event loops that a worker can run on."""

    asyncio = "asyncio"
    uvloop = "uvloop"
    trio = "trio"


Url = Annotated[
    str,
    typer.Option(
        envvar="ANYIO_KKRPC_URL",
        help="redis://user:password@host:port/db, rediss:// for TLS, or unix:///path. In the "
        "environment a password isn't seen by who lists processes.",
        show_envvar=True,
    ),
]
Stream = Annotated[
    str, typer.Option("--stream", "-s", envvar="ANYIO_KKRPC_STREAM", help="The stream of requests.")
]
SigningKey = Annotated[
    str | None,
    typer.Option(
        envvar="ANYIO_KKRPC_SIGNING_KEY",
        help="The secret that entries are signed with, if the stream's peers have one. Better in "
        "the environment, where it isn't seen by who lists processes.",
        show_envvar=True,
    ),
]
DEFAULT_URL = "redis://localhost:6379"
DEFAULT_STREAM = "kkrpc-stream"


@app.callback()
def common(
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks of errors.")] = False,
) -> None:
    """Bidirectional RPC over Redis Streams: serve an object, call it, and look at what goes on."""


@app.command()
def serve(
    target: Annotated[
        str,
        typer.Argument(
            metavar="MODULE:NAME",
            help="What to expose: an object, a class (made without arguments), or a table from "
            "expose(). MODULE alone exposes the module.",
        ),
    ],
    url: Url = DEFAULT_URL,
    stream: Stream = DEFAULT_STREAM,
    group: Annotated[
        str | None,
        typer.Option(
            "--group", "-g", help="Share the calls with the other workers of this consumer group."
        ),
    ] = None,
    workers: Annotated[int, typer.Option("--workers", "-w", min=1, help="Processes.")] = 1,
    backend: Annotated[Backend, typer.Option(help="The event loop.")] = Backend.asyncio,
    concurrency: Annotated[
        int, typer.Option(min=1, help="Calls that run at once in each process.")
    ] = 100,
    grace: Annotated[
        float,
        typer.Option(min=0, max=1e6, help="Seconds that running calls have to finish at the end."),
    ] = 10.0,
    codec: Annotated[str, typer.Option(help="json or cbor; answers are in the caller's.")] = "json",
    max_len: Annotated[
        int | None, typer.Option(min=1, help="Keep about so many entries in the stream.")
    ] = None,
    claim_idle: Annotated[
        float, typer.Option(help="Seconds until a dead worker's call is taken over.")
    ] = 30.0,
    max_deliveries: Annotated[
        int, typer.Option(min=1, help="Deliveries until a call becomes a dead letter.")
    ] = 5,
    signing_key: SigningKey = None,
    reload: Annotated[
        bool, typer.Option("--reload", help="Start anew when a Python file below here changes.")
    ] = False,
) -> None:
    """Serve an object, in one process or several.

    SIGTERM and SIGINT end it in good order: calls that run have --grace seconds to finish, and what
    was not begun goes back to the group. A worker process that dies is started again.

    Example: anyio-kkrpc serve shop.api:Api --group workers --workers 4 --backend trio
    """
    if group == "":
        raise typer.BadParameter("needs a name", param_hint="--group")
    if workers > 1 and group is None:
        raise typer.BadParameter(
            "needs --group when above 1: without one each process would run each call",
            param_hint="--workers",
        )
    options = _serve.Options(
        target=target,
        url=url,
        stream=stream,
        group=group,
        backend=backend.value,
        concurrency=concurrency,
        grace=grace,
        debug="--debug" in sys.argv,
        codec=codec,
        max_len=max_len,
        claim_idle=claim_idle,
        max_deliveries=max_deliveries,
        signing_key=_encoded(signing_key),
    )
    _serve.check(options)
    if workers == 1 and not reload:
        _serve.run(options)
    else:
        anyio.run(partial(_serve.supervise, options, workers, reload=reload))


@app.command()
def call(
    method: Annotated[str, typer.Argument(help="Dotted name, such as math.add.")],
    arguments: Annotated[
        list[str] | None,
        typer.Argument(help="JSON each; what isn't JSON is text. 1 is a number, '\"1\"' text."),
    ] = None,
    kwargs: Annotated[
        list[str] | None,
        typer.Option("--kwarg", "-k", metavar="NAME=JSON", help="An argument by name."),
    ] = None,
    url: Url = DEFAULT_URL,
    stream: Stream = DEFAULT_STREAM,
    timeout: Annotated[
        float,
        typer.Option(
            "--timeout",
            "-t",
            min=0.001,
            max=1e6,
            help="Seconds for the answer, and for each item of a stream.",
        ),
    ] = 30.0,
    to: Annotated[str | None, typer.Option(help="Id of the peer that is to answer.")] = None,
    reply: Annotated[
        bool, typer.Option("--reply/--no-reply", help="Whether to wait for the answer.")
    ] = True,
    get: Annotated[bool, typer.Option("--get", help="Read a property.")] = False,
    codec: Annotated[str, typer.Option(help="json or cbor.")] = "json",
    dialect: Annotated[str, typer.Option(help="native, kkrpc-2 or kkrpc-0.")] = "native",
    signing_key: SigningKey = None,
) -> None:
    """Call a function and print its result as a line of JSON; a stream as a line for each item.

    Example: anyio-kkrpc call math.add 1 2

    Text and objects: anyio-kkrpc call order '{"item": "tea"}' gift -k note='"for Ada"' -t 5

    The first lines of a stream, which ends it: anyio-kkrpc call count_to 1000000 | head -3
    """
    if get and (arguments or kwargs):
        raise typer.BadParameter("a property takes no arguments", param_hint="--get")
    request = _call.Request(
        method=method,
        args=[_call.parse_argument(text) for text in arguments or ()],
        kwargs=dict(_parse_kwarg(text) for text in kwargs or ()),
        timeout=timeout,
        to=to,
        reply=reply,
        get=get,
    )
    try:
        anyio.run(
            partial(
                _call.make,
                request,
                url,
                stream=stream,
                codec=codec,
                dialect=dialect,
                signing_key=_encoded(signing_key),
            )
        )
    except BrokenPipeError:  # who reads, such as head, has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _encoded(key: str | None) -> bytes | None:
    return None if key is None else key.encode()


def _parse_kwarg(text: str) -> tuple[str, Any]:
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
    interval: Annotated[float, typer.Option(min=0.1, help="Seconds between two looks.")] = 1.0,
    once: Annotated[bool, typer.Option("--once", help="Print one look, and end.")] = False,
) -> None:
    """Watch streams: groups, waiting and running calls, workers, rates, dead letters.

    Ctrl-C, q or SIGTERM ends it, with exit code 0. When the server goes away it says so, and goes
    on when the server is there again. Where output is no terminal, one look follows the other.

    It reads only. Rates and the number of waiting calls need Redis 7 or Valkey.
    """
    _top.run(url, stream, interval, once=once)


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
    from . import _demo

    name, loop = _serve.BACKENDS[backend.value]
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
    _server.run(port)


@dead.command("list")
def dead_list(
    url: Url = DEFAULT_URL,
    stream: Stream = DEFAULT_STREAM,
    as_json: Annotated[bool, typer.Option("--json", help="A line of JSON for each.")] = False,
) -> None:
    """List the dead letters, the oldest first."""
    anyio.run(partial(_dead.show_all, url, stream, as_json=as_json))


@dead.command("show")
def dead_show(
    letter: Annotated[str, typer.Argument(metavar="ID", help="Its id among the dead letters.")],
    url: Url = DEFAULT_URL,
    stream: Stream = DEFAULT_STREAM,
) -> None:
    """Show one with its arguments, as JSON."""
    anyio.run(_dead.show_one, url, stream, letter)


@dead.command("retry")
def dead_retry(
    letters: Annotated[
        list[str] | None, typer.Argument(metavar="ID...", help="Their ids among the dead letters.")
    ] = None,
    url: Url = DEFAULT_URL,
    stream: Stream = DEFAULT_STREAM,
    every: Annotated[bool, typer.Option("--all", help="All of them.")] = False,
    signing_key: SigningKey = None,
) -> None:
    """Put dead letters back into the stream as new requests."""
    if every == bool(letters):
        raise typer.BadParameter("give ids, or --all", param_hint="ID")
    anyio.run(_dead.retry, url, stream, letters, _encoded(signing_key))


@dead.command("purge")
def dead_purge(
    url: Url = DEFAULT_URL,
    stream: Stream = DEFAULT_STREAM,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Don't ask.")] = False,
) -> None:
    """Remove all dead letters for good."""
    if not yes:
        if not sys.stdin.isatty():
            raise typer.BadParameter("is needed where nobody can be asked", param_hint="--yes")
        typer.confirm(f"Remove all dead letters of {stream}?", abort=True)
    anyio.run(_dead.purge, url, stream)


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


def report(exc: Exception) -> int:
    """Write one line about an error; return the exit code."""
    text, code = str(exc), 1
    usage = getattr(exc, "format_message", None)  # typer's errors have no public base class
    if usage is not None:
        text, code = f"{usage()} (--help tells more)", 2
        if re.search(r"No such option: -\.?\d", text):
            text = text.replace("--help", "put -- before what begins with a dash; --help")
        if type(exc).__name__ == "NoArgsIsHelpError":  # the help has been printed
            return 2
    elif isinstance(exc, RPCError):
        code = next((code for kind, code in EXIT_CODES.items() if isinstance(exc, kind)), 1)
    elif isinstance(exc, (ValueError, TypeError, LookupError, ImportError)):
        code = 2
    elif not isinstance(exc, (ServerError, OSError, _serve.WorkerError)):
        text = f"{type(exc).__name__}: {text} (--debug shows where)"
    line = quoted(" ".join(text.split()))
    sys.stderr.write(f"anyio-kkrpc: {line}\n")
    return code
