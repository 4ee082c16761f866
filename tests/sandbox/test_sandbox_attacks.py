"""Hostile programs in the real sandbox: each is contained and reported, and a good program beside it is not disturbed.

What is looked at is the outside: a secret in files, in the environment and in this process; a folder anyone may write
to; listening sockets; and the processes of this machine.
"""

import asyncio
import os
import platform
import re
import secrets
import socket
import time
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory

import httpx
import pytest
import pytest_asyncio
from hostile_programs import PROGRAMS, Hostile
from sandboxes import started
from served import served

from reward_server.app import Settings, create
from reward_server.sandbox import seccomp
from reward_server.sandbox.bubblewrap import Bubblewrap
from reward_server.sandbox.provider import Case, CaseResult, Limits, Program
from services.access import HttpSettings

pytestmark = [pytest.mark.alone, pytest.mark.asyncio(loop_scope="module")]

LIMITS = Limits(
    seconds=10, wall_seconds=30, memory_mb=192, processes=16, disk_mb=8, output_bytes=2**17, compile_seconds=2
)
SHORT = LIMITS.model_copy(update={"seconds": 0.6, "wall_seconds": 1.5})
"""For programs that never end by themselves."""
GOOD = Program(language="python", source="print(sum(int(word) for word in input().split()))")


class Host:
    """What there is to attack."""

    def __init__(self, folder: Path):
        self.secret = secrets.token_hex(16)
        self.folder = folder / "open"
        self.folder.mkdir(mode=0o777)
        self.folder.chmod(0o777)
        self.file = folder / "secret"
        self.file.write_text(self.secret)
        self.home = Path.home() / f".rlif-{self.secret}"
        self.connections: list[socket.socket] = []
        self.port = 0
        self.name = f"rlif-{os.getpid()}"

    def fill(self, source: str) -> str:
        column = list(seccomp.ARCHITECTURES).index(platform.machine())
        known = {name: numbers[column] for name, numbers in seccomp.REFUSED.items()}
        known |= {"clone": seccomp.CLONE[platform.machine()], "secret": self.file, "folder": self.folder}
        known |= {"port": self.port, "socket": self.name, "test": os.getpid(), "home": self.home}
        known |= {"checkout": Path(__file__).resolve()}
        return re.sub(r"@(\w+)@", lambda found: str(known[found[1]]), source)

    def listener(self, family: socket.AddressFamily, address: object) -> socket.socket:
        bound = socket.socket(family, socket.SOCK_STREAM if family == socket.AF_UNIX else socket.SOCK_DGRAM)
        bound.bind(address)
        if family == socket.AF_UNIX:
            bound.listen()
        bound.setblocking(False)
        return bound


@pytest.fixture(scope="module")
def host():
    """A reward server on a TCP port, its token in the environment, and sockets on UDP and under an abstract name."""
    with ExitStack() as stack:
        folder = Path(
            stack.enter_context(TemporaryDirectory(dir="/var/tmp"))
        )  # no folder of one user's, as /tmp/... is
        folder.chmod(0o755)
        host = Host(folder)
        environment = stack.enter_context(pytest.MonkeyPatch.context())
        environment.setenv("RLIF_API_TOKEN", host.secret)
        host.home.write_text(host.secret)
        stack.callback(host.home.unlink)
        app = create(Settings(http=HttpSettings(api_token=host.secret), verifier_workers=1))
        host.port = int(stack.enter_context(served(app)).rpartition(":")[2])
        for family, address in ((socket.AF_UNIX, f"\0{host.name}"), (socket.AF_INET, ("127.0.0.1", host.port))):
            host.connections.append(stack.enter_context(host.listener(family, address)))
        yield host


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def sandbox():
    sandbox = await started(Bubblewrap(concurrency=4))
    yield sandbox
    await sandbox.stop()


async def run(sandbox: Bubblewrap, program: Program, stdin: str = "", limits: Limits = SHORT) -> CaseResult:
    (result,) = await sandbox.run(program, [Case(stdin=stdin)], limits, time.monotonic() + 60)
    return result


def confined_processes() -> set[int]:
    """Processes that run, or watch over, a program in a sandbox."""
    found = set()
    for entry in os.listdir("/proc"):
        try:
            command = Path(f"/proc/{entry}/cmdline").read_bytes() if entry.isdigit() else b""
        except OSError:
            continue
        if b"/program/main" in command:
            found.add(int(entry))
    return found


@pytest.mark.parametrize("hostile", PROGRAMS, ids=lambda hostile: hostile.name.replace(" ", "-"))
async def test_contained_and_reported(sandbox, host, hostile: Hostile):
    before = confined_processes()
    program = Program.model_validate({"language": hostile.language, "source": host.fill(hostile.source)})
    attack = asyncio.create_task(run(sandbox, program, "", SHORT if "timeout" in hostile.ends else LIMITS))
    good = await run(sandbox, GOOD, "20 22", Limits())
    result = await attack

    assert (good.status, good.stdout.strip()) == ("ok", "42")
    assert result.status in hostile.ends, result
    assert "ESCAPED" not in result.stdout + result.stderr, result
    assert ("HELD" in result.stdout) == hostile.says_held, result
    if hostile.exit_code is not None:
        assert result.exit_code == hostile.exit_code, result
    if result.status in ("timeout", "memory", "output", "compile"):
        assert result.detail, "it is reported why"
    assert len(result.stdout.encode()) <= 3 * LIMITS.output_bytes and len(result.stderr) <= 4096

    said = result.stdout + result.stderr
    assert host.secret not in said and "RLIF" not in said
    assert host.file.read_text() == host.secret and not list(host.folder.iterdir())
    for listener in host.connections:
        with pytest.raises(BlockingIOError):
            listener.accept() if listener.family == socket.AF_UNIX else listener.recv(1)
    await nothing_left(before)


async def nothing_left(before: set[int]) -> None:
    ends = time.monotonic() + 5
    while left := confined_processes() - before:
        assert time.monotonic() < ends, [Path(f"/proc/{pid}/cmdline").read_bytes() for pid in left]
        await asyncio.sleep(0.05)


async def test_there_are_many():
    assert len(PROGRAMS) >= 40 and len({hostile.name for hostile in PROGRAMS}) == len(PROGRAMS)


async def test_the_attacks_on_the_host_would_succeed_outside(host):
    """Else a test above could pass because what it attacks is not there."""
    async with httpx.AsyncClient() as http:
        assert (await http.get(f"http://127.0.0.1:{host.port}/healthz")).status_code == 200
    assert os.environ["RLIF_API_TOKEN"] == host.home.read_text() == host.file.read_text() == host.secret
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(f"\0{host.name}")
        host.connections[0].accept()[0].close()
    (host.folder / "written").write_text("x")
    (host.folder / "written").unlink()


async def test_a_cancelled_run_leaves_nothing(sandbox):
    before = confined_processes()
    task = asyncio.create_task(
        run(sandbox, Program(language="python", source="import time; time.sleep(100)"), "", Limits())
    )
    while not confined_processes() - before:
        await asyncio.sleep(0.01)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await nothing_left(before)


async def test_many_attacks_at_once_do_not_reach_good_programs(sandbox):
    bombs = [
        item
        for item in PROGRAMS
        if item.name in ("fork bomb", "memory", "flood of stdout", "endless loop", "one big file")
    ]
    attacks = [run(sandbox, Program(language="python", source=bomb.source)) for bomb in bombs for _ in range(3)]
    goods = [run(sandbox, GOOD, f"{number} 1", Limits(wall_seconds=30)) for number in range(20)]
    results = await asyncio.gather(*attacks, *goods)
    assert [result.stdout.strip() for result in results[len(attacks) :]] == [str(number + 1) for number in range(20)]
    assert sandbox.state() == "ok"
