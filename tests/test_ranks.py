"""The launcher of ranks: they start together and end together, and nobody outside can speak to them."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from services.address import free_port
from services.launch.ranks import place
from services.startup import StartupError

ROOT = Path(__file__).parent.parent
LAUNCH = """
import sys
from services.launch import ranks
ranks.GRACE_SECONDS = 1.0
nodes, number, port, per_node = map(int, sys.argv[1:5])
sys.exit(ranks.launch(sys.argv[5:], per_node, ranks.Place(nodes, number, "127.0.0.1", port), {}))
"""
WAITS = "import time; time.sleep(60)"
"""A rank in a collective."""
STOPS = "import signal, sys; signal.signal(signal.SIGTERM, lambda *_: sys.exit(0)); print(flush=True); signal.pause()"


class Launchers:
    def __init__(self, folder: Path):
        self.folder, self.started = folder, []

    def start(self, rank: str, per_node: int = 1, nodes: int = 1, number: int = 0, port: int = 0, token: str = "t"):
        env = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE")}
        env |= {"RLIF_API_TOKEN": token, "OUT": str(self.folder)}
        argv = [sys.executable, "-c", LAUNCH, str(nodes), str(number), str(port), str(per_node)]
        process = subprocess.Popen([*argv, sys.executable, "-c", rank], cwd=ROOT, env=env)
        self.started.append(process)
        return process

    def told(self) -> list[str]:
        return sorted(path.name for path in self.folder.iterdir())


@pytest.fixture
def launchers(tmp_path):
    made = Launchers(tmp_path)
    yield made
    for process in made.started:
        if process.poll() is None:
            process.kill()  # its ranks die with it
        process.wait(10)


def tells(then: str) -> str:
    """A rank that leaves its number and pid in a file, and then does `then`."""
    note = "name = os.environ['RANK'] + '-of-' + os.environ['WORLD_SIZE']"
    note += "; open(os.environ['OUT'] + '/' + name, 'w').write(str(os.getpid()))"
    return f"import os, sys, time, signal; {note}; {then}"


def wait_for(condition: Callable[[], object], seconds: float = 20) -> None:
    ends = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < ends, "waited too long"
        time.sleep(0.05)


def alive(folder: Path) -> list[int]:
    found = []
    for path in folder.iterdir():
        with suppress(psutil.NoSuchProcess):  # it may end while it is looked at
            pid = int(path.read_text())
            found += [pid] if psutil.Process(pid).status() != psutil.STATUS_ZOMBIE else []
    return found


def test_all_ranks_know_their_place(launchers):
    assert launchers.start(tells("pass"), per_node=3).wait(20) == 0
    assert launchers.told() == ["0-of-3", "1-of-3", "2-of-3"]


@pytest.mark.parametrize(("code", "shown"), [("sys.exit(1)", 1), ("sys.exit(2)", 2), ("os.kill(os.getpid(), 9)", 1)])
def test_a_rank_that_ends_badly_ends_all_and_a_refusal_stays_one(launchers, tmp_path, code, shown):
    process = launchers.start(tells(f"{code} if os.environ['RANK'] == '1' else time.sleep(60)"), per_node=2)
    assert process.wait(20) == shown
    assert alive(tmp_path) == []


def test_a_refusal_counts_more_than_what_it_leads_to(launchers):
    rank = tells("time.sleep(0.5) or sys.exit(2) if os.environ['RANK'] == '1' else sys.exit(1)")
    assert launchers.start(rank, per_node=2).wait(20) == 2


def test_ranks_die_with_their_launcher(launchers, tmp_path):
    process = launchers.start(tells(WAITS), per_node=2)
    wait_for(lambda: len(launchers.told()) == 2 and len(alive(tmp_path)) == 2)
    process.kill()
    wait_for(lambda: alive(tmp_path) == [])


def test_several_nodes_meet_and_a_lost_rank_ends_all_of_them(launchers, tmp_path):
    port = free_port()
    second = launchers.start(tells(WAITS), nodes=2, number=1, port=port)
    first = launchers.start(tells(WAITS), nodes=2, number=0, port=port)
    wait_for(lambda: launchers.told() == ["0-of-2", "1-of-2"] and len(alive(tmp_path)) == 2)
    os.kill(int((tmp_path / "1-of-2").read_text()), signal.SIGKILL)
    assert (first.wait(20), second.wait(20)) == (1, 1)
    assert alive(tmp_path) == []


def test_a_node_that_is_stopped_stops_the_others_too(launchers):
    """A drained pod: the first node's rank has to write a checkpoint."""
    port = free_port()
    both = [launchers.start(tells(STOPS), nodes=2, number=number, port=port) for number in (0, 1)]
    wait_for(lambda: len(launchers.told()) == 2)
    time.sleep(0.3)  # until both ranks wait for their signal
    both[1].terminate()
    assert [process.wait(20) for process in both] == [143, 143]


def test_nodes_that_finish_one_after_the_other_are_done(launchers):
    port = free_port()
    rank = tells("time.sleep(0.8 * int(os.environ['RANK']))")
    both = [launchers.start(rank, nodes=2, number=number, port=port) for number in (0, 1)]
    assert [process.wait(20) for process in both] == [0, 0]


def test_strangers_are_sent_away(launchers):
    port = free_port()
    first = launchers.start(tells("pass"), nodes=2, number=0, port=port)
    stranger = launchers.start(tells("pass"), nodes=2, number=1, port=port, token="guessed")
    answered = []

    def speaks() -> bool:
        with suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1) as connection:
            connection.sendall(b'{"node": 1, "proof": "none"}\n')
            answered.append(connection.recv(100))
        return bool(answered)

    wait_for(speaks)
    assert answered == [b""]
    assert launchers.told() == []
    stranger.kill()
    assert launchers.start(tells("pass"), nodes=2, number=1, port=port).wait(20) == 0
    assert first.wait(20) == 0


def test_a_stop_signal_ends_the_wait_for_the_others(launchers):
    process = launchers.start(tells("pass"), nodes=2, number=1, port=free_port())
    time.sleep(0.5)
    process.terminate()
    assert process.wait(20) == 143


@pytest.mark.parametrize(
    ("number", "leader", "said"),
    [(2, "h:1", "--node-rank 2: of --nodes 2 choose 0 to 1"), (1, None, "HOST:PORT"), (1, "h:x", "--leader h:x")],
)
def test_a_place_that_cannot_be_is_refused(number, leader, said):
    with pytest.raises(StartupError, match=said):
        place(2, number, leader)
