"""kkrpc 0.2.2's own client and server over WebSockets; in a page, if there is a Chromium."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
from contextlib import AsyncExitStack
from pathlib import Path
from subprocess import DEVNULL
from typing import Any

import anyio
import pytest

from anyio_kkrpc import RPCChannel, expose
from anyio_kkrpc.websocket import connect_websocket, current_connection, endpoint
from tests.bounds import BOUND, CALL_BOUND
from tests.docs.pages import DOCS, blocks_of
from tests.websocket.serving import serving

from .api import Api, Grade1, exposed
from .test_interop import anyio_backend, run_client

pytestmark = [pytest.mark.anyio, pytest.mark.slow]
assert anyio_backend  # asyncio and trio: what Node writes is the same to uvloop
CHROMIUM = os.environ.get("ANYIO_KKRPC_CHROMIUM") and shutil.which("chromium")


class PageApi(Api):
    async def call_peer(self, name: str, *args: Any) -> Any:
        return await current_connection().channel.get_api()[name](*args)


async def test_typescript_calls_python(javascript: Path) -> None:
    app = endpoint(exposed(PageApi()))
    async with serving(app) as url:
        assert await run_client(javascript, "websocket_client.mjs", url) == "ok\n"
    assert app.statistics().failed == 0
    assert app.statistics().accepted == 1


async def test_python_calls_typescript(javascript: Path) -> None:
    async with AsyncExitStack() as stack:
        command = ["node", str(javascript / "websocket_server.mjs")]
        process = await stack.enter_async_context(await anyio.open_process(command, stderr=None))
        stack.callback(process.kill)
        assert process.stdout is not None
        with anyio.fail_after(BOUND):
            port = int(await process.stdout.receive())
        for options in ({}, {"superjson": False}, {"compress": True}):
            transport = await stack.enter_async_context(
                connect_websocket(f"ws://127.0.0.1:{port}", dialect="kkrpc-0", **options)
            )
            own = {"hello": lambda name: f"hi {name}"}
            channel = await stack.enter_async_context(
                RPCChannel(transport, expose=own, timeout=CALL_BOUND)
            )
            api = channel.get_api()
            assert await api.add(1, 2) == 3
            assert await api.math.multiply(6, 7) == 42
            steps: list[int] = []
            assert await api.steps(3, steps.append) == 3
            assert await api.askBack("bob") == "hi bob"
            assert len(await api.echo("ü" * 300_000)) == 300_000


@pytest.mark.skipif(not CHROMIUM, reason="for a machine with a browser: ANYIO_KKRPC_CHROMIUM=1")
async def test_page(javascript: Path, tmp_path: Path, anyio_backend_name: str) -> None:
    """The same in a page of the host that it connects to."""
    from starlette.applications import Starlette
    from starlette.routing import Mount, WebSocketRoute
    from starlette.staticfiles import StaticFiles

    from tests.websocket.test_servers import with_hypercorn, with_uvicorn

    reported = anyio.Event()
    said: list[str] = []

    class Reporting(PageApi):
        def report(self, text: str) -> None:
            said.append(text)
            reported.set()

    api = Reporting()
    app = endpoint(expose({**_tree(api), "report": api.report}, naming="camel"))
    files = StaticFiles(directory=javascript)
    routes = [WebSocketRoute("/ws", app), Mount("/", files)]
    run = with_uvicorn if anyio_backend_name == "asyncio" else with_hypercorn
    with socket.create_server(("127.0.0.1", 0)) as listener:
        page = f"http://127.0.0.1:{listener.getsockname()[1]}/websocket_page.html"
        async with run(Starlette(routes=routes), listener):
            command = [str(CHROMIUM), "--headless=new", "--no-sandbox", "--disable-gpu"]
            command += [f"--user-data-dir={tmp_path}", page]
            process = await anyio.open_process(command, stdout=DEVNULL, stderr=DEVNULL)
            try:
                with anyio.fail_after(BOUND):
                    await reported.wait()
            finally:
                process.kill()
                await process.wait()
    assert said == ["ok"]


def _tree(api: Api) -> dict[str, Any]:
    names = ("add", "echo", "with_progress", "call_peer")
    return {**{name: getattr(api, name) for name in names}, "math": {"grade1": Grade1()}}


def test_page_of_the_docs(javascript: Path) -> None:
    """Its programs run, under uvicorn and on Node, and print what it says."""
    directory = javascript / "websocket_docs"
    directory.mkdir()
    blocks = blocks_of(DOCS / "websocket.md")
    command = [sys.executable, "-m", "uvicorn", "server:app", "--port", "0"]
    (directory / "server.py").write_text(next(b.text for b in blocks if b.name == "server.py"))
    with subprocess.Popen(command, cwd=directory, stderr=subprocess.PIPE, text=True) as server:
        try:
            assert server.stderr is not None
            lines = (re.search(r"http://127\.0\.0\.1:(\d+)", line) for line in server.stderr)
            port = next(found[1] for found in lines if found)
            printed: list[str] = []
            for block in blocks:
                if block.name in ("page.mjs", "client.py"):
                    text = block.text.replace("localhost:8000", f"127.0.0.1:{port}")
                    (directory / block.name).write_text(text)
                    run = ["node", "--import", str(javascript / "websocket_global.mjs")]
                    run = [sys.executable] if block.name == "client.py" else run
                    done = subprocess.run(
                        [*run, block.name],
                        cwd=directory,
                        capture_output=True,
                        text=True,
                        timeout=BOUND,
                        check=False,
                    )
                    assert done.returncode == 0, done.stderr
                    printed.append(done.stdout)
                elif block.language == "python" and not block.name:
                    exec(compile(block.text, "websocket.md", "exec", dont_inherit=True), {})
                elif block.language == "output":
                    assert printed.pop() == block.text
            assert printed == []
        finally:
            server.terminate()
