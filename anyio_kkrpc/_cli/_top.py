"""``anyio-kkrpc top``: a live view of streams, their groups and workers.

It asks by redis-py's blocking client, since nothing else goes on in the process.
"""

from __future__ import annotations

import time
from typing import Any

import redis
from msgspec import Struct
from redis.exceptions import RedisError, ResponseError
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from ..redis._address import Address
from ..redis._keys import Keys

# Seconds after which it looks for new streams.
SEARCH_INTERVAL = 5.0


class GroupView(Struct):
    """A consumer group at one moment.

    :ivar lag: requests that nobody has taken, ``None`` where the server can't tell
    :ivar read: requests taken since the stream began, ``None`` where the server can't tell
    :ivar consumers: name, requests held, seconds since it last did something
    """

    name: str
    pending: int
    lag: int | None
    read: int | None
    consumers: list[tuple[str, int, float]]


class StreamView(Struct):
    """A stream at one moment.

    :ivar added: requests written since the stream began, ``None`` where the server can't tell
    """

    name: str
    length: int
    added: int | None
    dead: int
    groups: list[GroupView]


def find_streams(client: redis.Redis) -> list[str]:
    """Return the streams of requests: those that have a control stream or dead letters."""
    found = {key.decode(errors="replace") for key in client.scan_iter(count=1000, _type="stream")}
    return sorted(
        name
        for name in found
        if ":inbox:" not in name and found & {k.decode() for k in _side_keys(name)}
    )


def _side_keys(name: str) -> tuple[bytes, bytes]:
    keys = Keys.of(name)
    return keys.control, keys.dead


def look(client: redis.Redis, name: str) -> StreamView:
    """Return a stream as it is now."""
    dead = int(client.xlen(Keys.of(name).dead))
    try:
        info: dict[str, Any] = client.xinfo_stream(name)
        groups: list[dict[str, Any]] = client.xinfo_groups(name)
        views = []
        for group in groups:
            consumers = [
                (_text(c["name"]), int(c["pending"]), int(c["idle"]) / 1000)
                for c in client.xinfo_consumers(name, group["name"])
            ]
            views.append(
                GroupView(
                    _text(group["name"]),
                    int(group["pending"]),
                    group.get("lag"),
                    group.get("entries-read"),
                    sorted(consumers),
                )
            )
    except ResponseError as exc:
        if "no such key" in str(exc).lower():
            return StreamView(name, 0, 0, dead, [])
        raise
    return StreamView(name, int(info["length"]), info.get("entries-added"), dead, views)


def _text(value: Any) -> str:
    return value.decode(errors="replace") if isinstance(value, bytes) else str(value)


def _number(value: int | None) -> str:
    return "?" if value is None else f"{value:,}"


def _rate(now: int | None, before: int | None, seconds: float) -> str:
    if now is None or before is None or seconds <= 0:
        return "-"
    return f"{max(now - before, 0) / seconds:,.0f}/s"


def render(
    views: list[StreamView], before: dict[str, StreamView], seconds: float, title: str
) -> RenderableType:
    """Return the tables for one look."""
    if not views:
        return Text(f"{title}: no streams of anyio_kkrpc yet")
    streams = Table(title=title, title_justify="left", expand=False)
    for column in ("stream", "entries", "written", "groups", "dead letters"):
        streams.add_column(column, justify="left" if column == "stream" else "right")
    groups = Table()
    for column in ("stream", "group", "waiting", "running", "taken", "worker", "holds", "idle"):
        left = column in ("stream", "group", "worker")
        groups.add_column(column, justify="left" if left else "right")
    for view in views:
        old = before.get(view.name)
        streams.add_row(
            view.name,
            _number(view.length),
            _rate(view.added, old.added if old else None, seconds),
            str(len(view.groups)),
            Text(_number(view.dead), style="bold red" if view.dead else ""),
        )
        olds = {group.name: group for group in old.groups} if old else {}
        for group in view.groups:
            then = olds.get(group.name)
            head = (
                view.name,
                group.name,
                _number(group.lag),
                _number(group.pending),
                _rate(group.read, then.read if then else None, seconds),
            )
            for name, holds, idle in group.consumers or [("no worker", 0, 0.0)]:
                worker = (name, str(holds), f"{idle:.1f} s")
                groups.add_row(*head, *(worker if group.consumers else (name, "", "")))
                head = ("", "", "", "", "")
    return Group(streams, groups) if groups.row_count else streams


class _Watch:
    def __init__(self, client: redis.Redis, stream: str | None, title: str) -> None:
        self._client = client
        self._only = stream
        self._title = title
        self._names: list[str] = []
        self._searched = float("-inf")
        self._before: dict[str, StreamView] = {}
        self._when = time.monotonic()

    def frame(self) -> RenderableType:
        """Look once."""
        now = time.monotonic()
        if self._only is not None:
            self._names = [self._only]
        elif now - self._searched > SEARCH_INTERVAL:
            self._names, self._searched = find_streams(self._client), now
        views = [look(self._client, name) for name in self._names]
        shown = render(views, self._before, now - self._when, self._title)
        self._before, self._when = {view.name: view for view in views}, now
        return shown


def run(url: str, stream: str | None, interval: float, *, once: bool) -> None:
    """Show it until interrupted.

    :raises TransportConnectionError: if the server can't be reached
    """
    address = Address.parse(url)
    console = Console()
    client = redis.Redis.from_url(url, socket_connect_timeout=5, socket_timeout=10)
    try:
        watch = _Watch(client, stream, f"anyio-kkrpc top - {address}")
        if once:
            console.print(watch.frame())
            return
        with Live(watch.frame(), console=console, screen=console.is_terminal) as live:
            while True:
                time.sleep(interval)
                live.update(watch.frame(), refresh=True)
    except RedisError as exc:
        raise address.cannot_connect(exc) from exc
    finally:
        client.close()
