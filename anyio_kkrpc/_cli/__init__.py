"""The command line, ``anyio-kkrpc``. Needs the extra ``cli``."""

from __future__ import annotations

import sys
from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; return its exit code."""
    try:
        from ._app import run
    except ImportError as exc:
        name = exc.name or str(exc)
        sys.stderr.write(f'anyio-kkrpc: {name} is missing: pip install "anyio_kkrpc[cli]"\n')
        return 1
    except KeyboardInterrupt:
        return 130
    return run(sys.argv[1:] if argv is None else argv)
