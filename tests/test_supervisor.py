"""The supervisor with real processes: restarts, refusals, clean stops, nothing left behind."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from services import supervisor
from services.supervisor import Service, supervise

pytestmark = pytest.mark.alone

ROOT = Path(__file__).parent.parent


def python(code: str) -> list[str]:
    return [sys.executable, "-S", "-c", code]


def wait_for(condition, seconds: float = 30.0):
    ends = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < ends, "waited too long"
        time.sleep(0.02)


def test_main_finishing_ends_the_others(tmp_path):
    side = Service("side", python("import time; time.sleep(60)"))
    main = Service("main", python("import time; time.sleep(0.3)"), may_finish=True)
    assert supervise([side, main], "main", tmp_path) == 0
    assert side.process.poll() == -signal.SIGTERM


def test_a_crashed_process_is_started_again_with_its_restart_args(tmp_path):
    code = (
        "import sys, os, pathlib; p = pathlib.Path(sys.argv[1]); first = not p.exists(); p.write_text(repr(sys.argv))\n"
        "os.kill(os.getpid(), 9) if first else sys.exit(0)"
    )
    mark = tmp_path / "mark"
    main = Service("main", [*python(code), str(mark)], restart_args=["--resume"], may_finish=True)
    assert supervise([main], "main", tmp_path) == 0
    assert "--resume" in mark.read_text()
    assert main.restarts == 1


def test_a_refusal_is_final_and_its_log_is_shown(tmp_path, caplog):
    main = Service("main", python("import sys; sys.stderr.write('rlif: no such model'); sys.exit(2)"))
    assert supervise([main], "main", tmp_path) == 2
    assert main.restarts == 0
    assert "no such model" in caplog.text


def test_endless_crashes_end_the_run(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(supervisor, "MAX_RESTARTS", 1)
    main = Service("main", python("import sys; sys.exit(7)"))
    assert supervise([main], "main", tmp_path) == 1
    assert "ended 2 times in a row" in caplog.text


def test_a_service_that_must_not_be_started_again_tells_why_it_ended(tmp_path):
    code = "import sys; print('out of memory', flush=True); sys.exit(7)"
    main = Service("main", python(code), max_restarts=0)
    assert supervise([main], "main", tmp_path) == 1
    assert main.restarts == 1 and main.fault == "main ended with exit code 7:\nout of memory"


def test_one_that_waits_for_another_starts_after_it(tmp_path):
    mark = tmp_path / "mark"
    first = Service("first", [*python("import sys, time; time.sleep(0.5); open(sys.argv[1], 'x')"), str(mark)])
    first.may_finish = True
    code = "import sys, os; sys.exit(not os.path.exists(sys.argv[1]))"
    second = Service("second", [*python(code), str(mark)], may_finish=True, max_restarts=0, start_when=mark.exists)
    assert supervise([second, first], "second", tmp_path) == 0


def test_until_ends_everything_with_its_code(tmp_path):
    stubborn = "import signal, time; signal.signal(15, signal.SIG_IGN); print('up', flush=True); time.sleep(60)"
    side = Service("side", python(stubborn), stop_seconds=0.2)
    up = tmp_path / "side.log"
    code = supervise([side], None, tmp_path, until=lambda: 5 if up.exists() and up.read_text() else None)
    assert code == 5
    assert side.process.poll() == -signal.SIGKILL


def test_a_full_disk_ends_the_run_with_a_line_and_stops_what_runs(tmp_path, monkeypatch, caplog):
    def full(*_):
        raise OSError(28, "No space left on device", "processes.json")

    monkeypatch.setattr(supervisor, "_note_pid", full)
    side = Service("side", python("import time; time.sleep(60)"))
    assert supervise([side], "side", tmp_path) == 1
    assert "the run cannot go on: [Errno 28] No space left" in caplog.text
    assert side.process.poll() is not None


def test_signal_stops_in_reverse_order_and_kills_what_a_child_started(tmp_path):
    code = f"""
import sys; sys.path.insert(0, {str(ROOT)!r})
from pathlib import Path
from services.supervisor import Service, supervise
note = "import signal, sys, time, subprocess; child = subprocess.Popen(['sleep', '60'])\\n" \
       "signal.signal(15, lambda *a: (open(sys.argv[1], 'a').write(sys.argv[3]), sys.exit(0)))\\n" \
       "open(sys.argv[2], 'a').write(str(child.pid) + ' ')\\n" \
       "time.sleep(60)"
names = ["a", "b", "c"]
argv = [sys.executable, "-S", "-c", note, {str(tmp_path / "order")!r}, {str(tmp_path / "pids")!r}]
sys.exit(supervise([Service(n, [*argv, n]) for n in names], "a", Path({str(tmp_path)!r})))
"""
    parent = subprocess.Popen([sys.executable, "-c", code])
    pids = tmp_path / "pids"
    try:
        wait_for(lambda: pids.exists() and len(pids.read_text().split()) == 3)
        parent.send_signal(signal.SIGTERM)
        assert parent.wait(20) == 128 + signal.SIGTERM
    finally:
        parent.kill()
    assert (tmp_path / "order").read_text() == "cba"
    wait_for(lambda: not any(psutil.pid_exists(int(pid)) and alive(int(pid)) for pid in pids.read_text().split()))


def alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.mark.skipif(sys.platform != "linux", reason="the parent-death signal is Linux's")
def test_children_die_with_a_killed_supervisor(tmp_path):
    code = f"""
import sys; sys.path.insert(0, {str(ROOT)!r})
from pathlib import Path
from services.supervisor import Service, supervise
child = "import os, sys, time; open(sys.argv[1], 'w').write(str(os.getpid())); time.sleep(60)"
supervise([Service("a", [sys.executable, "-S", "-c", child, {str(tmp_path / "pid")!r}])], "a", Path({str(tmp_path)!r}))
"""
    parent = subprocess.Popen([sys.executable, "-c", code])
    pid = tmp_path / "pid"
    wait_for(lambda: pid.exists() and pid.read_text())
    os.kill(parent.pid, signal.SIGKILL)
    parent.wait(10)
    wait_for(lambda: not alive(int(pid.read_text())))
