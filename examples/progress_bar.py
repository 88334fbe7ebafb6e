"""Progress bars of several long jobs at once, by a callback for each. Start worker.py first.

python examples/progress_bar.py [redis://localhost:6379]  # pip install rich
"""

import sys

import anyio
from rich.progress import Progress

from anyio_kkrpc import RedisStreamsTransport, RPCChannel

URL = sys.argv[1] if len(sys.argv) > 1 else "redis://localhost:6379"
ALBUMS = {"Lisbon": 30, "Oslo": 60, "Cairo": 90}


async def main() -> None:
    async with (
        RedisStreamsTransport(URL, stream="example-jobs", use_consumer_group=True) as transport,
        RPCChannel(transport) as channel,
    ):
        api = channel.get_api()
        # Where stdout is no terminal, Rich prints the bars once, at the end.
        with Progress() as progress:

            async def resize(album: str, count: int) -> None:
                bar = progress.add_task(album, total=count)
                await api.resize(count, lambda done, _: progress.update(bar, completed=done))

            async with anyio.create_task_group() as group:
                for album, count in ALBUMS.items():
                    group.start_soon(resize, album, count)


anyio.run(main)
