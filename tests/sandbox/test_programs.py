"""Running programs within their limits."""

import asyncio
import os
import shutil
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
from sandbox.programs import DOUBLE, SLOW, run, told
from sandboxes import started

from reward_server.sandbox import confined, process_tree
from reward_server.sandbox.bubblewrap import Bubblewrap
from reward_server.sandbox.provider import Case, Limits, Program

pytestmark = pytest.mark.alone


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
