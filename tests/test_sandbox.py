"""The sandbox and its limits, its service, and the providers of other projects behind small servers of their wire."""

import asyncio
import os
import platform
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from hypothesis import given
from hypothesis import strategies as st
from sandboxes import started
from served import served

from reward_server import child
from reward_server.sandbox import app as sandbox_app
from reward_server.sandbox import bubblewrap, confined, process_tree, provider, seccomp
from reward_server.sandbox.bubblewrap import Bubblewrap
from reward_server.sandbox.choice import choose
from reward_server.sandbox.compare import same_output
from reward_server.sandbox.piston import Piston
from reward_server.sandbox.provider import Busy, Case, CaseResult, Limits, Places, Program, in_turn
from reward_server.sandbox.remote import RemoteSandbox
from reward_server.sandbox.sandboxfusion import SandboxFusion
from services.access import HttpSettings
from services.startup import StartupError

pytestmark = pytest.mark.alone

DOUBLE = {
    "python": "print(2 * int(input()))",
    "cpp": "#include <iostream>\nint main() { long x; std::cin >> x; std::cout << 2 * x << std::endl; }",
}
SLOW = "import time\nword = input()\nif word == 'slow': time.sleep(100)\nif word == 'bad': 1 / 0\nprint(word)"


@pytest.fixture
async def sandbox():
    sandbox = await started(Bubblewrap(concurrency=2))
    yield sandbox
    await sandbox.stop()


async def run(sandbox, source, *stdins, language="python", seconds=60.0, **limits) -> list[CaseResult]:
    program = Program(language=language, source=source)
    cases = [Case(stdin=stdin) for stdin in stdins or ("",)]
    return await sandbox.run(program, cases, Limits(**limits), time.monotonic() + seconds)


def told(results):
    return [(result.status, result.stdout.strip()) for result in results]


# ---- comparing outputs -----------------------------------------------------------------------------------------

WORDS = st.lists(st.text(st.characters(codec="ascii", categories=["L", "N", "P"]), min_size=1, max_size=6), max_size=8)
SPACE = st.text(" \t\n\r", min_size=1, max_size=3)


@given(WORDS, st.lists(SPACE, min_size=9, max_size=9))
def test_white_space_does_not_matter(words, spaces):
    said = "".join(space + word for word, space in zip(words, spaces, strict=False)) + spaces[-1]
    assert same_output(said, " ".join(words)) and same_output(said, "\n".join(words), tolerance=0.1)


@given(WORDS, WORDS.filter(bool))
def test_a_prefix_or_more_than_was_wanted_does_not_pass(words, more):
    whole = " ".join(words + more)
    for tolerance in (None, 0.5):
        assert not same_output(" ".join(words), whole, tolerance)
        assert not same_output(whole, " ".join(words), tolerance)


@given(WORDS, WORDS)
def test_outputs_agree_exactly_when_their_words_do(a, b):
    assert same_output(" ".join(a), "\n".join(b)) == (a == b)


@given(st.floats(-1e9, 1e9), st.floats(-1e9, 1e9), st.sampled_from([0, 1e-6, 1e-3, 0.1]))
def test_numbers_within_the_tolerance_agree(a, b, tolerance):
    assert same_output(repr(a), repr(b), tolerance) == (abs(a - b) <= tolerance * max(1, abs(b)))


@pytest.mark.parametrize("said", ["nan", "inf", "1_0", "0x10", "ten", "1e999", ""])
def test_only_finite_numbers_are_compared_as_numbers(said):
    assert not same_output(said, "10", 1.0)
    assert same_output(said, said, 1.0)


def test_without_a_tolerance_numbers_are_words():
    assert not same_output("1.0", "1")
    assert same_output("1.0", "1", 0.0)


# ---- the system call filter ------------------------------------------------------------------------------------


def interpret(program: bytes, architecture: int, number: int, argument: int = 0) -> int:
    """The filter's verdict, by a slow reading of the instructions' definitions in linux/filter.h."""
    data = {0: number, 4: architecture, 16: argument & 0xFFFFFFFF}
    accumulator, place = 0, 0
    while True:
        code, if_true, if_false, value = seccomp.struct.unpack_from("<HBBI", program, 8 * place)
        place += 1
        if code == 0x20:  # BPF_LD | BPF_W | BPF_ABS
            accumulator = data[value]
        elif code == 0x06:  # BPF_RET | BPF_K
            return value
        else:  # BPF_JMP | BPF_JEQ, BPF_JGE, BPF_JSET | BPF_K
            is_true = {0x15: accumulator == value, 0x35: accumulator >= value, 0x45: bool(accumulator & value)}[code]
            place += if_true if is_true else if_false


ALLOWED = 0x7FFF0000
EPERM, ENOSYS, EAFNOSUPPORT = 0x50000 | 1, 0x50000 | 38, 0x50000 | 97


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
def test_the_filter_refuses_what_is_listed_and_nothing_else(machine):
    column = list(seccomp.ARCHITECTURES).index(machine)
    program, architecture = seccomp.program(machine), seccomp.ARCHITECTURES[machine]
    refused = {numbers[column] for numbers in seccomp.REFUSED.values()} - {None}
    special = {seccomp.CLONE[machine], seccomp.SOCKET[machine]}
    for number in set(range(600)) - special:
        newer = number >= 424 and number not in seccomp.NEWER_ALLOWED.values()
        wanted = EPERM if number in refused else ENOSYS if newer else ALLOWED
        assert interpret(program, architecture, number) == wanted, number
    other = seccomp.ARCHITECTURES["aarch64" if machine == "x86_64" else "x86_64"]
    for wrong in (other, 0x40000003):  # i386
        assert interpret(program, wrong, 0) == 0x80000000
    assert interpret(program, architecture, 0x40000000) == 0x80000000


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
def test_the_filter_reads_arguments(machine):
    program, architecture = seccomp.program(machine), seccomp.ARCHITECTURES[machine]
    thread, fork = 0x3D0F00, 17
    verdicts = [interpret(program, architecture, seccomp.CLONE[machine], flags) for flags in (thread, fork)]
    assert verdicts == [ALLOWED, ALLOWED]
    for namespace in (0x80, 0x20000, 0x2000000, 0x4000000, 0x8000000, 0x10000000, 0x20000000, 0x40000000):
        assert interpret(program, architecture, seccomp.CLONE[machine], namespace | fork) == EPERM
    for family, verdict in (
        (1, ALLOWED),
        (2, EAFNOSUPPORT),
        (10, EAFNOSUPPORT),
        (16, EAFNOSUPPORT),
        (17, EAFNOSUPPORT),
    ):
        assert interpret(program, architecture, seccomp.SOCKET[machine], family) == verdict


def test_the_filter_knows_its_machines():
    with pytest.raises(ValueError, match="no system call filter for riscv64 .only for x86_64 and aarch64"):
        seccomp.program("riscv64")


@pytest.mark.skipif(shutil.which("gcc") is None, reason="the numbers are compared with the C library's headers")
def test_the_numbers_are_those_of_the_headers():
    names = [name for name, numbers in seccomp.REFUSED.items() if None not in numbers]
    lines = "".join(f"\n{name} SYS_{name}" for name in [*names, "clone", "socket"])
    found = subprocess.run(
        ["gcc", "-E", "-P", "-"], input=f"#include <sys/syscall.h>{lines}", text=True, capture_output=True
    )
    column = list(seccomp.ARCHITECTURES).index(platform.machine())
    known = {**{name: seccomp.REFUSED[name][column] for name in names}}
    known |= {"clone": seccomp.CLONE[platform.machine()], "socket": seccomp.SOCKET[platform.machine()]}
    read = dict(line.split() for line in found.stdout.splitlines() if len(line.split()) == 2)
    assert {name: int(number) for name, number in read.items() if name in known} == known


GENERIC = Path("/usr/include/asm-generic/unistd.h")


@pytest.mark.skipif(not GENERIC.exists(), reason="the numbers are compared with the kernel's headers")
def test_the_numbers_of_aarch64_are_those_of_the_generic_table():
    table = {name: int(number) for name, number in re.findall(r"__NR(?:3264)?_(\w+)\s+(\d+)\n", GENERIC.read_text())}
    known = {name: numbers[1] for name, numbers in seccomp.REFUSED.items()}
    known |= {"clone": seccomp.CLONE["aarch64"], "socket": seccomp.SOCKET["aarch64"]}
    for name, number in known.items():
        assert table.get(name) == number, name
    newer = {name: number for name, number in table.items() if name in seccomp.NEWER_ALLOWED}
    assert newer and newer == {name: seccomp.NEWER_ALLOWED[name] for name in newer}


# ---- running programs ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("language", ["python", "cpp"])
async def test_a_program_gets_each_input(sandbox, language):
    results = await run(sandbox, DOUBLE[language], "1", "21\n", "-5", language=language)
    assert told(results) == [("ok", "2"), ("ok", "42"), ("ok", "-10")]
    assert all(result.exit_code == 0 and result.seconds > 0 for result in results)


async def test_a_slow_or_failing_case_leaves_the_others_alone(sandbox):
    results = await run(sandbox, SLOW, "a", "slow", "b", "bad", "c", wall_seconds=1.5)
    assert told(results) == [("ok", "a"), ("timeout", ""), ("ok", "b"), ("crash", ""), ("ok", "c")]
    assert "ZeroDivisionError" in results[3].stderr and results[3].exit_code == 1


async def test_after_some_timeouts_the_rest_is_not_run(sandbox):
    started_at = time.monotonic()
    results = await run(sandbox, SLOW, "slow", "a", *["slow"] * 50, wall_seconds=1, timeouts=2)
    assert [result.status for result in results] == ["timeout", "ok"] + ["timeout"] * 50
    assert "not run" in results[-1].detail and time.monotonic() - started_at < 30


async def test_the_deadline_ends_everything(sandbox):
    results = await run(sandbox, SLOW, "a", "slow", "b", wall_seconds=100, seconds=3)
    assert told(results) == [("ok", "a"), ("deadline", ""), ("deadline", "")]
    results = await run(sandbox, DOUBLE["cpp"], "1", language="cpp", seconds=0.0)
    assert [result.status for result in results] == ["deadline"]


async def test_what_does_not_compile_is_said_once(sandbox):
    results = await run(sandbox, "int main() { return x; }", "1", "2", language="cpp")
    assert [result.status for result in results] == ["compile", "compile"]
    assert "was not declared" in results[0].stderr


class Starved(Bubblewrap):
    """Its programs give way to whatever else wants this process's CPUs."""

    def _arguments(self, *given):
        return [shutil.which("nice"), "-n", "19", *super()._arguments(*given)]


@pytest.fixture
def hogs():
    """This process and its children have one CPU, which others keep busy: processes of sessions of their own, since
    Linux may share a CPU out by sessions first (sched_autogroup)."""
    cpus = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(cpus)})
    argv = [sys.executable, "-c", "while True: pass"]
    processes = [subprocess.Popen(argv, start_new_session=True) for _ in range(8)]
    yield processes
    for process in processes:
        process.kill()
        process.wait()
    os.sched_setaffinity(0, cpus)


async def test_a_machine_too_busy_makes_no_verdict(hogs):
    sandbox = Starved(frozenset({"python"}), concurrency=1)
    for hog in hogs:
        hog.send_signal(signal.SIGSTOP)
    await started(sandbox)
    for hog in hogs:
        hog.send_signal(signal.SIGCONT)
    spinning = "import time\nwhile time.process_time() < 0.5: pass\nprint(7)"
    results = await run(sandbox, spinning, "1", "2", wall_seconds=0.4)
    assert [result.status for result in results] == ["deadline", "deadline"] and "too busy" in results[0].detail
    await sandbox.stop()


@pytest.mark.parametrize(
    ("wanted", "slices", "ends"),
    [
        ([True] * 100, 0.05, "timeout"),  # on a CPU all the time
        ([True] * 100, 0.005, None),  # a tenth of a CPU was all there was
        ([False] * 100, 0.0, "timeout"),  # asleep
        ([True, False] * 50, 0.02, "timeout"),  # works, and waits for something
        ([True] * 30 + [False] * 70, 0.001, "timeout"),  # starved, then asleep
    ],
)
async def test_the_wall_limit_does_not_count_waiting_for_a_cpu(monkeypatch, wanted, slices, ends):
    """Of 100 looks at intervals of 0.05 s, with a wall limit of 2 s."""
    now, cpu, left = 0.0, 0.0, list(wanted)

    def usage(pid, _last):
        nonlocal cpu
        is_runnable = left.pop(0)
        cpu += slices if is_runnable else 0.0
        if not left:
            run.stopped.set()
        return process_tree.Usage([pid], cpu, is_runnable=is_runnable)

    async def sleep(_seconds):
        nonlocal now
        now += 0.05

    monkeypatch.setattr(
        confined, "process_tree", SimpleNamespace(Usage=process_tree.Usage, usage=usage, files_in=lambda *_: 0)
    )
    monkeypatch.setattr(confined, "time", SimpleNamespace(monotonic=lambda: now))
    monkeypatch.setattr(confined, "asyncio", SimpleNamespace(sleep=sleep))
    run = confined.Run()
    await confined._watch(1, run, Limits(seconds=100, wall_seconds=2))
    assert run.over == ends


async def test_a_large_input_is_read_or_left(sandbox):
    text = "x" * 2**23
    results = await run(sandbox, "import sys\nprint(len(sys.stdin.read()))", text)
    assert told(results) == [("ok", str(2**23))]
    assert told(await run(sandbox, "print(7)", text)) == [("ok", "7")]
    assert told(await run(sandbox, "print(open('/dev/stdin').read())", "by name")) == [("ok", "by name")]


async def test_output_up_to_the_limit_is_kept_without_a_newline(sandbox):
    (most,) = await run(sandbox, "print('x' * 1000, end='')", output_bytes=1000)
    (more,) = await run(sandbox, "print('x' * 1001, end='')", output_bytes=1000)
    assert (most.status, len(most.stdout)) == ("ok", 1000) and more.status == "output"


async def test_threads_children_and_files_are_there_within_the_limits(sandbox):
    source = (
        "import concurrent.futures, subprocess, tempfile\n"
        "with concurrent.futures.ThreadPoolExecutor(4) as pool: print(sum(pool.map(int, '1234')))\n"
        "with tempfile.TemporaryFile() as file: file.write(b'x' * 10**6); print(file.tell())\n"
        "print(subprocess.check_output(['sh', '-c', 'echo child'], text=True).strip())\n"
    )
    assert told(await run(sandbox, source)) == [("ok", "10\n1000000\nchild")]


async def test_many_programs_share_the_places(sandbox):
    results = await asyncio.gather(*(run(sandbox, DOUBLE["python"], str(number)) for number in range(12)))
    assert [told(result) for result in results] == [[("ok", str(2 * number))] for number in range(12)]
    assert sandbox.places.waiting == 0


async def test_a_language_that_is_not_served_is_no_fault_of_the_program():
    sandbox = await started(Bubblewrap(frozenset({"python"})))
    try:
        (result,) = await run(sandbox, DOUBLE["cpp"], language="cpp")
        assert result.status == "error" and "runs python, not cpp" in result.detail
    finally:
        await sandbox.stop()


async def test_no_descriptor_is_left_open(sandbox):
    before = len(os.listdir("/proc/self/fd"))
    for source in ("print(1)", "while True: print('x' * 10**5)", "1 / 0"):
        await run(sandbox, source)
    await run(sandbox, DOUBLE["cpp"], "1", language="cpp")
    await asyncio.sleep(0.1)
    assert len(os.listdir("/proc/self/fd")) <= before


def test_a_process_tree_is_counted_with_its_grandchildren():
    source = "import os, time\nx = b'x' * 50_000_000\nos.fork(); os.fork()\nprint(flush=True)\ntime.sleep(100)"
    process = subprocess.Popen(["python3", "-c", source], stdout=subprocess.PIPE, start_new_session=True)
    try:
        for _ in range(4):
            process.stdout.readline()
        found = process_tree.usage(process.pid)
        assert len(found.pids) == 4 and found.pids[0] == process.pid
        assert 50_000_000 < found.memory_bytes < 4 * 90_000_000 and found.cpu_seconds < 60
    finally:
        os.killpg(process.pid, 9)
        process.wait()
        process.stdout.close()
    assert process_tree.usage(process.pid).memory_bytes == 0


CHILDREN = """
import os, signal, sys, time
def child():
    while time.process_time() < 0.25: pass
    os._exit(0)
signal.signal(signal.SIGCHLD, {action})
for _ in range({count}):
    if os.fork() == 0: child()
    try: os.wait()
    except ChildProcessError: pass
print(7)
"""


@pytest.mark.parametrize(("action", "count", "ends"), [("SIG_DFL", 6, "ok"), ("SIG_IGN", 100, "timeout")])
async def test_cpu_time_of_children_counts_once_whether_waited_for_or_not(sandbox, action, count, ends):
    program = Program(language="python", source=CHILDREN.format(action=f"signal.{action}", count=count))
    limits = Limits(seconds=2.5, wall_seconds=100)
    (result,) = await sandbox.run(program, [Case()], limits, time.monotonic() + 100)
    detail = "" if ends == "ok" else "more than 2.5 s of CPU time"
    assert (result.status, result.detail) == (ends, detail)


SHARING = """
import mmap, os, time
memory = mmap.mmap(-1, 100 * 2**20)
for place in range(0, len(memory), 4096): memory[place] = 1
{rest}
"""


async def test_shared_memory_counts_and_counts_once(sandbox):
    one = SHARING.format(
        rest="for _ in range(4):\n    if os.fork() == 0:\n        memory[::4096]; time.sleep(1); os._exit(0)\n"
        "for _ in range(4): os.wait()\nprint(7)"
    )
    assert told(await run(sandbox, one, memory_mb=300, wall_seconds=100)) == [("ok", "7")]
    each = "import os\nfor _ in range(5):\n    if os.fork() == 0: break\n" + SHARING.format(rest="time.sleep(60)")
    (result,) = await run(sandbox, each, memory_mb=300, wall_seconds=100)
    assert (result.status, result.detail) == ("memory", "more than 300 MB of memory")


# ---- places and turns ------------------------------------------------------------------------------------------


async def test_places_are_bounded_and_so_is_the_queue():
    places, running, most, admitted_at_once = Places(2, 3), 0, 0, 0
    admitted = 2 * provider.PROGRAMS_A_PLACE

    async def one():
        nonlocal running, most, admitted_at_once
        async with places.program(time.monotonic() + 60):
            admitted_at_once = max(admitted_at_once, admitted - places.programs._value)
            async with places.free:
                running += 1
                most = max(most, running)
                await asyncio.sleep(0.01)
                running -= 1

    results = await asyncio.gather(*(one() for _ in range(admitted + 3 + 4)), return_exceptions=True)
    assert most == 2 and admitted_at_once == admitted
    assert sum(isinstance(result, Busy) for result in results) == 4
    assert places.waiting == 0 and places.programs._value == admitted


async def test_programs_that_wait_hold_no_descriptor():
    sandbox = await started(Bubblewrap(frozenset({"python"}), concurrency=1))
    before = len(os.listdir("/proc/self/fd"))
    most = 0

    async def one() -> None:
        nonlocal most
        assert told(await run(sandbox, "print(1)")) == [("ok", "1")]
        most = max(most, len(os.listdir("/proc/self/fd")))

    await asyncio.gather(*(one() for _ in range(30)))
    assert most < before + 24
    await sandbox.stop()


async def test_out_of_descriptors_is_an_error_of_that_program_and_leaks_none():
    sandbox = await started(Bubblewrap(frozenset({"python"}), concurrency=2))
    before = set(map(int, os.listdir("/proc/self/fd")))
    free = [number for number in range(100 + len(before)) if number not in before]
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        for spare in range(0, 24, 2):
            resource.setrlimit(resource.RLIMIT_NOFILE, (free[spare], limits[1]))
            results = await asyncio.gather(*(run(sandbox, "print(1)") for _ in range(3)))
            assert {result.status for (result,) in results} <= {"error", "ok"}
            if not spare:
                assert "Too many open files" in results[0][0].detail and "Too many" in sandbox.state()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert told(await run(sandbox, "print(1)")) == [("ok", "1")]
    await asyncio.sleep(0.05)
    assert len(os.listdir("/proc/self/fd")) <= len(before)
    await sandbox.stop()


async def test_a_fault_ends_a_programs_turn():
    statuses = iter(["ok", "crash", "error"])

    async def one(_case):
        return CaseResult(status=next(statuses), detail="down")

    results = await in_turn([Case()] * 5, Limits(), time.monotonic() + 10, one)
    assert [result.status for result in results] == ["ok", "crash", "error", "error", "error"]


# ---- start-up and readiness ------------------------------------------------------------------------------------


async def test_without_bubblewrap_it_does_not_start(monkeypatch, tmp_path):
    for tool in ("python3", "prlimit", "setpriv"):
        (tmp_path / tool).symlink_to(shutil.which(tool))
    monkeypatch.setattr(bubblewrap, "PATH", str(tmp_path))
    sandbox = Bubblewrap()
    with pytest.raises(StartupError, match="needs the program bwrap .package bubblewrap"):
        await sandbox.start()
    with pytest.raises(StartupError, match="needs g.. for cpp"):
        await Bubblewrap(frozenset({"cpp"})).start()
    (tmp_path / "python3").unlink()
    with pytest.raises(StartupError, match="neither python3 nor g"):
        await Bubblewrap().start()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (("--cap-drop", "ALL"), "capabilities"),
        (("--unshare-all",), "share a namespace with the server (net:"),
        (("--seccomp",), "system call filter"),
        (("--remount-ro",), "outside their folder"),
    ],
)
async def test_a_sandbox_that_does_not_hold_is_refused(change, said):
    """Each protection is taken away in turn: the trial at start-up notices."""
    await (await started(Bubblewrap(frozenset({"python"})))).stop()

    class Weakened(Bubblewrap):
        def _arguments(self, *given):
            arguments = super()._arguments(*given)
            place = arguments.index(change[0])
            if change[0] == "--unshare-all":
                arguments.insert(place + 1, "--share-net")
            elif change[0] == "--cap-drop":
                arguments[place : place + 2] = ["--cap-add", "CAP_CHOWN"]
            else:
                del arguments[place : place + 2]
            return arguments

    with pytest.raises(StartupError, match="does not hold here") as refused:
        await Weakened(frozenset({"python"})).start()
    assert said in str(refused.value) and "\n" not in str(refused.value)


async def test_the_number_of_processes_must_be_limited(monkeypatch):
    await (await started(Bubblewrap(frozenset({"python"})))).stop()
    monkeypatch.setattr(bubblewrap, "_rlimits", lambda _: ["--core=0:0"])
    with pytest.raises(StartupError, match="number of processes is not limited"):
        await Bubblewrap(frozenset({"python"})).start()


async def test_descriptors_of_the_server_are_noticed(monkeypatch):
    await (await started(Bubblewrap(frozenset({"python"})))).stop()
    closing = child.start

    async def leaking(command, *, pass_fds, **options):
        kept = [fd for fd in map(int, os.listdir("/proc/self/fd")) if os.path.exists(f"/proc/self/fd/{fd}")]
        inheritable = [fd for fd in kept if fd > 2 and os.get_inheritable(fd)]
        return await closing(command, pass_fds={*pass_fds, *inheritable}, **options)

    monkeypatch.setattr(child, "start", leaking)
    with pytest.raises(StartupError, match="other descriptors than stdin, stdout and stderr"):
        await Bubblewrap(frozenset({"python"})).start()


async def test_readiness_says_when_it_breaks_and_recovers(sandbox, monkeypatch):
    monkeypatch.setattr("reward_server.sandbox.health.RECOVERY_SECONDS", 0.05)
    whole = sandbox._system
    sandbox._system = ["--ro-bind", "/nowhere", "/nowhere"]
    (result,) = await run(sandbox, "print(1)")
    assert result.status == "error" and "nowhere" in result.detail
    assert "nowhere" in sandbox.state()
    sandbox._system = whole
    ends = time.monotonic() + 10
    while sandbox.state() != "ok" and time.monotonic() < ends:
        await asyncio.sleep(0.05)
    assert sandbox.state() == "ok"


@pytest.mark.parametrize("word", ["docker", "piston", "piston=localhost", "sandboxfusion=ftp://x", "http:/x", ""])
def test_an_unknown_sandbox_is_refused(word):
    with pytest.raises(StartupError, match="--sandbox"):
        choose(word)
    assert choose("none") is None and isinstance(choose("piston=http://localhost:2000"), Piston)


# ---- the service -----------------------------------------------------------------------------------------------


@pytest.fixture
async def service():
    await (await started(Bubblewrap(frozenset({"python"})))).stop()
    app = sandbox_app.create(HttpSettings(api_token="word"), Bubblewrap(frozenset({"python"}), concurrency=2))
    with served(app) as url:
        yield url


async def test_the_service_runs_programs_for_a_reward_server(service):
    remote = RemoteSandbox(service, "word")
    await remote.start()
    assert remote.languages == {"python"}
    results = await run(remote, SLOW, "a", "slow", "bad", "ü", wall_seconds=1.5)
    assert told(results) == [("ok", "a"), ("timeout", ""), ("crash", ""), ("ok", "ü")]
    late = await run(remote, SLOW, "a", "slow", "b", wall_seconds=100, seconds=3)
    assert told(late) == [("ok", "a"), ("deadline", ""), ("deadline", "")]
    (refused,) = await run(remote, DOUBLE["cpp"], language="cpp")
    assert refused.status == "error" and "program.language" not in remote.state() and remote.state() == "ok"
    await remote.stop()


async def test_the_service_refuses_by_field_and_without_its_token(service):
    headers = {"Authorization": "Bearer word"}
    async with httpx.AsyncClient(base_url=service, headers=headers, timeout=60) as http:
        assert (await http.get("/readyz")).json()["dependencies"] == {"sandbox": "ok"}
        body = {"program": {"language": "python", "source": "print(1)"}, "cases": [{}]}
        assert (await http.post("/v1/execute", json=body)).json()["results"][0]["stdout"] == "1\n"
        for change, field in (
            ({"cases": []}, "cases"),
            ({"program": {"language": "cobol", "source": ""}}, "program.language"),
            ({"program": {"language": "cpp", "source": ""}}, "program.language"),
            ({"limits": {"memory_mb": 1}}, "limits.memory_mb"),
            ({"limits": {"root": True}}, "limits.root"),
        ):
            answer = await http.post("/v1/execute", json={**body, **change})
            assert answer.status_code == 422 and answer.json()["errors"][0]["field"] == field, answer.text
        assert (await http.post("/v1/execute", json=body, headers={"Authorization": ""})).status_code == 401


async def test_a_call_whose_client_has_gone_ends(service):
    """Both places sleep for clients that do not wait: the next call is served all the same."""
    body = {"program": {"language": "python", "source": "import time\ntime.sleep(100)"}, "cases": [{}] * 3}
    body["limits"] = {"wall_seconds": 200}
    async with httpx.AsyncClient(base_url=service, headers={"Authorization": "Bearer word"}, timeout=60) as http:

        async def abandoned() -> None:
            with pytest.raises(httpx.ReadTimeout):
                await http.post("/v1/execute", json=body, timeout=httpx.Timeout(60, read=2))

        await asyncio.gather(*(abandoned() for _ in range(12)))
        answer = await http.post(
            "/v1/execute",
            json={"program": {"language": "python", "source": "print(1)"}, "cases": [{}]},
            headers={"X-Deadline-Seconds": "40"},
        )
        assert answer.json()["results"][0]["status"] == "ok", answer.text
        metrics = (await http.get("/metrics")).text
    assert re.search(r'requests_total\{route="/v1/execute",service="sandbox",status="499"\} \d+', metrics)


async def test_a_service_that_is_not_there_is_no_zero(monkeypatch):
    monkeypatch.setattr("reward_server.sandbox.remote.RETRY_SECONDS", 0.0)
    remote = RemoteSandbox("http://127.0.0.1:9")
    with pytest.raises(StartupError, match="127.0.0.1:9"):
        await remote.start()
    (result,) = await run(remote, "print(1)")
    assert result.status == "error" and "127.0.0.1:9" in remote.state()
    await remote.stop()


# ---- SandboxFusion and Piston: small servers that speak their documented wire, not the real ones ----------------


def answering(path: str, answer) -> FastAPI:
    """`answer(body)` gives the JSON of POST `path`; the requests are kept in `app.state.bodies`."""
    app = FastAPI()
    app.state.bodies = []

    @app.post(path)
    async def post(request: Request) -> Response:
        body = await request.json()
        app.state.bodies.append(body)
        given = answer(body)
        return given if isinstance(given, Response) else JSONResponse(given)

    @app.get("/v1/ping")
    async def ping() -> str:
        return "pong"

    @app.get("/api/v2/runtimes")
    async def runtimes() -> list:
        return [
            {"language": "python", "version": "3.12.0", "aliases": ["py"]},
            {"language": "gcc", "version": "10.2.0", "aliases": ["c++", "cpp"]},
        ]

    return app


def ran(stdout="", status="Finished", code=0, stderr=""):
    return {"status": status, "execution_time": 0.1, "return_code": code, "stdout": stdout, "stderr": stderr}


FUSION = {
    "fine": ({"status": "Success", "message": "", "run_result": ran("4\n")}, "ok"),
    "crash": ({"status": "Failed", "message": "", "run_result": ran("", code=1, stderr="boom")}, "crash"),
    "late": ({"status": "Failed", "message": "", "run_result": ran("", "TimeLimitExceeded", None)}, "timeout"),
    "syntax": (
        {"status": "Failed", "message": "", "compile_result": ran(code=1, stderr="bad"), "run_result": None},
        "compile",
    ),
    "flood": ({"status": "Success", "message": "", "run_result": ran("x" * 100)}, "output"),
    "down": ({"status": "SandboxError", "message": "no worker"}, "error"),
    "strange": ({"status": "Success", "message": ""}, "error"),
    "list": ([], "error"),
    "refused": (JSONResponse({"detail": "no"}, 422), "error"),
    "text": (Response("hello"), "error"),
}


async def test_sandboxfusion():
    app = answering("/run_code", lambda body: FUSION[body["code"]][0])
    with served(app) as url:
        fusion = SandboxFusion(url)
        await fusion.start()
        for code, (_, status) in FUSION.items():
            (result,) = await run(fusion, code, "in", language="cpp", wall_seconds=3, memory_mb=64, output_bytes=50)
            assert result.status == status, (code, result)
        assert told(await run(fusion, "fine", "1", "2")) == [("ok", "4"), ("ok", "4")]
        assert fusion.state() == "ok"
        await fusion.stop()
    assert app.state.bodies[0] == {
        "code": "fine",
        "language": "cpp",
        "stdin": "in",
        "compile_timeout": 30.0,
        "run_timeout": 3.0,
        "memory_limit_MB": 64,
        "files": {},
        "fetch_files": [],
    }


def stage(stdout="", code=0, signal=None, **more):
    return {"stdout": stdout, "stderr": "", "output": stdout, "code": code, "signal": signal, **more}


PISTON = {
    "fine": ({"run": stage("4\n")}, "ok"),
    "fine of a newer server": ({"run": stage("4\n", status=None, message=None)}, "ok"),
    "crash": ({"run": stage(code=1)}, "crash"),
    "signal": ({"run": stage(code=None, signal="SIGSEGV")}, "crash"),
    "late": ({"run": stage(code=None, signal="SIGKILL", status="TO")}, "timeout"),
    "flood": ({"run": stage(code=None, signal="SIGKILL", status="OL")}, "output"),
    "syntax": ({"compile": stage(code=1), "run": stage(code=None)}, "compile"),
    "down": ({"run": stage(code=None, status="XX", message="no box")}, "error"),
    "strange": ({"message": "what?"}, "error"),
    "refused": (JSONResponse({"message": "runtime is unknown"}, 400), "error"),
}


async def test_piston():
    app = answering("/api/v2/execute", lambda body: PISTON[body["files"][0]["content"]][0])
    with served(app) as url:
        piston = Piston(url)
        await piston.start()
        assert piston.languages == {"python", "cpp"}
        for code, (_, status) in PISTON.items():
            (result,) = await run(piston, code, "in", language="cpp", wall_seconds=3, memory_mb=64)
            assert result.status == status, (code, result)
        await piston.stop()
    assert app.state.bodies[0] == {
        "language": "c++",
        "version": "10.2.0",
        "files": [{"name": "main.cpp", "content": "fine"}],
        "stdin": "in",
        "compile_timeout": 30000,
        "run_timeout": 3000,
        "run_memory_limit": 64 * 2**20,
    }


async def test_an_older_piston_kills_at_its_time_limit():
    def slowly(_body):
        time.sleep(0.3)
        return {"run": stage(code=None, signal="SIGKILL")}

    with served(answering("/api/v2/execute", slowly)) as url:
        piston = Piston(url)
        await piston.start()
        (late,) = await run(piston, "x", wall_seconds=0.2)
        (early,) = await run(piston, "x", wall_seconds=30)
        assert (late.status, early.status) == ("timeout", "crash")
        await piston.stop()


@pytest.mark.parametrize("provider", [SandboxFusion, Piston])
async def test_a_busy_server_is_asked_again_and_a_dead_one_is_an_error(provider, monkeypatch):
    answers = iter([Response(status_code=429), Response(status_code=503)])
    fine = {"status": "Success", "message": "", "run_result": ran("4"), "run": stage("4")}
    path = "/run_code" if provider is SandboxFusion else "/api/v2/execute"
    monkeypatch.setattr("reward_server.sandbox.health.RECOVERY_SECONDS", 0.05)
    app = answering(path, lambda _: next(answers, fine))
    with served(app) as url:
        sandbox = provider(url)
        await sandbox.start()
        assert told(await run(sandbox, "x")) == [("ok", "4")]
        assert len(app.state.bodies) == 3
    monkeypatch.setattr("reward_server.sandbox.wire.RETRY_SECONDS", 0.0)
    (result,) = await run(sandbox, "x")
    assert result.status == "error" and sandbox.state() != "ok"
    await sandbox.stop()


async def test_a_hanging_server_meets_the_deadline():
    app = FastAPI()

    @app.post("/run_code")
    async def hang() -> None:
        await asyncio.sleep(1)

    with served(app) as url:
        fusion = SandboxFusion(url)
        await fusion.start()
        results = await run(fusion, "x", "1", "2", seconds=0.3)
        assert [result.status for result in results] == ["deadline", "deadline"]
        await fusion.stop()


async def test_a_piston_without_our_languages_does_not_start():
    app = FastAPI()

    @app.get("/api/v2/runtimes")
    async def runtimes() -> list:
        return [{"language": "bash", "version": "5.1.0", "aliases": ["sh"]}]

    with served(app) as url:
        with pytest.raises(StartupError, match="neither python nor c"):
            await Piston(url).start()


# ---- the command -----------------------------------------------------------------------------------------------


def rlif(*arguments, **options):
    return subprocess.Popen([sys.executable, "-m", "services.cli.main", *arguments], stderr=subprocess.PIPE, **options)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["serve", "sandbox", "--languages", "cobol"], b"rlif: --languages cobol: choose from python, cpp\n"),
        (["serve", "reward", "--sandbox", "docker"], b"rlif: --sandbox docker: choose none, bubblewrap, "),
    ],
)
def test_the_command_refuses_in_one_line(arguments, said):
    process = rlif(*arguments)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 2 and stderr.startswith(said) and stderr.count(b"\n") == 1


async def test_the_command_serves_a_sandbox_and_ends_at_sigterm():
    await (await started(Bubblewrap(frozenset({"python"})))).stop()
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    process = rlif("serve", "sandbox", "--languages", "python", "--concurrency", "1", "--port", str(port))
    try:
        remote = RemoteSandbox(f"http://127.0.0.1:{port}")
        await remote.start()
        assert told(await run(remote, DOUBLE["python"], "21")) == [("ok", "42")]
        await remote.stop()
        process.terminate()
        assert await asyncio.to_thread(process.wait, 60) == -signal.SIGTERM
    finally:
        process.kill()
        process.communicate()
