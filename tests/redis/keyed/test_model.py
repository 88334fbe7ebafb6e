"""The scripts against a model that is a few dicts: whatever order callers and workers come in."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import redis
from hypothesis import settings
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)
from hypothesis.strategies import sampled_from

from anyio_kkrpc.redis._keyed._script import Script
from anyio_kkrpc.redis._keyed._scripts import (
    ATTACH,
    BEGIN,
    CANCEL_CALL,
    CLAIM,
    DIE,
    FINISH,
    FORGET,
    LEAVE_CALL,
    STATE,
)
from anyio_kkrpc.redis._stream._keys import DELAYED, HANDED_BACK, Keys
from anyio_kkrpc.testing._server import RedisServer

pytestmark = [pytest.mark.server, pytest.mark.one_server]

KEYS = Keys.of("s")
DIGESTS = {name: name.encode() * 22 for name in "xy"}
NAMES = sampled_from(["a", "b"])
WORKERS = sampled_from([b"one", b"two"])
CLIENT: list[redis.Redis] = []


@pytest.fixture
def client(redis_server: RedisServer) -> Iterator[None]:
    with redis.Redis.from_url(redis_server.url, db=7) as found:
        CLIENT[:] = [found]
        yield
        found.flushdb()


class Run:
    """A request.

    :ivar owner: who has it
    :ivar deliveries: how often it was delivered
    """

    def __init__(self, key: str, digest: str) -> None:
        self.key, self.digest = key, digest
        self.owner: bytes | None = None
        self.deliveries = 0
        self.acknowledged = False
        self.asked = False


class Machine(RuleBasedStateMachine):
    """Callers and workers of two keys.

    :ivar current: the request that has each key
    :ivar ended: what the call of each key came to: state and value
    """

    @initialize()
    def begin(self) -> None:
        self.client = CLIENT[0]
        self.client.flushdb()
        self.client.xgroup_create("s", "g", "0", mkstream=True)
        self.runs: dict[bytes, Run] = {}
        self.current: dict[str, bytes] = {}
        self.ended: dict[str, tuple[bytes, bytes]] = {}
        self.results: dict[bytes, list[bytes]] = {}

    def _run(self, script: Script, keys: tuple[bytes, ...], *args: Any) -> Any:
        return self.client.eval(script.source, len(keys), *keys, *args)

    def _names(self, key: str) -> tuple[bytes, bytes, bytes, bytes]:
        name = key.encode()
        return KEYS.stream, KEYS.call(name), KEYS.waits(name), KEYS.progress(name)

    def _open(self) -> list[tuple[bytes, Run]]:
        return [
            (entry_id, run)
            for entry_id, run in self.runs.items()
            if run.owner is not None and not run.acknowledged
        ]

    @rule(key=NAMES, digest=sampled_from("xy"), waits=sampled_from([b"0", b"1"]))
    def claim(self, key: str, digest: str, waits: bytes) -> None:
        head = (DIGESTS[digest], b"me", waits, b"0", b"g", b"")
        field = b"%b 1 1 0 %b" % (DIGESTS[digest], key.encode())
        reply = self._run(CLAIM, self._names(key), *head, b"from", b"me", b"call", field)
        state = self.ended.get(key, (b"", b""))[0]
        if key in self.current and state not in (b"k", b"e"):
            run = self.runs[self.current[key]]
            if run.digest != digest:
                assert reply == 0
            elif state:
                assert reply[:1] == state
                assert reply.endswith(b"|" + self.ended[key][1])
            else:
                assert reply[:1] in b"wsc"
                assert self.current[key] in reply
            return
        assert reply[:1].isdigit()
        self.ended.pop(key, None)
        self.current[key] = reply
        self.runs[reply] = Run(key, digest)

    @rule(worker=WORKERS)
    def take(self, worker: bytes) -> None:
        for _, entries in self.client.xreadgroup("g", worker, {"s": ">"}, count=1):
            for entry_id, _ in entries:
                self.runs[entry_id].owner = worker
                self.runs[entry_id].deliveries = 1

    @rule(worker=WORKERS, number=sampled_from(range(3)))
    def take_over(self, worker: bytes, number: int) -> None:
        if self._open():
            entry_id, run = self._open()[number % len(self._open())]
            self.client.xclaim("s", "g", worker, 0, [entry_id])
            run.owner = worker
            run.deliveries += 1
            keys = self._names(run.key)[:2]
            verdict = self._run(BEGIN, keys, b"g", worker, entry_id, DIGESTS[run.digest])
            mine = self.current.get(run.key) == entry_id and run.key not in self.ended
            if not mine:
                # Nobody has the key, or another request: then it is let go.
                assert verdict in (0, 1)
                run.acknowledged = verdict == 0
                if verdict == 1:
                    self.current[run.key] = entry_id
            else:
                assert verdict == (2 if run.asked else 1)

    @rule(
        worker=WORKERS,
        number=sampled_from(range(4)),
        state=sampled_from([b"d", b"d", b"f", b"e"]),
        attempt=sampled_from([1, 2, 3]),
    )
    def finish(self, worker: bytes, number: int, state: bytes, attempt: int) -> None:
        """Whoever has run it, now or before, says what it came to."""
        if not self.runs:
            return
        entry_id = [*self.runs][-1 - number % len(self.runs)]
        run, value = self.runs[entry_id], b"%s %s" % (worker, state)
        name = run.key.encode()
        call, waits, progress = self._names(run.key)[1:]
        keys = (KEYS.stream, call, waits, progress)
        own = () if state == b"d" else (worker, b"%d" % attempt)
        what = (b"g", entry_id, state, DIGESTS[run.digest], value, b"100000", name)
        reply = self._run(FINISH, keys, *what, KEYS.inbox("me"), b"0", *own)
        fits = state == b"d" or (run.owner == worker and run.deliveries == attempt)
        held = run.owner is not None and not run.acknowledged
        if not held or not fits:
            assert reply in (0, 4, 6)  # who was overtaken says so again, with 4 more
            assert reply == 0 or self.current.get(run.key) == entry_id
            return
        assert reply % 4 >= 1
        assert (reply >= 4) is (run.deliveries > 1)  # another attempt may have left items
        run.acknowledged = True
        if self.current.get(run.key, entry_id) == entry_id and run.key not in self.ended:
            self.current[run.key] = entry_id
            self.ended[run.key] = (state, value)
            self.results.setdefault(entry_id, []).append(value)

    def _cancelling(self, key: str, entry_id: bytes) -> tuple[tuple[bytes, ...], tuple[Any, ...]]:
        stream, call, waits, progress = self._names(key)
        keys = (stream, call, KEYS.due, waits, progress, KEYS.items(key.encode()))
        beginnings = (KEYS.inbox(""), KEYS.worker(b"", b""), b"consumer-", HANDED_BACK, DELAYED)
        return keys, (*beginnings, b"g", entry_id, key.encode(), b"word", b"100000")

    def _cancelled(self, key: str, reply: Any) -> None:
        entry_id = self.current[key]
        run = self.runs[entry_id]
        if run.owner is None or run.acknowledged:
            assert isinstance(reply, list)
            self.ended[key] = (b"k", b"")
        else:
            assert reply == 1
            run.asked = True

    @rule(key=NAMES)
    def cancel(self, key: str) -> None:
        keys, args = self._cancelling(key, self.current.get(key, b"1-1"))
        reply = self._run(CANCEL_CALL, keys, *args)
        if key not in self.current or key in self.ended:
            assert reply == 0
        else:
            self._cancelled(key, reply)

    @rule(key=NAMES, cancels=sampled_from([b"0", b"1"]))
    def leave(self, key: str, cancels: bytes) -> None:
        """Nobody else waits: all are the same peer."""
        keys, args = self._cancelling(key, b"")
        reply = self._run(LEAVE_CALL, keys, *args, b"me", cancels, b"")
        if cancels == b"1" and key in self.current and key not in self.ended:
            self._cancelled(key, reply)
        else:
            assert reply == 0

    @rule(key=NAMES)
    def attach(self, key: str) -> None:
        name = key.encode()
        known = self._run(ATTACH, (KEYS.call(name), KEYS.waits(name)), b"me")
        if key not in self.current:
            assert known is None
        else:
            assert self.current[key] in known

    @rule(key=NAMES)
    def forget(self, key: str) -> None:
        name = key.encode()
        names = (KEYS.call(name), KEYS.waits(name), KEYS.progress(name), KEYS.items(name))
        done = self._run(FORGET, names)
        assert done == (0 if key not in self.current else 1 if key in self.ended else -1)
        if done == 1:
            del self.current[key], self.ended[key]

    @rule(number=sampled_from(range(3)))
    def die(self, number: int) -> None:
        if self._open():
            entry_id, run = self._open()[number % len(self._open())]
            self.client.xack("s", "g", entry_id)
            run.acknowledged = True
            call, waits, progress = self._names(run.key)[1:]
            args = (entry_id, DIGESTS[run.digest], b"100000", b"why")
            done = self._run(DIE, (call, waits, progress, KEYS.items(run.key.encode())), *args)
            mine = self.current.get(run.key, entry_id) == entry_id and run.key not in self.ended
            assert done == mine
            if mine:
                self.current[run.key] = entry_id
                self.ended[run.key] = (b"x", b"why")

    @invariant()
    def what_is_known(self) -> None:
        """One result at most of each run, and Redis knows the same as the model."""
        if not hasattr(self, "client"):
            return
        assert all(len(values) == 1 for values in self.results.values())
        for key in ("a", "b"):
            found = self._run(STATE, self._names(key)[:2], b"g")
            if key not in self.current:
                assert found is None
                continue
            state, left, *held = found
            run = self.runs[self.current[key]]
            if key in self.ended:
                assert state == self.ended[key][0]
                assert left > 0
            else:
                assert state in (b"c" if run.asked else b"ws")
                assert left == -1
                waits = run.owner is None or run.acknowledged
                assert held[:1] == ([] if waits else [run.owner])


def test_any_order(client: None) -> None:
    run_state_machine_as_test(  # type: ignore[no-untyped-call]
        Machine, settings=settings(max_examples=25, stateful_step_count=30)
    )
