"""Programs in namespaces of their own, by bubblewrap: the default sandbox on Linux. What it holds off: docs/sandbox.md.

Every case runs in a fresh sandbox that knows of nothing but the system's programs and libraries, read-only, and one
folder in memory, `/tmp`. C++ is compiled once, in a sandbox, too; the binary comes back over a pipe.
"""

import asyncio
import os
import shutil
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from reward_server.sandbox import confined, probe, seccomp
from reward_server.sandbox.confined import Run, SetupFailed
from reward_server.sandbox.health import Health
from reward_server.sandbox.provider import (
    Case,
    CaseResult,
    Language,
    Limits,
    Places,
    Program,
    Reader,
    Sandbox,
    admitted,
    in_turn,
)
from services.startup import StartupError

NOBODY = "65534"
PATH = "/usr/bin:/bin:/usr/local/bin"
SYSTEM = ("bin", "sbin", "lib", "lib32", "lib64", "libexec", "include")
DEVICES = ("null", "zero", "full", "random", "urandom")
LINKS = {"stdin": "/proc/self/fd/0", "stdout": "/proc/self/fd/1", "stderr": "/proc/self/fd/2", "fd": "/proc/self/fd"}
ENVIRONMENT = {"PATH": PATH, "HOME": "/tmp", "LC_ALL": "C.UTF-8", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
STACK_MB = 64
OPEN_FILES = 64
BINARY_BYTES = 2**25
TOOLS: dict[Language, str] = {"python": "python3", "cpp": "g++"}
PROGRAMS = {"bwrap": "bubblewrap", "prlimit": "util-linux", "setpriv": "util-linux"}
"""What it takes itself, and the packages that bring them."""
SOURCE, BINARY = {"python": "/program/main.py", "cpp": "/program/main.cpp"}, "/program/main"
COMPILE = f"g++ -O2 -std=gnu++17 -pipe -o /tmp/main {SOURCE['cpp']} >&2 && cat /tmp/main"
RUN: dict[Language, list[str]] = {"python": ["python3", "-I", "-B", SOURCE["python"]], "cpp": [BINARY]}


@dataclass
class Bubblewrap(Sandbox):
    """`concurrency` cases run at once (none: one a CPU), `queue` programs may wait. `languages` left empty: all whose
    tools are installed."""

    languages: frozenset[str] = frozenset()
    concurrency: int | None = None
    queue: int = 4096

    def __post_init__(self) -> None:
        self.places = Places(self.concurrency or os.cpu_count() or 1, self.queue)
        installed = {name: shutil.which(tool, path=PATH) for name, tool in TOOLS.items()}
        self.tools = {str(name): found for name, found in installed.items() if found}
        self.languages = self.languages or frozenset(self.tools)
        self.health = Health(lambda: self.confine(["true"], Limits()))
        self._filter: int | None = None

    async def start(self) -> None:
        """Raises StartupError unless bubblewrap is there and, tried out, holds."""
        for language, tool in TOOLS.items():
            if language in self.languages - set(self.tools):
                raise StartupError(f"the sandbox needs {tool} for {language}, and there is none in {PATH}")
        if not self.languages:
            raise StartupError(f"the sandbox finds neither python3 nor g++ in {PATH}")
        for name, package in PROGRAMS.items():
            if shutil.which(name, path=PATH) is None:
                raise StartupError(f"the sandbox needs the program {name} (package {package}): there is none in {PATH}")
        try:
            self._filter = confined.sealed(seccomp.program())
        except ValueError as error:
            raise StartupError(str(error)) from error
        self._system = _system(list(self.tools.values()))
        if fault := await probe.fault(self):
            await self.stop()
            raise StartupError(f"the sandbox does not hold here: {fault} (docs/sandbox.md says what it needs)")

    async def stop(self) -> None:
        self.health.stop()
        if self._filter is not None:
            os.close(self._filter)
            self._filter = None

    def state(self) -> str:
        return self.health.state

    async def run(
        self, program: Program, cases: list[Case], limits: Limits, deadline: float, read: Reader | None = None
    ) -> list[CaseResult]:
        if program.language not in self.languages:
            detail = f"the sandbox runs {' and '.join(sorted(self.languages))}, not {program.language}"
            return [CaseResult(status="error", detail=detail)] * len(cases)
        return await admitted(self.places, cases, deadline, lambda: self._run(program, cases, limits, deadline, read))

    async def _run(
        self, program: Program, cases: list[Case], limits: Limits, deadline: float, read: Reader | None
    ) -> list[CaseResult]:
        content = program.source.encode(errors="replace")
        path, command = SOURCE[program.language], RUN[program.language]
        if program.language == "cpp":
            async with asyncio.timeout(max(0.0, deadline - time.monotonic())), self.places.free:
                compiled = await self._compile(content, limits)
            if isinstance(compiled, CaseResult):
                return [compiled] * len(cases)
            path, content = BINARY, compiled

        async def one(case: Case) -> CaseResult:
            async with self.places.free:
                return await self._case(command, {path: content}, case, limits)

        return await in_turn(cases, limits, deadline, one, read)

    async def _compile(self, source: bytes, limits: Limits) -> bytes | CaseResult:
        bounds = Limits(
            seconds=limits.compile_seconds,
            wall_seconds=2 * limits.compile_seconds,
            memory_mb=min(16384, 4 * limits.memory_mb),
            disk_mb=2 * BINARY_BYTES // 2**20,
            output_bytes=BINARY_BYTES,
        )
        try:
            done = await self.confine(["sh", "-c", COMPILE], bounds, {SOURCE["cpp"]: source})
        except SetupFailed as error:
            return CaseResult(status="error", detail=str(error))
        if done.over is None and done.exit_code == 0:
            return bytes(done.stdout)
        if done.over == "deadline":
            return CaseResult(status="deadline", seconds=done.seconds, detail=done.detail)
        stderr = done.stderr.decode(errors="replace")
        return CaseResult(status="compile", stderr=stderr, seconds=done.seconds, detail=done.detail or "compile error")

    async def _case(self, command: list[str], files: dict[str, bytes], case: Case, limits: Limits) -> CaseResult:
        try:
            stdin, most = case.stdin.encode(errors="replace"), case.most_stdout(limits)
            done = await self.confine(command, limits, files, stdin, most)
        except SetupFailed as error:
            return CaseResult(status="error", detail=str(error))
        return CaseResult(
            status=done.over or ("ok" if done.exit_code == 0 else "crash"),
            stdout=done.stdout.decode(errors="replace"),
            stderr=done.stderr.decode(errors="replace"),
            exit_code=None if done.over else done.exit_code,
            seconds=done.seconds,
            detail=done.detail,
        )

    async def confine(
        self,
        command: list[str],
        limits: Limits,
        files: dict[str, bytes] | None = None,
        stdin: bytes = b"",
        most_stdout: int | None = None,
    ) -> Run:
        """Run a command in a fresh sandbox, with `files` (path there -> content). Raises SetupFailed.

        More than `most_stdout` bytes to stdout end it (none: as many as the limits say).
        """
        try:
            with ExitStack() as stack:
                done = await self._confine(stack, command, limits, files or {}, stdin, most_stdout)
        except (SetupFailed, OSError) as error:  # an OSError: we are out of descriptors, processes or memory
            why = str(error)
            self.health.broke(f"bubblewrap: {why}")
            raise SetupFailed(why) from error
        self.health.worked()
        return done

    async def _confine(
        self,
        stack: ExitStack,
        command: list[str],
        limits: Limits,
        files: dict[str, bytes],
        stdin: bytes,
        most_stdout: int | None,
    ) -> Run:
        """With descriptors that the stack closes. Raises SetupFailed and OSError."""

        def ours(fd: int) -> int:
            stack.callback(os.close, fd)
            return fd

        def readable(content: bytes) -> int:
            return ours(confined.reopened(ours(confined.sealed(content))))

        text = readable(stdin)
        report, status = map(ours, os.pipe())
        data = {path: readable(content) for path, content in files.items()}
        assert self._filter is not None, "the sandbox was not started"
        rules = ours(confined.reopened(self._filter))
        arguments = self._arguments(command, limits, data, rules, status)
        fds = [rules, status, *data.values()]
        return await confined.run(arguments, text, fds, report, limits, most_stdout or limits.output_bytes)

    def _arguments(
        self, command: list[str], limits: Limits, data: dict[str, int], rules: int, status: int
    ) -> list[str]:
        # No limit on the number of processes binds root, not even root's processes in a user namespace.
        drop = [_found("setpriv"), "--reuid", NOBODY, "--regid", NOBODY, "--clear-groups", "--"]
        isolation = ["--unshare-all", "--unshare-user", "--die-with-parent", "--new-session", "--cap-drop", "ALL"]
        identity = ["--uid", NOBODY, "--gid", NOBODY, "--hostname", "sandbox", "--clearenv"]
        variables = [word for name, value in ENVIRONMENT.items() for word in ("--setenv", name, value)]
        bound = [word for path, fd in data.items() for word in ("--perms", "0555", "--ro-bind-data", str(fd), path)]
        folder = ["--size", str(limits.disk_mb * 2**20), "--perms", "1777", "--tmpfs", "/tmp", "--chdir", "/tmp"]
        handles = ["--seccomp", str(rules), "--json-status-fd", str(status)]
        return [
            *(drop if os.geteuid() == 0 else []),
            *(_found("bwrap"), *isolation, *identity, *variables, *self._system, *bound, *folder),
            *("--remount-ro", "/", *handles, "--"),
            *("prlimit", *_rlimits(limits), "--", *command),
        ]


def _found(program: str) -> str:
    return shutil.which(program, path=PATH) or program


def _system(tools: list[str]) -> list[str]:
    """bubblewrap's arguments for what programs see of the system: of /usr/local only if a tool lives there."""
    arguments = []
    for prefix in ("/usr", "/usr/local", "/"):
        for name in SYSTEM:
            folder = Path(prefix, name)
            if prefix == "/usr/local" and not any(tool.startswith(prefix) for tool in tools):
                continue
            if folder.is_symlink():
                arguments += ["--symlink", os.readlink(folder), str(folder)]
            elif folder.is_dir():
                arguments += ["--ro-bind", str(folder), str(folder)]
    for file in ("/etc/ld.so.cache", "/etc/alternatives"):
        arguments += ["--ro-bind-try", file, file]
    for device in DEVICES:
        arguments += ["--dev-bind", f"/dev/{device}", f"/dev/{device}"]
    for name, target in LINKS.items():
        arguments += ["--symlink", target, f"/dev/{name}"]
    return [*arguments, "--symlink", "/tmp", "/dev/shm", "--proc", "/proc"]


def _rlimits(limits: Limits) -> list[str]:
    """prlimit's arguments: they hold for each process, while `confined` watches the tree."""
    wanted = {
        "as": limits.memory_mb * 2**20,
        "nproc": limits.processes,
        "cpu": int(limits.seconds) + 2,
        "fsize": limits.disk_mb * 2**20,
        "nofile": OPEN_FILES,
        "stack": STACK_MB * 2**20,
        "core": 0,
        "memlock": 0,
        "msgqueue": 0,
    }
    return [f"--{name}={value}:{value}" for name, value in wanted.items()]
