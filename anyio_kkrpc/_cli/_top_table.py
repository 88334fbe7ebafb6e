"""Tables for ``top`` that fit a width, with names shortened so that they can be told apart."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from rich.cells import cell_len, set_cell_size
from rich.table import Table
from rich.text import Text

T = TypeVar("T")

# Cells of a name below which columns are left out.
_LEAST_NAME = 12


def number(value: int | None) -> str:
    """Return a number, or a question mark where there is none."""
    return "?" if value is None else f"{value:,}"


def plural(count: int, noun: str) -> str:
    """Return how many there are."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def rate(now: int | None, before: int | None, seconds: float) -> str:
    """Return what a counter gained in a second."""
    if now is None or before is None or seconds <= 0:
        return "-"
    gained = max(now - before, 0) / seconds
    return f"{gained:.1f}/s" if 0 < gained < 9.95 else f"{gained:,.0f}/s"


def age(seconds: float) -> str:
    """Return a duration in one unit."""
    for unit, size, least in (("d", 86400, 172800), ("h", 3600, 7200), ("min", 60, 120)):
        if seconds >= least:
            return f"{seconds // size:,.0f} {unit}"
    return f"{seconds:.1f} s" if seconds < 9.95 else f"{seconds:.0f} s"


def choose(
    items: list[T], most: int, importance: Callable[[T], tuple[Any, ...]]
) -> tuple[list[T], list[T]]:
    """Return those that are shown, in their order, and the others.

    :param most: lines that there are, one of which tells how many are not shown
    """
    if len(items) <= most:
        return items, []
    ranked = sorted(range(len(items)), key=lambda n: importance(items[n]), reverse=True)
    chosen = set(ranked[: max(most - 1, 1)])
    return (
        [item for n, item in enumerate(items) if n in chosen],
        [item for n, item in enumerate(items) if n not in chosen],
    )


def shorten(names: Sequence[str], width: int) -> dict[str, str]:
    """Return the names with at most so many cells: different names stay different.

    What is left out is in the middle, if that tells them apart, else where it does.
    """
    wanted = list(dict.fromkeys(names))
    best: dict[str, str] = {}
    for head in ((width - 1) // 2, 0, width - 1):
        found = {name: _cut(name, width, head) for name in wanted}
        if len(set(found.values())) == len(wanted):
            return found
        if len(set(found.values())) > len(set(best.values())):
            best = found
    taken: set[str] = set()
    for name in wanted:
        short, copy = best[name], 1
        while short in taken:
            copy += 1
            mark = f"#{copy}"
            short = set_cell_size(best[name], max(width - len(mark), 0)).rstrip() + mark
        taken.add(short)
        best[name] = short
    return best


def _cut(name: str, width: int, head: int) -> str:
    if cell_len(name) <= width:
        return name
    tail, room = "", width - 1 - head
    for char in reversed(name):
        if cell_len(char) > room:
            break
        tail, room = char + tail, room - cell_len(char)
    return set_cell_size(name, head).rstrip() + "…" + tail


def table(
    heads: Sequence[str],
    rows: Sequence[Sequence[Text]],
    names: int,
    width: int,
    optional: Sequence[str],
) -> Table:
    """Return a table that fits the width.

    :param names: how many columns, from the first, hold names, which may be shortened
    :param optional: heads of columns that may be left out, in this order
    """
    kept = list(range(len(heads)))
    needs = [
        max([cell_len(heads[n]), *(row[n].cell_len for row in rows)]) for n in range(len(heads))
    ]
    least = min(sum(needs[:names]), _LEAST_NAME * names)
    for head in optional:
        if _spare(needs, kept, names, width, 1) >= least:
            break
        kept.remove(heads.index(head))
    gap = 2 if _spare(needs, kept, names, width, 2) >= sum(needs[:names]) else 1
    shares = _share(needs[:names], max(_spare(needs, kept, names, width, gap), names))
    short = [shorten([row[n].plain for row in rows], shares[n]) for n in range(names)]
    shown = Table(box=None, padding=(0, gap, 0, 0), pad_edge=False, header_style="bold dim")
    for n in kept:
        size = shares[n] if n < names else needs[n]
        right = n >= names and heads[n] != "state"
        shown.add_column(
            heads[n], justify="right" if right else "left", width=size, no_wrap=True
        )  # fmt: skip
    for row in rows:
        cells = [Text(short[n][row[n].plain], row[n].style) if n < names else row[n] for n in kept]
        shown.add_row(*cells)
    return shown


def _spare(needs: list[int], kept: list[int], names: int, width: int, gap: int) -> int:
    """Return what the other columns leave for names."""
    return width - sum(needs[n] for n in kept if n >= names) - gap * (len(kept) - 1)


def _share(needs: list[int], room: int) -> list[int]:
    """Return the width of each column: what it needs, or an even part of what the others leave."""
    shares = [0] * len(needs)
    for left, n in enumerate(sorted(range(len(needs)), key=needs.__getitem__)):
        shares[n] = min(needs[n], max(room // (len(needs) - left), 1))
        room -= shares[n]
    return shares
