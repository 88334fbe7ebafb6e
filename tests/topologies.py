"""Several real servers on the loopback interface: a master with replicas and sentinels, a Cluster.

What is here blocks, and waits for conditions, not for times: beside peers that are to go on, it is
called in a thread. Servers are frozen and killed as processes; `heal` makes all as it was at the
beginning, but for who is the master.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

import hiredis
import redis

from anyio_kkrpc.redis._stream._keys import hash_slot
from anyio_kkrpc.testing._server import find_server, free_port

if sys.version_info >= (3, 11):
    from typing import Self
else:
    from typing_extensions import Self

T = TypeVar("T")

_HOST = "127.0.0.1"
# Seconds after which a condition isn't waited for any more.
_BOUND = 60.0
_POLL = 0.03
_ATTEMPTS = 5
_SLOTS = 16384
# A Cluster's nodes speak to each other on a port that is by so much higher. Both are below those that
# systems give to outgoing connections.
_BUS = 10000
_CHANCE = random.SystemRandom()
_ALWAYS = (
    *("--bind", _HOST, "--save", "", "--appendonly", "no", "--daemonize", "no"),
    *("--repl-diskless-sync-delay", "0", "--repl-ping-replica-period", "1"),
)


class TopologyError(RuntimeError):
    """The servers are not what they should be by now."""


def until(condition: Callable[[], T], what: str, bound: float = _BOUND) -> T:
    """Wait until a condition holds, and return what it returned. No answer is a no."""
    end = time.monotonic() + bound
    while True:
        with suppress(redis.RedisError, OSError):
            if found := condition():
                return found
        if time.monotonic() >= end:
            raise TopologyError(f"{what}: not within {bound:g} seconds")
        time.sleep(_POLL)


class Node:
    """A process of redis-server or valkey-server.

    :param arguments: all but the port
    :ivar frozen: whether it is there, and does nothing
    """

    def __init__(self, executable: str, folder: Path, port: int, arguments: Sequence[str]) -> None:
        self.port = port
        self.frozen = False
        self._command = [executable, *arguments, "--port", str(port), "--dir", str(folder)]
        self._log = folder / "server.log"
        self._process: subprocess.Popen[bytes] | None = None
        self._finalizer: Any = None
        self._executable = executable
        folder.mkdir(exist_ok=True)

    def __repr__(self) -> str:
        return f"<Node {self.port}>"

    @property
    def url(self) -> str:
        """URL of this node alone."""
        return f"redis://{_HOST}:{self.port}"

    @property
    def pid(self) -> int:
        """Id of the process."""
        assert self._process is not None
        return self._process.pid

    @property
    def running(self) -> bool:
        """Whether the process lives (also if frozen)."""
        return self._process is not None and self._process.poll() is None

    @property
    def answers(self) -> bool:
        """Whether it can answer."""
        return self.running and not self.frozen

    @property
    def log(self) -> str:
        """The end of what it has written."""
        return self._log.read_text(errors="replace")[-5000:]

    def run(self, *command: str | bytes | int, timeout: float = 10.0) -> Any:
        """Return the answer to a command; texts are decoded."""
        # Not by a client: these are many, and clients take much processor time to be made.
        replies = hiredis.Reader(encoding="utf-8", errors="replace", replyError=redis.ResponseError)
        with socket.create_connection((_HOST, self.port), timeout) as peer:
            peer.sendall(hiredis.pack_command(command))
            while (reply := replies.gets()) is False:
                if not (data := peer.recv(65536)):
                    raise ConnectionResetError(f"{self} hung up")
                replies.feed(data)
        if isinstance(reply, Exception):
            raise reply
        return reply

    def lines(self, *command: Any) -> list[str]:
        """Return the lines of the answer to a command, such as CLUSTER NODES."""
        return [line for line in self.run(*command).splitlines() if line]

    def facts(self, *command: Any) -> dict[str, str]:
        """Return what INFO and the like answer."""
        lines = [line.partition(":") for line in self.lines(*command)]
        return {name: value for name, colon, value in lines if colon}

    def start(self) -> None:
        """Start it, and wait until it answers; again after `kill`, with the same port."""
        with open(self._log, "ab") as log:
            process = subprocess.Popen(
                self._command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C must not end it before those who use it
            )
        self._process, self.frozen = process, False
        self._finalizer = weakref.finalize(self, _end, process)

        def ready() -> bool:
            if process.poll() is not None:
                raise TopologyError(f"{self} ended with code {process.returncode}:\n{self.log}")
            return self.facts("INFO", "server").get("process_id") == str(process.pid)

        try:
            until(ready, f"{self} answers")
        except BaseException:
            self.kill()
            raise

    def kill(self) -> None:
        """End it by SIGKILL, frozen or not."""
        if self._finalizer is not None:
            self._finalizer()
        self.frozen = False

    def freeze(self) -> None:
        """Let it do nothing; its connections stay, and nothing answers."""
        assert self._process is not None
        os.kill(self._process.pid, signal.SIGSTOP)
        # The signal takes effect a moment later.
        os.waitid(os.P_PID, self._process.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
        self.frozen = True

    def thaw(self) -> None:
        """Let it go on."""
        assert self._process is not None
        self.frozen = False
        os.kill(self._process.pid, signal.SIGCONT)

    @contextmanager
    def freezing(self) -> Iterator[None]:
        """Freeze it for the time of a block."""
        self.freeze()
        try:
            yield
        finally:
            if self.frozen:
                self.thaw()


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()  # also a process that is stopped
    process.wait()


class _Setup(ABC):
    """Starts nodes, and ends them whatever happens."""

    def __init__(self, executable: str | None) -> None:
        found = executable or find_server()
        assert found is not None, "there is no server program on this machine"
        self.executable = found
        self._folder = Path(tempfile.mkdtemp(prefix="anyio_kkrpc-"))
        self._all: list[Node] = []

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop()

    @abstractmethod
    def start(self) -> None:
        """Start all of them, and wait until they are what they should be."""

    def stop(self) -> None:
        """Kill all of them, and remove what they kept. Idempotent."""
        for node in self._all:
            node.kill()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _launch(
        self,
        choose: Callable[[], int],
        arguments: Callable[[Path], Sequence[str]],
    ) -> Node:
        """Start a node on a port that is free now; if somebody else was faster, on another one."""
        for left in reversed(range(_ATTEMPTS)):
            folder = self._folder / str(len(self._all))
            folder.mkdir(exist_ok=True)
            node = Node(self.executable, folder, choose(), arguments(folder))
            self._all.append(node)
            try:
                node.start()
                return node
            except TopologyError as exc:
                self._all.remove(node)
                if not left or "Address already in use" not in str(exc):
                    raise
                shutil.rmtree(folder)
        raise AssertionError("not reached")


class SentinelSetup(_Setup):
    """A master with replicas, and sentinels that watch it.

    :param executable: of which server; any that is there, if ``None``
    :param name: what the sentinels call the master
    :param down_after: milliseconds of silence after which a node is down
    :param failover_timeout: milliseconds
    :param arguments: further ones for master and replicas
    :param sentinel_lines: further ones of the sentinels' configuration
    :ivar nodes: master and replicas
    :ivar sentinels: those who watch them
    """

    def __init__(
        self,
        executable: str | None = None,
        *,
        replicas: int = 2,
        sentinels: int = 3,
        name: str = "mymaster",
        down_after: int = 1000,
        failover_timeout: int = 1000,
        arguments: Sequence[str] = (),
        sentinel_lines: Sequence[str] = (),
    ) -> None:
        super().__init__(executable)
        self.name = name
        self.nodes: list[Node] = []
        self.sentinels: list[Node] = []
        self._counts = replicas, sentinels
        self._times = down_after, failover_timeout
        self._arguments = (*_ALWAYS, "--replica-priority", "100", *arguments)
        self._lines = sentinel_lines

    @property
    def url(self) -> str:
        """URL of the set-up as peers use it."""
        hosts = ",".join(f"{_HOST}:{node.port}" for node in self.sentinels)
        return f"redis+sentinel://{hosts}/{self.name}"

    def start(self) -> None:
        """Start all, and wait until the sentinels know all."""
        replicas, sentinels = self._counts
        self.nodes = [self._launch(free_port, lambda _: self._arguments)]
        port = str(self.nodes[0].port)
        arguments = (*self._arguments, "--replicaof", _HOST, port)
        self.nodes += [self._launch(free_port, lambda _: arguments) for _ in range(replicas)]
        until(lambda: self._replicated(self.nodes[0]), "replicas are online")
        self.sentinels = [
            self._launch(free_port, lambda folder: self._sentinel(folder, port))
            for _ in range(sentinels)
        ]
        for sentinel in self.sentinels:
            # They find each other sooner so; and a machine that is busy for two seconds isn't one
            # that can't be trusted for thirty.
            self._tune(sentinel, "PUBLISH-PERIOD", 100, "INFO-PERIOD", 200, "TILT-TRIGGER", 60000)
        self._wait_watched()
        for sentinel in self.sentinels:
            self._tune(sentinel, "PUBLISH-PERIOD", 2000, "INFO-PERIOD", 10000)

    def _sentinel(self, folder: Path, port: str) -> Sequence[str]:
        down_after, failover_timeout = self._times
        quorum = self._counts[1] // 2 + 1
        lines = [
            f"bind {_HOST}",
            f"sentinel monitor {self.name} {_HOST} {port} {quorum}",
            f"sentinel down-after-milliseconds {self.name} {down_after}",
            f"sentinel failover-timeout {self.name} {failover_timeout}",
            f"sentinel parallel-syncs {self.name} 9",
            *self._lines,
        ]
        path = folder / "sentinel.conf"
        path.write_text("\n".join(lines) + "\n")
        return str(path), "--sentinel"

    def _tune(self, sentinel: Node, *settings: Any) -> None:
        with suppress(redis.ResponseError):  # before Redis 7.0
            sentinel.run("SENTINEL", "DEBUG", *settings)

    def _replicated(self, master: Node) -> bool:
        """Whether all others that run follow a master, and are up to date."""
        facts = master.facts("INFO", "replication")
        states = [value for name, value in facts.items() if name.startswith("slave")]
        online = sum("state=online" in state for state in states)
        running = sum(node.running for node in self.nodes)
        return facts["role"] == "master" and online == running - 1

    def view(self, sentinel: Node) -> dict[str, str]:
        """Return what a sentinel knows of the master, by the names of SENTINEL MASTER."""
        flat = sentinel.run("SENTINEL", "MASTER", self.name)
        return dict(zip(flat[::2], flat[1::2], strict=True))

    def _wait_watched(self) -> None:
        replicas, sentinels = self._counts

        def watched() -> bool:
            views = [self.view(sentinel) for sentinel in self.sentinels if sentinel.answers]
            return len({view["port"] for view in views}) == 1 and all(
                view["flags"] == "master"
                and int(view["num-slaves"]) >= replicas
                and int(view["num-other-sentinels"]) == sentinels - 1
                for view in views
            )

        until(watched, "all sentinels know master, replicas and each other")

    # Who is who

    def master(self) -> Node:
        """Return the master, as most of the sentinels say."""

        def find() -> Node:
            ports = [int(self.view(node)["port"]) for node in self.sentinels if node.answers]
            port = max(set(ports), key=ports.count)
            return next(node for node in self.nodes if node.port == port)

        return until(find, "the sentinels say who is the master")

    def replicas(self) -> list[Node]:
        """Return the others."""
        master = self.master()
        return [node for node in self.nodes if node is not master]

    def wait_master(self, other_than: Node, bound: float = _BOUND) -> Node:
        """Wait until another node is the master, takes writes, and all sentinels say so."""

        def changed() -> Node | None:
            views = [self.view(node) for node in self.sentinels if node.answers]
            master = self.master()
            agreed = len({view["port"] for view in views}) == 1
            there = agreed and master is not other_than
            return master if there and master.run("ROLE")[0] == "master" else None

        return until(changed, "there is another master", bound)

    # What happens

    def failover(self, *, coordinated: bool = False) -> Node:
        """Have a replica promoted by the sentinels; return the new master once it is known.

        :param coordinated: whether the master is asked, and stops writes (Valkey 9)
        """
        before = self.master()
        words = ("COORDINATED",) if coordinated else ()

        def changed() -> Node | None:
            sentinel = next(node for node in self.sentinels if node.answers)
            with suppress(redis.ResponseError):  # there may be one under way
                sentinel.run("SENTINEL", "FAILOVER", self.name, *words)
            # One whose replica isn't promoted in time is given up, and begun by nobody again.
            with suppress(TopologyError):
                return self.wait_master(before, 5 * self._times[1] / 1000)
            return None

        return until(changed, "the sentinels fail over")

    def heal(self) -> None:
        """Make all nodes run and follow the present master."""
        for node in (*self.nodes, *self.sentinels):
            if node.frozen:
                node.thaw()
            elif not node.running:
                node.start()
        for sentinel in self.sentinels:
            self._tune(sentinel, "PUBLISH-PERIOD", 100, "INFO-PERIOD", 200)
        self._wait_watched()

        def followed() -> bool:
            master = self.master()
            roles = {node: node.run("ROLE") for node in self.nodes}
            if all(role[0] == "slave" for role in roles.values()):
                # A failover that nobody waited for came in between: they follow each other.
                master.run("REPLICAOF", "NO", "ONE")
            for node, role in roles.items():
                if node is not master and not (role[0] == "slave" and role[2] == master.port):
                    node.run("REPLICAOF", _HOST, master.port)
            return self._replicated(master)

        until(followed, "all nodes follow the master")
        for sentinel in self.sentinels:
            self._tune(sentinel, "PUBLISH-PERIOD", 2000, "INFO-PERIOD", 10000)


class _Told:
    """A line of CLUSTER NODES."""

    def __init__(self, line: str) -> None:
        self.id, address, flags, self.master_id, _, _, epoch, self.link, *rest = line.split()
        self.port = int(address.partition("@")[0].rpartition(":")[2])
        self.flags = set(flags.split(","))
        self.epoch = int(epoch)
        self._ranges = [words.partition("-") for words in rest if not words.startswith("[")]
        self.moving = any(words.startswith("[") for words in rest)

    def has(self, slot: int) -> bool:
        """Whether it owns a slot."""
        return any(int(first) <= slot <= int(last or first) for first, _, last in self._ranges)

    @property
    def serves(self) -> bool:
        """Whether it has slots and is there."""
        return "master" in self.flags and "fail" not in self.flags and bool(self._ranges)


class ClusterSetup(_Setup):
    """A Redis Cluster.

    :param executable: of which server; any that is there, if ``None``
    :param masters: how many of them; the slots are spread evenly
    :param replicas: how many each has
    :param node_timeout: milliseconds of silence after which a node is down
    :param arguments: further ones for all nodes
    :ivar nodes: the first ones were the masters at the beginning
    """

    def __init__(
        self,
        executable: str | None = None,
        *,
        masters: int = 3,
        replicas: int = 1,
        node_timeout: int = 1000,
        arguments: Sequence[str] = (),
    ) -> None:
        super().__init__(executable)
        self.nodes: list[Node] = []
        self._counts = masters, replicas
        # When a node was elected, and seconds for which it remembers the votes.
        self._elected: dict[Node, float] = {}
        self._votes = max(node_timeout * 4 / 1000, 4.0) + 0.5
        self._arguments = (
            *_ALWAYS,
            *("--cluster-enabled", "yes", "--cluster-config-file", "nodes.conf"),
            *("--cluster-node-timeout", str(node_timeout)),
            *("--cluster-require-full-coverage", "no"),
            # Whoever is there is promoted, and replicas stay with their masters.
            *("--cluster-replica-validity-factor", "0", "--cluster-migration-barrier", "99"),
            *arguments,
        )

    @property
    def url(self) -> str:
        """URL of the Cluster as peers use it."""
        return self.url_of(*self.nodes)

    def url_of(self, *nodes: Node) -> str:
        """Return a URL that names only some of the nodes."""
        return "redis+cluster://" + ",".join(f"{_HOST}:{node.port}" for node in nodes)

    def start(self) -> None:
        """Start all nodes, make them a Cluster, and wait until all serve."""
        masters, replicas = self._counts
        total = masters * (1 + replicas)
        self.nodes = [
            self._launch(free_port_and_bus, lambda _: self._arguments) for _ in range(total)
        ]
        for i, node in enumerate(self.nodes):
            node.run("CLUSTER", "SET-CONFIG-EPOCH", i + 1)
            if i < masters:
                slots = range(i * _SLOTS // masters, (i + 1) * _SLOTS // masters)
                node.run("CLUSTER", "ADDSLOTS", *slots)
        for node in self.nodes[1:]:
            self.nodes[0].run("CLUSTER", "MEET", _HOST, node.port)
        until(self._met, "all nodes know each other")
        for i, node in enumerate(self.nodes[masters:]):
            node.run("CLUSTER", "REPLICATE", self._id(self.nodes[i % masters]))
        self._wait_whole()

    def _met(self) -> bool:
        return all(
            len(told := self._told(node)) == len(self.nodes)
            and not any(one.flags & {"handshake", "noaddr"} for one in told)
            for node in self.nodes
        )

    def _told(self, node: Node) -> list[_Told]:
        return [_Told(line) for line in node.lines("CLUSTER", "NODES")]

    def _own(self, node: Node) -> _Told:
        return next(told for told in self._told(node) if "myself" in told.flags)

    def _id(self, node: Node) -> str:
        return str(node.run("CLUSTER", "MYID"))

    def _wait_whole(self) -> None:
        """Wait until all nodes that run say that all is well."""
        replicas = self._counts[1]

        def whole() -> bool:
            # Two failovers one shortly after the other: they must agree on the first one.
            views, epochs = set(), set()
            for node in self.nodes:
                if not node.running:
                    continue
                told = self._told(node)
                views.add(frozenset((one.id, one.epoch) for one in told if one.serves))
                epochs.add(node.facts("CLUSTER", "INFO")["cluster_current_epoch"])
                owners = {one.id for one in told if one.serves}
                own = next(one for one in told if "myself" in one.flags)
                if node.facts("CLUSTER", "INFO")["cluster_state"] != "ok" or own.moving:
                    return False
                if any(one.flags & {"fail", "fail?"} for one in told):
                    return False
                for owner in owners:
                    followers = [one for one in told if one.master_id == owner]
                    if len(followers) < replicas:
                        return False
                facts = node.facts("INFO", "replication")
                if facts["role"] == "slave" and facts["master_link_status"] != "up":
                    return False
            return len(views) == len(epochs) == 1

        until(whole, "all nodes serve")

    # Who is who

    def owner(self, key: str | bytes) -> Node:
        """Return the node that has a key, by what the nodes say of themselves."""
        slot = hash_slot(key.encode() if isinstance(key, str) else key)

        def find() -> Node | None:
            owners = []
            for node in self.nodes:
                if node.answers:
                    own = self._own(node)
                    if "master" in own.flags and own.has(slot):
                        owners.append((own.epoch, node.port, node))
            return max(owners)[2] if owners else None

        return until(find, f"a node has slot {slot}")

    def wait_owner(self, key: str | bytes, other_than: Node) -> Node:
        """Wait until another node has the key."""

        def changed() -> Node | None:
            owner = self.owner(key)
            return None if owner is other_than else owner

        owner = until(changed, "another node has the key")
        self._elected[owner] = time.monotonic()
        return owner

    def wait_known(self, key: str | bytes) -> None:
        """Wait until all nodes say the same of who has a key."""
        slot = hash_slot(key.encode() if isinstance(key, str) else key)

        def known() -> bool:
            port = self.owner(key).port
            return all(
                any(
                    told.serves and told.has(slot) and told.port == port
                    for told in self._told(node)
                )
                for node in self.nodes
                if node.answers
            )

        until(known, "all nodes know who has the key")

    def replica_of(self, node: Node) -> Node:
        """Return a replica of a master."""
        identity = self._id(node)
        return next(
            one
            for one in self.nodes
            if one is not node and one.answers and self._own(one).master_id == identity
        )

    def stranger(self, key: str | bytes) -> Node:
        """Return another master than the one that has the key."""
        owner = self.owner(key)
        return next(
            node
            for node in self.nodes
            if node is not owner and node.answers and self._own(node).serves
        )

    # What happens

    def failover(self, key: str | bytes, *words: str) -> Node:
        """Have a replica take over from the owner of a key; return it once it has.

        :param words: ``"FORCE"`` or ``"TAKEOVER"``, by which the owner isn't asked
        """
        owner = self.owner(key)
        replica = self.replica_of(owner)
        if not words:
            # A node that was elected a moment ago counts those votes again, and is none in the end.
            time.sleep(max(self._elected.get(replica, 0.0) + self._votes - time.monotonic(), 0.0))

        def changed() -> Node | None:
            if self.owner(key) is replica:
                return replica
            replica.run("CLUSTER", "FAILOVER", *words)
            with suppress(TopologyError):  # a manual failover gives up after five seconds
                return until(lambda: self._own(replica).serves and replica, "promotion", 6.0)
            return None

        until(changed, "the replica takes over")
        self._elected[replica] = time.monotonic()
        return replica

    def begin_move(self, key: str | bytes, target: Node) -> tuple[int, Node]:
        """Have the slot of a key begin to move to another master; return it, and where it still is.

        From now on either of them refuses what needs keys that it lacks.
        """
        slot, source = hash_slot(key.encode() if isinstance(key, str) else key), self.owner(key)
        target.run("CLUSTER", "SETSLOT", slot, "IMPORTING", self._id(source))
        source.run("CLUSTER", "SETSLOT", slot, "MIGRATING", self._id(target))
        return slot, source

    def move(self, key: str | bytes, target: Node, *, pause: float = 0.0) -> float:
        """Move the slot of a key to another master, key by key.

        :param pause: seconds before, between and after the keys
        :return: the seconds from the first key's move to the slot's
        """
        slot, source = self.begin_move(key, target)
        time.sleep(pause)
        began = time.monotonic()
        while keys := source.run("CLUSTER", "GETKEYSINSLOT", slot, 1):
            source.run("MIGRATE", _HOST, target.port, keys[0], 0, 10000)
            time.sleep(pause)
        for node in (target, source):
            node.run("CLUSTER", "SETSLOT", slot, "NODE", self._id(target))
        took = time.monotonic() - began
        until(lambda: self.owner(key) is target, "the slot has been moved")
        return took

    def move_atomically(self, key: str | bytes, target: Node) -> bool:
        """Move the slot of a key in one step; return false if the server can't (before Valkey 9 and
        Redis 8.4).
        """
        slot, source = hash_slot(key.encode() if isinstance(key, str) else key), self.owner(key)
        for node, command in (
            (target, ("MIGRATION", "IMPORT", slot, slot)),
            (source, ("MIGRATESLOTS", "SLOTSRANGE", slot, slot, "NODE", self._id(target))),
        ):
            with suppress(redis.ResponseError):
                node.run("CLUSTER", *command)
                until(lambda: self.owner(key) is target, "the slot has been moved")
                return True
        return False

    def heal(self) -> None:
        """Make all nodes run, and wait until all is whole."""
        for node in self.nodes:
            if node.frozen:
                node.thaw()
            elif not node.running:
                node.start()
        self._wait_whole()


def free_port_and_bus() -> int:
    """Return a port that was free a moment ago, and so was that of its bus."""
    for port in _CHANCE.sample(range(16384, 32768 - _BUS), 50):
        with socket.socket() as first, socket.socket() as second:
            try:
                first.bind((_HOST, port))
                second.bind((_HOST, port + _BUS))
            except OSError:
                continue
            return port
    raise TopologyError("there are no free ports")
