"""What error replies mean, also as redis-py hands them over."""

from __future__ import annotations

from typing import Any

import pytest
import redis
from anyio import ClosedResourceError, EndOfStream
from hypothesis import given
from hypothesis import strategies as st
from redis.connection import DefaultParser

from anyio_kkrpc import DeliveryError, TransportClosedError, TransportConnectionError
from anyio_kkrpc._cli._asking import as_reply
from anyio_kkrpc.redis._connection._errors import (
    Meaning,
    RedisError,
    ResponseError,
    code_of,
    leads_elsewhere,
    meaning_of,
    moved_to,
    named,
    parse_error,
    parse_moving_error,
    reason,
)
from anyio_kkrpc.testing import RedisServer

REPLIES = {
    "OOM command not allowed when used memory > 'maxmemory'.": Meaning.FULL,
    "OOM command not allowed when used memory > 'maxmemory'. script: 1a, on @user_script:3.": (
        Meaning.FULL
    ),
    "NOREPLICAS Not enough good replicas to write.": Meaning.PASSING,
    "MISCONF Redis is configured to save RDB snapshots, but can't": Meaning.PASSING,
    "BUSY Redis is busy running a script.": Meaning.PASSING,
    "TRYAGAIN Multiple keys request during rehashing of slot": Meaning.MOVING,
    "ASK 3999 127.0.0.1:6381": Meaning.MOVING,
    "LOADING Redis is loading the dataset in memory": Meaning.ELSEWHERE,
    "READONLY You can't write against a read only replica.": Meaning.ELSEWHERE,
    "MASTERDOWN Link with MASTER is down": Meaning.ELSEWHERE,
    "CLUSTERDOWN The cluster is down": Meaning.ELSEWHERE,
    "ERR max number of clients reached": Meaning.ELSEWHERE,
    "ERR max number of clients + cluster connections reached": Meaning.ELSEWHERE,
    "ERR problem with LDAP service": Meaning.ELSEWHERE,
    "NOGROUP No such key 'a' or consumer group 'b'": Meaning.GONE,
    "UNBLOCKED the stream key no longer exists": Meaning.GONE,
    "-UNBLOCKED the stream key no longer exists": Meaning.GONE,
    "ERR no such key": Meaning.GONE,
    "ERR no such key script: 1a, on @user_script:3.": Meaning.GONE,
    "ERR The XGROUP subcommand requires the key to exist. Note that": Meaning.GONE,
    "MOVED 3999 127.0.0.1:6381": Meaning.MOVED,
    "MOVED 3999 :6381": Meaning.MOVED,
    "MOVED 3999 [::1]:6381": Meaning.MOVED,
    "MOVED somewhere": Meaning.MOVED,
    "NOPERM User shop has no permissions to run the 'xadd' command": Meaning.RIGHTS,
    "NOPERM No permissions to access a key": Meaning.RIGHTS,
    "ERR ACL failure in script: No permissions to access a key script: 1a": Meaning.RIGHTS,
    "NOPERM The user executing the script can't run this command or subcommand": Meaning.RIGHTS,
    "NOAUTH Authentication required.": Meaning.LOGIN,
    "WRONGPASS invalid username-password pair or user is disabled.": Meaning.LOGIN,
    "ERR invalid password": Meaning.LOGIN,
    "ERR wrong number of arguments for 'auth' command": Meaning.LOGIN,
    "ERR AUTH <password> called without any password configured for the default user. Are you "
    "sure your configuration is correct?": Meaning.LOGIN,
    "ERR WAIT cannot be used with replica instances. Please also note": Meaning.ELSEWHERE,
    "BUSYGROUP Consumer Group name already exists": Meaning.REFUSED,
    "WRONGTYPE Operation against a key holding the wrong kind of value": Meaning.REFUSED,
    "CROSSSLOT Keys in request don't hash to the same slot": Meaning.REFUSED,
    "NOSCRIPT No matching script.": Meaning.REFUSED,
    "EXECABORT Transaction discarded": Meaning.REFUSED,
    "ERR unknown command 'XREADGROUP'": Meaning.REFUSED,
    "ERR": Meaning.REFUSED,
    "": Meaning.REFUSED,
}


@pytest.mark.parametrize(("text", "meaning"), REPLIES.items())
def test_meaning_of_a_reply(text: str, meaning: Meaning) -> None:
    """A reply means the same whatever is said before it."""
    assert meaning_of(parse_error(text)) is meaning
    assert meaning_of(ResponseError(text)) is meaning
    assert meaning.passes == (meaning in (Meaning.PASSING, Meaning.MOVING, Meaning.FULL))
    assert meaning.heals == (meaning in (Meaning.RIGHTS, Meaning.LOGIN))


@pytest.mark.parametrize("error", [code for code in REPLIES if code[:3] not in ("ERR", "ASK", "")])
def test_meaning_in_a_script(error: str) -> None:
    """Redis before 7.0 puts the reply of a command behind what it says of the script."""
    start = "ERR Error running script (call to f_1a2b): @user_script:5: "
    caught = f"@user_script: 5: -{error}"
    for text in (f"{start}{caught}", f"{start}{error}", caught, f"ERR {caught}"):
        assert meaning_of(parse_error(text)) is REPLIES[error]


@pytest.mark.parametrize(
    ("text", "host", "port"),
    [
        ("MOVED 3999 127.0.0.1:6381", "127.0.0.1", 6381),
        ("MOVED 3999 node-1.example.com:6381", "node-1.example.com", 6381),
        ("MOVED 3999 2001:db8::1:6381", "2001:db8::1", 6381),
        ("MOVED 3999 [::1]:6381", "::1", 6381),
        ("MOVED 3999 :6381", "", 6381),
        ("MOVED 3999 ?:6381", "", 6381),
    ],
)
def test_moved_where_it_is_followed(text: str, host: str, port: int) -> None:
    """The connection leads to the wrong server, and the reply to the right one."""
    exc = parse_moving_error(text)
    lost = TransportConnectionError("lost")
    lost.__cause__ = exc
    for error in (exc, lost):
        moved = moved_to(error)
        assert moved is not None
        assert (moved.host, moved.port) == (host, port)
        assert meaning_of(error) is Meaning.ELSEWHERE
        assert leads_elsewhere(error)
    assert str(exc) == text
    assert code_of(exc) == "MOVED"


@given(st.text() | st.builds("MOVED {}".format, st.text()))
def test_what_does_not_lead_anywhere(text: str) -> None:
    """Any other reply is what it is where nothing is followed."""
    exc = parse_moving_error(text)
    moved = moved_to(exc)
    if moved is None:
        assert meaning_of(exc) is meaning_of(parse_error(text))
    else:
        assert 0 < moved.port < 65536
        assert meaning_of(parse_error(text)) is Meaning.MOVED


@pytest.mark.parametrize(
    "where", ["h", "h:", "h:0", "h:65536", f"h:{'9' * 5000}", "h:-1", "h:x", "h:1 more", ""]
)
def test_moved_to_no_address(where: str) -> None:
    """It can't be followed."""
    exc = parse_moving_error(f"MOVED 3999 {where}")
    assert moved_to(exc) is None
    assert meaning_of(exc) is Meaning.MOVED


def test_meaning_of_a_connection() -> None:
    """A connection that is lost is made again, unless the server doesn't want this peer."""
    for cause in (None, OSError(), EndOfStream(), ClosedResourceError(), parse_error("OOM x")):
        error = TransportConnectionError("lost")
        error.__cause__ = cause
        assert meaning_of(error) is Meaning.ELSEWHERE
    for text in ("NOAUTH x", "NOPERM x", "MOVED 1 a:1"):
        error.__cause__ = parse_error(text)
        assert meaning_of(error) is REPLIES_BY_CODE[text.partition(" ")[0]]
    assert meaning_of(TransportClosedError("closed")) is Meaning.ELSEWHERE
    assert meaning_of(DeliveryError("x")) is Meaning.FINAL
    assert meaning_of(ValueError("OOM x")) is Meaning.FINAL


REPLIES_BY_CODE = {text.partition(" ")[0]: meaning for text, meaning in REPLIES.items()}


def test_reasons() -> None:
    """The code is shown but for a login; what MOVED means is said."""
    assert reason(parse_error("READONLY You can't")) == "READONLY You can't"
    assert reason(parse_error("MISCONF disk")) == "MISCONF disk"
    assert reason(parse_error("NOPERM no")) == "NOPERM no"
    assert reason(parse_error("WRONGPASS bad")) == "bad"
    assert reason(parse_error("ERR other")) == "other"
    for text in ("MOVED 3999 127.0.0.1:6381", "MOVED 3999 :6381", "MOVED there"):
        assert reason(parse_error(text)).startswith(
            f"{text}: the server is a node of a Redis Cluster"
        )
    assert reason(OSError("broken")) == "broken"


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ((b"XADD", b"{s}:inbox:1", b"*", b"a", b"b"), "XADD, key '{s}:inbox:1'"),
        ((b"EVAL", b"return 1", b"2", b"s", b"{s}:dead"), "EVAL, key 's'"),
        ((b"xgroup", b"create", b"s", b"g"), "XGROUP CREATE, key 's'"),
        (("XINFO", "STREAM", "s"), "XINFO STREAM, key 's'"),
        ((b"XREAD", b"COUNT", b"1", b"STREAMS", b"s", b"0"), "XREAD, key 's'"),
        ((b"XREADGROUP", b"GROUP", b"g", b"c", b"STREAMS", b"s", b">"), "XREADGROUP, key 's'"),
        ((b"XREAD",), "XREAD"),
        ((b"SELECT", 3), "SELECT"),
        ((b"INFO",), "INFO"),
        ((b"CLIENT", b"SETNAME", b"x"), "CLIENT SETNAME"),
        ((b"PEXPIRE", b"\xff", 3), "PEXPIRE, key '\\\\xff'"),
        ((b"DEL", b"x" * 1000), f"DEL, key '{'x' * 200}'"),
    ],
)
def test_named(command: tuple[bytes | str | int, ...], words: str) -> None:
    """What is about the command names it, and keeps its class and meaning."""
    for text in ("NOPERM no", "WRONGTYPE no"):
        error = named(parse_error(text), command)
        assert str(error).endswith(f"no ({words})")
        assert type(error) is type(parse_error(text))
        assert meaning_of(error) is meaning_of(parse_error(text))
    for text in ("MOVED 1 a:1", "OOM no", "LOADING no", "NOGROUP no"):
        error = parse_error(text)
        assert named(error, command) is error


def test_command_of_a_script() -> None:
    """Where Redis doesn't tell which command of a script it is, those that it may be are named."""
    script = b"redis.call('XPENDING', 1) redis.pcall('XADD', 2) redis.call('XPENDING', 3)"
    for text in ("ERR", "NOPERM"):
        error = parse_error(f"{text} The user executing the script can't run this command or sub")
        assert meaning_of(error) is Meaning.RIGHTS
        told = str(named(error, (b"EVAL", script, b"1", b"s")))
        assert told.endswith("(one of XADD, XPENDING in EVAL, key 's')")


@given(st.text())
def test_any_text(text: str) -> None:
    """No reply makes the table fail."""
    error = parse_error(text)
    assert isinstance(error, RedisError)
    assert isinstance(meaning_of(error), Meaning)
    assert code_of(error)
    reason(error)
    named(error, (b"XADD", b"s"))


def test_replies_of_servers(redis_server: RedisServer, stream_name: str) -> None:
    """What real servers answer, alone and in a script, is known, though redis-py takes codes away."""
    with redis.Redis.from_url(redis_server.url) as client:
        found = []
        for command in (
            ("XREADGROUP", "GROUP", "g", "c", "STREAMS", stream_name, ">"),
            ("XINFO", "GROUPS", stream_name),
            ("XINFO", "CONSUMERS", stream_name, "g"),
            ("XPENDING", stream_name, "g"),
            ("XGROUP", "DELCONSUMER", stream_name, "g", "c"),
        ):
            for args in (command, ("EVAL", "return redis.call(unpack(ARGV))", "0", *command)):
                if args[0] == "EVAL" and command[0] == "XREADGROUP":
                    continue
                with pytest.raises(redis.ResponseError) as caught:
                    client.execute_command(*args)
                found.append(meaning_of(as_reply(caught.value)))
        assert set(found) == {Meaning.GONE}
        client.execute_command("ACL", "SETUSER", stream_name, "on", "nopass", "~*", "+eval")
        with redis.Redis.from_url(redis_server.url, username=stream_name) as other:
            for args in (("GET", "a"), ("EVAL", "return redis.call('GET', 'a')", "0")):
                with pytest.raises(redis.ResponseError) as denied:
                    other.execute_command(*args)
                assert meaning_of(as_reply(denied.value)) is Meaning.RIGHTS
        client.execute_command("ACL", "DELUSER", stream_name)


@pytest.mark.parametrize("text", REPLIES)
def test_replies_from_another_client(text: str) -> None:
    """Of redis-py's errors, which lack the code where it has a class for it, nothing is lost."""
    parser: Any = DefaultParser
    try:
        exc = parser.parse_error(text)
    except (ValueError, IndexError):
        return  # a MOVED that it can't read
    assert meaning_of(as_reply(exc)) is REPLIES[text]


def test_errors_of_another_client() -> None:
    """What is no reply stays what it is."""
    for exc in (redis.ConnectionError("Connection closed by server."), redis.TimeoutError("x")):
        assert as_reply(exc) is exc
