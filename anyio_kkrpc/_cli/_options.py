"""The options of the commands, each in one place, with its name in the environment."""

from __future__ import annotations

from enum import Enum
from typing import Annotated

import typer


class Backend(str, Enum):
    """Event loops that a worker can run on."""

    asyncio = "asyncio"
    uvloop = "uvloop"
    trio = "trio"


Url = Annotated[
    str,
    typer.Option(
        envvar="ANYIO_KKRPC_URL",
        help="redis://user:password@host:port/db, rediss:// for TLS, unix:///path, or of several "
        "servers redis+sentinel://host,host/name and redis+cluster://host,host. In the "
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
Shards = Annotated[
    int,
    typer.Option(
        min=1,
        envvar="ANYIO_KKRPC_SHARDS",
        help="Over how many streams this one is spread, as its peers have it.",
    ),
]
DEFAULT_URL = "redis://localhost:6379"
DEFAULT_STREAM = "kkrpc-stream"


class Level(str, Enum):
    """What is worth a line."""

    debug = "debug"
    info = "info"
    warning = "warning"
    error = "error"


Target = Annotated[
    str,
    typer.Argument(
        metavar="MODULE:NAME",
        help="What to expose: an object, a class (made without arguments), or a table from "
        "expose(). MODULE alone exposes the module.",
    ),
]
Group = Annotated[
    str | None,
    typer.Option(
        "--group",
        "-g",
        envvar="ANYIO_KKRPC_GROUP",
        help="Share the calls with the other workers of this consumer group.",
    ),
]
Workers = Annotated[
    int, typer.Option("--workers", "-w", min=1, envvar="ANYIO_KKRPC_WORKERS", help="Processes.")
]
LoopOfWorker = Annotated[
    Backend, typer.Option(envvar="ANYIO_KKRPC_BACKEND", help="The event loop.")
]
Concurrency = Annotated[
    int,
    typer.Option(
        min=1, envvar="ANYIO_KKRPC_CONCURRENCY", help="Calls that run at once in each process."
    ),
]
Grace = Annotated[
    float,
    typer.Option(
        min=0,
        max=1e6,
        envvar="ANYIO_KKRPC_GRACE",
        help="Seconds that running calls have to finish at the end.",
    ),
]
TimeoutOfWorker = Annotated[
    float,
    typer.Option(
        min=0.001,
        max=1e6,
        envvar="ANYIO_KKRPC_TIMEOUT",
        help="Seconds for the calls that handlers make through the worker's own channel.",
    ),
]
Codec = Annotated[
    str,
    typer.Option(envvar="ANYIO_KKRPC_CODEC", help="json or cbor; answers are in the caller's."),
]
MaxLen = Annotated[
    int | None,
    typer.Option(
        min=1, envvar="ANYIO_KKRPC_MAX_LEN", help="Keep about so many entries in the stream."
    ),
]
ClaimIdle = Annotated[
    float,
    typer.Option(
        envvar="ANYIO_KKRPC_CLAIM_IDLE", help="Seconds until a dead worker's call is taken over."
    ),
]
MaxDeliveries = Annotated[
    int,
    typer.Option(
        min=1,
        envvar="ANYIO_KKRPC_MAX_DELIVERIES",
        help="Deliveries until a call becomes a dead letter.",
    ),
]
Middlewares = Annotated[
    list[str] | None,
    typer.Option(
        "--middleware",
        metavar="MODULE:NAME",
        envvar="ANYIO_KKRPC_MIDDLEWARE",
        help="A function around each call; the first one is the outermost. In the environment they "
        "are divided by spaces.",
    ),
]
Tracing = Annotated[
    bool,
    typer.Option(
        "--tracing",
        envvar="ANYIO_KKRPC_TRACING",
        help="Spans and metrics by OpenTelemetry, as its own environment variables say.",
    ),
]
AccessLog = Annotated[
    bool,
    typer.Option("--access-log", envvar="ANYIO_KKRPC_ACCESS_LOG", help="A line for each call."),
]
LogLevel = Annotated[
    Level | None,
    typer.Option(
        envvar="ANYIO_KKRPC_LOG_LEVEL",
        help="Log to standard error, from this level on. Without it Python's default holds: "
        "warnings and errors, without time and name.",
    ),
]
SendTracebacks = Annotated[
    bool,
    typer.Option(
        "--send-tracebacks",
        envvar="ANYIO_KKRPC_SEND_TRACEBACKS",
        help="Errors carry the handler's traceback to the caller.",
    ),
]
MaxCalls = Annotated[
    int | None,
    typer.Option(
        min=1,
        envvar="ANYIO_KKRPC_MAX_CALLS",
        help="Exchange a process for a new one after so many calls.",
    ),
]
MaxMemory = Annotated[
    int | None,
    typer.Option(
        min=1,
        envvar="ANYIO_KKRPC_MAX_MEMORY",
        help="Exchange a process for a new one when it takes more than so many MiB.",
    ),
]
Reload = Annotated[
    bool,
    typer.Option(
        "--reload",
        envvar="ANYIO_KKRPC_RELOAD",
        help="Start anew when a Python file below here changes.",
    ),
]
Http = Annotated[
    str | None,
    typer.Option(
        metavar="HOST:PORT",
        envvar="ANYIO_KKRPC_HTTP",
        help="Answer /healthz, /readyz and /metrics (Prometheus) there. Without a host it is the "
        "loopback interface.",
    ),
]
TimeoutOfCall = Annotated[
    float,
    typer.Option(
        "--timeout",
        "-t",
        min=0.001,
        max=1e6,
        help="Seconds for the answer, and for each item of a stream.",
    ),
]
Method = Annotated[str, typer.Argument(help="Dotted name, such as math.add.")]
Arguments = Annotated[
    list[str] | None,
    typer.Argument(help="JSON each; what isn't JSON is text. 1 is a number, '\"1\"' text."),
]
Kwargs = Annotated[
    list[str] | None,
    typer.Option("--kwarg", "-k", metavar="NAME=JSON", help="An argument by name."),
]
To = Annotated[str | None, typer.Option(help="Id of the peer that is to answer.")]
Reply = Annotated[bool, typer.Option("--reply/--no-reply", help="Whether to wait for the answer.")]
Get = Annotated[bool, typer.Option("--get", help="Read a property.")]
CodecOfCall = Annotated[str, typer.Option(help="json or cbor.")]
Dialect = Annotated[str, typer.Option(help="native, kkrpc-2 or kkrpc-0.")]
GroupOfKeys = Annotated[
    str,
    typer.Option(
        "--group",
        "-g",
        envvar="ANYIO_KKRPC_GROUP",
        help="The consumer group whose workers run calls with keys.",
    ),
]
Key = Annotated[
    str | None,
    typer.Option(help="Run it once while its result is kept, and wait for that of the first."),
]
Keep = Annotated[
    float | None,
    typer.Option(help="Seconds for which its result is kept; an hour if not given."),
]
Start = Annotated[
    bool, typer.Option("--start", help="With --key: don't wait; see anyio-kkrpc attach.")
]
TheKey = Annotated[str, typer.Argument(metavar="KEY", help="What the call was given as --key.")]
Progress = Annotated[bool, typer.Option("--progress", help="Print how far it comes, too.")]
State = Annotated[bool, typer.Option("--state", help="Print what is known of it, and end.")]
CancelCall = Annotated[bool, typer.Option("--cancel", help="Cancel it, and end.")]
Forget = Annotated[bool, typer.Option("--forget", help="Keep its result no longer, and end.")]
DEFAULT_GROUP = "kkrpc-group"
