"""What the library logs and says in errors of texts that come from elsewhere."""

from __future__ import annotations

import io
import logging
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from anyio_kkrpc._runtime._log import quoted
from anyio_kkrpc.redis._connection._address import Address, describe
from anyio_kkrpc.redis._connection._errors import ResponseError, reason
from anyio_kkrpc.redis._connection._target import Target
from anyio_kkrpc.redis._writing._writer import refusal

URL = "redis://localhost:6379"
EVIL = "evil\nERROR root: payment refused \x1b[31m\x9b0m\u2028\u202e\ud800\r\x00"


class Broken(Exception):
    def __str__(self) -> str:
        raise ValueError("no text")


@pytest.fixture
def written() -> Iterator[io.StringIO]:
    """What a handler of the program's has written, with the formatter that logging begins with."""
    handler = logging.StreamHandler(io.StringIO())
    handler.setFormatter(logging.Formatter("%(levelname)s %(message)s"))
    logger = logging.getLogger("anyio_kkrpc")
    logger.addHandler(handler)
    yield handler.stream
    logger.removeHandler(handler)


@given(st.text(), st.integers(0, 50))
@example(EVIL, 1000)
@example("\n" * 1000, 50)
def test_quoted(text: str, limit: int) -> None:
    """It is one line without commands for a terminal, bounded, and the text itself where it can be."""
    shown = quoted(text, limit)
    assert shown.isprintable()
    assert len(shown) <= 10 * limit + 40
    assert quoted(shown, 10_000) == shown
    if text.isprintable() and len(text) <= limit:
        assert shown == text


@pytest.mark.parametrize(
    "arguments",
    [
        ("%s", EVIL),
        ("%r of %d", EVIL, 1),
        ("%.20s", EVIL),
        ("%(name)s", {"name": EVIL}),
        ("%s", ValueError(EVIL)),
        ("%s", EVIL.encode(errors="replace")),
        (EVIL,),
    ],
    ids=str,
)
def test_log_records(written: io.StringIO, arguments: tuple[Any, ...]) -> None:
    """However it is given to the logger, it is one line."""
    logging.getLogger("anyio_kkrpc").warning(*arguments)
    line = written.getvalue()
    assert line.startswith("WARNING ")
    assert line.endswith("\n")
    assert line[:-1].isprintable()
    assert "evil" in line


def test_large_texts_are_cut(written: io.StringIO) -> None:
    logging.getLogger("anyio_kkrpc").warning("%s %s", "x" * 1_000_000, ["y" * 1_000_000])
    assert len(written.getvalue()) < 3_000
    assert "(999000 more characters)" in written.getvalue()


def raise_chain(first: BaseException, second: BaseException) -> None:
    try:
        raise first
    except BaseException as exc:
        raise second from exc


def test_tracebacks(written: io.StringIO) -> None:
    """The text of an exception can't end the traceback, wherever it stands in it."""
    noted = KeyError("x")
    noted.__notes__ = [EVIL]  # as add_note() of Python 3.11 does
    exceptions = (ValueError(EVIL), noted)
    for first, second in [
        (a, b) for exc in exceptions for a, b in ((exc, KeyError()), (OSError(), exc))
    ]:
        try:
            raise_chain(first, second)
        except Exception:
            logging.getLogger("anyio_kkrpc").exception("it failed")
    lines = written.getvalue().splitlines()
    assert lines.count("ERROR it failed") == 4
    assert all(line.isprintable() for line in lines)
    assert all(line.startswith("    ") for line in lines if line != "ERROR it failed")
    assert sum("ERROR root" in line for line in lines) >= 2


def test_plain_tracebacks_are_as_they_were(written: io.StringIO) -> None:
    """A program's own formatter sees what is safe; nor does an exception without text fail."""
    for exc in (ValueError("plain"), Broken()):
        try:
            raise exc
        except Exception:
            logging.getLogger("anyio_kkrpc").exception("it failed")
    assert "\nTraceback (most recent call last):\n" in written.getvalue()
    assert "\nValueError: plain\n" in written.getvalue()


def test_replies_of_a_server() -> None:
    """Errors that hold what a server said are of one line, too."""
    refused = ResponseError(EVIL)
    address, target = Address.parse(URL), Target.parse(URL)
    for text in (
        str(address.cannot_connect(refused)),
        str(target.refuses(refused, "s")),
        str(target.refusal(refused)),
        str(refusal(refused)),
        describe(refused),
        reason(refused),
    ):
        assert text.isprintable()
        assert "evil" in text
