"""The picture of tasks shows those that there are."""

from __future__ import annotations

import re
from pathlib import Path

import anyio
import pytest

from anyio_kkrpc import RedisStreamsTransport, RPCChannel
from anyio_kkrpc.testing import RedisServer
from tests.bounds import BOUND

from .pages import ROOT

PREFIX = "anyio_kkrpc "
# Parts of every connection, and of the channel where the picture has a word for several.
OTHERS = {"redis read", "redis write", "server", "handler"}
# Those that start when there is first something for them to do.
LATER = {
    f"redis {name}"
    for name in ("losses", "open calls", "order", "undelivered", "presence", "items", "keyed waits")
}


def names() -> set[str]:
    """Return the names of this library's tasks."""
    found = (task.name or "" for task in anyio.get_running_tasks())
    return {name.removeprefix(PREFIX) for name in found if name.startswith(PREFIX)}


def drawn() -> set[str]:
    """Return the headings of the boxes, those of the transport with ``redis`` before them."""
    text = (ROOT / "docs" / "images" / "tasks.svg").read_text()
    above, below = text.split("async with RedisStreamsTransport", 1)
    headings = [
        re.findall(r'font-size="1[23]"[^>]*font-weight="600">([^<]+)<', part)
        for part in (above, below)
    ]
    return {*headings[0], *(f"redis {name}" for name in headings[1])}


IMAGES = ROOT / "docs" / "images"
# A terminal, which is dark on any page.
DIAGRAMS = sorted(set(IMAGES.glob("*.svg")) - {IMAGES / "top.svg"})


@pytest.mark.parametrize("path", DIAGRAMS, ids=lambda path: path.name)
def test_dark_pages(path: Path) -> None:
    """Each colour of a diagram has one that fits a dark page, the same one in all of them."""
    style, drawing = re.fullmatch(r"(?s).*?<style>(.*?)</style>(.*)", path.read_text()).groups()  # type: ignore[union-attr]
    assert style in DIAGRAMS[0].read_text()
    assert style.strip().startswith("@media (prefers-color-scheme: dark)")
    for what in ("fill", "stroke"):
        used = set(re.findall(rf'{what}="([^"]+)"', drawing)) - {"none"}
        dark = dict(re.findall(rf'\[{what}="([^"]+)"\] {{ {what}: (#\w{{6}}) }}', style))
        assert used <= set(dark)
        assert all(lightness(dark[ground]) < 60 for ground in used if lightness(ground) > 230)
        assert all(lightness(dark[ink]) > 110 for ink in used if lightness(ink) < 130)


def lightness(colour: str) -> float:
    """Return about how light a colour is, up to 255."""
    red, green, blue = (int(colour[at : at + 2], 16) for at in (1, 3, 5))
    return 0.3 * red + 0.6 * green + 0.1 * blue


@pytest.mark.anyio
@pytest.mark.server
@pytest.mark.one_server
async def test_tasks(redis_server: RedisServer, stream_name: str) -> None:
    async with (
        RedisStreamsTransport(
            redis_server.url, stream=stream_name, use_consumer_group=True, max_len=1000
        ) as transport,
        RPCChannel(transport, expose={"f": print}, timeout=BOUND),
    ):
        expected = {name for name in drawn() if name not in {"crew", "pumps", "callbacks"}}
        assert expected >= LATER
        with anyio.fail_after(BOUND):
            while names() - OTHERS != expected - LATER:
                await anyio.sleep(0.01)
