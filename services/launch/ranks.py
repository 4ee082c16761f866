"""The trainer's ranks: one process each, which start together and end together, on one node or on several.

A rank that lost another would wait for it in a collective, so every node has a launcher, which ends its ranks when one
of them ends badly. The launchers of several nodes meet at the first one's, over connections that last as long as the
ranks do: one that breaks off ends the ranks everywhere. Whoever started the launchers starts them again. A few lines
of JSON go over those connections, behind a proof of RLIF_API_TOKEN where that is set; nothing is pickled.
"""

import hashlib
import hmac
import json
import logging
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

from services.address import bound, free_port, listen
from services.startup import StartupError
from services.supervisor import EXIT_FAILED, EXIT_REFUSED, die_with_parent

log = logging.getLogger(__name__)

JOIN_SECONDS = 1800.0
"""How long the launchers of several nodes wait for each other: images are pulled, nodes are found."""
HELLO_SECONDS = 10.0
GRACE_SECONDS = 10.0
"""When one rank has ended badly: the others may still say why, and a refusal counts more than what it leads to."""
STOP_SECONDS = 900.0
"""From a stop signal on: a step and a checkpoint."""
LAST_SECONDS = 120.0
"""From the end of the first node's ranks on, where training is done."""
TICK_SECONDS = 0.1
STOPPED = 128 + signal.SIGTERM
LONGEST_LINE = 4096


@dataclass(frozen=True)
class Place:
    """Node `number` of `nodes`; the launcher of node 0 listens on `host`:`port`, by which the others reach it."""

    nodes: int = 1
    number: int = 0
    host: str = "127.0.0.1"
    port: int = 0


def place(nodes: int, number: int, leader: str | None) -> Place:
    """Raises StartupError naming the option."""
    if number >= nodes:
        raise StartupError(f"--node-rank {number}: of --nodes {nodes} choose 0 to {nodes - 1}")
    if nodes == 1:
        return Place()
    host, _, port = (leader or "").rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise StartupError(f"--leader {leader}: with --nodes {nodes}, write HOST:PORT where node 0 listens")
    return Place(nodes, number, host.strip("[]"), int(port))


def launch(argv: list[str], per_node: int, here: Place, states: dict[str, str]) -> int:
    """Run `per_node` processes of `argv` on this node until all are done. Returns the exit code: 0 done, 2 one of them
    refused, 143 stopped by a signal here or on another node, else 1. `states["ranks"]` turns "ok" once they run.

    Each gets RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT. Raises StartupError: the nodes did not meet.
    """
    with _stop_signals() as stops:
        link = _Link({})
        try:
            if here.nodes == 1:
                port = free_port()
            else:
                link, port = _meet(here, stops)
            ranks = _start(argv, per_node, here, port)
            states["ranks"] = "ok"
            return _run(ranks, link, stops)
        except _StoppedEarly:
            return STOPPED
        finally:
            link.close()


class _StoppedEarly(Exception):
    pass


@contextmanager
def _stop_signals() -> Iterator[list[int]]:
    """The stop signals that have come so far."""
    seen: list[int] = []
    numbers = (signal.SIGTERM, signal.SIGINT)
    before = {number: signal.signal(number, lambda got, _frame: seen.append(got)) for number in numbers}
    try:
        yield seen
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# ---- the ranks of this node ------------------------------------------------------------------------------------------


def _start(argv: list[str], per_node: int, here: Place, port: int) -> list[subprocess.Popen]:
    shared = {
        "WORLD_SIZE": str(here.nodes * per_node),
        "LOCAL_WORLD_SIZE": str(per_node),
        "MASTER_ADDR": here.host,
        "MASTER_PORT": str(port),
    }
    # Several processes that each take every core get in each other's way.
    usual = {"OMP_NUM_THREADS": "1"} if per_node > 1 else {}
    if here.nodes == 1:  # the libraries would listen where others reach them
        usual |= {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"}
    started: list[subprocess.Popen] = []
    for local in range(per_node):
        own = {"RANK": str(here.number * per_node + local), "LOCAL_RANK": str(local)}
        env = {**usual, **os.environ, **shared, **own}
        preexec = die_with_parent if sys.platform == "linux" else None
        started.append(subprocess.Popen(argv, env=env, stdin=subprocess.DEVNULL, preexec_fn=preexec))
    return started


def _run(ranks: list[subprocess.Popen], link: "_Link", stops: list[int]) -> int:
    fault, ends, stopping, told = "", float("inf"), False, False
    try:
        while True:
            time.sleep(TICK_SECONDS)
            codes = [rank.poll() for rank in ranks]
            link.listen()
            if (stops or link.stop_asked) and not stopping:
                stopping = True
                ends = min(ends, time.monotonic() + STOP_SECONDS)
                link.say("stop")
                _signal(ranks, signal.SIGTERM)
            if None not in codes and not any(codes) and not told:
                told = True
                link.say("done")
            if told and link.all_done:
                return STOPPED if stopping else 0
            if not fault:
                fault = _fault(codes) or link.fault
                if fault:
                    log.log(logging.INFO if stopping else logging.ERROR, "%s: ending all ranks", fault)
                    link.close()
                    ends = min(ends, time.monotonic() + GRACE_SECONDS)
                elif link.leader_done or told:
                    ends = min(ends, time.monotonic() + LAST_SECONDS)
            if (fault and None not in codes) or time.monotonic() > ends:
                _end(ranks)
                refused = EXIT_REFUSED in [rank.returncode for rank in ranks]
                return EXIT_REFUSED if refused else STOPPED if stopping else EXIT_FAILED
    finally:
        _end(ranks)


def _fault(codes: list[int | None]) -> str:
    for rank, code in enumerate(codes):
        if code:
            how = f"signal {-code}" if code < 0 else f"exit code {code}"
            return f"local rank {rank} has ended ({how})"
    return ""


def _signal(ranks: list[subprocess.Popen], number: int) -> None:
    for rank in ranks:
        if rank.poll() is None:
            rank.send_signal(number)


def _end(ranks: list[subprocess.Popen]) -> None:
    _signal(ranks, signal.SIGKILL)
    for rank in ranks:
        rank.wait(30)


# ---- the launchers of several nodes ----------------------------------------------------------------------------------


class _Link:
    """The connections to other nodes' launchers, by node. What a node says: `stop`, once its own ranks are asked to
    stop; `done`, once they have ended well. `fault`: who is gone without a `done`."""

    def __init__(self, peers: dict[int, socket.socket], number: int = 0):
        self.peers, self.number = peers, number
        self.done: set[int] = set()
        self.stop_asked, self.fault = False, ""
        self._unread = dict.fromkeys(peers, b"")

    @property
    def all_done(self) -> bool:
        return self.done >= set(self._unread)

    @property
    def leader_done(self) -> bool:
        return self.number > 0 and 0 in self.done

    def say(self, word: str) -> None:
        for peer in self.peers.values():
            with suppress(OSError):  # whoever is gone is noticed in `listen`
                peer.sendall(f'"{word}"\n'.encode())

    def listen(self) -> None:
        """Take in what has come, without waiting."""
        readable = select.select(list(self.peers.values()), [], [], 0)[0] if self.peers else []
        for node, peer in list(self.peers.items()):
            if peer not in readable:
                continue
            try:
                data = peer.recv(LONGEST_LINE)
            except OSError:
                data = b""
            *lines, self._unread[node] = (self._unread[node] + data).split(b"\n")
            for line in lines:
                if line == b'"done"':
                    self.done.add(node)
                elif line == b'"stop"':
                    self.stop_asked = True
            if not data:
                self.peers.pop(node).close()
                if node not in self.done:
                    self.fault = self.fault or f"node {node} is gone"

    def close(self) -> None:
        for peer in self.peers.values():
            peer.close()
        self.peers.clear()


def _meet(here: Place, stops: list[int]) -> tuple[_Link, int]:
    """The connections once every node is there, and the port of the ranks' store on node 0. Raises StartupError."""
    ends = time.monotonic() + JOIN_SECONDS
    if here.number == 0:
        peers = _gather(here, stops, ends)
        port = free_port(bound(here.host))
        for peer in peers.values():
            peer.sendall(json.dumps({"port": port}).encode() + b"\n")
        return _Link(peers), port
    while True:
        leader = _knock(here, stops, ends)
        try:
            answer = _line(leader, stops, ends)
        except OSError:  # node 0 starts again
            answer = None
        if answer:
            return _Link({0: leader}, here.number), int(answer["port"])
        leader.close()
        time.sleep(1)


def _gather(here: Place, stops: list[int], ends: float) -> dict[int, socket.socket]:
    """Node 0: every other node's connection. Who does not prove to be one of them is sent away."""
    peers: dict[int, socket.socket] = {}
    with listen(bound(here.host), here.port) as listener:
        listener.listen()
        while len(peers) < here.nodes - 1:
            missing = [node for node in range(1, here.nodes) if node not in peers]
            _check(stops, ends, f"waited {JOIN_SECONDS:.0f} s for the launchers of nodes {missing}")
            for gone in select.select(list(peers.values()), [], [], 0)[0]:
                node = next(node for node, peer in peers.items() if peer is gone)
                peers.pop(node).close()  # none of them speaks yet: it has ended
            if select.select([listener], [], [], TICK_SECONDS)[0]:
                peer, _ = listener.accept()
                found = _admit(peer, here, stops)
                if found is None:
                    peer.close()
                    continue
                if found in peers:
                    peers[found].close()
                peers[found] = _kept_alive(peer)
                log.info("the launcher of node %d is here", found)
    return peers


def _admit(peer: socket.socket, here: Place, stops: list[int]) -> int | None:
    """The number of the node that a new connection proves to be."""
    try:
        hello = _line(peer, stops, time.monotonic() + HELLO_SECONDS)
        node, proof = int(hello["node"]), str(hello["proof"])
    except (OSError, StartupError, ValueError, KeyError, TypeError):
        return None
    is_known = 0 < node < here.nodes and hmac.compare_digest(proof.encode(), _proof(here, node).encode())
    return node if is_known else None


def _proof(here: Place, node: int) -> str:
    token = os.environ.get("RLIF_API_TOKEN", "").encode()
    return hmac.new(
        hashlib.sha256(b"rlif ranks" + token).digest(), f"{node} {here.nodes}".encode(), "sha256"
    ).hexdigest()


def _knock(here: Place, stops: list[int], ends: float) -> socket.socket:
    while True:
        _check(stops, ends, f"--leader {here.host}:{here.port}: no launcher of node 0 within {JOIN_SECONDS:.0f} s")
        try:
            leader = socket.create_connection((here.host, here.port), timeout=5)
            leader.sendall(json.dumps({"node": here.number, "proof": _proof(here, here.number)}).encode() + b"\n")
            return _kept_alive(leader)
        except OSError:  # no name yet, nobody there yet
            time.sleep(1)


def _line(peer: socket.socket, stops: list[int], ends: float) -> Any:
    """The next line's JSON; none at the connection's end. Raises StartupError at `ends`, ValueError: no JSON."""
    data = b""
    peer.settimeout(TICK_SECONDS)
    while not data.endswith(b"\n"):
        _check(stops, ends, "the other launcher says nothing")
        with suppress(TimeoutError):
            byte = peer.recv(1)
            if not byte:
                return None
            data += byte
        if len(data) > LONGEST_LINE:
            raise ValueError("too long a line")
    return json.loads(data)


def _check(stops: list[int], ends: float, late: str) -> None:
    if stops:
        raise _StoppedEarly
    if time.monotonic() > ends:
        raise StartupError(late)


def _kept_alive(peer: socket.socket) -> socket.socket:
    """A node that vanished is noticed within half a minute."""
    peer.settimeout(5)
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    if sys.platform == "linux":
        for option, value in ((socket.TCP_KEEPIDLE, 15), (socket.TCP_KEEPINTVL, 5), (socket.TCP_KEEPCNT, 3)):
            peer.setsockopt(socket.IPPROTO_TCP, option, value)
    return peer
