"""Each option of the Redis transport is described once, and the command line has its defaults."""

from __future__ import annotations

import inspect
import re

import pytest
import typer

from anyio_kkrpc import RedisStreamsTransport
from anyio_kkrpc._cli._app import app
from anyio_kkrpc.redis._options import GivenOptions, check_options
from tests.typing.check_options import Connects

FILLED_IN = ("consumer_name", "session_id", "overflow")
OPTIONS = inspect.signature(RedisStreamsTransport).parameters


def test_each_option_has_its_line() -> None:
    """The docstring has one for each option, and for nothing else."""
    described = re.findall(r":param (\w+):", RedisStreamsTransport.__doc__ or "")
    assert sorted(described) == sorted(OPTIONS)


def test_type_checkers_are_shown_each_option() -> None:
    """A Protocol without one of them would be met all the same."""
    shown = inspect.signature(Connects.__call__).parameters
    assert sorted(shown.keys() - {"self"}) == sorted(OPTIONS)


def test_defaults_pass_their_own_rules() -> None:
    """What is filled in is there, and all else is as it was given."""
    given = GivenOptions()
    options = check_options(given)
    for name in GivenOptions.__dataclass_fields__:
        value = getattr(given, name)
        if hasattr(options, name) and name not in FILLED_IN:
            assert getattr(options, name) == value or name == "codec"
    assert options.consumer_name == f"consumer-{options.session_id}"
    assert "password" not in repr(check_options(GivenOptions("redis://:password@localhost")))


def test_no_secret_is_shown() -> None:
    given = GivenOptions("redis://:pass-word@localhost", signing_key=b"0123456789abcdef")
    for options in (given, check_options(given)):
        assert "0123456789abcdef" not in repr(options)
        assert "pass-word" not in repr(options)


COMMANDS = typer.main.get_command(app).commands  # type: ignore[attr-defined]
REPEATED = [
    (command.name, param.name, param.default)
    for command in [*COMMANDS.values(), *COMMANDS["dead"].commands.values()]
    for param in command.params
    if param.name in OPTIONS and param.default is not None
]


@pytest.mark.parametrize(("command", "option", "default"), REPEATED)
def test_defaults_of_the_command_line(command: str, option: str, default: object) -> None:
    """They stand there again, since ``--help`` is to be there before the transport is imported."""
    assert default == OPTIONS[option].default
