"""docs/wire.md and docs/upgrading.md say what the code does."""

from __future__ import annotations

import importlib
import pkgutil
import re
from pathlib import Path
from typing import Any, get_args

import cbor2
import msgspec
import pytest
from msgspec import UNSET, UnsetType

import anyio_kkrpc.redis
from anyio_kkrpc import ProtocolError
from anyio_kkrpc import _wire_errors as _errors_wire
from anyio_kkrpc._protocol import _records
from anyio_kkrpc._protocol._records import Bye, CallbackProgress, Cancel, Record
from anyio_kkrpc.codecs import cbor, get_codec
from anyio_kkrpc.redis._group import _dead_letters
from anyio_kkrpc.redis._keyed import _items_out, _kept
from anyio_kkrpc.redis._keyed._script import Script
from anyio_kkrpc.redis._reading import _hints
from anyio_kkrpc.redis._stream._keys import Keys
from anyio_kkrpc.redis.dialects import _signing, native

from .test_acl import RULES
from .test_vectors import LINES

DOCS = Path(__file__).parents[2] / "docs"
WIRE = (DOCS / "wire.md").read_text()
UPGRADING = (DOCS / "upgrading.md").read_text()
# Without line breaks.
TEXT = " ".join(WIRE.split())
# As they are called in the tables.
TYPES: list[tuple[Any, str]] = [
    (_records.Id, "id"),
    (list[_records.Id], "list of id"),
    (list[str], "list of text"),
    (list[_records.Index], "list of index"),
    (list[Any], "list"),
    (dict[str, Any], "map"),
    (bool, "bool"),
    (_records.Index, "index"),
    (Any, "any"),
]


def rows_under(heading: str, page: str = WIRE) -> list[list[str]]:
    """Return the cells of the first table under a heading."""
    section = page[page.index(f"\n{heading}") :]
    rows: list[list[str]] = []
    for line in section.splitlines()[2:]:
        if line.startswith("#") or (rows and not line.startswith("|")):
            break
        if line.startswith("|"):
            rows.append([cell.strip() for cell in line.strip("|").split("|")])
    return rows[2:]


def names(rows: list[list[str]]) -> list[str]:
    return [name for row in rows for name in re.findall(r"`([^`]+)`", row[0])]


def type_of(annotation: Any) -> str:
    """Return how the page calls a type, without what is absent."""
    parts = [part for part in get_args(annotation) if part is not UnsetType]
    if len(parts) != len(get_args(annotation)) and len(parts) > 1:
        assert set(parts) == set(get_args(_records.Number))
        return "number"
    found = parts[0] if UnsetType in get_args(annotation) else annotation
    if type(get_args(found)[:1] and get_args(found)[0]) is str:
        return "text"
    return next(name for known, name in TYPES if known == found)


@pytest.mark.parametrize("record", get_args(Record), ids=lambda record: str(record.__name__))
def test_records(record: type[msgspec.Struct]) -> None:
    """Each has its members, in their order, with their types; what is ours is marked."""
    tag = record.__struct_config__.tag
    heading = re.search(rf"^### {tag}: .*$", WIRE, re.MULTILINE)
    assert heading is not None
    assert heading[0].endswith("(ours)") is (record in (CallbackProgress, Cancel, Bye))
    if record is Bye:
        assert msgspec.structs.fields(record) == ()
        return
    described = {
        field.encode_name: type_of(field.type) + (", optional" if field.default is UNSET else "")
        for field in msgspec.structs.fields(record)
    }
    rows = rows_under(heading[0])
    assert {row[0].strip("`"): row[1] for row in rows} == described
    assert list(described) == names(rows)
    doc = record.__doc__ or ""
    for row in rows:
        documented = re.search(rf":ivar {row[0].strip('`')}: (.*?)(?=:ivar|$)", doc, re.DOTALL)
        if documented is not None:
            assert ("(ours)" in row[2]) is ("(ours)" in documented[1]), row


def test_bounds_of_records() -> None:
    assert f"up to {_records.MAX_ID} characters" in TEXT
    assert _records.MAX_NUMBER == 2**53 - 1
    assert "between -(2^53 - 1) and 2^53 - 1" in TEXT


def test_version() -> None:
    assert f"version {native.VERSION} of the native wire" in TEXT
    assert [row[0] for row in rows_under("## Versions")] == [
        str(number) for number in range(native.VERSION + 1)
    ]
    assert [row[0] for row in rows_under("## The ACL", UPGRADING)] == [
        str(number) for number in range(native.VERSION + 1)
    ]
    assert f"## To version {native.VERSION} of the wire" in UPGRADING
    assert f"{native._PEERS:,} senders are remembered" in TEXT
    assert f"up to {native._MAX_MARK} characters" in TEXT
    assert f"There are {native._MOST_RECORDS:,} of them at most" in TEXT
    assert f"or more than {native._MOST_RECORDS:,} |" in TEXT


def test_fields() -> None:
    """As the writer puts them."""
    writer = native.NativeDialect("peer", get_codec("json"))
    signer = _signing.Signer(b"key", lambda: 1.0, lambda: b"nonce")
    fields = (
        *writer.encode(_records.Request("1", "call", ["f"]), "other", b"e.1"),
        native.AGAIN,
        b"1",
    )
    signed = signer.sign(b"S", fields)
    listed = [name for name in names(rows_under("## Entries")) if name not in ("cbor", "call")]
    assert tuple(name.encode() for name in listed) == signed[::2]
    keyed = writer.encode_keyed(_records.Request("1", "call", ["f"]), b"")
    assert keyed[-2] == b"call"
    assert f"behind `v`, which is `{keyed[-3].decode()}`" in TEXT
    assert {line["fields"][1][0] for line in LINES if "record" in line} == {"json", "cbor"}


def test_hints() -> None:
    written = {line["fields"][0][1] for line in LINES if line["fields"][0][0] == "hint"}
    listed = set(names(rows_under("### Hints")))
    keyed: tuple[bytes, ...] = (_kept.CALL_WORD, _kept.CANCEL_WORD, _kept.LATER_WORD)
    keyed += (_items_out.READ_WORD, _hints.TURN_WORD)
    written |= {word.decode() for word in keyed}
    assert {hint.partition(" ")[0] for hint in listed} == {
        hint.partition(" ")[0] for hint in written
    }


def test_keys() -> None:
    """By the table, and by the examples."""
    keys = Keys.of("S")
    listed = names(rows_under("## Keys"))
    found = (keys.stream, keys.inbox("me"), keys.control, keys.dead)
    found += (keys.claimer(b"workers"), keys.worker(b"workers", b"blue"), keys.alive("me"))
    found += (keys.call(b"pay"), keys.waits(b"pay"), keys.progress(b"pay"))
    found += (keys.items(b"pay"), keys.wake("me"), keys.due, keys.turns(b"workers"))
    names_of = {
        "base": "{S}",
        "<session id>": "me",
        "<group>": "workers",
        "<consumer>": "blue",
        "<key>": "pay",
    }
    for placeholder, name in names_of.items():
        listed = [key.replace(placeholder, name) for key in listed]
    assert [key.encode() for key in listed] == list(found)
    examples = re.findall(r"`(\S+)` has `(\S+:control)`", TEXT)
    assert len(examples) == 3
    for name, control in examples:
        assert Keys.of(name).control.decode() == control


def test_dead_letters() -> None:
    rows = rows_under("## Dead letters")
    about = [name.decode() for name in _dead_letters.ABOUT]
    assert [row[0].strip("`*") for row in rows] == [*about, "all fields of the request", "request"]


def test_codes_of_errors() -> None:
    section = TEXT[TEXT.index("### Errors") : TEXT.index("## Codecs")]
    marked = section[section.index("`rpc_error`") : section.index("(then with")]
    assert set(re.findall(r"`(\w+)`", marked)) - {"rpc_error"} == {
        *_errors_wire._CODES,
        "validation",
    }
    assert f"at most {_errors_wire._MAX_CAUSES} deep" in section


def test_tags() -> None:
    """Those that are listed are read, and no others."""
    section = TEXT[TEXT.index("## Codecs") : TEXT.index("## Numbers")]
    tags = section[section.index("these tags:") : section.index("Other tags")]
    plain = re.sub(r"\([^)]*\)", "", tags)
    listed = {int(number) for number in re.findall(r"\d+", plain)}
    values = ["2026-11-27T01:02:03Z", "2026-11-27", 1, b"\1" * 16, [1, 2], [1, [2]], {"a": 1}]
    accepted = set()
    for tag in [*range(300), 1004, 43000, 55799]:
        for value in values:
            record = {"t": "r", "id": "1", "v": cbor2.CBORTag(tag, value)}
            try:
                get_codec("cbor").decode(cbor2.dumps(record))
            except ProtocolError:
                continue
            accepted.add(tag)
    assert accepted == listed
    assert f"{cbor.MAX_DIGITS:,} digits" in section
    assert f"at most {cbor.MAX_DEPTH} levels deep" in section


def constants() -> dict[str, Any]:
    """Return what the modules about Redis define, wherever it stands."""
    modules = [
        importlib.import_module(found.name)
        for found in pkgutil.walk_packages(anyio_kkrpc.redis.__path__, "anyio_kkrpc.redis.")
    ]
    return {name: value for module in modules for name, value in vars(module).items()}


def test_numbers() -> None:
    known = constants()
    assert (known["CONTROL_LENGTH"], known["CONTROL_TTL_MS"]) == (b"20000", b"3600000")
    assert "1 hour after the last entry, or the last peer that came; about 20,000 entries" in TEXT
    assert f"`{known['PREFIX'].decode()}<session id>`" in TEXT.replace("session\nid", "session id")
    assert f"{_signing.WINDOW:.0f} seconds or more" in TEXT
    assert (
        f"after {known['_SWEEP_FACTOR']} times `claim_idle` and at least "
        f"{known['_SWEEP_LEAST']:.0f} seconds"
    ) in TEXT
    assert f"{known['_LEASE']} times `claim_idle`" in TEXT
    assert f"up to {int(known['_LONGEST_PAUSE']) // 1000} seconds" in TEXT
    for consumer in (known["HANDED_BACK"], known["DELAYED"]):
        assert f"`{consumer.decode()}`" in TEXT


def test_scripts() -> None:
    """Each is listed, and nothing else."""
    found = {
        name: value
        for name, value in constants().items()
        if isinstance(value, bytes) and re.search(rb"redis\.p?call", value)
    }
    run = {name: value for name, value in constants().items() if isinstance(value, Script)}
    # What is a piece of others, or defines a function only, isn't one.
    pieces = {
        name
        for name, text in found.items()
        if any(text in other for other in found.values() if other != text)
        or (
            (name.startswith("_") or name == "KEPT")
            and any(text in other.source for other in run.values())
        )
    }
    scripts = {
        name.strip("_").lower().replace("_", " ") for name in (found.keys() - pieces) | run.keys()
    }
    assert len(scripts) > 5
    assert {row[0].strip("*") for row in rows_under("## Scripts")} == scripts


def test_acl() -> None:
    """The newest rule is that of the page about security."""
    rule = re.search(
        r"```text acl\nACL SETUSER shop on >secret resetkeys (.*)\n```",
        (DOCS / "security.md").read_text(),
    )
    assert rule is not None
    rows = rows_under("## The ACL", UPGRADING)
    assert rows[0][1] == f"`{RULES[0]}`"
    more = {f"`{word}`" for word in set(rule[1].split()) - set(RULES[0].split())}
    assert more == set(re.findall(r"`\+\w+`", " ".join(row[1] for row in rows[1:])))
    assert rule[1] == RULES[-1]
