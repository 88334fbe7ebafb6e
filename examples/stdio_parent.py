"""Starts a child process and calls it over its stdin and stdout, without Redis.

python examples/stdio_parent.py
"""

import sys
from pathlib import Path

import anyio

from anyio_kkrpc import RPCChannel
from anyio_kkrpc.transports import open_process

CHILD = Path(__file__).with_name("stdio_child.py")


async def main() -> None:
    async with (
        open_process([sys.executable, str(CHILD)]) as transport,
        RPCChannel(transport) as channel,
    ):
        print(await channel.get_api().greet("parent"))


anyio.run(main)
