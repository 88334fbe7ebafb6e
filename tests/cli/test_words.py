"""What commands make of text that they are given, and of errors, without running one."""

from __future__ import annotations

import os
import signal
import socket
import ssl
from pathlib import Path

import anyio
import pytest
import trustme

from anyio_kkrpc import (
    MethodNotFoundError,
    RemoteError,
    RPCTimeoutError,
    TransportConnectionError,
)
from anyio_kkrpc._cli._asking import asking
from anyio_kkrpc._cli._call import parse_argument
from anyio_kkrpc._cli._dead import parse_age
from anyio_kkrpc._cli._options import Backend
from anyio_kkrpc._cli._report import EXIT_CODES, NotReadyError, WorkerError, report
from anyio_kkrpc._cli._server import run
from anyio_kkrpc._cli._terminal import ends_on_sigterm
from anyio_kkrpc._cli._worker import BACKENDS
from anyio_kkrpc.testing import ServerError
from tests.bounds import BOUND
from tests.fake_server import fake_node


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1", 1),
        ("null", None),
        ('"1"', "1"),
        ("[1, 2]", [1, 2]),
        ("hello", "hello"),
        ("-x", "-x"),
        ("", ""),
    ],
)
def test_arguments(text: str, value: object) -> None:
    """JSON, or text as it is."""
    assert parse_argument(text) == value


@pytest.mark.parametrize("text", ["[1,", ' {"a":', '"'])
def test_arguments_that_look_like_json(text: str) -> None:
    with pytest.raises(ValueError, match="looks like JSON and isn't"):
        parse_argument(text)


@pytest.mark.parametrize(
    ("text", "seconds"), [("90s", 90), ("1.5m", 90), ("12h", 43200), ("7d", 604800), ("0s", 0)]
)
def test_ages(text: str, seconds: float) -> None:
    assert parse_age(text) == seconds


@pytest.mark.parametrize(
    "text", ["", "7", "d", "7w", "-1s", "1e3s", "1 d", "\u0661d", "9" * 20 + "s"]
)
def test_ages_that_are_none(text: str) -> None:
    with pytest.raises(ValueError, match="needs a number with s, m, h or d"):
        parse_age(text)


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (RemoteError("ValueError", "wrong"), 1, "wrong"),
        (MethodNotFoundError("no"), 3, "no"),
        (RPCTimeoutError("late"), 4, "late"),
        (TransportConnectionError("lost\nthere"), 5, "lost there"),
        (ValueError("bad"), 2, "bad"),
        (WorkerError("w"), 1, "w"),
        (NotReadyError("n"), 1, "n"),
        (ServerError("s"), 1, "s"),
        (OSError("o"), 1, "o"),
        (ZeroDivisionError("z"), 1, "ZeroDivisionError: z (--debug shows where)"),
        (RuntimeError("\x1b[31m"), 1, "\\x1b[31m"),
    ],
)
def test_reports(
    error: Exception, code: int, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """One line, whatever is in it, and a code that tells the kind."""
    assert report(error) == code
    line = capsys.readouterr().err
    assert line.startswith("anyio-kkrpc: ")
    assert text in line
    assert line.count("\n") == 1
    assert EXIT_CODES.get(type(error), code) == code


def test_backends() -> None:
    """What can be chosen is what a worker knows."""
    assert [one.value for one in Backend] == [*BACKENDS]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_ended_by_the_terminal(number: signal.Signals) -> None:
    """As by Ctrl-C; afterwards signals mean what they meant before."""
    before = signal.getsignal(number)
    with pytest.raises(KeyboardInterrupt), ends_on_sigterm():
        os.kill(os.getpid(), number)
    assert signal.getsignal(number) is before


@pytest.mark.anyio
@pytest.mark.parametrize("named", [True, False])
async def test_name_of_the_certificate(named: bool, tmp_path: Path) -> None:
    """As of peers: the servers' certificates may be for another name than that in the URL."""
    authority = trustme.CA()
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert("redis.example").configure_cert(context)
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    name = "&ssl_server_hostname=redis.example" if named else ""

    def ask(port: int) -> str:
        url = f"rediss://127.0.0.1:{port}?ssl_ca_certs={tmp_path}/ca.pem{name}"
        with (
            pytest.raises(TransportConnectionError) as caught,
            asking(url, BOUND, "jobs") as client,
        ):
            client.ping()
        return str(caught.value)

    async with fake_node(context) as node:
        node.answers = {}  # it knows no command, but who gets that far has agreed on TLS
        said = await anyio.to_thread.run_sync(ask, node.port)
        assert bool(node.asked) == named
        assert ("or give ssl_server_hostname" in said) != named


@pytest.mark.anyio
async def test_sentinel_that_does_not_answer() -> None:
    """Another one is asked, as by peers; and who knows no such service is named."""

    def ask(ports: tuple[int, ...], service: str) -> object:
        hosts = ",".join(f"127.0.0.1:{port}" for port in ports)
        with asking(f"redis+sentinel://{hosts}/{service}", 10 * BOUND, "jobs") as client:
            return client.get_connection_kwargs()["port"]

    async with fake_node() as sentinel, fake_node() as frozen:
        frozen.frozen = True

        def tell(command: list[bytes]) -> object:
            known = command[1:] == [b"get-master-addr-by-name", b"mymaster"]
            return [b"127.0.0.1", b"7000"] if known else None

        sentinel.answers["SENTINEL"] = tell
        ports = frozen.port, sentinel.port
        assert await anyio.to_thread.run_sync(ask, ports, "mymaster") == 7000
        with pytest.raises(TransportConnectionError, match="Check the service in the url"):
            await anyio.to_thread.run_sync(ask, ports[1:], "master")


def test_port_that_is_taken() -> None:
    """It says so before anything is started; and who asks there learns what is wrong."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
        with pytest.raises(ServerError, match=f"port {port} can't be used"):
            run(port)
        url = f"redis://127.0.0.1:{port}"
        refused = pytest.raises(TransportConnectionError, match="refused")
        with refused, asking(url, BOUND, "jobs") as client:
            client.ping()
