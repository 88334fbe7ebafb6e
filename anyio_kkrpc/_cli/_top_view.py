"""How ``top`` shows what it has found: what needs attention, the groups, their workers.

The live view fits the screen. Where there is more, the rows that matter most are chosen, and shown
in the order of their names still, so that they don't jump from one look to the next.
"""

from __future__ import annotations

import shlex
import time
from collections.abc import Iterable, Sequence

from msgspec import Struct
from rich.console import Console, ConsoleOptions, RenderResult
from rich.text import Text

from .._runtime._log import quoted
from ._top_look import GroupLook, KeyedCall, StreamLook, Worker
from ._top_shards import with_totals
from ._top_table import age, choose, number, plural, rate, table

# Seconds from which an unfinished request is called old, and a worker silent. One that lives
# says so each 15 seconds at the latest.
OLD = SILENT = 60.0
_GROUP_HEADS = (
    "stream", "group", "waiting", "running", "oldest", "written", "taken", "workers", "dead",
    "entries",
)  # fmt: skip
_CALL_HEADS = ("key", "stream", "group", "worker", "for", "attempt")
_WORKER_HEADS = ("worker", "stream", "group", "state", "holds", "idle")
_RED, _YELLOW = "bold white on red", "black on yellow"


class Notice(Struct):
    """Something that needs attention."""

    word: str
    text: str
    style: str


class Frame(Struct):
    """One look.

    :ivar before: the look before, for the rates
    :ivar seconds: how long ago that was
    :ivar at: when it was made, in seconds since the epoch
    :ivar trouble: why the server couldn't be asked since
    :ivar searching: whether there may be streams that haven't been found yet
    """

    title: str
    streams: list[StreamLook]
    before: dict[str, StreamLook] = {}
    seconds: float = 0.0
    at: float = 0.0
    trouble: str | None = None
    searching: bool = False

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield from self.draw(options.max_width, None)

    def draw(self, width: int, height: int | None) -> RenderResult:
        """Draw it in so many columns and lines; in as many lines as it needs, if ``None``."""
        clock = time.strftime("%H:%M:%S", time.localtime(self.at))
        head = Text(no_wrap=True, overflow="ellipsis")
        head.append(quoted(self.title), "bold").append(f"  {clock}", "dim")
        if self.searching:
            head.append("  still looking for streams", "dim italic")
        yield head
        notices = self._notices()
        most = len(notices) if height is None else max(height // 4, 1)
        yield from _notice_lines(notices, most)
        if not self.streams:
            yield Text("" if self.searching or self.trouble else "no streams of anyio_kkrpc yet")
            return
        rows = [row for stream in with_totals(self.streams) for row in _rows(stream)]
        workers = [(row, worker) for row in rows for worker in row.workers]
        delayed = sum(stream.delayed for stream in self.streams)
        calls = [(row, call) for row in rows if row.group for call in row.group.keyed]
        first, second, third = len(rows), len(workers), len(calls)
        if height is not None:
            # Five lines are title, headings and space; each table may need one to say what is left.
            left = max(height - 5 - min(max(len(notices), 1), most + 1), 4)
            third = min(third, left // 4)
            left -= (third + 3 if third else 0) + bool(delayed)
            first = min(len(rows), max(left - second, left // 2))
            second = left - first
        yield Text()
        yield from self._groups(rows, first, width)
        if workers:
            yield Text()
            yield from _workers(workers, second, width)
        if third:
            yield Text()
            yield from _calls(calls, third, width)
        if delayed:
            yield Text(f"{plural(delayed, 'call')} with a key to begin later", style="italic")

    def _notices(self) -> list[Notice]:
        found = [notice for stream in self.streams for notice in _notices(stream)]
        found.sort(key=lambda notice: notice.style != _RED)
        if self.trouble is not None:
            found.insert(0, Notice("NOT REACHABLE", self.trouble, _RED))
        return found

    def _groups(self, rows: list[_Row], most: int, width: int) -> RenderResult:
        shown, hidden = choose(rows, most, _Row.importance)
        lines: list[list[Text]] = []
        last: StreamLook | None = None
        before = {stream.name: stream for stream in with_totals(self.before.values())}
        for row in shown:
            stream, old = row.stream, before.get(row.stream.name)
            cells = [Text()] * len(_GROUP_HEADS)
            if stream is not last:
                cells[0] = Text(quoted(stream.name))
                written = rate(stream.written, old.written if old else None, self.seconds)
                cells[5] = Text(written)
                cells[8] = Text(number(stream.dead), _RED if stream.dead else "")
                cells[9] = Text(f"{stream.length:,}")
                last = stream
            if row.group is None:
                cells[1] = Text("no group", style="dim")
            else:
                cells[1:5], cells[6:8] = row.cells(), self._work(old, row.group)
            lines.append(cells)
        yield table(_GROUP_HEADS, lines, 2, width, ("entries", "written", "taken", "workers"))
        if hidden:
            waiting = sum(row.group.waiting or 0 for row in hidden if row.group and not row.total)
            yield Text(f"and {len(hidden):,} more, where {waiting:,} wait", style="italic")

    def _work(self, old: StreamLook | None, group: GroupLook) -> list[Text]:
        then = next((g for g in old.groups if g.name == group.name), None) if old else None
        taken = Text(rate(group.taken, then.taken if then else None, self.seconds))
        count = len(group.workers)
        return [taken, Text(f"{count:,}", style=_RED if group.some_wait and not count else "")]


class Fitted(Struct):
    """A look that fits the terminal, as large as that is when it is drawn."""

    frame: Frame

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        # The options have no height below Rich's own containers.
        yield from self.frame.draw(*console.size)


class _Row(Struct):
    """A line about a group, or a stream that has none."""

    stream: StreamLook
    group: GroupLook | None

    @property
    def total(self) -> bool:
        return self.stream.total

    @property
    def name(self) -> str:
        return self.group.name if self.group else ""

    @property
    def workers(self) -> list[Worker]:
        return self.group.workers if self.group and not self.total else []

    def importance(self) -> tuple[float, ...]:
        red = any(notice.style == _RED for notice in _group_notices(self.stream, self.group))
        if self.group is None:
            return red, bool(self.stream.dead), 0, 0, 0
        waiting = 1 if self.group.waiting is None else self.group.waiting
        old = (self.group.oldest or 0) >= OLD
        return red, bool(self.stream.dead), old, waiting, self.group.running

    def cells(self) -> list[Text]:
        group = self.group
        assert group is not None
        waiting = "some" if group.waiting is None and group.some_wait else number(group.waiting)
        old = group.oldest is not None and group.oldest >= OLD
        return [
            Text(quoted(group.name)),
            Text(waiting, style=_RED if group.some_wait and not _alive(group) else ""),
            Text(f"{group.running:,}"),
            Text("-" if group.oldest is None else age(group.oldest), style=_YELLOW if old else ""),
        ]


def _rows(stream: StreamLook) -> list[_Row]:
    return [_Row(stream, group) for group in stream.groups] or [_Row(stream, None)]


def _alive(group: GroupLook) -> bool:
    return any(worker.idle < SILENT for worker in group.workers)


def _notices(stream: StreamLook) -> Iterable[Notice]:
    name = quoted(stream.name)
    if stream.error is not None:
        yield Notice("NOT READABLE", f"{name}: {stream.error}", _RED)
    if stream.dead:
        text = f"{name}: {stream.dead:,}  (anyio-kkrpc dead list -s {shlex.quote(name)})"
        yield Notice("DEAD LETTERS", text, _RED)
    for group in stream.groups:
        yield from _group_notices(stream, group)


def _group_notices(stream: StreamLook, group: GroupLook | None) -> Iterable[Notice]:
    if group is None:
        return
    name = f"{quoted(stream.name)}, {quoted(group.name)}"
    if group.some_wait and not _alive(group):
        many = "some" if group.waiting is None else f"{group.waiting:,}"
        age_text = f", the oldest for {age(group.oldest)}" if group.oldest is not None else ""
        yield Notice("NO WORKER", f"{name}: {many} waiting{age_text}", _RED)
    elif group.oldest is not None and group.oldest >= OLD:
        text = f"{name}: the oldest request is unfinished after {age(group.oldest)}"
        yield Notice("OLD", text, _YELLOW)
    silent = [worker for worker in group.workers if worker.holds and worker.idle >= SILENT]
    if silent:
        held = sum(worker.holds for worker in silent)
        text = f"{name}: {held:,} held by {plural(len(silent), 'worker')} not heard of for "
        longest = max(worker.idle for worker in silent)
        yield Notice("SILENT", f"{text}{age(longest)}", _YELLOW)


def _notice_lines(notices: Sequence[Notice], most: int) -> RenderResult:
    if not notices:
        yield Text("nothing needs attention", style="green")
    size = max((len(notice.word) for notice in notices[:most]), default=0)
    for notice in notices[:most]:
        line = Text(no_wrap=True, overflow="ellipsis")
        yield line.append(f" {notice.word:<{size}} ", notice.style).append(
            f" {quoted(notice.text)}"
        )
    if len(notices) > most:
        yield Text(f"and {len(notices) - most:,} more of these", style="italic")


def _worker_importance(pair: tuple[_Row, Worker]) -> tuple[float, ...]:
    worker = pair[1]
    return worker.holds > 0 and worker.idle >= SILENT, worker.holds, worker.idle


def _calls(calls: list[tuple[_Row, KeyedCall]], most: int, width: int) -> RenderResult:
    """Show the calls with keys that workers have, of which not all may have been looked at."""
    shown, hidden = choose(calls, most, lambda one: (one[1].attempt, one[1].since))
    lines = [
        [
            *(Text(quoted(name)) for name in (call.key, row.stream.name, row.name, call.worker)),
            Text(age(call.since)),
            Text(f"{call.attempt:,}", style=_YELLOW if call.attempt > 1 else ""),
        ]
        for row, call in shown
    ]
    yield table(_CALL_HEADS, lines, 4, width, ())
    if hidden:
        yield Text(f"and {plural(len(hidden), 'more call')} with keys", style="italic")


def _workers(workers: list[tuple[_Row, Worker]], most: int, width: int) -> RenderResult:
    shown, hidden = choose(workers, most, _worker_importance)
    lines = []
    last: _Row | None = None
    for row, worker in shown:
        assert row.group is not None
        silent = worker.idle >= SILENT
        state = "silent" if silent else "busy" if worker.holds else "free"
        style = "dim" if state == "free" else _YELLOW if silent and worker.holds else ""
        first = row is not last
        lines.append(
            [
                Text(quoted(worker.name)),
                Text(quoted(row.stream.name) if first else ""),
                Text(quoted(row.group.name) if first else ""),
                Text(state, style=style),
                Text(f"{worker.holds:,}"),
                Text(age(worker.idle)),
            ]
        )
        last = row
    yield table(_WORKER_HEADS, lines, 3, width, ())
    if hidden:
        held = sum(worker.holds for _, worker in hidden)
        text = f"and {plural(len(hidden), 'more worker')}, holding {held:,}"
        yield Text(text, style="italic")
