"""The command ``attach`` and its options."""

from __future__ import annotations

from functools import partial
from typing import Any

import anyio
import typer

from ._options import (
    DEFAULT_GROUP,
    DEFAULT_STREAM,
    DEFAULT_URL,
    CancelCall,
    Forget,
    GroupOfKeys,
    Progress,
    Shards,
    SigningKey,
    State,
    Stream,
    TheKey,
    TimeoutOfCall,
    Url,
)


def attach(
    key: TheKey,
    url: Url = DEFAULT_URL,
    stream: Stream = DEFAULT_STREAM,
    group: GroupOfKeys = DEFAULT_GROUP,
    shards: Shards = 1,
    timeout: TimeoutOfCall = 30.0,
    progress: Progress = False,
    state: State = False,
    cancel: CancelCall = False,
    forget: Forget = False,
    signing_key: SigningKey = None,
) -> None:
    """Wait for the result of a call that has a key, and print it; or look at the call, or end it.

    Example: anyio-kkrpc call render doc --key render-17 --start; anyio-kkrpc attach render-17
    """
    from . import _attach

    if state + cancel + forget > 1:
        raise typer.BadParameter("one of --state, --cancel, --forget", param_hint="KEY")
    what: _attach.What = (
        "state" if state else "cancel" if cancel else "forget" if forget else "result"
    )
    options: dict[str, Any] = {"stream": stream, "consumer_group": group, "shards": shards}
    if signing_key is not None:
        options["signing_key"] = signing_key.encode()
    anyio.run(partial(_attach.run, key, url, what, timeout, progress=progress, **options))
