"""A real Slurm of several nodes on one machine: its own munge key, sockets, ports and folders, ended with the test."""

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from services.address import free_port

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "scontrol", "squeue", "scancel")
HOW = "Slurm is missing: apt-get install slurm-wlm munge"


def has_slurm() -> bool:
    return all(shutil.which(program, path=_path()) for program in PROGRAMS)


def _path() -> str:
    return f"{os.environ['PATH']}:/usr/sbin:/usr/local/sbin"


def _settings(folder: Path, nodes: int) -> str:
    host = socket.gethostname()
    machines = "".join(
        f"NodeName=n{n} NodeHostname={host} NodeAddr=127.0.0.1 Port={free_port()} "
        f"CPUs={os.cpu_count()} RealMemory=4000\n"
        for n in range(1, nodes + 1)
    )
    return f"""ClusterName=rlif
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={free_port()}
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmUser={Path.home().owner()}
SlurmdUser={Path.home().owner()}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.sock
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
ReturnToService=2
KillWait=10
MinJobAge=3600
{machines}PartitionName=debug Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


@contextmanager
def slurm(folder: Path, nodes: int) -> Iterator[dict[str, str]]:
    """Yields the environment in which Slurm's commands find the cluster, once every node is idle."""
    (folder / "state").mkdir(parents=True)
    key, conf = folder / "munge.key", folder / "slurm.conf"
    key.write_bytes(os.urandom(1024))
    key.chmod(0o400)
    conf.write_text(_settings(folder, nodes))
    env = {**os.environ, "PATH": _path(), "SLURM_CONF": str(conf)}
    munge = {name: folder / f"munge.{name}" for name in ("sock", "pid", "log", "seed")}
    daemons = [
        ["munged", "--foreground", "--force", f"--key-file={key}", f"--socket={munge['sock']}"]
        + [f"--pid-file={munge['pid']}", f"--log-file={munge['log']}", f"--seed-file={munge['seed']}"],
        ["slurmctld", "-D", "-c", "-f", str(conf)],
        *(["slurmd", "-D", "-c", "-N", f"n{n}", "-f", str(conf)] for n in range(1, nodes + 1)),
    ]
    started: list[subprocess.Popen] = []
    try:
        for argv in daemons:
            # To a file: jobs inherit what the daemon has open, and a pipe would stay open with them.
            with (folder / "daemons.log").open("ab") as out:
                started.append(subprocess.Popen(argv, env=env, stdout=out, stderr=out, start_new_session=True))
            time.sleep(0.5)
        _wait_idle(env, nodes, started, folder)
        yield env
    finally:
        if started:
            subprocess.run(["scancel", "--quiet", "--user", Path.home().owner()], env=env, timeout=30)
            _wait_gone(env)
        for daemon in reversed(started):
            daemon.terminate()
        for daemon in reversed(started):
            try:
                daemon.wait(10)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()


def _wait_idle(env: dict[str, str], nodes: int, started: list[subprocess.Popen], folder: Path) -> None:
    ends = time.monotonic() + 60
    while True:
        said = subprocess.run(["sinfo", "-hNo", "%T"], env=env, capture_output=True, text=True, timeout=30).stdout
        if said.split().count("idle") == nodes:
            return
        log = (folder / "daemons.log").read_text()[-2000:]
        assert all(daemon.poll() is None for daemon in started), f"a daemon of Slurm ended:\n{log}"
        assert time.monotonic() < ends, f"Slurm did not come up: {said}\n{log}"
        time.sleep(0.5)


def _wait_gone(env: dict[str, str]) -> None:
    ends = time.monotonic() + 60
    while subprocess.run(["squeue", "-h"], env=env, capture_output=True, timeout=30).stdout.strip():
        if time.monotonic() > ends:
            return
        time.sleep(0.5)


def job_facts(env: dict[str, str], job: str) -> dict[str, str]:
    """What `scontrol show job` says: JobState, ExitCode, Restarts, ..."""
    said = subprocess.run(["scontrol", "-o", "show", "job", job], env=env, capture_output=True, text=True, timeout=30)
    return dict(part.split("=", 1) for part in said.stdout.split() if "=" in part)
