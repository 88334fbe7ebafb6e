"""Pages that lead through files and commands: a shell does what they say, with a server of its own."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from anyio_kkrpc.testing import find_server
from anyio_kkrpc.testing._server import free_port
from tests.bounds import BOUND
from tests.docs.pages import DOCS, blocks_of

# Each command is a process of its own, which takes seconds to start on a busy machine.
pytestmark = pytest.mark.slow


class Shell:
    """Runs a page's commands in a directory. Those for the background end with the page."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._port = free_port()
        self._environment = {
            **os.environ,
            "ANYIO_KKRPC_URL": f"redis://localhost:{self._port}",
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        }

    def write(self, name: str, text: str) -> None:
        text = text.replace("redis://localhost:6379", f"redis://localhost:{self._port}")
        (self._directory / name).write_text(text)

    def run(self, commands: str) -> str:
        done = subprocess.run(
            ["sh", "-c", f"exec 2>&1\n{commands}"],
            cwd=self._directory,
            env=self._environment,
            stdout=subprocess.PIPE,
            text=True,
            timeout=BOUND * len(commands.splitlines()),  # each line is a process that starts
        )
        assert done.returncode == 0, done.stdout
        return done.stdout

    @contextmanager
    def background(self, command: str) -> Iterator[None]:
        """Run it until the end of the block, from when it says that it is ready."""
        command, ready, times = command.strip(), " in memory", 1
        if " serve " in command:
            workers = re.search(r"--workers (\d+)", command)
            ready, times = ": serving ", int(workers[1]) if workers else 1
        else:
            command = f"{command} --port {self._port}"
        with subprocess.Popen(
            ["sh", "-c", f"exec {command} 2>&1"],
            cwd=self._directory,
            env=self._environment,
            stdout=subprocess.PIPE,
            text=True,
        ) as process:
            try:
                assert process.stdout is not None
                while times:
                    line = process.stdout.readline()
                    assert line, "it ended"
                    times -= ready in line
                yield
            finally:
                process.terminate()
                process.communicate(timeout=BOUND)


def matches(got: str, expected: str) -> bool:
    """Whether it is what was expected, where three dots stand for anything."""
    pattern = ".*".join(re.escape(part) for part in expected.split("..."))
    return re.fullmatch(pattern, got) is not None


@pytest.mark.parametrize("name", ["quickstart.md", "command-line.md"])
def test_walkthrough(name: str, tmp_path: Path) -> None:
    """Files are written, commands run, and their output is what the page says."""
    if find_server() is None:
        pytest.skip("no server")
    shell, printed, compared = Shell(tmp_path), "", 0
    with ExitStack() as running:
        for block in blocks_of(DOCS / name):
            if block.language == "python":
                shell.write(block.name, block.text)
            elif block.language == "output":
                lines, expected = printed.splitlines(), block.text.splitlines()
                assert len(lines) == len(expected), printed
                for got, wanted in zip(lines, expected, strict=True):
                    assert matches(got, wanted), f"{name} line {block.line}: {got}"
                printed, compared = "", compared + 1
            elif block.name == "background":
                assert printed == ""
                running.enter_context(shell.background(block.text))
            elif block.name == "silent":
                shell.run(block.text)
            elif block.name != "setup":
                printed += shell.run(block.text)
    assert printed == ""
    assert compared >= 2


def test_worker_of_its_own(tmp_path: Path) -> None:
    """The quickstart's last program serves as well."""
    files = {block.name: block.text for block in blocks_of(DOCS / "quickstart.md")}
    shell = Shell(tmp_path)
    for name in ("shop.py", "worker.py"):
        shell.write(name, files[name])
    with shell.background("anyio-kkrpc server"):
        done = shell.run("python worker.py & anyio-kkrpc call add 1 2; kill $!; wait $!")
    assert done == "3\n"
