"""The command line: ``anyio-kkrpc demo``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import anyio


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; return its exit code."""
    parser = argparse.ArgumentParser(
        prog="anyio-kkrpc", description="Bidirectional RPC over Redis Streams, on AnyIO."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    demo = commands.add_parser(
        "demo",
        help="start a server, two workers, a subscriber and a client, and show what they do",
        description="Starts a Redis or Valkey server of its own (one on PATH, else the embedded "
        "one), two worker processes in a consumer group, a subscriber and a client. Ends by "
        "itself in seconds and leaves nothing behind.",
    )
    demo.add_argument("--url", help="use this server: redis://user:password@host:port/db")
    demo.add_argument("--backend", choices=("asyncio", "trio"), default="asyncio")
    options = parser.parse_args(argv)
    try:
        from . import _demo
        from ._exceptions import RPCError
        from .testing import ServerError
    except ImportError as exc:
        return _fail(f'{exc.name or exc} is missing: pip install "anyio_kkrpc[demo]"')
    try:
        anyio.run(_demo.run, options.url, options.backend, backend=options.backend)
    except (RPCError, ServerError, ValueError, LookupError) as exc:
        return _fail(str(exc))
    except KeyboardInterrupt:
        return 130
    return 0


def _fail(text: str) -> int:
    sys.stderr.write(f"anyio-kkrpc: {text}\n")
    return 1


if __name__ == "__main__":
    sys.exit(main())
